"""The network names the noise: x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε (Ho et al. 2020, eq. 4 and 14)."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from sdlora.objective import Noised
from sdlora.settings import Settings


class Config(Settings):
    kind: Literal["epsilon"] = "epsilon"
    """The network predicts the noise."""
    min_snr_gamma: Annotated[float, Field(ge=0)] = 5.0
    """Loss weight min(SNR, gamma) / SNR (Hang et al. 2023, eq. 8), so that nearly clean samples don't dominate; 0: off."""


def noise(latents: Tensor, noise: Tensor, uniform: Tensor, alphas_cumprod: Tensor, config: Config) -> Noised:
    """Noised latents at uniformly drawn timesteps; shapes as `sdlora.objective.Noise` says."""
    t = (uniform * len(alphas_cumprod)).long()
    alpha = alphas_cumprod[t]  # (B,)
    wide = alpha.view(-1, 1, 1, 1)
    snr = alpha / (1 - alpha)
    weight = snr.clamp(max=config.min_snr_gamma) / snr if config.min_snr_gamma else snr.new_ones(snr.shape)
    return Noised(x=wide.sqrt() * latents + (1 - wide).sqrt() * noise, t=t, target=noise, weight=weight)
