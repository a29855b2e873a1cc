"""The one place that writes files: complete and durable, or not there at all.

A file or directory is written under a temporary name beside its place, flushed to the disk, renamed, and the rename itself is flushed.
Whoever looks sees the old content or the new, never a part; a crash leaves at most a temporary name, which `sweep` takes away.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import BinaryIO

from sdlora.errors import RESOURCES, UserError

TEMPORARY = ".sdlora-tmp-"


class Disk:
    """What changes a disk, one method each, so that a test can stand between and let any of them fail."""

    def mkdir(self, path: Path) -> None:
        path.mkdir()

    def create(self, path: Path) -> BinaryIO:
        return path.open("xb")

    def write(self, file: BinaryIO, content: bytes) -> None:
        file.write(content)
        file.flush()

    def sync(self, file: BinaryIO) -> None:
        os.fsync(file.fileno())

    def append(self, path: Path, content: bytes) -> None:
        with path.open("ab") as file:
            file.write(content)

    def replace(self, old: Path, new: Path) -> None:
        os.replace(old, new)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def rmdir(self, path: Path) -> None:
        path.rmdir()

    def sync_folder(self, path: Path) -> None:
        if os.name == "nt":  # Windows has no handle on a folder to flush; its rename is durable with the journal
            return
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


DISK: ContextVar[Disk] = ContextVar("disk", default=Disk())  # noqa: B039  it holds nothing that could change


@contextlib.contextmanager
def using(disk: Disk) -> Iterator[None]:
    """Let another disk stand in, in this context alone."""
    token = DISK.set(disk)
    try:
        yield
    finally:
        DISK.reset(token)


def write(path: Path, content: bytes | str | Iterable[bytes], durable: bool = True) -> None:
    """Put `content`, whole or piece by piece, at `path`, atomically and durably; makes the parent folders. Raises `UserError` when the
    disk refuses.

    Only what carries a checksum and can be made again, as a cache's entries, does without durability, which takes milliseconds a file.
    """
    disk, temporary = DISK.get(), _beside(path)
    try:
        make_folders(path.parent)
        _write_through(temporary, _encoded(content, path) if isinstance(content, str) else content, durable)
        disk.replace(temporary, path)
        if durable:
            disk.sync_folder(path.parent)
    except OSError as error:
        _discard(temporary)
        raise refused(error, path) from error


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Put a new folder at `path` holding `files` and a `manifest.json` of their sizes and SHA-256 sums."""
    write_tree(path, [*files.items(), ("manifest.json", _manifest(files))])


def write_tree(path: Path, files: Iterable[tuple[str, bytes | Iterable[bytes]]]) -> None:
    """Put a new folder at `path` holding `files` by name, which may lie in subfolders; of iterators one piece at a time is held."""
    disk, temporary = DISK.get(), _beside(path)
    try:
        make_folders(path.parent)
        disk.mkdir(temporary)
        for name, content in files:
            make_folders((temporary / name).parent)
            _write_through(temporary / name, content)
        for folder in [*(inner for inner in temporary.rglob("*") if inner.is_dir()), temporary]:
            disk.sync_folder(folder)
        disk.replace(temporary, path)
        disk.sync_folder(path.parent)
    except OSError as error:
        raise refused(error, path) from error
    finally:  # whatever the iterator raised
        _discard(temporary)


def read_folder(path: Path) -> dict[str, bytes] | None:
    """The files of a folder that `write_folder` wrote, or None when any bit of them, or of the manifest, is not as it was written."""
    try:
        manifest = (path / "manifest.json").read_bytes()
        files = {name: (path / name).read_bytes() for name in json.loads(manifest)}
    except (OSError, ValueError, TypeError):  # a damaged manifest may be anything
        return None
    return files if manifest == _manifest(files) else None


def _manifest(files: Mapping[str, bytes]) -> bytes:
    entries = {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()}
    return json.dumps(entries, indent=1).encode()


