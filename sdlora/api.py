"""What the command line and the web page call; also the Python interface.

for event in api.train(api.settle({"data": {"folder": "my-pictures"}, "name": "mira"}), Path("runs/mira")):
    print(event)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdlora import (
    average,
    cast,
    config,
    devices,
    estimate,
    family,
    learners,
    lock,
    lookup,
    pictures,
    plan,
    priors,
    record,
    safeio,
    search,
    settings,
    sharing,
)
from sdlora import sweep as sweeping
from sdlora.config import Run
from sdlora.data import captioning, edits, ledger, page, store
from sdlora.data.captioning import Captioning
from sdlora.data.edits import Edit
from sdlora.errors import UserError
from sdlora.events import Event
from sdlora.generate import Recipe
from sdlora.packs import bundle, card
from sdlora.packs.pipelines import Applied, Pack
from sdlora.packs.readers import Reading
from sdlora.record import Record
from sdlora.settings import override
from sdlora.sharing import Push
from sdlora.stop import Stop
from sdlora.studio import Studio, parse_pack, parse_scale

__all__ = [
    "Applied",
    "Captioning",
    "Edit",
    "Event",
    "Pack",
    "Push",
    "Reading",
    "Recipe",
    "Record",
    "Run",
    "Stop",
    "Studio",
    "UserError",
    "about_pack",
    "about_rows",
    "average_run",
    "bundle_pack",
    "caption_folder",
    "cast_tables",
    "check",
    "check_pack",
    "edit_captions",
    "edit_pack",
    "events",
    "find_dimension",
    "find_rate",
    "grid",
    "header_changes",
    "inspect_base",
    "is_cast",
    "open_pack",
    "open_studio",
    "override",
    "parse_pack",
    "parse_scale",
    "push_pack",
    "read_settings",
    "runs",
    "save_picture",
    "save_sheet",
    "save_text",
    "settings_text",
    "settle",
    "settle_cast",
    "sweep",
    "sweep_results",
    "take_pack",
    "train",
    "train_cast",
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
    base = learners.base_of(run)
    if "kind" not in table.get("objective", {}) and base.prediction in lookup.names("objectives"):
        probe = {} if base.said else {"probe": table.get("probe", "choose")}
        run = config.parse({**_lasting(run), **probe, "objective": {**table.get("objective", {}), "kind": base.prediction}}, source)
    return config.resolve(config.parse(_lasting(run)), base.row)


def train(run: Run, out: Path, stop: Stop | None = None) -> Iterator[Event]:
    """Train a settled run into a folder, or go on with it. The pack is `out/NAME.safetensors` when `done` comes.

    A run is stopped by setting `stop.stop`, or by a file called `stop` in its folder: it saves, and `stopped` is its last event.
    """
    return cast.run(run, learners.base_of(run), out, stop)


def find_rate(run: Run, scratch: Path, steps: int, low: float, high: float) -> Iterator[Event]:
    """Try rates from `low` to `high` within one short run of a settled run; `done` brings a proposal, its curve and a picture."""
    return search.find_rate(run, scratch, steps, low, high)


def find_dimension(run: Run, scratch: Path, steps: int, ladders: dict[str, Sequence[int]]) -> Iterator[Event]:
    """Short runs over ladders of ranks and dimensions; `done` brings the smallest that suffice, the table and a picture."""
    return search.find_dimension(run, scratch, steps, ladders)


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
    with lock.held(out):
        cast.keep(runs, out)
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


def runs(root: Path) -> list[Record]:
    """The runs in a folder and below it, the newest first."""
    return record.runs(root)


def events(run: Path, since: int = 0) -> tuple[list[dict[str, Any]], int]:
    """What a run folder's log holds from a byte on, and the byte to ask from next: whoever shows a run that goes on asks now and then."""
    return record.events(run, since)


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


def inspect_base(name: str) -> dict[str, Any]:
    """What a base is, and whether all of it is there and sound; `UserError` if it is none that is known."""
    return family.inspect(family.find(name))


def open_pack(path: Path) -> Pack:
    """Read a pack, or the one in a bundle; `UserError` if it is none."""
    return sharing.opened(path)


def check_pack(path: Path, base: str = "") -> list[Reading]:
    """What each program makes of a pack; a base must be named only where it is none of the well-known models."""
    return sharing.check(path, base)


def about_pack(path: Path) -> dict[str, Any]:
    """What a pack is."""
    return card.about(path)


def about_rows(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`about_pack` for reading: (name, value)."""
    return card.rows(table)


def header_changes(assignments: list[str], trigger: str | None = None, scale: float | None = None) -> dict[str, str]:
    """Changes of a header from `key=value` lines, a trigger and a scale."""
    return sharing.changes(assignments, trigger, scale)


def edit_pack(path: Path, changes: Mapping[str, str], thumbnail: Path | None = None, out: Path | None = None) -> Path:
    """Change fields of a pack's header, in place unless `out` is given; its tensors stay as they are, byte for byte."""
    return sharing.edit(path, changes, thumbnail, out)


def bundle_pack(source: Path, out: Path) -> list[str]:
    """Make a bundle of a run's pack, or of a pack, as a new folder or a ZIP; gives the names of its files."""
    made = sharing.bundled(source)
    bundle.write(out, made)
    return list(made)


def push_pack(source: Path, repository: str, private: bool = True) -> Push:
    """What would be sent to the hub for a run, a pack or a bundle; `.send()` sends it."""
    return sharing.push(source, repository, private)


def take_pack(source: str, out: Path) -> list[dict[str, Any]]:
    """Take a bundle, a pack or a repository of the hub into a new folder, verified; says what its packs are."""
    return sharing.take(source, out)


def open_studio(packs: Sequence[Pack] = (), base: str = "", vae: str = "") -> Studio:
    """Load a base (by default the first pack's own, else `tiny`) and put the packs on it, in order, all at scale 0.

    Pictures are decoded by the base's own autoencoder, whatever a pack was trained with, unless one is named.
    """
    named = base or next((pack.base for pack in packs if pack.base), "tiny")
    studio = Studio.open(family.find(named, vae, half=devices.for_pictures()[1] != torch.float32))
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
    for name in ("base", "vae"):
        if table[name] not in ("", "tiny") and Path(table[name]).exists():
            table[name] = str(Path(table[name]).absolute())
    return table


def _name_of(folder: Path) -> str:
    name = folder.stem if folder.is_file() else folder.resolve().name
    return "".join(c if c.isalnum() or c in "._+-" else "-" for c in name).strip("-.") or "run"
