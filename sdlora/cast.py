"""Runs side by side over one base: each is told, saved, stopped and finished as if it were alone. A run by itself is a cast of one."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from sdlora import devices, estimate, family, job, lock, state
from sdlora.adapter import Bank
from sdlora.config import Run
from sdlora.data import ledger, store
from sdlora.errors import UserError
from sdlora.events import Event, Log
from sdlora.family import Base, Family
from sdlora.job import Member
from sdlora.learners import Job, check_objective, check_optimizer, doubts, given, pieces
from sdlora.stop import Stop
from sdlora.studio import Studio
from sdlora.trackers import Trackers
from sdlora.train import Setup, steps

Runs = Sequence[tuple[Run, Path]]
"""Settings, and the folder of each."""
Told = Iterator[tuple[str, Event]]
"""(a member's name, what becomes of it)."""


def run(settled: Run, base: Base, out: Path, stop: Stop | None = None) -> Iterator[Event]:
    """Train a resolved run into a folder, going on from its last checkpoint if it has one. Every event is also in its log."""
    for _, event in train([(settled, out)], base, stop):
        yield event


def train(runs: Runs, base: Base, stop: Stop | None = None, asked: Path | None = None) -> Told:
    """Train resolved runs over one base, each into its own folder. Files in `asked` ask all of them to stop, save or show themselves.

    Who breaks leaves the others to go on; the first error is raised in the end.
    """
    stop = stop or Stop()
    accelerator, dtype = devices.for_training(given(runs[0][0].train.precision))
    trackers = []
    for settled, out in runs:
        job.check_folder(settled, out)
        check_optimizer(settled)
        trackers.append(Trackers(settled.train.trackers, settled.name, out / "trackers"))
    with contextlib.ExitStack() as stack:
        loaded, jobs, said = _settle(runs, base, accelerator, dtype, stack)
        timing, members = estimate.pace_name(runs[0][0], loaded), []
        for one, tracker in zip(jobs, trackers, strict=True):
            own = stop if len(jobs) == 1 else Stop(above=stop)
            members.append(Member(one, own, stack.enter_context(tracker), Log(one.out / "events.jsonl")))
        for member, events in zip(members, said, strict=True):
            yield from follow(member, events)
        told = _together(members, loaded, accelerator, stop, asked)
        del loaded  # what tells makes room once it is trained
        yield from told
        for error in (member.error for member in members if member.error):
            raise error
        if len(members) == 1:  # in company a step takes longer
            estimate.keep_pace(timing, jobs[0].kept, members[0].pace)


def _settle(
    runs: Runs, base: Base, accelerator: Accelerator, dtype: torch.dtype, stack: contextlib.ExitStack
) -> tuple[Family, list[Job], list[list[Event]]]:
    """The loaded base, the runs once they are known to suit it, in folders that are theirs, and what is to be said of each first."""
    began = time.time()
    unlocked = [stack.enter_context(lock.held(out)) for _, out in runs]
    notes = [job.check_folder(*one) for one in runs]
    kept = [store.usual(out / "cache") for _, out in runs]
    found = [ledger.read_dataset(settled, out / "cache", own) for (settled, out), own in zip(runs, kept, strict=True)]
    loaded = family.load(base, accelerator.device, dtype)
    jobs, said = [], []
    for (settled, out), pictures, own in zip(runs, found, kept, strict=True):
        check_objective(settled, loaded)
        jobs.append(Job(settled, base, out, began, ledger.fit_dataset(pictures, settled, loaded), pieces(settled, loaded), own))
    for one, changes, warned in zip(jobs, notes, unlocked, strict=True):
        warnings = [warned] * bool(warned) + doubts(one.settled, loaded, one.pieces)
        said.append([Event("note", text) for text in changes] + [Event("warning", text) for text in warnings])
    for one in jobs:
        job.prepare_folder(one.settled, one.out, accelerator.device)
    return loaded, jobs, said


def _together(members: Sequence[Member], loaded: Family, accelerator: Accelerator, stop: Stop, asked: Path | None) -> Told:
    """From the pictures to the packs."""
    for member in members:
        yield from follow(member, job.prepare(member, loaded))
    setup = Setup(loaded, Bank(loaded.components), [])
    for member in going(members):
        yield from follow(member, job.start(member, setup, accelerator))
    level(going(members))
    yield from _steps(going(members), setup, stop, asked)
    stopped = [member for member in going(members) if given(member.course).stopped]
    ended = [member for member in going(members) if member not in stopped]
    if stop.stopping and stopped:  # whose training has ended is finished when all go on
        ended = []
    for member in ended:
        yield from follow(member, job.take_off(member))
    base = members[0].job.base
    for member in members:
        member.course = None
    del loaded, setup  # the base is loaded again in the precision of pictures: make room
    accelerator.free_memory()
    if ended:
        studio = Studio.open(base)
        for member in going(ended):
            yield from follow(member, job.finish(member, studio))


def _steps(members: Sequence[Member], setup: Setup, stop: Stop, asked: Path | None) -> Told:
    """The training of all; whoever is through, breaks or is stopped leaves the others to go on."""
    with stop.gently():
        for member in members:
            yield from follow(member, given(member.course).begin())
        try:
            for trained in steps(setup):
                if asked:
                    stop.look(asked)
                    stop.pass_on([member.stop for member in members])
                for member in members:
                    course = given(member.course)
                    if course.slot in trained.loss:
                        yield from follow(member, course.after(trained))
                    elif stop.stopping and not course.learner.is_through:
                        yield from follow(member, course.halt())
        except UserError as error:  # of a step that they shared
            for member in (one for one in members if not given(one.course).learner.is_through):
                yield from follow(member, broken(error))


def broken(error: UserError) -> Iterator[Event]:
    """Events that end in an error at once."""
    yield from ()
    raise error


def level(members: Sequence[Member]) -> None:
    """Let those that were saved side by side go on from one step, the newest that all of them saved, so that they go on as they would have
    without the stop. Who was trained alone since then stays where it is: the others catch up."""
    courses = [given(member.course) for member in members]
    behind = [course for course in courses if course.progress.beside and not course.is_over]
    if len({course.progress.step for course in behind}) < 2:
        return
    newest = min(course.progress.step for course in behind)
    shared = set.intersection(*(set(state.steps(course.out)) for course in behind))
    common = max((step for step in shared if step <= newest), default=0)
    for course in behind:
        if common and course.progress.step != common:
            found = state.restore(course.out, [course.learner], common)
            course.progress, course.learner.step = found.progress, found.progress.step


def follow(member: Member, events: Iterable[Event]) -> Told:
    for event in member.follow(events):
        yield member.job.settled.name, event


def going(members: Sequence[Member]) -> list[Member]:
    return [member for member in members if not member.error]
