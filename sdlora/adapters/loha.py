"""LoHa (Hyeon-Woo et al. 2022, proposition 2; LyCORIS): ΔW = (alpha / rank) · (w1_a @ w1_b) ⊙ (w2_a @ w2_b), of a rank up to rank²."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from sdlora.adapter import Delta
from sdlora.layers import is_linear, shape_of
from sdlora.lowrank import Ranked, alpha_of

FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
DEVIATIONS = dict(zip(FACTORS, (0.1, 1.0, 0.0, 1.0), strict=True))
"""Of the normal start of each factor, as in LyCORIS."""


class Config(Ranked):
    kind: Literal["loha"] = "loha"
    """Element-wise product of two low-rank matrices."""


def fits(layer: nn.Module) -> bool:
    """Whether this kind can sit on the layer."""
    return is_linear(layer)


class Adapter(Delta):
    """a (out, r) and b (r, in·k·k), twice; float32."""

    leaves = frozenset({*FACTORS, "alpha"})

    def __init__(self, layer: nn.Module, config: Config, rng: np.random.Generator) -> None:
        super().__init__()
        assert config.rank is not None
        assert config.alpha is not None
        shape, device = shape_of(layer), layer.get_parameter("weight").device
        self.alpha, self.rank, self.sides = config.alpha, config.rank, (shape[0], shape[1:].numel())
        for name, deviation in DEVIATIONS.items():
            values = (deviation * rng.standard_normal(self.shape(name))).astype(np.float32)
            self.register_parameter(name, nn.Parameter(torch.from_numpy(values).to(device)))

    def shape(self, name: str) -> tuple[int, int]:
        return (self.sides[0], self.rank) if name.endswith("a") else (self.rank, self.sides[1])

    def difference(self, layer: nn.Module) -> Tensor:
        w1_a, w1_b, w2_a, w2_b = (self.get_parameter(name) for name in FACTORS)
        return (self.alpha / self.rank * (w1_a @ w1_b) * (w2_a @ w2_b)).view(shape_of(layer))

    def tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), "alpha": torch.tensor(float(self.alpha))}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.known(tensors)
        self.rank = max(tensors["hada_w1_b"].shape[:1], default=0)
        if not self.rank:
            raise ValueError("holds factors of rank 0")
        self.alpha = alpha_of(tensors, self.rank)
        for name in FACTORS:
            self.take(name, tensors[name], self.shape(name))
