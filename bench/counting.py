"""What a computation asks of the hardware, counted and not timed: kernels, bytes through memory, bytes kept for the backward pass.

Counts depend on the program alone, so a loaded machine, or one without a GPU, measures them as well as any other.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
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
        self._kept: dict[int, int] = {}
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
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        is_view = bool(tensors) and not func._schema.is_mutable and views(args, out)
        if not is_view and name not in ALLOCATE and not name.startswith("_local_scalar"):
            self.by_name[name] += launches(name, args, out)
            self.moved += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._kept[storage.data_ptr()] = storage.nbytes()
        return tensor


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
