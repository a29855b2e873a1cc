"""Packs made of packs: merged, averaged, resized, compared. All of it is done on ΔW, module by module, and says what it cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sdlora.errors import UserError
from sdlora.packs import deltas, file, precision
from sdlora.packs.deltas import Change
from sdlora.packs.file import Pack
from sdlora.packs.layouts import DOWN, UP

How = Literal["concat", "svd", "sum"]
Changes = Mapping[str, Change]


@dataclass(frozen=True)
class Budget:
    """How much of a ΔW is kept: a rank, a share of its energy (sum of squared singular values), or a relative error."""

    rank: int | None = None
    energy: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        said = [value for value in (self.rank, self.energy, self.error) if value is not None]
        if len(said) != 1 or not said[0] > 0 or (self.rank is None and said[0] > 1):
            todo = "--rank of 1 and up, or --energy or --error, both above 0 and at most 1"
            raise UserError("E-SHOP-05", "one bound is needed, and it must be one that can be kept", "resize", todo)

    def of(self, values: Tensor) -> int:
        """How many of these falling singular values are kept, at least one."""
        if self.rank is not None:
            return min(self.rank, len(values))
        share = self.energy if self.energy is not None else 1 - (self.error or 0.0) ** 2
        return rank_for(values, share)


@dataclass(frozen=True)
class Cost:
    """How far what was written is from what was asked, of Frobenius norms."""

    error: float  # overall
    worst: float
    module: str
    ranks: tuple[int, int]  # least and greatest; 0 where no factors are kept
    size: int  # bytes of tensors

    @property
    def energy(self) -> float:
        """Share that was kept, where what is lost is at right angles to it."""
        return max(0.0, 1 - self.error**2)

    def line(self) -> str:
        ranks = (
            "full matrices"
            if not self.ranks[1]
            else f"rank {self.ranks[0]}"
            if len(set(self.ranks)) == 1
            else "ranks {} to {}".format(*self.ranks)
        )
        kept = f"{100 * self.energy:.3f} % of the energy kept, relative error {self.error:.2g}"
        return f"{ranks}, {self.size / 2**20:.2f} MiB, {kept}, at worst {self.worst:.2g} ({self.module})"


@dataclass(frozen=True)
class Difference:
    """Of one module of two packs: norm of the difference over the larger norm, and the cosine between both; None where only one has it."""

    module: str
    relative: float | None
    cosine: float | None
    only: str = ""


def rank_for(values: Tensor, share: float) -> int:
    """The smallest rank that keeps this share of the energy of falling singular values, at least 1."""
    kept = values.square().cumsum(0)
    return 1 + int((kept < share * kept[-1] * (1 - 1e-12)).sum()) if float(kept[-1]) else 1


def combined(packs: Sequence[tuple[Changes, float]]) -> dict[str, Change]:
    """The exact weighted sum of ΔW. Raises `UserError` for packs that have no module in common: they are of different bases."""
    names = [set(changes) for changes, _ in packs]
    everything = list(dict.fromkeys(module for changes, _ in packs for module in changes))
    started = [{module.split("_")[1] for module in one} for one in names]
    apart = any(not a & b and sa & sb for a, sa in zip(names, started, strict=True) for b, sb in zip(names, started, strict=True))
    if apart:
        what = "these packs have layers of the same component and none in common: they are of different bases"
        raise UserError("E-SHOP-06", what, "packs", "merge packs of one family of models")
    return {module: deltas.total([(changes[module], scale) for changes, scale in packs if module in changes]) for module in everything}


def shortened(change: Change, budget: Budget) -> Change:
    """The best approximation within the budget (Eckart and Young 1936), both factors of like size."""
    u, values, v = change.svd()
    rank = budget.of(values)
    root = values[:rank].sqrt()
    return Change(change.shape, u[:, :rank] * root, root[:, None] * v[:rank])


def made(changes: Changes, how: How, budget: Budget | None = None) -> dict[str, Change]:
    """The same ΔW as factors side by side, as matrices, or within a budget."""
    if how == "svd":
        if budget is None:
            raise UserError("E-SHOP-07", "the rank to merge to is missing", "--how svd", "give --rank")
        return {module: shortened(change, budget) for module, change in changes.items()}
    if how == "sum":
        return {module: Change(change.shape, whole=change.matrix()) for module, change in changes.items()}
    whole = next((module for module, change in changes.items() if change.factors is None), None)
    if whole:
        raise UserError("E-SHOP-08", f"{whole} has no factors to put side by side", "--how concat", "--how sum, or --how svd --rank R")
    return dict(changes)


def tensors(changes: Changes) -> dict[str, Tensor]:
    """As a pack writes them. One alpha for all: readers that mix up the alphas of a component have none to mix up."""
    found: dict[str, Tensor] = {}
    alpha = max((len(change.factors[1]) for change in changes.values() if change.factors), default=1)
    for module, change in changes.items():
        if change.factors is None:
            found[f"{module}.diff"] = change.matrix().float().reshape(change.shape)
            continue
        left, right = change.factors
        rank, kernel = len(right), change.shape[2:]
        up = (left * (rank / alpha)).reshape(len(left), rank, *[1] * len(kernel))
        found |= {f"{module}.{DOWN}": right.float().reshape(rank, *change.shape[1:]), f"{module}.{UP}": up.float()}
        found[f"{module}.alpha"] = torch.tensor(float(alpha))
    precision.check_finite(found)
    return precision.cast(found, torch.float16, {"alpha"})[0]


def write(path: Path, first: Pack, wanted: Changes, kept: Changes, said: Mapping[str, str]) -> Cost:
    """Write `kept` under the first pack's header with `said` over it, and judge what was written, as it reads back, by `wanted`."""
    held = tensors(kept)
    ranks = {len(change.factors[1]) for change in kept.values() if change.factors}
    about = {name: value for name, value in first.metadata.items() if name != "lora_adapter_metadata"}
    about |= {"ss_output_name": path.stem, "sdlora.recommended_scale": "1.0", "sdlora.adapter": "lora" if ranks else "full", **said}
    if ranks:
        about |= {"ss_network_dim": str(max(ranks)), "ss_network_alpha": str(float(max(ranks))), "ss_network_module": "networks.lora"}
    if ranks and any(not change.factors for change in kept.values()):
        del about["sdlora.adapter"]
    hashed: Callable[[str], dict[str, str]] = lambda sha: {**about, "modelspec.hash_sha256": f"0x{sha}", "sshs_model_hash": sha}  # noqa: E731
    file.save(path, held, hashed)
    size = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    return cost(wanted, deltas.of(file.load(path)), size)


