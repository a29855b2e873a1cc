"""The noise of a sample, whatever its objective: white, of many resolutions, with an offset. Pure functions of seed and number."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sdlora.objective import Noising
from sdlora.randomness import normal, stream


def drawn(latents: Tensor, seed: int, number: int, options: Noising) -> tuple[Tensor, Tensor]:
    """The noise (C, h, w) that a sample's target is made of, and that which the network sees."""
    shape = tuple(latents.shape)
    noise = normal(shape, seed, "noise", number)
    if options.pyramid_noise:
        noise = pyramid(noise, seed, number, options)
    if options.noise_offset or options.noise_offset_adaptive:
        noise = noise + strength(latents, seed, number, options) * normal((shape[0], 1, 1), seed, "noise offset", number)
    if not options.input_perturbation:
        return noise, noise
    return noise, noise + options.input_perturbation * normal(shape, seed, "input perturbation", number)


def strength(latents: Tensor, seed: int, number: int, options: Noising) -> Tensor:
    """Of the offset, for each channel (C, 1, 1)."""
    fixed = options.noise_offset
    if options.noise_offset_random:
        fixed *= stream(seed, "offset strength", number).random()
    return fixed + options.noise_offset_adaptive * latents.mean((1, 2), keepdim=True).abs()


def pyramid(noise: Tensor, seed: int, number: int, options: Noising) -> Tensor:
    """Noise (C, h, w) plus Σ_i d^i of noise enlarged from 1 / 2^i of its size, at a standard deviation of 1 over all."""
    channels, height, width = noise.shape
    whole = noise
    for level in range(1, options.pyramid_levels + 1):
        size = max(1, height >> level), max(1, width >> level)
        coarse = normal((channels, *size), seed, "pyramid", number, level)
        whole = whole + options.pyramid_noise**level * F.interpolate(coarse[None], (height, width), mode="bilinear")[0]
        if 1 in size:
            break
    return whole / whole.std().clamp(min=torch.finfo(whole.dtype).tiny)
