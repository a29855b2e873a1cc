"""The network names the velocity v = sqrt(ᾱ_t) ε - sqrt(1 - ᾱ_t) x_0 (Salimans & Ho 2022, appendix D), of which Stable Diffusion 2 is."""

from typing import Literal

from torch import Tensor

from sdlora.objective import Noised, Weighting


class Config(Weighting):
    kind: Literal["velocity"] = "velocity"
    """The network predicts the velocity."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that its last step is noise alone (Lin et al. 2023, algorithm 1). min-SNR gives that step no weight.
    Pictures are drawn by the base's own schedule, which should be the same (`rescale_betas_zero_snr`)."""


def noise(latents: Tensor, noise: Tensor, uniform: Tensor, alphas_cumprod: Tensor, config: Config) -> Noised:
    """Noised latents; shapes as `sdlora.objective.Noise` says."""
    t = (uniform * len(alphas_cumprod)).long()
    alpha = (rescaled(alphas_cumprod) if config.zero_terminal_snr else alphas_cumprod)[t]  # (B,)
    wide = alpha.view(-1, 1, 1, 1)
    signal, spread = wide.sqrt(), (1 - wide).sqrt()
    snr = alpha / (1 - alpha)
    x, v = signal * latents + spread * noise, signal * noise - spread * latents
    return Noised(x=x, t=t, target=v, weight=config.weight(snr, snr + 1), snr=snr)


def rescaled(alphas_cumprod: Tensor) -> Tensor:
    """ᾱ (T,) with sqrt(ᾱ) shifted to end at 0 and scaled to begin where it did (Lin et al. 2023, algorithm 1)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