def cost(wanted: Changes, got: Changes, size: int = 0) -> Cost:
    """What `got` lacks of `wanted`."""
    lost, norms = {m: change.distance(got[m]) for m, change in wanted.items()}, {m: change.norm() for m, change in wanted.items()}
    shares = {module: lost[module] / norms[module] if norms[module] else 0.0 for module in wanted}
    worst = max(shares, key=lambda module: shares[module])
    every = sum(value**2 for value in norms.values()) ** 0.5
    ranks = [len(change.factors[1]) if change.factors else 0 for change in got.values()]
    error = sum(value**2 for value in lost.values()) ** 0.5 / every if every else 0.0
    return Cost(error, shares[worst], worst, (min(ranks), max(ranks)), size)


def compared(a: tuple[str, Changes], b: tuple[str, Changes]) -> list[Difference]:
    """Module by module, what only one has first, then the most different."""
    alone = [Difference(m, None, None, name) for (name, one), (_, other) in ((a, b), (b, a)) for m in one if m not in other]
    found = []
    for module in (name for name in a[1] if name in b[1]):
        first, second = a[1][module], b[1][module]
        size = max(first.norm(), second.norm())
        both = first.norm() * second.norm()
        found.append(Difference(module, first.distance(second) / size if size else 0.0, first.dot(second) / both if both else None))
    return alone + sorted(found, key=lambda one: -(one.relative or 0.0))


def merge(
    packs: Sequence[tuple[Pack, float]], changes: Sequence[Changes], out: Path, how: How = "concat", budget: Budget | None = None
) -> Cost:
    """Write the weighted sum of packs, each with what it changes, as one; the header says of what."""
    if not packs:
        raise UserError("E-SHOP-09", "there is nothing to merge", "packs", "name packs")
    if len({pack.metadata.get("ss_base_model_version", "") for pack, _ in packs} - {""}) > 1:
        raise UserError("E-SHOP-06", "these packs are of different families of models", "packs", "merge packs of one family of models")
    wanted = combined([(own, scale) for own, (_, scale) in zip(changes, packs, strict=True)])
    triggers = list(dict.fromkeys(pack.trigger for pack, _ in packs if pack.trigger))
    said = {"sdlora.merged": "; ".join(f"{pack.name}:{scale:g} sha256 {pack.sha256}" for pack, scale in packs)}
    if triggers:
        said["modelspec.trigger_phrase"] = ", ".join(triggers)
    return write(out, packs[0][0], wanted, made(wanted, how, budget), said)


def resize(pack: Pack, wanted: Changes, out: Path, budget: Budget) -> Cost:
    """Write what a pack changes at the least ranks that keep to the budget; its recommended scale stays."""
    said = {"sdlora.resized": f"{pack.name} sha256 {pack.sha256}", "sdlora.recommended_scale": str(pack.recommended_scale)}
    return write(out, pack, wanted, made(wanted, "svd", budget), said)


def scaled(text: str) -> tuple[Path, float]:
    """`file.safetensors:0.8` -> the file and 0.8; 1 where none is said."""
    name, colon, number = text.rpartition(":")
    try:
        return (Path(name), float(number)) if colon and name else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0
