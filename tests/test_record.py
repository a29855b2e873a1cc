"""The run folder is the record: read at any time, however torn, each event comes exactly once; listing and watching never disturb a run."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
from click.testing import Result
from typer.testing import CliRunner

from sdlora import api, lock, record, safeio
from sdlora.cli import app
from sdlora.errors import BAD_INPUT

GARBAGE = [
    b"", b"not json", b"[1, 2]", b"null", b"\xff\xfe\x00", b'{"kind": "step"}', b'{"time": 1, "kind": 3}', b"[" * 5000,
    b'{"time": 1, "kind": "step", "step": "two"}', b'{"time": 1, "kind": "step", "step": -1}', b'{"time": NaN, "kind": "note"}',
    b'{"time": 1, "kind": "step", "step": 1, "loss": Infinity}', b'{"time": 1, "kind": "note", "text": "\\ud800"}',
    b'{"time": 1, "kind": "note", "data": []}', b'{"time": 1, "kind": "step", "step": 1' + b"0" * 400 + b"}",
]  # fmt: skip


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_reading_from_an_offset_tells_each_event_once(tmp_path: Path) -> None:
    whole = runs.lines(runs.log()).encode()
    path = tmp_path / "events.jsonl"
    for size in (1, 7, 100, len(whole)):
        path.write_bytes(b"")
        told: list[dict[str, Any]] = []
        since = 0
        for start in range(0, len(whole), size):
            with path.open("ab") as file:
                file.write(whole[start : start + size])
            if size > 1 or start % 13 == 0:
                found, since = record.events(tmp_path, since)
                told += found
        told += record.events(tmp_path, since)[0]
        assert [(one["kind"], one["step"]) for one in told] == [(one["kind"], one["step"]) for one in runs.log()]
    told += record.events(tmp_path, 0)[0]
    assert len(told) == 2 * len(runs.log()), "the control: from the start again, all are told again"


def test_a_torn_last_line_waits_until_it_is_whole(tmp_path: Path) -> None:
    run = runs.write(tmp_path / "run")
    before, since = record.events(run)
    with (run / "events.jsonl").open("a") as file:
        file.write('{"time": 1790000099, "kind": "no')
    assert record.events(run) == (before, since)
    assert record.read(run).unread == 0
    with (run / "events.jsonl").open("a") as file:
        file.write('te", "text": "whole"}\n')
    assert [event["text"] for event in record.events(run, since)[0]] == ["whole"]


@pytest.mark.parametrize("line", GARBAGE, ids=range(len(GARBAGE)))
def test_a_line_that_is_no_event_is_counted_and_passed_over(tmp_path: Path, line: bytes) -> None:
    run = runs.write(tmp_path / "run")
    assert record.read(run).unread == 0
    sound = (run / "events.jsonl").read_bytes()
    (run / "events.jsonl").write_bytes(line + b"\n" + sound)
    assert record.read(run).unread == 1
    assert len(record.events(run)[0]) == len(runs.log())
    assert record.read(run).state == "finished"


def test_a_log_that_was_replaced_is_read_from_its_start(tmp_path: Path) -> None:
    run = runs.write(tmp_path / "run")
    _, since = record.events(run)
    (run / "events.jsonl").write_text(runs.lines(runs.log()[:2]))
    assert len(record.events(run, since)[0]) == 2


STATES: list[tuple[str, Callable[[], list[dict[str, Any]]], bool]] = [
    ("finished", runs.log, False),
    ("running", lambda: runs.log(ended=False), True),
    ("stopped", lambda: runs.log(ended=False), False),
    ("failed", lambda: [*runs.log(ended=False), {"time": runs.BEGAN + 99, "kind": "failed"}], True),
    ("running", lambda: [*runs.log(), {"time": runs.BEGAN + 99, "kind": "note", "text": "once more"}], True),
]


@pytest.mark.parametrize(("state", "log", "alive"), STATES)
def test_the_state_is_that_of_the_last_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, log: Callable[[], list[dict[str, Any]]], alive: bool
) -> None:
    run = runs.write(tmp_path / "run", log())
    monkeypatch.setattr(record, "is_running", lambda _: alive)
    assert record.read(run).state == state


def test_a_run_is_running_while_its_folder_is_held(tmp_path: Path) -> None:
    run = runs.write(tmp_path / "run", runs.log(ended=False))
    assert record.read(run).state == "stopped"
    with lock.held(run):
        assert record.read(run).state == "running"
    assert record.read(run).state == "stopped"


def test_a_record_says_what_the_folder_holds(tmp_path: Path) -> None:
    run = runs.write(tmp_path / "run")
    one = record.read(run)
    assert (one.name, one.step, one.steps, one.pack, one.started, one.seconds) == ("mira", 40, 40, None, runs.BEGAN, 32.0)
    assert one.loss == pytest.approx(0.103, abs=0.001)
    (run / "mira.safetensors").write_bytes(b"")
    assert record.read(run).pack == run / "mira.safetensors"


def test_breaks_are_no_time_at_work_and_steps_done_again_count_once() -> None:
    first = runs.log(ended=False)
    second = [event | {"time": event["time"] + 86_400} for event in runs.log()]
    for event in second:
        event.setdefault("data", {})
        event["step"] += 10 if event["kind"] == "step" else 0
    log = [{"text": "", "loss": None, "data": {}} | event for event in [*first, *second]]
    assert [len(part) for part in record.sittings(log)] == [len(first), len(second)]
    assert sum(part[-1]["time"] - part[0]["time"] for part in record.sittings(log)) == 23 + 32
    curve = record.curve(log)
    assert [*curve] == list(range(1, 51))
    assert curve[20] == second[3 + 9]["loss"] != first[3 + 19]["loss"]


def test_the_smoothed_loss_of_a_constant_is_the_constant() -> None:
    assert record.smooth([0.5] * 30) == pytest.approx([0.5] * 30)
    assert record.smooth([1.0, 0.0])[1] == pytest.approx(0.95 / 1.95)


def test_runs_are_found_newest_first_and_links_are_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    assert record.runs(root) == []
    old = runs.write(root / "old", [event | {"time": event["time"] - 1000} for event in runs.log()])
    new = runs.write(root / "a" / "b" / "new")
    deep = runs.write(root / "a" / "b" / "c" / "deep")
    runs.write(old / "checkpoints" / "inner")
    (root / "half").mkdir()
    (root / "half" / "config.toml").write_text("")
    outside = runs.write(tmp_path / "outside")
    (root / "link").symlink_to(outside, target_is_directory=True)
    assert [one.folder for one in api.runs(root)] == [new, old]
    assert [one.folder for one in api.runs(deep.parent)] == [deep], "the control: nearer, it is found"
    assert [one.folder for one in api.runs(outside)] == [outside]


def test_a_broken_run_is_listed_as_such(tmp_path: Path) -> None:
    runs.write(tmp_path / "good")
    broken = runs.write(tmp_path / "broken")
    (broken / "config.toml").write_bytes(b"\xff = [")
    (broken / "events.jsonl").write_bytes(b"\x00" * 100)
    odd = runs.write(tmp_path / "odd", [])
    (odd / "config.toml").write_text('name = 3\ntrain = "fast"\n')
    assert {one.folder.name: one.state for one in record.runs(tmp_path)} == {"good": "finished", "broken": "unreadable", "odd": "stopped"}
    told = call("run", "list", tmp_path)
    assert told.exit_code == 0, told.output
    assert "unreadable" in told.stdout


def test_list_prints_a_table_and_all_of_it_as_json(tmp_path: Path) -> None:
    runs.write(tmp_path / "one", name="[bold]x\u001b[31m")
    told = call("run", "list", tmp_path)
    assert "[bold]x?[31m" in told.stdout, "neither markup nor escapes reach the terminal"
    assert "40/40" in told.stdout
    (row,) = json.loads(call("run", "list", tmp_path, "--json").stdout)
    assert row["state"] == "finished"
    assert row["folder"] == str(tmp_path / "one")
    (tmp_path / "empty").mkdir()
    assert "no run" in call("run", "list", tmp_path / "empty").stdout
    assert call("run", "list", tmp_path / "nowhere").exit_code == BAD_INPUT


def test_watching_a_finished_run_ends(tmp_path: Path) -> None:
    run = runs.write(tmp_path / "run")
    told = call("run", "watch", run)
    assert told.exit_code == 0, told.output
    assert "40/40" in told.stdout
    assert "pack:" in told.stdout
    assert call("run", "watch", tmp_path).exit_code == BAD_INPUT


def test_watching_follows_the_log_until_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = runs.log()
    run, rest = runs.write(tmp_path / "run", whole[:9]), whole[9:]

    def work(_: float) -> None:
        for event in rest[:10]:
            safeio.append_line(run / "events.jsonl", json.dumps(event))
        del rest[:10]

    monkeypatch.setattr(time, "sleep", work)
    with lock.held(run):
        found = list(record.follow(run))
    assert [event["kind"] for event in found] == [event["kind"] for event in whole]
    cut_off = runs.write(tmp_path / "cut", whole[:9])
    assert len(list(record.follow(cut_off))) == 9, "nobody is at work on it: there is nothing to wait for"


def test_ctrl_c_only_detaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.write(tmp_path / "run", runs.log(ended=False))
    before = {path: path.read_bytes() for path in run.iterdir()}

    def interrupted(*_: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "follow", interrupted)
    told = call("run", "watch", run)
    assert told.exit_code == 0, told.output
    assert "no longer shown" in told.stdout
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_listing_does_not_wait_for_torch() -> None:
    code = "import sys, sdlora.record, sdlora.report, sdlora.verbs.run; sys.exit(7 if 'torch' in sys.modules else 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
