"""The difference of two bases as a pack: what somebody trained into a whole model, on the model that it was trained from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sdlora import family
from sdlora.errors import UserError
from sdlora.family import Base, Family
from sdlora.layers import is_linear
from sdlora.packs import deltas, metadata, workshop
from sdlora.packs.deltas import Change
from sdlora.packs.file import Pack
from sdlora.packs.workshop import Budget, Cost

NUMBERS = {"F16": torch.float16, "BF16": torch.bfloat16}
ALIKE = "name the model that it was trained from"
SPARE, TURNS = 8, 4
"""Of a randomised SVD: directions beyond those that are wanted, and power iterations (Halko et al. 2011, algorithms 4.4 and 5.1)."""


@dataclass(frozen=True)
class Extracted:
    """What a pack has of a difference, and what it has not."""

    cost: Cost
    layers: int
    same: int  # layers in which the bases do not differ
    rounding: int  # and those in which they do by less than the number format of either
    beside: Sequence[str]  # what differs and is no weight of a layer that LoRA sits on: norms, biases, embeddings

    def line(self) -> str:
        left = f"{self.layers} layers differ, {self.same} do not" + (f", {self.rounding} by rounding alone" if self.rounding else "")
        if self.beside:
            left += f"; {len(self.beside)} norms, biases and embeddings differ and are in no pack, such as {self.beside[0]}"
        return f"{left}; {self.cost.line()}"


def extract(base: Base, tuned: Base, out: Path, budget: Budget) -> Extracted:
    """Write what `tuned` has over `base` as a pack, each layer's ΔW at the rank that the budget allows. Raises `UserError`."""
    if base.family != tuned.family:
        what = f"these are of different families of models, {base.family} and {tuned.family}"
        raise UserError("E-SHOP-06", what, tuned.name, ALIKE)
    loaded, others = (family.load(one, torch.device("cpu"), torch.float32) for one in (base, tuned))
    wanted, same, rounding = differences(loaded, others)
    if not wanted:
        what = "these two bases do not differ in any layer that a pack changes"
        raise UserError("E-SHOP-15", what, tuned.name, "name two different ones")
    kept = {dotted: shortened(change, budget) for dotted, change in wanted.items()}
    said = {**metadata.of_base(loaded), "modelspec.sai_model_spec": "1.0.1", "modelspec.title": out.stem}
    header = Pack(out.stem, {}, {**said, "sdlora.extracted": f"{tuned.name} less {base.name}"})
    cost = workshop.write(out, header, deltas.named(wanted, loaded), deltas.named(kept, loaded), {})
    return Extracted(cost, len(wanted), same, rounding, [*beside(loaded, others)])


def differences(loaded: Family, others: Family) -> tuple[dict[str, Change], int, int]:
    """By layer, what another base of the family has more; how many layers are the same, and how many differ by rounding alone."""
    formats = {part: noise(loaded.base, others.base, part) for part in loaded.components}
    found: dict[str, Change] = {}
    same, rounding, theirs = 0, 0, others.layers()
    for dotted, layer in loaded.layers().items():
        if not is_linear(layer):
            continue
        before, after = layer.get_parameter("weight").detach(), theirs[dotted].get_parameter("weight").detach()
        if before.shape != after.shape:
            what = f"{dotted} is of the shape {tuple(before.shape)} in one and {tuple(after.shape)} in the other"
            raise UserError("E-SHOP-06", what, others.base.name, ALIKE)
        change = (after - before).flatten(1)
        size = float(torch.linalg.vector_norm(change))
        if size > formats[dotted.partition(".")[0]] * float(torch.linalg.vector_norm(before)):
            found[dotted] = Change(tuple(before.shape), whole=change.double())
        same, rounding = same + (not size), rounding + (size > 0 and dotted not in found)
    return found, same, rounding


def noise(base: Base, tuned: Base, part: str) -> float:
    """By how much weights may differ, relative, because the two files hold them in different number formats."""
    formats = [tuple(one.source.precision(part)) for one in (base, tuned)]
    if formats[0] == formats[1]:
        return 0.0
    return max(torch.finfo(NUMBERS.get(name, torch.float32)).eps / 2 for names in formats for name in names)


def beside(loaded: Family, others: Family) -> Iterator[str]:
    """Names of what differs and is no weight of a linear layer or convolution."""
    weights = {f"{dotted}.weight" for dotted, layer in loaded.layers().items() if is_linear(layer)}
    for part, component in loaded.components.items():
        theirs = dict(others.components[part].named_parameters())
        for name, parameter in component.named_parameters():
            if f"{part}.{name}" not in weights and not torch.equal(parameter, theirs[name]):
                yield f"{part}.{name}"


def shortened(change: Change, budget: Budget) -> Change:
    """As the workshop shortens; where a rank is all that is asked of a large matrix, by a randomised SVD, of a seed of its own."""
    matrix = change.matrix()
    if budget.rank is None or budget.rank + SPARE >= min(matrix.shape) // 4:
        return workshop.shortened(change, budget)
    u, values, v = randomised(matrix, budget.rank)
    root = values.sqrt()
    return replace(change, left=u * root, right=root[:, None] * v, whole=None)


def randomised(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` singular triples, u (m, r), values (r,), v (r, n), nearly."""
    start = torch.randn(matrix.shape[1], rank + SPARE, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ start)[0]
    for _ in range(TURNS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    u, values, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], values[:rank], v[:rank]
