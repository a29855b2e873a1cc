"""(IA)³ (Liu et al. 2022, eq. 1): a layer's outputs, or its inputs, are scaled, each by 1 + w, with w zero at the start.

The paper scales keys, values (outputs of `*.to_k`, `*.to_v`) and what enters the second feed-forward layer (inputs of `*.ff.net.2`).
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from sdlora.adapter import Delta, Targeted
from sdlora.layers import is_linear, product, shape_of, weight_of


class Config(Targeted):
    kind: Literal["ia3"] = "ia3"
    """A factor for each output or input of a layer: the smallest adapter there is."""
    side: Literal["out", "in"] = "out"
    """Whether a layer's outputs are scaled (without its bias) or its inputs."""


def fits(layer: nn.Module) -> bool:
    """Whether this kind can sit on the layer."""
    return is_linear(layer)


class Adapter(Delta):
    """vector (out,) or (in,), float32: what the factors have above 1, as readers of packs take it."""

    leaves = frozenset({"weight", "on_input"})

    def __init__(self, layer: nn.Module, config: Config, rng: np.random.Generator) -> None:
        super().__init__()
        shape, device = shape_of(layer), layer.get_parameter("weight").device
        self.sizes, self.ones = shape[:2], [1] * (len(shape) - 2)  # (out, in)
        self.on_input = config.side == "in"
        self.vector = nn.Parameter(torch.zeros(self.sizes[self.on_input], device=device))

    def difference(self, layer: nn.Module) -> Tensor:
        weight = weight_of(layer).to(self.vector.dtype)
        along = [1] * weight.ndim
        along[self.on_input] = -1  # axis 0 or 1
        return weight * self.vector.view(along)

    def change(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        vector = self.vector.to(x.dtype).view(-1, *self.ones)
        if self.on_input:
            return product(layer, x * vector)
        bias = layer.bias
        return vector * (y if bias is None else y - bias.view(-1, *self.ones))  # type: ignore[operator]

    def tensors(self) -> dict[str, Tensor]:
        shape = [1, -1, *self.ones] if self.ones else [-1]
        return {"weight": self.vector.view(shape), "on_input": torch.tensor(float(self.on_input))}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.known(tensors)
        self.on_input = bool(tensors["on_input"])
        size = self.sizes[self.on_input]
        self.take("vector", tensors["weight"], (size,), (1, size, *self.ones))
        self.vector = nn.Parameter(self.vector.detach().flatten())