def append_line(path: Path, line: str) -> None:
    """Add one line to a log; a torn line is the worst that a crash can do to it, and the next begins a line of its own."""
    try:
        DISK.get().append(path, (("\n" if _is_torn(path) else "") + line + "\n").encode())
    except OSError as error:
        raise refused(error, path) from error


def _is_torn(path: Path) -> bool:
    """Whether a file's last line has no end."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def remove(path: Path) -> None:
    """Take away a file or a folder: it loses its name first, so that no crash leaves a part of it in its place."""
    temporary = _beside(path)
    _discard(temporary)
    rename(path, temporary)
    _discard(temporary)


def rename(path: Path, new: Path) -> None:
    """Give a file or a folder another name in the same folder, durably."""
    try:
        DISK.get().replace(path, new)
        DISK.get().sync_folder(path.parent)
    except OSError as error:
        raise refused(error, path) from error


def make_folders(path: Path) -> None:
    """Make a folder and those above it, each durably: what is flushed in a folder is lost with the folder's own name."""
    if path.is_dir():
        return
    make_folders(path.parent)
    with contextlib.suppress(FileExistsError):  # another process was faster, or a file is in the way, which the next step says
        DISK.get().mkdir(path)
    DISK.get().sync_folder(path.parent)


def scratch_folder(prefix: str = "sdlora-") -> "TemporaryDirectory[str]":
    """A temporary folder, by its real path: the usual one may lie behind a link or have a short name, and paths in it are compared.

    What another program still holds when the folder is left stays behind; Windows lets nobody delete it.
    """
    return TemporaryDirectory(prefix=prefix, dir=os.path.realpath(gettempdir()), ignore_cleanup_errors=True)


def sweep(folder: Path) -> None:
    """Take away what a killed writer left in a folder that nobody else is writing to."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        _discard(leftover)


def refused(error: OSError, path: Path) -> UserError:
    if error.errno == errno.ENOSPC:
        return UserError("E-DISK-01", "the disk is full; nothing was half-written", path, "free some space and go on", RESOURCES)
    reason = error.strerror or str(error)
    return UserError("E-DISK-02", f"cannot write here: {reason}; nothing was half-written", path, "choose another place with --out")


def check_room(path: Path, size: int) -> None:
    """Raise `UserError` where the disk has no room for so many bytes at a path."""
    there = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        what = f"{size / 1e9:.1f} GB are needed here and {free / 1e9:.1f} GB are free; nothing was written"
        raise UserError("E-DISK-01", what, path, "free some space, or choose another place with --out", RESOURCES)


def file_name(text: str) -> str:
    """A name that any disk takes, for any text; `unquote` gives the text again. Letters stay as they are, as names have little room."""
    return re.sub(r'[%/\\\\:*?"<>|\0-\x1f]', lambda found: f"%{ord(found[0]):02X}", text)


def _encoded(text: str, path: Path) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        what = f"it would hold {error.object[error.start : error.start + 1]!r}, half a letter that no text can hold; nothing was written"
        raise UserError("E-DISK-04", what, path, "write text, and names of files, as UTF-8") from None


def _beside(path: Path) -> Path:
    """A name that no other writer has: process ids alone are shared by containers that share a disk."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def _discard(path: Path) -> None:
    """Remove a temporary name, whatever it is; a failure here must not hide the error that led to it."""
    disk = DISK.get()
    with contextlib.suppress(OSError):
        if path.is_symlink() or path.is_file():
            disk.unlink(path)
        elif path.is_dir():
            for inner in path.iterdir():
                _discard(inner)
            disk.rmdir(path)


def _write_through(path: Path, content: bytes | Iterable[bytes], durable: bool = True) -> None:
    disk = DISK.get()
    with disk.create(path) as file:
        for piece in [content] if isinstance(content, bytes) else content:
            disk.write(file, piece)
        if durable:
            disk.sync(file)
