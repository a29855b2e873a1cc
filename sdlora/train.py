"""The training loop and nothing else."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from sdlora.adapter import Bank, Route
from sdlora.config import Train
from sdlora.data.batches import Batch, Prepared, micro_batch
from sdlora.family import Family
from sdlora.objective import Noise
from sdlora.optim import rate, set_rate
from sdlora.settings import Settings


@dataclass
class Learner:
    """One adapter in training: its data, its parameters, its own optimizer. Several share a base and never see one another."""

    name: str
    data: Prepared
    params: dict[str, nn.Parameter]
    optimizer: AcceleratedOptimizer  # around a MaskedAdamW


@dataclass(frozen=True)
class Goal:
    """What the network is to say: an objective and its settings."""

    noise: Noise
    config: Settings


@dataclass(frozen=True)
class Trained:
    """One step was taken. The tensors are still on the device: reading them waits for it."""

    step: int  # steps taken so far
    loss: Tensor  # (K,) mean loss of each learner
    finite: Tensor  # (K,) false where loss or gradient were not finite, and that learner's step was skipped


def steps(
    family: Family, bank: Bank, learners: Sequence[Learner], goal: Goal, train: Train, accelerator: Accelerator, first: int = 0
) -> Iterator[Trained]:
    """Train from step `first` on; yields after every optimizer step. Each learner ends as if it had been trained alone."""
    assert train.steps is not None
    assert train.batch_size is not None
    samples = train.batch_size * train.accumulation
    for step in range(first, train.steps):
        loss = torch.zeros(len(learners), device=family.device)
        for start in range(step * samples, (step + 1) * samples, train.batch_size):
            for batch in micro_batch([learner.data for learner in learners], range(start, start + train.batch_size)):
                each = sample_losses(family, bank, batch, goal, len(learners))
                accelerator.backward(each.sum() / samples)
                loss = loss.index_add(0, batch.slot.to(family.device), each.detach() / samples)
        finite = [update(learner, step, train, accelerator, loss[slot]) for slot, learner in enumerate(learners)]
        yield Trained(step + 1, loss, torch.stack(finite))


def sample_losses(family: Family, bank: Bank, batch: Batch, goal: Goal, learners: int) -> Tensor:
    """Weighted squared error of each sample (B,), float32; a sample goes through its own learner's adapter."""
    device = family.device
    text, slot = batch.text.to(device), batch.slot.to(device)
    noised = goal.noise(batch.latents.to(device), batch.noise.to(device), batch.uniform.to(device), family.alphas_cumprod, goal.config)
    target, prior = noised.target, batch.prior.nonzero()[:, 0].to(device)
    if len(prior):
        bank.route = None
        with torch.no_grad():
            target = target.index_copy(0, prior, said(family, noised.x[prior], noised.t[prior], text[prior]).to(target.dtype))
    bank.route = Route(torch.ones(1, device=device), slot if learners > 1 else None)
    predicted = said(family, noised.x, noised.t, text).to(target.dtype)
    return ((predicted - target).square() * batch.weight.to(device)).mean((1, 2, 3)) * noised.weight


def said(family: Family, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """The network's word under the bank's route; `text` is token ids, or states that no adapter changes."""
    return family.predict(x, t, text if text.is_floating_point() else family.states(text))


def update(learner: Learner, step: int, train: Train, accelerator: Accelerator, loss: Tensor) -> Tensor:
    """Clip and step one learner, unless something is not finite: then nothing of it moves. Returns the flag."""
    accelerator.unscale_gradients(learner.optimizer)
    norm = nn.utils.clip_grad_norm_(learner.params.values(), train.clip_norm)
    finite: Tensor = loss.isfinite() & norm.isfinite()
    if accelerator.scaler is None:  # under fp16 the gradient scaler sets the mask itself
        learner.optimizer.optimizer.mask(finite)
    set_rate(learner.optimizer, rate(step, train))
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    return finite
