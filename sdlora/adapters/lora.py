"""LoRA (Hu et al. 2021, section 4.1): ΔW = (alpha / rank) · up @ down, with up zero at the start."""

from collections.abc import Sequence
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
        return _routed(deltas, x, out, route.index, route.strength)


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


def _routed(deltas: Sequence[tuple[int, Delta]], x: Tensor, out: Tensor, index: Tensor, strength: Tensor) -> Tensor:
    """One adapter per sample: factors padded to the largest rank, gathered (B, r, in) and multiplied sample by sample."""
    loras = [delta for _, delta in deltas if isinstance(delta, Adapter)]
    rank = max(lora.rank for lora in loras)
    down = torch.stack([F.pad(lora.down, (0, 0, 0, rank - lora.rank)) for lora in loras]).to(x.dtype)  # (K, r, in)
    up = torch.stack([F.pad(lora.up * lora.scale, (0, rank - lora.rank)) for lora in loras]).to(x.dtype)  # (K, out, r)
    place = torch.full((int(max(slot for slot, _ in deltas)) + 2,), -1, device=index.device)
    place[[slot for slot, _ in deltas]] = torch.arange(len(loras), device=index.device)
    chosen = place[index.clamp(max=len(place) - 1)]
    strength = wide(strength, x) * wide(chosen >= 0, x)  # a sample whose adapter does not sit here keeps the layer's output
    chosen = chosen.clamp(min=0)
    flat = x.flatten(1, -2) if x.ndim > 2 else x[:, None]
    hidden = torch.bmm(flat, down[chosen].transpose(1, 2))
    return out + strength * torch.bmm(hidden, up[chosen].transpose(1, 2)).view_as(out)
