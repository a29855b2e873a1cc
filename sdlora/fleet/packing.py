"""What a job takes of a card, by its memory plan; and how a list of runs becomes casts that each fit one."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from sdlora import family, learners, plan, safeio
from sdlora.config import Run
from sdlora.data import ledger, store
from sdlora.errors import UserError
from sdlora.estimate import Measured

CONTEXT_BYTES = 0.8e9
"""What a process takes of a card beside what a plan counts: libraries and CUDA's own context, at most (docs/runs.md, "Small cards")."""
STEP = 100
"""Shares of a card are rounded up to hundredths."""


def measured(runs: Sequence[Run]) -> list[Measured]:
    """What each of these runs, all over one base, would hold; nothing is trained."""
    loaded, kept = family.load(learners.base_of(runs[0]), torch.device("cpu"), torch.float32), store.usual()
    found = []
    with safeio.scratch_folder() as unpacked:
        for run in runs:
            dataset = ledger.fit_dataset(ledger.read_dataset(run, Path(unpacked) / run.name, kept), run, loaded)
            found.append(learners.memory(run, loaded, learners.pieces(run, loaded), dataset))
    return found


def needed(runs: Sequence[Run], sizes: Sequence[Measured], card_bytes: float) -> int:
    """The bytes that these runs side by side are counted to take on a card of their own. Raises `UserError` if it is too small."""
    return plan.choose(runs[0].train, plan.together(sizes), round(card_bytes - CONTEXT_BYTES)).peak


def share(peak_bytes: int, card_bytes: float) -> float:
    """The share of a card, context included, rounded up, so that shares that add up to 1 fit."""
    return min(1.0, math.ceil(STEP * (peak_bytes + CONTEXT_BYTES) / card_bytes) / STEP)


def groups(runs: Sequence[Run], most: int, sizes: Sequence[Measured] = (), card_bytes: float = 0.0) -> list[list[int]]:
    """Which runs go into one cast: as many as fit into a card by their plan, and `most` at most (0: no such limit); in their order.

    A group is closed when one more would not fit. Who does not fit alone raises the plan's own `UserError`.
    """
    found: list[list[int]] = []
    for i in range(len(runs)):
        group = [*found[-1], i] if found else [i]
        fits = bool(found) and not (most and len(group) > most)
        if fits and sizes:
            try:
                needed([runs[j] for j in group], [sizes[j] for j in group], card_bytes)
            except UserError:
                fits = False
        if fits:
            found[-1] = group
        else:
            if sizes:
                needed([runs[i]], [sizes[i]], card_bytes)
            found.append([i])
    return found
