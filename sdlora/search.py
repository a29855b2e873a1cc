"""Trial runs: what a set of pictures is learnt best with, measured by the loss on pictures held out. One base for all, nothing is kept.

All trials of a search see the same samples under the same noise, and start from the same random numbers, so that they differ in what is
tried alone.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdlora import devices, family, job, plan, validation
from sdlora.adapter import Bank
from sdlora.config import Run, parse
from sdlora.data import cache, ledger, store
from sdlora.defaults import ADAPTER_RATES
from sdlora.errors import UserError, without_frames
from sdlora.events import Event
from sdlora.learners import Job, Latents, base_of, check_objective, check_optimizer, given, memory, new_learner, pieces
from sdlora.plots import Curve, plot
from sdlora.stop import Stop
from sdlora.train import Learner, Setup, steps
from sdlora.validation import HeldOut

HELD = 0.2
"""Share of the pictures that a search holds out where the settings hold out none."""

SHOWN = 1.5
"""Times the base's loss that a picture of a search over rates reaches up to."""
ALPHA = 16.0
"""Of the ranks tried, where the run's adapter has none."""


@dataclass(frozen=True)
class Trial:
    """What became of one."""

    settled: Run
    parameters: int
    seconds: float  # a step
    curve: list[tuple[int, float]]  # (steps taken, validation loss); the first is the base's
    peak_bytes: int | None  # the most memory that training took, where the device says it

    @property
    def gain(self) -> float:
        """How far the loss on pictures held out fell below the base's in the end, as a share of it; below 0: it rose, or diverged."""
        first, last = self.curve[0][1], self.curve[-1][1]
        return 1 - last / first if math.isfinite(last) else -math.inf


class Bench:
    """A loaded base and a set of pictures, which any number of trials are made with."""

    def __init__(self, settled: Run, out: Path) -> None:
        self.began = time.time()
        self.settled = holding_out(settled)
        self.out, self.kept = out, store.usual(out / "cache")
        self.accelerator, dtype = devices.for_training(given(settled.train.precision))
        found = ledger.read_dataset(self.settled, out / "cache", self.kept)
        self.family = family.load(base_of(settled), torch.device("cpu"), dtype)
        self.dataset = ledger.fit_dataset(found, self.settled, self.family)
        self._place()
        self.settled, _ = check_objective(self.settled, self.family, self.dataset, self.kept)
        self.base = self.family.base
        if not self.dataset.held:
            what = "no picture is held out, and a search measures by those that are"
            raise UserError("E-FIND-01", what, "validation.share", "set it higher, or add pictures")
        items, variants = self.dataset.account.used, self.dataset.variants
        self.latents: Latents = cache.latents(items, variants, self.settled.data.ground, self.family, self.kept)

    def _place(self) -> None:
        """Lay the base where it computes, by the measures that the settings ask for or memory needs."""
        measured = memory(self.settled, self.family, pieces(self.settled, self.family), self.dataset)
        self.planned = plan.choose(self.settled.train, measured, devices.free_bytes(self.accelerator.device))
        self.planned.lay(self.family, self.accelerator.device)

    def trial(
        self, settled: Run, looks: int = 1, rate: Callable[[int], float] | None = None, then: Callable[[Bank], None] | None = None
    ) -> Trial:
        """Train with these settings, which may differ in all but base and data; `rate(step)`: a factor on the learning rates; `then`
        sees what was learnt, on the bank under the run's name.

        The loss is measured before, `looks` times on the way, evenly, the last time at the end; where it is lost the trial ends.
        """
        settled = holding_out(settled)
        check_optimizer(settled)
        bank = Bank(self.family.components)
        one = Job(settled, self.base, self.out, self.began, self.dataset, pieces(settled, self.family), self.kept)
        learner = new_learner(one, self.family, bank, self.accelerator, self.latents)
        setup = self.planned.setup(self.family, bank, [learner])
        held = job.new_course(one, setup, Stop()).held
        devices.forget_peak(self.accelerator.device)
        try:
            curve, seconds = self._followed(setup, held, looks, rate)
            peak = devices.peak_bytes(self.accelerator.device)
            if then:
                with learner.averaged():
                    then(bank)
        finally:
            bank.eject()
        return Trial(settled, sum(p.numel() for p in learner.params.values()), seconds, curve, peak)

    def _followed(
        self, setup: Setup, held: Sequence[HeldOut], looks: int, rate: Callable[[int], float] | None
    ) -> tuple[list[tuple[int, float]], float]:
        learner, curve = setup.learners[0], [(0, validation.loss(setup, 0, held, 0.0))]
        total, seconds = given(learner.train.steps), 0.0
        due = {round(total * (i + 1) / looks) for i in range(looks)}
        peaks = [group["peak_lr"] for group in learner.optimizer.param_groups]
        going = steps(setup)
        while not learner.is_through:
            if rate:
                scale(learner, peaks, rate(learner.step))
            since = time.monotonic()
            next(going)
            seconds += time.monotonic() - since
            if learner.step in due:
                with learner.averaged():
                    curve.append((learner.step, validation.loss(setup, 0, held)))
                if not math.isfinite(curve[-1][1]):
                    break
        return curve, seconds / max(1, learner.step)


