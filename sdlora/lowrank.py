"""What LoRA and its kin share: settings with a rank, how factors start, and two factors whose product is a ΔW."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from sdlora.adapter import Block, Delta, Targeted
from sdlora.layers import shape_of

DOWN, UP = "lora_down.weight", "lora_up.weight"
Init = Literal["kaiming", "gaussian", "orthogonal"]


class RankedBlock(Block):
    """Settings of some of the layers."""

    rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Width of their factors."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """ΔW is scaled by alpha / rank; unset: the alpha of all layers."""


class Ranked(Targeted):
    """Settings of a kind whose weights are products of narrow factors."""

    rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Width of the factors; more learns more, costs more, and copies sooner."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """ΔW is scaled by alpha / rank, so that a learning rate means the same at every rank while alpha stays."""
    blocks: list[RankedBlock] = Field(default=[])  # type: ignore[assignment]
    """What is otherwise for some of them, a table `[[adapter.blocks]]` for each."""

    @classmethod
    def blank(cls) -> Self:
        return cls(rank=1, alpha=1.0)  # type: ignore[call-arg]

    def at(self, said: Sequence[Block]) -> Self:
        assert self.rank is not None
        rank, alpha = self.rank, self.alpha
        for block in said:
            assert isinstance(block, RankedBlock)
            rank, alpha = block.rank or rank, block.alpha or alpha
        return self.model_copy(update={"rank": rank, "alpha": alpha})


class Factored(Ranked):
    """Settings of a kind with the factors `up` and `down`."""

    rank_stabilised: bool = False
    """Scale ΔW by alpha / √rank instead (Kalajdzievski 2023, theorem 3.2), so that a high rank learns no slower than a low one."""
    init: Init = "kaiming"
    """Start of the factor `down`, while `up` starts at zero: uniform as in LoRA's own code, normal with deviation 1 / rank, or rows at
    right angles to one another."""


class Factors(Delta):
    """ΔW = (alpha / rank) · up @ down: down (r, in) or (r, in, k, k); up (out, r) or (out, r, 1, 1); both float32."""

    leaves = frozenset({DOWN, UP, "alpha"})
    fast = ("up",)

    def __init__(self, layer: nn.Module, config: Factored, rng: np.random.Generator) -> None:
        super().__init__()
        assert config.rank is not None
        assert config.alpha is not None
        shape, device = shape_of(layer), layer.get_parameter("weight").device
        self.rank = config.rank
        self.alpha = config.alpha * (config.rank**0.5 if config.rank_stabilised else 1)  # all readers of packs divide by the rank
        self.down = nn.Parameter(started(config.init, (config.rank, *shape[1:]), rng).to(device))
        self.up = nn.Parameter(torch.zeros(shape[0], config.rank, *[1] * (len(shape) - 2), device=device))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def difference(self, layer: nn.Module) -> Tensor:
        return (self.scale * self.up.flatten(1) @ self.down.flatten(1)).view(len(self.up), *self.down.shape[1:])

    def tensors(self) -> dict[str, Tensor]:
        return {DOWN: self.down, UP: self.up, "alpha": torch.tensor(float(self.alpha))}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.known(tensors)
        down, up = tensors[DOWN], tensors[UP]
        self.rank = rank = down.shape[0] if down.ndim else 0
        if not rank:
            raise ValueError("holds factors of rank 0")
        self.alpha = alpha_of(tensors, rank)
        self.take("down", down, (rank, *self.down.shape[1:]))
        self.take("up", up, (self.up.shape[0], rank, *self.up.shape[2:]))


def alpha_of(tensors: Mapping[str, Tensor], rank: int) -> float:
    """The alpha of a layer in a pack; where it has none, its rank."""
    return float(tensors["alpha"]) if "alpha" in tensors else float(rank)


def started(init: Init, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """The start of a factor (r, in ...), float32, on the CPU."""
    rows, columns = shape[0], int(np.prod(shape[1:]))
    if init == "kaiming":
        bound = columns**-0.5  # Kaiming's uniform bound at a = sqrt(5): the start that LoRA's own code and PEFT use
        values = rng.uniform(-bound, bound, shape)
    elif init == "gaussian":
        values = rng.standard_normal(shape) / rows
    else:  # the shorter side's vectors at right angles (Saxe et al. 2014, section 3), rows as long as Kaiming's are on average
        base, corner = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))
        base = base * np.sign(np.diag(corner)) * 3**-0.5
        values = base.T if rows <= columns else base
    return torch.from_numpy(values.reshape(shape).astype(np.float32))
