"""The packs below a folder, newest first."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdlora import api
from sdlora.api import UserError

SKIPPED = {"cache", "checkpoints", "projects", "queue"}  # folders of a run that hold no finished packs


@dataclass(frozen=True)
class Found:
    """A pack file as it lay on the disk when it was listed; another `stamp` is another file."""

    id: str  # path below the root, with / between its parts
    path: Path
    stamp: tuple[int, int]  # time of change in ns, bytes


@dataclass(frozen=True)
class Shelf:
    """All `*.safetensors` files below a folder that need not exist."""

    root: Path

    def packs(self) -> list[Found]:
        """Every pack, newest first."""
        return sorted(self._walk(), key=lambda found: (-found.stamp[0], found.id))

    def find(self, id: str) -> Found:
        """A pack by its id. Only what is listed is found, so that no id leads out of the folder."""
        for found in self._walk():
            if found.id == id:
                api.check_path(found.path)
                return found
        raise UserError("E-UI-01", f'there is no pack "{id}" any more', self.root, "refresh the list and choose another")

    def _walk(self) -> Iterator[Found]:
        for folder, below, files in os.walk(self.root):
            below[:] = sorted(name for name in below if name not in SKIPPED and not name.startswith("."))
            if "config.json" in files:  # a part of a base model in diffusers layout, not a pack
                continue
            for name in files:
                path = Path(folder, name)
                if path.suffix == ".safetensors" and not name.startswith(".") and path.is_file():
                    stat = path.stat()
                    yield Found(api.escape_surrogates(path.relative_to(self.root).as_posix()), path, (stat.st_mtime_ns, stat.st_size))
