"""One run from a folder of pictures to a finished pack, stage by stage: everything around the loop, told as events."""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from torch import Tensor

from sdlora import devices, estimate, export, eyes, lock, pictures, preview, priors, report, safeio, settings, state
from sdlora.config import Run, flat, parse, to_toml
from sdlora.course import Course
from sdlora.data import cache, captions, ledger
from sdlora.errors import UserError
from sdlora.events import Event, Log, patiently, warn_on_failure
from sdlora.family import Family
from sdlora.judge import Asking, Judge, material
from sdlora.learners import Job, Latents, adapted, adapted_line, given, new_learner
from sdlora.packs import file, metadata, precision, privacy, words
from sdlora.stop import Stop
from sdlora.studio import Studio
from sdlora.trackers import Trackers
from sdlora.train import Setup
from sdlora.validation import HeldOut

FIXED = ("base", "vae", "text", "adapter", "name", "kind", "seed")
"""What of a run's settings no resumed run may change."""
REPORTED = ("preview", "stopped", "done")
"""Events after which the report is written anew."""
LOST = 1e-3
"""Share of numbers that may become zero in a pack unsaid: a few of a uniform start always do."""
ENVIRONMENT = "environment.json"
RECORDED = ("sdlora", "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")


@dataclass
class Member:
    """One run of a cast: what it works with, how it is asked to stop, who is told. A run by itself is a cast of one."""

    job: Job
    stop: Stop
    trackers: Trackers
    log: Log
    latents: Latents = ()
    course: Course | None = None  # while it trains
    step: int = 0  # that its training ended with
    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # tensors of its pack, then, by layout
    facts: metadata.Facts | None = None  # what the pack's header says of the run, then
    figures: dict[str, Any] = field(default_factory=dict)  # that its last event says
    pace: list[tuple[int, float]] = field(default_factory=list)  # (step, seconds) at which the device was waited for
    error: UserError | None = None  # what ended it before its time

    def follow(self, events: Iterable[Event]) -> Iterator[Event]:
        """Events, each in the log too. What breaks ends this member alone: its last event is `failed`, and `error` holds the cause."""
        try:
            for event in events:
                yield from self._tell(event)
        except UserError as error:
            self.error = error.with_traceback(None)  # which holds this member
            if self.course:
                self.course.learner.left = True
            yield from self._tell(Event("failed", str(error)))

    def _tell(self, event: Event) -> Iterator[Event]:
        """An event for the log, the trackers and whoever iterates; before it a warning for each of those that cannot be told."""
        told = event
        if self.course and event.kind == "step" and event.step % self.job.settled.train.log_every == 0:
            # only these are told when they are done
            self.pace.append((event.step, time.monotonic()))
            used = devices.used_bytes(self.course.setup.family.device)
            told = dataclasses.replace(event, data={**event.data, "memory_bytes": used})
        warnings = [Event("warning", problem, step=event.step) for problem in self.trackers.tell(dataclasses.asdict(told))]
        warnings += self._report(event.step) if event.kind in REPORTED else []
        for warning in warnings:
            self.log.add(warning)
            yield warning
        self.log.add(told)
        if event.kind in REPORTED:  # once more, now that the log holds the event
            self._report(event.step)
        yield event

    def _report(self, step: int) -> list[Event]:
        """Write `report.html`; it can be had again of the run folder at any time, and so ends no run."""

        def written() -> Iterator[Event]:
            report.write(self.job.out)
            yield from ()

        return [*warn_on_failure(written(), "no report is written", step)]


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


def weights_before(out: Path) -> str:
    """How the base's weights were held when the run in this folder was last trained; "" if it has no checkpoint."""
    if not state.steps(out):
        return ""
    with contextlib.suppress(OSError, ValueError):
        return str(json.loads((out / ENVIRONMENT).read_text(encoding="utf-8")).get("base_weights", "full"))
    return ""


def prepare_folder(settled: Run, out: Path, device: torch.device, weights: str) -> None:
    """Make the run folder, or take up the one that is there."""
    safeio.write(out / "config.toml", to_toml(settled))
    versions = {name: importlib.metadata.version(name) for name in RECORDED}
    system = {"python": platform.python_version(), "system": platform.platform(), **versions, **state.machine(device)}
    safeio.write(out / ENVIRONMENT, json.dumps({**system, "base_weights": weights}, indent=1))
    for folder in (out, out / "checkpoints", out / "cache", out / "previews"):
        safeio.sweep(folder)


def prepare(member: Member, loaded: Family) -> Iterator[Event]:
    """Settle the pictures and write what becomes of each; no adapter may be on the base."""
    job, settled = member.job, member.job.settled
    if settled.data.prior_pictures:
        yield Event("note", f"the base draws {settled.data.prior_pictures} regularisation pictures, unless they are in the run's cache")
        with job.kept.processes.in_turn():
            job = dataclasses.replace(job, dataset=priors.with_drawn(job.dataset, settled, loaded, job.out / "cache", job.kept))
        member.job = job
    job.kept.processes.alike({"pictures and captions": job.dataset.digest})
    if job.kept.processes.leads:
        yield from account(job, loaded)
    member.latents = cache.latents(job.dataset.account.used, job.dataset.variants, settled.data.ground, loaded, job.kept)


