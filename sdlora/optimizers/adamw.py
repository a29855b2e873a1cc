"""AdamW (Loshchilov & Hutter 2019), torch's fused one."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sdlora.optimizer import Masked, Moments


class Config(Moments):
    kind: Literal["adamw"] = "adamw"
    """AdamW."""
    known_as: ClassVar = "torch.optim.AdamW"


class AdamW(torch.optim.AdamW, Masked):
    """Its fused step takes the flag that gradient scalers set (`found_inf`): set by ourselves, it masks a step without waiting for it."""

    found_inf: Tensor

    def mask(self, finite: Tensor) -> None:
        self.found_inf = (~finite).float()


def new(groups: list[dict[str, Any]], config: Config) -> AdamW:
    """See `sdlora.optimizer`."""
    return AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay, fused=True)
