"""A memory plan: which measures a run needs to fit, taken one after the other as far as its settings leave them open."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sdlora import parity
from sdlora.adapter import Bank
from sdlora.config import Train
from sdlora.data.ahead import Ahead
from sdlora.errors import RESOURCES, UserError
from sdlora.estimate import Measured
from sdlora.family import RECOMPUTED, Family
from sdlora.quantise import BLOCKS, WAYS
from sdlora.train import Learner, Setup

BORROWED = 0.4
"""Of the activations, what kernels and gradients hold beside them for a moment (docs/measured.md, "Cost")."""
NAMES = {"full": "weights in full", **{how: f"weights in {how}" for how in WAYS}}


@dataclass(frozen=True)
class Plan:
    """What was decided, and the bytes that were counted for it."""

    weights: str
    checkpointing: bool
    samples: int  # in one forward pass; 0: a batch
    parts: dict[str, int]
    limit: int | None  # bytes; None: there is none
    spare: bool = False  # checkpointing was not needed, but may be turned on later
    prefetch: bool = False  # the samples of the next step are prepared during this one

    @property
    def peak(self) -> int:
        """The most bytes at once."""
        return self.parts["total"] + round(BORROWED * self.parts["activations"])

    def lay(self, family: Family, device: torch.device) -> list[str]:
        """Move a base that was loaded onto the CPU to where it computes, by these measures; what is to be known of it."""
        told = [parity.lay(family, device)] if self.weights == "int8" else []
        family.place(device, self.weights)
        family.blocks(RECOMPUTED if self.checkpointing else None)
        return told

    def setup(self, family: Family, bank: Bank, learners: list[Learner]) -> Setup:
        """What a training's steps work with."""
        return Setup(family, bank, learners, self.samples, self.checkpointing, self.spare, Ahead() if self.prefetch else None)

    def measures(self) -> str:
        """What is done about memory."""
        passes = f", {self.samples} of a batch's samples at once" if self.samples else ""
        return f"the base's {NAMES[self.weights]}, {'' if self.checkpointing else 'no '}gradient checkpointing{passes}"

    def line(self) -> str:
        """The plan in words."""
        figures = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in self.parts.items() if name != "total")
        room = "" if self.limit is None else f" of {self.limit / 1e9:.2f}"
        return f"memory: {self.measures()}; about {self.peak / 1e9:.2f}{room} GB at most beside the libraries ({figures})"

    def compared(self, peak: int) -> str:
        """What a step really took beside what was counted, in words."""
        return f"memory: the first step took {peak / 1e9:.2f} GB at most, {peak / self.peak:.0%} of what was counted"


def together(measured: Sequence[Measured]) -> Measured:
    """Of runs side by side: all adapters, and samples as large as the largest."""
    activations, checkpointed = (max(getattr(one, name) for one in measured) for name in ("activations", "checkpointed"))
    samples = sum(one.samples for one in measured)
    return Measured(measured[0].weights, sum(one.adapter for one in measured), activations, checkpointed, samples)


def ladder(train: Train, before: str = "") -> list[tuple[str, bool, bool]]:
    """(weights, checkpointing, whether passes may hold less than a batch), as the settings allow it.

    What costs no more than time comes first: checkpointing, then smaller passes. Fewer bits come last, as they change what is computed; a
    run that goes on does so on weights held as `before`, unless its settings name others.
    """
    weights = [train.base_weights] if train.base_weights != "auto" else [before] if before else ["full", *BLOCKS]
    checkpointing = {"auto": [False, True], "on": [True], "off": [False]}[train.gradient_checkpointing]
    whole = [(weights[0], one, False) for one in checkpointing]
    return [*whole, *((one, checkpointing[-1], True) for one in weights)]


def choose(train: Train, measured: Measured, free: int | None, before: str = "") -> Plan:
    """The first step of the ladder that fits. Raises `UserError`, with the figures of each, if none does."""
    limit = round(train.memory_gb * 1e9) if train.memory_gb else free
    tried = []
    for weights, checkpointing, smaller in ladder(train, before):
        for samples in range(measured.samples - 1, 0, -1) if smaller and measured.samples > 1 else [0]:
            spare = train.gradient_checkpointing == "auto" and not checkpointing
            plan = Plan(weights, checkpointing, samples, measured.parts(weights, checkpointing, samples), limit, spare, train.prefetch)
            if limit is None or plan.peak <= limit:
                return plan
        tried.append(plan)
    figures = "; ".join(dict.fromkeys(f"{plan.peak / 1e9:.2f} GB with {plan.measures()}" for plan in tried))
    closed = [f"train.{name}" for name in ("gradient_checkpointing", "base_weights") if getattr(train, name) != "auto"]
    todo = f"set {' and '.join(closed)} to auto, or lower" if closed else "lower"
    if before and train.base_weights == "auto":
        todo = f"the run began on {NAMES[before]}: free memory, or name other train.base_weights; or lower"
    what = f"the run does not fit into {(limit or 0) / 1e9:.2f} GB; it takes {figures}"
    raise UserError("E-MEM-02", what, "train.memory_gb", f"{todo} data.resolution_px or adapter.rank", RESOURCES)
