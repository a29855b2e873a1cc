"""Foreign leaves of one layer as leaves that our kinds of adapter have: the same ΔW, in other numbers.

Convolutions between narrow convolutions (Tucker cores) are folded into the factor with the kernel, exactly: the result is a product of two
factors as well. What is left, as a kind that is none of ours (`foreign`), is folded into a ΔW by `fold`.
"""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from sdlora.packs import foreign
from sdlora.packs.layouts import DOWN, UP, WHOLE

MID, SCALE = "lora_mid.weight", "dora_scale"
MAX_RANK = 4096
Leaves = dict[str, Tensor]


def canonical(leaves: Mapping[str, Tensor], weight: Tensor) -> Leaves:
    """The leaves of a layer with the weight (out, in ...), as our kinds know them. Raises `ValueError` for what does not fit together."""
    found = {WHOLE.get(name, name): tensor for name, tensor in leaves.items()}
    found = {name: tensor if tensor.is_floating_point() else tensor.float() for name, tensor in found.items()}
    if "alpha" in found:
        found["alpha"] = _number(found["alpha"])
    for fold in (_locon, _loha, _lokr):
        fold(found, weight)
    if SCALE in found:
        found[SCALE] = _magnitude(found[SCALE], weight)
    return found


def _number(alpha: Tensor) -> Tensor:
    if alpha.numel() != 1:
        raise ValueError(f"alpha holds {alpha.numel()} numbers")
    return alpha.reshape(())


def _locon(leaves: Leaves, weight: Tensor) -> None:
    """down (r, in) and, between, mid (r', r, k, k) -> down' (r', in, k, k); and factors in the number of axes that the layer has."""
    if DOWN not in leaves or UP not in leaves:
        return
    down, up, kernel = leaves[DOWN], leaves[UP], weight.shape[2:]
    if MID in leaves:
        mid = leaves.pop(MID)
        if mid.ndim != 4 or down.ndim not in (2, 4) or down.shape[:2] != (mid.shape[1], weight.shape[1]) or down[0, 0].numel() != 1:
            raise ValueError(f"{MID} has the shape {tuple(mid.shape)}, which does not fit between its factors")
        down = torch.einsum("ijkl,jn->inkl", mid.float(), down.float().flatten(1))
    leaves[DOWN] = _with_axes(down, (weight.shape[1], *kernel))
    leaves[UP] = _with_axes(up, (-1, *[1] * len(kernel))) if up.ndim > 1 else up


def _with_axes(tensor: Tensor, rest: tuple[int, ...]) -> Tensor:
    """(n, ...) as (n, *rest) where no more than axes of length 1 differ: some programs keep a 1x1 convolution's factors as matrices."""
    if tensor.ndim == len(rest) + 1 or [n for n in tensor.shape[2:] if n != 1]:
        return tensor
    wanted = (tensor.shape[1] if rest[0] < 0 else rest[0], *rest[1:]) if tensor.ndim > 1 else rest
    return tensor.reshape(len(tensor), *wanted) if tensor.ndim > 1 and prod(tensor.shape[1:]) == prod(wanted) else tensor


def _loha(leaves: Leaves, weight: Tensor) -> None:
    """LyCORIS' Tucker form: t (r, r, k, k), w_b (r, in), w_a (r, out) -> w_a' = w_aᵀ (out, r), w_b' (r, in·k·k)."""
    for i in (1, 2):
        core, a, b = f"hada_t{i}", f"hada_w{i}_a", f"hada_w{i}_b"
        if core in leaves:
            leaves[a], leaves[b] = _tucker(leaves.pop(core), leaves[a], leaves[b], weight.shape[1])


