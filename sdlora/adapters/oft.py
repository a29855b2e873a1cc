"""OFT (Qiu et al. 2023, section 3) as packs have it: blocks of outputs are rotated, by Cayley's R = (I + Q)(I − Q)⁻¹ of a skew Q.

Q = B − Bᵀ, zero at the start, and a block of the weight becomes Rᵀ W: the weight keeps its singular values. (The paper turns inputs, in
which packs have no say.)
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from sdlora.adapter import Delta, Targeted
from sdlora.layers import is_linear, shape_of, weight_of

BOUND = 1e4
"""Bound of Q's norm in packs, where its name is alpha: never reached, as what it is a bound of differs from reader to reader."""


class Config(Targeted):
    kind: Literal["oft"] = "oft"
    """Rotation of a layer's outputs, in blocks."""
    block_size: Annotated[int, Field(ge=2, le=1024)] = 32
    """Outputs that are rotated together, as nearly as a layer's divisors allow."""


def fits(layer: nn.Module) -> bool:
    """Whether this kind can sit on the layer: a single output has nowhere to turn."""
    return is_linear(layer) and shape_of(layer)[0] > 1


class Adapter(Delta):
    """blocks (k, n, n) for k·n outputs, float32; strength mixes the rotation with the identity."""

    leaves = frozenset({"oft_blocks", "alpha"})

    def __init__(self, layer: nn.Module, config: Config, rng: np.random.Generator) -> None:
        super().__init__()
        self.outputs = shape_of(layer)[0]
        divisors = [n for n in range(2, self.outputs + 1) if self.outputs % n == 0]
        size = min(divisors, key=lambda n: abs(n - config.block_size))
        self.blocks = nn.Parameter(torch.zeros(self.outputs // size, size, size, device=layer.get_parameter("weight").device))

    def turn(self) -> Tensor:
        """R − I = 2 Q (I − Q)⁻¹; no skew Q has the eigenvalue 1, so that the inverse exists."""
        skew = self.blocks - self.blocks.mT
        inverted: Tensor = torch.linalg.solve_ex(torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype) - skew, 2 * skew)[0]
        return inverted

    def difference(self, layer: nn.Module) -> Tensor:
        weight = weight_of(layer).to(self.blocks.dtype)
        return torch.einsum("knm,kni->kmi", self.turn(), weight.reshape(*self.blocks.shape[:2], -1)).reshape(weight.shape)

    def change(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        axis = 1 if isinstance(layer, nn.Conv2d) else -1
        y = y.movedim(axis, -1)
        own = y if layer.bias is None else y - layer.bias  # type: ignore[operator]
        turned = torch.einsum("knm,...kn->...km", self.turn().to(y.dtype), own.reshape(*own.shape[:-1], *self.blocks.shape[:2]))
        return turned.flatten(-2).movedim(-1, axis)

    def tensors(self) -> dict[str, Tensor]:
        return {"oft_blocks": self.blocks, "alpha": torch.tensor(BOUND)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.known(tensors)
        blocks = tensors["oft_blocks"]
        size = blocks.shape[-1] if blocks.ndim else 0
        if size < 2 or self.outputs % size:
            raise ValueError(f"holds blocks {tuple(blocks.shape)}, and the layer has {self.outputs} outputs")
        bound, norm = float(tensors.get("alpha", torch.zeros(()))), float((blocks - blocks.mT).detach().float().norm())
        if 0 < bound < norm:
            raise ValueError(f"holds rotations of norm {norm:.3g} beyond their bound {bound:.3g}, which programs read in different ways")
        self.take("blocks", blocks, (self.outputs // size, size, size))
