"""The contract of an objective: what it makes of clean latents, what it wants the network to say; and what all objectives have to set."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sdlora.settings import Settings

Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Noised:
    x: Tensor  # (B, C, h, w) input of the network
    t: Tensor  # (B,) timestep, as the network counts it
    target: Tensor  # (B, C, h, w) what the network should say
    weight: Tensor  # (B,) weight of each sample's loss
    snr: Tensor  # (B,) signal-to-noise ratio of x


class Noising(Settings):
    """What every objective has to set: where in the schedule samples are noised, by what, and how a miss is measured.

    An objective's Config is one; its name is what a family calls a network that was trained so (`Family.prediction`).
    """

    kind: str = ""
    t_min: Fraction = 0.0
    """Share of the schedule below which no sample is noised; 0 is its clean end."""
    t_max: Fraction = 1.0
    """Share of the schedule above which no sample is noised."""
    timesteps: Literal["uniform", "logit-normal"] = "uniform"
    """How samples are spread between `t_min` and `t_max`: alike, or sigmoid(normal) (Esser et al. 2024, eq. 19), most in the middle."""
    logit_mean: Annotated[float, Field(ge=-10, le=10)] = 0.0
    """Mean of the normal inside the sigmoid; above 0: more samples near noise."""
    logit_std: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Standard deviation of the normal inside the sigmoid."""
    noise_offset: Fraction = 0.0
    """Strength of noise that is constant over a channel (Guttenberg 2023), for very dark and bright pictures; 0.05 is much."""
    noise_offset_random: bool = False
    """Draw the strength for each sample from 0 to `noise_offset`."""
    noise_offset_adaptive: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Adds this times the size of each channel's mean to the strength."""
    pyramid_noise: Fraction = 0.0
    """Multi-resolution noise (Whitaker 2023): each level of half the size is added at this power of its level; 0: white noise."""
    pyramid_levels: Annotated[int, Field(ge=1, le=12)] = 6
    """Levels of half the size each; it ends where a side is a single latent."""
    input_perturbation: Fraction = 0.0
    """Further noise that the network sees and is not asked for (Ning et al. 2023); they use 0.1."""
    huber: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Pseudo-Huber loss 2c (sqrt(d² + c²) - c) with this c, that counts large misses d less (Khrapov et al. 2024); 0: squared error."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """Course of c from 1 where nothing is noise to `huber` where all is: huber^(t / T), or (1 - huber) / (1 + σ)² + huber of the ratio σ
    of noise to signal (Khrapov et al. 2024); or `huber` everywhere."""

    @model_validator(mode="after")
    def _is_a_range(self) -> "Noising":
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min ({self.t_min:g}) must be below t_max ({self.t_max:g})")
        return self


class Weighting(Noising):
    """What objectives over a variance-preserving schedule have to set beside."""

    min_snr_gamma: Annotated[float, Field(ge=0)] = 5.0
    """Weight min(SNR, gamma) on the loss of x_0 (Hang et al. 2023, eq. 8), so that nearly clean samples don't dominate; 0: off."""
    debiased: bool = False
    """Weight sqrt(SNR) on the loss of x_0 (Yu et al. 2023), which is 1 / sqrt(SNR) on that of the noise; instead of min-SNR."""

    def weight(self, snr: Tensor, own: Tensor) -> Tensor:
        """Each sample's weight (B,), where the objective's squared error is `own` times that of x_0."""
        if self.debiased:
            return snr.sqrt() / own
        return snr.clamp(max=self.min_snr_gamma) / own if self.min_snr_gamma else snr.new_ones(snr.shape)


Noise = Callable[[Tensor, Tensor, Tensor, Tensor, Settings], Noised]
"""`noise(latents (B, C, h, w), noise (B, C, h, w), uniform (B,) in [0, 1), alphas_cumprod (T,), config) -> Noised`; a pure function."""


def placed(uniform: Tensor, options: Noising) -> Tensor:
    """Uniform numbers in [0, 1), each moved to its place in the schedule, of the same dtype."""
    share = uniform
    if options.timesteps == "logit-normal":
        normal = options.logit_mean + options.logit_std * torch.special.ndtri(uniform.double())
        share = normal.sigmoid().to(uniform.dtype)
    below_one = 1 - torch.finfo(uniform.dtype).eps / 2
    return (options.t_min + (options.t_max - options.t_min) * share).clamp(max=below_one)


def miss(predicted: Tensor, target: Tensor, snr: Tensor, options: Noising, share: Tensor) -> Tensor:
    """How far the prediction is off, element by element (B, C, h, w); `share` (B,) is each sample's place t / T in the schedule."""
    apart = predicted - target
    if not options.huber:
        return apart.square()
    c = torch.full_like(snr, options.huber)
    if options.huber_schedule == "exponential":
        c = c.pow(share)
    elif options.huber_schedule == "snr":
        c = (1 - options.huber) / (1 + snr.rsqrt()).square() + options.huber
    c = c.to(apart.dtype).view(-1, 1, 1, 1)
    return 2 * c * ((apart.square() + c.square()).sqrt() - c)
