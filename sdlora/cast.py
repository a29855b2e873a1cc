"""Runs side by side over one base: each is told, saved, stopped and finished as if it were alone. A run by itself is a cast of one."""

import contextlib
import functools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w
import torch
from accelerate import Accelerator

from sdlora import compiled, devices, estimate, family, graphs, job, learners, lock, plan, processes, profiling, safeio, settings, state
from sdlora.adapter import Bank
from sdlora.config import Run, flat
from sdlora.data import ledger, store
from sdlora.errors import UserError, without_frames
from sdlora.events import Event, Log
from sdlora.family import Base, Family
from sdlora.graphs import Graphs
from sdlora.job import Member
from sdlora.laps import Laps
from sdlora.learners import Job, check_objective, check_optimizer, doubts, given, idle, memory, pieces, speaks
from sdlora.plan import Plan
from sdlora.processes import Processes
from sdlora.stop import FILES, Stop
from sdlora.studio import Studio
from sdlora.trackers import Trackers
from sdlora.train import Setup, Trained, assist, steps

COMMON = ("base", "vae", "probe", "text.clip_skip", "text.chunks", "train.precision", "train.gradient_checkpointing", "train.base_weights",
          "train.memory_gb", "train.attention", "train.prefetch", "train.profile",
          "train.compile", "train.cuda_graphs")  # fmt: skip
"""What all members of a cast have alike: it is the base's."""
Runs = Sequence[tuple[Run, Path]]
"""Settings, and the folder of each."""
Asking = tuple[Stop, Path | None]
"""How all are asked to stop, and the folder whose files ask the same."""
Told = Iterator[tuple[str, Event]]
"""(a member's name, what becomes of it)."""
FILE = "cast.toml"


def run(settled: Run, base: Base, out: Path, stop: Stop | None = None) -> Iterator[Event]:
    """Train a resolved run into a folder, going on from its last checkpoint if it has one. Every event is also in its log."""
    for _, event in train([(settled, out)], base, stop):
        yield event


@without_frames
def train(runs: Runs, base: Base, stop: Stop | None = None, asked: Path | None = None) -> Told:
    """Train resolved runs over one base, each into its own folder. Files in `asked`, the folder of a cast, ask all of them to stop, save or
    show themselves. Where a launcher started several processes, all take part, and only the first tells and writes anything.

    Who breaks leaves the others to go on; the first error is raised in the end.
    """
    with processes.together() as company, contextlib.ExitStack() as stack:
        if asked and company.leads:
            stack.enter_context(lock.held(asked))
            keep([settled for settled, _ in runs], asked)
        yield from _train(runs, base, (stop or Stop(), asked), stack, company)


def _train(runs: Runs, base: Base, asking: Asking, stack: contextlib.ExitStack, company: Processes) -> Told:
    stop, laps = asking[0], Laps()
    company.alike({f"{run.name}: {key}": repr(value) for run, _ in runs for key, value in flat(run)})
    accelerator, dtype = devices.for_training(given(runs[0][0].train.precision))
    trackers = []
    for settled, out in runs:
        if company.leads:
            job.check_folder(settled, out)
        check_optimizer(settled)
        trackers.append(Trackers(settled.train.trackers if company.leads else [], settled.name, out / "trackers"))
    loaded, planned, jobs, said = _settle(runs, base, (accelerator, dtype), stack, laps, company)
    timing, members = estimate.pace_name(runs[0][0], loaded), []
    for one, tracker in zip(jobs, trackers, strict=True):
        own = stop if len(jobs) == 1 else Stop(above=stop)
        members.append(Member(one, own, stack.enter_context(tracker), Log(one.out / "events.jsonl")))
    setup = replace(planned.setup(loaded, Bank(loaded.components), []), processes=company)
    if not company.leads:
        _assist(members, setup, accelerator, stop)
        return
    for member, events in zip(members, said, strict=True):
        yield from follow(member, events)
    told = _together(members, setup, planned, accelerator, asking, laps)
    del loaded, setup  # what tells makes room once it is trained
    yield from told
    for error in (member.error for member in members if member.error):
        raise error
    if len(members) == 1 == company.count:  # in company a step takes longer
        estimate.keep_pace(timing, jobs[0].kept, members[0].pace)


