"""What a pack adds to each weight, float64: as two factors where it has them, so that no large matrix is ever decomposed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from sdlora.adapter import Bank
from sdlora.errors import UserError
from sdlora.family import Family
from sdlora.lowrank import Factors
from sdlora.packs import convert, keys
from sdlora.packs.convert import MID
from sdlora.packs.file import Pack, attach
from sdlora.packs.layouts import DOWN, UP

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """ΔW of one layer, in the shape of its weight: left (out, r) @ right (r, in·k·k), or `whole` (out, in·k·k)."""

    shape: Shape
    left: Tensor | None = None
    right: Tensor | None = None
    whole: Tensor | None = None

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.left is None or self.right is None else (self.left, self.right)

    def matrix(self) -> Tensor:
        """(out, in·k·k)"""
        if self.whole is not None:
            return self.whole
        assert self.left is not None
        assert self.right is not None
        return self.left @ self.right

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """u (out, q), values (q,) falling, v (q, in·k·k). Of factors only the core between their bases is decomposed, at most r by r."""
        if self.factors is None or self.factors[0].shape[1] >= min(len(self.factors[0]), self.factors[1].shape[1]):
            u, values, v = torch.linalg.svd(self.matrix(), full_matrices=False)
            return u, values, v
        (left, core), (right, other) = torch.linalg.qr(self.factors[0]), torch.linalg.qr(self.factors[1].T)
        u, values, v = torch.linalg.svd(core @ other.T, full_matrices=False)
        return left @ u, values, v @ right.T

    def dot(self, other: "Change") -> float:
        """Sum of the products of like elements; through the factors' small products where both have them."""
        mine, theirs = self.factors, other.factors
        if mine is None or theirs is None:
            return float((self.matrix() * other.matrix()).sum())
        return float(((mine[0].T @ theirs[0]) * (mine[1] @ theirs[1].T)).sum())

    def norm(self) -> float:
        """Frobenius norm."""
        return sqrt(max(0.0, self.dot(self)))

    def distance(self, other: "Change") -> float:
        """Norm of the difference; through bases at right angles, since a difference of two like squares is rounding alone."""
        difference = total([(self, 1.0), (other, -1.0)])
        if difference.factors is None:
            return float(torch.linalg.vector_norm(difference.matrix()))
        core, other_core = torch.linalg.qr(difference.factors[0])[1], torch.linalg.qr(difference.factors[1].T)[1]
        return float(torch.linalg.vector_norm(core @ other_core.T))


def total(parts: Sequence[tuple[Change, float]]) -> Change:
    """The exact weighted sum: all factors side by side, or one matrix where one part has no factors."""
    shape = parts[0][0].shape
    if any(len(change.shape) != len(shape) or change.shape != shape for change, _ in parts):
        shapes = " and ".join(sorted({str(change.shape) for change, _ in parts}))
        raise UserError("E-SHOP-01", f"these packs are of different bases: one layer has the shapes {shapes}", "packs", "take like ones")
    pairs = [(change.factors, scale) for change, scale in parts]
    if all(factors is not None for factors, _ in pairs):
        lefts = [factors[0] * scale for factors, scale in pairs if factors is not None]
        rights = [factors[1] for factors, _ in pairs if factors is not None]
        return Change(shape, torch.cat(lefts, 1), torch.cat(rights))
    whole = torch.zeros(shape[0], parts[0][0].matrix().shape[1], dtype=torch.float64)
    for change, scale in parts:
        whole += scale * change.matrix()
    return Change(shape, whole=whole)


def of(pack: Pack) -> dict[str, Change]:
    """By pack module, of a pack in kohya's layout, without its base. Raises `UserError` for kinds whose ΔW the base's weight shapes."""
    found = {}
    for module, leaves in keys.by_module(pack.tensors).items():
        if not module.startswith("lora_"):
            what = f"{module} is not in kohya's layout"
            raise UserError("E-SHOP-02", what, pack.name, "name its base with --base, or convert it first (sdlora pack convert)")
        named = set(leaves)
        if {DOWN, UP} <= named <= {DOWN, UP, MID, "alpha"}:
            found[module] = _lora(leaves)
        elif {"diff"} <= named <= {"diff", "alpha"}:
            found[module] = Change(tuple(leaves["diff"].shape), whole=leaves["diff"].double().flatten(1))
        else:
            what = f"what {module} adds is told only beside its base's weight ({', '.join(sorted(named))})"
            raise UserError("E-SHOP-03", what, pack.name, "name its base with --base")
    return found


def beside(pack: Pack, family: Family) -> dict[str, Change]:
    """By full layer name, of a pack in any layout and of any kind that is a change of weights, with its base at hand."""
    bank = Bank(family.components)
    attach(pack, "pack", bank, family)
    try:
        found = {}
        for dotted, layer, delta in bank.deltas("pack"):
            change = delta.merged(layer)
            if change is None:
                what = f"what this pack does at {dotted} is no change of its weight"
                raise UserError("E-SHOP-04", what, pack.name, "take a pack of another kind: words, prefixes and bottlenecks stay adapters")
            if isinstance(delta, Factors) and delta.leaves == Factors.leaves:
                up, down = delta.up.detach().double().flatten(1), delta.down.detach().double().flatten(1)
                found[dotted] = Change(tuple(change.shape), up * delta.scale, down)
            else:
                found[dotted] = Change(tuple(change.shape), whole=change.double().flatten(1))
        return found
    finally:
        bank.eject()


def named(changes: Mapping[str, Change], family: Family) -> dict[str, Change]:
    """By pack module, of changes that are given by layer."""
    return {keys.module_name(dotted, family.prefixes): change for dotted, change in changes.items()}


def _lora(leaves: dict[str, Tensor]) -> Change:
    kernel = leaves.get(MID, leaves[DOWN]).shape[2:]
    made = convert.canonical(leaves, torch.empty(len(leaves[UP]), leaves[DOWN].shape[1], *kernel, device="meta"))
    down, up = made[DOWN].double(), made[UP].double()
    scale = float(made["alpha"]) / leaves[DOWN].shape[0] if "alpha" in made else 1.0
    return Change((len(up), *down.shape[1:]), up.flatten(1) * scale, down.flatten(1))
