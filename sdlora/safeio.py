"""The one place that writes files: complete and durable, or not there at all.

A file or directory is written under a temporary name beside its place, flushed to the disk, renamed, and the rename itself is flushed.
Whoever looks sees the old content or the new, never a part; a crash leaves at most a temporary name, which `sweep` takes away.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdlora.errors import RESOURCES, UserError

TEMPORARY = ".sdlora-tmp-"


def write(path: Path, content: bytes | str, durable: bool = True) -> None:
    """Put `content` at `path`, atomically and durably; makes the parent folders. Raises `UserError` when the disk refuses.

    Only what carries a checksum and can be made again, as a cache's entries, does without durability, which takes milliseconds a file.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_through(temporary, content.encode() if isinstance(content, str) else content, durable)
        os.replace(temporary, path)
        if durable:
            _flush_folder(path.parent)
    except OSError as error:
        _discard(temporary)
        raise refused(error, path) from error


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Put a new folder at `path` holding `files` and a `manifest.json` of their sizes and SHA-256 sums."""
    manifest = {name: _entry(content) for name, content in files.items()}
    write_tree(path, [*files.items(), ("manifest.json", json.dumps(manifest, indent=1).encode())])


def write_tree(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Put a new folder at `path` holding `files` by name, which may lie in subfolders; of an iterator one file at a time is held."""
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        for name, content in files:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            _write_through(temporary / name, content)
        for folder in [*(inner for inner in temporary.rglob("*") if inner.is_dir()), temporary]:
            _flush_folder(folder)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise refused(error, path) from error
    finally:  # whatever the iterator raised
        _discard(temporary)


def read_folder(path: Path) -> dict[str, bytes] | None:
    """The files of a folder that `write_folder` wrote, or None when any of them is missing or not as it was written."""
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_bytes())
        files = {name: (path / name).read_bytes() for name in manifest}
        sound = all(_entry(content) == manifest[name] for name, content in files.items())
    except (OSError, ValueError, TypeError):  # a damaged manifest may be anything
        return None
    return files if sound else None


def _entry(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def append_line(path: Path, line: str) -> None:
    """Add one line to a log; a torn last line is the worst that a crash can do to it."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise refused(error, path) from error


def sweep(folder: Path) -> None:
    """Take away what a killed writer left in a folder that nobody else is writing to."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        _discard(leftover)


def refused(error: OSError, path: Path) -> UserError:
    if error.errno == errno.ENOSPC:
        return UserError("E-DISK-01", "the disk is full; nothing was half-written", path, "free some space and go on", RESOURCES)
    reason = error.strerror or str(error)
    return UserError("E-DISK-02", f"cannot write here: {reason}; nothing was half-written", path, "choose another place with --out")


def _temporary(path: Path) -> Path:
    """A name that no other writer has: process ids alone are shared by containers that share a disk."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def _discard(path: Path) -> None:
    """Remove a temporary name, whatever it is; a failure here must not hide the error that led to it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


def _write_through(path: Path, content: bytes, durable: bool = True) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    if os.name == "nt":  # Windows has no handle on a folder to flush; its rename is durable with the journal
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