def _settle(
    runs: Runs, base: Base, on: tuple[Accelerator, torch.dtype], stack: contextlib.ExitStack, laps: Laps, company: Processes
) -> tuple[Family, Plan, list[Job], list[list[Event]]]:
    """The base and the plan by which it lies in memory; the runs, once they are known to suit it, in folders that are theirs; and what is
    to be said of each first."""
    began, (accelerator, dtype) = time.time(), on
    unlocked = [stack.enter_context(lock.held(out)) if company.leads else "" for _, out in runs]
    kept = [store.usual(out / "cache", company) for _, out in runs]
    with company.in_turn():
        found = [ledger.read_dataset(settled, out / "cache", own) for (settled, out), own in zip(runs, kept, strict=True)]
    laps.end("pictures")
    if runs[0][0].train.compile:
        compiled.check(accelerator.device)
    if runs[0][0].train.cuda_graphs:
        graphs.check(runs[0][0].train, accelerator.device, len(runs))
    attention = devices.attention(runs[0][0].train.attention, accelerator.device, dtype)
    loaded = family.load(base, torch.device("cpu"), dtype)
    if company.count > 1:
        company.alike({f"weights of the base's {part}": str(processes.checksum(whole)) for part, whole in loaded.components.items()})
    laps.end("base")
    fitted = [ledger.fit_dataset(pictures, settled, loaded) for pictures, (settled, _) in zip(found, runs, strict=True)]
    measured = [memory(run, loaded, pieces(run, loaded), dataset) for (run, _), dataset in zip(runs, fitted, strict=True)]
    before = next(filter(None, (job.weights_before(out) for _, out in runs)), "")
    free = devices.free_bytes(accelerator.device)
    chosen = asdict(plan.choose(runs[0][0].train, plan.together(measured), free, before)) if company.leads else None
    planned = Plan(**company.told(chosen))
    borne = planned.lay(loaded, accelerator.device)
    loaded.attend(attention)
    laps.end("plan")
    first = [f"attention by {attention}", planned.line(), *borne]
    jobs, said, heard = list[Job](), list[list[Event]](), list[list[str]]()
    for (settled, out), dataset, own, size in zip(runs, fitted, kept, measured, strict=True):
        suited, told = check_objective(settled, loaded, dataset, own)
        parts = size.parts(planned.weights, planned.checkpointing)
        jobs.append(Job(suited, loaded.base, out, began, dataset, pieces(suited, loaded), own, parts))
        heard.append(told)
    for one, told, warned in zip(jobs, heard, unlocked, strict=True):
        if one.base != loaded.base:  # it was measured on each one's own pictures
            what = f"on its pictures the base was measured to predict otherwise than on those of {jobs[-1].settled.name}"
            raise UserError("E-OBJ-02", what, one.settled.name, "set objective.kind, and probe=off, alike for all")
        warnings = [warned] * bool(warned) + told + doubts(one.settled, loaded, one.pieces)
        changes = job.check_folder(one.settled, one.out) if company.leads else []
        said.append([Event("note", text) for text in [*first, *changes]] + [Event("warning", text) for text in warnings])
    for one in jobs if company.leads else ():
        job.prepare_folder(one.settled, one.out, accelerator.device, planned.weights)
    return loaded, planned, jobs, said


def _together(members: Sequence[Member], setup: Setup, planned: Plan, accelerator: Accelerator, asking: Asking, laps: Laps) -> Told:
    """From the pictures to the packs."""
    stop = asking[0]
    for member in members:
        yield from all_or_none(member, setup.processes, job.prepare(member, setup.family))
    laps.end("latents")
    if len(members) > 1:
        for event in room(members, setup, planned):  # of all, and so in nobody's log
            yield members[0].job.settled.name, event
    for member in going(members):
        yield from all_or_none(member, setup.processes, job.start(member, setup, accelerator))
    level(going(members))
    laps.end("adapter")
    yield from follow(members[0], _ready(going(members), setup))
    yield from _steps(going(members), setup, planned, asking, laps)
    setup.processes.told(None)
    setup.processes.leave()
    stopped = [member for member in going(members) if given(member.course).stopped]
    ended = [member for member in going(members) if member not in stopped]
    if stop.stopping and stopped:  # whose training has ended is finished when all go on
        ended = []
    for member in ended:
        yield from follow(member, job.take_off(member))
    open_studio = functools.cache(partial(Studio.open, members[0].job.base))
    for member in members:
        member.course = None
    del setup  # the base is loaded again in the precision of pictures: make room
    accelerator.free_memory()
    for member in going(ended):
        yield from follow(member, job.finish(member, open_studio))


