"""Nothing is lost, whatever happens to the process or the disk: crashes at every operation, power cuts, full and dying disks, rot.

Every harness is also shown a writer, or a disk, that must not pass. The large sizes run by `make faults`.
"""

import errno
import os
import random
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
from faults import Crashing, Failing, InPlace, Job, Outcome, Power, Watched

from sdlora import safeio, state
from sdlora.errors import BAD_INPUT, RESOURCES, UserError


def sizes(small: int, large: int) -> list[object]:
    return [small, pytest.param(large, marks=pytest.mark.large)]


def whole(job: Job, out: Path, disk: Watched) -> Outcome:
    outcome = faults.attempt(job, out, disk)
    assert outcome.digest
    return outcome


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the job comes to when nothing happens."""
    return whole(faults.job, tmp_path_factory.mktemp("reference") / "run", Watched()).digest


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: what fails here is simulated, and thousands of folders are made and removed."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def leftovers(out: Path) -> list[Path]:
    return list(out.rglob(f"{safeio.TEMPORARY}*"))


def last_saved_is_sound(out: Path, outcome: Outcome) -> bool:
    """A checkpoint that was said to be saved is there, and sound, unless a newer one is."""
    sound = [step for step in state.steps(out) if safeio.read_folder(state.folder(out, step)) is not None]
    return max(sound, default=0) >= max(outcome.saved, outcome.first or 0)


# ---------------------------------------------------------------- the process dies


def crash_points(job: Job, root: Path, disk: type[safeio.Disk]) -> tuple[list[int], int]:
    """The operations at which a crash keeps the resumed job from ending as if nothing had happened; and how many there are."""
    right = whole(job, root / "whole", Watched(disk())).digest
    failed, at = [], 0
    while True:
        at += 1
        out = root / str(at)
        crashed = faults.attempt(job, out, Crashing(at, disk()))
        if crashed.digest:
            return failed, at - 1
        try:
            resumed = faults.attempt(job, out, Watched(disk()))
            ends_well = resumed.digest == right and not leftovers(out)
        except Exception:  # noqa: BLE001  whatever it stumbles over
            ends_well = False
        failed += [] if ends_well else [at]
        shutil.rmtree(out)


def test_a_crash_at_any_operation_costs_nothing(folder: Path) -> None:
    failed, points = crash_points(faults.job, folder, faults.Quick)
    print(f"crash at every operation: {points} points, {len(failed)} ended otherwise")
    assert failed == []
    assert points > 120


def test_a_writer_in_place_is_convicted(folder: Path) -> None:
    failed, points = crash_points(faults.in_place, folder, InPlace)
    print(f"... writing in place, the control: {points} points, {len(failed)} ended otherwise")
    assert len(failed) >= points / 10


def test_a_crash_in_a_removal_leaves_no_part(folder: Path) -> None:
    at, crashed = 0, True
    while crashed:
        at += 1
        path = folder / str(at) / "ckpt-000001"
        safeio.write_folder(path, {"a": b"1", "b": b"2"})
        crashed = False
        try:
            with safeio.using(Crashing(at)):  # type: ignore[arg-type]
                safeio.remove(path)
        except faults.Crash:
            crashed = True
        assert not path.exists() or safeio.read_folder(path) is not None
        safeio.sweep(path.parent)
        assert leftovers(path.parent) == []
    assert at > 5
    assert not path.exists()


# ---------------------------------------------------------------- the power fails


def power_cuts(root: Path, trials: int, flushing: bool, right: str) -> Counter[str]:
    """How often what happened to a job whose power failed up to three times."""
    seen: Counter[str] = Counter()
    whole(faults.job, root / "run", counting := Watched())
    points = len(counting.calls)
    for trial in range(trials):
        chance = random.Random(trial)
        shutil.rmtree(root)
        root.mkdir()
        disk, saved = Power(root, flushing), 0
        for _ in range(chance.randint(1, 3)):
            disk.run(chance.randint(1, points))
            outcome = faults.attempt(faults.job, root / "run", disk)
            seen["fell back"] += fell_back(outcome, saved)
            saved = max(outcome.saved, saved if outcome.first is None else outcome.first)
            disk.fail(chance)
            seen["cuts"] += 1
        disk.run(0)
        outcome = faults.attempt(faults.job, root / "run", disk)
        seen["fell back"] += fell_back(outcome, saved)
        seen["ended otherwise"] += outcome.digest != right or bool(leftovers(root))
    return seen


def fell_back(outcome: Outcome, saved: int) -> bool:
    return outcome.first is not None and (outcome.first < saved or bool(outcome.damaged))


@pytest.mark.parametrize("trials", sizes(100, 2000))
@pytest.mark.slow
def test_a_power_cut_costs_nothing(trials: int, reference: str, folder: Path) -> None:
    seen = power_cuts(folder / "disk", trials, True, reference)
    print(f"power cuts: {trials} jobs, {dict(seen)}")
    assert seen["cuts"] >= trials
    assert seen["ended otherwise"] == 0
    assert seen["fell back"] == 0, "what was said to be saved is there"


@pytest.mark.parametrize("trials", sizes(100, 2000))
@pytest.mark.slow
def test_what_a_lying_disk_damages_is_noticed(trials: int, reference: str, folder: Path) -> None:
    seen = power_cuts(folder / "disk", trials, False, reference)
    print(f"... of a disk that does not flush: {trials} jobs, {dict(seen)}")
    assert seen["ended otherwise"] == 0, "the damage went unnoticed"
    assert seen["fell back"] >= trials / 10, "the control: without flushing there is damage"


# ---------------------------------------------------------------- the disk refuses

NUMBERS = {errno.ENOSPC: ("E-DISK-01", RESOURCES), errno.EIO: ("E-DISK-02", BAD_INPUT), errno.EROFS: ("E-DISK-02", BAD_INPUT)}


def told(out: Path, disk: Watched) -> tuple[Outcome, UserError | None]:
    """What a job comes to on a disk that refuses, and what its user is told."""
    outcome = Outcome()
    try:
        with safeio.using(disk):  # type: ignore[arg-type]
            faults.job(out, outcome)
    except UserError as error:
        return outcome, error
    return outcome, None


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("number", list(NUMBERS), ids=lambda number: errno.errorcode[number])
@pytest.mark.slow
def test_a_disk_that_refuses_costs_nothing(number: int, sticky: bool, reference: str, folder: Path) -> None:
    at, refused, out = 1, 0, folder / "run"
    while True:
        outcome, error = told(out, disk := Failing(at, number, sticky))
        assert last_saved_is_sound(out, outcome), at
        if len(disk.calls) < at:
            break
        assert error is None or (error.code, error.exit_code) == NUMBERS[number], at
        assert (error is None) == (outcome.digest == reference), "what it could not do is told, and nothing else"
        again = faults.attempt(faults.job, out, Watched())
        assert (again.first or 0) >= outcome.saved
        assert (again.digest, leftovers(out)) == (reference, []), at
        shutil.rmtree(out)
        at, refused = at + 1, refused + (error is not None)
    print(f"{errno.errorcode[number]}, {'sticky' if sticky else 'once'}: {at - 1} points, {refused} refusals, none ended otherwise")
    assert refused > at / 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 128 KiB, in memory."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", path], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_disk_that_is_really_full_costs_nothing(small_disk: Path, reference: str) -> None:
    ballast, out, codes = small_disk / "ballast", small_disk / "run", Counter[str]()
    for room in range(0, 120_000, 4096):
        ballast.write_bytes(bytes(120_000 - room))
        outcome, error = told(out, Watched(safeio.Disk()))
        codes[error.code if error else "none"] += 1
        assert outcome.digest == ("" if error else reference)
        assert last_saved_is_sound(out, outcome), room
        ballast.unlink()
        again = faults.attempt(faults.job, out, Watched())
        assert (again.digest, leftovers(out)) == (reference, []), room
        assert (again.first or 0) >= outcome.saved
        shutil.rmtree(out)
    print(f"a real full disk: {dict(codes)}")
    assert codes.keys() == {"E-DISK-01", "none"}, "it was full at times and not at others"


# ---------------------------------------------------------------- the disk forgets


@pytest.mark.parametrize("flips", sizes(50, 1000))
def test_every_flipped_bit_is_noticed(flips: int, folder: Path) -> None:
    out, chance, noticed = folder / "run", random.Random(0), 0
    whole(faults.job, out, Watched())
    files = sorted(path for path in (out / "checkpoints").rglob("*") if path.is_file())
    steps = state.steps(out)
    assert len(steps) == faults.KEEP
    bits = [8 * path.stat().st_size for path in files]
    for _ in range(flips):
        path = chance.choices(files, bits)[0]
        before = path.read_bytes()
        bit = chance.randrange(8 * len(before))
        damaged = bytearray(before)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert safeio.read_folder(path.parent) is None, (path.name, bit)
        found = state.restore(out, [faults.new_learner()], faults.STEPS)
        newest = path.parent == state.folder(out, steps[-1])
        assert found.progress.step == (steps[0] if newest else steps[1])
        for aside in found.damaged:
            aside.rename(path.parent)
        assert len(found.damaged) == newest
        path.write_bytes(before)
        noticed += 1
    print(f"flipped bits: {noticed} of {flips} noticed")
