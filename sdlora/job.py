"""One run from a folder of pictures to a finished pack: everything around the loop, told as events."""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import platform
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from sdlora import devices, estimate, family, lock, lookup, pictures, preview, priors, report, safeio, settings, state
from sdlora.adapter import Bank
from sdlora.config import Run, flat, parse, to_toml
from sdlora.course import Course
from sdlora.data import cache, captions, ledger, store
from sdlora.errors import UserError
from sdlora.events import Event, Log, patiently
from sdlora.family import Base, Family
from sdlora.learners import Job, Latents, adapted, check_objective, check_optimizer, doubts, given, new_learner, noising, pieces
from sdlora.packs import file, metadata, precision
from sdlora.stop import Stop
from sdlora.studio import Studio
from sdlora.trackers import Trackers
from sdlora.train import Goal, Learner, Setup
from sdlora.validation import HeldOut

FIXED = ("base", "adapter", "name", "kind", "seed")
"""What of a run's settings no resumed run may change."""
REPORTED = ("preview", "stopped", "done")
"""Events after which the report is written anew."""
LOST = 1e-3
"""Share of numbers that may become zero in a pack unsaid: a few of a uniform start always do."""
RECORDED = ("sdlora", "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")


def run(settled: Run, base: Base, out: Path, stop: Stop | None = None) -> Iterator[Event]:
    """Train a resolved run into a folder, going on from its last checkpoint if it has one. Every event is also in its log."""
    began = time.time()
    accelerator, dtype = devices.for_training(given(settled.train.precision))
    check_folder(settled, out)
    check_optimizer(settled)
    trackers = Trackers(settled.train.trackers, settled.name, out / "trackers")
    with lock.held(out) as unlocked:
        notes = check_folder(settled, out)
        kept = store.usual(out / "cache")
        found = ledger.read_dataset(settled, out / "cache", kept)
        loaded = family.load(base, accelerator.device, dtype)
        check_objective(settled, loaded)
        job = Job(settled, base, out, began, ledger.fit_dataset(found, settled, loaded), pieces(settled, loaded), kept)
        doubtful = [Event("warning", doubt) for doubt in doubts(settled, loaded, job.pieces)]
        prepare_folder(settled, out, accelerator.device)
        log = Log(out / "events.jsonl")
        said = [Event("note", note) for note in notes] + [Event("warning", unlocked)] * bool(unlocked) + doubtful
        told = itertools.chain(said, _train(job, loaded, accelerator, stop or Stop()))
        timing, pace = estimate.pace_name(settled, loaded), list[tuple[int, float]]()
        del loaded  # what tells makes room once it is trained
        try:
            with trackers:
                for event in told:
                    trackers.tell(log.add(event))
                    if event.kind == "step" and event.step % settled.train.log_every == 0:  # the others are told later than they were done
                        pace.append((event.step, time.monotonic()))
                    if event.kind in REPORTED:
                        write_report(out)
                    yield event
            estimate.keep_pace(timing, kept, pace)
        except UserError as error:
            log.add(Event("failed", str(error)))
            write_report(out)
            raise


def write_report(out: Path) -> None:
    """Write `report.html`, unless the disk refuses: it can be had again of the run folder at any time, and ends no run."""
    with contextlib.suppress(UserError):
        report.write(out)


def check_folder(settled: Run, out: Path) -> list[str]:
    """Whether the run may have this folder; what differs from the settings of the run that lies in it, a line each."""
    path = out / "config.toml"
    for source in settled.data.sources:
        if out.resolve().is_relative_to(Path(source.folder).resolve()):
            what = f"the run would lie in its own folder of pictures, {source.folder}, and its previews be taken for some of them"
            raise UserError("E-RUN-06", what, out, "name another folder with --out")
    if out.exists() and not out.is_dir():
        raise UserError("E-RUN-01", "this is a file; a run needs a folder of its own", out, "name a folder with --out")
    if not path.is_file():
        own = ("cache", lock.NAME)  # a ZIP is unpacked there before the run begins
        others = (other.name for other in out.glob("*") if not other.name.startswith(safeio.TEMPORARY))  # left by a killed run
        if any(name not in own for name in others):
            raise UserError("E-RUN-03", "this folder holds other files, and no run", out, "name a new or empty folder with --out")
        return []
    before = dict(flat(parse(settings.read(path), path)))
    changed = {key: (before.get(key), value) for key, value in flat(settled) if before.get(key) != value}
    fixed = [key for key in changed if key == "optimizer.kind" or key.partition(".")[0] in FIXED]
    if fixed:
        what = "; ".join(f"{key} was {changed[key][0]!r} and would be {changed[key][1]!r}" for key in fixed)
        raise UserError(
            "E-RUN-02", f"another run lies in this folder: {what}", out, "train into another folder with --out, or remove this one"
        )
    return [f"{key} changes from {old!r} to {new!r}" for key, (old, new) in changed.items()]


def prepare_folder(settled: Run, out: Path, device: torch.device) -> None:
    """Make the run folder, or take up the one that is there."""
    safeio.write(out / "config.toml", to_toml(settled))
    versions = {name: importlib.metadata.version(name) for name in RECORDED}
    system = {"python": platform.python_version(), "system": platform.platform(), **versions, **state.machine(device)}
    safeio.write(out / "environment.json", json.dumps(system, indent=1))
    for folder in (out, out / "checkpoints", out / "cache", out / "previews"):
        safeio.sweep(folder)


