"""AdamW whose moments are held in 8 bits, block by block (Dettmers et al. 2022), by bitsandbytes; tensors under 4096 numbers in 32."""

from typing import Any, ClassVar, Literal

from sdlora.optimizer import Masked, Moments, library, waiting


class Config(Moments):
    kind: Literal["adamw8bit"] = "adamw8bit"
    """AdamW in 8 bits, for less memory."""
    library: ClassVar = "bitsandbytes"
    known_as: ClassVar = "bitsandbytes.optim.AdamW8bit"


def new(groups: list[dict[str, Any]], config: Config) -> Masked:
    """See `sdlora.optimizer`."""
    cls, betas = waiting(library(config).optim.AdamW8bit), (config.beta1, config.beta2)
    optimizer: Masked = cls(groups, betas=betas, eps=config.eps, weight_decay=config.weight_decay)
    return optimizer
