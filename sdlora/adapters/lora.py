"""LoRA (Hu et al. 2021, section 4.1): ΔW = (alpha / rank) · up @ down, with up zero at the start."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlora.adapter import Delta, Route, is_linear, wide
from sdlora.lowrank import Factored, Factors


class Config(Factored):
    kind: Literal["lora"] = "lora"
    """Low-rank adaptation."""


def fits(layer: nn.Module) -> bool:
    """Whether this kind can sit on the layer."""
    return is_linear(layer)


class Adapter(Factors):
    """Both factors are computed in the layer's dtype, one after the other; on a convolution `down` has the kernel (LoCon)."""

    network = "networks.lora"

    def change(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation), up * self.scale)
        return F.linear(F.linear(x, down), up * self.scale)

    @classmethod
    def mixed(cls, deltas: Sequence[tuple[int, Delta]], layer: nn.Module, x: Tensor, y: Tensor, out: Tensor, route: Route) -> Tensor:
        """Linear layers: one product with all factors stacked, or one batched product with each sample's own factors."""
        if not isinstance(layer, nn.Linear):
            return super().mixed(deltas, layer, x, y, out, route)
        if route.index is None:
            return _stacked(deltas, x, out, route.strength)
        if len(deltas) == 1:
            return super().mixed(deltas, layer, x, y, out, route)
        return _routed({slot: delta for slot, delta in deltas if isinstance(delta, Adapter)}, layer, x, out, route)


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


def _routed(loras: Mapping[int, Adapter], layer: nn.Linear, x: Tensor, out: Tensor, route: Route) -> Tensor:
    """One adapter per sample. Blocks of as many samples each go through one batched product, factors padded to the largest rank."""
    blocks = [(loras.get(slot), rows) for slot, rows in route.blocks]
    chosen = [lora for lora, _ in blocks if lora]
    if len(chosen) < len(blocks) or len({rows.stop - rows.start for _, rows in blocks}) > 1:
        parts = []
        for lora, rows in blocks:  # a sample whose adapter does not sit here keeps the layer's output
            strength = route.strength if len(route.strength) == 1 else route.strength[rows]
            parts.append(out[rows] + wide(strength, x) * lora.change(layer, x[rows], out[rows]) if lora else out[rows])
        return torch.cat(parts)
    rank = max(lora.rank for lora in chosen)
    down = torch.stack([F.pad(lora.down, (0, 0, 0, rank - lora.rank)) for lora in chosen]).to(x.dtype)  # (blocks, r, in)
    up = torch.stack([F.pad(lora.up * lora.scale, (0, rank - lora.rank)) for lora in chosen]).to(x.dtype)  # (blocks, out, r)
    hidden = torch.bmm(x.reshape(len(blocks), -1, x.shape[-1]), down.mT)
    share = wide(route.strength.to(x.device), x) * hidden.view(*x.shape[:-1], rank)
    return torch.baddbmm(out.reshape(len(blocks), -1, out.shape[-1]), share.view_as(hidden), up.mT).view_as(out)
