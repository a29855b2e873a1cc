"""LoRA (Hu et al. 2021, section 4.1): ΔW = (alpha / rank) · up @ down, with up zero at the start."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sdlora.adapter import Delta, Route, wide
from sdlora.settings import Settings


class Config(Settings):
    kind: Literal["lora"] = "lora"
    """Low-rank adaptation."""
    rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Rank of ΔW; more learns more, costs more, and copies sooner."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """ΔW is scaled by alpha / rank; unset: equal to the rank."""
    targets: list[str] | None = None
    """Layers to adapt: names of presets and patterns over layer names (`unet.*attn2.to_k`)."""

    @classmethod
    def blank(cls) -> "Config":
        """A config for weights that are read from a pack and bring their own rank and alpha."""
        return cls(rank=1, alpha=1.0)


def fits(layer: nn.Module) -> bool:
    """Whether this kind can sit on the layer."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


class Adapter(Delta):
    """down (r, in) or (r, in, k, k); up (out, r) or (out, r, 1, 1); both float32, computed in the layer's dtype."""

    fast = ("up",)

    def __init__(self, layer: nn.Linear | nn.Conv2d, config: Config, rng: np.random.Generator) -> None:
        super().__init__()
        assert config.rank is not None
        assert config.alpha is not None
        self.alpha, self.rank = config.alpha, config.rank
        n_out, shape = layer.weight.shape[0], layer.weight.shape[1:]
        bound = shape.numel() ** -0.5  # Kaiming's uniform bound at a = sqrt(5): the start that LoRA's own code and PEFT use
        start = rng.uniform(-bound, bound, (config.rank, *shape)).astype(np.float32)
        device = layer.weight.device
        self.down = nn.Parameter(torch.from_numpy(start).to(device))
        self.up = nn.Parameter(torch.zeros(n_out, config.rank, *[1] * (len(shape) - 1), device=device))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def change(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation), up * self.scale)
        return F.linear(F.linear(x, down), up * self.scale)

    @classmethod
    def mixed(cls, deltas: Sequence[tuple[int, Delta]], layer: nn.Module, x: Tensor, y: Tensor, route: Route) -> Tensor:
        """Linear layers: one product with all factors stacked, or one batched product with each sample's own factors."""
        if not isinstance(layer, nn.Linear):
            return super().mixed(deltas, layer, x, y, route)
        if route.index is None:
            return _stacked(deltas, x, y, route.strength)
        if len(deltas) == 1:
            return super().mixed(deltas, layer, x, y, route)
        return _routed(deltas, x, y, route.index, route.strength)

    def merged(self, layer: nn.Module) -> Tensor:
        up, down = self.up.detach().flatten(1), self.down.detach().flatten(1)
        return (self.scale * up @ down).view_as(layer.weight)  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        return {"lora_down.weight": self.down, "lora_up.weight": self.up, "alpha": torch.tensor(float(self.alpha))}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        unknown = set(tensors) - {"lora_down.weight", "lora_up.weight", "alpha"}
        if unknown:
            raise ValueError(f"holds {', '.join(sorted(unknown))}, which is not LoRA")
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        rank = down.shape[0] if down.ndim else 0
        if not rank:
            raise ValueError("holds a LoRA of rank 0")
        if down.shape[1:] != self.down.shape[1:] or up.shape != (self.up.shape[0], rank, *self.up.shape[2:]):
            raise ValueError(
                f"shapes {tuple(down.shape)} and {tuple(up.shape)} don't fit a layer {tuple(self.down.shape[1:])} -> {len(self.up)}"
            )
        self.rank = rank
        self.alpha = float(tensors["alpha"]) if "alpha" in tensors else float(rank)
        self.down = nn.Parameter(down.to(self.down.device, torch.float32))
        self.up = nn.Parameter(up.to(self.up.device, torch.float32))


def _stacked(deltas: Sequence[tuple[int, Delta]], x: Tensor, y: Tensor, strength: Tensor) -> Tensor:
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
    return torch.addmm(y.flatten(0, -2), hidden, up.t()).view_as(y)


def _routed(deltas: Sequence[tuple[int, Delta]], x: Tensor, y: Tensor, index: Tensor, strength: Tensor) -> Tensor:
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
    return y + strength * torch.bmm(hidden, up[chosen].transpose(1, 2)).view_as(y)
