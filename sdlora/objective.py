"""The contract of an objective: what it makes of clean latents, and what it wants the network to say."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sdlora.settings import Settings


@dataclass(frozen=True)
class Noised:
    x: Tensor  # (B, C, h, w) input of the network
    t: Tensor  # (B,) integer timestep
    target: Tensor  # (B, C, h, w) what the network should say
    weight: Tensor  # (B,) weight of each sample's loss


Noise = Callable[[Tensor, Tensor, Tensor, Tensor, Settings], Noised]
"""`noise(latents (B, C, h, w), noise (B, C, h, w), uniform (B,) in [0, 1), alphas_cumprod (T,), config) -> Noised`; a pure function."""
