"""The engine of a fleet on Ray: a task is a command line and strings; nothing of Ray is known elsewhere."""

import os
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import RayError, RayTaskError

from sdlora import children
from sdlora.errors import RESOURCES, UserError
from sdlora.fleet.work import Outcome, Room, Task

STORE_BYTES = 80 * 2**20
"""Ray's memory for objects, the least it takes: only strings go through it."""
SAID_LINES = 200
CONNECT_S = 10
CLIENT_PORT = 10001


def errand(arguments: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
    """On a worker: a Python command as a child that dies with it; its exit code, the node, its last lines."""
    words = ["-m", "sdlora.fleet.bound", str(os.getpid()), *arguments]
    said = deque[str](maxlen=SAID_LINES)
    with children.start(words, environment, stdout=children.READ, stderr=children.AS_STDOUT) as process:
        assert process.stdout
        said.extend(process.stdout)
    return process.returncode, socket.gethostname(), "".join(said)


class Rays:
    """Tasks on a Ray cluster. None is retried by Ray: who drives the fleet writes every attempt down."""

    def __init__(self) -> None:
        self._tasks = dict[Any, str]()

    def room(self) -> Room:
        with _told():
            found = ray.cluster_resources()
        return Room(found.get("CPU", 0.0), found.get("GPU", 0.0))

    def start(self, name: str, task: Task) -> None:
        with _told():
            remote: Any = ray.remote(max_retries=0, num_cpus=task.room.cpus, num_gpus=task.room.gpus)(errand)
            self._tasks[remote.remote(list(task.arguments), dict(task.environment))] = name

    def ended(self, seconds: float) -> dict[str, Outcome]:
        found = {}
        with _told():
            ready, _ = ray.wait(list(self._tasks), num_returns=1, timeout=seconds) if self._tasks else ([], [])
            for task in ready:
                found[self._tasks.pop(task)] = _outcome(task)
        return found


def _outcome(task: Any) -> Outcome:
    try:
        return Outcome(*ray.get(task))
    except RayTaskError as error:  # of the function itself, or because the node has no sdlora
        return Outcome(
            2, "", f"E-FLEET-08 · the node could not run it; is sdlora installed there, as here? · {str(error).splitlines()[-1]}"
        )
    except RayError as error:  # the worker, or its node, is gone
        return Outcome(None, "", str(error))


@contextmanager
def _told() -> Iterator[None]:
    """A cluster that cannot be asked any more as a `UserError`."""
    try:
        yield
    except (ConnectionError, RayError, RuntimeError) as error:
        what = f"the cluster is gone: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        raise UserError("E-FLEET-09", what, "--on", "start the fleet again: it goes on from the checkpoints", RESOURCES) from error


@contextmanager
def cluster(address: str, cpus: int) -> Iterator[Rays]:
    """An engine on the cluster that is named, or on a Ray of this machine's own, which ends with it. Raises `UserError`.

    For the latter RAY_AUTH_TOKEN must have been set before Ray was imported, as it listens to the whole network.
    """
    here: dict[str, Any] = {
        "num_cpus": cpus,
        "include_dashboard": False,
        "dashboard_host": "127.0.0.1",
        "object_store_memory": STORE_BYTES,
        "_system_config": {"worker_niceness": 0},
    }
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # no figures are sent to anybody
    given = {"address": address} if address else {"address": "local", **here}  # never what RAY_ADDRESS says: nobody named it
    if "://" in address:
        _reach(address)
    try:
        ray.init(**given, log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as error:
        raise _unreachable(address, str(error)) from error
    try:
        yield Rays()
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """See at once whether anybody listens there: Ray's own client tries for half a minute."""
    place = urlsplit(address)
    try:
        socket.create_connection((place.hostname or "", place.port or CLIENT_PORT), CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise _unreachable(address, str(error)) from error


def _unreachable(address: str, reason: str) -> UserError:
    what = f"no Ray cluster answers: {reason.splitlines()[0] if reason else 'no reason given'}; nothing was started"
    return UserError("E-FLEET-10", what, address or "a Ray on this machine", "see that it runs and is reached from here", RESOURCES)
