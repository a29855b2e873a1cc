"""A trigger's own embeddings (kind `prompt`) in packs, and beside them.

In a pack with other weights they stand in the header, since some programs refuse a file with tensors that they do not know. A file of
their own holds them as textual inversions, which programs read.
"""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from sdlora.packs import keys, layouts, strict

FIELD = "sdlora.words"
BESIDE = "-embedding.safetensors"
"""What the name of a file beside a pack, that holds the same as a textual inversion, ends in."""
DIFFERENCE, IDS = "emb_diff", "emb_ids"
Tensors = dict[str, Tensor]


def apart(tensors: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
    """(all other tensors, those of embeddings)."""
    words = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[2] in (DIFFERENCE, IDS)}
    return {key: tensor for key, tensor in tensors.items() if key not in words}, words


def held(tensors: Mapping[str, Tensor]) -> tuple[Tensors, dict[str, str]]:
    """What a file holds as tensors, and as a field of its header."""
    rest, words = apart(tensors)
    if not rest or not words:
        return dict(tensors), {}
    content = safetensors.torch.save({key: words[key].contiguous() for key in sorted(words)})
    return rest, {FIELD: base64.b64encode(content).decode()}


def from_header(metadata: Mapping[str, str], path: Path) -> Tensors:
    """The embeddings that a header holds. Raises `UserError` if it is damaged there."""
    try:
        content = base64.b64decode(metadata.get(FIELD, ""), validate=True)
        if content:
            strict.parse(content, f"{path}, in its field {FIELD}")
            return apart(safetensors.torch.load(content))[1]
    except (binascii.Error, ValueError, SafetensorError) as error:
        raise strict.refused(f"{FIELD}: {error}", path) from None
    return {}


def inversion(tensors: Mapping[str, Tensor], family: Any) -> Tensors:
    """The whole embeddings, the base's and what was learnt, as files of textual inversions have them; empty if there are none.

    (n, D) float32 under `emb_params`, or where there are two text encoders under `clip_l` and `clip_g`.
    """
    layers, names = family.layers(), keys.layer_names(family.layers(), family.prefixes)
    found = {}
    for module, leaves in keys.by_module(apart(tensors)[1]).items():
        weight = layers[names[module]].get_parameter("weight")
        suffix = names[module].partition(".")[0].removeprefix("text_encoder")
        whole = weight[leaves[IDS].long().to(weight.device)].detach().float().cpu() + leaves[DIFFERENCE].float().cpu()
        found[layouts.CLIPS[suffix][0]] = whole.contiguous()
    return found if "text_encoder_2" in family.components else dict(zip(("emb_params",), found.values(), strict=False))


def bundled(inversion: Mapping[str, Tensor], word: str) -> Tensors:
    """An inversion as it lies inside a pack. Points in a word would end its name there."""
    start = f"{layouts.BUNDLED}{word.replace('.', '-')}"
    return {f"{start}.{'string_to_param.*' if key == 'emb_params' else key}": tensor for key, tensor in inversion.items()}
