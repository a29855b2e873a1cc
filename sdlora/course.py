"""What happens between two steps: losses are read, the run is measured, looked at, saved, and asked whether it is to stop."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sdlora import diagnose, pictures, preview, safeio, state, validation
from sdlora.config import Run
from sdlora.errors import NUMBERS, UserError
from sdlora.events import Event, patiently, warn_on_failure
from sdlora.judge import Judge, overtrained
from sdlora.schedule import rate
from sdlora.state import Progress, Score
from sdlora.stop import Stop
from sdlora.studio import Studio
from sdlora.train import Learner, Setup, Trained
from sdlora.validation import HeldOut

MOST_LAPSES = 3
"""Steps in a row that may come to nothing for half precision's sake, before the run ends with advice."""


@dataclass
class Course:
    """One learner on its way."""

    setup: Setup
    slot: int
    settled: Run
    out: Path
    names: Sequence[str]  # of the pictures, as messages call them
    held: Sequence[HeldOut]
    progress: Progress
    stop: Stop
    stopped: bool = False  # it was asked to stop before its end
    lapses: int = 0
    unread: list[Trained] = field(default_factory=list)
    asking: Callable[[Studio], Judge] | None = None  # who judges its pictures, if anybody does
    judge: Judge | None = None  # once it was asked

    @property
    def learner(self) -> Learner:
        return self.setup.learners[self.slot]

    @property
    def is_over(self) -> bool:
        """Whether its training has come to an end."""
        return self.learner.is_through or self._is_enough()

    def begin(self) -> Iterator[Event]:
        """What is told before the first step, or on going on."""
        needed = (self.settled.train.keep_checkpoints + 2) * state.size([self.learner])
        free = shutil.disk_usage(self.out).free
        if free < needed:
            yield Event(
                "warning", f"{free / 1e6:.0f} MB are free on the disk of {self.out}, and the checkpoints take {needed / 1e6:.0f} MB"
            )
        if self.progress.step == 0:
            if self.held:
                base = validation.loss(self.setup, self.slot, self.held, 0.0)
                yield Event("validation", f"loss of the base on {len(self.held)} pictures held out: {base:.5f}", data={"loss": base})
            if self.settled.preview.every:
                yield from self._optional("preview", self._look())
        self.learner.left = self.is_over

    def after(self, trained: Trained) -> Iterator[Event]:
        """What is told after a step of its own."""
        train = self.settled.train
        assert train.save_every is not None
        self.unread.append(trained)
        self.stop.look(self.out)
        stopping = self.stop.stopping  # from here on: what is wished later is granted a step later
        due = trained.step == train.steps or trained.step % train.save_every == 0
        save = due or stopping or self.stop.save
        if save or trained.step % train.log_every == 0:
            yield from self._read(self.unread)
            self.unread.clear()
        self.progress.step = trained.step
        self.progress.beside = [self.setup.learners[slot].name for slot in trained.loss if slot != self.slot]
        if due and self.held:
            yield from self._validate()
        if due and self.asking:
            yield from self._optional("judgment of pictures", self._judge())
        if save:
            yield from self._save()
        if self.stop.sample or (self.settled.preview.every and trained.step % self.settled.preview.every == 0):
            yield from self._optional("preview", self._look())
        if stopping and trained.step != train.steps:
            yield from self.halt()
        elif self._is_enough():
            what = "no lower validation loss" if self.progress.by == "loss" else "no higher score"
            yield Event("note", f"{what} in the last {self.progress.waited()}: training ends here")
            self.learner.left = True

    def halt(self) -> Iterator[Event]:
        """Take no further step; all is saved."""
        self.stopped = self.learner.left = True
        data = {"signal": (self.stop.above or self.stop).signum}
        yield Event("stopped", f"saved at step {self.progress.step}", step=self.progress.step, data=data)

    def rescue(self) -> Iterator[Event]:
        """Save what was reached, where the next step cannot be taken."""
        if self.unread:
            yield from self._read(self.unread)
            self.unread.clear()
        if self.progress.step and self.progress.step not in state.steps(self.out):
            yield from self._save()

    def _read(self, unread: Sequence[Trained]) -> Iterator[Event]:
        """Wait for the device and tell the losses of some steps; look for the cause of what was not finite."""
        train = self.settled.train
        assert train.lr is not None
        losses = torch.stack([one.loss[self.slot] for one in unread]).tolist()
        finite = torch.stack([one.finite[self.slot] for one in unread]).tolist()
        for one, loss, sound in zip(unread, losses, finite, strict=True):
            lr = train.lr * rate(one.step - 1, train)
            yield Event("step", step=one.step, loss=loss if sound else None, data={"lr": lr})
            self.lapses = 0 if sound else self.lapses + 1
            if not sound:
                yield from self._mend(one.step - 1)
            measures = []
            if one.recomputed and not self.progress.recomputed:
                measures.append("gradient checkpointing is on")
            if one.at_once and one.at_once != self.progress.at_once:
                measures.append(f"only {one.at_once} samples go through the network at once")
            if measures:
                what = f"memory did not suffice: from step {one.step} on {' and '.join(measures)}"
                yield Event("warning", f"{what}; the result is the same but for rounding", step=one.step)
            self.progress.at_once, self.progress.recomputed = one.at_once, one.recomputed

    def _mend(self, step: int) -> Iterator[Event]:
        """Go on after a step that moved nothing, or raise `UserError` if it is better not to."""
        learner, train = self.learner, self.settled.train
        cause = diagnose.find(self.setup, self.slot, step)
        names = ", ".join(self.names[picture] for picture in cause.pictures)
        what = f"loss or gradient is not finite; the weights did not move. Cause: {names + ': ' if names else ''}{cause.text}"
        since = (step // train.log_every + 1) * train.log_every  # the next step that is sure to be taken after this one was read
        news = [picture for picture in cause.pictures if picture not in learner.quarantine]
        left = set(learner.data.pool) - set(learner.quarantine) - set(news)
        hopeless = cause.kind in ("weights", "prompt") or not left or (cause.kind != "picture" and self.lapses >= MOST_LAPSES)
        if hopeless or train.on_nonfinite == "stop":
            todo = {"picture": "take these pictures out", "prompt": "take that prompt out of data.prior_prompts"}
            advice = todo.get(cause.kind, "lower train.lr or set train.precision=fp32") + ", and resume from the last checkpoint"
            raise UserError("E-NUM-01", what, f"step {step + 1}", advice, NUMBERS)
        for picture in news:
            learner.quarantine[picture] = since
        if news or cause.kind != "picture":
            also = f"; left out from step {since + 1} on" if news else ""
            yield Event("warning", f"step {step + 1}: {what}{also}", step=step + 1, data={"pictures": [self.names[one] for one in news]})

    def _optional(self, what: str, events: Iterator[Event]) -> Iterator[Event]:
        """Events of a look at what was learnt, which training can do without."""
        return warn_on_failure(events, f"no {what}; training goes on", self.progress.step)

    def _validate(self) -> Iterator[Event]:
        with self.learner.averaged():
            loss = validation.loss(self.setup, self.slot, self.held)
        self.progress.validations.append((self.progress.step, loss))
        step, best = min(self.progress.validations, key=lambda one: one[1])
        lowest = "" if step == self.progress.step else f", lowest {best:.5f} at step {step}"
        text = f"loss on {len(self.held)} pictures held out: {loss:.5f}{lowest}"
        yield Event("validation", text, step=self.progress.step, data={"loss": loss})

    def _judge(self) -> Iterator[Event]:
        """Draw pictures and judge them."""
        assert self.asking
        with self.learner.averaged():
            self.judge = self.judge or self.asking(Studio(self.setup.family, self.setup.bank, {}))
            (one,) = self.judge.ask(self.learner.name, self.progress.step, [1.0])
        score = Score(one.step, one.score, one.likeness, one.drift, one.memorisation)
        self.progress.scores.append(score)
        text = f"judged by pictures: likeness {one.likeness:.3f} (the base {self.judge.rows[0].likeness:.3f}), drift {one.drift:.3f}"
        yield Event("validation", text, step=one.step, data={"judged": one.table()})
        if overtrained(self.progress.scores) == one.step:
            what = "its pictures come nearer to those trained on and are less like those held out: it is over-trained from here on"
            yield Event("warning", f"{what}; validation.by=score with validation.pack=best keeps the weights before", step=one.step)

    def _is_enough(self) -> bool:
        patience = self.settled.validation.patience
        return bool(patience) and self.progress.waited() >= patience

    def _save(self) -> Iterator[Event]:
        self.stop.save = False
        keep = self.settled.train.keep_checkpoints
        path = yield from patiently(lambda: state.save(self.out, self.progress, [self.learner], keep), self.stop)
        yield Event("checkpoint", path.name, step=self.progress.step)

    def _look(self) -> Iterator[Event]:
        self.stop.sample = False
        studio = Studio(self.setup.family, self.setup.bank, {})
        with self.learner.averaged():
            row = pictures.row(preview.in_training(studio, self.settled, 1.0 if self.progress.step else 0.0))
        path = Path("previews") / f"step-{self.progress.step:06d}.png"
        content = pictures.encode(row, {})
        yield from patiently(lambda: safeio.write(self.out / path, content), self.stop)
        yield Event("preview", path.as_posix(), step=self.progress.step, data={"file": path.as_posix()})
