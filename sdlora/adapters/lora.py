"""LoRA (Hu et al. 2021, section 4.1): ΔW = (alpha / rank) · up @ down, with up zero at the start; PiSSA, LoRA-FA and dropout on it."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sdlora.adapter import Delta
from sdlora.fused import is_plain, shadows
from sdlora.layers import is_linear, weight_of
from sdlora.lowrank import DOWN, UP, Factored, Factors, Init
from sdlora.randomness import uniform
from sdlora.routing import Route, Routing, wide

Share = Annotated[float, Field(ge=0, lt=1)]


class Config(Factored):
    kind: Literal["lora"] = "lora"
    """Low-rank adaptation."""
    init: Init | Literal["pissa"] = "kaiming"  # type: ignore[assignment]
    """Start of the factor `down`, while `up` starts at zero: uniform as in LoRA's own code, normal with deviation 1 / rank, or rows at
    right angles to one another. pissa (Meng et al. 2024, section 3): both start as the weight's principal part, and ΔW is what they have
    come to less that; the pack is a LoRA of twice the rank."""
    lora_fa: bool = False
    """LoRA-FA (Zhang et al. 2023, section 3): `down` stays as it started, which saves its gradient and the optimizer's memory of it."""
    dropout: Share = 0.0
    """Share of a layer's inputs that the adapter does not see, in each sample of training others."""
    rank_dropout: Share = 0.0
    """Share of the rank that is left out, in each sample of training another."""
    module_dropout: Share = 0.0
    """Share of the layers whose adapter is left out, in each sample of training others."""


def fits(layer: nn.Module) -> bool:
    """Whether this kind can sit on the layer."""
    return is_linear(layer)


