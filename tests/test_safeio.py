"""What is written is whole or not there, whichever step of the operating system fails; damage is noticed when it is read."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sdlora import safeio
from sdlora.errors import BAD_INPUT, RESOURCES, UserError

STEPS = ("open", "fsync", "replace")
OLD, NEW = b"old" * 50, b"new" * 4000
FILES = {"a.bin": bytes(range(16)), "b.json": b'{"step": 4}'}


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, at: int, number: int) -> Iterator[list[str]]:
    """Let the `at`-th call of any of the steps fail; gives the calls made."""
    calls: list[str] = []

    def breaking(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls.append(name)
            if len(calls) == at:
                raise OSError(number, os.strerror(number))
            return real(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, breaking(name, getattr(os, name)))
        yield calls


def faults(monkeypatch: pytest.MonkeyPatch, folder: Path, writer: Callable[[Path, bytes], None], number: int) -> list[str]:
    """What goes wrong when each step in turn fails while `writer` replaces a file."""
    found, at = [], 0
    exit_code = RESOURCES if number == errno.ENOSPC else BAD_INPUT
    while True:
        at += 1
        path = folder / f"{writer.__name__}-{number}-{at}" / "file"
        path.parent.mkdir(parents=True)
        path.write_bytes(OLD)
        with failing(monkeypatch, at, number) as calls:
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


def undurable(calls: list[str], files: int) -> list[str]:
    """What a power loss could take: contents are flushed before the name changes, and the folder that holds it after."""
    before, _, after = " ".join(calls).partition("replace")
    found = [] if before.split().count("fsync") >= files else ["contents are not flushed before the rename"]
    return found if "fsync" in after else [*found, "the rename is not flushed"]


def test_what_is_written_outlives_a_power_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with failing(monkeypatch, 0, 0) as calls:
        safeio.write(tmp_path / "file", NEW)
    assert undurable(calls, 1) == []
    with failing(monkeypatch, 0, 0) as calls:
        safeio.write_folder(tmp_path / "folder", FILES)
    assert undurable(calls, len(FILES) + 2) == [], "the files, their manifest and the folder that lists them"
    with failing(monkeypatch, 0, 0) as calls:
        naive(tmp_path / "file", OLD)
    assert undurable(calls, 1), "the control"


def naive(path: Path, content: bytes) -> None:
    """How not to write a file."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_TRUNC)
        try:
            os.write(handle, content[: len(content) // 2])
            os.fsync(handle)
            os.write(handle, content[len(content) // 2 :])
        finally:
            os.close(handle)
    except OSError as error:
        raise safeio.refused(error, path) from error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_file_is_whole_whichever_step_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int) -> None:
    assert faults(monkeypatch, tmp_path, safeio.write, number) == []


def test_the_harness_convicts_a_naive_writer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert faults(monkeypatch, tmp_path, naive, errno.ENOSPC)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_folder_is_whole_whichever_step_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int) -> None:
    at, calls = 0, ["none yet"]
    while at < len(calls):
        at += 1
        path = tmp_path / str(at) / "folder"
        with failing(monkeypatch, at, number) as calls:
            error = refusal(path)
        if error is None:
            break
        assert error.exit_code == (RESOURCES if number == errno.ENOSPC else BAD_INPUT)
        if path.exists():  # only the flush after the rename failed
            assert "replace" in calls[: at - 1]
            assert safeio.read_folder(path) == FILES
        assert [other for other in path.parent.iterdir() if other != path] == []
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
