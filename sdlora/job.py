"""One run from a folder of pictures to a finished pack: everything around the loop, told as events."""

import importlib.metadata
import itertools
import json
import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from sdlora import devices, family, lock, lookup, pictures, preview, safeio, settings, state
from sdlora.adapter import Bank, choose_sites
from sdlora.config import Run, flat, parse, to_toml
from sdlora.course import Course
from sdlora.data import cache, captions, ledger, masks
from sdlora.data.batches import Prepared
from sdlora.data.ledger import Dataset
from sdlora.errors import UserError
from sdlora.events import Event, Log, patiently
from sdlora.family import Base, Family
from sdlora.optim import adamw
from sdlora.packs import file, metadata
from sdlora.randomness import stream
from sdlora.stop import Stop
from sdlora.studio import Studio
from sdlora.train import Goal, Learner, Setup
from sdlora.validation import HeldOut

T = TypeVar("T")
Latents = Sequence[tuple[Tensor, Tensor]]
"""Mean and standard deviation (C, h, w) of each picture's."""
RECORDED = ("sdlora", "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")


@dataclass(frozen=True)
class Job:
    """A run whose input is known to be good: nothing has been written yet."""

    settled: Run
    base: Base
    out: Path
    began: float  # seconds since 1970
    dataset: Dataset
    names: list[str]  # of the layers that are adapted


def run(settled: Run, base: Base, out: Path, stop: Stop | None = None) -> Iterator[Event]:
    """Train a resolved run into a folder, going on from its last checkpoint if it has one. Every event is also in its log."""
    began = time.time()
    accelerator, dtype = devices.for_training(given(settled.train.precision))
    check_folder(settled, out)
    with lock.held(out) as unlocked:
        notes = check_folder(settled, out)
        found = ledger.read_dataset(settled, out / "cache")
        loaded = family.load(base, accelerator.device, dtype)
        job = Job(settled, base, out, began, ledger.fit_dataset(found, settled, loaded), sites(settled, loaded))
        prepare_folder(settled, out, accelerator.device)
        log = Log(out / "events.jsonl")
        try:
            for event in _train(job, loaded, accelerator, [*notes, *[unlocked] * bool(unlocked)], stop or Stop()):
                log.add(event)
                yield event
        except UserError as error:
            log.add(Event("failed", str(error)))
            raise


def check_folder(settled: Run, out: Path) -> list[str]:
    """Whether the run may have this folder; what differs from the settings of the run that lies in it, a line each."""
    path = out / "config.toml"
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
    fixed = [key for key in changed if key.partition(".")[0] in ("base", "adapter", "name", "kind", "seed")]
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


def _train(job: Job, loaded: Family, accelerator: Accelerator, notes: list[str], stop: Stop) -> Iterator[Event]:
    settled, dataset = job.settled, job.dataset
    for note in [*notes, dataset.account.line()]:
        yield Event("note", note)
    found = ledger.findings(dataset, settled, loaded)
    safeio.write(job.out / "ledger.json", json.dumps(ledger.ledger(dataset, settled, loaded, found), indent=1))
    for finding in (one for one in found if one.severity == "warn"):
        yield Event("warning", ledger.said(finding))
    wanted = (dataset.account.used, dataset.sizes, settled.data.ground, loaded, job.out / "cache")
    latents = cache.latents(*wanted)
    flipped = cache.latents(*wanted, flip=True) if settled.data.flip else []
    bank = Bank(loaded.components)
    learner = new_learner(job, loaded, bank, accelerator, latents, flipped)
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
        tensors = file.tensors_of(bank, settled.name, loaded)
    step = course.progress.step
    del loaded, bank, learner, course  # the base is loaded again in the precision of pictures: make room
    accelerator.free_memory()
    yield from _finish(job, tensors, latents, step, stop)


def new_course(job: Job, loaded: Family, bank: Bank, learner: Learner, accelerator: Accelerator, stop: Stop) -> Course:
    """All that training needs, at its beginning."""
    settled, items = job.settled, job.dataset.account.used
    goal = Goal(lookup.find("objectives", settled.objective.model_dump()["kind"]).noise, settled.objective)
    at_once = given(settled.train.batch_size)
    setup = Setup(loaded, bank, [learner], goal, settled.train, accelerator, at_once)
    said = [captions.final(items[i], settled, 0) for i in job.dataset.held]
    tokens = loaded.tokens([*said, ""])
    held = [HeldOut(learner.data.latents[i][0], tokens[n], items[i].look.digest) for n, i in enumerate(job.dataset.held)]
    names = [job.dataset.account.name(item.path) for item in items]
    return Course(setup, settled, job.out, names, held, state.Progress(at_once=at_once), stop)


def take_up(course: Course) -> Iterator[Event]:
    """Go on from the newest sound checkpoint, if there is one."""
    train = course.settled.train
    found = state.restore(course.out, course.setup.learners, given(train.steps))
    for path in found.damaged:
        yield Event("warning", f"{path.name.removeprefix('bad-')} is damaged: it is called {path.name} now, and passed over")
    if not found.progress.step:
        return
    at_once = min(found.progress.at_once or given(train.batch_size), given(train.batch_size))
    course.progress, course.setup.at_once = found.progress, at_once
    course.progress.at_once = at_once
    yield Event("note", f"going on from step {found.progress.step}", step=found.progress.step)
    for note in found.notes:
        yield Event("warning", note)