class Adapter(Factors):
    """Both factors are computed in the layer's dtype, one after the other; on a convolution `down` has the kernel (LoCon)."""

    network = "networks.lora"
    first: tuple[Tensor, Tensor] | None = None
    """PiSSA: down and up as they started, whose product is taken off."""

    def __init__(self, layer: nn.Module, config: Config, rng: np.random.Generator) -> None:
        pissa = config.init == "pissa"
        super().__init__(layer, config.model_copy(update={"init": "kaiming"}) if pissa else config, rng)
        self.dropouts = (config.dropout, config.rank_dropout, config.module_dropout)
        self.salt = int(rng.integers(2**62))
        if pissa:
            self.down.data, self.up.data = principal(weight_of(layer), self.rank, self.scale)
            self.first = (self.down.detach().clone(), self.up.detach().clone())
        self.down.requires_grad_(not config.lora_fa)

    def change(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        changed = self._product(layer, x, self.down, self.up)
        return changed if self.first is None else changed - self._product(layer, x, *self.first)

    def dropped(self, layer: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        if not any(self.dropouts):
            return self.change(layer, x, y)
        inputs, ranks, modules = self.dropouts
        x = x * self._kept(keys, 0, x[0].numel(), inputs).view_as(x).to(x.dtype)
        kept = (self._kept(keys, 1, self.rank, ranks) * self._kept(keys, 2, 1, modules)).to(x.dtype)
        changed = self._product(layer, x, self.down, self.up, kept)
        return changed if self.first is None else changed - self._product(layer, x, *self.first, kept)

    def at_once(self, layer: nn.Module, x: Tensor, slot: int, routing: Routing) -> Tensor | None:
        route = routing.route
        strength = route.alike(slot) if route and self._is_plain(layer) else None
        if route is None or strength is None:
            return None
        key = (slot, x.dtype, x.device, torch.is_grad_enabled())
        own = route.kept.get(key, {}).get(self)
        if own is None or not own.is_fresh:
            groups = together(routing, routing.adapters[slot])
            route.kept[key] = {one: made for made in shadows(groups, strength, x.dtype) for one in made.owners}
            own = route.kept[key][self]
        said: Tensor = own.of(layer, x)
        return said

    def _is_plain(self, layer: nn.Module) -> bool:
        """Whether the layer and its adapter are no more than three products."""
        return self.first is None and not any(self.dropouts) and is_plain(layer)

    def _kept(self, keys: Tensor, which: int, count: int, share: float) -> Tensor:
        """(B, count) of 0, where something is left out, and of what keeps the mean where it was; (B, 1) of 1 where all is kept."""
        if not share:
            return torch.ones(len(keys), count, device=keys.device)
        return (uniform(keys, self.salt + which, count) >= share) / (1 - share)

    def _product(self, layer: nn.Module, x: Tensor, down: Tensor, up: Tensor, kept: Tensor | None = None) -> Tensor:
        down, up = down.to(x.dtype), up.to(x.dtype) * self.scale
        if isinstance(layer, nn.Conv2d):
            hidden = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
            return F.conv2d(hidden if kept is None else hidden * kept[..., None, None], up)
        hidden = F.linear(x, down)
        return F.linear(hidden if kept is None else hidden * kept.view(len(x), *[1] * (x.ndim - 2), -1), up)

    def difference(self, layer: nn.Module) -> Tensor:
        if self.first is None:
            return super().difference(layer)
        down, up = (one.to(self.down.dtype) for one in self.first)
        return super().difference(layer) - self.scale * (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])

    def tensors(self) -> dict[str, Tensor]:
        """PiSSA's difference of two products is one of twice the rank, whose factors are made anew: in those at hand half precision would
        lose what was learnt beside the principal part."""
        if self.first is None:
            return super().tensors()
        down = torch.cat([self.down, self.first[0]]).detach()
        up = torch.cat([self.up, -self.first[1]], 1).detach()
        (left, core), (right, other) = torch.linalg.qr(up.flatten(1)), torch.linalg.qr(down.flatten(1).T)
        u, values, v = torch.linalg.svd(core @ other.T, full_matrices=False)
        missing = len(down) - len(values)
        new_up = F.pad(left @ u * values.sqrt(), (0, missing)).view_as(up)
        new_down = F.pad(values.sqrt()[:, None] * v @ right.T, (0, 0, 0, missing)).view_as(down)
        return {DOWN: new_down, UP: new_up, "alpha": torch.tensor(2.0 * self.alpha)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        super().load(tensors)
        self.first = None

    @classmethod
    def mixed(cls, deltas: Sequence[tuple[int, Delta]], layer: nn.Module, x: Tensor, y: Tensor, out: Tensor, route: Route) -> Tensor:
        """Linear layers: one product with all factors stacked, or one batched product with each sample's own factors."""
        loras = [delta for _, delta in deltas if isinstance(delta, Adapter)]
        single = any(one.first is not None or (route.keys is not None and any(one.dropouts)) for one in loras)
        if single or not isinstance(layer, nn.Linear):
            return super().mixed(deltas, layer, x, y, out, route)
        if route.slots is None:
            return _stacked(deltas, x, out, route.strength)
        by_slot = {slot: delta for slot, delta in deltas if isinstance(delta, Adapter)}
        chosen = [by_slot[slot] for slot, _ in route.blocks if slot in by_slot]
        sizes = {rows.stop - rows.start for _, rows in route.blocks}
        if len(deltas) == 1 or len(chosen) < len(route.blocks) or len(sizes) > 1:
            return super().mixed(deltas, layer, x, y, out, route)
        return _batched(chosen, x, out, route.strength)


def together(routing: Routing, name: str) -> list[list[tuple[nn.Module, Adapter]]]:
    """The layers of one adapter that are plain, and what sits on them; those that read the same, together."""
    groups = []
    for group in routing.groups:
        own = [(layer, deltas[name]) for layer, deltas in group if name in deltas]
        groups.append([(layer, one) for layer, one in own if isinstance(one, Adapter) and one._is_plain(layer)])
    return [group for group in groups if group]


def _stacked(deltas: Sequence[tuple[int, Delta]], x: Tensor, out: Tensor, strength: Tensor) -> Tensor:
    """All adapters on all samples, summed: factors (K·r, in) and (out, K·r), each adapter's share scaled in between."""
    loras = [delta for _, delta in deltas if isinstance(delta, Adapter)]
    down = torch.cat([lora.down for lora in loras]).to(x.dtype)
    up = torch.cat([lora.up * lora.scale for lora in loras], 1).to(x.dtype)
    share = torch.cat(
        [strength[..., slot, None].expand(*strength.shape[:-1], lora.rank) for (slot, _), lora in zip(deltas, loras, strict=True)], -1
    )
    share = share.to(x.device, x.dtype)  # (K·r,) or (B, K·r)
    if share.ndim == 2:
        share = share.view(len(share), *[1] * (x.ndim - 2), -1)
    hidden = (F.linear(x, down) * share).flatten(0, -2)
    return torch.addmm(out.flatten(0, -2), hidden, up.t()).view_as(out)


def _batched(loras: Sequence[Adapter], x: Tensor, out: Tensor, strength: Tensor) -> Tensor:
    """As many samples for each of the adapters, in their order: one batched product, factors padded to the largest rank."""
    count, rank = len(loras), max(lora.rank for lora in loras)
    down = torch.stack([F.pad(lora.down, (0, 0, 0, rank - lora.rank)) for lora in loras]).to(x.dtype)  # (blocks, r, in)
    up = torch.stack([F.pad(lora.up * lora.scale, (0, rank - lora.rank)) for lora in loras]).to(x.dtype)  # (blocks, out, r)
    hidden = torch.bmm(x.reshape(count, -1, x.shape[-1]), down.mT)
    share = wide(strength, x) * hidden.view(*x.shape[:-1], rank)
    return torch.baddbmm(out.reshape(count, -1, out.shape[-1]), share.view_as(hidden), up.mT).view_as(out)


def principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """down and up whose product times the scale is the weight's best approximation of that rank, float32, both of like size."""
    u, values, v = torch.linalg.svd(weight.detach().float().flatten(1), full_matrices=False)
    missing = max(0, rank - len(values))
    share = F.pad((values / scale).sqrt(), (0, missing))[:rank]
    down = share[:, None] * F.pad(v, (0, 0, 0, missing))[:rank]
    up = F.pad(u, (0, missing))[:, :rank] * share
    return down.view(rank, *weight.shape[1:]).contiguous(), up.view(len(weight), rank, *[1] * (weight.ndim - 2)).contiguous()
