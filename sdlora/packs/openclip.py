"""Text encoders as OpenCLIP names them, where query, key and value are one product: its module is taken apart by rows."""

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from sdlora.packs import layouts
from sdlora.packs.layouts import DOWN, UP

INSIDE = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
PLACES = {"": ("cond_stage_model.model", "conditioner.embedders.0.model"), "_2": ("conditioner.embedders.1.model",)}
THREE = ("q_proj", "k_proj", "v_proj")
ROWS = {UP, "hada_w1_a", "hada_w2_a", "diff", "diff_b"}
"""Leaves of which each row is of one output; the rest is shared by all."""
SHARED = {DOWN, "hada_w1_b", "hada_w2_b", "alpha"}


def spellings(layers: Iterable[str], fused: bool) -> Iterator[tuple[str, str]]:
    """(name there, layer); of the fused ones the layer is a beginning that lacks `q_proj` and the like."""
    for layer in layers:
        found = re.fullmatch(r"text_encoder(_2)?\.text_model\.encoder\.layers\.(\d+)\.(.+)", layer)
        if not found:
            continue
        inner, suffix = found[3], found[1] or ""
        if fused and inner == f"self_attn.{THREE[0]}":
            names = [f"transformer.resblocks.{found[2]}.attn.in_proj{more}" for more in ("", "_weight")]
        else:
            names = [f"transformer.resblocks.{found[2]}.{INSIDE[inner]}"] if not fused and inner in INSIDE else []
        for name in names:
            starts = [f"{place}." for place in (*PLACES[suffix], *layouts.CLIPS[suffix])]
            yield from ((f"{start}{name}", layer.removesuffix(THREE[0])) for start in starts)
            yield from ((f"{start}{name.replace('.', '_')}", layer.removesuffix(THREE[0])) for start in layouts.TEXTS[suffix])


def taken_apart(tensors: Mapping[str, Tensor], layers: Iterable[str]) -> dict[str, Tensor]:
    """The tensors, those of fused modules as three layers' each. A module with leaves that rows do not part stays as it is."""
    table = {name: (layer, "original") for name, layer in spellings(layers, fused=True)}
    modules: dict[str, dict[str, str]] = {}
    for key in tensors if table else ():
        place = layouts.find(key, table)
        if place:
            modules.setdefault(place[0], {})[place[2]] = key
    found = dict(tensors)
    for start, named in modules.items():
        parted = {leaf: _parted(leaf, tensors[key]) for leaf, key in named.items()}
        if not all(parted.values()):
            continue
        for leaf, key in named.items():
            del found[key]
            found |= {f"{start}{part}.{leaf}": one for part, one in zip(THREE, parted[leaf], strict=True)}
    return found


def _parted(leaf: str, tensor: Tensor) -> list[Tensor]:
    """One for each of query, key and value; none if it cannot be parted."""
    by_row = leaf in ROWS or (leaf == "dora_scale" and tensor.ndim > 0 and len(tensor) > 1)
    if by_row and tensor.ndim and len(tensor) % 3 == 0:
        return [part.contiguous() for part in tensor.chunk(3)]
    return [tensor] * 3 if leaf in SHARED else []
