"""The queue of runs: what waits, in which order it is taken, and that it outlives whoever filled it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import small

from sdlora import api, lock, queue
from sdlora.errors import UserError


def codes(monkeypatch: pytest.MonkeyPatch, *given: int) -> list[list[str]]:
    """Let runs end with these codes instead of being made; returns the commands that were given."""
    said, left = [], list(given)

    def followed(words: list[str], _: list[int], log: str) -> int:
        said.append(words)
        Path(log).write_text("loading\nerror: E-DATA-02 · no usable picture\n")
        return left.pop(0)

    monkeypatch.setattr(queue, "_followed", followed)
    return said


def test_runs_are_taken_in_their_order_and_a_failed_one_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [queue.add(tmp_path, f'name = "{name}"', tmp_path / place) for name, place in (("a", "a"), ("b", "deep/b"), ("c", "c d"))]
    said = codes(monkeypatch, 0, 2, 130)
    assert [(name, what) for name, what in queue.work(tmp_path) if what != "begins"] == [
        (names[0], "finished"), (names[1], "failed"), (names[2], "stopped"),
    ]  # fmt: skip
    assert [words[-1] for words in said] == [str(tmp_path / place) for place in ("a", "deep/b", "c d")]
    (left,) = queue.entries(tmp_path)
    assert (left.id, left.state, left.said) == (names[1], "failed", "error: E-DATA-02 · no usable picture")
    queue.take_out(tmp_path, left.id)
    assert list((tmp_path / "queue").iterdir()) == []


def test_no_run_of_a_queue_lies_outside_its_root_nor_waits_twice(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for place in (tmp_path / "outside", root / ".." / "outside", root):
        with pytest.raises(UserError, match="E-QUEUE-01"):
            queue.add(root, "", place)
    queue.add(root, "", root / "a")
    with pytest.raises(UserError, match="E-QUEUE-02"):
        queue.add(root, "", root / "a")
    for name in ("000009-..%2Foutside.toml", "000009-%2Fetc.toml", "no-number.toml"):
        (root / "queue" / name).write_text("")
    assert [one.out for one in queue.entries(root)] == [root / "a"]
    with pytest.raises(UserError, match="E-QUEUE-03"):
        queue.take_out(root, "000009-..%2Foutside")


def test_one_process_works_a_queue_off(tmp_path: Path) -> None:
    queue.add(tmp_path, "", tmp_path / "a")
    program = f"import time; from pathlib import Path; from sdlora import lock\nwith lock.held(Path({str(tmp_path)!r}) / 'queue'):\n"
    other = subprocess.Popen([sys.executable, "-c", program + " print('held', flush=True); time.sleep(3600)"], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        assert queue.is_worked(tmp_path)
        assert not queue.start(tmp_path)
        with pytest.raises(UserError, match="E-RUN-05"):
            list(queue.work(tmp_path))
    finally:
        other.kill()
        other.wait()
    assert not queue.is_worked(tmp_path)


@pytest.mark.slow
def test_runs_go_on_when_the_page_is_gone_and_an_interrupted_one_stays(base: Path, squares: Path, tmp_path: Path) -> None:
    table = {"base": str(base), "data": {"folder": str(squares)}, "adapter": {"rank": 2}, "preview": {"scales": [], "every": 0}}
    for name, steps in (("a", 3), ("b", 100_000)):
        run = api.settle({**table, "name": name, "train": {"steps": steps, "batch_size": 2, "save_every": 100_000}})
        queue.add(tmp_path, api.settings_text(run), tmp_path / name)
    program = f"from pathlib import Path; from sdlora import queue; assert queue.start(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", program], check=True)  # who asked for them is gone by now
    small.until(lambda: (tmp_path / "b" / "events.jsonl").exists() and any(e["step"] for e in api.events(tmp_path / "b")[0]))
    holder = lock.holder(tmp_path / "queue")
    assert (tmp_path / "a" / "a.safetensors").is_file()
    assert holder is not None
    assert [one.state for one in queue.entries(tmp_path)] == ["running"]
    os.kill(holder["pid"], signal.SIGTERM)
    small.until(lambda: not queue.is_worked(tmp_path))
    assert [one.state for one in queue.entries(tmp_path)] == ["waiting"]
    assert api.events(tmp_path / "b")[0][-1]["kind"] == "stopped"
