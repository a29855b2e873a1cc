"""`sdlora find best`: a run's checkpoints, or a pack, judged at several scales by the run's own pictures."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from sdlora import devices, eyes, family, judged, lock, pictures, safeio, state
from sdlora.adapter import Bank
from sdlora.config import Run
from sdlora.data import cache, ledger, store
from sdlora.errors import UserError, without_frames
from sdlora.events import Event
from sdlora.eyes import Eyes
from sdlora.family import Base
from sdlora.judge import Asking, Judge, Judged, Questions, Truth, Verdict, material
from sdlora.learners import Job, given, new_learner, pieces
from sdlora.packs import file
from sdlora.packs.file import Pack, tensors_of
from sdlora.plots import Curve, plot
from sdlora.studio import Studio

AXES = {"drift": "drift", "following": "prompts followed"}


@without_frames
def find(settled: Run, base: Base, candidates: Mapping[int, Pack], asking: Asking, out: Path) -> Iterator[Event]:
    """Judge packs, given by the step that each was taken at; the last event is `done`, and its data the verdict's table."""
    with lock.held(out):
        yield from _found(settled, base, candidates, asking, out)


def _found(settled: Run, base: Base, candidates: Mapping[int, Pack], asking: Asking, out: Path) -> Iterator[Event]:
    studio = Studio.open(base)
    questions, truth, sight = asked(settled, studio, asking, out)
    count = (1 + len(candidates) * len(asking.scales)) * (len(questions.asked) + len(questions.other)) * asking.seeds
    yield Event(
        "note", f"{len(candidates)} candidates at {len(asking.scales)} scales: {count} pictures are drawn, and seen by {sight.name}"
    )
    judge = Judge(studio, questions, truth, sight)
    for step, pack in candidates.items():
        name = studio.add(pack)
        judge.ask(name, step)
        top = max((row for row in judge.rows if row.name == name), key=lambda row: row.score)
        yield Event("note", f"{name}: best at scale {top.scale:g}, likeness {top.likeness:.3f}, drift {top.drift:.3f}", step=step)
        studio.remove(name)
    verdict = judge.verdict()
    table = verdict.table() | {"title": f"{settled.name} on {base.name}", "pictures": judged.keep(out, judge)}
    safeio.write(out / "grid.png", pictures.encode(judge.sheet(table["title"]), {}))
    for name, axis in (("front.png", "drift"), ("following.png", "following")):
        safeio.write(out / name, pictures.encode(drawn(verdict, settled.name, axis), {}))
    safeio.write(out / "score.json", json.dumps(table, indent=1))
    safeio.write(out / "score.html", judged.page(out))
    yield Event("done", verdict.words, data=table)


def asked(settled: Run, studio: Studio, asking: Asking, out: Path) -> tuple[Questions, Truth, Eyes]:
    """What is asked, what it is compared with, and who looks."""
    dataset = ledger.fit_dataset(ledger.read_dataset(settled, out / "cache"), settled, studio.family)
    return *material(settled, dataset, asking), eyes.opened(asking.eyes, studio.family)


def kept(settled: Run, base: Base, run: Path, step: int, scale: float) -> Pack:
    """A checkpoint as a pack that recommends a scale, and says all else that the pack of the finished run says."""
    own = run / f"{settled.name}.safetensors"
    if not own.is_file():
        raise UserError("E-RUN-09", "this run has made no pack yet, which says what a pack has to say", run, "let it finish")
    tensors = checkpoints(settled, base, run, most=1, steps=[step])[step].tensors
    said = {"ss_steps": str(step), "sdlora.recommended_scale": f"{scale:g}", "sdlora.checkpoint": str(step)}
    pack = file.load(own)
    return replace(pack, tensors=tensors, metadata={**pack.metadata, **said})


def checkpoints(settled: Run, base: Base, run: Path, most: int, steps: Sequence[int] = ()) -> dict[int, Pack]:
    """Sound checkpoints of a run as the packs that they would have become: those of these steps, else `most` of all, evenly. Nothing in the
    run folder changes."""
    sound = [step for step in state.steps(run) if safeio.read_folder(state.folder(run, step)) is not None]
    if not sound or not set(steps) <= set(sound):
        todo = "judge the pack itself, or train with train.keep_checkpoints as large as you want to choose from"
        there = f"whole are those of steps {', '.join(map(str, sound))}" if sound else "none is whole"
        raise UserError("E-RUN-08", f"this run has no such checkpoint: {there}", run, todo)
    chosen = sorted(steps or {sound[-1 - round(i * (len(sound) - 1) / max(1, most - 1))] for i in range(most)})
    accelerator, dtype = devices.for_training(given(settled.train.precision))
    loaded, kept = family.load(base, accelerator.device, dtype), store.usual(run / "cache")
    dataset = ledger.fit_dataset(ledger.read_dataset(settled, run / "cache", kept), settled, loaded)
    job = Job(settled, base, run, 0.0, dataset, pieces(settled, loaded), kept)
    bank = Bank(loaded.components)
    latents = cache.latents(dataset.account.used, dataset.variants, settled.data.ground, loaded, kept)
    learner, found = new_learner(job, loaded, bank, accelerator, latents), {}
    for step in chosen:
        state.restore(run, [learner], step, only=step)
        with learner.averaged():
            tensors = tensors_of(bank, settled.name, loaded)
        found[step] = Pack(f"step {step}", tensors, {"sdlora.adapter": settled.adapter.model_dump()["kind"]})
    return found


def drawn(verdict: Verdict, name: str, axis: str = "drift") -> Image.Image:
    """Likeness against drift, or another figure: a curve for each candidate, its scales along it; against drift, the Pareto front, too."""
    base, rest = verdict.rows[0], verdict.rows[1:]

    def point(row: Judged) -> tuple[float, float]:
        return getattr(row, axis), row.likeness

    curves = [Curve("base", [point(base)], joined=False)]
    for one in dict.fromkeys(row.name for row in rest):
        own = [row for row in rest if row.name == one]
        curves.append(Curve(one, [point(row) for row in own], names=[f"{row.scale:g}" for row in own]))
    front = [Curve("Pareto front", [point(verdict.rows[i]) for i in verdict.front()])] if axis == "drift" else []
    return plot(f"{name}: likeness to {verdict.against}", AXES[axis], "likeness", [*curves, *front])