def _ready(members: Sequence[Member], setup: Setup) -> Iterator[Event]:
    """What is left to do once all adapters are on the base, as they begin or go on."""
    if setup.family.device.type == "cuda":
        talking = any(speaks(one.job.pieces, one.job.dataset.account.used, one.job.settled) for one in members)
        setup.family.lay_aside(idle(setup.family, talking))
    if members and members[0].job.settled.train.compile:
        count = sum(map(compiled.compile_blocks, setup.family.components.values()))
        yield Event("note", f"{count} blocks of the base are compiled; the first step of each shape takes long")
    if members and members[0].job.settled.train.cuda_graphs:
        if setup.recomputed:
            yield Event("warning", "steps are not recorded as CUDA graphs: to fit into memory, they compute again in the backward pass")
        else:
            setup.graphs = Graphs([*setup.learners[0].params.values()])
    state.align(setup.processes, setup.learners, any(member.course and member.course.progress.step for member in members))
    yield from shares(setup)


def shares(setup: Setup) -> Iterator[Event]:
    """What each of several processes does in a step, and what passes between them."""
    count, samples = setup.processes.count, sum(len(learner.numbers) for learner in setup.learners)
    if count == 1:
        return
    numbers = [parameter for learner in setup.learners for parameter in learner.params.values()]
    size = sum(one.numel() * one.element_size() for one in numbers)
    what = (
        f"{count} processes share the {samples} samples of a step, {setup.processes.most(samples)} at most each, and add up their gradients"
    )
    data = {"processes": count, "gradient_bytes": size}
    yield Event("note", f"{what}: {size / 1e6:.2f} MB a step, of the adapter alone", data=data)
    if samples < count:
        what = f"{count - samples} of {count} processes have nothing to do: a step has {samples} samples in all"
        yield Event("warning", f"{what}; start fewer, or raise train.batch_size")


def _assist(members: Sequence[Member], setup: Setup, accelerator: Accelerator, stop: Stop) -> None:
    """What a process does that does not lead: its part of the pictures, then of each step. It tells and writes nothing."""
    for member in members:
        deque(job.prepare(member, setup.family), 0)
    for member in members:
        setup.learners.append(learners.new_learner(member.job, setup.family, setup.bank, accelerator, member.latents))
    deque(_ready(members, setup), 0)
    with stop.gently():
        for _ in assist(setup):
            if stop.stop:
                setup.processes.ask(stop.signum)
    setup.processes.leave()


def all_or_none(member: Member, company: Processes, events: Iterable[Event]) -> Told:
    """`follow`, but what breaks one member ends all where several processes work: the others do the same for it at this moment."""
    yield from follow(member, events)
    if member.error and company.count > 1:
        raise member.error


def room(members: Sequence[Member], setup: Setup, planned: Plan) -> Iterator[Event]:
    """Say what memory all of them take together."""
    samples = sum(given(member.job.settled.train.batch_size) for member in members)
    passes = f"{setup.fitting(samples)} of {samples} samples of a step go through the network at once"
    what = f"{len(members)} adapters over one base: about {planned.peak / 1e9:.2f} GB beside the libraries"
    yield Event("note", f"{what}; {passes}", data={"bytes": planned.peak})


def _steps(members: Sequence[Member], setup: Setup, planned: Plan, asking: Asking, laps: Laps) -> Told:
    """The training of all; whoever is through, breaks or is stopped leaves the others to go on."""
    (stop, asked), device, told = asking, setup.family.device, False
    with stop.gently():
        for member in members:
            yield from follow(member, given(member.course).begin())
        laps.end("first look")
        devices.forget_peak(device)  # a step is measured, not the previews before it
        try:
            for trained, seen in taken(members, setup):
                if not told:
                    devices.wait(device)
                    laps.end("step")
                    told_at = laps.told()
                    for member in members:
                        yield from follow(member, [told_at])
                yield from follow(members[0], seen)
                if not told and (peak := devices.peak_bytes(device)):
                    yield from follow(members[0], [Event("note", planned.compared(peak), data={"peak": peak, "counted": planned.peak})])
                told = True
                if asked:
                    stop.look(asked)
                if setup.processes.asked and not stop.stop:
                    stop.signum, stop.stop = setup.processes.asked, True
                stop.pass_on([member.stop for member in members if member.stop is not stop])
                for member in members:
                    course = given(member.course)
                    if course.slot in trained.loss:
                        yield from follow(member, course.after(trained))
                    elif member.stop.told and not course.learner.is_through:
                        yield from follow(member, course.halt())
        except UserError as error:  # of a step that they shared
            gone = error.code == processes.GONE
            for member in (one for one in members if not given(one.course).learner.is_through):
                yield from follow(member, broken(error, given(member.course).rescue() if gone else ()))
            if gone:
                raise


