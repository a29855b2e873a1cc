"""Textual inversions of other programs, alone or inside packs, as our embeddings of a word that the base knows how to spell.

| key | embeddings (n, D) |
|---|---|
| `emb_params`, `string_to_param.*`, `*` | of the one text encoder |
| `clip_l`, `clip_g` | of the first and the second |
| `<word>` | diffusers': the key is the word itself |
| `bundle_emb.WORD.` and any of those | inside a pack |

A word keeps its place among the tokens: n vectors can stand for a word that is spelt with n tokens, and for no other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdlora.packs import layouts
from sdlora.packs.words import DIFFERENCE, IDS

ALONE = ("emb_params", "string_to_param.*", "string_to_param", "*")
ENCODERS = {clip: suffix for suffix, clips in layouts.CLIPS.items() for clip in clips}


@dataclass
class Taken:
    """A pack's tensors with its inversions as ours, and what became of them."""

    tensors: dict[str, Tensor]
    ignored: dict[str, str] = field(default_factory=dict)  # key: why
    notes: list[str] = field(default_factory=list)


def words(tensors: Mapping[str, Tensor], alone: str) -> dict[str, dict[str, str]]:
    """Word: {which encoder's: key}. `alone` is the word of a file that holds nothing else and names none."""
    found: dict[str, dict[str, str]] = {}
    for key in tensors:
        word, part = alone, key
        if key.startswith(layouts.BUNDLED):
            word, _, part = key.removeprefix(layouts.BUNDLED).partition(".")
        elif key.startswith("<") and key.endswith(">"):
            word, part = key, "*"
        if part in ALONE or part in ENCODERS:
            found.setdefault(word, {})[part] = key
    return found


def take(tensors: Mapping[str, Tensor], alone: str, family: Any) -> Taken:
    """Turn inversions into embeddings of words of the base; what does not fit is named."""
    found = words(tensors, alone)
    taken = Taken({key: t for key, t in tensors.items() if not any(key in keys.values() for keys in found.values())})
    for word, parts in found.items():
        try:
            made = _of(word, {part: tensors[key] for part, key in parts.items()}, family)
            own = _own_ids(taken.tensors, family)
            if any(not torch.equal(ids.long(), made[name].long()) for name, ids in own.items() if name in made):
                raise ValueError("a pack has one word of its own, and this is another")
        except ValueError as error:
            taken.ignored |= dict.fromkeys(parts.values(), str(error))
            continue
        if own.keys() & made.keys():
            taken.notes.append(f'the embeddings of "{word}" stand in the header as well, and are taken from there')
            continue
        taken.tensors |= made
    return taken


def _of(word: str, parts: Mapping[str, Tensor], family: Any) -> dict[str, Tensor]:
    """`LAYER.emb_ids` and `LAYER.emb_diff` of a word. Raises `ValueError`."""
    spelt: Mapping[str, list[int]] = family.spelling(word) if word else {}
    layers, found = family.layers(), {}
    for part, vectors in parts.items():
        rows = vectors.float().reshape(-1, vectors.shape[-1]) if vectors.ndim else vectors.reshape(1, 1)
        layer = _layer(part, rows.shape[1], spelt, layers)
        weight, ids = layers[layer].get_parameter("weight").detach(), torch.tensor(spelt[layer])
        if len(ids) != len(rows):
            raise ValueError(f'{len(rows)} vectors for "{word}", which this base spells with {len(ids)} tokens')
        found[f"{layer}.{IDS}"] = ids.float()
        found[f"{layer}.{DIFFERENCE}"] = rows - weight[ids.to(weight.device)].float().cpu()
    if len(found) < 2 * len(spelt):
        raise ValueError(f'not all of the text encoders are told what "{word}" is')
    return found


def _layer(part: str, width: int, spelt: Mapping[str, list[int]], layers: Mapping[str, Any]) -> str:
    """The layer that embeds the tokens of an encoder. Raises `ValueError`."""
    for layer in spelt:
        suffix = layer.partition(".")[0].removeprefix("text_encoder")
        fits = suffix == ENCODERS[part] if part in ENCODERS else len(spelt) == 1
        if fits and layers[layer].get_parameter("weight").shape[1] == width:
            return layer
    raise ValueError(f"embeddings of the width {width} for a text encoder that this base does not have")


def _own_ids(tensors: Mapping[str, Tensor], family: Any) -> dict[str, Tensor]:
    """`LAYER.emb_ids` of the words that are in the pack already."""
    ids = [key for key in tensors if key.endswith(f".{IDS}")]
    table = layouts.spellings(family.layers(), family.prefixes) if ids else {}
    places = {key: layouts.find(key, table) for key in ids}
    return {f"{place[0]}.{IDS}": tensors[key] for key, place in places.items() if place}