def scale(learner: Learner, peaks: Sequence[float], factor: float) -> None:
    """Set a learner's peak rates to these times a factor."""
    for group, peak in zip(learner.optimizer.param_groups, peaks, strict=True):
        group["peak_lr"] = peak * factor


def holding_out(settled: Run) -> Run:
    """The settings with some pictures held out, if none are."""
    if settled.validation.share or any(source.kind == "validation" for source in settled.data.sources):
        return settled
    return laid_over(settled, {"validation": {"share": HELD}})


def laid_over(settled: Run, tables: dict[str, dict[str, Any]]) -> Run:
    """A resolved run with some settings changed."""
    table = settled.model_dump(exclude_none=True)
    for name, changes in tables.items():
        table[name] = {**table[name], **changes}
    return parse(table)


# ---------------------------------------------------------------- learning rate


@without_frames
def find_rate(settled: Run, out: Path, count: int, low: float, high: float) -> Iterator[Event]:
    """The learning rate by a range test (Smith 2017, section 3.3): it grows exponentially from `low` to `high` within one short run.

    The training loss of few samples is mostly noise, so the loss on the pictures held out is read instead, whose noise never changes.
    The last event's data holds the proposal and the curve, and the picture of it.
    """
    if not low < high:
        raise UserError("E-FIND-02", f"the lowest rate {low:g} is not below the highest {high:g}", "--low", "give a range")
    top = given(settled.train.lr)
    alone = {"steps": count, "schedule": "constant", "warmup_steps": 0, "warmup_share": 0.0}
    bench = Bench(settled, out)
    yield Event("note", f"{len(bench.dataset.held)} pictures are held out; {count} steps at rates from {low:g} to {high:g}")

    def at(step: int) -> float:
        return float(low * (high / low) ** (step / max(1, count - 1)))

    found = bench.trial(laid_over(settled, {"train": alone}), min(count, 40), lambda step: at(step) / top)
    points = [(at(step - 1), loss) for step, loss in found.curve[1:] if math.isfinite(loss)]
    chosen = proposed(points, found.curve[0][1])
    share = given(settled.train.text_encoder_lr) / top
    seen = [(rate, loss) for rate, loss in points if loss <= SHOWN * found.curve[0][1]]  # or divergence is all there is to see
    shown = plot("Loss on pictures held out while the learning rate grows", "learning rate", "loss", [
        Curve("loss", seen), Curve("proposal", [point for point in points if point[0] == chosen], joined=False, names=[f"{chosen:.2g}"]),
    ], log_across=True)  # fmt: skip
    line = f"--set train.lr={chosen:.2g} --set train.text_encoder_lr={chosen * share:.2g}"
    yield Event("done", line, data={"lr": chosen, "text_encoder_lr": chosen * share, "curve": points, "picture": shown})


