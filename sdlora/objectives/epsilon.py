"""The network names the noise: x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε (Ho et al. 2020, eq. 4 and 14)."""

from typing import Literal

from torch import Tensor

from sdlora.objective import Noised, Weighting


class Config(Weighting):
    kind: Literal["epsilon"] = "epsilon"
    """The network predicts the noise."""


def noise(latents: Tensor, noise: Tensor, uniform: Tensor, alphas_cumprod: Tensor, config: Config) -> Noised:
    """Noised latents; shapes as `sdlora.objective.Noise` says."""
    t = (uniform * len(alphas_cumprod)).long()
    alpha = alphas_cumprod[t]  # (B,)
    wide = alpha.view(-1, 1, 1, 1)
    snr = alpha / (1 - alpha)
    x = wide.sqrt() * latents + (1 - wide).sqrt() * noise
    return Noised(x=x, t=t, target=noise, weight=config.weight(snr, snr), snr=snr)
