"""Weights in the precision of a pack: nothing too large for it, and as little as can be too small."""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from sdlora.errors import NUMBERS, UserError
from sdlora.packs.layouts import DOWN, UP

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
PAIRS = (
    (UP, DOWN),
    ("hada_w1_a", "hada_w1_b"),
    ("hada_w2_a", "hada_w2_b"),
    ("lokr_w1_a", "lokr_w1_b"),
    ("lokr_w2_a", "lokr_w2_b"),
    ("lora_B.weight", "lora_A.weight"),
)
"""Leaves of which only the product counts."""


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise `UserError` for a weight that is not finite."""
    bad = next((key for key, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if bad:
        raise UserError("E-NUM-02", "a weight is not finite; no pack is written", bad, "lower train.lr", NUMBERS)


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype, exact: Collection[str]) -> tuple[dict[str, Tensor], int]:
    """Weights (float32) in the dtype, those of `exact` leaves as they are; and how many numbers became zero.

    Where numbers of one factor would vanish, both are scaled by a power of two, up and down: their product stays as it is, exactly.
    """
    ready, found, lost = balanced(tensors, dtype), {}, 0
    for key, tensor in ready.items():
        if key.partition(".")[2] in exact or key.rpartition(".")[2] in exact:
            found[key] = tensor
            continue
        found[key] = tensor.to(dtype)
        if not found[key].isfinite().all():
            what = f"a weight is too large for {str(dtype).removeprefix('torch.')}; no pack is written"
            raise UserError("E-NUM-02", what, key, "lower train.lr, or set pack.dtype=fp32", NUMBERS)
        lost += int(((found[key] == 0) & (tensor != 0)).sum())
    return found, lost


def balanced(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors with the pairs of factors scaled of which one would lose more than rounding takes."""
    found = dict(tensors)
    for key in tensors:
        other = next((key.removesuffix(first) + second for first, second in PAIRS if key.endswith(f".{first}")), "")
        if other not in tensors:
            continue
        a, b = tensors[key], tensors[other]
        sizes = [float(tensor.abs().max()) for tensor in (a, b)]
        if min(sizes) > 0 and max(sizes) <= torch.finfo(dtype).max and (_suffers(a, dtype) or _suffers(b, dtype)):
            step = 2.0 ** round(math.log2(sizes[1] / sizes[0]) / 2)
            found[key], found[other] = a * step, b / step
    return found


def _suffers(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether small numbers lose digits: the error is larger than half a unit of the last place makes it."""
    wide = tensor.double()
    return bool((wide - tensor.to(dtype).double()).norm() > torch.finfo(dtype).eps / 2 * wide.norm())
