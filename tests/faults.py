"""Disks that crash, fail or lose power under a writer, and a job small enough to meet every one of their moments."""

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import safetensors.torch
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from sdlora import safeio, state
from sdlora.optimizer import groups
from sdlora.optimizers import adamw
from sdlora.packs import file
from sdlora.randomness import stream
from sdlora.safeio import Disk
from sdlora.state import Progress, Restored
from sdlora.train import Learner

STEPS, KEEP = 6, 2
ALLOCATING = ("mkdir", "create", "write", "append", "sync")
"""What a full disk refuses; it still renames and removes."""


class Crash(BaseException):
    """The process is gone: nothing may catch this and go on."""


class Quick(Disk):
    """Flushes nothing: what a process wrote outlives the process, if not the power."""

    def sync(self, file: Any) -> None:
        """The system has it."""

    def sync_folder(self, path: Path) -> None:
        """The system has it."""


class InPlace(Quick):
    """Lets a file be written over another, for writers that do so."""

    def create(self, path: Path) -> Any:
        return path.open("wb")


class Watched:
    """A disk that counts its operations; the others here do something else at some of them."""

    def __init__(self, real: Disk | None = None) -> None:
        self.real, self.calls = real or Quick(), list[str]()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self.step, name)

    def step(self, name: str, *arguments: Any) -> Any:
        self.calls.append(name)
        return self.act(name, *arguments)

    def act(self, name: str, *arguments: Any) -> Any:
        return getattr(self.real, name)(*arguments)

    def half(self, name: str, *arguments: Any) -> None:
        """Do as much of an operation as one that is cut short may do."""
        if name in ("write", "append"):
            target, content = arguments
            getattr(self.real, name)(target, content[: len(content) // 2])


class Crashing(Watched):
    """The process dies in the middle of the `at`-th operation; no clean-up of a dead process reaches the disk."""

    def __init__(self, at: int, real: Disk | None = None) -> None:
        super().__init__(real)
        self.at = at

    def act(self, name: str, *arguments: Any) -> Any:
        if len(self.calls) == self.at:
            self.half(name, *arguments)
        if len(self.calls) >= self.at:
            raise Crash(f"{name}, operation {self.at}")
        return super().act(name, *arguments)


class Failing(Watched):
    """The `at`-th operation is refused, and if it is sticky those after it as well."""

    def __init__(self, at: int, number: int, sticky: bool = False, real: Disk | None = None) -> None:
        super().__init__(real)
        self.at, self.number, self.sticky = at, number, sticky

    def act(self, name: str, *arguments: Any) -> Any:
        later = self.sticky and len(self.calls) > self.at and (self.number != errno.ENOSPC or name in ALLOCATING)
        if len(self.calls) == self.at or later:
            self.half(name, *arguments)
            raise OSError(self.number, os.strerror(self.number))
        return super().act(name, *arguments)


# ---------------------------------------------------------------- power


@dataclass(eq=False)
class File:
    """A file's content, and the beginning of it that is safe on the disk."""

    content: bytes = b""
    durable: bytes = b""

    def lose(self, chance: random.Random) -> None:
        rest = self.content[len(self.durable) :]
        cut = chance.randint(0, len(rest))
        self.content = self.durable + chance.choice([rest, rest[:cut], bytes(len(rest)), rest[:cut] + bytes(len(rest) - cut), b""])
        self.durable = self.content

    def settle(self) -> None:
        self.durable = self.content

    def put(self, path: Path) -> None:
        path.write_bytes(self.content)


@dataclass(eq=False)
class Folder:
    """A folder's names as they are safe on the disk, and the changes since, of which the disk may have any first few."""

    durable: dict[str, "File | Folder"] = field(default_factory=dict)
    pending: list[dict[str, "File | Folder | None"]] = field(default_factory=list)

    def names(self, changes: int | None = None) -> dict[str, "File | Folder"]:
        found: dict[str, File | Folder | None] = dict(self.durable)
        for change in self.pending[:changes]:
            found.update(change)
        return {name: node for name, node in found.items() if node is not None}

    def settle(self) -> None:
        self.durable, self.pending = self.names(), []

    def lose(self, chance: random.Random) -> None:
        lost = min(int(chance.expovariate(0.3)), len(self.pending)) if chance.random() < 0.7 else chance.randint(0, len(self.pending))
        self.durable, self.pending = self.names(len(self.pending) - lost), []
        for node in self.durable.values():
            node.lose(chance)

    def put(self, path: Path) -> None:
        path.mkdir()
        for name, node in self.durable.items():
            node.put(path / name)


class Power(Crashing):
    """A disk whose power fails at the `at`-th operation. What was not flushed may be there, cut short, zeros or gone.

    Each folder keeps the order of its own changes and no other, which is less than journals promise. Not `flushing`: it lies.
    """

    def __init__(self, root: Path, flushing: bool = True) -> None:
        super().__init__(0)
        self.root, self.flushing, self.top = root, flushing, Folder()

    def run(self, at: int) -> None:
        """From now on, fail at the `at`-th operation."""
        self.at, self.calls = at, []

    def node(self, path: Path) -> Any:
        found: Any = self.top
        for name in path.relative_to(self.root).parts:
            found = found.names()[name]
        return found

    def act(self, name: str, *arguments: Any) -> Any:
        if self.at and len(self.calls) >= self.at:
            if len(self.calls) == self.at and name in ("write", "append"):
                getattr(self, f"on_{name}")(arguments[0], arguments[1][: len(arguments[1]) // 2])
            raise Crash(name)
        getattr(self, f"on_{name}")(*arguments)
        return getattr(self.real, name)(*arguments)

    def change(self, folder: Path, **names: "File | Folder | None") -> None:
        self.node(folder).pending.append(names)

    def on_mkdir(self, path: Path) -> None:
        self.change(path.parent, **{path.name: Folder()})

    def on_create(self, path: Path) -> None:
        assert path.name not in self.node(path.parent).names()
        self.change(path.parent, **{path.name: File()})

    def on_write(self, file: Any, content: bytes) -> None:
        self.node(Path(file.name)).content += content

    def on_append(self, path: Path, content: bytes) -> None:
        if path.name not in self.node(path.parent).names():
            self.on_create(path)
        self.node(path).content += content

    def on_sync(self, file: Any) -> None:
        if self.flushing:
            self.node(Path(file.name)).settle()

    def on_sync_folder(self, path: Path) -> None:
        if self.flushing:
            self.node(path).settle()

    def on_replace(self, old: Path, new: Path) -> None:
        assert old.parent == new.parent, "between folders there is no order"
        self.change(old.parent, **{old.name: None, new.name: self.node(old)})

    def on_unlink(self, path: Path) -> None:
        self.change(path.parent, **{path.name: None})

    on_rmdir = on_unlink

    def fail(self, chance: random.Random) -> None:
        """What the disk holds when the power is back."""
        self.top.lose(chance)
        shutil.rmtree(self.root)
        self.top.put(self.root)


# ---------------------------------------------------------------- the job


def save_in_place(run: Path, progress: Progress, learners: Sequence[Learner], _: int) -> None:
    """Checkpoints as they are usually written: over the last one, file after file, each the state of its own step."""
    disk: Any = safeio.DISK.get()
    weights, slots = {}, {}
    for learner in learners:
        for name, parameter in learner.params.items():
            weights[name] = parameter.detach()
            slots |= {f"{name}/{slot}": torch.as_tensor(value) for slot, value in learner.optimizer.state[parameter].items()}
    folder = run / "checkpoints"
    if not folder.is_dir():
        disk.mkdir(folder)
    contents = {"weights": safetensors.torch.save(weights), "slots": safetensors.torch.save(slots), "step": str(progress.step).encode()}
    for name, content in contents.items():
        with disk.create(folder / name) as opened:  # of a disk that lets it: `InPlace`
            disk.write(opened, content)


def restore_in_place(run: Path, learners: Sequence[Learner], _: int) -> Restored:
    folder = run / "checkpoints"
    if not (folder / "step").exists():
        return Restored(Progress())
    weights, slots = (safetensors.torch.load((folder / name).read_bytes()) for name in ("weights", "slots"))
    for learner in learners:
        for name, parameter in learner.params.items():
            parameter.data.copy_(weights[name])
            own = {key.rpartition("/")[2]: value for key, value in slots.items() if key.startswith(f"{name}/")}
            learner.optimizer.state[parameter] = own
    return Restored(Progress(int((folder / "step").read_text())))


@dataclass
class Outcome:
    """What a job told before it ended, however it ended."""

    first: int | None = None
    damaged: Sequence[Path] = ()
    saved: int = 0
    digest: str = ""


def new_learner() -> Learner:
    params = {name: nn.Parameter(torch.linspace(-1, 1, size)) for name, size in (("up", 6), ("down", 4))}
    accelerate.Accelerator(cpu=True)  # what wraps an optimizer reads the process's state
    optimizer = AcceleratedOptimizer(adamw.new(groups([(params, 0.05)]), adamw.Config()))
    return Learner("mira", None, params, optimizer, None, None)  # type: ignore[arg-type]


def advance(learner: Learner, step: int) -> None:
    """One optimizer step, which like a real one depends on the weights, the optimizer's slots and the step's own noise."""
    for name, parameter in learner.params.items():
        noise = stream(0, f"noise/{name}", step).standard_normal(parameter.shape)
        parameter.grad = parameter.detach() * 0.3 + torch.from_numpy(noise).float()
    learner.optimizer.optimizer.mask(torch.tensor(True))
    learner.optimizer.step()


def job(out: Path, outcome: Outcome, save: Callable[..., Any] = state.save, restore: Callable[..., Restored] = state.restore) -> None:
    """As `sdlora.job` deals with a run folder: settings, sweep, restore, log and checkpoint each step, the pack."""
    safeio.write(out / "config.toml", "seed = 0\n")
    safeio.sweep(out)
    safeio.sweep(out / "checkpoints")
    learner = new_learner()
    found = restore(out, [learner], STEPS)
    outcome.first, outcome.damaged = found.progress.step, found.damaged
    for step in range(found.progress.step, STEPS):
        advance(learner, step)
        safeio.append_line(out / "events.jsonl", json.dumps({"step": step + 1}))
        save(out, Progress(step + 1), [learner], KEEP)
        outcome.saved = step + 1
    path = out / "mira.safetensors"
    file.save(path, {name: parameter.detach() for name, parameter in learner.params.items()}, lambda sha256: {"sha256": sha256})
    outcome.digest = hashlib.sha256(path.read_bytes()).hexdigest()


Job = Callable[[Path, Outcome], None]
in_place: Job = partial(job, save=save_in_place, restore=restore_in_place)


def attempt(job: Job, out: Path, disk: Any) -> Outcome:
    """Run a job on a disk until it ends or crashes."""
    outcome = Outcome()
    with crashing_allowed(), safeio.using(disk):
        job(out, outcome)
    return outcome


@contextmanager
def crashing_allowed() -> Iterator[None]:
    try:
        yield
    except Crash:
        return
