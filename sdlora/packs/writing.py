"""Packs as other programs want them: scales that all of them read alike, and the layout of diffusers.

Some programs take one alpha, or one rank, for all layers of a component and silently misread the rest. So where these differ, LoRA's
alpha / rank is multiplied into `up`, all factors are padded with zeros to the largest rank, and alpha is that rank: ΔW stays the same.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sdlora.errors import UserError
from sdlora.packs import keys
from sdlora.packs.layouts import DOWN, UP

LAYOUTS = ("kohya", "diffusers")


def agreed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kohya's keys with one alpha and, where it must be so, one rank for all LoRA layers of a component."""
    groups: dict[str, dict[str, dict[str, Tensor]]] = {}
    for module, leaves in keys.by_module(tensors).items():
        if {DOWN, UP, "alpha"} <= set(leaves):
            groups.setdefault("_".join(module.split("_")[:2]), {})[module] = leaves
    found = dict(tensors)
    for modules in groups.values():
        scales = {(float(leaves["alpha"]), len(leaves[DOWN])) for leaves in modules.values()}
        if len(scales) == 1:
            continue
        rank = max(rank for _, rank in scales)
        for module, leaves in modules.items():
            down, up = leaves[DOWN], leaves[UP] * (leaves["alpha"] / len(leaves[DOWN]))
            more = rank - len(down)
            found[f"{module}.{DOWN}"] = torch.cat([down, down.new_zeros(more, *down.shape[1:])])
            found[f"{module}.{UP}"] = torch.cat([up, up.new_zeros(len(up), more, *up.shape[2:])], 1)
            found[f"{module}.alpha"] = torch.tensor(float(rank))
    return found


def diffusers(tensors: Mapping[str, Tensor], layers: Mapping[str, str]) -> dict[str, Tensor]:
    """Kohya's keys (float32) as `unet.….lora_A.weight`, which has no alpha: it is multiplied into B. `layers`: module -> layer.

    Raises `UserError` for what that layout, as diffusers reads it, cannot hold.
    """
    found = {}
    for module, leaves in keys.by_module(tensors).items():
        layer, scale = layers[module], leaves.get("dora_scale")
        if not {DOWN, UP} <= set(leaves) or not set(leaves) <= {DOWN, UP, "alpha", "dora_scale"}:
            what = f"diffusers reads LoRA alone, and this holds {', '.join(sorted(leaves))}"
            raise UserError("E-PACK-32", what, layer, "write the kohya layout")
        if scale is not None and scale.shape[0] != scale.numel():
            what = "diffusers has a magnitude for each output, and this pack one for each input"
            raise UserError("E-PACK-32", what, layer, "write the kohya layout, or train with adapter.axis=out")
        rank = len(leaves[DOWN])
        found[f"{layer}.lora_A.weight"] = leaves[DOWN]
        found[f"{layer}.lora_B.weight"] = leaves[UP] * (leaves["alpha"] / rank if "alpha" in leaves else 1.0)
        if scale is not None:
            found[f"{layer}.lora_magnitude_vector"] = scale.flatten()
    return found


def laid_out(layout: str, tensors: Mapping[str, Tensor], family: Any) -> dict[str, Tensor]:
    """Kohya's keys in a layout."""
    ways: dict[str, Callable[[], dict[str, Tensor]]] = {
        "kohya": lambda: agreed(tensors),
        "diffusers": lambda: diffusers(tensors, keys.layer_names(family.layers(), family.prefixes)),
    }
    if layout not in ways:
        raise UserError("E-PACK-33", f'there is no layout "{layout}"', "--layout", f"choose one of: {', '.join(ways)}")
    return ways[layout]()
