"""A base's large weights in 8 or 4 bits while adapters on it learn (QLoRA, Dettmers et al. 2023), wherever it runs.

8bit: blocks of 256 numbers in dynamic 8-bit floats (Dettmers et al. 2022, section 2.1); nf4: blocks of 64 in 4-bit NormalFloat. Both by
bitsandbytes, with double quantisation: the blocks' maxima are held in 8 bits as well. Products are computed in the run's own precision.

int8: 8-bit integers with a scale for each output, whose products are computed in integers, too: what is multiplied is rounded to 8 bits
row by row (LLM.int8, Dettmers et al. 2022, section 2.1; here without its outliers), forward and backward.
"""

import functools
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlora.errors import UserError

BLOCKS = {"8bit": 256, "nf4": 64}
"""Numbers that share a scale."""
WAYS = ("int8", *BLOCKS)
KEPT_WHOLE = ("time_emb", "add_embedding", "embed_tokens")
"""Parts of names of linear layers that stay as they are: small, and every layer hangs on what the network is told of the time."""


def library() -> Any:
    """bitsandbytes' functions. Raises `UserError` if it is not installed."""
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        what = "weights in fewer bits need bitsandbytes, which is not installed"
        raise UserError("E-QUANT-01", what, "train.base_weights", 'install it: pip install "sdlora[optim]"; or set it to full') from error


class Quantised(nn.Linear):
    """A frozen linear layer whose `weight` is packed, uint8; for the backward pass that alone is kept."""

    absmax: Tensor
    code: Tensor
    offset: Tensor
    nested_absmax: Tensor
    nested_code: Tensor

    def __init__(self, layer: nn.Linear, how: str, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.how = layer.in_features, layer.out_features, how
        self.dtype = layer.weight.dtype
        self.weight = nn.Parameter(self._packed(layer.weight.detach().to(device)), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(device), requires_grad=False)

    def _packed(self, weight: Tensor) -> Tensor:
        """What is held as `weight`; what unpacks it becomes buffers."""
        if self.how == "nf4":
            packed, state = library().quantize_4bit(weight, blocksize=BLOCKS[self.how], compress_statistics=True, quant_type="nf4")
        else:
            packed, state = library().quantize_blockwise(weight, blocksize=BLOCKS[self.how], nested=True)
        own = {"absmax": state.absmax, "code": state.code, "offset": state.offset}
        for name, tensor in {**own, "nested_absmax": state.state2.absmax, "nested_code": state.state2.code}.items():
            self.register_buffer(name, tensor)
        self.nested_block = state.state2.blocksize
        return packed  # type: ignore[no-any-return]

    @property
    def shape(self) -> torch.Size:
        """Of the weight as a matrix: (out, in)."""
        return torch.Size((self.out_features, self.in_features))

    def whole(self) -> Tensor:
        """The weight that it stands for, (out, in), in the run's precision."""
        functional, block = library(), BLOCKS[self.how]
        nested = functional.QuantState(self.nested_absmax, code=self.nested_code, blocksize=self.nested_block, dtype=torch.float32)
        parts: dict[str, Any] = {"code": self.code, "blocksize": block, "dtype": self.dtype, "offset": self.offset, "state2": nested}
        if self.how == "nf4":
            state = functional.QuantState(self.absmax, shape=self.shape, quant_type="nf4", **parts)
            found: Tensor = functional.dequantize_4bit(self.weight, state)
        else:
            found = functional.dequantize_blockwise(self.weight, functional.QuantState(self.absmax, **parts))
        return found

    def forward(self, x: Tensor) -> Tensor:
        product = self.product(x)
        return product if self.bias is None else product + self.bias

    def product(self, x: Tensor) -> Tensor:
        """x (..., in) times the weight, without the bias."""
        product: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return product

    def times(self, x: Tensor) -> Tensor:
        """The same, not to be differentiated."""
        return F.linear(x, self.whole().to(x.dtype))

    def of_input(self, grad: Tensor) -> Tensor:
        """The gradient (..., in) of what it read, from that of what it said (..., out)."""
        return grad @ self.whole().to(grad.dtype)


class Int8(Quantised):
    """A frozen linear layer that multiplies in 8-bit integers."""

    scale: Tensor  # (out,) float32

    def __init__(self, layer: nn.Linear, device: torch.device) -> None:
        super().__init__(layer, "int8", device)

    def _packed(self, weight: Tensor) -> Tensor:
        packed, scale = rounded(weight)
        self.register_buffer("scale", scale[:, 0])
        return packed

    def whole(self) -> Tensor:
        return (self.weight * self.scale[:, None]).to(self.dtype)

    def times(self, x: Tensor) -> Tensor:
        return self.of_rounded(x, rounded(x.flatten(0, -2)))

    def of_rounded(self, x: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
        """The product with x (..., in), of which the rounded rows (n, in) are at hand."""
        if not fits(rows[0], self.weight.t()):
            return super().times(x)
        said = torch.mul(multiply_integers(rows[0], self.weight.t()), rows[1])
        return torch.mul(said, self.scale, out=torch.empty_like(said, dtype=x.dtype)).view(*x.shape[:-1], self.out_features)

    def of_input(self, grad: Tensor) -> Tensor:
        rows, scale = rounded(grad.flatten(0, -2) * self.scale)
        if not fits(rows, self.weight):
            return super().of_input(grad)
        said = multiply_integers(rows, self.weight)
        return torch.mul(said, scale, out=torch.empty_like(said, dtype=grad.dtype)).view(*grad.shape[:-1], self.in_features)


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, k) as 8-bit integers, and the scale (n, 1) of each, float32."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-30) / 127
    return torch.div(rows, scale).round_().to(torch.int8), scale


def fits(left: Tensor, right: Tensor) -> bool:
    """Whether (n, k) and (k, m) can be multiplied as integers: CUDA's kernels take no fewer rows, and sides in eights."""
    return len(left) > 16 and left.shape[1] % 8 == 0 and right.shape[1] % 8 == 0


def multiply_integers(left: Tensor, right: Tensor) -> Tensor:
    """(n, k) @ (k, m) of int8: int32, or float32 where this processor's own product is wrong, which is exact below 2**24."""
    if left.device.type == "cpu" and not adds_without_saturation():
        return left.float() @ right.float()
    return torch._int_mm(left, right)


@functools.cache
def adds_without_saturation() -> bool:
    """Whether the processor's product of 8-bit integers is right. Without VNNI oneDNN adds pairs of products in 16 bits, which most do not
    fit into; what it then says of large numbers is wrong by far."""
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.t()) == 64 * 127**2).all())


