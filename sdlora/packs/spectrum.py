"""The singular values of what a pack adds: how many directions it uses, and, with its base, which of them are new to the weight."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from sdlora.packs.deltas import Change
from sdlora.packs.workshop import rank_for


@dataclass(frozen=True)
class Spectrum:
    """Of one module."""

    module: str
    values: list[float]  # singular values, falling
    effective: float  # rank by entropy, exp(-Σ p ln p) with p = σ / Σ σ (Roy and Vetterli 2007, equation 4)
    stable: float  # Σ σ² / max σ²
    needed: int  # the least rank that keeps 95 % of the energy
    intruders: list[int] | None = None  # which of the changed weight's first directions are new to it; None: its base is not known


def spectrum(module: str, change: Change, weight: Tensor | None = None) -> Spectrum:
    """See `Spectrum`; all of it is 0 for a ΔW of zero, but for the rank that is needed, 1. The layer's weight is (out, in·k·k)."""
    values = change.svd()[1]
    new = None if weight is None else intruders(weight, change.matrix())
    if not float(values[0]):
        return Spectrum(module, values.tolist(), 0.0, 0.0, 1, new)
    shares = values / values.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    stable = values.square().sum() / values[0].square()
    return Spectrum(module, values.tolist(), float(entropy.exp()), float(stable), rank_for(values, 0.95), new)


def advised(found: Sequence[Spectrum], share: float = 0.9) -> int:
    """The smallest rank that keeps 95 % of the energy in this share of the layers."""
    return sorted(one.needed for one in found)[ceil(share * len(found)) - 1]


def intruders(weight: Tensor, change: Tensor, most: int = 10, threshold: float = 0.6) -> list[int]:
    """Which of the first `most` left singular vectors of W + ΔW are like none of W's: largest |cosine| below the threshold.

    Intruder dimensions (Shuttleworth et al. 2024, algorithm 1). Both matrices are (out, in·k·k).
    """
    before = torch.linalg.svd(weight.double(), full_matrices=False)[0]
    after = torch.linalg.svd(weight.double() + change.double(), full_matrices=False)[0][:, :most]
    likeness = (before.T @ after).abs().amax(0)
    return [i for i, value in enumerate(likeness.tolist()) if value < threshold]