def _lokr(leaves: Leaves, weight: Tensor) -> None:
    """The same for w2 of LoKr, of which the sides are divisors of the layer's. A Kronecker product is never larger than its layer."""
    if "lokr_t2" in leaves:
        leaves["lokr_w2_a"], leaves["lokr_w2_b"] = _tucker(leaves.pop("lokr_t2"), leaves["lokr_w2_a"], leaves["lokr_w2_b"], weight.shape[1])
    sides = [1, 1]
    for name in ("lokr_w1", "lokr_w2"):
        whole, a, b = leaves.get(name), leaves.get(f"{name}_a"), leaves.get(f"{name}_b")
        if whole is not None:
            sides = [sides[0] * len(whole), sides[1] * whole[0].numel()] if whole.ndim else sides
        elif a is not None and b is not None and a.ndim == b.ndim == 2:
            sides = [sides[0] * len(a), sides[1] * b.shape[1]]
    if any(name.startswith("lokr_") for name in leaves) and sides != [len(weight), weight[0].numel()]:
        raise ValueError(f"makes a weight {tuple(sides)} where the layer's is {tuple(weight.shape)}")


def _tucker(core: Tensor, a: Tensor, b: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    if core.ndim != 4 or a.ndim != 2 or b.ndim != 2 or len(a) != core.shape[0] or len(b) != core.shape[1] or b.shape[1] > inputs:
        raise ValueError(f"a core of the shape {tuple(core.shape)} does not fit its factors {tuple(a.shape)} and {tuple(b.shape)}")
    return a.float().T.contiguous(), torch.einsum("ijkl,jn->inkl", core.float(), b.float()).flatten(1)


def _magnitude(scale: Tensor, weight: Tensor) -> Tensor:
    """PEFT's (out,) as (out, 1, ...); others as they are, in the number of axes that the layer has."""
    ones = [1] * (weight.ndim - 2)
    if scale.ndim == 1 and len(scale) == len(weight):
        return scale.reshape(-1, 1, *ones)
    if scale.ndim == 2 and tuple(scale.shape) in ((1, weight.shape[1]), (len(weight), 1)):
        return scale.reshape(*scale.shape, *ones)
    return scale


def needs_folding(leaves: Mapping[str, Tensor]) -> bool:
    """Whether no kind of ours can hold these: a change of the bias, a magnitude or a rescaling beside another kind; a foreign kind."""
    others = {name for name in leaves if not name.startswith("diff") and name != "alpha"}
    beside = "diff_b" in leaves and bool(others)
    return beside or bool(foreign.leaves_of(leaves)) or "rescale" in leaves or (SCALE in leaves and DOWN not in leaves and len(others) > 1)


def apart(leaves: Mapping[str, Tensor]) -> set[str]:
    """The leaves that `fold` takes, beside the change that a kind of ours makes of the others."""
    own = foreign.leaves_of(leaves)
    return {"diff_b", "rescale", *own} | ({"alpha"} if own else set()) | (set() if DOWN in leaves else {SCALE})


def fold(leaves: Mapping[str, Tensor], layer: nn.Module, difference: Tensor | None) -> Leaves:
    """A ΔW, and a change of the bias, that do what the leaves do. `difference` is that of the kind which the other leaves are of."""
    weight = layer.get_parameter("weight").detach().float()
    turned = foreign.weight_of(leaves, weight)
    if turned is None:
        turned = weight if difference is None else weight + difference.detach()
    if "rescale" in leaves:
        turned = turned * _fitting(leaves["rescale"], weight)
    if SCALE in leaves:
        scale = _fitting(leaves[SCALE], weight)
        axes = [i for i, n in enumerate(scale.shape) if n == 1]
        turned = scale * turned / torch.linalg.vector_norm(turned, dim=axes, keepdim=True).clamp(min=1e-30)
    bias = {"diff_b": leaves["diff_b"]} if "diff_b" in leaves else {}
    return {"diff": turned - weight, **bias}


def _fitting(scale: Tensor, weight: Tensor) -> Tensor:
    if scale.ndim != weight.ndim or any(n not in (1, side) for n, side in zip(scale.shape, weight.shape, strict=True)):
        raise ValueError(f"a scale of the shape {tuple(scale.shape)} does not fit the weight {tuple(weight.shape)}")
    return scale.float()
