"""Which samples a step sees, and all their randomness: pure functions of the seed and the sample's number, so nothing needs saving."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdlora.randomness import normal, stream


@dataclass(frozen=True)
class Prepared:
    """One learner's data, ready for training: pictures as latents, captions as tokens or finished text states."""

    seed: int
    latents: Sequence[tuple[Tensor, Tensor]]  # mean and standard deviation (C, h, w) of each picture
    text: Tensor  # (N + 1, L) token ids or (N + 1, L, D) states; the last row is the empty caption
    caption_dropout: float
    prior: Tensor  # (P, L) or (P, L, D): prompts on which the base's own prediction is the target
    prior_share: float


@dataclass(frozen=True)
class Batch:
    """Samples of one shape that go through the network together."""

    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w)
    uniform: Tensor  # (B,) in [0, 1): where in the schedule each sample is noised
    text: Tensor  # (B, L) or (B, L, D)
    slot: Tensor  # (B,) which learner each sample belongs to
    prior: Tensor  # (B,) true where the base's own prediction is the target


def picture_of(number: int, count: int, seed: int) -> int:
    """The picture that a sample shows: every epoch is a new permutation of all of them, and no epoch's end cuts a batch short."""
    epoch, place = divmod(number, count)
    return int(stream(seed, "order", epoch).permutation(count)[place])


def micro_batch(learners: Sequence[Prepared], numbers: range) -> Iterator[Batch]:
    """The samples of these numbers of every learner, grouped by shape."""
    samples = [(slot, number) for slot in range(len(learners)) for number in numbers]
    drawn = [_draw(learners[slot], slot, number) for slot, number in samples]
    for shape in dict.fromkeys(row.latents.shape for row in drawn):
        rows = [row for row in drawn if row.latents.shape == shape]
        fields = ("latents", "noise", "uniform", "text", "slot", "prior")
        yield Batch(*(torch.stack([getattr(row, field) for row in rows]) for field in fields))


def _draw(learner: Prepared, slot: int, number: int) -> Batch:
    """One sample: a batch without its first axis."""
    seed = learner.seed
    picture = picture_of(number, len(learner.latents), seed)
    mean, std = learner.latents[picture]
    shape = tuple(mean.shape)
    chance = stream(seed, "sample", number).random(4, dtype=np.float32)
    prior = bool(chance[2] < learner.prior_share)
    row = len(learner.text) - 1 if chance[1] < learner.caption_dropout else picture
    return Batch(
        latents=mean + std * normal(shape, seed, "posterior", number),
        noise=normal(shape, seed, "noise", number),
        uniform=torch.tensor(chance[0]),
        text=learner.prior[int(chance[3] * len(learner.prior))] if prior else learner.text[row],
        slot=torch.tensor(slot),
        prior=torch.tensor(prior),
    )
