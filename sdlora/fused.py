"""A linear layer and its low-rank adapter as one step of differentiation, on factors that are cast once for all layers.

Layer by layer, y = x Wᵀ + b and s · (x downᵀ) upᵀ would cost a cast, a scaling and a sum each, forward and backward, and some of the sums
are as large as the layer's output. Here products are accumulated where they belong (GEMM's beta = 1), and what differs between factors as
they are learnt and as they are multiplied, dtype and scale, is settled in a few kernels over those of all layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer does nothing but multiply by the weight that it holds: no subclass, which may hold it otherwise, and no hooks."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is nn.Linear and not hooked and "forward" not in vars(layer)


class Adapted(torch.autograd.Function):
    """x (..., in), the frozen weight (out, in) and bias (out,) or None, down (r, in), up (out, r) -> (..., out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        y = F.linear(x, weight, bias)
        hidden = rows @ down.t()
        y.view(-1, len(weight)).addmm_(hidden, up.t())
        ctx.save_for_backward(rows if ctx.needs_input_grad[3] else None, weight, down, up, hidden)
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, hidden = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        of_hidden = grad @ up
        of_x = (grad @ weight).addmm_(of_hidden, down).view(ctx.shape) if ctx.needs_input_grad[0] else None
        of_down = None if rows is None else of_hidden.t() @ rows
        return of_x, None, None, of_down, grad.t() @ hidden


class Shadows(torch.autograd.Function):
    """All downs, then all ups, in another dtype, the ups times their scales and a strength (); gradients come back in the factors' own."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, scales: Sequence[float], strength: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.scales, ctx.strength, ctx.dtype = scales, strength, factors[0].dtype
        ups = len(factors) - len(scales)
        return in_dtype([*factors[:ups], *times(factors[ups:], scales, strength)], dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ups = len(grads) - len(ctx.scales)
        there = {i: grad for i, grad in enumerate(grads) if grad is not None}  # not every layer has to be in every pass
        found = dict(zip(there, in_dtype([*there.values()], ctx.dtype), strict=True))
        some = [i for i in found if i >= ups]
        scales = [ctx.scales[i - ups] for i in some]
        found |= zip(some, times([found[i] for i in some], scales, ctx.strength), strict=True)
        return None, None, None, *(found.get(i) for i in range(len(grads)))


def times(given: Sequence[Tensor], scales: Sequence[float], strength: Tensor) -> Sequence[Tensor]:
    """Tensors, each times its own scale and all times a strength ()."""
    if not given:
        return given
    out = torch._foreach_mul(list(given), list(scales))
    torch._foreach_mul_(out, strength.to(out[0]))
    return list(out)


def in_dtype(given: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Tensors of one dtype in another, one behind the other in memory; the same tensors where it is theirs."""
    if not given or given[0].dtype == dtype:
        return tuple(given)
    sizes = [one.numel() for one in given]
    parts = torch.split(torch.empty(sum(sizes), dtype=dtype, device=given[0].device), sizes)
    out = [part.view_as(one) for part, one in zip(parts, given, strict=True)]
    torch._foreach_copy_(out, list(given))
    return tuple(out)


@dataclass(frozen=True)
class Shadow:
    """Factors as they are multiplied, and what they were made of."""

    down: Tensor
    up: Tensor
    made_of: tuple[tuple[int, int], ...]

    @staticmethod
    def state(*factors: Tensor) -> tuple[tuple[int, int], ...]:
        """What changes when factors are replaced, or written to."""
        return tuple((id(one), one._version) for one in factors)


def shadows(
    pairs: Sequence[tuple[nn.Parameter, nn.Parameter]], scales: Sequence[float], strength: Tensor, dtype: torch.dtype
) -> list[Shadow]:
    """The shadows of (down, up), all in one go."""
    downs, ups = [down for down, _ in pairs], [up for _, up in pairs]
    made: Sequence[Tensor] = Shadows.apply(dtype, scales, strength, *downs, *ups)  # type: ignore[no-untyped-call]
    found = zip(pairs, made[: len(downs)], made[len(downs) :], strict=True)
    return [Shadow(new if down.requires_grad else new.detach(), up, Shadow.state(down, own)) for (down, own), new, up in found]


class One(float):
    """1.0, by which a tensor is divided for nothing: diffusers' blocks divide by factors that are 1 in nearly all models."""

    def __new__(cls) -> Self:
        return super().__new__(cls, 1.0)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if (
            func in (Tensor.__truediv__, Tensor.div, torch.div)
            and not kwargs
            and isinstance(args[0], Tensor)
            and args[0].is_floating_point()
        ):
            return args[0]
        plain = [float(arg) if isinstance(arg, cls) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


def spare_divisions(network: nn.Module) -> None:
    """Divide by no factor of a network's blocks that is 1; no bit of what it computes changes by it."""
    for module in network.modules():
        for name in ("output_scale_factor", "rescale_output_factor"):
            if vars(module).get(name) == 1:
                setattr(module, name, One())
