"""How much of torch lives in this process: whoever is done with a base leaves none of it."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn


class Living(NamedTuple):
    """What Python holds of torch."""

    tensors: int
    bytes: int  # of their storages, each counted once
    modules: int


def count() -> Living:
    """What lives now, of all that was made since `gc.freeze`."""
    kinds = [(one, type(one)) for one in gc.get_objects()]  # `isinstance` would ask proxies, which import
    tensors = [one for one, kind in kinds if issubclass(kind, torch.Tensor)]
    storages = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors if one.layout == torch.strided}
    return Living(len(tensors), sum(storages.values()), sum(issubclass(kind, nn.Module) for _, kind in kinds))


@contextlib.contextmanager
def counted_references() -> Iterator[None]:
    """Without Python's collector: what lives on has a holder, or holds itself."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def counts(times: int, do: Callable[[int], Any]) -> list[Living]:
    """What lives before, and after each of so many times, by references alone."""
    with counted_references():
        found = [count()]
        for i in range(times):
            do(i)
            found.append(count())
    return found
