"""Which adapter acts on which sample of a batch, and how strongly: what a bank of adapters and its layers share."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Route:
    """Which adapters act on which samples of a batch.

    `slots` names the one slot of each sample and `strength` is (B,) or (1,); without `slots` every slot acts on every sample and
    `strength` is (K,) or (B, K). Where `active` names some slots, all others act on no sample and cost nothing. In training, and only
    there, `keys` (B,) int64 are what the random numbers of each sample's dropout are made of.

    The slots are numbers of the host, so that no layer waits for the device to learn which rows are whose.
    """

    strength: Tensor
    slots: Sequence[int] | None = None
    active: tuple[int, ...] | None = None
    keys: Tensor | None = None
    kept: dict[Any, Any] = field(default_factory=dict, compare=False)
    """What kinds of adapters compute once for all layers, for as long as the route is set."""

    def alike(self, slot: int) -> Tensor | None:
        """The strength () at which a slot acts on every sample, if it is one for all of them."""
        if self.slots is not None and [own for own, _ in self.blocks] != [slot]:
            return None
        strength = self.strength if self.slots is not None else self.strength[..., slot]
        return strength.reshape(()) if strength.numel() == 1 else None

    def strength_of(self, rows: slice) -> Tensor:
        """The strength on some samples of a batch that has slots: (n,) or (1,)."""
        return self.strength if len(self.strength) == 1 else self.strength[rows]

    @cached_property
    def blocks(self) -> list[tuple[int, slice]]:
        """The samples of one slot that lie together, as (slot, rows), in order."""
        found, start = list[tuple[int, slice]](), 0
        for slot, rows in itertools.groupby(() if self.slots is None else map(int, self.slots)):
            end = start + len(list(rows))
            found.append((slot, slice(start, end)))
            start = end
        return found


def wide(strength: Tensor, like: Tensor) -> Tensor:
    """Strengths (B,) or (1,) in the shape that multiplies a batch (B, ...)."""
    return strength.to(like).view(-1, *[1] * (like.ndim - 1))


@dataclass
class Routing:
    """What a bank and its sites share. It holds no site, so that no base holds itself: its memory is free when nobody holds it."""

    adapters: list[str] = field(default_factory=list)  # the slot of an adapter is its place in this list
    route: Route | None = None
    groups: list[list[tuple[nn.Module, nn.ModuleDict]]] = field(default_factory=list)
    """Adapted layers with no layers inside, and the deltas on each, by adapter name; those that read the same, together."""
