"""AdamW whose moments are held in 8 bits, block by block (Dettmers et al. 2022), by bitsandbytes; tensors under 4096 numbers in 32."""

from typing import Any, ClassVar, Literal

import torch

from sdlora.errors import UserError
from sdlora.optimizer import Masked, Moments, library, waiting


class Config(Moments):
    kind: Literal["adamw8bit"] = "adamw8bit"
    """AdamW in 8 bits, for less memory."""
    paged: bool = False
    """Let the moments go to the CPU's memory while the card's is short, page by page; needs a CUDA card."""
    library: ClassVar = "bitsandbytes"
    known_as: ClassVar = "bitsandbytes.optim.AdamW8bit"

    def check(self) -> None:
        if self.paged and not torch.cuda.is_available():
            what = "only CUDA moves pages between a card's memory and the CPU's, and there is no CUDA card here"
            raise UserError("E-OPT-04", what, "optimizer.paged", "set it to false: without a card all lies in the CPU's memory anyway")


def new(groups: list[dict[str, Any]], config: Config) -> Masked:
    """See `sdlora.optimizer`."""
    own = library(config).optim
    cls, betas = waiting(own.PagedAdamW8bit if config.paged else own.AdamW8bit), (config.beta1, config.beta2)
    optimizer: Masked = cls(groups, betas=betas, eps=config.eps, weight_decay=config.weight_decay)
    return optimizer
