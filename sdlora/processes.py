"""Several processes that take one run's steps together: who leads, what they tell one another, and how all end when one is gone.

Each computes its share of a step's samples, the gradients are summed, and all take the same step. Process 0 leads: it alone writes, and
says before each step what is to be done. In training only gradients, a few flags and what process 0 says travel; encoded pictures before.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from sdlora.errors import RESOURCES, UserError

T = TypeVar("T")
GONE = "E-PROC-03"
"""Another process of the run is gone."""
JOIN_S = 180.0
"""Within which all processes of a run must have come: the first imports of a slow disk take a minute."""
BEAT_S, STALE_S, GRACE_S = 1.0, 12.0, 8.0
"""Seconds between two signs of life; without one after which a process counts as gone; and which the others have to end by themselves."""
NAMING_S, HEARD_S = 4.0, 3.0
"""How long a cause is waited for where a connection broke, and how long a process that fails waits until all have heard why."""
FOREVER = timedelta(days=365)
"""What others do between two steps may take any time; whether they live is told by their signs of life."""
RESUME = "the last checkpoint is good: see to the cause, and go on with `sdlora resume RUN`, with as many processes as you like"


class Processes:
    """Those that take a run's steps. This is a process by itself, which every one of these costs nothing."""

    rank, count = 0, 1

    @property
    def leads(self) -> bool:
        """Whether this one writes and decides."""
        return self.rank == 0

    @property
    def asked(self) -> int:
        """The signal by which another process was asked to stop; 0: none was."""
        return 0

    def most(self, count: int) -> int:
        """The most of so many samples that one process has."""
        return -(-count // self.count)

    def part(self, samples: Sequence[T]) -> Sequence[T]:
        """This process's own of a step's samples: those that lie together, and as many as others have, or one more."""
        return samples[self.rank * len(samples) // self.count : (self.rank + 1) * len(samples) // self.count]

    def told(self, value: Any) -> Any:
        """What process 0 says, anything that JSON holds."""
        return value

    def handed(self, content: bytes) -> bytes:
        """What process 0 has."""
        return content

    def joined(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all processes, by name, on the CPU."""
        return own

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Each flag, true if it is so in any process."""
        return [*flags]

    def sum_into(self, values: Tensor) -> None:
        """Put the sum over all processes into a tensor."""

    def check(self, problem: UserError | None) -> None:
        """Raise the problem here, and that there is one everywhere else, so that all end at once."""
        if problem:
            raise problem

    def alike(self, own: Mapping[str, str]) -> None:
        """Raise `UserError` in all processes where any of them has, by some name, something else than process 0."""
        first = self.told(dict(own))
        other = [f"{name} ({own.get(name, 'none')[:60]} here, {first.get(name, 'none')[:60]} in process 0)" for name in {**first, **own}
                 if own.get(name) != first.get(name)]  # fmt: skip
        todo = "give all of them the same command line, pictures, base and version of sdlora"
        self.check(UserError("E-PROC-05", f"processes of one run differ: {', '.join(other)}", "start", todo) if other else None)

    def dealt(self, count: int) -> range:
        """Which of so many things this process does for all."""
        return range(self.rank, count, self.count)

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Process 0 first, then one of each machine, then the others: what the first leave on the disk the rest find there."""
        yield

    def ask(self, signum: int) -> None:
        """Pass on to process 0 that this one was asked to stop."""

    def leave(self) -> None:
        """No more is done together."""


ALONE = Processes()


def checksum(network: nn.Module) -> int:
    """The sum of all bits of a network's parameters, taken as whole numbers: no order of summation changes it."""
    return sum(int(one.detach().flatten().view(torch.uint8).sum(dtype=torch.int64)) for one in network.parameters())


class Watch:
    """Two threads: one gives signs of life through the store and looks for those of the others, the other ends this process if it hangs."""

    def __init__(self, store: Any, rank: int, names: Sequence[str]) -> None:
        self.store, self.rank, self.names = store, rank, names
        self.lost, self.signum = "", 0  # what became of another process; the signal that one of them was sent
        self.over, self.heard = threading.Event(), time.monotonic()
        self.seen = {other: (0, time.monotonic()) for other in (range(len(names)) if rank == 0 else [0]) if other != rank}
        for work in (self._beat, self._guard):
            threading.Thread(target=work, daemon=True).start()

    def _beat(self) -> None:
        while not self.over.wait(BEAT_S) and not self.lost:
            try:
                self._look()
            except RuntimeError:  # of a store, and so the process or launcher that held it
                self.lost = self.lost or f"{self.names[0]}, or the launcher there, is gone"

    def _look(self) -> None:
        self.store.add(f"beat/{self.rank}", 1)
        for other, (beat, since) in self.seen.items():
            now = self.store.add(f"beat/{other}", 0)
            if now != beat:
                self.seen[other] = now, time.monotonic()
            elif time.monotonic() - since > STALE_S and not self.store.check([f"left/{other}"]):
                self.store.set("ended", f"{self.names[other]} is gone: it was killed, or hangs, or its machine cannot be reached")
        if self.rank == 0 and not self.signum and self.store.check(["signal"]):
            self.signum = int(self.store.get("signal"))
        if self.store.check(["ended"]):
            self.lost = self.store.get("ended").decode()
            self.store.add("heard", 1)
        self.heard = time.monotonic()

    def _guard(self) -> None:
        """End a process that does not end by itself, as where a device waits for another process's forever."""
        since = None
        while not self.over.wait(BEAT_S):
            if self.silent():
                since = since or time.monotonic()
                if time.monotonic() - since > GRACE_S:
                    print(f"error: {gone(self.silent())}", file=sys.stderr, flush=True)
                    os._exit(RESOURCES)

    def silent(self) -> str:
        """Who is gone, if anybody is."""
        if not self.lost and time.monotonic() - self.heard > STALE_S + BEAT_S:
            return f"{self.names[0]}, or the launcher there, no longer answers"
        return self.lost

    def late(self) -> str:
        """Who has missed signs of life, although it may be early to call it gone."""
        missing = [self.names[other] for other, (_, since) in self.seen.items() if time.monotonic() - since > 2 * BEAT_S]
        return " and ".join(missing)


def gone(what: str) -> UserError:
    return UserError(GONE, f"{what}; no step is taken without it, so all processes of the run end", "training", RESUME, RESOURCES)


class Company(Processes):
    """Several, each of which a launcher started with the same command line."""

    def __init__(self, store: Any, rank: int, names: Sequence[str]) -> None:
        self.rank, self.count, self.names, self._store = rank, len(names), names, store
        # as in the launcher's variable, or by the machine's name
        self.local = int(os.environ.get("LOCAL_RANK", [name.split()[-1] for name in names[:rank]].count(names[rank].split()[-1])))
        devices = torch.cuda.device_count()
        if devices and self.local >= devices:
            what = f"{names[rank]} is number {self.local + 1} on its machine, which has {devices} GPUs"
            raise UserError("E-PROC-04", what, "the launcher", f"start {devices} there (--nproc_per_node {devices}); a cast shares one GPU")
        if devices:
            torch.cuda.set_device(self.local)
        backend = "cpu:gloo,cuda:nccl" if devices else "gloo"
        dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=self.count, timeout=FOREVER)
        self._watch = Watch(store.clone(), rank, names)

    @property
    def asked(self) -> int:
        return self._watch.signum

    def told(self, value: Any) -> Any:
        return json.loads(self.handed(json.dumps(value).encode() if self.leads else b""))

    def handed(self, content: bytes) -> bytes:
        return self._sent(content, 0)

    def joined(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for source in range(self.count):
            content = self._sent(safetensors.torch.save(own) if source == self.rank else b"", source)
            found |= own if source == self.rank else safetensors.torch.load(content)
        return found

    def _sent(self, content: bytes, source: int) -> bytes:
        size = torch.tensor([len(content)], dtype=torch.int64)
        self._wait(dist.broadcast(size, source, async_op=True))
        held = torch.empty(int(size), dtype=torch.uint8)
        if source == self.rank:
            held = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else held
        if len(held):
            self._wait(dist.broadcast(held, source, async_op=True))
        return held.numpy().tobytes()

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        found = torch.tensor(flags, dtype=torch.uint8)
        self._wait(dist.all_reduce(found, dist.ReduceOp.MAX, async_op=True))
        return [bool(flag) for flag in found.tolist()]

    def sum_into(self, values: Tensor) -> None:
        if values.device.type == "cuda":
            dist.all_reduce(values)  # on the device's own queue: nothing here waits for it
            return
        held = values.cpu()
        self._wait(dist.all_reduce(held, async_op=True))
        values.copy_(held)

    def check(self, problem: UserError | None) -> None:
        (any_has,) = self.any_of([problem is not None])
        if problem:
            raise problem
        if any_has:
            raise self._cause()

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        turn = 0 if self.leads else 1 if self.local == 0 else 2
        for _ in range(turn):
            self.any_of([True])
        yield
        for _ in range(2 - turn):
            self.any_of([True])

    def ask(self, signum: int) -> None:
        self._store.set("signal", str(signum))

    def leave(self) -> None:
        if not self._watch.over.is_set():
            self._watch.over.set()
            with contextlib.suppress(RuntimeError):
                self._store.set(f"left/{self.rank}", "")
                dist.destroy_process_group()

    def fail(self, what: str) -> None:
        """Leave, and let the others know why."""
        if self._watch.over.is_set():
            return
        with contextlib.suppress(RuntimeError):
            if not self._watch.lost:
                self._watch.lost = what  # its own threads look no further
                self._store.set("ended", f"{self.names[self.rank]} has ended: {what}")
            end = time.monotonic() + HEARD_S
            while time.monotonic() < end and self._store.add("heard", 0) < self.count - 1:
                time.sleep(0.05)
        self._watch.over.set()

    def _wait(self, work: Any) -> None:
        """Until a collective is done, or another process is known to be gone."""
        while True:
            try:
                work.wait(timedelta(seconds=BEAT_S))
                return
            except RuntimeError as error:
                if work.is_completed():  # a connection broke
                    raise self._cause() from error
            if self._watch.silent():
                raise gone(self._watch.silent())

    def _cause(self) -> UserError:
        """What became of the others, as far as that is known soon."""
        end = time.monotonic() + NAMING_S
        while not self._watch.silent() and time.monotonic() < end:
            time.sleep(0.05)
        others = [name for name in self.names if name != self.names[self.rank]]
        who = self._watch.late() or (others[0] if len(others) == 1 else "one of the other processes")
        return gone(self._watch.silent() or f"the connection to {who} broke: it was killed, or its machine is gone")


@contextlib.contextmanager
def together(environment: Mapping[str, str] = os.environ, seconds: float = JOIN_S) -> Iterator[Processes]:
    """All processes that a launcher started for this run, by its environment variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT);
    without them this one alone. Whatever ends the block by an error ends all of them."""
    if count_of(environment) == 1:
        yield ALONE
        return
    company = _come(environment, seconds)
    try:
        yield company
    except UserError as error:
        company.fail(str(error))
        raise
    except BaseException as error:
        company.fail(f"{type(error).__name__}: {error}" if isinstance(error, Exception) else "it was stopped at once")
        raise
    finally:
        company.leave()


def count_of(environment: Mapping[str, str]) -> int:
    """How many processes a launcher says it started."""
    said = environment.get("WORLD_SIZE") or "1"
    if not said.isdecimal() or int(said) < 1:
        raise UserError("E-PROC-01", f'WORLD_SIZE is "{said}", and no number of processes', "environment", "unset it, or use torchrun")
    return int(said)


def leads(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process would be the one that writes and tells."""
    return count_of(environment) == 1 or environment.get("RANK", "0") == "0"


def _come(environment: Mapping[str, str], seconds: float) -> Company:
    count = count_of(environment)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing or not environment["RANK"].isdecimal() or int(environment["RANK"]) >= count:
        what = f"WORLD_SIZE says that {count} processes train together, and {' and '.join(missing) or 'RANK'} does not fit"
        raise UserError(
            "E-PROC-01", what, "environment", "start them by torchrun or accelerate launch, or unset WORLD_SIZE to train in one"
        )
    rank, where = int(environment["RANK"]), f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    began, limit = time.monotonic(), timedelta(seconds=seconds)
    try:
        store, _, _ = next(rendezvous("env://", rank, count, timeout=limit))
        run = store.add(f"runs/{rank}", 1)  # of a program that trains several, one after another
        store = PrefixStore(f"sdlora/{run}", store)
    except (RuntimeError, ValueError, OSError) as error:
        what = f"process {rank} of {count} cannot reach where all meet, after {time.monotonic() - began:.0f} s: {error}".splitlines()[0]
        todo = "check MASTER_ADDR and MASTER_PORT, that process 0 runs, and that no firewall is between them"
        raise UserError("E-PROC-02", what, where, todo, RESOURCES) from None
    store.set(f"name/{rank}", f"process {rank} of {count} (pid {os.getpid()}) on {socket.gethostname()}")
    names = []
    for other in range(count):
        while not store.check([f"name/{other}"]):
            if time.monotonic() - began > seconds:
                what = f"process {other} of {count} has not come within {seconds:.0f} s"
                raise UserError("E-PROC-02", what, where, "look for its own error, and start all of them at about the same time", RESOURCES)
            time.sleep(0.05)
        names.append(store.get(f"name/{other}").decode())
    return Company(store, rank, names)
