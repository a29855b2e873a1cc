"""What a run folder says of its run: the settings and the log of events, read while it runs, after it ended, and however it was torn."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora import lock, settings
from sdlora.errors import UserError

ENDS = {"done": "finished", "failed": "failed", "stopped": "stopped"}
"""What a run is when the last event is of this kind; after any other it runs, or was cut off."""
DEPTH = 3
SMOOTHING = 0.95
LARGEST = 2**53
"""Steps above are no steps: a drawing could not tell them apart."""


@dataclass(frozen=True)
class Record:
    """A run in figures."""

    name: str
    folder: Path
    state: str  # running, finished, failed, stopped, or unreadable: its settings are
    step: int
    steps: int  # in all
    loss: float | None  # smoothed
    started: float | None  # seconds since 1970
    seconds: float  # at work, without the breaks
    kind: str
    base: str
    pack: Path | None
    unread: int  # lines of the log that are no events


def runs(root: Path) -> list[Record]:
    """The runs in a folder and up to three levels below it, the newest first; links are not followed."""
    found = [read(folder) for folder in _folders(root, DEPTH)]
    return sorted(found, key=lambda one: (-(one.started or 0.0), one.folder))


def read(out: Path) -> Record:
    """One run. A torn log or unreadable settings are no error: whatever else is there is told."""
    return read_whole(out)[0]


def read_whole(out: Path) -> tuple[Record, list[dict[str, Any]]]:
    """One run, and all of its log."""
    log, _, unread = _read(out, 0)
    try:
        table = settings.read(out / "config.toml")
    except UserError:
        table = {}
    name, losses = str(table.get("name") or out.name), list(curve(log).values())
    state = ENDS.get(log[-1]["kind"], "") if log else ""
    pack = out / f"{Path(name).name}.safetensors"
    one = Record(
        "".join(letter if letter.isprintable() else "?" for letter in name),
        out,
        state or ("running" if is_running(out) else "stopped") if table else "unreadable",
        next((event["step"] for event in reversed(log) if event["step"]), 0),
        steps_of(table),
        smooth(losses)[-1] if losses else None,
        log[0]["time"] if log else None,
        round(sum(part[-1]["time"] - part[0]["time"] for part in sittings(log)), 1),
        str(table.get("kind", "")),
        str(table.get("base", "")),
        pack if pack.is_file() else None,
        unread,
    )
    return one, log


def is_run(folder: Path) -> bool:
    return all((folder / name).is_file() and not (folder / name).is_symlink() for name in ("config.toml", "events.jsonl"))


def is_running(out: Path) -> bool:
    """Whether a process is at work on the run."""
    return lock.holder(out) is not None


def events(out: Path, since: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The events that the log holds from a byte on, and the byte to ask from next; a line that is still being written waits for then."""
    found, after, _ = _read(out, since)
    return found, after


def follow(out: Path, since: int = 0, every_s: float = 0.5) -> Iterator[dict[str, Any]]:
    """Events as they come, until the run ends or nobody is at work on it."""
    while True:
        alive = is_running(out)  # asked before reading: what is written in between is read
        found, since = events(out, since)
        yield from found
        if not alive or (found and found[-1]["kind"] in ENDS):
            return
        time.sleep(every_s)


def curve(log: Sequence[Mapping[str, Any]], key: str = "loss") -> dict[int, float]:
    """A figure of the steps by step. Where a run went back to a checkpoint, what came after that is gone."""
    found: dict[int, float] = {}
    for event in log:
        if event["kind"] == "step":
            value = event["data"].get(key) if key != "loss" else event["loss"]
            while found and next(reversed(found)) >= event["step"]:
                found.popitem()
            if number(value):
                found[event["step"]] = value
    return found


def smooth(values: Sequence[float]) -> list[float]:
    """The running mean with exponentially falling weights, without the pull to zero at its start (Kingma & Ba 2015, section 3)."""
    found, mean = [], 0.0
    for i, value in enumerate(values, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        found.append(mean / (1 - SMOOTHING**i))
    return found


def sittings(log: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The log cut where the run was taken up again: each time begins with notes on the pictures, of no step and without figures."""
    parts: list[list[dict[str, Any]]] = []
    for i, event in enumerate(log):
        opening = event["kind"] in ("note", "warning") and not event["step"] and not event["data"]
        if i == 0 or (opening and log[i - 1]["kind"] not in ("note", "warning")):
            parts.append([])
        parts[-1].append(event)
    return parts


def steps_of(table: Mapping[str, Any]) -> int:
    """The steps in all that a run's settings ask for."""
    train = table.get("train")
    steps = train.get("steps") if isinstance(train, dict) else 0
    return steps if isinstance(steps, int) and 0 < steps < LARGEST else 0


def number(value: object) -> bool:
    """Whether this is a finite number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _folders(root: Path, depth: int) -> Iterator[Path]:
    if is_run(root):
        yield root
        return
    try:
        inner = sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink()) if depth else []
    except OSError:  # not ours to read
        return
    for folder in inner:
        yield from _folders(folder, depth - 1)


def _read(out: Path, since: int) -> tuple[list[dict[str, Any]], int, int]:
    """Events, the byte after the last whole line, and how many lines were none."""
    try:
        with (out / "events.jsonl").open("rb") as file:
            if file.seek(0, 2) < since:  # another log than the one that was read before
                since = 0
            file.seek(since)
            whole, newline, _ = file.read().rpartition(b"\n")
    except OSError:
        return [], since, 0
    found = [_event(line) for line in whole.split(b"\n")] if newline else []
    return [event for event in found if event], since + len(whole + newline), found.count(None)


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
        if b"\\ud" in line.lower():  # half of a pair cannot be written anywhere
            json.dumps(event, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict):
        return None
    event = {"text": "", "step": 0, "loss": None, "data": {}} | event
    sound = (
        isinstance(event.get("kind"), str)
        and isinstance(event["text"], str)
        and isinstance(event["step"], int)
        and 0 <= event["step"] < LARGEST
        and number(event.get("time"))
        and (event["loss"] is None or number(event["loss"]))
        and isinstance(event["data"], dict)
    )
    return event if sound else None
