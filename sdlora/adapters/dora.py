"""DoRA (Liu et al. 2024, eq. 5): W' = m · (W + ΔV) / ‖W + ΔV‖, where ΔV = (alpha / rank) · up @ down and m starts as ‖W‖."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from sdlora.layers import is_linear, weight_of
from sdlora.lowrank import Factored, Factors

AXES = {"out": 0, "in": 1}


class Config(Factored):
    kind: Literal["dora"] = "dora"
    """Low-rank adaptation of the weight's directions, beside a magnitude for each."""
    axis: Literal["in", "out"] = "in"
    """Each input, or each output, of a layer has a magnitude: all readers of packs apply the first as it was trained, and hardly one
    the second, which is PEFT's."""
    constant_norm: bool = False
    """Keep the gradient from running through the norm, as the paper (section 4.3) and PEFT do."""


def fits(layer: nn.Module) -> bool:
    """Whether this kind can sit on the layer."""
    return is_linear(layer)


class Adapter(Factors):
    """Beside the factors, magnitude (1, in) or (out, 1), on convolutions (1, in, 1, 1) or (out, 1, 1, 1). Its change is that of W'."""

    leaves = Factors.leaves | {"dora_scale"}
    exact = Factors.exact | {"dora_scale"}

    def __init__(self, layer: nn.Module, config: Config, rng: np.random.Generator) -> None:
        super().__init__(layer, config, rng)
        self.constant_norm = config.constant_norm
        self.axis = AXES[config.axis]
        self.magnitude = nn.Parameter(lengths(weight_of(layer).to(self.down.dtype), self.axis))

    def difference(self, layer: nn.Module) -> Tensor:
        weight = weight_of(layer).to(self.down.dtype)
        turned = weight + super().difference(layer)
        norm = lengths(turned.detach() if self.constant_norm else turned, self.axis)
        return self.magnitude / norm.clamp(min=torch.finfo(norm.dtype).tiny) * turned - weight  # a weight of zeros stays one

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "dora_scale": self.magnitude}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        super().load(tensors)
        ones = [1] * (self.down.ndim - 2)
        shapes = {"out": (len(self.up), 1, *ones), "in": (1, self.down.shape[1], *ones)}
        self.take("magnitude", tensors["dora_scale"], *shapes.values())
        self.axis = AXES["out" if tuple(self.magnitude.shape) == shapes["out"] else "in"]


def lengths(weight: Tensor, axis: int) -> Tensor:
    """Norm of the weight's part at each place along an axis, all other axes 1."""
    norm: Tensor = torch.linalg.vector_norm(weight, dim=[i for i in range(weight.ndim) if i != axis], keepdim=True)
    return norm
