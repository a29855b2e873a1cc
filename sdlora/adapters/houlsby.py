"""Bottleneck adapters (Houlsby et al. 2019, figure 2): y + up · gelu(down · y) after attention and feed-forward blocks, up zero first."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from pydantic import Field
from torch import Tensor, nn

from sdlora.adapter import Delta, Targeted, frozen
from sdlora.lowrank import started

LEAVES = {"down": "bottleneck_down.weight", "down_bias": "bottleneck_down.bias",
          "up": "bottleneck_up.weight", "up_bias": "bottleneck_up.bias"}  # fmt: skip


class Config(Targeted):
    kind: Literal["houlsby"] = "houlsby"
    """A small network of two layers behind each block; it is not linear, so it cannot be merged."""
    bottleneck: Annotated[int, Field(ge=1, le=1024)] = 16
    """Width of its hidden layer."""


def fits(layer: nn.Module) -> bool:
    """Whether this kind can sit on the layer."""
    return isinstance(layer, Attention | FeedForward)


class Adapter(Delta):
    """down (b, width), up (width, b) and a bias for each, float32."""

    merges = False
    leaves = frozenset(LEAVES.values())
    network = "sdlora.adapters.houlsby"

    def __init__(self, layer: nn.Module, config: Config, rng: np.random.Generator) -> None:
        super().__init__()
        last: Any = layer.to_out[0] if isinstance(layer, Attention) else layer.net[-1]  # type: ignore[index]
        weight, width = frozen(last).get_parameter("weight"), int(frozen(last).out_features)  # type: ignore[arg-type]
        self.down = nn.Parameter(started("kaiming", (config.bottleneck, width), rng).to(weight.device))
        self.down_bias = nn.Parameter(self.down.new_zeros(config.bottleneck))
        self.up = nn.Parameter(self.down.new_zeros(width, config.bottleneck))
        self.up_bias = nn.Parameter(self.down.new_zeros(width))

    def change(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        down, down_bias, up, up_bias = (getattr(self, name).to(y.dtype) for name in LEAVES)
        return F.linear(F.gelu(F.linear(y, down, down_bias)), up, up_bias)

    def tensors(self) -> dict[str, Tensor]:
        return {leaf: getattr(self, name) for name, leaf in LEAVES.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.known(tensors)
        bottleneck, width = len(tensors[LEAVES["down_bias"]].flatten()), len(self.up)
        if not bottleneck:
            raise ValueError("holds a bottleneck of no width")
        shapes = {"down": (bottleneck, width), "down_bias": (bottleneck,), "up": (width, bottleneck), "up_bias": (width,)}
        for name, leaf in LEAVES.items():
            self.take(name, tensors[leaf], shapes[name])
