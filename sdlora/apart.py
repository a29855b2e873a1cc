"""How different the pictures are that two ways to the same effect draw: what a pack costs that was merged, resized, extracted or baked."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora.family import Base
from sdlora.packs.file import Pack
from sdlora.studio import Studio

STEPS, SEEDS = 10, (0, 1)
Chosen = Sequence[tuple[Pack, float]]


@dataclass(frozen=True)
class Apart:
    """Root mean squares over pixels in 0..1."""

    rms: float  # between what was asked and what was made
    effect: float  # between the base and what was asked
    pictures: int

    def line(self) -> str:
        return f"{self.pictures} pictures: {self.rms:.2g} apart (RMS of 0 to 1), where the whole effect is {self.effect:.2g}"


def apart(bare: Base, asked: tuple[Base, Chosen], made: tuple[Base, Chosen]) -> Apart:
    """Pictures of what was asked beside those of what was made, each a base with packs on it, and those of the bare base.

    Prompts are the packs' triggers and what a base draws unasked, seeds and steps are few; all are drawn in batches of the same shape.
    """
    prompts = list(dict.fromkeys([*(pack.trigger for pack, _ in [*asked[1], *made[1]] if pack.trigger), ""]))
    wanted, got, before = (drawn(base, packs, prompts) for base, packs in (asked, made, (bare, ())))
    return Apart(_rms(wanted, got), _rms(before, wanted), len(wanted))


def drawn(base: Base, packs: Chosen, prompts: Sequence[str]) -> Tensor:
    """Pictures (N, 3, H, W) in 0..1, one for each prompt and seed, in float32."""
    studio = Studio.open(base, torch.float32)
    scales = tuple((studio.add(pack), scale) for pack, scale in packs)
    recipes = [studio.recipe(prompt, seed=seed, steps=STEPS, scales=scales) for prompt in prompts for seed in SEEDS]
    return studio.pixels(recipes, batch=len(SEEDS))


def _rms(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())
