"""Kinds of adapters that are none of ours, as the weight that they make of a layer's: whole rotations, butterflies, GLoRA.

| kind | leaves | the weight |
|---|---|---|
| LyCORIS' old OFT | `oft_diag` (k, n, n) | Rᵀ W in blocks of n outputs, by rotations that are kept whole |
| BOFT (Liu et al. 2024, equation 6) | `oft_blocks` (m, k, n, n) | Bₘ … B₁ W; Bᵢ turns n outputs together of pairs 2ⁱ n/2 apart |
| GLoRA (Chavan et al. 2023) | `a1`, `a2`, `b1`, `b2` `.weight` | W + (W a1 a2 + b1 b2) alpha / rank |

BOFT's blocks hold B, of which R = (I + Q)(I − Q)⁻¹ with Q = B − Bᵀ is the rotation, as in our OFT.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

DIAGONAL, BLOCKS = "oft_diag", "oft_blocks"
GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")


def leaves_of(leaves: Mapping[str, Tensor]) -> set[str]:
    """Those of a layer's leaves that only such a kind has; its alpha is not among them."""
    found = {DIAGONAL} & set(leaves)
    found |= {BLOCKS} if BLOCKS in leaves and leaves[BLOCKS].ndim == 4 else set()
    return found | (set(GLORA) if set(GLORA) <= set(leaves) else set())


def named(leaves: Mapping[str, Tensor]) -> str:
    """What the kind is called; empty if it is none of these."""
    marks = {DIAGONAL: "oft", BLOCKS: "boft", GLORA[0]: "glora"}
    return next((name for leaf, name in marks.items() if leaf in leaves_of(leaves)), "")


def weight_of(leaves: Mapping[str, Tensor], weight: Tensor) -> Tensor | None:
    """The weight (out, in ...) that the leaves make of a layer's; None where they are of another kind. Raises `ValueError`."""
    made = {"oft": _diagonal, "boft": _butterfly, "glora": _glora}
    kind = named(leaves)
    return made[kind]({name: tensor.float() for name, tensor in leaves.items()}, weight) if kind else None


def _diagonal(leaves: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    turns = leaves[DIAGONAL]
    if turns.ndim != 3 or turns.shape[1] != turns.shape[2] or turns.shape[0] * turns.shape[1] != len(weight):
        raise ValueError(f"holds rotations {tuple(turns.shape)}, and the layer has {len(weight)} outputs")
    return torch.einsum("knm,kni->kmi", turns, weight.reshape(*turns.shape[:2], -1)).reshape(weight.shape)


def _butterfly(leaves: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    blocks = leaves[BLOCKS]
    levels, count, size = blocks.shape[:3]
    if size < 2 or size % 2 or blocks.shape[3] != size or count * size != len(weight) or len(weight) % (2 ** (levels - 1) * size):
        raise ValueError(f"holds butterflies {tuple(blocks.shape)}, and the layer has {len(weight)} outputs")
    skew = blocks - blocks.mT
    bound, norm = float(leaves.get("alpha", torch.zeros(()))), float(skew.norm())
    if 0 < bound < norm:
        raise ValueError(f"holds rotations of norm {norm:.3g} beyond their bound {bound:.3g}, which programs read in different ways")
    eye = torch.eye(size)
    turns = (eye + skew) @ torch.linalg.inv(eye - skew)
    turned = weight.flatten(1)  # (out, in)
    for level in range(levels):
        apart = 2**level * size // 2
        pairs = turned.reshape(-1, 2, apart, turned.shape[1]).transpose(1, 2)  # what lies `apart` from one another comes together
        mixed = torch.einsum("knm,kmi->kni", turns[level], pairs.reshape(count, size, -1))
        turned = mixed.reshape(pairs.shape).transpose(1, 2).reshape(turned.shape)
    return turned.reshape(weight.shape)


def _glora(leaves: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """LyCORIS has a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in ...); before its third version each pair was the other way round."""
    a1, a2, b1, b2 = (leaves[name].flatten(1) for name in GLORA)
    inputs, whole = weight.shape[1], weight[0].numel()
    if a1.shape[0] != inputs or b1.shape[0] != len(weight):
        a1, a2, b1, b2 = a2, a1, b2, b1
    rank = b1.shape[1]
    if (a1.shape, a2.shape, b1.shape, b2.shape) != ((inputs, rank), (rank, inputs), (len(weight), rank), (rank, whole)):
        raise ValueError(f"holds GLoRA's factors {', '.join(str(tuple(leaves[name].shape)) for name in GLORA)}, which do not fit the layer")
    through = torch.einsum("oi...,ij->oj...", weight, a1 @ a2)
    change = through + (b1 @ b2).reshape(weight.shape)
    return weight + change * (float(leaves["alpha"]) / rank if "alpha" in leaves else 1.0)
