"""Prodigy (Mishchenko & Defazio 2023): AdamW that estimates its learning rate, by prodigyopt."""

import contextlib
import io
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from sdlora.optimizer import Masked, Moments, library, waiting


class Config(Moments):
    kind: Literal["prodigy"] = "prodigy"
    """Prodigy: `train.lr` is a factor on the rate that it finds, 1 as a rule."""
    d0: Annotated[float, Field(gt=0, le=1)] = 1e-6
    """First estimate of the distance to go."""
    d_coef: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Factor on the estimate; 2 learns faster, 0.5 more carefully."""
    use_bias_correction: bool = True
    """Correct the moments' start as Adam does."""
    safeguard_warmup: bool = True
    """Leave the rate out of the estimate's denominator, so that a warm-up does not inflate it."""
    library: ClassVar = "prodigyopt"
    known_as: ClassVar = "prodigyopt.Prodigy"
    finds_its_rate: ClassVar = True


class Remembering(Masked):
    memory: ClassVar = ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k")


def new(groups: list[dict[str, Any]], config: Config) -> Masked:
    """See `sdlora.optimizer`."""
    own = config.model_dump(exclude={"kind", "beta1", "beta2"})
    cls, betas = waiting(library(config).Prodigy, Remembering), (config.beta1, config.beta2)
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of its weight decay
        optimizer: Masked = cls(groups, betas=betas, **own)
    return optimizer
