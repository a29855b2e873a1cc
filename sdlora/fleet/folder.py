"""The folder of a fleet: its jobs, what became of each, and what happened; all of it files, so that a fleet outlives whoever drives it.

jobs/NAME.toml     the settings of a run, or of a cast, complete
jobs/NAME.json     whose it is, how urgent, and what it takes; written by whoever adds it, and never again
states/NAME.json   where it stands, and every attempt; written by the driver alone
events.jsonl       what happened, a line each
logs/NAME.log      what the last attempt said at its end
"""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from sdlora import lock, safeio
from sdlora.errors import UserError

State = Literal["waiting", "running", "finished", "failed", "stopped"]
OVER = ("finished", "failed", "stopped")


@dataclass(frozen=True)
class Job:
    """A run or a cast that is asked for, and what it takes."""

    name: str
    user: str
    priority: int = 0  # higher goes first
    cpus: int = 1  # also the threads of its process, on which its last bits depend
    gpus: float | None = None  # cards, or the share of one; None: a whole one if the cluster has any
    added: float = 0.0  # seconds since 1970


@dataclass(frozen=True)
class Attempt:
    """One time that a job was started."""

    began: float
    ended: float | None = None
    node: str = ""  # as far as it is known: who dies does not tell
    end: str = ""


@dataclass(frozen=True)
class Standing:
    """What became of a job so far."""

    state: State = "waiting"
    why: str = ""
    attempts: Sequence[Attempt] = field(default_factory=tuple)

    def begun(self) -> "Standing":
        return replace(self, state="running", why="", attempts=(*self.attempts, Attempt(time.time())))

    def ended(self, state: State, end: str, node: str = "", why: str = "") -> "Standing":
        """After its last attempt ended."""
        last = replace(self.attempts[-1], ended=time.time(), node=node, end=end)
        return Standing(state, why, (*self.attempts[:-1], last))


class Folder:
    """A fleet's folder; `held` makes whoever asks its only driver."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._known = dict[str, Job]()  # by file: they never change

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Drive this fleet, and nobody else. What was running when the last driver ended waits again. Raises `UserError`."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock.held(self.place))
            except UserError as error:
                if error.code != "E-RUN-05":
                    raise
                what = "another fleet is driven from this folder, and two would start every job twice"
                raise UserError("E-FLEET-02", what, self.place, "add jobs to it with --add, or name another folder with --in") from None
            for inner in (self.place, self.place / "jobs", self.place / "states"):
                safeio.sweep(inner)
            for job in self.jobs():
                own = self.standing(job.name)
                if own.state == "running":
                    self.keep(job.name, own.ended("waiting", "the driver ended"))
                elif own.state in ("failed", "stopped"):  # asked for anew, with the causes put right
                    self.keep(job.name, Standing(attempts=own.attempts))
            yield

    def add(self, job: Job, settings: str) -> bool:
        """Ask for a job; false if the very same is asked for already. Raises `UserError` if it is another of that name."""
        path = self.settings(job.name)
        if path.with_suffix(".json").is_file():
            if path.is_file() and path.read_text("utf-8") == settings:
                return False
            what = f'a job called "{job.name}" with other settings is in this fleet'
            raise UserError("E-FLEET-03", what, self.place, "give the run another name, or name another folder with --in")
        safeio.write(path, settings)
        safeio.write(path.with_suffix(".json"), json.dumps(asdict(job), indent=1))  # last: a job is there once it is complete
        return True

    def settings(self, name: str) -> Path:
        return self.place / "jobs" / f"{safeio.file_name(name)}.toml"

    def log(self, name: str) -> Path:
        return self.place / "logs" / f"{safeio.file_name(name)}.log"

    def jobs(self) -> list[Job]:
        """All jobs: the most urgent first, then in the order in which they came."""
        for path in self.place.joinpath("jobs").glob("*.json"):
            if path.name not in self._known:
                try:
                    self._known[path.name] = Job(**{**_read(path), "name": unquote(path.stem)})
                except TypeError:
                    raise UserError("E-FLEET-04", "this is no job of a fleet", path, "remove it and add the job again") from None
        return sorted(self._known.values(), key=lambda job: (-job.priority, job.added, job.name))

    def standing(self, name: str) -> Standing:
        said = _read(self._state(name))
        try:
            return Standing(said["state"], said["why"], tuple(Attempt(**one) for one in said["attempts"]))
        except (KeyError, TypeError):  # not begun, or written by no driver: the run's own folder tells how far it is
            return Standing()

    def keep(self, name: str, standing: Standing) -> None:
        """Write down what became of a job, and tell it."""
        safeio.write(self._state(name), json.dumps(asdict(standing), indent=1))
        last = standing.attempts[-1] if standing.attempts else None
        words = {"end": last.end, "node": last.node} if last and last.ended else {}
        self.tell(standing.state, name, attempt=len(standing.attempts), why=standing.why, **words)

    def tell(self, kind: str, job: str = "", **more: Any) -> None:
        safeio.append_line(self.place / "events.jsonl", json.dumps({"time": round(time.time(), 3), "kind": kind, "job": job, **more}))

    def _state(self, name: str) -> Path:
        return self.place / "states" / f"{safeio.file_name(name)}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