def sites(settled: Run, loaded: Family) -> list[str]:
    """Names of the layers that the run adapts."""
    kind = lookup.find("adapters", settled.adapter.model_dump()["kind"])
    fitting = {name: layer for name, layer in loaded.layers().items() if kind.fits(layer)}
    names = choose_sites(fitting, settled.adapter.model_dump()["targets"], loaded.presets)
    if settled.train.text_encoder_lr == 0:  # an adapter that never moves need not be there
        return [name for name in names if not name.startswith("text_encoder")]
    return names


def new_learner(job: Job, loaded: Family, bank: Bank, accelerator: Accelerator, latents: Latents, flipped: Latents = ()) -> Learner:
    """Put a fresh adapter on the bank, with its data and optimizer."""
    settled, train = job.settled, job.settled.train
    kind = lookup.find("adapters", settled.adapter.model_dump()["kind"])
    bank.add(settled.name, kind, settled.adapter, job.names, lambda dotted: stream(settled.seed, f"init/{dotted}"))
    data = prepared(job, loaded, latents, flipped)
    groups = [
        (bank.parameters(settled.name, "unet."), given(train.lr)),
        (bank.parameters(settled.name, "text_encoder."), given(train.text_encoder_lr)),
    ]
    params = bank.parameters(settled.name)
    ema = {dotted: parameter.detach().clone() for dotted, parameter in params.items()} if train.ema else {}
    return Learner(settled.name, data, params, accelerator.prepare(adamw(groups, train)), ema)


def prepared(job: Job, loaded: Family, latents: Latents, flipped: Latents = ()) -> Prepared:
    """The pictures and captions of a run as its training draws from them."""
    settled, items, numbers = job.settled, job.dataset.account.used, itertools.count()
    said, kept = [*itertools.chain.from_iterable(job.dataset.captions)], given(settled.data.prior_prompts)
    text = loaded.tokens([*said, *kept, ""])
    varying = captions.vary(items, settled.data)
    if not varying and not any(name.startswith("text_encoder") for name in job.names):
        with torch.no_grad():
            text = loaded.states(text)

    def final(picture: int, number: int) -> Tensor:
        return loaded.tokens([captions.final(items[picture], settled, number)])[0].cpu()

    return Prepared(
        settled.seed,
        latents,
        text.cpu(),
        given(settled.data.caption_dropout),
        pool=job.dataset.pool,
        rows=[[next(numbers) for _ in said] for said in job.dataset.captions],
        weights=loss_weights(job, loaded),
        prior=range(len(said), len(text)),
        prior_share=given(settled.data.prior_share),
        final=final if varying else None,
        flipped=flipped,
    )


def loss_weights(job: Job, loaded: Family) -> list[Tensor]:
    """Factors on each picture's squared error, from its own weight and its mask."""
    floor, whole = job.settled.data.mask_floor, torch.ones(1, 1, 1)
    pairs = zip(job.dataset.account.used, job.dataset.sizes, strict=True)
    return [item.weight * (masks.weights(item.mask, size, loaded.latent_factor, floor) if item.mask else whole) for item, size in pairs]


def given(value: T | None) -> T:
    """A setting that a resolved run always has."""
    assert value is not None
    return value


def adapted(bank: Bank, name: str, loaded: Family) -> str:
    """What is trained, in a sentence."""
    ours = sum(p.numel() for p in bank.parameters(name).values())
    whole = sum(p.numel() for module in loaded.components.values() for p in module.parameters()) - ours
    frozen = next(p for module in loaded.components.values() for p in module.parameters() if not p.requires_grad)
    where = f"on {loaded.device.type} in {str(frozen.dtype).removeprefix('torch.')}"
    return f"{len(list(bank.deltas(name)))} layers adapted, {ours:,} parameters trained, {ours / whole:.2%} of {whole:,}, {where}"


def _finish(job: Job, tensors: dict[str, Tensor], latents: Latents, step: int, stop: Stop) -> Iterator[Event]:
    """Look at what was learnt with the very weights of the pack, then write the pack."""
    settled = job.settled
    studio = Studio.open(job.base)
    name = studio.add(file.Pack(settled.name, tensors, {"sdlora.adapter": settled.adapter.model_dump()["kind"]}))
    thumbnail, data = None, {}
    if settled.preview.scales:
        rows, scales = preview.strip(studio, settled, name), settled.preview.scales
        thumbnail = rows[0][1 + min(range(len(scales)), key=lambda i: abs(scales[i] - 1))]
        texts = {"sdlora": json.dumps(metadata.public(settled, job.base.name))}
        sheet = pictures.encode(preview.sheet(rows, settled, job.base.name), texts)
        yield from patiently(lambda: safeio.write(job.out / "strip.png", sheet), stop)
        data = preview.likeness(studio, settled, name, job.dataset, latents)
        yield Event("note", preview.learnt(data), data=data)
    facts = metadata.Facts(len(set(job.dataset.pool)), step, job.began, time.time(), Counter(job.dataset.sizes), thumbnail)
    path = job.out / f"{settled.name}.safetensors"
    describe = partial(metadata.describe, settled, studio.family, facts)
    yield from patiently(lambda: file.save(path, tensors, describe), stop)
    yield Event("done", str(path), step=step, data={"seconds": round(time.time() - job.began, 1), **data})
