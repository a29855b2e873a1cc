"""What a computation asks of the hardware, counted and not timed: kernels, bytes through memory, bytes kept for the backward pass.

Counts depend on the program alone, so a loaded machine, or one without a GPU, measures them as well as any other.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

AT_ONCE = (110, 64, 48, 36, 30)
"""Tensors of each list that one kernel of a `_foreach_` operation takes, by the number of its lists (ATen's multi_tensor_apply)."""
ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Counted(TorchDispatchMode):
    """Counts what runs inside it. Views and bare allocations are no kernels; an operator is one, whatever a library makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.moved = 0  # bytes that kernels read and write
        self._kept: dict[int, int] = {}  # bytes of a storage, by its address
        self._held: list[Tensor] = []  # so that no address is given out twice
        self._hooks = saved_tensors_hooks(self._keep, lambda tensor: tensor)

    @property
    def kernels(self) -> int:
        return self.by_name.total()

    @property
    def saved(self) -> int:
        """Bytes of all storages that a backward pass holds on to, parameters among them."""
        return sum(self._kept.values())

    def __enter__(self) -> "Counted":
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if func._schema.name.startswith("prim::"):  # a question, such as where a tensor is
            return out
        outs = {one.name for one in func._schema.arguments if one.is_out}  # only written to, and among what is given back
        read = {key: value for key, value in (kwargs or {}).items() if key not in outs}
        tensors = [leaf for leaf in tree_leaves((args, read, out)) if isinstance(leaf, Tensor)]
        is_view = bool(tensors) and not func._schema.is_mutable and views(args, out)
        if name == "convolution_backward" and not args[-1][1]:  # without a gradient of the weight the input is not read
            tensors = [one for one in tensors if one is not args[1]]
        if not is_view and name not in ALLOCATE and not name.startswith("_local_scalar"):
            self.by_name[name] += launches(name, args, out)
            self.moved += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out

    def _keep(self, tensor: Tensor) -> Tensor:
        bare, storage = tensor.detach(), tensor.untyped_storage()  # a result that its own step keeps would hold itself
        self._kept[storage._cdata] = storage.nbytes()
        self._held.append(bare)
        return bare


def views(args: Any, out: Any) -> bool:
    """Whether an operator gave nothing but its operands' own memory."""
    given = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
    made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    return bool(made) and all(leaf.untyped_storage()._cdata in given for leaf in made)


def launches(name: str, args: Any, out: Any) -> int:
    """Kernels of one operator: one, or as many as the lists of a `_foreach_` or `_fused_` one need."""
    if not name.startswith(("_foreach_", "_fused_")):
        return 1
    lists = [one for one in [*args, out] if isinstance(one, (list, tuple)) and one and isinstance(one[0], Tensor)]
    return -(-len(lists[0]) // AT_ONCE[min(len(lists), len(AT_ONCE)) - 1])


def hollow(network: nn.Module, mode: FakeTensorMode) -> None:
    """Give a network tensors without memory, that know device, dtype and shape: they can be counted, and not computed with."""
    for module in network.modules():
        for name, one in list(module._parameters.items()):
            if one is not None:
                module._parameters[name] = nn.Parameter(mode.from_tensor(one.data), requires_grad=one.requires_grad)
        for name, buffer in list(module._buffers.items()):
            module._buffers[name] = None if buffer is None else mode.from_tensor(buffer)


@contextlib.contextmanager
def full_norms() -> Iterator[None]:
    """Norms in fp32, as autocast has them on a GPU, and not on a CPU."""
    layer, group = F.layer_norm, F.group_norm

    def in_full(norm: Any) -> Any:
        def of(x: Tensor, how: Any, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
            said: Tensor = norm(x.float(), how, weight.float(), bias.float(), eps)
            return said

        return of

    F.layer_norm, F.group_norm = in_full(layer), in_full(group)
    try:
        yield
    finally:
        F.layer_norm, F.group_norm = layer, group


def counted(step: Callable[[], object]) -> Counted:
    """One step, counted."""
    with Counted() as found:
        step()
    return found


def table(rows: Mapping[str, Counted]) -> Iterable[str]:
    """Rows of a table: what was counted of each arm."""
    yield "| arm | kernels | MB moved | MB saved for backward |"
    yield "|---|---|---|---|"
    for name, one in rows.items():
        yield f"| {name} | {one.kernels:,} | {one.moved / 1e6:.1f} | {one.saved / 1e6:.1f} |"
