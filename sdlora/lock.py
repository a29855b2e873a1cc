"""One run folder, one process: a lock that the system itself frees when its holder dies, however that comes about."""

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdlora import safeio
from sdlora.errors import UserError

NAME = "lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}
"""What disks answer that cannot lock at all, as some network disks."""
ATTEMPTS, LOOKS, LOOK_S = 100, 10, 0.02
"""Times that a name is tried which others make and take away; and times, and seconds between, that a lock is tried: whoever only asks who
holds it holds it himself for a moment."""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[str]:
    """Hold a run folder, which is made if need be; yields what is to be said where the disk knows no locks, else "".

    Raises `UserError` when another process holds it. Folders that were made only for the lock go with it.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        handle = _take(folder / NAME)
    except OSError as error:
        raise safeio.refused(error, folder) from None
    try:
        yield "" if handle is not None else f"{folder} is on a disk without locks: start no second run there while this one goes on"
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                (folder / NAME).unlink()
            os.close(handle)
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()  # which it can be only while it is empty


def holder(folder: Path) -> dict[str, Any] | None:
    """Who holds a run folder: {"pid": ..., "since": seconds since 1970}, as far as it is known; None: nobody."""
    try:
        handle = os.open(folder / NAME, os.O_RDWR)
    except OSError:
        return None
    try:
        return None if _lock(handle) else _said(folder / NAME)
    except OSError:
        return None
    finally:
        os.close(handle)


def _take(path: Path) -> int | None:
    """An open handle on the locked file; None where the disk has no locks."""
    looks = 0
    for attempt in range(ATTEMPTS):
        try:
            safeio.make_folders(path.parent)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except (FileNotFoundError, FileExistsError):  # another holder is just taking away the folder that it had made for its lock
            if attempt == ATTEMPTS - 1:
                raise
            continue
        try:
            free = _lock(handle)
        except OSError as error:
            os.close(handle)
            if error.errno in NO_LOCKS:
                return None
            raise
        if free and _is_still(path, handle):
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps({"pid": os.getpid(), "since": round(time.time())}).encode())
            return handle
        os.close(handle)
        if not free:
            looks += 1
            if looks == LOOKS:
                break
            time.sleep(LOOK_S)
        # else its last holder took the file away between our opening and our locking it
    raise _in_use(path)


def _lock(handle: int) -> bool:
    """Lock an open file for this process; false when another one has it."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


def _is_still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _said(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _in_use(path: Path) -> UserError:
    said = _said(path)
    who = f" by process {said['pid']}" if "pid" in said else ""
    when = time.strftime(" since %H:%M", time.localtime(said["since"])) if isinstance(said.get("since"), int) else ""
    return UserError(
        "E-RUN-05", f"another run is working in this folder{who}{when}", path.parent, "wait for it, or name another with --out"
    )
