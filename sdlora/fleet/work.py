"""A fleet at work: who is started next, and what is done when a job ends or its worker dies. The engine that starts them is any."""

import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sdlora import queue, safeio
from sdlora.errors import UserError
from sdlora.fleet.folder import OVER, Folder, Job, Standing, State
from sdlora.fleet.storage import Storage

LOST = (-signal.SIGKILL, 128 + signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, 129)
"""How a run ends whose machine is taken away: killed, or asked to stop by somebody who is not us."""
PAUSE_S = 1.0
"""Before a lost job is started again."""
CARRIED = re.compile(r"SDLORA_\w+|HF_HUB_OFFLINE|HF_HOME")
"""What of the environment goes along with a job: no secrets."""


@dataclass(frozen=True)
class Task:
    """What a worker is given: arguments for Python and strings, and what room it has."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    room: "Room"


@dataclass(frozen=True)
class Outcome:
    """How a task ended."""

    code: int | None  # the exit code; None: its worker died
    node: str
    said: str  # its last lines


@dataclass(frozen=True)
class Room:
    """CPUs and GPUs."""

    cpus: float
    gpus: float

    def of(self, job: Job) -> "Room":
        """What a job takes of this cluster."""
        return Room(job.cpus, float(self.gpus >= 1) if job.gpus is None else job.gpus)

    def holds(self, others: "Sequence[Room]") -> bool:
        """Whether all of them fit in at once, as far as sums tell."""
        return sum(one.cpus for one in others) <= self.cpus + 1e-6 and sum(one.gpus for one in others) <= self.gpus + 1e-6


class Engine(Protocol):
    """Whatever runs tasks on other processes or machines."""

    def room(self) -> Room:
        """What the cluster has in all."""

    def start(self, name: str, task: Task) -> None: ...

    def ended(self, seconds: float) -> dict[str, Outcome]:
        """What ended since it was asked last, waiting for so long at most."""


@dataclass
class Fleet:
    """A folder, where its runs go, and the rules."""

    folder: Folder
    store: str  # a path that all nodes see, or an address of fsspec
    limits: Mapping[str, int] = field(default_factory=dict)  # jobs of a user at once
    attempts: int = 5  # times that a job's worker may die in one go
    _later: dict[str, float] = field(default_factory=dict)
    _lost: dict[str, int] = field(default_factory=dict)
    _standings: dict[str, Standing] = field(default_factory=dict)  # while it is at work nobody else writes them

    def work(self, engine: Engine, asked: list[int]) -> Iterator[list[tuple[Job, Standing]]]:
        """Run what waits until nothing does, or a signal is in `asked`: then the runs save and stop; at a second one it returns at once.

        Yields how all stand, again and again. The folder must be held.
        """
        told = False
        self._standings.clear()
        while True:
            standings = [(job, self._standing(job.name)) for job in self.folder.jobs()]
            running = [job for job, one in standings if one.state == "running"]
            if asked and not told:
                for job in running:
                    self._ask(job)
                told = True
            if not asked:
                room = engine.room()
                for job in self._next(standings, room):
                    self._start(job, engine, room.of(job))
                    running.append(job)
            yield standings
            waits = any(one.state not in OVER for _, one in standings)
            if len(asked) > 1 or (not running and (asked or not waits)):
                return
            for name, outcome in engine.ended(0.5).items():
                self._end(name, outcome, bool(asked))

    def _next(self, standings: Sequence[tuple[Job, Standing]], room: Room) -> list[Job]:
        """Who is started now. Nobody passes a more urgent job for which only room is wanting, so that none waits for ever."""
        running = [job for job, one in standings if one.state == "running"]
        found = list[Job]()
        for job, one in standings:
            taken = [*running, *found]
            ours = sum(other.user == job.user for other in taken)
            if one.state != "waiting" or ours >= self.limits.get(job.user, ours + 1):
                continue
            own = room.of(job)
            if not room.holds([own]):
                if not running:  # machines may come back while others still work
                    what = f"it takes {own.cpus:g} CPUs and {own.gpus:g} GPUs, and the cluster has {room.cpus:g} and {room.gpus:g} in all"
                    self._keep(job.name, Standing("failed", f"E-FLEET-05 · {what}", one.attempts))
                continue
            if not room.holds([own, *map(room.of, taken)]) or time.monotonic() < self._later.get(job.name, 0):
                break
            found.append(job)
        return found

    def _start(self, job: Job, engine: Engine, room: Room) -> None:
        standing = self._standing(job.name).begun()
        self._keep(job.name, standing)
        stop = self._stop(job)
        if isinstance(stop, Path) and stop.exists():  # that its last attempt did not live to read
            safeio.remove(stop)
        elif isinstance(stop, str):
            Storage.open(self.store).remove(stop)
        environment = {key: value for key, value in os.environ.items() if CARRIED.fullmatch(key)}
        threads = {"OMP_NUM_THREADS": str(job.cpus), "HF_HUB_DISABLE_TELEMETRY": "1"}
        engine.start(job.name, Task(command(self, job, len(standing.attempts)), environment | threads, room))

    def _end(self, name: str, outcome: Outcome, asked: bool) -> None:
        safeio.write(self.folder.log(name), outcome.said)
        own, why = self._standing(name), queue.error_line(outcome.said)
        end = "its worker died" if outcome.code is None else f"code {outcome.code}"
        state: State = "failed"
        if outcome.code == 0:
            state, why = "finished", ""
        elif asked and outcome.code in (130, *LOST, None):
            state, why = "waiting", ""
        elif outcome.code == 130:
            state = "stopped"  # by a file in its folder
        elif outcome.code is None or outcome.code in LOST or "E-RUN-05" in why:  # E-RUN-05: the attempt before is not quite dead
            self._lost[name] = self._lost.get(name, 0) + 1
            if self._lost[name] < self.attempts:
                state, why, self._later[name] = "waiting", "", time.monotonic() + PAUSE_S
            else:
                why = f"E-FLEET-06 · it was lost {self._lost[name]} times, the last time as {end}: {why}"
        elif "E-BASE" in why or "E-HUB" in why:
            why += f" (on the node {outcome.node}: give every node the base, and start the fleet again)"
        self._keep(name, own.ended(state, end, outcome.node, why))

    def _standing(self, name: str) -> Standing:
        if name not in self._standings:
            self._standings[name] = self.folder.standing(name)
        return self._standings[name]

    def _keep(self, name: str, standing: Standing) -> None:
        self.folder.keep(name, standing)
        self._standings[name] = standing

    def _stop(self, job: Job) -> Path | str:
        """The file that asks a job to save and stop."""
        return Path(self.store) / job.name / "stop" if Storage.is_local(self.store) else f"stops/{job.name}"

    def _ask(self, job: Job) -> None:
        stop = self._stop(job)
        if isinstance(stop, str):
            Storage.open(self.store).write(stop, b"")
        elif stop.parent.is_dir():
            safeio.write(stop, "")


def command(fleet: Fleet, job: Job, attempt: int) -> list[str]:
    """Arguments for Python that run a job, or go on with it."""
    if Storage.is_local(fleet.store):
        out = Path(fleet.store) / job.name
        return ["-m", "sdlora.cli", "train", "--config", str(fleet.folder.settings(job.name)), "--out", str(out)]
    return ["-m", "sdlora.fleet.carried", fleet.store, job.name, str(attempt)]


def check(standings: Sequence[tuple[Job, Standing]], place: Path) -> None:
    """Raise `UserError` if a job failed."""
    failed = [(job.name, one.why) for job, one in standings if one.state == "failed"]
    if failed:
        what = f"{len(failed)} of {len(standings)} jobs failed, {failed[0][0]} for instance: {failed[0][1]}"
        raise UserError("E-FLEET-07", what, place, "put the causes right and start the fleet again: what is finished stays")
