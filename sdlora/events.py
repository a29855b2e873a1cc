"""What a run tells whoever iterates over it; each event is also a line of `events.jsonl`."""

import dataclasses
import json
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from sdlora import safeio
from sdlora.errors import UserError, escape_surrogates
from sdlora.stop import Stop

T = TypeVar("T")
DISK_IS_FULL = "E-DISK-01"
RETRY_S = 30.0


@dataclass(frozen=True)
class Event:
    kind: Literal["note", "warning", "step", "validation", "preview", "checkpoint", "paused", "stopped", "failed", "done"]
    text: str = ""
    step: int = 0
    loss: float | None = None
    data: dict[str, Any] = field(default_factory=dict)
    member: str = ""  # of a cast, whose run this is about; the log of a run need not say it


@dataclass
class Log:
    """The file of a run's events. While the disk is full they are kept here, and written with the next one that finds room."""

    path: Path
    waiting: list[str] = field(default_factory=list)

    def add(self, event: Event) -> dict[str, Any]:
        """Write an event; returns what the log holds of it."""
        said: dict[str, Any] = _escape_surrogates({k: v for k, v in dataclasses.asdict(event).items() if v not in ("", None, {})})
        record: dict[str, Any] = {"time": round(time.time(), 3), **said}
        self.waiting.append(json.dumps(record))
        try:
            safeio.append_line(self.path, "\n".join(self.waiting))
        except UserError as error:
            if error.code != DISK_IS_FULL:
                raise
        else:
            self.waiting.clear()
        return record


def _escape_surrogates(value: Any) -> Any:
    """The value with all its texts such as a reader of the log takes."""
    if isinstance(value, dict):
        return {_escape_surrogates(key): _escape_surrogates(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_escape_surrogates(one) for one in value]
    return escape_surrogates(value) if isinstance(value, str) else value


def warn_on_failure(events: Iterable[Event], what: str, step: int = 0) -> Iterator[Event]:
    """Events of something that a run can do without. What breaks it becomes a warning that begins with `what`, and the run goes on; an
    error that is no `UserError` leaves its traceback in the log."""
    try:
        yield from events
        return
    except UserError as error:
        told, data = str(error), {}
    except Exception as error:  # whatever it is, hours of training must not be lost to it
        told = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        data = {"traceback": "".join(traceback.format_exception(error))}
    yield Event("warning", f"{what}: {told}", step=step, data=data)


def patiently(write: Callable[[], T], stop: Stop) -> Generator[Event, None, T]:
    """Do what writes a file, again and again while the disk is full; a run that is to stop waits no longer and raises."""
    said = False
    while True:
        try:
            return write()
        except UserError as error:
            if error.code != DISK_IS_FULL or stop.stopping:
                raise
            what = str(error)
        if not said:
            yield Event("paused", f"{what} · waiting, nothing is lost; looking again every {RETRY_S:g} s")
            said = True
        until = time.monotonic() + RETRY_S
        while time.monotonic() < until and not stop.stopping:
            time.sleep(min(0.1, RETRY_S))
