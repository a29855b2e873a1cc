"""The kohya key grammar: `lora_unet_down_blocks_0_..._to_q.lora_up.weight` is prefix, layer name with `_` for `.`, then the leaf.

A family's `prefixes` are the whole of its key table: a component's own where its packs use the model's layer names, else one for every
block that they name otherwise.
"""

import contextlib
from collections.abc import Iterable, Mapping

from torch import Tensor


def module_name(dotted: str, prefixes: Mapping[str, str]) -> str:
    """`unet.down_blocks.0.to_q` -> `lora_unet_down_blocks_0_to_q`. Raises `KeyError` for a layer that no pack can name."""
    start = dotted
    while start not in prefixes:
        start, dot, _ = start.rpartition(".")
        if not dot:
            raise KeyError(dotted)
    return prefixes[start] + dotted[len(start) :].replace(".", "_")


def layer_names(layers: Iterable[str], prefixes: Mapping[str, str]) -> dict[str, str]:
    """Pack module name -> full layer name, for every layer of a base that packs can name."""
    found = {}
    for dotted in layers:
        if "." in dotted:
            with contextlib.suppress(KeyError):
                found[module_name(dotted, prefixes)] = dotted
    return found


def by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors of a pack grouped by module; module and leaf part at the first dot, as all readers do it."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.partition(".")
        modules.setdefault(module, {})[leaf] = tensor
    return modules
