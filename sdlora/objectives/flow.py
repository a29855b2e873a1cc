"""The network names the way from picture to noise, ε - x_0, at x_t = (1 - t) x_0 + t ε (rectified flow: Liu et al. 2022, eq. 1; Esser et
al. 2024, eq. 13)."""

from typing import Literal

from torch import Tensor

from sdlora.objective import Noised, Noising


class Config(Noising):
    kind: Literal["flow"] = "flow"
    """The network predicts the difference between noise and picture."""


def noise(latents: Tensor, noise: Tensor, uniform: Tensor, alphas_cumprod: Tensor, config: Config) -> Noised:  # noqa: ARG001
    """Noised latents; shapes as `sdlora.objective.Noise` says. Of the schedule only its length matters: t is counted up to it."""
    t = uniform.view(-1, 1, 1, 1)
    x, snr = (1 - t) * latents + t * noise, ((1 - uniform) / uniform).square()
    return Noised(x=x, t=uniform * len(alphas_cumprod), target=noise - latents, weight=uniform.new_ones(uniform.shape), snr=snr)
