"""Lion (Chen et al. 2023, algorithm 2): steps of one size in every number, along the sign of the momentum."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sdlora.optimizer import Masked, Optimizing, Share


class Config(Optimizing):
    kind: Literal["lion"] = "lion"
    """Lion."""
    beta1: Share = 0.9
    """Share of the momentum in the direction of a step."""
    beta2: Share = 0.99
    """Decay of the momentum."""
    known_as: ClassVar = "lion_pytorch.Lion"


class Lion(Masked):
    finite: Tensor | None = None

    def mask(self, finite: Tensor) -> None:
        self.finite = finite

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                momentum = self.state[p]["exp_avg"]
                stepped = p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * momentum.lerp(p.grad, 1 - beta1).sign()
                moved = momentum.lerp(p.grad, 1 - beta2)
                p.copy_(stepped if self.finite is None else torch.where(self.finite, stepped, p))
                momentum.copy_(moved if self.finite is None else torch.where(self.finite, moved, momentum))


def new(groups: list[dict[str, Any]], config: Config) -> Lion:
    """See `sdlora.optimizer`."""
    return Lion(groups, {"betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay})
