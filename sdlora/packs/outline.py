"""The layers of the true models by their names and number of axes, so that a pack can be judged without a base at hand.

Names are diffusers'; `original` gives those of the original implementation (latent-diffusion, sgm) for any UNet built of the same blocks.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from sdlora.layers import is_linear

Layers = Mapping[str, int]
"""Full layer name, component first: axes of its weight."""
RESNETS = 2
"""Residual blocks of a level on the way down; one more on the way up."""
RESIDUAL = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


@dataclass(frozen=True)
class Outline:
    """What tells one model's layers from another's."""

    widths: tuple[int, ...]  # channels of each level
    depths: tuple[int, ...]  # transformer blocks of an attention at each level; 0: it has none
    linear: bool  # whether attention is entered and left through linear layers
    context: int  # width of the text states that attention reads
    encoders: tuple[int, ...]  # layers of each text encoder


OUTLINES = {
    "sd_v1": Outline((320, 640, 1280, 1280), (1, 1, 1, 0), False, 768, (12,)),
    "sd_v2": Outline((320, 640, 1280, 1280), (1, 1, 1, 0), True, 1024, (23,)),
    "sdxl_base": Outline((320, 640, 1280), (0, 2, 10), True, 2048, (12, 32)),
}
"""By what `ss_base_model_version` begins with."""
ATTENTION = [f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")]


def layers(outline: Outline) -> Layers:
    """All layers of a model that are linear or convolutions."""
    found: dict[str, int] = {}
    for name in _attentions(outline):
        found |= {f"unet.{name}.{part}": 2 if outline.linear else 4 for part in ("proj_in", "proj_out")}
        depth = outline.depths[-1] or outline.depths[-2] if name.startswith("mid") else _depth(outline, name)
        for block in range(depth):
            inner = [*ATTENTION, "ff.net.0.proj", "ff.net.2"]
            found |= {f"unet.{name}.transformer_blocks.{block}.{part}": 2 for part in inner}
    for name, turns in _resnets(outline):
        found |= {f"unet.{name}.conv1": 4, f"unet.{name}.time_emb_proj": 2, f"unet.{name}.conv2": 4}
        found |= {f"unet.{name}.conv_shortcut": 4} if turns else {}
    for level in range(len(outline.widths) - 1):
        found |= {f"unet.down_blocks.{level}.downsamplers.0.conv": 4, f"unet.up_blocks.{level}.upsamplers.0.conv": 4}
    two = len(outline.encoders) > 1
    found |= {f"unet.{name}": 4 if name.startswith("conv") else 2 for name in OUTSIDE if two or not name.startswith("add")}
    for i, count in enumerate(outline.encoders):
        start = f"text_encoder{f'_{i + 1}' if i else ''}"
        parts = [*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2"]
        found |= {f"{start}.text_model.encoder.layers.{n}.{part}": 2 for n in range(count) for part in parts}
        found |= {f"{start}.text_projection": 2} if i else {}
    return found


def of(modules: Mapping[str, nn.Module]) -> Layers:
    """The layers of a base that is loaded."""
    return {name: layer.get_parameter("weight").ndim for name, layer in modules.items() if is_linear(layer)}


def original(dotted: str, known: Layers) -> str:
    """A UNet layer's name in the original implementation; `known` are all layers of the same model. Raises `KeyError` if it has none."""
    name = dotted.removeprefix("unet.")
    if name in OUTSIDE:
        return OUTSIDE[name]
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv", name):
        level = int(found[2])
        attended = any(other.startswith(f"unet.up_blocks.{level}.attentions.") for other in known)
        last = f"{(RESNETS + 1) * (level + 1)}.0.op" if found[1] == "down" else f"{(RESNETS + 1) * (level + 1) - 1}.{1 + attended}.conv"
        return f"{'input' if found[1] == 'down' else 'output'}_blocks.{last}"
    found = re.fullmatch(r"(down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?(resnets|attentions)\.(\d+)\.(.*)", name)
    if not found:
        raise KeyError(dotted)
    where, level, kind, place = found[1], int(found[2] or 0), found[3], int(found[4])
    rest = RESIDUAL[found[5]] if kind == "resnets" else found[5]
    if where == "mid_block":
        return f"middle_block.{2 * place if kind == 'resnets' else 1}.{rest}"
    start = (
        f"input_blocks.{1 + (RESNETS + 1) * level + place}" if where == "down_blocks" else f"output_blocks.{(RESNETS + 1) * level + place}"
    )
    return f"{start}.{int(kind == 'attentions')}.{rest}"


def _depth(outline: Outline, name: str) -> int:
    level = int(name.split(".")[1])
    return outline.depths[level] if name.startswith("down") else outline.depths[::-1][level]


def _attentions(outline: Outline) -> Iterator[str]:
    for level, (down, up) in enumerate(zip(outline.depths, outline.depths[::-1], strict=True)):
        yield from (f"down_blocks.{level}.attentions.{i}" for i in range(RESNETS if down else 0))
        yield from (f"up_blocks.{level}.attentions.{i}" for i in range(RESNETS + 1 if up else 0))
    yield "mid_block.attentions.0"


def _resnets(outline: Outline) -> Iterator[tuple[str, bool]]:
    """Names, and whether the width changes there."""
    widths = outline.widths
    for level in range(len(widths)):
        yield from ((f"down_blocks.{level}.resnets.{i}", i == 0 < level and widths[level] != widths[level - 1]) for i in range(RESNETS))
        yield from ((f"up_blocks.{level}.resnets.{i}", True) for i in range(RESNETS + 1))
    yield from ((f"mid_block.resnets.{i}", False) for i in range(2))
