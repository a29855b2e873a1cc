"""The learning rate as a pure function of the step."""

import math

from sdlora.config import Train


def rate(step: int, train: Train) -> float:
    """Factor of the learning rate at a step counted from 0: linear warm-up, then constant, or a half cosine down to zero."""
    assert train.warmup_steps is not None
    assert train.steps is not None
    if step < train.warmup_steps:
        return (step + 1) / (train.warmup_steps + 1)
    if train.schedule == "constant":
        return 1.0
    share = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
