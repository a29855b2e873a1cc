"""What the command line and the web page call; also the Python interface.

for event in api.train(api.settle({"data": {"folder": "my-pictures"}, "name": "mira"}), Path("runs/mira")):
    print(event)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from PIL import Image

from sdlora import (
    average,
    best,
    cast,
    config,
    devices,
    estimate,
    family,
    learners,
    lookup,
    pictures,
    plan,
    priors,
    queue,
    safeio,
    settings,
    sharing,
)
from sdlora import sweep as sweeping
from sdlora.cast import text as cast_text
from sdlora.config import Run, Setting
from sdlora.config import to_toml as settings_text
from sdlora.data import doctor, edits, ledger, page, pixels, reasons, store
from sdlora.data.captioning import Captioning
from sdlora.data.captioning import caption as caption_folder
from sdlora.data.captioning import put as put_captions
from sdlora.data.captioning import read as captions
from sdlora.data.captions import token_counter
from sdlora.data.edits import Edit
from sdlora.data.unzip import unzip as unpack
from sdlora.data.walk import shown
from sdlora.errors import UserError, check_path, escape_surrogates
from sdlora.events import Event
from sdlora.generate import Recipe
from sdlora.judge import Asking
from sdlora.judged import body as judged_body
from sdlora.judged import read as read_judged
from sdlora.judged import style as judged_style
from sdlora.kinds import Wanted as KindsWanted
from sdlora.kinds import find as find_kind
from sdlora.learnt import Learnt, learnt
from sdlora.making import bake_packs, compare_packs, extract_pack, merge_packs, pack_spectrum, resize_pack
from sdlora.packs import bundle
from sdlora.packs.card import about as about_pack
from sdlora.packs.card import rows as about_rows
from sdlora.packs.pipelines import Applied, Pack
from sdlora.packs.readers import Reading
from sdlora.packs.workshop import Budget
from sdlora.processes import leads
from sdlora.queue import SCORE, Entry, take_out
from sdlora.queue import entries as queued
from sdlora.queue import start as start_queue
from sdlora.record import Record, events, runs
from sdlora.report import curves
from sdlora.safeio import remove, rename, scratch_folder
from sdlora.safeio import write as save_bytes
from sdlora.search import find_dimension, find_rate
from sdlora.settings import override
from sdlora.settling import read_settings, settle
from sdlora.sharing import Push
from sdlora.sharing import changes as header_changes
from sdlora.sharing import check as check_pack
from sdlora.sharing import convert as convert_pack
from sdlora.sharing import edit as edit_pack
from sdlora.sharing import opened as open_pack
from sdlora.sharing import push as push_pack
from sdlora.sharing import take as take_pack
from sdlora.stop import Stop, ask
from sdlora.studio import Studio, parse_pack, parse_scale

__all__ = [
    "SCORE",
    "Applied",
    "Asking",
    "Budget",
    "Captioning",
    "Edit",
    "Entry",
    "Event",
    "KindsWanted",
    "Learnt",
    "Pack",
    "Push",
    "Reading",
    "Recipe",
    "Record",
    "Run",
    "Setting",
    "Stop",
    "Studio",
    "UserError",
    "about_pack",
    "about_rows",
    "ask",
    "average_run",
    "bake_packs",
    "bundle_pack",
    "caption_folder",
    "captioners",
    "captions",
    "cast_tables",
    "cast_text",
    "check",
    "check_pack",
    "check_path",
    "compare_packs",
    "convert_pack",
    "curves",
    "described",
    "edit_captions",
    "edit_pack",
    "enqueue",
    "enqueue_judging",
    "escape_surrogates",
    "events",
    "extract_pack",
    "find_best",
    "find_dimension",
    "find_kind",
    "find_rate",
    "free_memory",
    "grid",
    "header_changes",
    "inspect_base",
    "is_cast",
    "judged_body",
    "judged_style",
    "keep_checkpoint",
    "leads",
    "learnt",
    "merge_packs",
    "open_pack",
    "open_studio",
    "override",
    "pack_spectrum",
    "parse_pack",
    "parse_scale",
    "push_pack",
    "put_captions",
    "queued",
    "read_judged",
    "read_picture",
    "read_settings",
    "remove",
    "rename",
    "resize_pack",
    "runs",
    "save_bytes",
    "save_picture",
    "save_sheet",
    "save_text",
    "scratch_folder",
    "settings_text",
    "settle",
    "settle_cast",
    "shown",
    "start_queue",
    "sweep",
    "sweep_results",
    "take_out",
    "take_pack",
    "token_counter",
    "train",
    "train_cast",
    "undo_captions",
    "unpack",
    "why",
]


def train(run: Run, out: Path, stop: Stop | None = None) -> Iterator[Event]:
    """Train a settled run into a folder, or go on with it. The pack is `out/NAME.safetensors` when `done` comes.

    A run is stopped by setting `stop.stop`, or by a file called `stop` in its folder: it saves, and `stopped` is its last event.
    """
    return cast.run(run, learners.base_of(run), out, stop)


def average_run(run: Path, out: Path, steps: Sequence[int] = (), last: int = 3) -> Pack:
    """Write the mean of a finished run's checkpoints as a pack."""
    average.save(out, average.average(run, steps, last))
    return open_pack(out)


