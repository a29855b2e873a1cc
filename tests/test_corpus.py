"""Every case of bad and odd input comes to what it must, in little memory, without a traceback, and the file stays as it was."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import corpus
import numpy as np
import pytest
from corpus import Case, FolderCase
from PIL import Image

from sdlora.data import pixels, reasons, scan
from sdlora.data.pixels import UnreadableError
from sdlora.data.walk import SUFFIXES, Found, walk
from sdlora.errors import UserError

IMAGES, FOLDERS = corpus.images(), corpus.folders()
LIMIT_BYTES = 10**9
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:Corrupt EXIF")


def codes(found: Found) -> tuple[str, ...]:
    """What is noted of a file by its place and, if it can be one, as a picture."""
    if reasons.fate(found.notes) == "left_out" or found.path.suffix.lower() not in SUFFIXES:
        return found.notes
    try:
        return (*found.notes, *pixels.decode(found.path).notes)
    except UnreadableError as error:
        return (*found.notes, error.code)


def state(folder: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """All that must not change: of each file its kind, time, size and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else b""
        found[str(path)] = status.st_mode, status.st_mtime_ns, status.st_size, content
    return found


@pytest.mark.parametrize("case", IMAGES, ids=lambda case: f"{case.number} {case.what}")
def test_a_picture_comes_to_what_it_must(case: Case, tmp_path: Path) -> None:
    for name, content in case.files().items():
        (tmp_path / name).write_bytes(content)
    before = state(tmp_path)
    listed = walk(tmp_path)
    assert listed
    for found in listed:
        assert codes(found) == case.codes, found.path.name
        assert reasons.fate(case.codes) == case.fate
        if case.meant:
            read = pixels.read_picture(found.path)
            assert (read.mode, read.size) == ("RGB", (corpus.WIDTH, corpus.HEIGHT))
            away = np.abs(np.asarray(read, float) - np.asarray(case.meant(), float)).mean()
            assert away <= case.near, f"{found.path.name} is {away:.1f} levels away"
    if case.fate == "left_out":
        with pytest.raises(UserError, match="E-DATA-03") as caught:
            scan.scan(tmp_path, skip_unreadable=False)
        assert all(found.path.name in str(caught.value) for found in listed)
    else:
        assert len(scan.scan(tmp_path, skip_unreadable=False).used) == len(listed)
    assert state(tmp_path) == before


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder that other users reach too: pytest's own are for its user alone."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("case", FOLDERS, ids=lambda case: f"{case.number} {case.what}")
def test_a_folder_comes_to_what_it_must(case: FolderCase, open_place: Path) -> None:
    folder = open_place / "pictures"
    folder.mkdir()
    case.build(folder)
    before = state(open_place)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # who may do everything is refused nothing
    try:
        if isinstance(case.wanted, str):
            with pytest.raises(UserError, match=case.wanted):
                scan.scan(folder, skip_unreadable=True)
        else:
            assert {str(found.path.relative_to(folder)): codes(found) for found in walk(folder)} == case.wanted
            account_for(folder, {name for name in case.wanted if Path(name).suffix.lower() in SUFFIXES}, case)
    finally:
        if root:
            os.seteuid(0)
    assert state(open_place) == before


def account_for(folder: Path, pictures: set[str], case: FolderCase) -> None:
    """A scan names every picture, and leaves out those that it must."""
    account = scan.scan(folder, skip_unreadable=True)
    used = {str(item.path.relative_to(folder)) for item in account.used}
    left_out = {str(out.path.relative_to(folder)) for out in account.left_out}
    assert used | left_out == pictures
    assert not used & left_out
    assert left_out >= {name for name in pictures if reasons.fate(case.wanted[name]) == "left_out"}  # type: ignore[index]
    assert all(str(out.why) for out in account.left_out)


def test_all_cases_are_there_and_all_codes_are_explained(tmp_path: Path) -> None:
    left = {65}  # a file that changes during a run
    assert {case.number for case in [*IMAGES, *FOLDERS]} == set(range(1, 67)) - left
    used = {code for case in IMAGES for code in case.codes}
    used |= {code for case in FOLDERS if not isinstance(case.wanted, str) for listed in case.wanted.values() for code in listed}
    assert used <= reasons.REASONS.keys()
    corpus.make(tmp_path / "corpus")
    assert len(list((tmp_path / "corpus").iterdir())) == len(IMAGES) + len(FOLDERS)


# ---------------------------------------------------------------- what the guards guard against

MEASURE = """
import json, sys, warnings
from pathlib import Path
from PIL import Image
from sdlora.data import pixels
warnings.simplefilter("ignore")
def peak():  # of this program: getrusage's goes on from the one that started it
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
before, codes = peak(), {}
for path in sorted(Path(sys.argv[2]).rglob("*")):
    try:
        if sys.argv[1] == "ours":
            pixels.decode(path)
        else:
            Image.open(path).load()
    except pixels.UnreadableError as error:
        codes[path.name] = error.code
print(json.dumps([peak() - before, codes]))
"""


def growth(who: str, folder: Path) -> tuple[int, dict[str, str]]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", MEASURE, who, str(folder)], capture_output=True, check=True, env=environment)
    grown, found = json.loads(done.stdout)
    return grown, found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_bombs_take_no_memory(tmp_path: Path) -> None:
    for case in IMAGES:
        if case.number in (42, 43, 44):
            for name, content in case.files().items():
                (tmp_path / f"{case.number} {name}").write_bytes(content)
    grown, found = growth("ours", tmp_path)
    assert len(found) == 5
    assert grown < 50e6 < LIMIT_BYTES
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "a.png").write_bytes(corpus.bomb())
    assert growth("Pillow", tmp_path / "control")[0] > 150e6, "Pillow alone takes it for a picture"


def test_pillow_alone_would_be_wrong(tmp_path: Path) -> None:
    """The control: without this code the same files come out as other pictures."""
    wrong = {24: 100, 26: 100, 31: 80, 29: 30, 18: 20, 32: 3, 22: 50}
    for case in IMAGES:
        if case.number not in wrong or case.meant is None or "not-finite" in case.codes:
            continue
        worst = 0.0
        for name, content in case.files().items():
            (tmp_path / name).write_bytes(content)
            with Image.open(tmp_path / name) as opened:
                read = np.asarray(opened.convert("RGB"), float)
            meant = np.asarray(case.meant(), float)
            worst = max(worst, np.abs(read - meant).mean() if read.shape == meant.shape else 255)
        assert worst > wrong[case.number], case.what


def test_a_check_of_half_the_file_would_pass_a_cut_jpeg(tmp_path: Path) -> None:
    (case,) = (case for case in IMAGES if case.number == 8)
    (tmp_path / "a.jpg").write_bytes(case.files()["a.jpg"])
    with Image.open(tmp_path / "a.jpg") as opened:
        opened.verify()
    assert codes(Found(tmp_path / "a.jpg")) == ("damaged",)
