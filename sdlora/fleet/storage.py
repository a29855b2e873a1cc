"""Storage that all nodes share, through fsspec: folders are pushed whole and pulled whole, and nothing half-pushed is believed.

Below the place of a folder lie `blobs/SHA-256`, the contents, and `manifests/ATTEMPT-NUMBER.json`, which name the files of one push and
begin with their own checksum. A manifest is written when all its blobs are there, so the newest that is sound, and whose blobs are, is the
folder. An attempt's manifests come after those of all attempts before it, whatever a straggler still pushes.
"""

import contextlib
import errno
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from sdlora import lock, safeio
from sdlora.errors import RESOURCES, UserError

KEPT = 2
"""Manifests of a folder that stay: the newest, and the one before."""
PASSED_OVER = {lock.NAME}


class Storage:
    """A place on a file system of fsspec."""

    def __init__(self, system: Any, root: str) -> None:
        self.system, self.root = system, root.rstrip("/")

    @staticmethod
    def is_local(address: str) -> bool:
        """Whether this is a path, so that runs work in it and nothing is copied."""
        return "://" not in address

    @staticmethod
    def open(address: str) -> "Storage":
        """The storage at an address such as s3://bucket/fleet. Raises `UserError` if there is no such kind, or it cannot be reached."""
        try:
            system, root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            what = f"this storage cannot be opened: {error}"
            raise UserError("E-FLEET-11", what, address, "install fsspec's part for it (s3fs for s3://), here and on the nodes") from error
        return Storage(system, root)

    def read(self, name: str) -> bytes | None:
        """The content of a file, or None where there is none."""
        with self._told():
            try:
                return bytes(self.system.cat_file(f"{self.root}/{name}"))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Write a file. Not every storage does so at once: only what carries a checksum, or follows from it, may be written so."""
        with self._told():
            self.system.makedirs(f"{self.root}/{name}".rpartition("/")[0], exist_ok=True)
            self.system.pipe_file(f"{self.root}/{name}", content)

    def remove(self, name: str) -> None:
        with self._told(), contextlib.suppress(FileNotFoundError):
            self.system.rm_file(f"{self.root}/{name}")

    def names(self, folder: str) -> list[str]:
        """The files in a folder, in order."""
        with self._told():
            self.system.invalidate_cache()
            try:
                return sorted(str(path).rpartition("/")[2] for path in self.system.ls(f"{self.root}/{folder}", detail=False))
            except FileNotFoundError:
                return []

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno == errno.ENOSPC:
                what = "the shared storage is full; what it held before is untouched"
                raise UserError("E-FLEET-12", what, self.root, "free some space there and start the fleet again", RESOURCES) from error
            what = f"the shared storage cannot be used: {error}"
            raise UserError("E-FLEET-13", what, self.root, "see that it can be reached and written from the node", RESOURCES) from error


@dataclass(frozen=True)
class Manifest:
    """The files of a folder as they were pushed: name, SHA-256."""

    attempt: int
    number: int
    files: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.attempt:06d}-{self.number:06d}.json"

    def content(self) -> bytes:
        body = json.dumps(self.files, indent=1).encode()
        return hashlib.sha256(body).hexdigest().encode() + b"\n" + body

    @staticmethod
    def read(name: str, content: bytes | None) -> "Manifest | None":
        """A manifest, or None where it is torn or none at all."""
        digest, _, body = (content or b"").partition(b"\n")
        numbers = re.fullmatch(r"(\d{6})-(\d{6})\.json", name)
        if not numbers or digest.decode("ascii", "replace") != hashlib.sha256(body).hexdigest():
            return None
        return Manifest(int(numbers[1]), int(numbers[2]), json.loads(body))


def manifests(storage: Storage, place: str) -> list[Manifest]:
    """The sound manifests of a folder, the oldest first."""
    names = storage.names(f"{place}/manifests")
    return [one for name in names if (one := Manifest.read(name, storage.read(f"{place}/manifests/{name}")))]


def push(storage: Storage, place: str, folder: Path, attempt: int) -> None:
    """Push a folder that others may be writing to, by whole files. Raises `UserError`; what was pushed before stays as it was."""
    before = manifests(storage, place)
    there, files = set(storage.names(f"{place}/blobs")), dict[str, str]()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_symlink() or not path.is_file() or path.name in PASSED_OVER or any(p.startswith(safeio.TEMPORARY) for p in name.parts):
            continue
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest not in there or not any(digest in one.files.values() for one in before):  # a torn blob is in no manifest
            storage.write(f"{place}/blobs/{digest}", content)
        files[name.as_posix()] = digest
    own = [one.number for one in before if one.attempt == attempt]
    new = Manifest(attempt, 1 + max(own, default=0), files)
    storage.write(f"{place}/manifests/{new.name}", new.content())
    kept, old = [*before, new][-KEPT:], [*before, new][:-KEPT]
    for one in old:
        storage.remove(f"{place}/manifests/{one.name}")
    for digest in {d for one in old for d in one.files.values()} - {d for one in kept for d in one.files.values()}:
        storage.remove(f"{place}/blobs/{digest}")


def pull(storage: Storage, place: str, folder: Path) -> bool:
    """Make a folder what was pushed last; false, and the folder as it was, if nothing sound was ever pushed."""
    return any(_pulled(storage, place, one, folder) for one in reversed(manifests(storage, place)))


def _pulled(storage: Storage, place: str, one: Manifest, folder: Path) -> bool:
    for name, digest in one.files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(
                "E-FLEET-14", f'a file of the pushed folder would lie outside it: "{name}"', place, "trust this storage no more"
            )
        path = folder / name
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
            continue
        content = storage.read(f"{place}/blobs/{digest}")
        if content is None or hashlib.sha256(content).hexdigest() != digest:
            return False
        safeio.write(path, content)
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in PASSED_OVER and path.relative_to(folder).as_posix() not in one.files:
            safeio.remove(path)
    return True