def settle_cast(tables: Sequence[dict[str, Any]], source: object = "", assignments: Sequence[str] = ()) -> list[Run]:
    """The runs of a cast, from `cast_tables`, with `a.b=c` laid over each of them."""
    found = []
    for table in tables:
        for assignment in assignments:
            override(table, assignment)
        found.append(settle(table, f"{source} [[cast]] {table.get('name', '')}".strip()))
    return found


def cast_tables(place: Path) -> list[dict[str, Any]]:
    """The settings of a cast's members, one table each: from a TOML file with `[[cast]]`, or from a cast's folder."""
    return cast.kept(place) if place.is_dir() else cast.tables(settings.read(place), place)


def is_cast(place: Path) -> bool:
    """Whether this is a TOML file of a cast, or a folder in which one was trained."""
    return (place / cast.FILE).is_file() if place.is_dir() else place.is_file() and "cast" in settings.read(place)


def train_cast(runs: Sequence[Run], out: Path, stop: Stop | None = None) -> Iterator[Event]:
    """Train settled runs side by side over one base, or go on with them: each in the folder `out/NAME`, as if alone, so that it can be gone
    on with alone. Each event says its `member`; when all are through, the first error of any is raised.

    Stopped as by `train`: all of them by `stop` or a file in `out`, one by a file in its own folder.
    """
    cast.check(runs, out)
    for name, event in cast.train([(run, out / run.name) for run in runs], learners.base_of(runs[0]), stop, out):
        yield replace(event, member=name)


def sweep(table: dict[str, Any], over: Sequence[str], source: object = "") -> list[Run]:
    """The runs of a cast that differ in the settings of `over` alone, each `a.b=x,y`: one for each choice of values."""
    return settle_cast(sweeping.members(settle(table, source), over, table), source)


def sweep_results(runs: Sequence[Run], out: Path) -> list[dict[str, Any]]:
    """The figures of a sweep that `train_cast` trained into `out`, which gets its `curves.png` and `grid.png`."""
    save_sheet(out / "curves.png", lambda: sweeping.curves(runs, out))
    save_sheet(out / "grid.png", lambda: sweeping.grid(runs, out))
    return sweeping.results(runs, out)


def enqueue(root: Path, run: Run, out: Path) -> str:
    """Let a settled run wait for its turn; the process that trains is started, if none is there. Returns the id in the queue."""
    name = queue.add(root, config.to_toml(run), out)
    queue.start(root)
    return name


def enqueue_judging(root: Path, run: Path, scales: Sequence[float], **counts: int) -> str:
    """Let a run's checkpoints be judged in their turn, as `find_best` does, into `run/score`. Returns the id in the queue."""
    name = queue.judge(root, run, scales, **counts)
    queue.start(root)
    return name


def keep_checkpoint(run: Path, step: int, scale: float, out: Path | None = None) -> Path:
    """Write a checkpoint of a finished run as a pack that recommends a scale: by default NAME-STEP.safetensors beside the run's own."""
    settled = settle(settings.read(run / "config.toml"), run / "config.toml")
    path = out or run / f"{settled.name}-{step}.safetensors"
    average.save(path, best.kept(settled, learners.base_of(settled), run, step, scale))
    return path


def check(run: Run, unpacked: Path) -> tuple[dict[str, Any], Callable[[], str]]:
    """What a run with these settings would do with every picture, as `ledger.json` has it; and that as a web page, made when called.

    Nothing is trained. ZIPs are unpacked below `unpacked`. `notes` of the table says what the user should know of the cache.
    """
    kept = store.usual()
    found = ledger.read_dataset(run, unpacked, kept)
    loaded = family.load(learners.base_of(run), torch.device("cpu"), torch.float32)
    dataset = priors.with_drawn(ledger.fit_dataset(found, run, loaded), run, loaded, unpacked, kept)
    table = ledger.ledger(dataset, run, loaded, ledger.findings(dataset, run, loaded))
    measured, device = learners.memory(run, loaded, learners.pieces(run, loaded), dataset), devices.chosen(run.train.precision or "auto")[0]
    planned = plan.choose(run.train, measured, devices.free_bytes(device))
    table["totals"] |= {"memory_bytes": planned.parts, "seconds": estimate.seconds(run, loaded, kept)}
    table["notes"] = [planned.line(), *([kept.note] if kept.note else [])]
    account = dataset.account
    items = [(account.name(item.path), item) for item in account.used]
    return table, lambda: page.page(f"The pictures of {run.name}", table, items, run.data.ground)


def why(code: str) -> str:
    """What a code of the ledger means, and what to do about it."""
    return {**doctor.REASONS, **reasons.REASONS}.get(code, code)


