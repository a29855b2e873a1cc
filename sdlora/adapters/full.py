"""Full fine-tuning of the chosen layers: a ΔW for each, zero at the start. What the kinds that save numbers are to be compared with."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from sdlora.adapter import Delta, Targeted, is_linear, shape_of
from sdlora.errors import UserError
from sdlora.quantise import Quantised


class Config(Targeted):
    kind: Literal["full"] = "full"
    """All of the chosen layers' weights, in float32: memory for four times their number, and a large pack."""


def fits(layer: nn.Module) -> bool:
    """Whether this kind can sit on the layer."""
    return is_linear(layer)


class Adapter(Delta):
    """ΔW in the shape of the weight, float32; biases stay."""

    leaves = frozenset({"diff", "alpha"})

    def __init__(self, layer: nn.Module, config: Config, rng: np.random.Generator) -> None:
        super().__init__()
        if isinstance(layer, Quantised):
            what = "full fine-tuning takes many times the memory that weights of fewer bits save"
            raise UserError("E-QUANT-03", what, "adapter.kind", "set train.base_weights to full, or choose another kind of adapter")
        self.diff = nn.Parameter(torch.zeros(shape_of(layer), device=layer.get_parameter("weight").device))

    def difference(self, layer: nn.Module) -> Tensor:
        return self.diff

    def tensors(self) -> dict[str, Tensor]:
        return {"diff": self.diff}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.known(tensors)  # an alpha that is no scale here, some programs write it
        self.take("diff", tensors["diff"], self.diff.shape)
