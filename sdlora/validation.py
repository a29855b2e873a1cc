"""The loss on pictures that are never trained on, under noise that depends on nothing but the picture: a curve that can be compared
across steps, runs and machines."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora.devices import Portion, compute_in_portions
from sdlora.family import Family
from sdlora.randomness import normal
from sdlora.train import Goal, Setup, said

TIMES = 8
"""Timesteps that each picture is noised to, evenly spread over the schedule."""


@dataclass(frozen=True)
class HeldOut:
    """A picture to measure by."""

    latents: Tensor  # (C, h, w), the posterior's mean
    tokens: Tensor  # (L,) of its caption
    frame: Tensor  # (6,) of the picture
    digest: str  # of its pixels: its noise is a function of it


@torch.no_grad()
def loss(setup: Setup, slot: int, pictures: Sequence[HeldOut], strength: float = 1.0) -> float:
    """Mean squared error, unweighted, of the adapter at a strength (0: the base) over all pictures and timesteps."""
    before, learner = setup.bank.route, setup.learners[slot]
    at_once = setup.fitting(learner.train.batch_size or 1)  # its own, so that company does not change the figure
    setup.bank.use({learner.name: strength})

    def summed(portion: Portion) -> float:
        total = 0.0
        for shape in dict.fromkeys(one.latents.shape for one in pictures):
            rows = [(one, i) for one in pictures if one.latents.shape == shape for i in range(TIMES)]
            for start in range(0, len(rows), portion.rows):
                total += float(_errors(setup.family, learner.goal, rows[start : start + portion.rows]).sum())
        return total

    try:
        return compute_in_portions(summed, at_once, "picture held out") / (len(pictures) * TIMES)
    finally:
        setup.bank.route = before


def _errors(family: Family, goal: Goal, rows: Sequence[tuple[HeldOut, int]]) -> Tensor:
    """(B,) mean squared error of each picture at one of its timesteps."""
    device = family.device
    latents = torch.stack([one.latents for one, _ in rows]).to(device)
    noise = torch.stack([normal(tuple(one.latents.shape), 0, f"validation/{one.digest}", i) for one, i in rows]).to(device)
    uniform = torch.tensor([(i + 0.5) / TIMES for _, i in rows], device=device)
    noised = goal.noise(latents, noise, uniform, family.alphas_cumprod, goal.config)
    text, frame = (torch.stack([getattr(one, name) for one, _ in rows]).to(device) for name in ("tokens", "frame"))
    predicted = said(family, noised.x, noised.t, text, frame).to(noised.target.dtype)
    return (predicted - noised.target).square().mean((1, 2, 3))
