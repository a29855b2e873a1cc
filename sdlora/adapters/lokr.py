"""LoKr (Yeh et al. 2024, section 3.2; LyCORIS): ΔW = (alpha / rank) · w1 ⊗ w2, where w2, and w1 if wanted, may be a product a @ b.

A Kronecker product has full rank wherever its factors have: much of a weight moves by few numbers.
"""

from collections.abc import Mapping
from itertools import product
from math import isqrt
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from sdlora.adapter import Delta
from sdlora.layers import is_linear, shape_of
from sdlora.lowrank import Ranked, alpha_of, started

FORMS = [{*first, *second} for first, second in product(*([[f"lokr_{w}"], [f"lokr_{w}_a", f"lokr_{w}_b"]] for w in ("w1", "w2")))]
"""The factors that a layer may have."""


class Config(Ranked):
    kind: Literal["lokr"] = "lokr"
    """Kronecker product of a small matrix and a larger one, which is of low rank."""
    factor: Annotated[int, Field(ge=0)] = 0
    """Greatest side of the small matrix; 0: as near to the root of the layer's side as its divisors allow."""
    decompose_both: bool = False
    """Make the small matrix a product of two as well, where that is smaller."""


def fits(layer: nn.Module) -> bool:
    """Whether this kind can sit on the layer."""
    return is_linear(layer)


class Adapter(Delta):
    """On a layer of a·b outputs and c·d inputs: w1 (a, c); w2 (b, d) or (b, d, k, k), or of a product (b, r) and (r, d·k·k); float32."""

    leaves = frozenset({"alpha"}).union(*FORMS)

    def __init__(self, layer: nn.Module, config: Config, rng: np.random.Generator) -> None:
        super().__init__()
        assert config.rank is not None
        assert config.alpha is not None
        (shape, device), rank = (shape_of(layer), layer.get_parameter("weight").device), config.rank
        self.alpha, self.rank, self.whole = config.alpha, rank, shape
        (a, b), (c, d) = split(shape[0], config.factor), split(shape[1], config.factor)
        kernel = shape[2:]
        if config.decompose_both and rank < max(a, c) / 2:
            parts = {"lokr_w1_a": started("kaiming", (a, rank), rng), "lokr_w1_b": started("kaiming", (rank, c), rng)}
        else:
            parts = {"lokr_w1": started("kaiming", (a, c), rng)}
        if rank < max(b, d) / 2:
            parts |= {"lokr_w2_a": started("kaiming", (b, rank), rng), "lokr_w2_b": torch.zeros(rank, d * kernel.numel())}
        else:
            parts |= {"lokr_w2": torch.zeros(b, d, *kernel)}
        self.parts = nn.ParameterDict({name: nn.Parameter(values.to(device)) for name, values in parts.items()})

    def difference(self, layer: nn.Module) -> Tensor:
        parts = dict(self.parts.items())
        scale = self.alpha / self.rank if len(parts) > 2 else 1.0  # all readers of packs pass over alpha where nothing has a rank
        return scale * torch.kron(whole(parts, "lokr_w1"), whole(parts, "lokr_w2").flatten(1)).view(self.whole)

    def tensors(self) -> dict[str, Tensor]:
        return {**dict(self.parts.items()), "alpha": torch.tensor(float(self.alpha))}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.known(tensors)
        parts = {name: tensor for name, tensor in tensors.items() if name != "alpha"}
        if set(parts) not in FORMS:
            raise ValueError(f"holds {', '.join(sorted(parts))}, which make no Kronecker product")
        narrow = parts.get("lokr_w2_b", parts.get("lokr_w1_b", torch.ones(1)))
        self.rank = max(narrow.shape[:1], default=0)
        self.alpha = alpha_of(tensors, self.rank)
        try:
            w1, w2 = whole(parts, "lokr_w1"), whole(parts, "lokr_w2")
            made = torch.kron(w1, w2.flatten(1))
        except (RuntimeError, IndexError):
            raise ValueError("holds factors that do not fit one another") from None
        right = w1.ndim == 2 and made.shape == (self.whole[0], self.whole[1:].numel()) and w2.shape[2:] in (self.whole[2:], ())
        if not right or not self.rank or self.whole[1] % w1.shape[1]:
            raise ValueError(f"makes a weight {tuple(made.shape)} where the layer's is {tuple(self.whole)}")
        device = next(self.parameters()).device
        self.parts = nn.ParameterDict({name: nn.Parameter(tensor.to(device, torch.float32)) for name, tensor in parts.items()})


def whole(parts: Mapping[str, Tensor], name: str) -> Tensor:
    """One of the two matrices, from its own factors if it has them."""
    return parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"]


def split(side: int, factor: int) -> tuple[int, int]:
    """The side as a product, the first factor at most the second and `factor` (0: any), and as large as it can be."""
    small = max(n for n in range(1, isqrt(side) + 1) if side % n == 0 and n <= (factor or side))
    return small, side // small