def _train(job: Job, loaded: Family, accelerator: Accelerator, stop: Stop) -> Iterator[Event]:
    settled = job.settled
    if settled.data.prior_pictures:
        yield Event("note", f"the base draws {settled.data.prior_pictures} regularisation pictures, unless they are in the run's cache")
        job = dataclasses.replace(job, dataset=priors.with_drawn(job.dataset, settled, loaded, job.out / "cache", job.kept))
    dataset = job.dataset
    yield Event("note", dataset.account.line())
    found = ledger.findings(dataset, settled, loaded)
    table = ledger.ledger(dataset, settled, loaded, found)
    table["totals"] |= estimate.totals(settled, loaded, job.pieces, list(dataset.buckets), job.kept)
    safeio.write(job.out / "ledger.json", json.dumps(table, indent=1))
    for finding in (one for one in found if one.severity == "warn"):
        yield Event("warning", ledger.said(finding))
    latents = cache.latents(dataset.account.used, dataset.variants, settled.data.ground, loaded, job.kept)
    bank = Bank(loaded.components)
    learner = new_learner(job, loaded, bank, accelerator, latents)
    if job.kept.note:
        yield Event("warning", job.kept.note)
    yield Event("note", adapted(bank, settled.name, loaded))
    course = new_course(job, loaded, bank, learner, accelerator, stop)
    yield from take_up(course)
    yield from course.events()
    if course.stopped:
        return
    best = course.progress.best()
    if best and settled.validation.pack == "best" and best[0] != course.progress.step:
        state.restore(job.out, [learner], course.progress.step, best[0])
        yield Event("note", f"the pack holds the weights of step {best[0]}, whose validation loss is lowest", step=best[0])
    with learner.averaged():
        files, lost = file.written(bank, settled.name, loaded, settled.pack.layouts, precision.DTYPES[settled.pack.dtype])
    if lost > LOST:
        yield Event("warning", f"{lost:.2%} of the pack's numbers are too small for {settled.pack.dtype} and became 0; see pack.dtype")
    step = course.progress.step
    del loaded, bank, learner, course  # the base is loaded again in the precision of pictures: make room
    accelerator.free_memory()
    yield from _finish(job, files, latents, step, stop)


def new_course(job: Job, loaded: Family, bank: Bank, learner: Learner, accelerator: Accelerator, stop: Stop) -> Course:
    """All that training needs, at its beginning."""
    settled, items = job.settled, job.dataset.account.used
    goal = Goal(lookup.find("objectives", noising(settled).kind).noise, noising(settled))
    at_once = given(settled.train.batch_size)
    setup = Setup(loaded, bank, [learner], goal, settled.train, accelerator, at_once)
    said = [captions.final(items[i], settled, 0) for i in job.dataset.held]
    tokens = loaded.tokens([*said, ""])
    data = learner.data
    held = [HeldOut(data.latents[i][0][0], tokens[n], data.frames[i][0], items[i].look.digest) for n, i in enumerate(job.dataset.held)]
    names = [job.dataset.account.name(item.path) for item in items]
    return Course(setup, settled, job.out, names, held, state.Progress(at_once=at_once, dataset=job.dataset.digest), stop)


def take_up(course: Course) -> Iterator[Event]:
    """Go on from the newest sound checkpoint, if there is one."""
    train = course.settled.train
    found = state.restore(course.out, course.setup.learners, given(train.steps))
    for path in found.damaged:
        yield Event("warning", f"{path.name.removeprefix('bad-')} is damaged: it is called {path.name} now, and passed over")
    if not found.progress.step:
        return
    if found.progress.dataset not in ("", course.progress.dataset):
        yield Event("warning", "pictures, captions or how they are shown are others than before; what is learnt from here on is of these")
        for learner in course.setup.learners:
            learner.quarantine.clear()  # it names pictures by their place
        found.progress.dataset = course.progress.dataset
    at_once = min(found.progress.at_once or given(train.batch_size), given(train.batch_size))
    course.progress, course.setup.at_once = found.progress, at_once
    course.progress.at_once = at_once
    yield Event("note", f"going on from step {found.progress.step}", step=found.progress.step)
    for note in found.notes:
        yield Event("warning", note)


def _finish(job: Job, files: dict[str, dict[str, Tensor]], latents: Latents, step: int, stop: Stop) -> Iterator[Event]:
    """Look at what was learnt with the very weights of the pack, then write the pack."""
    settled = job.settled
    studio = Studio.open(job.base)
    name = studio.add(file.Pack(settled.name, next(iter(files.values())), {"sdlora.adapter": settled.adapter.model_dump()["kind"]}))
    thumbnail, data = None, {}
    if settled.preview.scales:
        rows, scales = preview.strip(studio, settled, name), settled.preview.scales
        thumbnail = rows[0][1 + min(range(len(scales)), key=lambda i: abs(scales[i] - 1))]
        texts = {"sdlora": json.dumps(metadata.public(settled, job.base.name))}
        sheet = pictures.encode(preview.sheet(rows, settled, job.base.name), texts)
        yield from patiently(lambda: safeio.write(job.out / "strip.png", sheet), stop)
        data = preview.likeness(studio, settled, name, job.dataset, latents)
        yield Event("note", preview.learnt(data), data=data)
    facts = metadata.Facts(len(set(job.dataset.pool)), step, job.began, time.time(), job.dataset.buckets, thumbnail)
    path = job.out / f"{settled.name}.safetensors"
    describe = partial(metadata.describe, settled, studio.family, facts)
    for layout, tensors in files.items():
        place = path if layout == settled.pack.layouts[0] else path.with_name(f"{settled.name}.{layout}.safetensors")
        yield from patiently(partial(file.save, place, tensors, describe), stop)
    yield Event("done", str(path), step=step, data={"seconds": round(time.time() - job.began, 1), **data})
