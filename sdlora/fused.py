"""Layers that read the same, and their low-rank adapters, as one step of differentiation, on factors that are cast once for all layers.

Layer by layer, y = x Wᵀ + b and s · (x downᵀ) upᵀ would cost a cast, a scaling and a sum each, forward and backward, and some of the sums
are as large as the layer's output. Here products are accumulated where they belong (GEMM's beta = 1), and what differs between factors as
they are learnt and as they are multiplied, dtype and scale, is settled in a few kernels over those of all layers.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sdlora.quantise import Int8, Quantised, rounded


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer does nothing but multiply each token, or each place of a picture, by the weight that it holds, in full or packed: no
    other subclass, which may do more, and no hooks."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    if hooked or "forward" in vars(layer):
        return False
    return type(layer) is nn.Linear or isinstance(layer, Quantised) or (type(layer) is nn.Conv2d and is_pointwise(layer))


def is_pointwise(layer: nn.Conv2d) -> bool:
    """Whether a convolution looks at one place at a time, and at each."""
    return layer.kernel_size == layer.stride == (1, 1) and not any(layer.padding) and layer.groups == 1


class Adapted(torch.autograd.Function):
    """What layers that read the same x (..., in) say: all downs (R, in), one under the other, and an up (out, r) each -> (..., out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[nn.Linear], down: Tensor, *ups: Tensor) -> tuple[Tensor, ...]:
        rows, weights = x.flatten(0, -2), [layer.weight for layer in layers if not isinstance(layer, Quantised)]
        hidden, said = rows @ down.t(), spoken(x, layers)
        for y, up, own in zip(said, ups, parted(hidden, ups), strict=True):
            y.view(-1, y.shape[-1]).addmm_(own, up.t())
        ctx.save_for_backward(rows if ctx.needs_input_grad[2] else None, down, hidden, *ups, *weights)
        ctx.shape, ctx.layers = x.shape, layers
        return said

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, down, hidden, *others = ctx.saved_tensors
        ups, weights = others[: len(grads)], iter(others[len(grads) :])
        grads = tuple(grad.flatten(0, -2) for grad in grads)
        of_hidden = torch.empty_like(hidden)
        for grad, up, own in zip(grads, ups, parted(of_hidden, ups), strict=True):
            torch.mm(grad, up, out=own)
        of_x = None
        if ctx.needs_input_grad[0]:
            for layer, grad in zip(ctx.layers, grads, strict=True):
                if isinstance(layer, Quantised):
                    own = layer.of_input(grad)
                    of_x = own if of_x is None else of_x.add_(own)
                else:
                    of_x = grad @ next(weights) if of_x is None else of_x.addmm_(grad, next(weights))
            assert of_x is not None
            of_x = of_x.addmm_(of_hidden, down).view(ctx.shape)
        of_down = None if rows is None else of_hidden.t() @ rows
        return of_x, None, of_down, *(grad.t() @ own for grad, own in zip(grads, parted(hidden, ups), strict=True))


