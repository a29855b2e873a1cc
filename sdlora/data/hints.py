"""What a look at a file showed, kept by the file's state on the disk: a file that nobody touched is not decoded to be looked at again.

That state is a hint and no proof: Windows, for one, does not tell when a file was changed whose time was set back. Latents are named by the
pixels themselves, and `cache` finds out a picture that is not what was seen.
"""

import dataclasses
import hashlib
import inspect
import json
import os
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import PIL
from PIL import features

from sdlora.data import colours, exif, fingerprints, looks, pixels, walk
from sdlora.data.looks import Look, look
from sdlora.data.pixels import decode
from sdlora.data.store import Store

SETTLED_NS = 2_000_000_000
"""The coarsest clock of a file system in use (FAT's): a younger file could change again without a trace."""


@dataclass(frozen=True)
class Seen:
    look: Look
    notes: tuple[str, ...]  # codes of `sdlora.data.reasons`
    transparent: bool  # somewhere


def see(path: Path, store: Store) -> Seen:
    """What decoding a picture shows. Raises `UnreadableError`."""
    name = _name(path)
    kept = store.get(name) if name else None
    if kept is not None:
        table = json.loads(kept)
        return Seen(Look(**table["look"]), tuple(table["notes"]), table["transparent"])
    decoded = decode(path)
    seen = Seen(look(decoded.picture), decoded.notes, decoded.alpha is not None)
    if name and name == _name(path):  # else it changed as it was read
        store.put(name, json.dumps(dataclasses.asdict(seen)).encode())
    return seen


def forget(path: Path, store: Store) -> None:
    """Have a file looked at again."""
    name = _name(path)
    if name:
        store.drop(name)


def _name(path: Path) -> str | None:
    """An entry's name, from the file's state and from what looks at it; None of a file whose state says nothing yet."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < SETTLED_NS:
        return None
    digest = hashlib.blake2b(os.fsencode(path.absolute()), digest_size=20)
    state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)  # ctime no program sets back, but on Windows
    digest.update(f"\0{state} {_looker()}".encode())
    return f"{digest.hexdigest()}.look"


@lru_cache
def _looker() -> str:
    """A hash of the code that decodes and measures, ours and Pillow's version: another one may see something else."""
    digest = hashlib.blake2b(f"{PIL.__version__} {features.version('libjpeg_turbo')}".encode(), digest_size=20)
    for module in (colours, exif, fingerprints, looks, pixels, walk):
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()
