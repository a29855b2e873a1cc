"""Runs that wait for one another: a folder of settings files, worked off by one process that outlives whoever filled it.

`ROOT/queue/000007-mira.toml` asks for the run folder `ROOT/mira`, `ROOT/queue/000008-mira%2Fscore.best` for a judging of its checkpoints
into `ROOT/mira/score`. The process at work holds the folder by a lock and runs `sdlora train` or `sdlora find best` for one entry after
another, so that one that dies takes nothing else with it. What is kept lies in files alone: whoever looks, and whoever comes after a
crash, reads the same.
"""

import json
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from sdlora import children, lock, record, safeio, stop
from sdlora.errors import UserError

FOLDER = "queue"
WAITING, JUDGING, FAILED, LOG = ".toml", ".best", ".failed", ".log"
SCORE = "score"
"""The folder, in that of a run, into which its checkpoints are judged."""
LOOK_S = 0.5
STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)
"""How `sdlora train` ends when it was asked to stop, or was stopped before it could listen."""
MOST = 1000
"""Entries that may wait."""


@dataclass(frozen=True)
class Entry:
    """A run that is asked for."""

    id: str  # its file's name without the ending
    out: Path  # the folder that it is made in
    state: Literal["waiting", "running", "failed"]
    said: str  # why a failed one failed, or how far one at work is

    @property
    def name(self) -> str:
        judges = self.out.name == SCORE and record.is_run(self.out.parent)
        return f"{self.out.parent.name}: which checkpoint" if judges else self.out.name


def add(root: Path, settings: str, out: Path) -> str:
    """Ask for a run with these settings (TOML) in a folder below the root; returns the entry's id. Raises `UserError`."""
    return _add(root, settings, out, WAITING)


def judge(root: Path, run: Path, scales: Sequence[float], **counts: int) -> str:
    """Ask for a judging of a run's checkpoints, with `prompts`, `seeds` and `most` of `sdlora find best`; returns the entry's id."""
    return _add(root, json.dumps({"scales": ",".join(f"{scale:g}" for scale in scales), **counts}), run / SCORE, JUDGING)


def _add(root: Path, content: str, out: Path, ending: str) -> str:
    place = out.resolve()
    if not place.is_relative_to(root.resolve()) or place == root.resolve():
        raise UserError("E-QUEUE-01", f"runs of this queue lie in {root}", out, "choose a folder below it")
    known = entries(root)
    if any(one.out.resolve() == place for one in known if one.state != "failed"):
        raise UserError("E-QUEUE-02", "this run waits already", out, "let it begin, or take it out of the queue first")
    if len(known) >= MOST:
        raise UserError("E-QUEUE-04", f"{MOST} runs wait already", root / FOLDER, "let some of them end first")
    number = 1 + max((int(one.id.partition("-")[0]) for one in known), default=0)
    name = f"{number:06d}-{safeio.file_name(place.relative_to(root.resolve()).as_posix())}"
    safeio.write(root / FOLDER / f"{name}{ending}", content)
    return name


def entries(root: Path) -> list[Entry]:
    """Who waits, in their order; the first of them runs while somebody is at work. Failed ones stay until they are taken out."""
    busy = is_worked(root)
    found = []
    for path in sorted(root.joinpath(FOLDER).glob("*-*")):
        number, _, place = path.stem.partition("-")
        out = root / unquote(place)
        inside = out.resolve().is_relative_to(root.resolve())
        if path.suffix not in (WAITING, JUDGING, FAILED) or not re.fullmatch(r"\d{1,18}", number) or not inside:
            continue
        if path.suffix == FAILED:
            found.append(Entry(path.stem, out, "failed", error_line(_log(path))))
        elif busy and record.is_running(out):
            found.append(Entry(path.stem, out, "running", _last_line(_log(path)) if path.suffix == JUDGING else ""))
        else:
            found.append(Entry(path.stem, out, "waiting", ""))
    return found


def take_out(root: Path, id: str) -> None:
    """Forget an entry that waits or failed; a run that has begun is stopped by asking it. Raises `UserError`."""
    one = next((one for one in entries(root) if one.id == id), None)
    if one is None or one.state == "running":
        what = "this run is at work" if one else "there is no such run in the queue any more"
        raise UserError("E-QUEUE-03", what, id, "ask the run itself to stop" if one else "look at the queue again")
    _remove(root, id)


