"""Which samples a step sees, and all their randomness: pure functions of the seed and the sample's number, so nothing needs saving."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from sdlora.data import noise
from sdlora.data.captions import choose
from sdlora.objective import Noising, placed
from sdlora.randomness import normal, stream


@dataclass(frozen=True)
class Prepared:
    """One learner's data, ready for training: pictures as latents, captions as tokens or finished text states."""

    seed: int
    latents: Sequence[Sequence[tuple[Tensor, Tensor]]]  # mean and standard deviation (C, h, w) of each picture's variants
    text: Tensor  # (R + 1, L) token ids or (R + 1, S, D) states of all captions; the last row is the empty caption
    caption_dropout: float
    pool: Sequence[int]  # the pictures of one epoch: each stands in it as often as the epoch shows it
    rows: Sequence[Sequence[int]]  # of `text`: those of each picture's captions
    frames: Sequence[Sequence[Tensor]]  # (6,) of each variant: what of its picture it is, as `Family.predict` says
    weights: Sequence[Sequence[Tensor]]  # of each variant's squared error: (1, h, w), or (1, 1, 1) for all of it alike
    prior: Sequence[int]  # rows of `text` on which the base's own prediction is the target
    prior_share: float
    final: Callable[[int, int], Tensor] | None = None  # (picture, sample's number) -> (L,) ids, where captions differ in each sample
    noising: Noising = field(default_factory=Noising)

    def said(self, picture: int, number: int) -> Tensor:
        """The text of a picture in the sample of this number."""
        return self.final(picture, number) if self.final else self.text[choose(self.rows[picture], self.seed, number)]


@dataclass(frozen=True)
class Batch:
    """Samples of one shape that go through the network together."""

    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w) that the target is made of
    seen: Tensor  # (B, C, h, w) noise that the network sees
    uniform: Tensor  # (B,) in [0, 1): where in the schedule each sample is noised
    text: Tensor  # (B, L) or (B, S, D)
    frame: Tensor  # (B, 6)
    slot: Tensor  # (B,) which learner each sample belongs to
    prior: Tensor  # (B,) true where the base's own prediction is the target
    key: Tensor  # (B,) int64 that all random numbers inside the adapter are made of
    weight: Tensor  # (B, 1, h, w) factors on the squared error

    @functools.cached_property
    def slots(self) -> list[int]:
        """The learner of each sample, as the host knows it."""
        return [int(one) for one in self.slot.tolist()]

    @functools.cached_property
    def priors(self) -> Tensor:
        """Places of the samples whose target is the base's own prediction."""
        return self.prior.nonzero()[:, 0]

    def tensors(self) -> dict[str, Tensor]:
        """All that a pass reads."""
        return {**{one.name: getattr(self, one.name) for one in fields(self)}, "priors": self.priors}

    def of(self, tensors: Mapping[str, Tensor]) -> "Batch":
        """A batch of other numbers, such as `tensors` gave, of which the host knows the same."""
        found = Batch(**{one.name: tensors[one.name] for one in fields(self)})
        vars(found).update(slots=self.slots, priors=tensors["priors"])
        return found


def picture_of(number: int, pool: Sequence[int], seed: int) -> int:
    """The picture that a sample shows: every epoch is a new permutation of the whole pool, and no epoch's end cuts a batch short."""
    epoch, place = divmod(number, len(pool))
    return pool[int(order(seed, epoch, len(pool))[place])]


@functools.lru_cache(maxsize=8)
def order(seed: int, epoch: int, pictures: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """An epoch's permutation; kept, as of a hundred thousand pictures it takes a millisecond, and each sample asks."""
    return stream(seed, "order", epoch).permutation(pictures)


def chances(seed: int, number: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """The sample's own draws in [0, 1): its place in the schedule, then whether its caption is dropped, it is a prior sample, which,
    and which variant of its picture it shows."""
    return stream(seed, "sample", number).random(5, dtype=np.float32)


def variant_of(chance: np.float32, variants: int) -> int:
    """Which of a picture's variants a sample shows. From the last one on, where the mirror images are: the lower half is theirs."""
    return variants - 1 - int(chance * variants)


def shown(pool: Sequence[int], variants: Sequence[int], seed: int, prior_share: float, samples: int) -> Counter[tuple[int, int]]:
    """How often each (picture, variant) is seen with a caption of its own, or the empty one, in the first `samples` samples of a run.

    `variants` says how many each picture has.
    """
    counted: Counter[tuple[int, int]] = Counter()
    plain = max(variants) == 1
    for start in range(0, samples, len(pool)):
        places = order(seed, start // len(pool), len(pool))
        for place in range(min(len(pool), samples - start)):
            picture = pool[int(places[place])]
            if plain and not prior_share:
                counted[picture, 0] += 1
                continue
            chance = chances(seed, start + place)
            if chance[2] >= prior_share:
                counted[picture, variant_of(chance[4], variants[picture])] += 1
    return counted


def micro_batch(learners: Sequence[Prepared], numbers: range) -> Iterator[Batch]:
    """The samples of these numbers of every learner, grouped by shape."""
    return grouped(learners, [(slot, number) for slot in range(len(learners)) for number in numbers])


def grouped(learners: Sequence[Prepared], samples: Sequence[tuple[int, int]]) -> Iterator[Batch]:
    """Samples, each the (slot, number) of its learner, as batches of one shape: of the latents, and of what the network is told."""
    drawn = [_draw(learners[slot], slot, number) for slot, number in samples]
    kinds = [(row.latents.shape, row.text.shape, row.text.dtype) for row in drawn]
    for kind in dict.fromkeys(kinds):
        rows = [row for row, own in zip(drawn, kinds, strict=True) if own == kind]
        yield Batch(**{one.name: torch.stack([getattr(row, one.name) for row in rows]) for one in fields(Batch)})


def _draw(learner: Prepared, slot: int, number: int) -> Batch:
    """One sample: a batch without its first axis."""
    seed = learner.seed
    picture = picture_of(number, learner.pool, seed)
    chance = chances(seed, number)
    variant = variant_of(chance[4], len(learner.latents[picture]))
    mean, std = learner.latents[picture][variant]
    shape = tuple(mean.shape)
    prior, empty = bool(chance[2] < learner.prior_share), chance[1] < learner.caption_dropout
    if prior:
        text = learner.text[learner.prior[int(chance[3] * len(learner.prior))]]
    else:
        text = learner.text[-1] if empty else learner.said(picture, number)
    weight = torch.ones(1, 1, 1) if prior else learner.weights[picture][variant]
    latents = mean + std * normal(shape, seed, "posterior", number)
    target, seen = noise.drawn(latents, seed, number, learner.noising)
    return Batch(
        latents=latents,
        noise=target,
        seen=seen,
        uniform=placed(torch.tensor(chance[0]), learner.noising),
        text=text,
        frame=learner.frames[picture][variant],
        slot=torch.tensor(slot),
        key=torch.tensor(stream(seed, "dropout", number).integers(2**63)),
        weight=weight.expand(1, *shape[1:]),
        prior=torch.tensor(prior),
    )
