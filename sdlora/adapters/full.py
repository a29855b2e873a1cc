"""Full fine-tuning of the chosen layers: a ΔW for each, zero at the start. What the kinds that save numbers are to be compared with."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlora.adapter import Delta, Targeted
from sdlora.errors import UserError
from sdlora.layers import applied, is_linear, shape_of
from sdlora.quantise import Quantised


class Config(Targeted):
    kind: Literal["full"] = "full"
    """All of the chosen layers' weights, in float32: memory for four times their number, and a large pack."""


def fits(layer: nn.Module) -> bool:
    """Whether this kind can sit on the layer."""
    return is_linear(layer) or is_norm(layer)


def is_norm(layer: nn.Module) -> bool:
    """Whether a layer normalises and then scales by a weight."""
    return isinstance(layer, nn.LayerNorm | nn.GroupNorm) and layer.weight is not None


class Adapter(Delta):
    """ΔW in the shape of the weight, float32. Biases stay as they are in training; a pack may bring a change of them."""

    diff_b: nn.Parameter | None
    leaves = frozenset({"diff", "diff_b", "w_norm", "b_norm", "alpha"})

    def __init__(self, layer: nn.Module, config: Config, rng: np.random.Generator) -> None:
        super().__init__()
        if isinstance(layer, Quantised):
            what = "full fine-tuning takes many times the memory that weights of fewer bits save"
            raise UserError("E-QUANT-03", what, "adapter.kind", "set train.base_weights to full, or choose another kind of adapter")
        self.diff = nn.Parameter(torch.zeros(shape_of(layer), device=layer.get_parameter("weight").device))
        self.names = ("w_norm", "b_norm") if is_norm(layer) else ("diff", "diff_b")
        self.biases: Sequence[int] | None = None if layer.bias is None else tuple(layer.get_parameter("bias").shape)
        self.register_parameter("diff_b", None)

    def difference(self, layer: nn.Module) -> Tensor:
        return self.diff

    def change(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        diff, bias = self.diff.to(x.dtype), None if self.diff_b is None else self.diff_b.to(x.dtype)
        if isinstance(layer, nn.LayerNorm):
            return F.layer_norm(x, layer.normalized_shape, diff, bias, layer.eps)
        if isinstance(layer, nn.GroupNorm):
            return F.group_norm(x, layer.num_groups, diff, bias, layer.eps)
        changed = applied(layer, x, diff)
        return changed if bias is None else changed + bias.view(-1, *[1] * (self.diff.ndim - 2))

    def merged(self, layer: nn.Module) -> Tensor | None:
        return super().merged(layer) if self.diff_b is None else None  # a weight cannot hold a bias

    def tensors(self) -> dict[str, Tensor]:
        return dict(zip(self.names, (tensor for tensor in (self.diff, self.diff_b) if tensor is not None), strict=False))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.known(tensors)  # an alpha that is no scale here, some programs write it
        weight, bias = (tensors.get(name, tensors.get(other)) for name, other in (("diff", "w_norm"), ("diff_b", "b_norm")))
        if weight is None and bias is None:
            raise ValueError("holds no change of a weight")
        self.take("diff", torch.zeros_like(self.diff) if weight is None else weight, self.diff.shape)
        if bias is not None and self.biases is None:
            raise ValueError("holds a change of the bias, and the layer has none")
        if bias is not None:
            self.take("diff_b", bias, self.biases or ())
