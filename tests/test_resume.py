"""A run that was stopped anywhere, and goes on, ends as the one that never was: every tensor, and all metadata but the clock."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import small
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from sdlora import api, cast, devices, lookup, safeio, state
from sdlora.api import Event
from sdlora.config import Run
from sdlora.errors import UserError
from sdlora.packs import file
from sdlora.packs.file import Pack
from sdlora.packs.metadata import CLOCK


def go(run: Run, out: Path, stop_at: int = 0) -> list[Event]:
    """Train into a folder; close the run when the step `stop_at` is told (0: never)."""
    events = []
    running = api.train(run, out)
    for event in running:
        events.append(event)
        if stop_at and event.kind == "step" and event.step == stop_at:
            running.close()  # type: ignore[attr-defined]
            break
    return events


def pack(out: Path, name: str = "mira") -> Pack:
    return file.load(out / f"{name}.safetensors")


def differences(a: Pack, b: Pack) -> list[str]:
    """Names of the tensors and metadata fields, the clock's aside, in which two packs differ in a bit."""
    found = list(a.tensors.keys() ^ b.tensors.keys())
    found += [key for key in a.tensors.keys() & b.tensors.keys() if not torch.equal(a.tensors[key], b.tensors[key])]
    fields = (a.metadata.keys() | b.metadata.keys()) - set(CLOCK)
    return found + [key for key in fields if a.metadata.get(key) != b.metadata.get(key)]


def told(events: list[Event], kind: str) -> list[str]:
    return [event.text for event in events if event.kind == kind]


SETTINGS = {"plain": {}, "constant": {"train__schedule": "constant", "train__accumulation": 2}, "cosine": {"train__accumulation": 2},
            "adafactor": {"optimizer__kind": "adafactor"},
            "options": {"adapter__init": "pissa", "adapter__lora_fa": True, "adapter__rank_dropout": 0.5}}  # fmt: skip


