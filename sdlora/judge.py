"""Which checkpoint, which scale: packs are asked for pictures at several scales, and the pictures measured (`measures`)."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdlora import measures, pictures
from sdlora.config import Run
from sdlora.data import buckets, captions
from sdlora.data.ledger import Dataset
from sdlora.data.pixels import read_picture
from sdlora.eyes import Eyes
from sdlora.state import Score
from sdlora.studio import Studio, as_prompt

BATCH = 16
UNRELATED = (
    "a cat sleeping on a sofa", "a red apple on a wooden table", "a house by a lake", "a portrait of an old man",
    "a bicycle in a street", "a bowl of soup", "a mountain at sunset", "a bird on a branch",
)  # fmt: skip
"""Prompts to measure drift by, where the run has none of its own."""
SATURATED, BROKEN = 0.95, 0.9
"""Shares of the highest likeness gain: reached first, it hardly grows any more; fallen below again, the picture breaks."""


@dataclass(frozen=True)
class Asking:
    """How much is asked of each candidate: prompts that name the trigger and as many that do not, at each seed and scale."""

    scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25)
    prompts: int = 6
    seeds: int = 2
    steps: int = 25
    eyes: str = "auto"
    most: int = 6  # checkpoints, the newest and others evenly between


@dataclass(frozen=True)
class Questions:
    """What every candidate is asked to draw."""

    asked: Sequence[str]  # prompts that name the trigger
    other: Sequence[str]  # prompts that do not
    seeds: Sequence[int]
    scales: Sequence[float]
    size: tuple[int, int]  # width, height in px
    steps: int = 25


@dataclass(frozen=True)
class Truth:
    """The pictures that were to be learnt, (N, 3, H, W) in 0..1."""

    seen: Tensor  # trained on
    held: Tensor  # never trained on; empty where there are none, and then likeness is to the seen ones
    says: Sequence[str]  # captions of those that likeness is to


@dataclass(frozen=True)
class Judged:
    """One candidate at one scale in figures; `measures` says what each is."""

    name: str
    step: int
    scale: float
    likeness: float
    drift: float
    score: float  # likeness - drift
    low: float  # of the score: bootstrap interval
    high: float
    memorisation: float  # median
    copied: float
    diversity: float
    following: float
    effect: float  # drift on the prompts that name the trigger: how much the adapter does
    places: dict[str, Tensor] = field(repr=False, compare=False, default_factory=dict)  # (rounds,) bootstrap scores

    def table(self) -> dict[str, Any]:
        own = asdict(self)
        del own["places"]
        told = {key: None if value != value else value for key, value in own.items()}  # not a number: it could not be measured
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in told.items()}


@dataclass(frozen=True)
class Sample:
    """A picture of a prompt that names the trigger, drawn at the first seed."""

    prompt: str
    picture: Image.Image
    nearest: int  # the training picture that is most like it
    memorisation: float


@dataclass(frozen=True)
class Verdict:
    """What came of it: the base first, then every candidate at every scale."""

    eyes: str
    against: str  # held out, or seen
    rows: Sequence[Judged]
    best: Judged
    equal: Sequence[Judged]  # of which the best does not differ: the interval of the difference holds zero
    words: str

    def table(self) -> dict[str, Any]:
        return {
            "eyes": self.eyes,
            "likeness_to": self.against,
            "recommended": {"name": self.best.name, "step": self.best.step, "scale": self.best.scale},
            "words": self.words,
            "no_difference": [[one.name, one.scale] for one in self.equal],
            "front": [[self.rows[i].name, self.rows[i].scale] for i in self.front()],
            "rows": [one.table() for one in self.rows],
        }

    def front(self) -> list[int]:
        """Rows on the Pareto front of likeness against drift."""
        return measures.front([one.likeness for one in self.rows], [one.drift for one in self.rows])


class Judge:
    """Asks the base once, and then any number of candidates that are registered on the studio."""

    def __init__(self, studio: Studio, questions: Questions, truth: Truth, eyes: Eyes) -> None:
        self.studio, self.questions, self.truth, self.eyes = studio, questions, truth, eyes
        self.base = self.draw("", 0.0)
        plain = eyes.see(self.base[len(self.prompts(questions.asked)) :])
        self.centre = torch.cat([plain, eyes.see(truth.held if len(truth.held) else truth.seen)])
        self.seen = eyes.see(truth.seen)
        self.true = measures.centred(eyes.see(truth.held if len(truth.held) else truth.seen), self.centre)
        self.fits = measures.fitting([text for text, _ in self.prompts(questions.asked)], truth.says)
        self.samples: dict[tuple[str, float], list[Sample]] = {}
        self.rows = [self._measured("base", 0, 0.0, self.base)]

    def prompts(self, texts: Sequence[str]) -> list[tuple[str, int]]:
        """(prompt, seed) of every picture, prompts fastest; a prompt that stands there again is drawn at seeds that it has not had."""
        again = [texts[:i].count(text) * len(self.questions.seeds) for i, text in enumerate(texts)]
        return [(text, seed + later) for seed in self.questions.seeds for text, later in zip(texts, again, strict=True)]

    def ask(self, name: str, step: int, scales: Sequence[float] = ()) -> list[Judged]:
        """Measure one candidate at every scale, or at these."""
        asked = scales or self.questions.scales
        for scale in asked:
            self.rows.append(self._measured(name, step, scale, self.draw(name, scale)))
        return self.rows[-len(asked) :]

    def draw(self, name: str, scale: float) -> Tensor:
        """Pictures of the prompts that name the trigger, then of the others; no name: the base's."""
        size = "{}x{}".format(*self.questions.size)
        scales = ((name, scale),) if name else ()
        wanted = [*self.prompts(self.questions.asked), *self.prompts(self.questions.other)]
        recipes = [self.studio.recipe(text, size, seed=seed, steps=self.questions.steps, scales=scales) for text, seed in wanted]
        return self.studio.pixels(recipes, BATCH).cpu()

    def verdict(self) -> Verdict:
        """The best of all that was asked, and what is no worse."""
        best = max(self.rows, key=lambda one: one.score)
        equal = [one for one in self.rows if one is not best and measures.interval(best.places["score"] - one.places["score"])[0] <= 0]
        against = "pictures held out" if len(self.truth.held) else "pictures that it was trained on: none was held out"
        return Verdict(self.eyes.name, against, self.rows, best, equal, _words(best, self.rows[0], equal, self.rows))

    def sheet(self, title: str) -> Image.Image:
        """A row for each prompt and candidate: the base, then every scale."""
        names = list(dict.fromkeys(one.name for one in self.rows[1:]))
        rows, labels = [], []
        for name in names:
            for i, text in enumerate(self.questions.asked):
                columns = [("base", 0.0), *((name, scale) for scale in self.questions.scales)]
                rows.append([self.samples[column][i].picture for column in columns])
                labels.append(f"{name} · {text}")
        return pictures.sheet(rows, labels, ["base", *(f"scale {scale:g}" for scale in self.questions.scales)], title)

    def _measured(self, name: str, step: int, scale: float, pixels: Tensor) -> Judged:
        count = len(self.prompts(self.questions.asked))
        drawn, base = self.eyes.see(pixels), self.eyes.see(self.base)
        own, plain = measures.centred(drawn, self.centre), measures.centred(base, self.centre)
        like, moved = measures.likeness(own[:count], self.true, self.fits), measures.drift(plain[count:], own[count:])
        places = like[measures.resampled(len(like))].mean(1) - moved[measures.resampled(len(moved))].mean(1)
        copies = measures.memorisation(drawn[:count], self.seen)
        shown = zip(
            self.questions.asked, pictures.images(pixels[:count]), measures.nearest(drawn, self.seen), copies.tolist(), strict=False
        )
        self.samples[name, scale] = [Sample(*one) for one in shown]
        low, high = measures.interval(places)
        return Judged(
            name, step, scale,
            likeness=float(like.mean()), drift=float(moved.mean()), score=float(like.mean() - moved.mean()), low=low, high=high,
            memorisation=float(copies.median()), copied=measures.copied(copies),
            diversity=measures.diversity(own[:count], [text for text, _ in self.prompts(self.questions.asked)]),
            following=self._following(drawn[count:], own[count:], plain[count:]),
            effect=float(measures.drift(plain[:count], own[:count]).mean()), places={"score": places},
        )  # fmt: skip

    def _following(self, drawn: Tensor, own: Tensor, plain: Tensor) -> float:
        """CLIP's similarity of picture and prompt where the eyes read, else the share of prompts that still draw their own thing."""
        said = self.eyes.read([text for text, _ in self.prompts(self.questions.other)])
        if said is not None:
            return float(measures.following(drawn, said).mean())
        return float((measures.own_rank(own, plain) == 1).float().mean())


