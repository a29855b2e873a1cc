"""The command line: it does the whole job, and whatever it is given wrong is one line, an exit code, and nothing half-written."""

import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import small
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from sdlora import config, terminal
from sdlora.cli import app
from sdlora.errors import BAD_INPUT
from sdlora.packs import file


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def complaint(result: Result) -> list[str]:
    """What is wrong with the way in which an error was told."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    found = [] if result.exit_code == BAD_INPUT else [f"exit code {result.exit_code}"]
    if len(errors) != 1 or lines[-1:] != errors:
        return [*found, f"not one line that says error: {result.output}"]
    if not re.fullmatch(r"error: E-[A-Z]+-\d\d · .+ · .+", errors[0]):
        found.append(f"not of the form CODE · what · where: {errors[0]}")
    return [*found, *(["a traceback"] if "Traceback" in result.output else [])]


TRAIN = ["--set", "train.steps=2", "--set", "train.batch_size=2", "--set", "train.precision=fp32", "--set", "preview.steps=1"]
TRAIN += ["--set", "preview.scales=[0.0, 1.0]", "--set", "data.resolution_px=32", "--set", "adapter.rank=2"]

Arguments = Callable[[Path, Path, Path, Path], list[object]]  # (working folder, pictures, base, pack) -> arguments
WRONG: dict[str, Arguments] = {
    "train: no folder": lambda _, __, base, ___: ["train", "nowhere", "--base", base],
    "train: nothing named": lambda *_: ["train"],
    "train: no folder but a name": lambda _, __, base, ___: ["train", "--name", "mira", "--base", base],
    "train: empty folder": lambda here, _, base, __: ["train", here / "empty", "--base", base],
    "train: a file": lambda here, _, base, __: ["train", here / "file.txt", "--base", base],
    "train: not a model": lambda here, folder, *_: ["train", folder, "--base", here / "empty"],
    "train: no base": lambda _, folder, *__: ["train", folder, "--base", "no-such-base"],
    "train: broken model": lambda here, folder, *_: ["train", folder, "--base", here / "broken"],
    "train: unknown setting": lambda _, folder, base, __: ["train", folder, "--base", base, "--set", "train.stepz=3"],
    "train: no assignment": lambda _, folder, base, __: ["train", folder, "--base", base, "--set", "train.steps"],
    "train: unknown kind": lambda _, folder, base, __: ["train", folder, "--base", base, "--kind", "person"],
    "train: no settings file": lambda _, folder, base, __: ["train", folder, "--base", base, "--config", "no.toml"],
    "train: bad name": lambda _, folder, base, __: ["train", folder, "--base", base, "--name", "a:b"],
    "train: no such layer": lambda _, folder, base, __: ["train", folder, "--base", base, "--set", "adapter.targets=['nothing']"],
    "train: table for a value": lambda _, folder, base, __: ["train", folder, "--base", base, "--set", "data=3"],
    "train: fp16 without a GPU": lambda _, folder, base, __: ["train", folder, "--base", base, "--set", "train.precision=fp16"],
    "train: --out is a file": lambda here, folder, base, _: ["train", folder, "--base", base, "--out", here / "file.txt"],
    "train: --out below a file": lambda here, folder, base, _: ["train", folder, "--base", base, "--out", here / "file.txt" / "run"],
    "train: --out holds other things": lambda here, folder, base, _: ["train", folder, "--base", base, "--out", here / "empty" / ".."],
    "resume: no run": lambda here, *_: ["resume", here / "empty"],
    "resume: no folder": lambda *_: ["resume", "nowhere"],
    "generate: not a pack": lambda here, _, base, __: ["generate", here / "file.txt", "--base", base],
    "generate: no pack": lambda _, __, base, ___: ["generate", "no.safetensors", "--base", base],
    "generate: a folder": lambda here, _, base, __: ["generate", here / "empty", "--base", base],
    "generate: another base's pack": lambda *a: ["generate", a[3], "--base", "tiny"],
    "generate: scale is no number": lambda *a: ["generate", a[3], "--base", a[2], "--scale", "abc"],
    "generate: own scale is no number": lambda *a: ["generate", f"{a[3]}:abc", "--base", a[2]],
    "generate: scale too large": lambda *a: ["generate", a[3], "--base", a[2], "--scale", "9"],
    "generate: no size": lambda _, __, base, ___: ["generate", "--base", base, "--size", "big"],
    "generate: size of another grid": lambda _, __, base, ___: ["generate", "--base", base, "--size", "33x32"],
    "generate: no steps": lambda _, __, base, ___: ["generate", "--base", base, "--steps", "0"],
    "generate: --out not .png": lambda _, __, base, ___: ["generate", "--base", base, "--steps", "1", "--out", "a.jpg"],
    "generate: --out below a file": lambda _, __, base, ___: ["generate", "--base", base, "--steps", "1", "--out", "file.txt/a.png"],
    "generate: --out is a folder": lambda _, __, base, ___: ["generate", "--base", base, "--steps", "1", "--out", "folder.png"],
    "grid: scales are no numbers": lambda *a: ["grid", a[3], "--base", a[2], "--scales", "0,much"],
    "grid: no scales": lambda *a: ["grid", a[3], "--base", a[2], "--scales", ""],
    "grid: seeds are no numbers": lambda *a: ["grid", a[3], "--base", a[2], "--seeds", "0,one"],
    "grid: a seed below zero": lambda *a: ["grid", a[3], "--base", a[2], "--seeds", "0,-1", "--scales", "1"],
    "grid: --out not .png": lambda *a: ["grid", a[3], "--base", a[2], "--scales", "1", "--out", "a.jpg"],
    "grid: --out below a file": lambda *a: ["grid", a[3], "--base", a[2], "--scales", "1", "--out", "file.txt/a.png"],
    "config: no file": lambda *_: ["config", "no.toml"],
    "config: no TOML": lambda here, *_: ["config", here / "file.txt"],
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line_and_leaves_no_trace(name: str, place: Path, pictures: Path, base: Path, pack_path: Path) -> None:
    (place / "empty").mkdir()
    (place / "folder.png").mkdir()
    (place / "file.txt").write_text("not [ a TOML file")
    small.copy_base(base, place / "broken")
    (place / "broken" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut short")
    before = listing(place)
    result = call(*WRONG[name](place, pictures, base, pack_path))
    assert complaint(result) == []
    assert listing(place) == before


def test_a_bad_way_to_tell_an_error_would_be_noticed(place: Path, base: Path) -> None:
    fine = call("generate", "--base", base, "--steps", "1", "--prompt", "a cat", "--out", place / "a.png")
    assert complaint(fine), "the control: nothing was wrong"
    assert fine.exit_code == 0, fine.output
    assert listing(place)


def test_a_bug_of_ours_is_told_apart(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    from sdlora import api

    monkeypatch.setattr(api, "read_settings", lambda *_: 1 / 0)
    result = call("config", "a.toml")
    assert result.exit_code == 5
    assert "E-BUG" in result.stderr
    assert "ZeroDivisionError" in result.stderr
    assert listing(place) == {}


def test_the_settings_it_prints_load_again(place: Path, base: Path, pictures: Path) -> None:
    (place / "a.toml").write_text(f'base = "{base}"\n[data]\nfolder = "{pictures}"\n')
    result = call("config", place / "a.toml", "--set", "train.steps=7")
    assert result.exit_code == 0, result.output
    table = tomllib.loads(result.stdout)
    assert table["train"]["steps"] == 7
    run = config.parse(table)
    assert [name for name, value in config.flat(run) if value is None] == []
    (place / "b.toml").write_text(result.stdout)
    assert call("config", place / "b.toml").stdout == result.stdout


def test_train_then_generate_then_grid(place: Path, base: Path, pictures: Path) -> None:
    done = call("train", pictures, "--name", "mira", "--base", base, *TRAIN)
    assert done.exit_code == 0, done.output
    run = place / "runs" / "mira"
    assert {"config.toml", "events.jsonl", "ledger.json", "checkpoints", "strip.png", "mira.safetensors"} <= {p.name for p in run.iterdir()}
    told = done.stdout.replace("\n", " ")
    assert "sdlora generate runs/mira/mira.safetensors" in told
    assert "5 pictures found, 5 used" in told
    assert "tiny" not in done.output, "what is said of the embedded base is said of no other"
    pack = file.load(run / "mira.safetensors")
    assert pack.trigger == "mira"
    drawn = call("generate", "runs/mira/mira.safetensors:0.5", "--base", base, "--prompt", "mira", "--steps", "2", "--out", "a.png")
    assert drawn.exit_code == 0, drawn.output
    with Image.open(place / "a.png") as picture:
        assert picture.size == (32, 32)
        assert '[["mira", 0.5]]' in picture.text["sdlora"]  # type: ignore[attr-defined]
    pack_path = run / "mira.safetensors"
    sheet = call("grid", pack_path, "--base", base, "--prompts", "mira", "--prompts", "a cat", "--scales", "0,1", "--out", "g.png")
    assert sheet.exit_code == 0, sheet.output
    with Image.open(place / "g.png") as picture:
        assert picture.width > 3 * 128
        assert picture.height > 2 * 128


@pytest.mark.parametrize("name", ["mira", "Mira 2"])
def test_what_it_says_to_type_next_works(name: str, place: Path, base: Path, pictures: Path) -> None:
    done = call("train", pictures, "--name", name, "--base", base, *TRAIN)
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("next: sdlora ")]
    result = call(*shlex.split(line.removeprefix("next: sdlora ")))
    assert result.exit_code == 0, result.output
    assert (place / "runs" / name / "picture.png").is_file()


def test_resume_goes_on_from_the_folder_alone(place: Path, base: Path, pictures: Path) -> None:
    assert call("train", pictures, "--name", "mira", "--base", base, *TRAIN, "--out", "run").exit_code == 0
    first = file.load(place / "run" / "mira.safetensors").tensors
    (place / "run" / "mira.safetensors").unlink()
    done = call("resume", "run")
    assert done.exit_code == 0, done.output
    again = file.load(place / "run" / "mira.safetensors").tensors
    assert {key: tensor.tolist() for key, tensor in again.items()} == {key: tensor.tolist() for key, tensor in first.items()}


def test_the_packs_own_scale_is_taken_unless_another_is_named(place: Path, base: Path, pack_path: Path) -> None:
    def drawn(*arguments: object) -> str:
        result = call("generate", *arguments, "--base", base, "--steps", "1", "--out", "a.png")
        assert result.exit_code == 0, result.output
        with Image.open(place / "a.png") as picture:
            return str(picture.text["sdlora"])  # type: ignore[attr-defined]

    assert '"scales": [["mira", 1.0]]' in drawn(pack_path)
    assert '"scales": [["mira", 0.25]]' in drawn(pack_path, "--scale", "0.25")
    assert '"scales": [["mira", 0.75]]' in drawn(f"{pack_path}:0.75", "--scale", "0.25")
    assert '"scales": []' in drawn()


def test_without_a_base_it_says_what_tiny_is_for(place: Path) -> None:
    result = call("generate", "--prompt", "dog face", "--steps", "1", "--out", "a.png")
    assert result.exit_code == 0, result.output
    assert "--base" in result.stdout
    assert "tiny" in result.stdout
    assert (place / "a.png").is_file()


@pytest.mark.parametrize("verb", ["train", "resume", "generate", "grid", "ui", "config"])
def test_every_verb_has_help(verb: str) -> None:
    result = call(verb, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_speed_is_told_once_it_can_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are told several at once: the time between two of them says nothing."""
    monkeypatch.setattr(terminal.time, "monotonic", lambda: 100.0)
    assert terminal.pace((100.0, 1), 10, 100) == ""
    assert terminal.pace((99.5, 1), 10, 100) == ""
    assert terminal.pace((90.0, 50), 50, 100) == ""
    assert terminal.pace((90.0, 0), 25, 100) == "2.5 steps/s, 0:00:30 left"
    assert terminal.pace((90.0, 0), 25, 100 * 3600).endswith(" left")
