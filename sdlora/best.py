"""`sdlora find best`: a run's checkpoints, or a pack, judged at several scales by the run's own pictures."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image

from sdlora import devices, eyes, family, pictures, safeio, state
from sdlora.adapter import Bank
from sdlora.config import Run
from sdlora.data import cache, ledger, store
from sdlora.errors import UserError
from sdlora.events import Event
from sdlora.family import Base
from sdlora.judge import Asking, Judge, Verdict, material
from sdlora.learners import Job, given, new_learner, pieces
from sdlora.packs.file import Pack, tensors_of
from sdlora.plots import Curve, plot
from sdlora.studio import Studio


def find(settled: Run, base: Base, candidates: Mapping[int, Pack], asking: Asking, out: Path) -> Iterator[Event]:
    """Judge packs, given by the step that each was taken at; the last event is `done`, and its data the verdict's table."""
    studio = Studio.open(base)
    dataset = ledger.fit_dataset(ledger.read_dataset(settled, out / "cache"), settled, studio.family)
    questions, truth = material(settled, dataset, asking)
    sight = eyes.opened(asking.eyes, studio.family)
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
    safeio.write(out / "score.json", json.dumps(verdict.table(), indent=1))
    safeio.write(out / "grid.png", pictures.encode(judge.sheet(f"{settled.name} on {base.name}"), {}))
    safeio.write(out / "front.png", pictures.encode(drawn(verdict, settled.name), {}))
    yield Event("done", verdict.words, data=verdict.table())


def checkpoints(settled: Run, base: Base, run: Path, most: int) -> dict[int, Pack]:
    """The sound checkpoints of a run as the packs that they would have become. Nothing in the run folder changes."""
    sound = [step for step in state.steps(run) if safeio.read_folder(state.folder(run, step)) is not None]
    if not sound:
        todo = "judge the pack itself, or train with train.keep_checkpoints as large as you want to choose from"
        raise UserError("E-RUN-08", "this run has no checkpoint that is whole", run, todo)
    chosen = sorted({sound[round(i * (len(sound) - 1) / max(1, most - 1))] for i in range(most)})
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


def drawn(verdict: Verdict, name: str) -> Image.Image:
    """Likeness against drift: a curve for each candidate, its scales along it, and the Pareto front."""
    base, rest = verdict.rows[0], verdict.rows[1:]
    curves = [Curve("base", [(base.drift, base.likeness)], joined=False)]
    for one in dict.fromkeys(row.name for row in rest):
        own = [row for row in rest if row.name == one]
        curves.append(Curve(one, [(row.drift, row.likeness) for row in own], names=[f"{row.scale:g}" for row in own]))
    front = [(verdict.rows[i].drift, verdict.rows[i].likeness) for i in verdict.front()]
    return plot(f"{name}: likeness to {verdict.against}", "drift", "likeness", [*curves, Curve("Pareto front", front)])
