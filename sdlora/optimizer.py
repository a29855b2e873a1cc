"""The contract of an optimizer: settings, groups of parameters, and steps that can be told to move nothing."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from sdlora.errors import UserError
from sdlora.settings import Settings

Share = Annotated[float, Field(ge=0, lt=1)]


class Optimizing(Settings):
    """What every optimizer has to set, and declares of itself."""

    kind: str = ""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay (Loshchilov & Hutter 2019): each step takes this times the learning rate off the weights."""

    library: ClassVar[str] = "torch"
    """The package it comes from."""
    known_as: ClassVar[str]
    """What other programs call it."""
    finds_its_rate: ClassVar[bool] = False
    """Whether it finds the learning rate itself, one for all parameters; the rates that are set are factors on it."""

    def check(self) -> None:
        """Raise `UserError` where it cannot run on this machine."""


class Moments(Optimizing):
    """What Adam's descendants have to set beside."""

    beta1: Share = 0.9
    """Decay of the gradient's moving average."""
    beta2: Share = 0.999
    """Decay of the moving average of its square."""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Added to the root of the latter."""


class Masked(torch.optim.Optimizer):
    """An optimizer whose next step can be told, by a flag on the device, to move nothing and to remember nothing."""

    memory: ClassVar[Sequence[str]] = ()
    """Entries of its groups that steps change, which a checkpoint must hold as it does the slots of the parameters."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group({**param_group, "memory": self.memory})

    def mask(self, finite: Tensor) -> None:
        """Let the next step change something only if `finite` is true."""
        raise NotImplementedError

    def average(self, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:  # noqa: ARG002
        """The weights that count, where those being trained are not they; nothing for most optimizers."""
        return {}


class Waiting(Masked):
    """A library's optimizer, put in front of it: it waits for the flag, since its own counters are numbers of Python's anyway."""

    finite: Tensor | None = None

    def mask(self, finite: Tensor) -> None:
        self.finite = finite

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        return super().step(closure) if self.finite is None or bool(self.finite) else None


def waiting(cls: Any, *before: type[Masked]) -> Any:
    """A library's class as a `Masked` one."""
    return type(cls.__name__, (*before, Waiting, cls), {})


def library(config: Optimizing) -> ModuleType:
    """The package that an optimizer comes from. Raises `UserError` if it is not installed."""
    try:
        return importlib.import_module(config.library)
    except ImportError as error:
        what = f"{config.kind} needs {config.library}, which is not installed"
        raise UserError("E-OPT-01", what, "optimizer.kind", 'install it: pip install "sdlora[optim]"') from error


def groups(parts: Sequence[tuple[Mapping[str, nn.Parameter], float]], until: int = 0) -> list[dict[str, Any]]:
    """Groups of (named parameters, learning rate) that move until a step (0: to the end); what would stand still is left out."""
    moving = [([p for p in params.values() if p.requires_grad], lr) for params, lr in parts if lr > 0]
    return [{"params": params, "lr": lr, "peak_lr": lr, "until": until} for params, lr in moving if params]


def rest(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Keep groups whose time is over as they are: what has no gradient moves by nothing, neither decay nor momentum."""
    for group in optimizer.param_groups:
        if 0 < group["until"] <= step:
            for parameter in group["params"]:
                parameter.grad = None


def faster(params: Mapping[str, nn.Parameter], lr: float, fast: set[str], ratio: float) -> list[tuple[dict[str, nn.Parameter], float]]:
    """Parts in which the parameters named in `fast` learn at `ratio` times the rate (LoRA+, Hayou et al. 2024)."""
    slow = {name: p for name, p in params.items() if ratio == 1 or name not in fast}
    return [(slow, lr), ({name: p for name, p in params.items() if name not in slow}, lr * ratio)]


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to its peak times the factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
