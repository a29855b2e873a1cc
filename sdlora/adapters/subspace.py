"""Training in a random subspace (Li et al. 2018; Aghajanyan et al. 2020, eq. 2): ΔW = P v, one vector v of d numbers for all layers.

P is Fastfood (Le et al. 2013, eq. 7, without its lengths): blocks of H G Π H B, where H is the Walsh-Hadamard matrix, Π a permutation, B
signs and G normal, all drawn from the layer's random stream. So P takes memory in proportion to the layer, not to d times the layer.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from sdlora.adapter import Delta, Targeted
from sdlora.layers import is_linear, shape_of


class Config(Targeted):
    kind: Literal["subspace"] = "subspace"
    """As many numbers as are set, whatever the number of layers: how few suffice tells how hard the job is. They learn at the rate of the
    first layer that is adapted. The pack holds every layer's ΔW, as `full` does."""
    dimension: Annotated[int, Field(ge=1, le=2**24)] = 1000
    """How many numbers are learnt."""


def fits(layer: nn.Module) -> bool:
    """Whether this kind can sit on the layer."""
    return is_linear(layer)


class Adapter(Delta):
    """vector (d,), float32, zero at the start. A pack knows only ΔW, and what is read from one has a `diff` of its own in its place."""

    shared = True
    leaves = frozenset({"diff", "alpha"})
    signs: Tensor
    order: Tensor
    normal: Tensor

    def __init__(self, layer: nn.Module, config: Config, rng: np.random.Generator) -> None:
        super().__init__()
        device, self.shape = layer.get_parameter("weight").device, shape_of(layer)
        numbers = self.shape.numel()
        side = 1 << max(0, config.dimension - 1).bit_length()
        blocks = -(-numbers // side)
        self.vector = nn.Parameter(torch.zeros(config.dimension, device=device))
        drawn = {
            "signs": (2 * rng.integers(0, 2, (blocks, side), np.int8) - 1).astype(np.int8),
            "order": np.stack([rng.permutation(side) for _ in range(blocks)]),
            "normal": rng.standard_normal((blocks, side), dtype=np.float32) / (side * numbers) ** 0.5,  # so that ‖ΔW‖ is ‖v‖ on average
        }
        for name, values in drawn.items():
            self.register_buffer(name, torch.from_numpy(values).to(device), persistent=False)

    def difference(self, layer: nn.Module) -> Tensor:
        return self.diff if "diff" in self._parameters else self._projected()  # type: ignore[return-value]

    def _projected(self) -> Tensor:
        padded = nn.functional.pad(self.vector, (0, self.signs.shape[1] - len(self.vector)))
        mixed = hadamard(self.signs * padded).gather(1, self.order)
        return hadamard(self.normal * mixed).flatten()[: self.shape.numel()].view(self.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {"diff": self.difference(self)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.known(tensors)  # an alpha that is no scale here, some programs write it
        self.take("diff", tensors["diff"], self.shape)
        self._parameters.pop("vector", None)
        for name in ("signs", "order", "normal"):
            self._buffers.pop(name, None)


def hadamard(x: Tensor) -> Tensor:
    """(B, n) times the Walsh-Hadamard matrix of side n, a power of two, in n log n additions."""
    width = 1
    while width < x.shape[1]:
        pairs = x.view(len(x), -1, 2, width)
        x = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2).view(len(x), -1)
        width *= 2
    return x