def spoken(x: Tensor, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """What layers say of the same x by themselves."""
    if not all(isinstance(layer, Int8) for layer in layers):
        return tuple(layer(x) if isinstance(layer, Quantised) else F.linear(x, layer.weight, layer.bias) for layer in layers)
    rows, said = rounded(x.flatten(0, -2)), []
    for layer in layers:
        assert isinstance(layer, Int8)
        y = layer.of_rounded(x, rows)
        said.append(y if layer.bias is None else y.add_(layer.bias))
    return tuple(said)


class Pointwise(torch.autograd.Function):
    """What a convolution of 1 x 1 says of x (B, in, H, W), with down (r, in, 1, 1) and up (out, r, 1, 1) -> (B, out, H, W)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Conv2d, down: Tensor, up: Tensor) -> Tensor:
        y, columns = F.conv2d(x, layer.weight, layer.bias), x.flatten(2)
        hidden = torch.bmm(each(down, columns), columns)
        y.flatten(2).baddbmm_(each(up, hidden), hidden)
        ctx.save_for_backward(columns if ctx.needs_input_grad[2] else None, layer.weight, down, up, hidden)
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        columns, weight, down, up, hidden = ctx.saved_tensors
        grad, of_x = grad.flatten(2), None
        of_hidden = torch.bmm(each(up, grad).mT, grad)
        if ctx.needs_input_grad[0]:
            of_x = torch.bmm(each(weight, grad).mT, grad).baddbmm_(each(down, grad).mT, of_hidden).view(ctx.shape)
        of_down = None if columns is None else torch.bmm(of_hidden, columns.mT).sum(0).view_as(down)
        return of_x, None, of_down, torch.bmm(grad, hidden.mT).sum(0).view_as(up)


def each(weight: Tensor, like: Tensor) -> Tensor:
    """A weight (out, in, 1, 1) as (B, out, in), the same for each of a batch (B, ...)."""
    return weight.flatten(1).expand(len(like), -1, -1)


def parted(hidden: Tensor, ups: Sequence[Tensor]) -> Sequence[Tensor]:
    """(n, R) as the columns (n, r) that belong to each up."""
    return torch.split(hidden, [up.shape[1] for up in ups], 1)


class Shadows(torch.autograd.Function):
    """All downs, those of each of `groups` one under the other, then all ups, in another dtype, the ups times their scales and a strength
    (); gradients come back in the factors' own."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, groups: Sequence[int], scales: Sequence[float], strength: Tensor, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.groups, ctx.scales, ctx.strength, ctx.dtype = groups, scales, strength, factors[0].dtype
        downs, ups = factors[: len(scales)], factors[len(scales) :]
        ctx.rows = [len(down) for down in downs]
        return in_dtype([*downs, *times(ups, scales, strength)], dtype, [*groups, *(1 for _ in ups)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count, rows, of_downs = len(ctx.scales), iter(ctx.rows), list[Tensor | None]()
        for size, grad in zip(ctx.groups, grads, strict=False):
            own = list(itertools.islice(rows, size))
            of_downs += [None] * size if grad is None else torch.split(grad, own)
        every = [*of_downs, *grads[len(ctx.groups) :]]
        there = {i: grad for i, grad in enumerate(every) if grad is not None}  # not every layer has to be in every pass
        found = dict(zip(there, in_dtype([*there.values()], ctx.dtype, [1] * len(there)), strict=True))
        some = [i for i in found if i >= count]
        scales = [ctx.scales[i - count] for i in some]
        found |= zip(some, times([found[i] for i in some], scales, ctx.strength), strict=True)
        return None, None, None, None, *(found.get(i) for i in range(len(every)))


def times(given: Sequence[Tensor], scales: Sequence[float], strength: Tensor) -> Sequence[Tensor]:
    """Tensors, each times its own scale and all times a strength ()."""
    if not given:
        return given
    out = torch._foreach_mul(list(given), list(scales))
    torch._foreach_mul_(out, strength.to(out[0]))
    return list(out)


def in_dtype(given: Sequence[Tensor], dtype: torch.dtype, groups: Sequence[int]) -> tuple[Tensor, ...]:
    """Tensors in another dtype, as many as each of `groups` says one under the other; a lone one that has the dtype is itself."""
    if not given or (given[0].dtype == dtype and max(groups) == 1):
        return tuple(given)
    flat = torch.empty(sum(one.numel() for one in given), dtype=dtype, device=given[0].device)
    parts = torch.split(flat, [one.numel() for one in given])
    torch._foreach_copy_([part.view_as(one) for part, one in zip(parts, given, strict=True)], list(given))
    rest = iter(given)
    members = [[*itertools.islice(rest, size)] for size in groups]
    wholes = torch.split(flat, [sum(one.numel() for one in own) for own in members])
    return tuple(whole.view(-1, *own[0].shape[1:]) for whole, own in zip(wholes, members, strict=True))


class Pair(Protocol):
    """An adapter of a layer: its factors, and the scale of their product."""

    down: nn.Parameter
    up: nn.Parameter

    @property
    def scale(self) -> float: ...


Owner = TypeVar("Owner", bound=Pair)


@dataclass
class Shadow(Generic[Owner]):
    """Factors as they are multiplied, of layers that read the same; what they were made of; and what of the layers is not yet asked for."""

    layers: Sequence[nn.Module]
    owners: Sequence[Owner]
    down: Tensor
    ups: Sequence[Tensor]
    made_of: Sequence[tuple[int, int]]
    read: tuple[Tensor, int] | None = None  # the input, and which version of it, that `said` was computed of
    said: dict[nn.Module, Tensor] = field(default_factory=dict)

    @property
    def is_fresh(self) -> bool:
        """Whether no factor was replaced, or written to, since."""
        return self.made_of == versions(self.owners)

    def of(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What one of the layers says of x; what the others say of the same tensor is computed along, and kept until they are asked."""
        if layer not in self.said or self.read is None or self.read[0] is not x or self.read[1] != x._version:
            if isinstance(layer, nn.Conv2d):
                pointwise: Tensor = Pointwise.apply(x, layer, self.down, self.ups[0])  # type: ignore[no-untyped-call]
                return pointwise
            said = Adapted.apply(x, self.layers, self.down, *self.ups)  # type: ignore[no-untyped-call]
            self.read, self.said = (x, x._version), dict(zip(self.layers, said, strict=True))
        y = self.said.pop(layer)
        if not self.said:
            self.read = None
        return y


def versions(owners: Sequence[Pair]) -> list[tuple[int, int]]:
    """What changes when a factor is replaced, or written to."""
    return [(id(one), one._version) for owner in owners for one in (owner.down, owner.up)]


def shadows(groups: Sequence[Sequence[tuple[nn.Module, Owner]]], strength: Tensor, dtype: torch.dtype) -> list[Shadow[Owner]]:
    """The shadows of layers and what sits on them, all in one go; those of a group read the same."""
    flat = [owner for group in groups for _, owner in group]
    downs, ups, scales = [one.down for one in flat], [one.up for one in flat], [one.scale for one in flat]
    sizes = [len(group) for group in groups]
    made: Sequence[Tensor] = Shadows.apply(dtype, sizes, scales, strength, *downs, *ups)  # type: ignore[no-untyped-call]
    found, rest = [], iter(made[len(groups) :])
    for group, down in zip(groups, made, strict=False):
        layers, owners = [layer for layer, _ in group], [owner for _, owner in group]
        learnt = any(owner.down.requires_grad for owner in owners)
        own = [*itertools.islice(rest, len(group))]
        found.append(Shadow(layers, owners, down if learnt else down.detach(), own, versions(owners)))
    return found


class Gated(torch.autograd.Function):
    """GEGLU (Shazeer 2020): (..., 2 C) -> (..., C), its left half times GELU of its right one. GELU is computed again backward, and both
    halves' gradients are written where they belong: as one tensor."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        left, gate = both.chunk(2, -1)
        return F.gelu(gate).mul_(left)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        left, gate = both.chunk(2, -1)
        out = torch.empty_like(both)
        of_left, of_gate = out.chunk(2, -1)
        torch.mul(grad, left, out=of_gate)
        torch.ops.aten.gelu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        torch.ops.aten.gelu.out(gate, out=of_left)
        of_left.mul_(grad)
        return out


class Gate(GEGLU):  # type: ignore[misc]
    """diffusers' own, with the same layer inside."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return Gated.apply(self.proj(hidden_states))  # type: ignore[no-any-return, no-untyped-call]


FACTORS = ("output_scale_factor", "rescale_output_factor")
"""By which diffusers' blocks divide."""


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


def spare(network: nn.Module) -> None:
    """Divide by no factor of a network's blocks that is 1, and gate without a copy; no bit of what it computes changes by it."""
    for module in network.modules():
        for name in FACTORS:
            if vars(module).get(name) == 1:
                setattr(module, name, One())
        if type(module) is GEGLU:
            module.__class__ = Gate
