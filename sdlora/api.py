"""What the command line and the web page call; also the Python interface.

for event in api.train(api.settle({"data": {"folder": "my-pictures"}, "name": "mira"}), Path("runs/mira")):
    print(event)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from PIL import Image

from sdlora import config, estimate, family, job, learners, lookup, pictures, priors, queue, record, report, safeio, settings, stop
from sdlora.config import Run, Setting
from sdlora.data import captioning, doctor, edits, ledger, page, pixels, reasons, store, unzip
from sdlora.data.captioning import Captioning
from sdlora.data.edits import Edit
from sdlora.errors import UserError
from sdlora.events import Event
from sdlora.generate import Recipe
from sdlora.packs import file
from sdlora.packs.file import Pack
from sdlora.queue import Entry
from sdlora.record import Record
from sdlora.settings import override
from sdlora.stop import Stop
from sdlora.studio import Studio, parse_pack, parse_scale

__all__ = [
    "Captioning",
    "Edit",
    "Entry",
    "Event",
    "Pack",
    "Recipe",
    "Record",
    "Run",
    "Setting",
    "Stop",
    "Studio",
    "UserError",
    "ask",
    "caption_folder",
    "captioners",
    "captions",
    "check",
    "curves",
    "described",
    "edit_captions",
    "enqueue",
    "events",
    "free_memory",
    "grid",
    "inspect_base",
    "open_pack",
    "open_studio",
    "override",
    "parse_pack",
    "parse_scale",
    "put_captions",
    "queued",
    "read_picture",
    "read_settings",
    "remove",
    "rename",
    "runs",
    "save_bytes",
    "save_picture",
    "save_sheet",
    "save_text",
    "settings_text",
    "settle",
    "start_queue",
    "take_out",
    "train",
    "undo_captions",
    "unpack",
    "why",
]


def read_settings(path: Path | None, assignments: Sequence[str]) -> dict[str, Any]:
    """The tables of a TOML file with `a.b=c` assignments laid over them."""
    table = settings.read(path) if path else {}
    for assignment in assignments:
        override(table, assignment)
    return table


def settle(table: dict[str, Any], source: object = "") -> Run:
    """A run with every setting checked and filled in. Raises `UserError` for what is misspelt or cannot be."""
    run = config.parse(table, source)
    if not run.name and run.data.sources:
        run = config.parse({**table, "name": _name_of(Path(run.data.sources[0].folder))}, source)
    if not run.name:
        raise UserError("E-CONF-07", "the run has no name, and no folder to take one from", "name", "add --name NAME")
    base = family.find(run.base)
    if "kind" not in table.get("objective", {}) and base.prediction in lookup.names("objectives"):
        run = config.parse({**_lasting(run), "objective": {**table.get("objective", {}), "kind": base.prediction}}, source)
    return config.resolve(config.parse(_lasting(run)), base.row)


def train(run: Run, out: Path, stop: Stop | None = None) -> Iterator[Event]:
    """Train a settled run into a folder, or go on with it. The pack is `out/NAME.safetensors` when `done` comes.

    A run is stopped by setting `stop.stop`, or by a file called `stop` in its folder: it saves, and `stopped` is its last event.
    """
    return job.run(run, family.find(run.base), out, stop)


def runs(root: Path) -> list[Record]:
    """The runs in a folder and below it, the newest first."""
    return record.runs(root)


def events(run: Path, since: int = 0) -> tuple[list[dict[str, Any]], int]:
    """What a run folder's log holds from a byte on, and the byte to ask from next: whoever shows a run that goes on asks now and then."""
    return record.events(run, since)


def curves(run: Path) -> str:
    """The loss of a run, and that on pictures held out, as HTML with an SVG in it; empty before there is any."""
    return report.curves(run)


def ask(run: Path, what: str) -> None:
    """Ask a run to `stop` (it saves first), to `save`, or to `sample`: to draw its preview at once."""
    stop.ask(run, what)


def enqueue(root: Path, run: Run, out: Path) -> str:
    """Let a settled run wait for its turn; the process that trains is started, if none is there. Returns the id in the queue."""
    name = queue.add(root, config.to_toml(run), out)
    queue.start(root)
    return name


