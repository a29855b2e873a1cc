"""What is written is whole or not there, whichever step of the operating system fails; damage is noticed when it is read."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faults import Failing

from sdlora import safeio
from sdlora.errors import BAD_INPUT, RESOURCES, UserError
from sdlora.safeio import Disk

OLD, NEW = b"old" * 50, b"new" * 4000
FILES = {"a.bin": bytes(range(16)), "b.json": b'{"step": 4}'}


@contextmanager
def failing(at: int, number: int) -> Iterator[list[str]]:
    """Let the `at`-th operation fail (0: none); gives the operations begun."""
    disk = Failing(at, number, real=Disk())
    with safeio.using(disk):  # type: ignore[arg-type]
        yield disk.calls


def faults(folder: Path, writer: Callable[[Path, bytes], None], number: int) -> list[str]:
    """What goes wrong when each step in turn fails while `writer` replaces a file."""
    found, at = [], 0
    exit_code = RESOURCES if number == errno.ENOSPC else BAD_INPUT
    while True:
        at += 1
        path = folder / f"{writer.__name__}-{number}-{at}" / "file"
        path.parent.mkdir(parents=True)
        path.write_bytes(OLD)
        with failing(at, number) as calls:
            try:
                writer(path, NEW)
                failed = False
            except UserError as error:
                failed = True
                if error.exit_code != exit_code:
                    found.append(f"step {at} ({calls[at - 1]}): exit code {error.exit_code}")
        if len(calls) < at:  # more steps than there are
            return found if path.read_bytes() == NEW else [*found, "not written at all"]
        replaced = "replace" in calls[: at - 1]
        if not failed:
            found.append(f"step {at} ({calls[at - 1]}): its failure was not told")
        if path.read_bytes() != (NEW if replaced else OLD):
            found.append(f"step {at} ({calls[at - 1]}): {len(path.read_bytes())} bytes")
        found += [f"step {at}: left {other.name}" for other in path.parent.iterdir() if other != path]


def undurable(calls: list[str], files: int, folders: int = 0) -> list[str]:
    """What a power loss could take: contents are flushed before the name changes, and the folder that holds it after."""
    before, after = calls[: calls.index("replace")], calls[calls.index("replace") :]
    found = [] if before.count("sync") >= files else ["contents are not flushed before the rename"]
    found += [] if before.count("sync_folder") >= folders else ["the names within are not flushed before the rename"]
    return found if "sync_folder" in after else [*found, "the rename is not flushed"]


def test_what_is_written_outlives_a_power_loss(tmp_path: Path) -> None:
    with failing(0, 0) as calls:
        safeio.write(tmp_path / "file", NEW)
    assert undurable(calls, 1) == []
    with failing(0, 0) as calls:
        safeio.write_folder(tmp_path / "folder", FILES)
    assert undurable(calls, len(FILES) + 1, 1) == [], "the files, their manifest and the folder that lists them"
    with failing(0, 0) as calls:
        safeio.write(tmp_path / "above" / "below" / "file", NEW)
    assert undurable(calls, 1, 2) == [], "and the folders that were made for it"
    assert undurable(["create", "write", "replace"], 1), "the control"


def test_a_line_after_a_torn_one_stands_alone(tmp_path: Path) -> None:
    for line in ("one", "two"):
        safeio.append_line(tmp_path / "log", line)
    with (tmp_path / "log").open("ab") as log:
        log.write(b"thr")
    safeio.append_line(tmp_path / "log", "four")
    assert (tmp_path / "log").read_text().split("\n") == ["one", "two", "thr", "four", ""]


def naive(path: Path, content: bytes) -> None:
    """How not to write a file."""
    disk = safeio.DISK.get()
    try:
        with path.open("wb") as file:
            disk.write(file, content[: len(content) // 2])
            disk.write(file, content[len(content) // 2 :])
            disk.sync(file)
    except OSError as error:
        raise safeio.refused(error, path) from error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_file_is_whole_whichever_step_fails(tmp_path: Path, number: int) -> None:
    assert faults(tmp_path, safeio.write, number) == []


def test_the_harness_convicts_a_naive_writer(tmp_path: Path) -> None:
    assert faults(tmp_path, naive, errno.ENOSPC)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_folder_is_whole_whichever_step_fails(tmp_path: Path, number: int) -> None:
    at = 0
    while True:
        at += 1
        path = tmp_path / str(at) / "folder"
        with failing(at, number) as calls:
            error = refusal(path)
        if error is None:
            break
        assert error.exit_code == (RESOURCES if number == errno.ENOSPC else BAD_INPUT)
        if path.exists():  # only the flush after the rename failed
            assert "replace" in calls[: at - 1]
            assert safeio.read_folder(path) == FILES
        assert [other for other in tmp_path.glob(f"{at}/*") if other != path] == []
    assert at > 6, "a folder of three files takes more steps than these"
    assert safeio.read_folder(path) == FILES


def refusal(path: Path) -> UserError | None:
    try:
        safeio.write_folder(path, FILES)
    except UserError as error:
        return error
    return None


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """Let the operating system itself refuse longer files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_stops_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    with files_at_most(len(NEW) // 2), pytest.raises(UserError):
        safeio.write(path, NEW)
    assert path.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["file"]
    with files_at_most(len(NEW) // 2), pytest.raises(OSError, match="too large"):
        path.write_bytes(NEW)
    assert path.read_bytes() != OLD, "the control: writing in place loses the old file"


def test_a_folder_is_read_as_it_was_written_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    safeio.write_folder(path, FILES)
    assert safeio.read_folder(path) == FILES
    for name in (*FILES, "manifest.json"):
        content = (path / name).read_bytes()
        for bit in range(0, 8 * len(content), 3):  # every byte at two or three of its bits
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            (path / name).write_bytes(damaged)
            read = safeio.read_folder(path)
            assert read is None or (name == "manifest.json" and read == FILES), (name, bit)
        (path / name).write_bytes(content[:-1])
        assert safeio.read_folder(path) is None, f"{name} cut short"
        (path / name).unlink()
        assert safeio.read_folder(path) is None, f"{name} missing"
        (path / name).write_bytes(content)
    assert safeio.read_folder(path) == FILES


def test_a_folder_is_not_written_over_another(tmp_path: Path) -> None:
    safeio.write_folder(tmp_path / "folder", FILES)
    with pytest.raises(UserError):
        safeio.write_folder(tmp_path / "folder", {"a.bin": b"other"})
    assert safeio.read_folder(tmp_path / "folder") == FILES


def test_sweeping_takes_only_what_killed_writers_left(tmp_path: Path) -> None:
    (tmp_path / f"{safeio.TEMPORARY}123-file").write_bytes(b"half")
    (tmp_path / f"{safeio.TEMPORARY}123-folder").mkdir()
    (tmp_path / f"{safeio.TEMPORARY}123-folder" / "part").write_bytes(b"half")
    (tmp_path / "kept").write_bytes(b"whole")
    safeio.sweep(tmp_path)
    assert os.listdir(tmp_path) == ["kept"]


@pytest.mark.parametrize("writer", [safeio.write, safeio.append_line])
def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path: Path, writer: Callable[[Path, str], None]) -> None:
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(UserError, match="E-DISK-02") as caught:
        writer(tmp_path / "file" / "below", "x")
    assert caught.value.exit_code == BAD_INPUT
    assert os.listdir(tmp_path) == ["file"]
