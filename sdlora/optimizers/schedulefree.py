"""Schedule-free AdamW (Defazio et al. 2024): an average of the weights takes the place of a falling rate; by schedulefree."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from sdlora.optimizer import Masked, Moments, library, waiting


class Config(Moments):
    kind: Literal["schedulefree"] = "schedulefree"
    """Schedule-free AdamW; it wants `train.schedule` to be constant."""
    library: ClassVar = "schedulefree"
    known_as: ClassVar = "schedulefree.AdamWScheduleFree"


class Averaging(Masked):
    memory: ClassVar = ("k", "weight_sum", "lr_max", "scheduled_lr")

    def average(self, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """x = y + (z - y) (1 - 1 / beta1) of the weights y (eq. 3): the library's `eval`, from which nothing comes back bit for bit."""
        beta1 = self.param_groups[0]["betas"][0]
        return {name: p.detach().lerp(self.state[p]["z"], 1 - 1 / beta1) for name, p in params.items() if self.state.get(p)}


def new(groups: list[dict[str, Any]], config: Config) -> Masked:
    """See `sdlora.optimizer`."""
    cls, betas = waiting(library(config).AdamWScheduleFree, Averaging), (config.beta1, config.beta2)
    optimizer: Any = cls(groups, betas=betas, eps=config.eps, weight_decay=config.weight_decay)
    optimizer.train()
    averaging: Masked = optimizer
    return averaging