def described() -> list[Setting]:
    """Every setting, as a form must know it."""
    return list(config.described())


def inspect_base(name: str) -> dict[str, Any]:
    """What a base is, and whether all of it is there and sound; `UserError` if it is none that is known."""
    return family.inspect(family.find(name))


def bundle_pack(source: Path, out: Path) -> list[str]:
    """Make a bundle of a run's pack, or of a pack, as a new folder or a ZIP; gives the names of its files."""
    made = sharing.bundled(source)
    bundle.write(out, made)
    return list(made)


def open_studio(packs: Sequence[Pack] = (), base: str = "", vae: str = "", partial: bool = False) -> Studio:
    """Load a base (by default the first pack's own, else `tiny`) and put the packs on it, in order, all at scale 0; of those that fit in
    part what fits, where `partial` allows it (`Studio.remarks` says what).

    Pictures are decoded by the base's own autoencoder, whatever a pack was trained with, unless one is named.
    """
    named = base or next((pack.base for pack in packs if pack.base), "tiny")
    studio = Studio.open(family.find(named, vae, half=devices.for_pictures()[1] != torch.float32))
    for pack in packs:
        studio.add(pack, partial)
    return studio


def save_picture(path: Path, studio: Studio, picture: Image.Image, recipe: Recipe) -> None:
    """Write a PNG with its recipe inside."""
    check_png(path)
    safeio.write(path, studio.png(picture, recipe))


def save_sheet(path: Path, make: Callable[[], Image.Image]) -> None:
    """Write a sheet as a PNG; it is made only once its name is known to be good."""
    check_png(path)
    safeio.write(path, pictures.encode(make(), {}))


def save_text(path: Path, make: Callable[[], str]) -> None:
    """Write what `make` gives, as UTF-8."""
    safeio.write(path, make())


def check_png(path: Path) -> None:
    """Raise `UserError` if no PNG can be called so."""
    if path.suffix.lower() != ".png":
        raise UserError("E-GEN-07", "pictures are written as PNG, which carries the recipe", path, "let --out end in .png")


def read_picture(path: Path) -> Image.Image:
    """A picture upright in sRGB, on white; `UserError` if it cannot be read."""
    try:
        return pixels.read_picture(path)
    except pixels.UnreadableError as error:
        raise UserError("E-DATA-03", f"this picture cannot be read: {error}", path, "mend or remove it") from None


def free_memory() -> None:
    """Give back what is no longer used, on the device too."""
    clear_device_cache(garbage_collection=True)


def grid(studio: Studio, recipes: Sequence[Recipe], scales: Sequence[float]) -> Image.Image:
    """A labelled sheet: a row for each recipe, a column for the base and for each scale of all the studio's packs."""
    rows = studio.strips(recipes, studio.packs, scales)
    labels = [f"{recipe.prompt} · seed {recipe.seed}" for recipe in recipes]
    return pictures.sheet(rows, labels, ["base", *(f"scale {scale:g}" for scale in scales)], " + ".join(studio.packs))


def find_best(source: Path, asking: Asking, data: str = "", base: str = "", out: Path | None = None) -> Iterator[Event]:
    """Judge a run's checkpoints, or a pack by a folder of pictures; the last event is `done`, and its data the verdict.

    `score.json`, `score.html` with its pictures, `grid.png`, `front.png` and `following.png` are written into `out`, by default `score`
    beside what is judged.
    """
    own = {"base": base} if base else {}
    if source.is_dir():
        run = settle({**settings.read(source / "config.toml"), **own}, source / "config.toml")
        found = learners.base_of(run)
        return best.find(run, found, best.checkpoints(run, found, source, asking.most), asking, out or source / queue.SCORE)
    pack = open_pack(source)
    if not data:
        todo = "name their folder with --data, or judge the run's folder"
        raise UserError("E-BEST-01", "a pack does not know its pictures", source, todo)
    table = {"name": pack.name, "trigger": pack.trigger, "kind": pack.metadata.get("sdlora.kind", "character"), "data": {"folder": data}}
    run = settle({**table, "base": pack.base or "tiny", **own})
    steps = pack.metadata.get("ss_steps", "0")
    candidates = {int(steps) if steps.isdigit() else 0: pack}
    return best.find(run, learners.base_of(run), candidates, asking, out or source.with_name(f"{source.stem}-score"))


def edit_captions(folder: Path, edit: Edit, write: bool) -> list[edits.Change]:
    """What an edit makes of a folder's caption files: (file, text before, text after) of those that change; written only if asked."""
    changes = edits.plan(folder, edit)
    if write:
        edits.apply(changes)
    return changes


def undo_captions(changes: Sequence[edits.Change]) -> None:
    """Take an edit back. Raises `UserError` if one of its files has changed since."""
    edits.apply([(path, after, before) for path, before, after in changes])


def captioners() -> list[str]:
    """The names of what can write captions."""
    return lookup.names("captioners")
