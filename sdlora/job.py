"""One run from a folder of pictures to a finished pack: everything around the loop, told as events."""

import dataclasses
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from sdlora import devices, estimate, family, lookup, pictures, safeio, score, settings, state
from sdlora.adapter import Bank, choose_sites
from sdlora.config import Run, flat, parse, to_toml
from sdlora.data import cache, captions, ledger, masks, store
from sdlora.data.batches import Prepared
from sdlora.data.ledger import Dataset
from sdlora.data.store import Store
from sdlora.errors import NUMBERS, UserError
from sdlora.family import Base, Family
from sdlora.generate import Recipe
from sdlora.optim import adamw
from sdlora.packs import file, metadata
from sdlora.randomness import stream
from sdlora.studio import Studio
from sdlora.train import Goal, Learner, Trained, steps

T = TypeVar("T")
Latents = Sequence[tuple[Tensor, Tensor]]
"""Mean and standard deviation (C, h, w) of each picture's."""


@dataclass(frozen=True)
class Event:
    """What a run tells whoever iterates over it; also a line of `events.jsonl`."""

    kind: Literal["note", "warning", "step", "checkpoint", "done"]
    text: str = ""
    step: int = 0
    loss: float | None = None
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A run whose input is known to be good: nothing has been written yet."""

    settled: Run
    base: Base
    out: Path
    began: float  # seconds since 1970
    dataset: Dataset
    names: list[str]  # of the layers that are adapted
    kept: Store = field(default_factory=Store)  # what earlier runs computed


def run(settled: Run, base: Base, out: Path) -> Iterator[Event]:
    """Train a resolved run into a folder, going on from its last checkpoint if it has one. Every event is also in its log."""
    began = time.time()
    accelerator, dtype = devices.for_training(given(settled.train.precision))
    differs = check_folder(settled, out)
    kept = store.usual(out / "cache")
    found = ledger.read_dataset(settled, out / "cache", kept)
    loaded = family.load(base, accelerator.device, dtype)
    job = Job(settled, base, out, began, ledger.fit_dataset(found, settled, loaded), sites(settled, loaded), kept)
    prepare_folder(settled, out)
    timing, pace = estimate.pace_name(settled, loaded), list[tuple[int, float]]()
    events = _train(job, loaded, accelerator, differs)
    del loaded  # the events make room once it is trained
    for event in events:
        record = {"time": round(time.time(), 3)} | {k: v for k, v in dataclasses.asdict(event).items() if v not in ("", None, {})}
        safeio.append_line(out / "events.jsonl", json.dumps(record))
        if event.kind == "step" and event.step % settled.train.log_every == 0:  # the others are told later than they were done
            pace.append((event.step, time.monotonic()))
        yield event
    estimate.keep_pace(timing, kept, pace)


def check_folder(settled: Run, out: Path) -> list[str]:
    """Whether the run may have this folder; what differs from the settings of the run that lies in it, a line each."""
    path = out / "config.toml"
    if out.exists() and not out.is_dir():
        raise UserError("E-RUN-01", "this is a file; a run needs a folder of its own", out, "name a folder with --out")
    if not path.is_file():
        if out.is_dir() and any(other.name != "cache" for other in out.iterdir()):  # a ZIP is unpacked there before the run begins
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


def prepare_folder(settled: Run, out: Path) -> None:
    """Make the run folder, or take up the one that is there."""
    safeio.write(out / "config.toml", to_toml(settled))
    safeio.sweep(out)
    safeio.sweep(out / "checkpoints")
    safeio.sweep(out / "cache")


def _train(job: Job, loaded: Family, accelerator: Accelerator, notes: list[str]) -> Iterator[Event]:
    settled, dataset = job.settled, job.dataset
    for note in [*notes, dataset.account.line()]:
        yield Event("note", note)
    found = ledger.findings(dataset, settled, loaded)
    table = ledger.ledger(dataset, settled, loaded, found)
    table["totals"] |= estimate.totals(settled, loaded, job.names, dataset.sizes, job.kept)
    safeio.write(job.out / "ledger.json", json.dumps(table, indent=1))
    for finding in (one for one in found if one.severity == "warn"):
        yield Event("warning", ledger.said(finding))
    wanted = (dataset.account.used, dataset.sizes, settled.data.ground, loaded, job.kept)
    latents = cache.latents(*wanted)
    flipped = cache.latents(*wanted, flip=True) if settled.data.flip else []
    bank = Bank(loaded.components)
    learner = new_learner(job, loaded, bank, accelerator, latents, flipped)
    if job.kept.note:
        yield Event("warning", job.kept.note)
    yield Event("note", adapted(bank, settled.name, loaded))
    first, damaged = state.restore(job.out, [learner])
    for path in damaged:
        yield Event("warning", f"{path.name} is damaged and was passed over")
    if first:
        yield Event("note", f"going on from step {first}", step=first)
    yield from _loop(job, loaded, bank, learner, accelerator, first)
    tensors = file.tensors_of(bank, settled.name, loaded)
    del loaded, bank, learner  # the base is loaded again in the precision of pictures: make room
    accelerator.free_memory()
    yield from _finish(job, tensors, latents)


def _loop(job: Job, loaded: Family, bank: Bank, learner: Learner, accelerator: Accelerator, first: int) -> Iterator[Event]:
    settled, train = job.settled, job.settled.train
    assert train.save_every is not None
    goal = Goal(lookup.find("objectives", settled.objective.model_dump()["kind"]).noise, settled.objective)
    unread: list[Trained] = []
    for trained in steps(loaded, bank, [learner], goal, train, accelerator, first):
        unread.append(trained)
        last, save = trained.step == train.steps, trained.step % train.save_every == 0
        if last or save or trained.step % train.log_every == 0:
            yield from _read(unread)
            unread.clear()
        if last or save:
            path = state.save(job.out, trained.step, [learner], train.keep_checkpoints)
            yield Event("checkpoint", path.name, step=trained.step)


def _read(trained: list[Trained]) -> Iterator[Event]:
    """Wait for the device and tell the losses of some steps. Raises `UserError` where one was not finite; no such step moved a weight."""
    losses = torch.stack([one.loss.sum() for one in trained]).tolist()
    finite = torch.stack([one.finite.all() for one in trained]).tolist()
    for one, loss, sound in zip(trained, losses, finite, strict=True):
        if not sound:
            what = f"loss or gradient at step {one.step} is not finite; the weights did not move"
            raise UserError("E-NUM-01", what, f"step {one.step}", "lower train.lr or set train.precision=fp32, and resume", NUMBERS)
        yield Event("step", step=one.step, loss=loss)


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
    return Learner(settled.name, data, bank.parameters(settled.name), accelerator.prepare(adamw(groups, train)))


def prepared(job: Job, loaded: Family, latents: Latents, flipped: Latents = ()) -> Prepared:
    """The pictures and captions of a run as its training draws from them."""
    settled, items, numbers = job.settled, job.dataset.account.used, itertools.count()
    said, kept = [*itertools.chain.from_iterable(job.dataset.captions)], given(settled.data.prior_prompts)
    text = loaded.tokens([*said, *kept, ""])
    varying = captions.vary(items, settled.data)
    if not varying and not any(name.startswith("text_encoder") for name in job.names):
        text = cache.states(text, loaded, job.kept)

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


def _finish(job: Job, tensors: dict[str, Tensor], latents: Latents) -> Iterator[Event]:
    """Look at what was learnt with the very weights of the pack, then write the pack."""
    settled, look = job.settled, job.settled.preview
    studio = Studio.open(job.base)
    name = studio.add(file.Pack(settled.name, tensors, {"sdlora.adapter": settled.adapter.model_dump()["kind"]}))
    thumbnail, data = None, {}
    if look.scales:
        rows = studio.strips([preview_recipe(studio, settled, prompt, name, 1.0) for prompt in look.prompts], [name], look.scales)
        thumbnail = rows[0][1 + min(range(len(look.scales)), key=lambda i: abs(look.scales[i] - 1))]
        columns = ["base", *(f"scale {scale:g}" for scale in look.scales)]
        sheet = pictures.sheet(rows, look.prompts, columns, f"{settled.name} on {job.base.name}, seed {look.seed}")
        safeio.write(job.out / "strip.png", pictures.encode(sheet, {"sdlora": json.dumps(metadata.public(settled, job.base.name))}))
        data = likeness(studio, settled, name, job.dataset, latents)
        yield Event("note", learnt(data), data=data)
    facts = metadata.Facts(
        len(job.dataset.sizes), given(settled.train.steps), job.began, time.time(), Counter(job.dataset.sizes), thumbnail
    )
    path = job.out / f"{settled.name}.safetensors"
    file.save(path, tensors, lambda sha256: metadata.describe(settled, studio.family, facts, sha256))
    yield Event("done", str(path), step=given(settled.train.steps), data={"seconds": round(time.time() - job.began, 1), **data})


def preview_recipe(studio: Studio, settled: Run, prompt: str, name: str, scale: float) -> Recipe:
    """The recipe of one preview."""
    side, step = settled.data.resolution_px or 0, studio.family.step_px
    size = f"{side // step * step}x{side // step * step}"
    look = settled.preview
    return studio.recipe(prompt, size, look.guidance, seed=look.seed, steps=look.steps, scales=((name, scale),))


def likeness(studio: Studio, settled: Run, name: str, dataset: Dataset, latents: Latents, most: int = 8) -> dict[str, Any]:
    """Distance from pictures generated of training captions to the training pictures, at scale 0 and 1, over the commonest size."""
    items = dataset.account.used
    shown = [i for i, item in enumerate(items) if not item.regularisation]
    size = Counter(dataset.sizes[i] for i in shown).most_common(1)[0][0]
    chosen = [i for i in shown if dataset.sizes[i] == size][:most]
    said = [captions.final(items[i], settled, 0) for i in chosen]
    true = torch.stack([latents[i][0].flatten() for i in chosen])
    apart = []
    for scale in (0.0, 1.0):
        recipes = [preview_recipe(studio, settled, prompt, name, scale).at(width=size[0], height=size[1]) for prompt in said]
        seen = score.embed(studio.family, studio.pixels(recipes, batch=4)).cpu()
        apart.append(float(score.distance(seen, true).mean()))
    return {"pictures": len(chosen), "distance_base": round(apart[0], 2), "distance_adapter": round(apart[1], 2)}


def learnt(data: dict[str, Any]) -> str:
    base, adapter = data["distance_base"], data["distance_adapter"]
    return (
        f"learnt: asked for {data['pictures']} of your captions, pictures come out at {adapter / base:.2f} times the base's distance "
        f"from your pictures ({base} at scale 0, {adapter} at scale 1; L2 of the autoencoder's means)"
    )
