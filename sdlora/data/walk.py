"""Every file below a folder, in one order, and what is odd about it; nothing is opened, and no link is followed in a circle."""

import errno
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from unicodedata import category, normalize

from sdlora.errors import UserError

FORMATS: Mapping[str, str] = MappingProxyType(
    {
        ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP",
        ".tif": "TIFF", ".tiff": "TIFF", ".gif": "GIF", ".avif": "AVIF",
    }
)  # fmt: skip
"""The formats that are read, by how their files' names end."""
SUFFIXES = frozenset(FORMATS)
IGNORED = frozenset({"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir"})
"""What operating systems and network drives leave in folders, in lower case; names that start with a dot are ignored too."""


@dataclass(frozen=True)
class Found:
    """One thing below a folder; the notes are codes of `sdlora.data.reasons`."""

    path: Path
    notes: tuple[str, ...] = ()

    def noting(self, *codes: str) -> "Found":
        return replace(self, notes=tuple(dict.fromkeys([*self.notes, *codes])))


def walk(root: Path) -> list[Found]:
    """All files below `root` that are not hidden, sorted, and with a note all that cannot be a file: pipes, dead links, folders.

    Links are followed, each folder is read once. Raises `UserError` when `root` itself cannot be listed.
    """
    top = _top(root)
    seen = {_identity(folder) for folder in top.parents}  # a link to a folder around this one would read half the disk
    found: list[Found] = []
    folders, links = [Found(root)], list[Found]()
    while folders or links:  # real folders first, so that what two paths reach goes by its own name
        folder = folders.pop() if folders else links.pop(0)
        try:
            identity = _identity(folder.path)
            entries = [] if identity in seen else _entries(folder.path)
        except OSError:
            found.append(folder.noting("folder-not-readable"))
            continue
        if identity in seen:
            found.append(folder.noting("folder-seen-before"))
        seen.add(identity)
        files = []
        for entry in entries:
            one = Found(folder.path / entry.name, folder.notes)
            kind, *notes = _look(entry, top)
            one = one.noting(*notes)
            if kind == "folder":
                (links if entry.is_symlink() else folders).append(one)
            if kind == "file":
                files.append(one)
            elif kind == "lost":
                found.append(one)
            elif kind == "other" or one.path.suffix.lower() in SUFFIXES:  # a folder that is named as a picture is accounted for as one
                found.append(one.noting("not-a-file"))
        found += _twins(files)
    return sorted(found, key=lambda one: [os.fsencode(part) for part in one.path.parts])


def shown(name: str | Path) -> str:
    """A file's name as it can be printed and written as UTF-8: what cannot be shown is escaped."""
    return "".join(c if _can_be_shown(c) else c.encode("unicode_escape", "surrogatepass").decode() for c in str(name))


def _top(root: Path) -> Path:
    try:
        _entries(root)
    except (OSError, ValueError) as error:
        kinds: dict[type[Exception], str] = {FileNotFoundError: "no such folder", NotADirectoryError: "not a folder"}
        what = kinds.get(type(error)) or f"this folder cannot be listed ({getattr(error, 'strerror', None) or error})"
        raise UserError("E-DATA-01", f"{what}; pictures are needed to train on", root, "name the folder that holds them") from None
    return Path(os.path.realpath(root))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".") and entry.name.lower() not in IGNORED]


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _look(entry: os.DirEntry[str], top: Path) -> tuple[str, ...]:
    """What an entry is (file, folder, lost or other), and notes on it; by the file system's word, for opening a pipe waits for ever."""
    notes = [] if all(map(_can_be_shown, entry.name)) else ["odd-name"]
    try:
        if entry.is_symlink():
            os.stat(entry.path)
            if not Path(os.path.realpath(entry.path)).is_relative_to(top):
                notes.append("link-outside")
    except OSError as error:
        lost = {errno.ELOOP: "link-loop", errno.EACCES: "no-permission"}
        return "lost", *notes, lost.get(error.errno or 0, "dangling-link")
    return "folder" if entry.is_dir() else "file" if entry.is_file() else "other", *notes


def _can_be_shown(character: str) -> bool:
    kind = category(character)
    return kind[0] != "C" and kind not in ("Zl", "Zp")


def _twins(files: Sequence[Found]) -> list[Found]:
    """Files of one folder, with a note on pictures whose names some systems or readers take for one."""
    names = [normalize("NFC", one.path.name) for one in files]
    same = Counter(names)
    alike = Counter(name.casefold() for name in names)
    stems = Counter(normalize("NFC", one.path.stem) for one in files if _is_picture(one))
    noted = []
    for one, name in zip(files, names, strict=True):
        codes = []
        if _is_picture(one):
            codes += ["unicode-twin"] * (same[name] > 1)
            codes += ["case-twin"] * (alike[name.casefold()] > same[name])
            codes += ["same-stem"] * (stems[normalize("NFC", one.path.stem)] > same[name])
        noted.append(one.noting(*codes))
    return noted


def _is_picture(one: Found) -> bool:
    return one.path.suffix.lower() in SUFFIXES
