"""The learning rate as a pure function of the step."""

import math

from sdlora.config import Train


def rate(step: int, train: Train) -> float:
    """Factor of the learning rate at a step counted from 0: a linear warm-up to 1, then the course that is set, down to 0 after the last.

    Restarts: Loshchilov & Hutter 2017, eq. 5; warm-up, stable, decay (wsd): Hu et al. 2024, section 4.
    """
    assert train.warmup_steps is not None
    assert train.steps is not None
    if step < train.warmup_steps:
        return (step + 1) / (train.warmup_steps + 1)
    done, whole = step - train.warmup_steps, max(1, train.steps - train.warmup_steps)
    share = min(1.0, done / whole)
    match train.schedule:
        case "linear":
            return 1 - share
        case "cosine":
            return _cosine(share)
        case "restarts":
            return _cosine(done * train.cycles % whole / whole if share < 1 else 1.0)
        case "wsd":
            decay = min(whole, round(train.decay_share * train.steps))
            return min(1.0, max(0, train.steps - step) / (decay + 1))
    return 1.0


def _cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))
