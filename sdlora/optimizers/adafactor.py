"""Adafactor (Shazeer & Stern 2018): the second moments of a matrix from the sums of its rows and columns; by transformers."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from transformers import Adafactor

from sdlora.optimizer import Masked, Optimizing, waiting


class Config(Optimizing):
    kind: Literal["adafactor"] = "adafactor"
    """Adafactor, at the learning rates that are set."""
    decay_rate: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Second moments decay by 1 - t^-this at step t (section 7.2)."""
    clip_threshold: Annotated[float, Field(gt=0)] = 1.0
    """A tensor's update is scaled down to this root mean square where it exceeds it (section 6)."""
    library: ClassVar = "transformers"
    known_as: ClassVar = "transformers.optimization.Adafactor"


def new(groups: list[dict[str, Any]], config: Config) -> Masked:
    """See `sdlora.optimizer`."""
    own = {"clip_threshold": config.clip_threshold, "decay_rate": -config.decay_rate, "weight_decay": config.weight_decay}
    optimizer: Masked = waiting(Adafactor)(groups, **own, scale_parameter=False, relative_step=False)
    return optimizer