class _Product(torch.autograd.Function):
    """A product that keeps no weight for its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantised) -> Tensor:
        ctx.layer = layer
        return layer.times(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.of_input(grad), None


def chosen(module: nn.Module) -> dict[str, nn.Linear]:
    """The layers of a module that can be held in fewer bits, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and not isinstance(layer, Quantised) and not any(part in name for part in KEPT_WHOLE)
    }


def pack(module: nn.Module, how: str, device: torch.device) -> None:
    """Put packed layers on a device in place of a module's own, one after the other, so that it never holds the whole weights."""
    for name, layer in chosen(module).items():
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, Int8(layer, device) if how == "int8" else Quantised(layer, how, device))


def packed_bytes(shape: torch.Size, how: str) -> int:
    """Bytes that a weight (out, in) takes beside its numbers: of int8 four for each output, else a byte for each block's maximum and four
    for 256 of those."""
    numbers = shape.numel()
    if how == "int8":
        return numbers + 4 * shape[0]
    blocks = -(-numbers // BLOCKS[how])
    return (numbers // 2 if how == "nf4" else numbers) + blocks + 4 * -(-blocks // 256)


def numbers(module: nn.Module, recurse: bool = True) -> int:
    """How many numbers a module's weights stand for, packed or not."""
    found = sum(p.numel() for p in module.parameters(recurse))
    inner = [one for one in (module.modules() if recurse else [module]) if isinstance(one, Quantised)]
    return found + sum(one.shape.numel() - one.weight.numel() for one in inner)
