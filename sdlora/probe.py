"""What a network predicts, measured: noised pictures go through it, and its word is taken in each way that it could be meant.

Where x = √ᾱ x_0 + √(1 - ᾱ) ε, both the noise ε and the velocity v = √ᾱ ε - √(1 - ᾱ) x_0 name the same x_0 (Salimans & Ho 2022, appendix
D), but at high noise the one is nearly x itself and the other nearly -x_0. A word's error is its mean square distance from what it should
be, over that of the best multiple of x, which is all that can be said by knowing nothing of pictures. For one and the same knowledge of x_0
this is the same number in both ways if pictures have a variance of 1; taken in the wrong way a denoiser's word is worse than none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora.family import Family
from sdlora.randomness import normal

PLACES = (0.55, 0.7, 0.85)
"""Shares of the schedule at which pictures are noised: at low noise ε and v are nearly the same."""
KNOWS, WORSE, APART = 0.95, 1.0, 1.5
"""The right way's error is below the first, the other's above the second, and this many times the right one's."""
STILL, MOVES = 0.1, 0.25
"""How much of what is shown at the schedule's end a velocity model repeats: below the first it looks at nothing there, above the second
it does look."""
DRAWS = 2
"""Noises of each picture at the schedule's end."""


@dataclass(frozen=True)
class Sample:
    """A picture to measure by."""

    latents: Tensor  # (C, h, w)
    tokens: Tensor  # (L,) of its caption
    frame: Tensor  # (6,) of the picture
    digest: str  # of its pixels: its noise is a function of it


@dataclass(frozen=True)
class Found:
    """Errors, 1 being no knowledge at all."""

    epsilon: float
    velocity: float
    at_end: float | None = None  # share of a picture's colours that it repeats at the last timestep when it is shown a trace of them

    @property
    def prediction(self) -> str | None:
        """`epsilon` or `velocity`; None if the network shows no knowledge in either way, or in both."""
        (right, name), (wrong, _) = sorted([(self.epsilon, "epsilon"), (self.velocity, "velocity")])
        return name if right < KNOWS and wrong > max(WORSE, APART * right) else None

    @property
    def zero_snr(self) -> bool | None:
        """Whether the schedule that it was trained with ends at noise alone (Lin et al. 2023), so that it looks at nothing there."""
        if self.prediction != "velocity" or self.at_end is None or STILL < self.at_end < MOVES:
            return None
        return self.at_end <= STILL

    def figures(self) -> str:
        """In words."""
        end = "" if self.at_end is None else f"; of the traces of a picture at the last timestep it reads {self.at_end:.0%}"
        return f"epsilon error {self.epsilon:.2f}, velocity error {self.velocity:.2f}, where 1 is to know nothing{end}"


@torch.no_grad()
def measure(family: Family, samples: Sequence[Sample]) -> Found:
    """Errors over the samples, one forward at a time; no adapter may be on the family."""
    last = len(family.alphas_cumprod) - 1
    steps = [round(place * last) for place in PLACES]
    errors = torch.stack([_errors(family, one, t) for one in samples for t in steps])  # (N, 4)
    eps, no_eps, v, no_v = errors.view(len(samples), len(steps), 4).sum(0).unbind(1)
    found = Found(float((eps / no_eps).mean()), float((v / no_v).mean()))
    if found.prediction != "velocity" or float(family.alphas_cumprod[-1]) < 1e-6:
        return found
    read, shown = torch.stack([_colours(family, one, draw) for one in samples for draw in range(DRAWS)]).sum(0).tolist()
    return Found(found.epsilon, found.velocity, read / shown)


def _errors(family: Family, one: Sample, t: int) -> Tensor:
    """(4,) squared errors: of the word as noise, of the best multiple of x as noise; the same as velocity."""
    alpha = family.alphas_cumprod[t].cpu()
    noise = normal(tuple(one.latents.shape), 0, f"probe/{one.digest}", t)
    x = alpha.sqrt() * one.latents + (1 - alpha).sqrt() * noise
    said = _said(family, one, x, t)
    found = []
    for wanted in (noise, alpha.sqrt() * noise - (1 - alpha).sqrt() * one.latents):
        best = (wanted * x).sum() / x.square().sum() * x
        found += [(said - wanted).square().mean(), (best - wanted).square().mean()]
    return torch.stack(found)


def _colours(family: Family, one: Sample, draw: int) -> Tensor:
    """(2,) how far the picture that a velocity model sees at the last timestep turns to the true one, and how far it could, when x is the
    schedule's own instead of the same noise alone; both in channel means, which can be read from such a trace as the noise averages out.

    A network whose schedule ended at noise alone has learnt that x tells nothing there.
    """
    t = len(family.alphas_cumprod) - 1
    alpha = family.alphas_cumprod[t].cpu()
    noise = normal(tuple(one.latents.shape), 0, f"probe/end/{one.digest}", draw)
    shown = [alpha.sqrt() * trace + (1 - alpha).sqrt() * noise for trace in (one.latents, torch.zeros_like(noise))]
    seen = [alpha.sqrt() * x - (1 - alpha).sqrt() * _said(family, one, x, t) for x in shown]
    turned, true = (seen[0] - seen[1]).mean((1, 2)), one.latents.mean((1, 2))
    return torch.stack([turned @ true, true @ true])


def _said(family: Family, one: Sample, x: Tensor, t: int) -> Tensor:
    """The network's word on x (C, h, w), on the CPU."""
    device = family.device
    states = family.states(one.tokens[None].to(device))
    return family.predict(x[None].to(device), torch.tensor([t], device=device), states, one.frame[None].to(device))[0].float().cpu()
