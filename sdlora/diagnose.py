"""Why a step was not finite: it is run again, sample by sample, in its own precision and in fp32, until the cause has a name."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdlora.data.batches import Batch, micro_batch, picture_of
from sdlora.train import Setup, noised_batch, sample_losses

OTHERS = 4
"""Pictures tried beside those of the step, to tell a broken picture from a broken adapter."""


@dataclass(frozen=True)
class Cause:
    kind: Literal["picture", "prompt", "precision", "weights", "unknown"]
    text: str
    pictures: Sequence[int] = ()  # those that break a step by themselves


@dataclass(frozen=True)
class Sample:
    picture: int
    batch: Batch
    """A batch of one."""


def find(setup: Setup, slot: int, step: int) -> Cause:
    """The cause of a learner's non-finite step, counted from 0, with the weights as they are now."""
    learner = setup.learners[slot]
    broken = next((name for name, parameter in learner.params.items() if not parameter.isfinite().all()), None)
    if broken:
        return Cause("weights", f"the adapter's own weights are not finite ({broken})")
    samples = list(_samples(setup, slot, step))
    lapsed = [sample for sample in samples if not _sound(setup, slot, sample)]
    with in_float32(setup):
        bad = [sample for sample in lapsed if not _sound(setup, slot, sample)]
        if bad and len(bad) == len(samples) and not any(_sound(setup, slot, other) for other in _others(setup, slot, samples)):
            return Cause("weights", "every picture gives it, in fp32 as well: the adapter has diverged")
        if bad:
            return _of_data(setup, bad)
    if not lapsed:
        return Cause("unknown", "each of its samples is finite by itself; it may have been the sum, or later steps have mended it")
    where = first_broken(setup, lapsed[0]) or "the gradient"
    return Cause("precision", f"timestep {timestep(setup, lapsed[0])} overflows in {where}; in fp32 it is finite")


def _of_data(setup: Setup, bad: Sequence[Sample]) -> Cause:
    pictures = sorted({sample.picture for sample in bad if not sample.batch.prior.any() or not _latents_are_finite(sample)})
    kind: Literal["picture", "prompt"] = "picture" if pictures else "prompt"
    first = next((sample for sample in bad if sample.picture in pictures), bad[0])
    if not _latents_are_finite(first):
        return Cause(kind, "its latents are not finite", pictures)
    text = first.batch.text.to(setup.family.device)
    with torch.no_grad():
        states = text if text.is_floating_point() else setup.family.states(text)
    if not states.isfinite().all():
        return Cause(kind, f"what the text encoder makes of its {'caption' if pictures else 'words'} is not finite", pictures)
    where = first_broken(setup, first) or "the gradient"
    return Cause(kind, f"{where} is not finite at timestep {timestep(setup, first)}", pictures)


def _samples(setup: Setup, slot: int, step: int) -> Iterator[Sample]:
    learner = setup.learners[slot]
    data, count = learner.at(step), len(learner.numbers)
    for number in range(step * count, (step + 1) * count):
        for batch in micro_batch([data], range(number, number + 1)):
            yield Sample(picture_of(number, data.pool, data.seed), replace(batch, slot=torch.full_like(batch.slot, slot)))


def _others(setup: Setup, slot: int, samples: Sequence[Sample]) -> Iterator[Sample]:
    """The same noise on other pictures of the learner."""
    seen, data = {sample.picture for sample in samples}, setup.learners[slot].data
    shape = samples[0].batch.latents.shape[1:]
    fitting = [p for p in dict.fromkeys(data.pool) if p not in seen and data.latents[p][0][0].shape == shape]
    for picture in fitting[:OTHERS]:
        text, frame = data.text[data.rows[picture][0]], data.frames[picture][0]
        changed = {"latents": data.latents[picture][0][0][None], "text": text[None], "frame": frame[None]}
        yield Sample(picture, replace(samples[0].batch, **changed))


def _sound(setup: Setup, slot: int, sample: Sample) -> bool:
    """Whether one sample has a finite loss and gradient; leaves no gradient behind."""
    learner = setup.learners[slot]
    loss = sample_losses(setup.family, setup.bank, sample.batch, setup.goals).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in learner.params.values() if parameter.grad is not None]
    sound = bool(loss.isfinite()) and all(bool(gradient.isfinite().all()) for gradient in gradients)
    learner.optimizer.zero_grad(set_to_none=True)
    return sound


def _latents_are_finite(sample: Sample) -> bool:
    return bool(sample.batch.latents.isfinite().all())


def timestep(setup: Setup, sample: Sample) -> int:
    return int(noised_batch(setup.family, sample.batch, setup.goals).t[0])


def first_broken(setup: Setup, sample: Sample) -> str:
    """Name of the first layer whose output is not finite in a forward pass; "" if all are."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    named = [(f"{part}.{name}", module) for part, whole in setup.family.components.items() for name, module in whole.named_modules()]
    handles = [module.register_forward_hook(look(name)) for name, module in named]
    try:
        with torch.no_grad():
            sample_losses(setup.family, setup.bank, sample.batch, setup.goals)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


@contextlib.contextmanager
def in_float32(setup: Setup) -> Iterator[None]:
    """The base in fp32 for a while: half-precision numbers go there and come back without loss."""
    frozen = [p for whole in setup.family.components.values() for p in whole.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    dtypes = [parameter.dtype for parameter in frozen]
    try:
        for parameter in frozen:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in zip(frozen, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)
