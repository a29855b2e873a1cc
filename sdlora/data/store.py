"""What was computed once is kept for all runs of a user: entries go by what they were made of, and those not used for longest go first."""

import contextlib
import hashlib
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from sdlora import safeio
from sdlora.errors import UserError
from sdlora.processes import ALONE, Processes

PLACE, LIMIT = "SDLORA_CACHE", "SDLORA_CACHE_GB"
USUAL_GB = 20.0
TRIMMED_SHARE = 0.9
"""Of the limit is left when it was exceeded, so that not every further entry means looking through all."""
ABANDONED_S = 86_400.0
"""A half-written file of this age is nobody's any more; another process may be writing a younger one."""
CHECKSUM_BYTES = 32


class Store:
    """A folder of entries that several processes may use at once; without a folder nothing is kept.

    An entry never changes. It begins with a checksum over its name and content, so that one that is torn, damaged or misnamed is none.
    """

    def __init__(
        self, folder: Path | None = None, limit_bytes: float = USUAL_GB * 1e9, note: str = "", processes: Processes = ALONE
    ) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self.note = note  # what the user should know of it: why it is not the usual one, or keeps no more
        self.processes = processes  # those that share what is to be computed
        self._closed = False
        self._bytes: float | None = None  # in the folder, as far as this process knows
        self._counting = threading.Lock()

    def get(self, name: str) -> bytes | None:
        """The content of an entry, or None where there is none."""
        if self.folder is None:
            return None
        path = self.folder / name
        try:
            entry = path.read_bytes()
        except OSError:
            return None
        content = entry[CHECKSUM_BYTES:]
        if entry[:CHECKSUM_BYTES] != _checksum(name, content):
            return None
        with contextlib.suppress(OSError):
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # when it was used last, which many systems do not write down
        return content

    def put(self, name: str, content: bytes) -> None:
        """Keep an entry; a disk that refuses ends the keeping, which `note` then says, and nothing else."""
        if self.folder is None or self._closed:
            return
        try:
            safeio.write(self.folder / name, _checksum(name, content) + content, durable=False)
        except UserError as error:
            if self.get(name) != content:  # else another process was faster
                self._closed, self.note = True, f"nothing more is kept in the cache: {error}"
            return
        with self._counting:
            self._bytes = self._sum() if self._bytes is None else self._bytes + CHECKSUM_BYTES + len(content)
            if self._bytes > self.limit_bytes:
                self._bytes = self._trimmed()

    def drop(self, name: str) -> None:
        """Take an entry away if it is there."""
        if self.folder is not None:
            with contextlib.suppress(OSError):
                (self.folder / name).unlink(missing_ok=True)

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of last use, bytes and path of all files of the folder; what lies in folders inside it is not the store's."""
        assert self.folder is not None
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # another process took it away
                    if entry.is_file(follow_symlinks=False):
                        found.append((entry.stat().st_atime, entry.stat().st_size, Path(entry.path)))
        return found

    def _sum(self) -> float:
        return sum(size for _, size, _ in self._files())

    def _trimmed(self) -> float:
        """Remove what was not used for longest until the limit is kept; the bytes that are left."""
        left, abandoned = 0.0, time.time() - ABANDONED_S
        for used, size, path in sorted(self._files(), reverse=True):
            half_written = path.name.startswith(safeio.TEMPORARY)
            if used < abandoned if half_written else left + size > TRIMMED_SHARE * self.limit_bytes:
                self.drop(path.name)
            else:
                left += size
        return left


def usual(fallback: Path | None = None, processes: Processes = ALONE) -> Store:
    """The user's own store. Where it cannot be written to, one in the folder `fallback`, or one that keeps nothing; its note says so."""
    limit = _limit_bytes(os.environ)
    if limit == 0:
        return Store(processes=processes)
    try:
        folder = place(os.environ)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what it holds tells of the user's pictures
        with tempfile.TemporaryFile(dir=folder):
            return Store(folder, limit, processes=processes)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        kept = f"what is computed is kept in {fallback} for this run alone" if fallback else "nothing that is computed is kept"
        return Store(fallback, limit, f"the cache folder cannot be used ({error}); {kept}; name another folder with {PLACE}", processes)


def place(environment: Mapping[str, str], platform: str = sys.platform) -> Path:
    """Where a user's caches belong. Raises `RuntimeError` where the user has no home."""
    if environment.get(PLACE):
        return Path(environment[PLACE]).absolute()
    given = environment.get("LOCALAPPDATA" if platform == "win32" else "XDG_CACHE_HOME", "")
    if Path(given).is_absolute():  # others are to be ignored (XDG Base Directory Specification)
        return Path(given) / "sdlora"
    return Path.home() / (Path("AppData") / "Local" if platform == "win32" else Path(".cache")) / "sdlora"


def _limit_bytes(environment: Mapping[str, str]) -> float:
    given = environment.get(LIMIT) or str(USUAL_GB)
    try:
        limit = float(given)
    except ValueError:
        limit = math.nan
    if not 0 <= limit < math.inf:
        raise UserError(
            "E-CONF-09", f'"{given}" is no number of gigabytes', LIMIT, f"give one, 0 to keep nothing, or unset it for {USUAL_GB:g}"
        )
    return limit * 1e9


def _checksum(name: str, content: bytes) -> bytes:
    digest = hashlib.blake2b(f"{name}\0".encode(), digest_size=CHECKSUM_BYTES)
    digest.update(content)
    return digest.digest()