def is_worked(root: Path) -> bool:
    """Whether a process works the queue off."""
    return lock.holder(root / FOLDER) is not None


def start(root: Path) -> bool:
    """Start a process that works the queue off, if somebody waits and nobody does; it goes on when the one that called is gone."""
    if not any(one.state == "waiting" for one in entries(root)) or is_worked(root):
        return False
    alone = {"creationflags": 0x00000208} if os.name == "nt" else {"start_new_session": True}  # DETACHED_PROCESS, NEW_PROCESS_GROUP
    words = ["-m", "sdlora.cli", "run", "queue", str(root.resolve())]
    children.start(words, stdout=children.NOTHING, stderr=children.NOTHING, **alone)
    return True


def work(root: Path) -> Iterator[tuple[str, str]]:
    """Run what waits, one after another, until nothing does; tells (entry, what became of it). Raises `UserError` if another does so."""
    while any(one.state != "failed" for one in entries(root)):
        with lock.held(root / FOLDER):
            safeio.sweep(root / FOLDER)
            while waiting := [one for one in entries(root) if one.state != "failed"]:
                yield waiting[0].id, "begins"
                end = _run(root, waiting[0])
                yield waiting[0].id, end
                if end == "interrupted":
                    return
        # somebody may have asked for a run after the last look and before the lock was free, and started no other process


def _run(root: Path, one: Entry) -> str:
    """One run in a process of its own: finished, stopped, failed, or interrupted with the whole queue, whose entry then stays."""
    while record.is_running(one.out):  # begun by somebody else, or by a process before this one, whose run outlived it
        time.sleep(LOOK_S)
    base = root / FOLDER / one.id
    asks = next((path for path in map(Path, (f"{base}{WAITING}", f"{base}{JUDGING}")) if path.exists()), None)
    if asks is None:  # taken out since
        return "stopped"
    with stop.noted() as asked:
        code = _followed(["-m", "sdlora.cli", *_words(asks, one.out)], asked, f"{base}{LOG}")
    if asked:
        return "interrupted"
    if code == 0 or code in STOPPED:
        _remove(root, one.id)
        return "stopped" if code else "finished"
    safeio.rename(asks, Path(f"{base}{FAILED}"))
    return "failed"


def _words(asks: Path, out: Path) -> list[str]:
    """The command that an entry's file asks for."""
    if asks.suffix == WAITING:
        return ["train", "--config", str(asks), "--out", str(out)]
    table = json.loads(asks.read_text("utf-8"))
    options = [word for name in ("scales", "prompts", "seeds", "most") if name in table for word in (f"--{name}", str(table[name]))]
    return ["find", "best", str(out.parent), "--out", str(out), *options]


def _followed(words: list[str], asked: list[int], log: str) -> int:
    """The exit code of a Python whose words go into a file; signals that come are handed to it."""
    safeio.write(Path(log), "")
    told = 0
    with open(log, "ab") as said:
        process = children.start(words, stdout=said, stderr=said, start_new_session=os.name != "nt")
        while process.poll() is None:
            if told < len(asked):
                process.send_signal(signal.SIGTERM)
                told += 1
            time.sleep(0.05)
    return int(process.returncode)


def _remove(root: Path, id: str) -> None:
    for ending in (WAITING, JUDGING, FAILED, LOG):
        path = root / FOLDER / f"{id}{ending}"
        if path.exists():
            safeio.remove(path)


def _log(entry: Path) -> str:
    try:
        return entry.with_suffix(LOG).read_text("utf-8", "replace")
    except OSError:
        return ""


def _lines(said: str) -> list[str]:
    return [line.strip() for line in said.split("\n") if line.strip()]


def _last_line(said: str) -> str:
    return next(reversed(_lines(said)), "")


def error_line(said: str) -> str:
    """The line that says why a run ended, of all that it said."""
    lines = _lines(said)
    return next((line for line in lines if re.search(r"\bE-[A-Z]+-\d", line)), lines[-1] if lines else "")
