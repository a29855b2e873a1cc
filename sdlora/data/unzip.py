"""Pictures in a ZIP: unpacked once into a folder named by the archive's content, and refused whole when any entry could do harm."""

import hashlib
import lzma
import re
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from unicodedata import normalize
from zipfile import ZipFile, ZipInfo

from sdlora import safeio
from sdlora.data.walk import shown
from sdlora.errors import UserError

DAMAGE = (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, ValueError, zlib.error, lzma.LZMAError)
LISTED = 10  # problems that one error names


@dataclass(frozen=True)
class Limits:
    """What an archive may hold; beyond it nothing is unpacked."""

    files: int = 200_000
    file_bytes: int = 2**29
    total_bytes: int = 2**36
    ratio: int = 100  # of unpacked size to the archive's own: pictures hardly exceed 1, bombs reach 1000 and more


DEFAULT = Limits()


def is_archive(path: Path) -> bool:
    return path.suffix.lower() == ".zip" and path.is_file()


def unzip(archive: Path, into: Path, limits: Limits = DEFAULT) -> Path:
    """The folder below `into` with the archive's files, unpacked if it is not there yet. Raises `UserError`."""
    try:
        with archive.open("rb") as file:
            folder = into / f"zip-{hashlib.file_digest(file, 'sha256').hexdigest()[:32]}"
            with ZipFile(file) as opened:
                _unpack(opened, archive, folder, limits)
    except DAMAGE as error:
        raise UserError("E-DATA-07", f"this ZIP cannot be read: {error}", archive, "make it anew, or name a folder") from None
    except OSError as error:
        raise UserError("E-DATA-07", f"this ZIP cannot be read: {error.strerror}", archive) from None
    return folder


def _unpack(opened: ZipFile, archive: Path, folder: Path, limits: Limits) -> None:
    entries = opened.infolist()
    wrong = problems(entries, archive.stat().st_size, limits)
    if wrong:
        more = f"; and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        what = f"nothing of this ZIP is unpacked: {shown('; '.join(wrong[:LISTED]))}{more}"
        raise UserError("E-DATA-07", what, archive, "make it anew without that, or unpack it yourself")
    files = {_name(entry): entry for entry in entries if not _is_folder(entry)}
    if not _is_whole(folder, files):
        if folder.exists():
            safeio.remove(folder)
        safeio.write_tree(folder, ((name, opened.read(entry)) for name, entry in files.items()))


def problems(entries: Sequence[ZipInfo], packed: int, limits: Limits) -> list[str]:
    """Why nothing of an archive of `packed` bytes may be unpacked."""
    return [*_sizes(entries, packed, limits), *_names(entries), *_kinds(entries)]


def _is_whole(folder: Path, files: dict[str, ZipInfo]) -> bool:
    try:
        return folder.is_dir() and all((folder / name).stat().st_size == entry.file_size for name, entry in files.items())
    except OSError:
        return False


def _sizes(entries: Sequence[ZipInfo], packed: int, limits: Limits) -> Iterator[str]:
    """What is too much. An entry unpacks to no more than its header says: reading stops there."""
    total = sum(entry.file_size for entry in entries)
    if len(entries) > limits.files:
        yield f"it has {len(entries)} entries, more than {limits.files}"
    if total > limits.total_bytes:
        yield f"it unpacks to {total} bytes, more than {limits.total_bytes}"
    if total > limits.ratio * packed:
        yield f"it unpacks to {total // packed} times its size, more than {limits.ratio} times"
    yield from (f"{entry.filename} has {entry.file_size} bytes" for entry in entries if entry.file_size > limits.file_bytes)


def _names(entries: Sequence[ZipInfo]) -> Iterator[str]:
    """Names that lead elsewhere, and names that some system takes for one."""
    for entry in entries:
        name = entry.orig_filename.replace("\\", "/")
        if "\0" in name or not _name(entry).strip("."):
            yield f"{name} is no file's name"
        elif name.startswith("/") or re.match("[A-Za-z]:", name):
            yield f"{name} is an absolute path"
        elif ".." in name.split("/"):
            yield f"{name} leads out of the folder"
    names = [_name(entry) for entry in entries]
    alike = Counter(map(_alike, names))
    for name, count in Counter(names).items():
        if count > 1:
            yield f"{name} is in it {count} times"
        elif alike[_alike(name)] > 1:
            yield f"{name} differs from another name only in case or Unicode form"
    files = {_alike(_name(entry)) for entry in entries if not _is_folder(entry)}
    inside = {_alike(parent.as_posix()) for name in names for parent in PurePosixPath(name).parents}
    yield from (f"{name} is both a file and a folder" for name in sorted(files & inside))


def _kinds(entries: Sequence[ZipInfo]) -> Iterator[str]:
    for entry in entries:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            yield f"{entry.filename} is {'a link' if kind == stat.S_IFLNK else 'no regular file'}"
        if entry.flag_bits & 0x1:
            yield f"{entry.filename} is encrypted"


def _is_folder(entry: ZipInfo) -> bool:
    return entry.filename.endswith(("/", "\\"))


def _name(entry: ZipInfo) -> str:
    return PurePosixPath(entry.filename.replace("\\", "/")).as_posix()


def _alike(name: str) -> str:
    return normalize("NFC", name).casefold()