def queued(root: Path) -> list[Entry]:
    """The runs that wait or failed to begin, in their order."""
    return queue.entries(root)


def start_queue(root: Path) -> bool:
    """Start the process that trains what waits, if it is needed and not there; true if it was started."""
    return queue.start(root)


def take_out(root: Path, id: str) -> None:
    """Take a run that waits or failed out of the queue."""
    queue.take_out(root, id)


def check(run: Run, unpacked: Path) -> tuple[dict[str, Any], Callable[[], str]]:
    """What a run with these settings would do with every picture, as `ledger.json` has it; and that as a web page, made when called.

    Nothing is trained. ZIPs are unpacked below `unpacked`. `notes` of the table says what the user should know of the cache.
    """
    kept = store.usual()
    found = ledger.read_dataset(run, unpacked, kept)
    loaded = family.load(family.find(run.base), torch.device("cpu"), torch.float32)
    dataset = priors.with_drawn(ledger.fit_dataset(found, run, loaded), run, loaded, unpacked, kept)
    table = ledger.ledger(dataset, run, loaded, ledger.findings(dataset, run, loaded))
    table["totals"] |= estimate.totals(run, loaded, learners.pieces(run, loaded), list(dataset.buckets), kept)
    table["notes"] = [kept.note] if kept.note else []
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


def open_pack(path: Path) -> Pack:
    """Read a pack; `UserError` if it is none."""
    return file.load(path)


def open_studio(packs: Sequence[Pack] = (), base: str = "") -> Studio:
    """Load a base (by default the first pack's own, else `tiny`) and put the packs on it, in order, all at scale 0."""
    named = base or next((pack.base for pack in packs if pack.base), "tiny")
    studio = Studio.open(family.find(named))
    for pack in packs:
        studio.add(pack)
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


def save_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    safeio.write(path, content)


def rename(path: Path, new: Path) -> None:
    """Give a file another name in the same folder."""
    safeio.rename(path, new)


def remove(path: Path) -> None:
    """Take a file or a folder away."""
    safeio.remove(path)


def unpack(archive: Path, into: Path) -> Path:
    """The folder below `into` with what a ZIP holds. Raises `UserError` if any of it could do harm."""
    return unzip.unzip(archive, into)


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


def edit_captions(folder: Path, edit: Edit, write: bool) -> list[edits.Change]:
    """What an edit makes of a folder's caption files: (file, text before, text after) of those that change; written only if asked."""
    changes = edits.plan(folder, edit)
    if write:
        edits.apply(changes)
    return changes


def undo_captions(changes: Sequence[edits.Change]) -> None:
    """Take an edit back. Raises `UserError` if one of its files has changed since."""
    edits.apply([(path, after, before) for path, before, after in changes])


def captions(folder: Path) -> list[tuple[Path, str]]:
    """Every picture of a folder, and its caption or an empty text."""
    return captioning.read(folder)


def put_captions(folder: Path, said: Mapping[Path, str]) -> None:
    """Write captions that were typed, each where a sample finds it."""
    captioning.put(folder, said)


def captioners() -> list[str]:
    """The names of what can write captions."""
    return lookup.names("captioners")


def caption_folder(folder: Path, how: Captioning) -> tuple[int, Iterator[captioning.Written]]:
    """Caption the pictures of a folder that have no caption: how many are left as they are, and (picture, caption) as each is written."""
    return captioning.caption(folder, how)


def settings_text(run: Run) -> str:
    """A run as TOML."""
    return config.to_toml(run)


def _lasting(run: Run) -> dict[str, Any]:
    """The run's tables with paths that hold in any working directory, so that it can be resumed from another."""
    table = run.model_dump(exclude_none=True)
    for place in [table["data"], *table["data"]["folders"]]:
        if place["folder"]:
            place["folder"] = str(Path(place["folder"]).absolute())
    if Path(run.base).exists() and run.base != "tiny":
        table["base"] = str(Path(run.base).absolute())
    return table


def _name_of(folder: Path) -> str:
    name = folder.stem if folder.is_file() else folder.resolve().name
    return "".join(c if c.isalnum() or c in "._+-" else "-" for c in name).strip("-.") or "run"