def proposed(points: Sequence[tuple[float, float]], base: float) -> float:
    """Of (rate, loss) the rate where the loss, smoothed over three points, falls steepest per decade.

    At the lowest loss itself a rate is too high to stay at. Raises `UserError` where it never falls.
    """
    losses = [loss for _, loss in points]
    smooth = [sum(losses[max(0, i - 1) : i + 2]) / len(losses[max(0, i - 1) : i + 2]) for i in range(len(losses))]
    if len(points) < 3 or min(smooth) >= base:
        raise UserError("E-FIND-03", "at no rate of this range does the loss on pictures held out fall", "--low, --high", "widen the range")
    end = smooth.index(min(smooth))
    falls = {i: smooth[i - 1] - smooth[i] for i in range(1, end + 1)} or {0: 0.0}
    return points[max(falls, key=lambda i: falls[i])][0]


# ---------------------------------------------------------------- dimension


@without_frames
def find_dimension(settled: Run, out: Path, count: int, ladders: dict[str, Sequence[int]], enough: float = 0.9) -> Iterator[Event]:
    """The smallest size on each ladder (a setting of the adapter's, its values rising) that reaches `enough` of the gain of all (Li et al.
    2018, section 2 with rank beside dimension). The last event's data holds the table and the picture."""
    bench = Bench(settled, out)
    short = {"steps": count, "warmup_steps": min(given(settled.train.warmup_steps), count // 10), "warmup_share": 0.0}
    rows: list[dict[str, Any]] = []
    for name, ladder in ladders.items():
        for value in ladder:
            own = settled.model_dump(exclude_none=True)
            table = {**own, "adapter": sized(name, value, own["adapter"])}
            kind = table["adapter"]["kind"]
            suits = ADAPTER_RATES.get(kind, 1.0) / ADAPTER_RATES.get(settled.adapter.model_dump()["kind"], 1.0)
            rates = {rate: suits * table["train"][rate] for rate in ("lr", "text_encoder_lr")}
            table["train"] = {**table["train"], **short, **rates}
            trial = bench.trial(parse(table))
            rows.append({"ladder": name, "size": value, "parameters": trial.parameters, "gain": trial.gain, "seconds": trial.seconds})
            yield Event("note", f"{name} {value}: {trial.parameters:,} parameters, gain {trial.gain:.2%}", data=rows[-1])
    full = max(row["gain"] for row in rows)
    if full <= 0:
        raise UserError(
            "E-FIND-04", "no adapter learnt anything that pictures held out show", "--steps", "give it more steps, or a higher rate"
        )
    chosen = {name: next((row["size"] for row in rows if row["ladder"] == name and row["gain"] >= enough * full), None) for name in ladders}
    curves = []
    for name in ladders:
        steps_up = [row for row in rows if row["ladder"] == name]
        curves.append(Curve(name, [(row["parameters"], row["gain"]) for row in steps_up], names=[str(row["size"]) for row in steps_up]))
    shown = plot("What an adapter of this size learns", "parameters", "gain", curves, log_across=True)
    said = [f"{name} {size}" if size else f"no {name} of the ladder" for name, size in chosen.items()]
    text = f"enough for {enough:.0%} of the best gain ({full:.2%}): {', '.join(said)}"
    yield Event("done", text, data={"chosen": chosen, "rows": rows, "picture": shown})


def sized(name: str, value: int, adapter: dict[str, Any]) -> dict[str, Any]:
    """An adapter's settings of such a size, on the layers of this one."""
    subspace, lora = {"kind": "subspace", "dimension": value}, {"kind": "lora", "rank": value, "alpha": adapter.get("alpha", ALPHA)}
    return {"targets": adapter["targets"], **(subspace if name == "dimension" else lora)}
