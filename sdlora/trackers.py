"""Experiment trackers: the figures among a run's events, told to programs that accelerate knows. The loop knows nothing of them."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from sdlora.errors import UserError


class Trackers:
    """What the named trackers are told, open from `with` on; those that write files do it below `folder`."""

    def __init__(self, names: Sequence[str], run: str, folder: Path) -> None:
        """Raises `UserError` where a tracker's package is not installed, before anything is spent."""
        there = [str(name) for name in get_available_trackers()] if names else []
        for name in names:
            if name not in there:
                what = f"{name} is not installed, and the run is to be told to it"
                package = "'sdlora[track]'" if name == "tensorboard" else name
                raise UserError("E-TRACK-01", what, "train.trackers", f"pip install {package}, or leave it out")
        self._names, self._run, self._folder = names, run, folder
        self._open: list[Any] = []

    def __enter__(self) -> "Trackers":
        for name in self._names:
            cls = LOGGER_TYPE_TO_CLASS[name]
            tracker = cls(self._run, str(self._folder)) if cls.requires_logging_directory else cls(self._run)
            tracker.start()
            self._open.append(tracker)
        return self

    def tell(self, event: Mapping[str, Any]) -> list[str]:
        """Pass on the figures of one event. A tracker that fails is told no more; what is said of it is returned."""
        found = dict(event.get("data", {})) | ({"loss": event["loss"]} if event.get("loss") is not None else {})
        figures = {f"{event['kind']}/{key}": value for key, value in found.items() if type(value) in (int, float)}
        problems = []
        for tracker in list(self._open) if figures else ():
            try:
                tracker.log(figures, step=event.get("step", 0))
            except Exception as error:  # a server that is gone, a disk that is full: no reason to stop training
                self._open.remove(tracker)
                problems.append(f"{tracker.name} is told no more: {type(error).__name__}: {error}")
        return problems

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for tracker in self._open:
            try:
                tracker.finish()
            except Exception as problem:
                warnings.warn(f"{tracker.name} did not end well: {type(problem).__name__}: {problem}", stacklevel=2)