def account(job: Job, loaded: Family) -> Iterator[Event]:
    """Write what becomes of each picture."""
    settled, dataset = job.settled, job.dataset
    yield Event("note", dataset.account.line())
    found = ledger.findings(dataset, settled, loaded)
    table = ledger.ledger(dataset, settled, loaded, found)
    table["totals"] |= {"memory_bytes": job.memory, "seconds": estimate.seconds(settled, loaded, job.kept)}
    safeio.write(job.out / "ledger.json", json.dumps(table, indent=1))
    for told in ledger.warnings(found):
        yield Event("warning", told)


def start(member: Member, setup: Setup, accelerator: Accelerator) -> Iterator[Event]:
    """Put the run's adapter on the base, beside the others, as its last checkpoint has it."""
    job = member.job
    setup.learners.append(new_learner(job, setup.family, setup.bank, accelerator, member.latents))
    member.course = new_course(job, setup, member.stop)  # first: who breaks from here on takes no step
    export.foresee(job.settled, setup.family, file.exact_tensors(setup.bank, job.settled.name, setup.family), job.dataset)
    if job.kept.note:
        yield Event("warning", job.kept.note)
    sentence, parts = adapted(setup.bank, job.settled, setup.family)
    yield Event("note", sentence)
    yield from (Event("note", adapted_line(part), data={"adapted": part}) for part in parts)
    yield from take_up(member.course)


def new_course(job: Job, setup: Setup, stop: Stop) -> Course:
    """The newest learner's course, at its beginning."""
    settled, items, slot = job.settled, job.dataset.account.used, len(setup.learners) - 1
    said = [captions.final(items[i], settled, 0) for i in job.dataset.held]
    tokens = setup.family.tokens([*said, ""])
    data = setup.learners[slot].data
    held = [HeldOut(data.latents[i][0][0], tokens[n], data.frames[i][0], items[i].look.digest) for n, i in enumerate(job.dataset.held)]
    names = [job.dataset.account.name(item.path) for item in items]
    progress = state.Progress(at_once=setup.at_once, recomputed=setup.recomputed, dataset=job.dataset.digest, by=settled.validation.by)
    asking = partial(judging, settled, job.dataset) if settled.validation.judge else None
    return Course(setup, slot, settled, job.out, names, held, progress, stop, asking=asking)


def judging(settled: Run, dataset: ledger.Dataset, studio: Studio) -> Judge:
    """Who judges a run's pictures while it trains and at its end, on few prompts at one seed."""
    asking = Asking(prompts=settled.validation.judge, seeds=1, steps=settled.preview.steps)
    return Judge(studio, *material(settled, dataset, asking), eyes.opened("auto", studio.family))


def take_up(course: Course) -> Iterator[Event]:
    """Go on from the newest sound checkpoint, if there is one."""
    learner, setup = course.learner, course.setup
    found = state.restore(course.out, [learner], given(course.settled.train.steps))
    for path in found.damaged:
        yield Event("warning", f"{path.name.removeprefix('bad-')} is damaged: it is called {path.name} now, and passed over")
    if not found.progress.step:
        return
    if found.progress.dataset not in ("", course.progress.dataset):
        yield Event("warning", "pictures, captions or how they are shown are others than before; what is learnt from here on is of these")
        learner.quarantine.clear()  # it names pictures by their place
        found.progress.dataset = course.progress.dataset
    setup.at_once = min((one for one in (setup.at_once, found.progress.at_once) if one), default=0)
    if found.progress.recomputed and setup.spare:
        setup.recompute()
    adopt(course, found.progress)
    yield Event("note", f"going on from step {found.progress.step}", step=found.progress.step)
    for note in found.notes:
        yield Event("warning", note)


def adopt(course: Course, progress: state.Progress) -> None:
    """Count on from a checkpoint, by the measures that are taken now."""
    progress.by, progress.at_once, progress.recomputed = course.progress.by, course.setup.at_once, course.setup.recomputed
    course.progress, course.learner.step = progress, progress.step


def take_off(member: Member) -> Iterator[Event]:
    """End the training with the pack."""
    course, settled = given(member.course), member.job.settled
    best, setup, learner = course.progress.best(), course.setup, course.learner
    if best and settled.validation.pack == "best" and best[0] != course.progress.step:
        state.restore(course.out, [learner], course.progress.step, best[0])
        told = "validation loss" if course.progress.by == "loss" else "score"
        yield Event("note", f"the pack holds the weights of step {best[0]}, whose {told} is best", step=best[0])
    with learner.averaged():
        dtype = precision.DTYPES[settled.pack.dtype]
        member.files, lost = file.written(setup.bank, settled.name, setup.family, settled.pack.layouts, dtype)
    if lost > LOST:
        yield Event("warning", f"{lost:.2%} of the pack's numbers are too small for {settled.pack.dtype} and became 0; see pack.dtype")
    member.step = course.progress.step
    member.facts = known(member)
    yield from save_packs(member, setup.family)


