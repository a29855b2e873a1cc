"""From tables as a user wrote them to a run with every setting checked and filled in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdlora import config, learners, lookup, settings
from sdlora.config import Run
from sdlora.errors import UserError


def read_settings(path: Path | None, assignments: Sequence[str]) -> dict[str, Any]:
    """The tables of a TOML file with `a.b=c` assignments laid over them."""
    table = settings.read(path) if path else {}
    for assignment in assignments:
        settings.override(table, assignment)
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
