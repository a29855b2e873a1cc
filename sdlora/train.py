"""The training loop and nothing else."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from sdlora.adapter import Bank, Route
from sdlora.config import Train
from sdlora.data.batches import Batch, Prepared, micro_batch
from sdlora.errors import RESOURCES, UserError
from sdlora.family import Family
from sdlora.objective import Noise, Noised, Noising, miss
from sdlora.optimizer import set_rate
from sdlora.schedule import rate


@dataclass
class Learner:
    """One adapter in training: its data, its parameters, its own optimizer. Several share a base and never see one another."""

    name: str
    data: Prepared
    params: dict[str, nn.Parameter]
    optimizer: AcceleratedOptimizer  # around a `Masked` one
    ema: dict[str, Tensor] = field(default_factory=dict)  # moving average of the parameters, where one is kept
    quarantine: dict[int, int] = field(default_factory=dict)  # pictures that broke steps, and the first step that is without each

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


@dataclass(frozen=True)
class Goal:
    """What the network is to say: an objective and its settings."""

    noise: Noise
    config: Noising


@dataclass
class Setup:
    """Everything that a step works with."""

    family: Family
    bank: Bank
    learners: Sequence[Learner]
    goal: Goal
    train: Train
    accelerator: Accelerator
    at_once: int  # samples in one forward pass; fewer than the batch size once memory did not suffice


@dataclass(frozen=True)
class Trained:
    """One step was taken. The tensors are still on the device: reading them waits for it."""

    step: int  # steps taken so far
    loss: Tensor  # (K,) mean loss of each learner
    finite: Tensor  # (K,) false where loss or gradient were not finite, and that learner's step was skipped
    at_once: int  # samples in each of its forward passes


def steps(setup: Setup, first: int = 0) -> Iterator[Trained]:
    """Train from step `first` on; yields after every optimizer step. Each learner ends as if it had been trained alone."""
    assert setup.train.steps is not None
    for step in range(first, setup.train.steps):
        loss = gradients(setup, step)
        finite = [update(learner, step, setup.train, setup.accelerator, loss[slot]) for slot, learner in enumerate(setup.learners)]
        yield Trained(step + 1, loss, torch.stack(finite), setup.at_once)


def gradients(setup: Setup, step: int) -> Tensor:
    """Leave a step's gradients on the parameters and return the losses (K,).

    Where memory does not suffice the same samples, with the same noise, go through in smaller parts from then on.
    """
    while True:
        try:
            return _accumulate(setup, step)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            needed = str(error).splitlines()[0]
        if setup.at_once == 1:
            todo = "lower data.resolution_px or adapter.rank, or free memory, and resume"
            raise UserError("E-MEM-01", f"not even one sample fits into memory: {needed}", f"step {step + 1}", todo, RESOURCES)
        setup.at_once = (setup.at_once + 1) // 2
        for learner in setup.learners:
            learner.optimizer.zero_grad(set_to_none=True)
        clear_device_cache(garbage_collection=True)


def _accumulate(setup: Setup, step: int) -> Tensor:
    assert setup.train.batch_size is not None
    samples, device = setup.train.batch_size * setup.train.accumulation, setup.family.device
    loss = torch.zeros(len(setup.learners), device=device)
    data = [learner.at(step) for learner in setup.learners]
    for start in range(0, samples, setup.at_once):
        numbers = range(step * samples + start, step * samples + min(samples, start + setup.at_once))
        for batch in micro_batch(data, numbers):
            each = sample_losses(setup.family, setup.bank, batch, setup.goal, len(setup.learners))
            setup.accelerator.backward(each.sum() / samples)
            loss = loss.index_add(0, batch.slot.to(device), each.detach() / samples)
    return loss


def sample_losses(family: Family, bank: Bank, batch: Batch, goal: Goal, learners: int) -> Tensor:
    """Weighted loss of each sample (B,), float32; a sample goes through its own learner's adapter."""
    device = family.device
    text, frame, slot = batch.text.to(device), batch.frame.to(device), batch.slot.to(device)
    noised = noised_batch(family, batch, goal)
    target, prior = noised.target, batch.prior.nonzero()[:, 0].to(device)
    if len(prior):
        bank.route = None
        with torch.no_grad():
            base = said(family, noised.x[prior], noised.t[prior], text[prior], frame[prior])
            target = target.index_copy(0, prior, base.to(target.dtype))
    bank.route = Route(torch.ones(1, device=device), slot if learners > 1 else None)
    predicted = said(family, noised.x, noised.t, text, frame).to(target.dtype)
    return (miss(predicted, target, noised.snr, goal.config) * batch.weight.to(device)).mean((1, 2, 3)) * noised.weight


def noised_batch(family: Family, batch: Batch, goal: Goal) -> Noised:
    """A batch as the network gets it; its target knows only the noise that is asked for."""
    latents, uniform = batch.latents.to(family.device), batch.uniform.to(family.device)

    def under(noise: Tensor) -> Noised:
        return goal.noise(latents, noise.to(family.device), uniform, family.alphas_cumprod, goal.config)

    return replace(under(batch.noise), x=under(batch.seen).x)


def said(family: Family, x: Tensor, t: Tensor, text: Tensor, frame: Tensor) -> Tensor:
    """The network's word under the bank's route; `text` is token ids, or states that no adapter changes."""
    return family.predict(x, t, text if text.is_floating_point() else family.states(text), frame)


def update(learner: Learner, step: int, train: Train, accelerator: Accelerator, loss: Tensor) -> Tensor:
    """Clip and step one learner, unless something is not finite: then nothing of it moves. Returns the flag."""
    accelerator.unscale_gradients(learner.optimizer)
    norm = nn.utils.clip_grad_norm_(learner.params.values(), train.clip_norm)
    finite: Tensor = loss.isfinite() & norm.isfinite()
    if accelerator.scaler is None:
        learner.optimizer.optimizer.mask(finite)
    else:  # the gradient scaler sets the mask itself: it tries scales until gradients overflow, which is no fault
        finite = loss.isfinite()
    set_rate(learner.optimizer, rate(step, train))
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    for name, average in learner.ema.items():
        average.lerp_(learner.params[name].detach(), (1 - train.ema) * finite.to(average.dtype))
    return finite