def known(member: Member) -> metadata.Facts:
    """What the header of the pack says of the run."""
    job, shown = member.job, set(member.job.dataset.pool)
    drawn = sum(job.dataset.account.used[i].regularisation for i in shown)
    hidden = privacy.secrets(job.dataset, job.settled)
    return metadata.Facts(len(shown), member.step, job.began, time.time(), job.dataset.buckets, hidden=hidden, regularisation=drawn)


def save_packs(member: Member, loaded: Family) -> Iterator[Event]:
    """Write the pack in each of its layouts, with all in its header that is known by now; a pack that lies there gives way to it whole."""
    job, settled, facts = member.job, member.job.settled, given(member.facts)
    inversion = words.inversion(next(iter(member.files.values())), loaded)
    inside = words.bundled(inversion, settled.trigger) if settled.pack.embeddings_inside else {}
    for layout, own in member.files.items():
        tensors = own | inside
        name = settled.name if layout == settled.pack.layouts[0] else f"{settled.name}.{layout}"
        describe, told = export.describing(settled, loaded, tensors, facts)
        yield from told
        yield from patiently(partial(file.save, job.out / f"{name}.safetensors", tensors, describe), member.stop)
    if inversion:
        beside = job.out / f"{settled.name}{words.BESIDE}"
        yield from patiently(lambda: safeio.write(beside, safetensors.torch.save(inversion)), member.stop)
        yield Event("note", f"the embeddings of the trigger, for other programs: {beside}")


def finish(member: Member, open_studio: Callable[[], Studio]) -> Iterator[Event]:
    """Look at what was learnt, and say in the pack's header what was seen. The pack lies on the disk: what breaks here is a warning."""
    job, before = member.job, member.facts
    optional = partial(warn_on_failure, step=member.step)
    has_words = bool(words.apart(next(iter(member.files.values())))[1])
    if job.settled.preview.scales or job.settled.validation.judge or has_words:
        yield from optional(look(member, open_studio), "the pack is written, and no picture of it is drawn")
    if member.facts is not before or has_words:  # embeddings are exact in the precision of pictures alone
        saved = (event for event in save_packs(member, open_studio().family) if event.kind == "paused")  # what else it says was said
        yield from optional(saved, "the pack is written, without what its pictures would add to its header")
    seconds = round(time.time() - job.began, 1)
    yield Event("done", str(job.out / f"{job.settled.name}.safetensors"), member.step, data={"seconds": seconds, **member.figures})


def look(member: Member, open_studio: Callable[[], Studio]) -> Iterator[Event]:
    """Draw and judge pictures with the very weights of the pack."""
    settled, studio = member.job.settled, open_studio()
    optional = partial(warn_on_failure, step=member.step)
    name = studio.add(file.Pack(settled.name, next(iter(member.files.values())), {"sdlora.adapter": settled.adapter.model_dump()["kind"]}))
    try:
        if settled.preview.scales:
            yield from optional(draw_scales(member, studio, name), "no strip of scales is drawn")
            yield from optional(measure_likeness(member, studio, name), "what was learnt is not measured")
        if settled.validation.judge:
            yield from optional(judge_pack(member, studio, name), "the pack is not judged")
    finally:
        studio.remove(name)


def draw_scales(member: Member, studio: Studio, name: str) -> Iterator[Event]:
    """The strip of scales, and of it the pack's thumbnail."""
    job, settled = member.job, member.job.settled
    rows, scales = preview.strip(studio, settled, name), settled.preview.scales
    nearest = min(range(len(scales)), key=lambda i: abs(scales[i] - 1))
    member.facts = dataclasses.replace(given(member.facts), thumbnail=rows[0][1 + nearest])
    texts = {"sdlora": json.dumps(metadata.public(settled, job.base.name))}
    sheet = pictures.encode(preview.sheet(rows, settled, job.base.name), texts)
    yield from patiently(lambda: safeio.write(job.out / "strip.png", sheet), member.stop)


def measure_likeness(member: Member, studio: Studio, name: str) -> Iterator[Event]:
    """How near pictures come to those trained on."""
    member.figures = preview.likeness(studio, member.job.settled, name, member.job.dataset, member.latents)
    yield Event("note", preview.learnt(member.figures), data=member.figures)


def judge_pack(member: Member, studio: Studio, name: str) -> Iterator[Event]:
    """Which scale is best."""
    judge = judging(member.job.settled, member.job.dataset, studio)
    judge.ask(name, member.step)
    verdict = judge.verdict()
    if verdict.best is not judge.rows[0]:
        member.facts = dataclasses.replace(given(member.facts), scale=verdict.best.scale)
    table = json.dumps(verdict.table(), indent=1)
    yield from patiently(lambda: safeio.write(member.job.out / "score.json", table), member.stop)
    yield Event("note", f"judged: {verdict.words}", data={"score": verdict.table()})