def taken(members: Sequence[Member], setup: Setup) -> Iterator[tuple[Trained, list[Event]]]:
    """The steps, and what is to be said of one."""
    looked_at = members and members[0].job.settled.train.profile
    return profiling.watched(setup, members[0].job.out) if looked_at else ((trained, []) for trained in steps(setup))


def broken(error: UserError, events: Iterable[Event]) -> Iterator[Event]:
    """Events that end in an error."""
    yield from events
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
            job.adopt(course, found.progress)


def follow(member: Member, events: Iterable[Event]) -> Told:
    for event in member.follow(events):
        yield member.job.settled.name, event


def going(members: Sequence[Member]) -> list[Member]:
    return [member for member in members if not member.error]


# ---------------------------------------------------------------- a cast as settings, and its folder


def tables(table: Mapping[str, Any], source: object) -> list[dict[str, Any]]:
    """The settings of each member: what the file says for all, and over it what a table `[[cast]]` says for the one."""
    own, common = table.get("cast"), {key: value for key, value in table.items() if key != "cast"}
    if not isinstance(own, list) or not own or not all(isinstance(one, dict) for one in own):
        raise UserError("E-CAST-01", "a cast has no members", source, 'write a table [[cast]] for each, with name = "..."')
    return [laid_over(common, one) for one in own]


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees of tables as one; where both have a value it is the upper one's."""
    found = dict(below)
    for key, value in above.items():
        lower = found.get(key)
        found[key] = laid_over(lower, value) if isinstance(lower, Mapping) and isinstance(value, Mapping) else value
    return found


def check(runs: Sequence[Run], out: Path) -> None:
    """Whether these runs can be one cast in this folder. Raises `UserError` before anything is read or written."""
    if out.exists() and not out.is_dir():
        raise UserError("E-RUN-01", "this is a file; a cast needs a folder of its own", out, "name a folder with --out")
    if (out / "config.toml").exists():
        raise UserError("E-CAST-02", "a run by itself lies in this folder, and a cast needs one of its own", out, "name another with --out")
    for i, one in enumerate(runs):
        if one.name.casefold() in [FILE, lock.NAME, *FILES, *(other.name.casefold() for other in runs[:i])]:
            what = f'two members are called "{one.name}", or a file of the cast is, and each needs a folder of that name'
            raise UserError("E-CAST-03", what, "cast.name", "give each member a name of its own")
        if not one.data.sources:
            raise UserError("E-DATA-01", f"no folder of pictures is named for {one.name}", "cast.data.folder", f"name one for {one.name}")
        own, first = dict(flat(one)), dict(flat(runs[0]))
        for key in COMMON:
            if own[key] != first[key]:
                what = f"{runs[0].name} has {key} = {first[key]!r} and {one.name} {own[key]!r}; a cast has one base, in one precision"
                raise UserError("E-CAST-04", what, f"cast.{key}", "say it once for all, or make two casts")
    places = {one.name: (out / one.name).resolve() for one in runs}
    for one in runs:
        for source in one.data.sources:
            pictures = Path(source.folder).resolve()
            inner = [name for name, place in places.items() if place.is_relative_to(pictures) or pictures.is_relative_to(place)]
            if inner or pictures == out.resolve():
                what = f"the pictures of {one.name} lie where the run of {inner[0] if inner else 'all'} would: {source.folder}"
                raise UserError("E-CAST-05", what, out, "name another folder with --out")


def keep(runs: Sequence[Run], out: Path) -> None:
    """Write `cast.toml`, which names the members and holds what each began with."""
    safeio.write(out / FILE, text(runs))


def text(runs: Sequence[Run]) -> str:
    """The settings of all members, complete, as a TOML file of a cast."""
    return tomli_w.dumps({"cast": [run.model_dump(exclude_none=True) for run in runs]})


def kept(out: Path) -> list[dict[str, Any]]:
    """The settings of each member of a cast's folder, as its own folder has them if it was begun."""
    found = []
    for table in tables(settings.read(out / FILE), out / FILE):
        own = out / str(table.get("name")) / "config.toml"
        found.append(settings.read(own) if own.is_file() else table)
    return found
