"""How a run is asked to stop, save or show itself: by a signal, by a file in its folder, or by the program that runs it."""

import contextlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from sdlora import safeio

STOP, SAVE, SAMPLE = "stop", "save", "sample"
FILES = (STOP, SAVE, SAMPLE)
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # those of them that the system has


class Interrupted(KeyboardInterrupt):
    """A signal came while nothing was there to save, or for the second time."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


@dataclass
class Stop:
    """A wish that steps look at when they are done. Signals only leave it here; nothing is written inside a handler."""

    signum: int = 0
    gentle: bool = False  # steps are running, and will look
    stop: bool = False
    save: bool = False
    sample: bool = False
    above: "Stop | None" = None  # the wish of all that this is a part of
    told: bool = False  # by it to stop

    @property
    def stopping(self) -> bool:
        return self.stop or self.told

    def pass_on(self, parts: "Sequence[Stop]") -> None:
        """Ask the parts to stop, save or show themselves if all are to: after one and the same step, whenever in between it is wished."""
        for part in parts:
            part.told = self.stopping
            part.save, part.sample = part.save or self.save, part.sample or self.sample
        if parts:
            self.save = self.sample = False

    def look(self, folder: Path) -> None:
        """Take up what files in the run folder ask for; each of them goes when it is read."""
        for name in FILES:
            if taken(folder / name):
                setattr(self, name, True)

    def handle(self, signum: int, _: FrameType | None = None) -> None:
        if self.signum or not self.gentle:
            raise Interrupted(signum)
        self.signum, self.stop = signum, True

    @contextlib.contextmanager
    def gently(self) -> Iterator[None]:
        """While steps run the first signal is kept for them."""
        self.gentle = True
        try:
            yield
        finally:
            self.gentle = False

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Be asked by the process's signals; the handlers before come back at the end."""
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        before = {number: signal.signal(number, self.handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def taken(path: Path) -> bool:
    """Whether a request lies there; it is taken away."""
    try:
        path.unlink()
    except OSError:  # none is there
        return False
    return True


def ask(folder: Path, what: str) -> None:
    """Ask the run in a folder to stop, save or show itself; it looks after each step."""
    assert what in FILES, what
    safeio.write(folder / what, "")


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """The signals that ask to end, in the order in which they come, for whoever looks after others and ends when they have."""
    asked = list[int]()
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
