"""Projects as folders: `ROOT/projects/NAME` holds copies of the pictures, their ledger, and the settings that a run will take."""

import json
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from sdlora import api
from sdlora.api import Edit, Record, UserError
from webui.links import SUFFIXES

FOLDER = "projects"
BESIDE = (".txt", ".caption", ".json", ".jsonl", ".csv")
"""What lies beside pictures and is brought with them."""
MOST_FILES, MOST_BYTES = 20_000, 2**34
MOST_UNDO = 20
LAID = [Path(sysconfig.get_path("data", scheme)) for scheme in (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))]
SAMPLES = [Path(__file__).parent.parent / "datasets" / "tavi", *(place / "share" / "sdlora" / "tavi" for place in LAID)]
SAMPLE = next((place for place in SAMPLES if place.is_dir()), SAMPLES[0])
"""The bundled character: in the checkout, or where a wheel laid it."""
SAMPLE_STEPS = 225
"""A fourth of the usual: it is plainly there after two minutes."""
ASIDE = "."
"""A picture whose name begins so is left aside: whatever reads the folder passes over it."""


@dataclass(frozen=True)
class Project:
    """A folder with all that is known of a character or style to be."""

    folder: Path

    @property
    def name(self) -> str:
        return api.escape_surrogates(self.folder.name)

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def settings(self) -> Path:
        return self.folder / "settings.toml"

    def table(self) -> dict[str, Any]:
        """Its settings as they are written; always with its name and its pictures."""
        table = api.read_settings(self.settings, []) if self.settings.is_file() else {}
        table.setdefault("name", self.name)
        table.setdefault("data", {})["folder"] = str(self.pictures)
        return table

    @property
    def chunks(self) -> int:
        """How many times what the text encoder reads at once a caption may be long."""
        return int(self.table().get("text", {}).get("chunks", 1))

    def keep(self, table: dict[str, Any]) -> None:
        """Write its settings, if they can be a run's. Raises `UserError`."""
        api.settle(table, self.settings)
        api.save_text(self.settings, lambda: tomli_w.dumps(table))

    def ledger(self) -> dict[str, Any]:
        """What was last found of its pictures; empty before."""
        try:
            found = json.loads((self.folder / "ledger.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def look(self) -> dict[str, Any]:
        """Look at all its pictures anew, and keep what was found. Raises `UserError`."""
        table = self.table()
        table["data"]["skip_unreadable"] = True
        found, _ = api.check(api.settle(table, self.settings), self.folder / "unpacked")
        api.save_text(self.folder / "ledger.json", lambda: json.dumps(found, indent=1))
        return found

    def files(self) -> list[Path]:
        """Its pictures, those left aside too."""
        return sorted(path for path in self.pictures.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())

    def find(self, name: str) -> Path:
        """One of its pictures by its place in the folder. Only what is listed is found."""
        for path in self.files():
            if api.shown(path.relative_to(self.pictures).as_posix()) == name:
                return path
        raise UserError("E-UI-08", f'there is no picture "{name}" any more', self.name, "look at the pictures again")

    def put_aside(self, name: str) -> None:
        """Leave a picture out, or take it back if it is out; its caption goes with it, and nothing is deleted."""
        path = self.find(name)
        out = not path.name.startswith(ASIDE)
        for one in [path, *(path.with_suffix(ending) for ending in BESIDE[:2])]:
            new = one.with_name(ASIDE + one.name if out else one.name.removeprefix(ASIDE))
            if one.is_file() and not new.exists():
                api.rename(one, new)

    def edit(self, change: Edit) -> int:
        """Change all captions; how many files that was. It can be undone. Raises `UserError`."""
        changes = api.edit_captions(self.pictures, change, write=True)
        if changes:
            past = [*self._past(), [[str(path.relative_to(self.pictures)), before, after] for path, before, after in changes]]
            api.save_text(self.folder / "edits.json", lambda: json.dumps(past[-MOST_UNDO:]))
        return len(changes)

    def undo(self) -> int:
        """Take the last edit back; how many files that was. Raises `UserError`."""
        past = self._past()
        if not past:
            raise UserError("E-UI-09", "there is no edit to take back", self.name)
        api.undo_captions([(self.pictures / name, before, after) for name, before, after in past[-1]])
        api.save_text(self.folder / "edits.json", lambda: json.dumps(past[:-1]))
        return len(past[-1])

    def _past(self) -> list[list[list[str]]]:
        try:
            found: list[list[list[str]]] = json.loads((self.folder / "edits.json").read_bytes())
        except (OSError, ValueError):
            return []
        return found


@dataclass(frozen=True)
class Projects:
    """All projects below a folder, and the runs that came of them."""

    root: Path
    listens: bool = False  # whether others than this machine's users may reach the page: then no path is taken from it

    def all(self) -> list[Project]:
        """The newest first."""
        folders = [path for path in self.root.joinpath(FOLDER).glob("*") if path.is_dir() and not path.name.startswith(".")]
        return [Project(path) for path in sorted(folders, key=lambda path: (-path.stat().st_mtime_ns, path.name))]

    def find(self, name: str) -> Project:
        """One by its name. Only what is listed is found, so that no name leads out of the folder."""
        for project in self.all():
            if project.name == name:
                api.check_path(project.folder)
                return project
        raise UserError("E-UI-10", f'there is no project "{name}"', self.root / FOLDER, "choose another, or begin a new one")

    def begin(self, name: str) -> Project:
        """A new project. Raises `UserError` if it cannot be called so, or is there already."""
        name = name.strip()
        if not re.fullmatch(r"\w[\w .+-]{0,63}", name) or name != name.rstrip("."):
            raise UserError("E-UI-11", f'a project cannot be called "{name}"', "name", "use letters, digits, space and . _ + - only")
        project = Project(self.root / FOLDER / name)
        if project.folder.exists():
            raise UserError("E-UI-11", f'there is a project "{name}" already', "name", "choose another name, or open that one")
        project.keep({"name": name})
        return project

    def sample(self) -> Project:
        """The bundled character as a project, begun if it is not there."""
        known = [project for project in self.all() if project.name == SAMPLE.name]
        if known:
            return known[0]
        project = self.begin(SAMPLE.name)
        project.keep({"name": project.name, "train": {"steps": SAMPLE_STEPS}})
        self._copy(project, [(path, path.name) for path in sorted(SAMPLE.iterdir())])
        return project

    def bring_files(self, project: Project, paths: Sequence[Path]) -> int:
        """Copy uploaded files, or what ZIPs among them hold; how many. Raises `UserError` if two have one name."""
        pairs: list[tuple[Path, str]] = []
        for path in paths:
            pairs += _below(api.unpack(path, path.parent)) if path.suffix.lower() == ".zip" else [(path, path.name)]
        names = [name for _, name in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            what = f"{len(twice)} names are there more than once, such as {twice[0]}; a browser sends files without their folders"
            raise UserError("E-UI-12", what, project.name, "put the folder into a ZIP and bring that")
        return self._copy(project, pairs)

    def bring_folder(self, project: Project, typed: str) -> int:
        """Copy the pictures of a folder that was typed, and what lies beside them; how many files. Raises `UserError`."""
        return self._copy(project, _below(self.allowed(typed)))

    def allowed(self, typed: str) -> Path:
        """A path that the page was given. Raises `UserError` unless it lies below the root, and always when others can reach the page."""
        if self.listens:
            raise UserError("E-UI-06", "no path is taken from a page that others can reach", "", "upload the pictures, or a ZIP of them")
        root = Path(os.path.realpath(self.root))
        place = Path(os.path.realpath(root / Path(typed.strip()).expanduser())) if typed.strip() and "\0" not in typed else root.parent
        if not place.is_relative_to(root):
            raise UserError(
                "E-UI-06", "the page may read below its data folder only", root, "upload the pictures, or start with --data-root"
            )
        if not place.is_dir():
            raise UserError("E-UI-06", "there is no such folder", typed, f"it must lie below {root}")
        return place

    def check_paths(self, table: dict[str, Any]) -> None:
        """Raise `UserError` if a setting that came from the page names a file which the page may not read."""
        for value in _texts(table):
            odd = value.startswith(("/", "~", ".")) or "\\" in value or ".." in value or bool(re.match("[A-Za-z]:", value)) or "\0" in value
            if value != "tiny" and (odd or Path(value).exists()):
                place = Path(os.path.realpath(Path(value.replace("\0", "")).expanduser()))
                if self.listens or not place.is_relative_to(os.path.realpath(self.root)):
                    raise UserError("E-UI-06", "the page may read below its data folder only", value, "start the page with --data-root")

    def next_run(self, project: Project) -> Path:
        """A run folder that is not there yet and that nobody waits for."""
        waiting = {one.out.name for one in api.queued(self.root)}
        number = 1
        while True:
            name = project.name if number == 1 else f"{project.name}-{number}"
            if not (self.root / name).exists() and name not in waiting and name not in (FOLDER, "queue"):
                return self.root / name
            number += 1

    def runs(self) -> list[Record]:
        return api.runs(self.root)

    def run(self, id: str) -> Record:
        """A run by its place below the root. Only what is listed is found."""
        for one in self.runs():
            if self.id_of(one) == id:
                api.check_path(one.folder)
                return one
        raise UserError("E-UI-13", f'there is no run "{id}"', self.root, "choose another")

    def id_of(self, one: Record) -> str:
        return api.escape_surrogates(one.folder.relative_to(self.root).as_posix())

    def busy(self) -> str:
        """What is at work on the device now, a run or a judging; nothing if nothing is."""
        running = [one.name for one in self.runs() if one.state == "running"]
        running += [one.name for one in api.queued(self.root) if one.state == "running"]
        return next(iter(running), "")

    def _copy(self, project: Project, pairs: Sequence[tuple[Path, str]]) -> int:
        wanted = [(path, name) for path, name in pairs if path.suffix.lower() in (*SUFFIXES, *BESIDE)]
        size = sum(path.stat().st_size for path, _ in wanted)
        if len(wanted) > MOST_FILES or size > MOST_BYTES:
            raise UserError(
                "E-UI-12", f"{len(wanted)} files of {size / 1e9:.1f} GB are more than the page brings", project.name, "use the CLI"
            )
        if not any(path.suffix.lower() in SUFFIXES for path, _ in wanted):
            raise UserError("E-UI-12", "there is no picture among these files", project.name, f"pictures end in {', '.join(SUFFIXES)}")
        for path, name in wanted:
            api.save_bytes(project.pictures / name, path.read_bytes())
        return len(wanted)


def _below(folder: Path) -> list[tuple[Path, str]]:
    """Files below a folder with their place in it; hidden ones and links are passed over."""
    return [(path, path.relative_to(folder).as_posix()) for path in _walk(folder)]


def _walk(folder: Path) -> Iterator[Path]:
    for place, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith((".", "__MACOSX")))
        for name in sorted(names):
            path = Path(place, name)
            if not name.startswith(".") and not path.is_symlink() and path.is_file():
                yield path


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
