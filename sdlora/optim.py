"""The optimizer, and the learning rate as a pure function of the step."""

import math

import torch
from torch import Tensor, nn

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


class MaskedAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019) whose step is skipped, on the device and without waiting for it, where a flag says so.

    Fused AdamW takes the flag that gradient scalers set (`found_inf`); setting it ourselves masks a step that is not finite.
    """

    found_inf: Tensor

    def mask(self, finite: Tensor) -> None:
        """Let the next step change something only if `finite` is true."""
        self.found_inf = (~finite).float()


def adamw(groups: list[tuple[dict[str, nn.Parameter], float]], train: Train) -> MaskedAdamW:
    """An optimizer over (named parameters, learning rate) groups; a group at rate 0 is left out."""
    chosen = [{"params": list(params.values()), "lr": lr, "peak_lr": lr} for params, lr in groups if params and lr > 0]
    return MaskedAdamW(chosen, weight_decay=train.weight_decay, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to its peak times the factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