@pytest.fixture(scope="module")
def whole(squares: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An uninterrupted run for each of the settings; five pictures, so that a step of two or four ends in mid-epoch."""
    folder = tmp_path_factory.mktemp("whole")
    for name, settings in SETTINGS.items():
        go(small.settled(squares, base, **settings), folder / name)
    return {name: folder / name for name in SETTINGS}


STOPS = {"plain": [(3,)], "constant": [(1,), (1, 1, 4)], "cosine": [(2,), (6,), (3, 5)], "adafactor": [(3,)], "options": [(3,)]}


@pytest.mark.parametrize(("name", "stops"), [(name, stops) for name, found in STOPS.items() for stops in found], ids=str)
def test_stopped_anywhere_it_ends_the_same(
    name: str, stops: tuple[int, ...], whole: dict[str, Path], squares: Path, base: Path, tmp_path: Path
) -> None:
    run = small.settled(squares, base, **SETTINGS[name])
    for stop in stops:
        go(run, tmp_path / "run", stop)
        assert not (tmp_path / "run" / "mira.safetensors").exists()
    go(run, tmp_path / "run")
    assert differences(pack(tmp_path / "run"), pack(whole[name])) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", lookup.names("adapters"))
def test_every_kind_goes_on_where_it_was(kind: str, squares: Path, base: Path, tmp_path: Path) -> None:
    merges = lookup.find("adapters", kind).Adapter.merges
    rest = {"adapter": {"kind": kind, "targets": ["cross-attention", "unet.conv_in"] if merges else None}}
    run = small.settled(squares, base, **rest)
    go(run, tmp_path / "whole")
    go(run, tmp_path / "run", 3)
    go(run, tmp_path / "run")
    assert differences(pack(tmp_path / "run"), pack(tmp_path / "whole")) == []
    two, six = (load_file(state.folder(tmp_path / "whole", step) / "adapter.safetensors") for step in (2, 6))
    assert all(not torch.equal(two[name], six[name]) for name in two), "and all of it learns"


def test_the_factor_of_half_precision_goes_on_where_it_was(
    squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaling(precision: str) -> tuple[Accelerator, torch.dtype]:
        accelerator, dtype = devices.for_training(precision)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator, dtype

    def factor(run: Path) -> dict[str, float]:
        written = json.loads((state.folder(run, 6) / "state.json").read_text())
        found: dict[str, float] = written["optimizer"]["mira"]["scaler"]
        return found

    monkeypatch.setattr(cast, "devices", SimpleNamespace(**{**vars(devices), "for_training": scaling}))
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=4.0, growth_interval=4))
    run = small.settled(squares, base)
    go(run, tmp_path / "whole")
    go(run, tmp_path / "run", 3)
    go(run, tmp_path / "run")
    assert factor(tmp_path / "run") == factor(tmp_path / "whole")
    assert factor(tmp_path / "whole")["scale"] == 8.0, "it grew after four steps, which a factor that began anew would not have"
    assert differences(pack(tmp_path / "run"), pack(tmp_path / "whole")) == []


def test_another_seed_would_be_noticed(whole: dict[str, Path], squares: Path, base: Path, tmp_path: Path) -> None:
    go(small.settled(squares, base, seed=1), tmp_path / "run")
    different = differences(pack(tmp_path / "run"), pack(whole["plain"]))
    assert "ss_seed" in different
    assert any(key.endswith("lora_up.weight") for key in different)
    assert differences(pack(whole["plain"]), pack(whole["constant"]))


def test_a_resumed_run_does_not_start_over(squares: Path, base: Path, tmp_path: Path) -> None:
    run = small.settled(squares, base)
    go(run, tmp_path / "run", 5)
    events = go(run, tmp_path / "run")
    assert [event.step for event in events if event.kind == "step"] == [5, 6]
    assert any("going on from step 4" in text for text in told(events, "note"))


def test_a_finished_run_run_again_gives_the_same_pack(whole: dict[str, Path], squares: Path, base: Path, tmp_path: Path) -> None:
    run = small.settled(squares, base)
    go(run, tmp_path / "run")
    events = go(run, tmp_path / "run")
    assert told(events, "step") == []
    assert differences(pack(tmp_path / "run"), pack(whole["plain"])) == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(name: str, whole: dict[str, Path], squares: Path, base: Path, tmp_path: Path) -> None:
    run = small.settled(squares, base)
    out = tmp_path / "run"
    go(run, out, 5)
    assert state.steps(out) == [2, 4]
    flip(state.folder(out, 4) / name)
    events = go(run, out)
    assert any("ckpt-000004" in text and "damaged" in text for text in told(events, "warning"))
    assert any("going on from step 2" in text for text in told(events, "note"))
    assert differences(pack(out), pack(whole["plain"])) == []
    assert safeio.read_folder(state.folder(out, 4)) is not None, "and it is mended on the way"


def test_when_all_checkpoints_are_damaged_it_starts_over(whole: dict[str, Path], squares: Path, base: Path, tmp_path: Path) -> None:
    run = small.settled(squares, base)
    out = tmp_path / "run"
    go(run, out, 5)
    for step in state.steps(out):
        flip(state.folder(out, step) / "adapter.safetensors")
    events = go(run, out)
    assert len(told(events, "warning")) == 2
    assert differences(pack(out), pack(whole["plain"])) == []


def test_what_a_killed_writer_left_is_swept_away(squares: Path, base: Path, tmp_path: Path) -> None:
    run = small.settled(squares, base)
    out = tmp_path / "run"
    go(run, out, 3)
    (out / "checkpoints" / f"{safeio.TEMPORARY}1-ckpt-000004").mkdir()
    (out / f"{safeio.TEMPORARY}1-mira.safetensors").write_bytes(b"half")
    go(run, out)
    assert list(out.rglob(f"{safeio.TEMPORARY}*")) == []


def test_the_newest_checkpoints_are_kept(squares: Path, base: Path, tmp_path: Path) -> None:
    go(small.settled(squares, base, train__save_every=1, train__keep_checkpoints=3), tmp_path / "run")
    assert state.steps(tmp_path / "run") == [4, 5, 6]
    assert all(safeio.read_folder(state.folder(tmp_path / "run", step)) for step in state.steps(tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "named"),
    [({"adapter__rank": 3}, "adapter.rank"), ({"seed": 1}, "seed"), ({"kind": "style"}, "kind"), ({"name": "tavi"}, "name")],
)
def test_another_run_does_not_go_on_in_the_folder(change: dict[str, int], named: str, squares: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    go(small.settled(squares, base), out, 3)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="E-RUN-02") as caught:
        go(small.settled(squares, base, **change), out)
    assert named in str(caught.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_what_may_change_is_said(squares: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    go(small.settled(squares, base), out, 3)
    events = go(small.settled(squares, base, train__save_every=3), out)
    assert any("train.save_every" in text and "2" in text and "3" in text for text in told(events, "note"))
    assert state.steps(out)[-1] == 6
    events = go(small.settled(squares, base, train__save_every=3), out)
    assert not any("train.save_every" in text for text in told(events, "note")), "and only once"


def test_a_run_that_could_not_start_stands_in_nobodys_way(squares: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError, match="E-ADAPT-01"):
        go(small.settled(squares, base, adapter__targets=["nothing"]), out)
    with pytest.raises(UserError, match="E-DATA"):
        go(small.settled(tmp_path / "nowhere", base), out)
    assert not out.exists()
    go(small.settled(squares, base), out, 1)


def test_a_folder_of_other_things_is_left_alone(squares: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="E-RUN-03"):
        go(small.settled(squares, base), tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["diary.txt"]


def test_events_are_logged_one_a_line(squares: Path, base: Path, tmp_path: Path) -> None:
    import json

    events = go(small.settled(squares, base), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == [event.kind for event in events]
    assert events[-1].kind == "done"
    assert Path(events[-1].text) == tmp_path / "run" / "mira.safetensors"


# ---------------------------------------------------------------- a process that is killed


def called(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "sdlora.cli", *arguments], check=True, capture_output=True)


DYING = """
import os, signal, sys
from sdlora import cast, cli
steps, last = cast.steps, int(sys.argv.pop(1))
def dying(setup):
    for trained in steps(setup):
        if trained.step == last:
            os.kill(os.getpid(), signal.SIGKILL)
        yield trained
cast.steps = dying
cli.main()
"""


def killed(arguments: list[str], step: int) -> None:
    """Start a run that is killed, without a chance to clean up, once a step has been computed and nothing was told of it."""
    program = [sys.executable, "-c", DYING, str(step), *arguments]
    assert subprocess.run(program, capture_output=True, check=False).returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_pack(squares: Path, base: Path, tmp_path: Path) -> None:
    settings = {"steps": 120, "batch_size": 2, "save_every": 20, "warmup_steps": 10, "precision": '"fp32"'}
    options = [part for key, value in settings.items() for part in ("--set", f"train.{key}={value}")]
    options += ["--set", "preview.scales=[]", "--set", "data.resolution_px=32", "--set", "adapter.rank=2"]
    train = ["train", str(squares), "--name", "mira", "--base", str(base), *options, "--out"]
    called(*train, str(tmp_path / "whole"))
    out = tmp_path / "run"
    killed([*train, str(out)], 33)
    assert state.steps(out) == [20]
    killed(["resume", str(out)], 67)
    assert state.steps(out)[-1] == 60
    called("resume", str(out))
    assert differences(pack(out), pack(tmp_path / "whole")) == []
    assert list(out.rglob(f"{safeio.TEMPORARY}*")) == []
