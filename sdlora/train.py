"""The training loop and nothing else."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.profiler import record_function

from sdlora.adapter import Bank
from sdlora.config import Train
from sdlora.data.ahead import Ahead
from sdlora.data.batches import Batch, Prepared, grouped
from sdlora.devices import is_out_of_memory
from sdlora.errors import RESOURCES, UserError
from sdlora.family import RECOMPUTED, Family
from sdlora.graphs import Graphs, Inputs
from sdlora.objective import Noise, Noised, Noising, miss
from sdlora.optimizer import rest, set_rate
from sdlora.processes import ALONE, Processes
from sdlora.routing import Route
from sdlora.schedule import rate


@dataclass(frozen=True)
class Goal:
    """What the network is to say: an objective and its settings."""

    noise: Noise
    config: Noising


@dataclass
class Learner:
    """One adapter in training: its data, its parameters, its own optimizer and pace. Several share a base and never see one another."""

    name: str
    data: Prepared
    params: dict[str, nn.Parameter]
    optimizer: AcceleratedOptimizer  # around a `Masked` one; its gradient scaler, where there is one, is the learner's own
    goal: Goal
    train: Train
    ema: dict[str, Tensor] = field(default_factory=dict)  # moving average of the parameters, where one is kept
    quarantine: dict[int, int] = field(default_factory=dict)  # pictures that broke steps, and the first step that is without each
    step: int = 0  # steps taken so far
    left: bool = False  # it takes no further step, whatever its settings say

    @property
    def is_through(self) -> bool:
        return self.left or self.step >= (self.train.steps or 0)

    @property
    def numbers(self) -> range:
        """The samples of its next step, by number."""
        count = (self.train.batch_size or 0) * self.train.accumulation
        return range(self.step * count, (self.step + 1) * count)

    def at(self, step: int) -> Prepared:
        """The data as a step draws from it."""
        out = {picture for picture, since in self.quarantine.items() if since <= step}
        return replace(self.data, pool=[picture for picture in self.data.pool if picture not in out]) if out else self.data

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The parameters at their average for a while, if there is one."""
        average = self.ema or self.optimizer.optimizer.average(self.params)
        now = {name: self.params[name].detach().clone() for name in average}
        try:
            self._set(average)
            yield
        finally:
            self._set(now)

    def _set(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.params[name].copy_(value)


@dataclass
class Setup:
    """Everything that a step works with."""

    family: Family
    bank: Bank
    learners: list[Learner]  # by slot, as their adapters are on the bank
    at_once: int = 0  # samples that fit into one forward pass, once memory did not suffice for all; 0: whatever there is
    recomputed: bool = False  # gradient checkpointing is on
    spare: bool = False  # it is not, but may be turned on where memory does not suffice
    ahead: Ahead[list[Batch]] | None = None  # prepares the samples of the next step during this one, where that is wished
    processes: Processes = ALONE  # those that share each step's samples
    graphs: Graphs | None = None  # repeats what was recorded, where that is wished

    @property
    def goals(self) -> list[Goal]:
        return [learner.goal for learner in self.learners]

    def fitting(self, samples: int) -> int:
        """How many of so many samples go through the network at once."""
        return min(samples, self.at_once or samples)

    def standing(self) -> dict[str, Any]:
        """What a step depends on that may change between two steps, beside parameters and optimizers; JSON."""
        each = [[learner.step, learner.left, [*learner.quarantine.items()]] for learner in self.learners]
        return {"at_once": self.at_once, "recomputed": self.recomputed, "spare": self.spare, "learners": each}

    def stand(self, standing: Mapping[str, Any]) -> None:
        """Be as another process is that trains the same learners."""
        if standing["recomputed"] and not self.recomputed:
            self.recompute()
        self.at_once, self.spare = standing["at_once"], standing["spare"]
        for learner, (step, left, quarantine) in zip(self.learners, standing["learners"], strict=True):
            learner.step, learner.left, learner.quarantine = step, left, dict(quarantine)

    def recompute(self) -> None:
        """Turn gradient checkpointing on."""
        self.recomputed, self.spare, self.graphs = True, False, None  # what is computed again is not recorded
        self.family.blocks(RECOMPUTED)

    def thriftier(self, samples: int) -> bool:
        """Take the next measure, where memory did not suffice for so many samples at once; false: none is left."""
        if self.spare:
            self.recompute()
            return True
        if self.graphs:
            self.graphs.forget()
        self.at_once = (samples + 1) // 2
        return samples > 1


@dataclass(frozen=True)
class Trained:
    """Some learners took a step. The tensors are still on the device: reading them waits for it."""

    step: int  # steps that they have taken so far
    loss: Mapping[int, Tensor]  # by slot: the mean loss of each that took it
    finite: Mapping[int, Tensor]  # by slot: false where loss or gradient were not finite, and nothing of that learner moved
    at_once: int  # samples that one forward pass had to do with; 0: memory sufficed
    recomputed: bool  # under gradient checkpointing


def steps(setup: Setup) -> Iterator[Trained]:
    """Train until all learners are through; yields after every optimizer step. Each ends as if it had been trained alone."""
    while slots := due(setup.learners):
        setup.processes.told(setup.standing())
        yield step(setup, slots)


def assist(setup: Setup) -> Iterator[Trained]:
    """Take part in the steps that process 0 takes, until it says that there is none."""
    while standing := setup.processes.told(None):
        setup.stand(standing)
        yield step(setup, due(setup.learners))


def step(setup: Setup, slots: Sequence[int]) -> Trained:
    """One optimizer step of the learners in these slots."""
    learners = [setup.learners[slot] for slot in slots]
    losses = gradients(setup, slots)
    with record_function("optimizer"):
        finite = [update(learner, loss) for learner, loss in zip(learners, losses, strict=True)]
    for learner in learners:
        learner.step += 1
    told = dict(zip(slots, losses, strict=True)), dict(zip(slots, finite, strict=True))
    return Trained(learners[0].step, *told, setup.at_once, setup.recomputed)


def due(learners: Sequence[Learner]) -> list[int]:
    """Slots of the learners that take the next step: those furthest behind. Who is ahead waits for them, which costs no step more, and so
    the company of a step does not depend on where a run was stopped."""
    going = [slot for slot, learner in enumerate(learners) if not learner.is_through]
    least = min((learners[slot].step for slot in going), default=0)
    return [slot for slot in going if learners[slot].step == least]


def at_most(learners: Sequence[Learner]) -> int:
    """Samples in one forward pass while memory suffices: a batch of each."""
    return sum(learner.train.batch_size or 0 for learner in learners)


def gradients(setup: Setup, slots: Sequence[int]) -> Tensor:
    """Leave a step's gradients on the parameters of the learners in these slots and return their losses, in this order.

    Where memory does not suffice the base's blocks are computed again in the backward pass, if they may be, and after that the same
    samples, with the same noise, go through in smaller parts, from then on. All processes do the same, each with its share of the samples.
    """
    learners = [setup.learners[slot] for slot in slots]
    own = setup.processes.most(sum(len(learner.numbers) for learner in learners))
    while True:
        at_once, needed = setup.fitting(min(at_most(learners), own)), ""
        try:
            loss = _accumulate(setup, slots, at_once)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            needed = str(error).partition("\n")[0] or type(error).__name__
        params = [one for learner in learners for one in learner.params.values()] if setup.processes.count > 1 else []
        lacking, *moved = setup.processes.any_of([bool(needed), *(one.grad is not None for one in params)])
        if not lacking:
            return summed(setup.processes, [one for one, moves in zip(params, moved, strict=True) if moves], loss)
        needed = needed or "another process found too little"
        if not setup.thriftier(at_once):
            todo = "lower data.resolution_px or adapter.rank, or free memory, and resume"
            where = f"step {learners[0].step + 1}"
            raise UserError("E-MEM-01", f"not even one sample fits into memory: {needed}", where, todo, RESOURCES)
        for learner in learners:
            learner.optimizer.zero_grad(set_to_none=True)
        clear_device_cache(garbage_collection=True)


def summed(processes: Processes, params: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
    """Put the sums of all processes' gradients on the parameters, and return that of their losses; all of it in one exchange."""
    if processes.count > 1:
        for one in params:
            one.grad = torch.zeros_like(one) if one.grad is None else one.grad
        parts = [*(one.grad for one in params if one.grad is not None), loss]
        flat = torch.cat([part.flatten() for part in parts])
        processes.sum_into(flat)
        for part, found in zip(parts, torch.split(flat, [part.numel() for part in parts]), strict=True):
            part.copy_(found.view_as(part))
    return loss


def _accumulate(setup: Setup, slots: Sequence[int], at_once: int) -> Tensor:
    graphs, samples = setup.graphs, torch.tensor([len(learner.numbers) for learner in setup.learners], device=setup.family.device)
    loss = torch.zeros(len(samples), device=samples.device)

    def missed(batch: Batch, tensors: Inputs) -> tuple[Tensor, Tensor]:
        own = batch.of(tensors)
        each = sample_losses(setup.family, setup.bank, own, setup.goals) / tensors["samples"][own.slot.to(samples.device)]
        return each, scaled(each, own.slots, setup.learners)

    if graphs:
        graphs.begin()
    for batch in ready(setup, slots, at_once):
        one, tensors = partial(missed, batch), {**batch.tensors(), "samples": samples}
        if graphs:
            each = graphs.take((tuple(batch.slots), tuple(batch.priors.tolist())), tensors, one)
        else:
            each, total = one(tensors)
            total.backward()  # type: ignore[no-untyped-call]
        loss = loss.index_add(0, batch.slot.to(loss.device), each.detach().to(loss.dtype))
    if graphs:
        graphs.end()
    return loss[list(slots)]


def ready(setup: Setup, slots: Sequence[int], at_once: int) -> list[Batch]:
    """The batches of a step; those of the next one are begun, where that is wished, as if all learners went on as they are."""
    learners = setup.learners
    if setup.ahead is None:
        return drawn(setup, learners, slots, at_once)
    found = setup.ahead.take(_key(learners, slots, at_once), lambda: drawn(setup, learners, slots, at_once))
    later = [replace(one, step=one.step + (slot in slots), quarantine=dict(one.quarantine)) for slot, one in enumerate(learners)]
    setup.ahead.prepare(_key(later, slots, at_once), lambda: drawn(setup, later, slots, at_once))
    return found


def _key(learners: Sequence[Learner], slots: Sequence[int], at_once: int) -> tuple[object, ...]:
    """All that a step's batches depend on and that may change."""
    return tuple(slots), at_once, tuple((learners[slot].step, tuple(learners[slot].quarantine.items())) for slot in slots)


def drawn(setup: Setup, learners: Sequence[Learner], slots: Sequence[int], at_once: int) -> list[Batch]:
    """This process's batches of the learners' next step, those that go through the network together."""
    with record_function("data"):
        data, samples = [learner.at(learner.step) for learner in learners], setup.processes.part(in_order(learners, slots))
        passes = (sorted(samples[start : start + at_once]) for start in range(0, len(samples), at_once))
        return [batch for one in passes for batch in grouped(data, one)]


def in_order(learners: Sequence[Learner], slots: Sequence[int]) -> list[tuple[int, int]]:
    """A step's samples as (slot, number): a batch of each learner, then the next of each."""
    order = []
    for slot in slots:
        size = learners[slot].train.batch_size or 1
        order += [(i // size, slot, number) for i, number in enumerate(learners[slot].numbers)]
    return [(slot, number) for _, slot, number in sorted(order)]


def scaled(each: Tensor, slots: Sequence[int], learners: Sequence[Learner]) -> Tensor:
    """What is to be differentiated: the sum of the losses, each times its own learner's factor under half precision."""
    own = [learners[slot].optimizer.scaler for slot in dict.fromkeys(slots)]
    if own[0] is None:
        return each.sum()
    if len(own) == 1:
        return own[0].scale(each.sum())  # type: ignore[no-any-return]
    slot = torch.tensor(slots, device=each.device)
    parts = [each[slot == one].sum() for one in dict.fromkeys(slots)]
    return torch.stack([scaler.scale(part) for scaler, part in zip(own, parts, strict=True)]).sum()


def sample_losses(family: Family, bank: Bank, batch: Batch, goals: Sequence[Goal]) -> Tensor:
    """Weighted loss of each sample (B,), float32; a sample goes through its own learner's adapter, towards its own goal."""
    device = family.device
    text, frame = batch.text.to(device), batch.frame.to(device)
    noised = noised_batch(family, batch, goals)
    target, prior = noised.target, batch.priors.to(device)
    if len(prior):
        bank.route = None
        with torch.no_grad():
            base = said(family, noised.x[prior], noised.t[prior], text[prior], frame[prior])
            target = target.index_copy(0, prior, base.to(target.dtype))
    active = tuple(sorted(set(batch.slots)))
    bank.route = Route(torch.ones(1, device=device), batch.slots if len(goals) > 1 else None, active, batch.key.to(device))
    predicted = said(family, noised.x, noised.t, text, frame).to(target.dtype)
    share = noised.t / len(family.alphas_cumprod)
    missed = [miss(predicted[rows], target[rows], noised.snr[rows], goal.config, share[rows]) for goal, rows in by_goal(batch, goals)]
    return (torch.cat(missed) * batch.weight.to(device)).mean((1, 2, 3)) * noised.weight


def noised_batch(family: Family, batch: Batch, goals: Sequence[Goal]) -> Noised:
    """A batch as the network gets it; its target knows only the noise that is asked for."""
    latents, uniform = batch.latents.to(family.device), batch.uniform.to(family.device)

    def under(noise: Tensor) -> Noised:
        noise, parts = noise.to(family.device), []
        for goal, rows in by_goal(batch, goals):
            parts.append(goal.noise(latents[rows], noise[rows], uniform[rows], family.alphas_cumprod, goal.config))
        return Noised(**{one.name: torch.cat([getattr(part, one.name) for part in parts]) for one in fields(Noised)})

    return replace(under(batch.noise), x=under(batch.seen).x)


def by_goal(batch: Batch, goals: Sequence[Goal]) -> Iterator[tuple[Goal, slice]]:
    """The rows of a batch that have the same goal and lie together."""
    start = 0
    for goal, rows in itertools.groupby(batch.slots, key=lambda slot: goals[slot]):
        end = start + len(list(rows))
        yield goal, slice(start, end)
        start = end


def said(family: Family, x: Tensor, t: Tensor, text: Tensor, frame: Tensor) -> Tensor:
    """The network's word under the bank's route; `text` is token ids, or states that no adapter changes."""
    return family.predict(x, t, text if text.is_floating_point() else family.states(text), frame)


def update(learner: Learner, loss: Tensor) -> Tensor:
    """Clip and step one learner, unless something is not finite: then nothing of it moves. Returns the flag."""
    scaler = learner.optimizer.scaler
    if scaler is not None:
        scaler.unscale_(learner.optimizer.optimizer)
    rest(learner.optimizer, learner.step)
    norm = nn.utils.clip_grad_norm_(learner.params.values(), learner.train.clip_norm)
    finite: Tensor = loss.isfinite() & norm.isfinite()
    if scaler is None:
        learner.optimizer.optimizer.mask(finite)
    else:  # the gradient scaler sets the mask itself: it tries scales until gradients overflow, which is no fault
        finite = loss.isfinite()
    set_rate(learner.optimizer, rate(learner.step, learner.train))
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    for name, average in learner.ema.items():
        average.lerp_(learner.params[name].detach(), (1 - learner.train.ema) * finite.to(average.dtype))
    return finite
