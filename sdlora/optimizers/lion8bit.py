"""Lion (Chen et al. 2023) whose momentum is held in 8 bits, block by block, by bitsandbytes; tensors under 4096 numbers in 32."""

from typing import Any, ClassVar, Literal

from sdlora.optimizer import Masked, Optimizing, Share, library, waiting


class Config(Optimizing):
    kind: Literal["lion8bit"] = "lion8bit"
    """Lion in 8 bits, for the least memory."""
    beta1: Share = 0.9
    """Share of the momentum in the direction of a step."""
    beta2: Share = 0.99
    """Decay of the momentum."""
    library: ClassVar = "bitsandbytes"
    known_as: ClassVar = "bitsandbytes.optim.Lion8bit"


def new(groups: list[dict[str, Any]], config: Config) -> Masked:
    """See `sdlora.optimizer`."""
    cls = waiting(library(config).optim.Lion8bit)
    optimizer: Masked = cls(groups, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)
    return optimizer