def response(rows: Sequence[Judged], base: Judged) -> dict[str, float | None]:
    """The scales at which one candidate's likeness saturates and, above, breaks; None where it does not in the scales that were asked."""
    ordered = sorted(rows, key=lambda one: one.scale)
    gains = [one.likeness - base.likeness for one in ordered]
    top = max(gains)
    if top <= 0:
        return {"saturates_at": None, "breaks_at": None}
    peak = gains.index(top)
    saturated = next(one.scale for one, gain in zip(ordered, gains, strict=True) if gain >= SATURATED * top)
    broken = next((one.scale for one, gain in zip(ordered[peak:], gains[peak:], strict=True) if gain < BROKEN * top), None)
    return {"saturates_at": saturated, "breaks_at": broken}


def overtrained(scores: Sequence[Score]) -> int | None:
    """The first step from which on pictures come nearer to training pictures while likeness to those held out falls."""
    for before, after in itertools.pairwise(scores):
        if after.memorisation < before.memorisation and after.likeness < before.likeness:
            return after.step
    return None


def material(settled: Run, dataset: Dataset, asking: Asking) -> tuple[Questions, Truth]:
    """What to ask, and the pictures to compare with: those held out where there are any, in the size that most pictures have."""
    items, size = dataset.account.used, dataset.buckets.most_common(1)[0][0]
    pool = [i for i in dict.fromkeys(dataset.pool) if not items[i].regularisation]

    def seen(places: Sequence[int]) -> Tensor:
        shown = [buckets.fit(read_picture(items[i].path, settled.data.ground), size) / 2 + 0.5 for i in places]
        return torch.stack(shown) if shown else torch.empty(0, 3, size[1], size[0])

    # A prompt of a picture trained on would be answered best by a copy of it.
    said = [as_prompt(captions.final(items[i], settled, 0)) for i in dataset.held or pool]
    asked = [*itertools.islice(itertools.cycle(dict.fromkeys(said)), asking.prompts)]
    other = unrelated(settled.data.prior_prompts, asking.prompts)
    questions = Questions(asked, other, range(asking.seeds), asking.scales, size, asking.steps)
    return questions, Truth(seen(pool), seen(dataset.held), said)


def _words(best: Judged, base: Judged, equal: Sequence[Judged], rows: Sequence[Judged]) -> str:
    if best is base or (base in equal):
        return "nothing that was asked is measurably better than the base: train longer, at a higher rate, or on more pictures"
    others = ", ".join(f"{one.name} at {one.scale:g}" for one in equal[:3]) + (f" and {len(equal) - 3} more" if len(equal) > 3 else "")
    said = f"use {best.name} at scale {best.scale:g}: likeness {best.likeness:.2f} (the base {base.likeness:.2f}), drift {best.drift:.2f}"
    copies = f"; {best.copied:.0%} of its pictures are nearly copies of training pictures" if best.copied > 0.05 else ""
    own = [one for one in rows if one.name == best.name]
    steep = response(own, base)
    breaks = f"; above scale {steep['breaks_at']:g} it breaks" if steep["breaks_at"] is not None else ""
    return said + copies + breaks + (f"; no difference that could be measured from {others}" if others else "")


def unrelated(prompts: Sequence[str] | None, most: int) -> list[str]:
    """Prompts that do not name the trigger: the run's own, or the usual ones."""
    own = list(prompts or ()) or list(UNRELATED)
    return own[:: max(1, len(own) // most)][:most]
