"""Programs that read packs, in numbers: which change of which layer each applies, written from their published code and behaviour.

Each takes a pack's tensors and the true model's layers and gives ΔW by full layer name, in float64: for LoRA alone. Nothing here is of the
code under test; how the programs come to a layer's name is what they differ in.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import bases
import torch
from torch import Tensor

Shapes = Mapping[str, torch.Size]
LEVELS = {False: {1, 2, 3}, True: {0, 1}}
"""Of the way up, those that attend: of a model with one text encoder, with two."""
DOWN, UP = "lora_down.weight", "lora_up.weight"


class RefusedError(Exception):
    """The program does not open the file."""


@dataclass
class Outcome:
    """What a program made of a pack."""

    changes: dict[str, Tensor] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)  # keys or modules that a message names


def two_encoders(shapes: Shapes) -> bool:
    return any(layer.startswith("text_encoder_2.") for layer in shapes)


def original(layer: str, shapes: Shapes) -> str:
    """A UNet layer's dotted name in the original implementation."""
    return bases.unet_name(f"{layer.removeprefix('unet.')}.weight", LEVELS[two_encoders(shapes)]).removesuffix(".weight")


def change(down: Tensor, up: Tensor, alpha: Tensor | None, shape: torch.Size) -> Tensor:
    """alpha / rank · up @ down, in the weight's shape. Raises `RuntimeError` where it has another number of elements."""
    scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
    return (scale * up.double().flatten(1) @ down.double().flatten(1)).reshape(shape)


def modules(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """By what stands before the first point."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, leaf = key.partition(".")
        found.setdefault(name, {})[leaf] = tensor
    return found


# ---------------------------------------------------------------- ComfyUI and Forge: a table of names


def comfy_names(shapes: Shapes) -> Iterator[tuple[str, str]]:
    for layer in shapes:
        part, _, rest = layer.partition(".")
        if part == "unet":
            yield f"lora_unet_{original(layer, shapes).replace('.', '_')}", layer
            yield f"diffusion_model.{original(layer, shapes)}", layer
            yield from ((f"{start}_{rest.replace('.', '_')}", layer) for start in ("lora_unet", "lycoris"))
            processor = rest.replace(".to_", ".processor.to_").removesuffix(".0" if rest.endswith(".to_out.0") else " ")
            yield from ((f"{start}{processor}", layer) for start in ("", "unet."))
        elif part == "text_encoder":
            yield from ((f"{start}_{rest.replace('.', '_')}", layer) for start in ("lora_te", "lora_te1"))
            yield layer, layer
        else:
            yield f"lora_te2_{rest.replace('.', '_')}", layer
            yield layer, layer


LEAVES = ((DOWN, UP, "."), ("lora_A.weight", "lora_B.weight", "."), ("lora.down.weight", "lora.up.weight", "."),
          ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight", "."), ("lora.down.weight", "lora.up.weight", "_"))  # fmt: skip


def comfy(tensors: Mapping[str, Tensor], shapes: Shapes) -> Outcome:
    out, loaded = Outcome(), set()
    for name, layer in comfy_names(shapes):
        for down, up, joint in LEAVES:
            keys = (f"{name}{joint}{down}", f"{name}{joint}{up}")
            if all(key in tensors for key in keys):
                alpha = tensors.get(f"{name}.alpha")
                loaded |= {*keys, f"{name}.alpha"}
                try:
                    out.changes[layer] = change(tensors[keys[0]], tensors[keys[1]], alpha, shapes[layer])
                except RuntimeError:
                    out.said.append(name)
    out.said += [key for key in tensors if key not in loaded]
    return out


def forge(tensors: Mapping[str, Tensor], shapes: Shapes) -> Outcome:
    out = comfy(tensors, shapes)
    if len(out.said) > 12:
        raise RefusedError(f"{len(out.said)} keys fit nothing")
    return out


# ---------------------------------------------------------------- AUTOMATIC1111: names rewritten by patterns


def _a1111_name(name: str) -> str:
    """A kohya module as its patterns rewrite it: the name of a module of the original implementation."""
    rules: list[tuple[str, Callable[[re.Match[str]], str]]] = [
        (r"lora_unet_conv_in", lambda _: "input_blocks_0_0"),
        (r"lora_unet_conv_out", lambda _: "out_2"),
        (r"lora_unet_time_embedding_linear_(\d)", lambda m: f"time_embed_{2 * int(m[1]) - 2}"),
        (r"lora_unet_down_blocks_(\d)_downsamplers_0_conv", lambda m: f"input_blocks_{3 + 3 * int(m[1])}_0_op"),
        (r"lora_unet_up_blocks_(\d)_upsamplers_0_conv", lambda m: f"output_blocks_{2 + 3 * int(m[1])}_{2 if int(m[1]) > 0 else 1}_conv"),
        (r"lora_unet_down_blocks_(\d)_(attentions|resnets)_(\d)_(.+)",
         lambda m: f"input_blocks_{1 + 3 * int(m[1]) + int(m[3])}_{int(m[2] == 'attentions')}_{_residual(m[4])}"),
        (r"lora_unet_mid_block_(attentions|resnets)_(\d)_(.+)",
         lambda m: f"middle_block_{1 if m[1] == 'attentions' else 2 * int(m[2])}_{_residual(m[3])}"),
        (r"lora_unet_up_blocks_(\d)_(attentions|resnets)_(\d)_(.+)",
         lambda m: f"output_blocks_{3 * int(m[1]) + int(m[3])}_{int(m[2] == 'attentions')}_{_residual(m[4])}"),
    ]  # fmt: skip
    for pattern, made in rules:
        if found := re.fullmatch(pattern, name):
            return f"diffusion_model_{made(found)}"
    return name.replace("lora_unet", "diffusion_model")


def _residual(rest: str) -> str:
    table = {"conv1": "in_layers_2", "time_emb_proj": "emb_layers_1", "conv2": "out_layers_3", "conv_shortcut": "skip_connection"}
    return table.get(rest, rest)


def a1111(tensors: Mapping[str, Tensor], shapes: Shapes) -> Outcome:
    """What fits no module goes to a log that is off by default."""
    two, known = two_encoders(shapes), {}
    for layer in shapes:
        part, _, rest = layer.partition(".")
        flat = rest.replace(".", "_")
        if part == "unet":
            known[f"diffusion_model_{original(layer, shapes).replace('.', '_')}"] = layer
        elif part == "text_encoder":
            known[f"0_transformer_{flat}" if two else f"transformer_{flat}"] = layer
        elif ".encoder.layers." in rest:
            known[f"1_model_{flat}"] = layer
    out, joined = Outcome(), {}
    for name, leaves in modules(tensors).items():
        if (DOWN in leaves) != (UP in leaves):
            raise RefusedError(f"{name} lacks a factor")
        start = re.match(r"lora_te(1|2|)_", name)
        text = {"": "transformer_", "1": "0_transformer_" if two else "transformer_", "2": "1_model_"}[start[1]] if start else ""
        found = known.get(text + name[len(start[0]) :] if start else _a1111_name(name), "")
        if not found or DOWN not in leaves:
            continue
        made = change(leaves[DOWN], leaves[UP], leaves.get("alpha"), shapes[found])
        if found.startswith("text_encoder_2.") and ".self_attn." in found:
            joined[found] = made  # parts of one MultiheadAttention, which takes all four or none
        else:
            out.changes[found] = made
    for layer, made in joined.items():
        start, _, _ = layer.rpartition(".")
        if all(f"{start}.{one}_proj" in joined for one in ("q", "k", "v", "out")):
            out.changes[layer] = made
    return out


# ---------------------------------------------------------------- InvokeAI: all or nothing, the base told by shapes


def invoke(tensors: Mapping[str, Tensor], shapes: Shapes) -> Outcome:
    two, out = two_encoders(shapes), Outcome()
    held = {key: tensor for key, tensor in tensors.items() if not key.startswith("bundle_emb")}
    if any(not re.match(r"lora_(unet|te|te1|te2)_", key) for key in held):
        raise RefusedError("it is no file of kohya's")
    found = modules(held)
    if any((DOWN in leaves) != (UP in leaves) for leaves in found.values()):
        raise RefusedError("a factor is missing")
    if _told_width(found) != (2048 if two else 768):
        raise RefusedError("its base is not told, or is another")
    names = {f"lora_unet_{layer.removeprefix('unet.').replace('.', '_')}": layer for layer in shapes if layer.startswith("unet.")}
    theirs = {f"lora_unet_{original(layer, shapes).replace('.', '_')}": layer for layer in names.values()}
    inside = [name for name in found if name.startswith("lora_unet_") and re.search("blocks?_", name)]
    if two and any(name in theirs for name in inside):
        if any(name in names for name in inside):
            raise RefusedError("two ways of naming blocks")
        names |= theirs
    for part, prefixes in {"text_encoder": ["lora_te1"] if two else ["lora_te"], "text_encoder_2": ["lora_te2"]}.items():
        names |= {f"{prefixes[0]}_{one.partition('.')[2].replace('.', '_')}": one for one in shapes if one.startswith(f"{part}.")}
    for name, leaves in found.items():
        if two and re.match("lora_te_", name):
            raise RefusedError("a prefix that this base does not have")
        if name in names:
            out.changes[names[name]] = change(leaves[DOWN], leaves[UP], leaves.get("alpha"), shapes[names[name]])
        elif two or not name.startswith("lora_te1_"):
            out.said.append(name)
    return out


def _told_width(found: Mapping[str, Mapping[str, Tensor]]) -> int:
    cross = {leaves[DOWN].shape[1] for name, leaves in found.items() if re.search(r"attn2_to_[kv]$", name)}
    if cross:
        return max(cross)
    if any(name.startswith("lora_te2_") and "self_attn" in name for name in found):
        return 2048
    plain = {leaves[DOWN].shape[1] for name, leaves in found.items() if name.startswith("lora_te_") and "self_attn" in name}
    return max(plain, default=0)


# ---------------------------------------------------------------- kohya's scripts: exact names, strict shapes


def kohya(tensors: Mapping[str, Tensor], shapes: Shapes) -> Outcome:
    two, out = two_encoders(shapes), Outcome()
    theirs = {f"lora_unet_{original(layer, shapes).replace('.', '_')}": layer for layer in shapes if layer.startswith("unet.")}
    ours = {f"lora_unet_{layer.removeprefix('unet.').replace('.', '_')}": layer for layer in shapes if layer.startswith("unet.")}
    found = modules(tensors)
    names = ours
    if two:
        inside = [name for name in found if name.startswith("lora_unet_") and re.search("blocks?_", name)]
        if any(name in theirs for name in inside) and any(name in ours for name in inside):
            raise RefusedError("two ways of naming blocks")
        names = ours | theirs
    for part, prefix in {"text_encoder": "lora_te1" if two else "lora_te", "text_encoder_2": "lora_te2"}.items():
        layers = [one for one in shapes if one.startswith(f"{part}.") and not one.endswith("text_projection")]
        names |= {f"{prefix}_{one.partition('.')[2].replace('.', '_')}": one for one in layers}
    for name, leaves in found.items():
        if name not in names:
            continue
        shape = shapes[names[name]]
        if {DOWN, UP} - leaves.keys() or leaves[DOWN].ndim != len(shape):
            raise RefusedError("a factor is missing, or has another number of axes")
        alpha = leaves.get("alpha")
        whole = None if alpha is not None and float(alpha) == 0 else alpha  # 0 is read as the rank
        try:
            out.changes[names[name]] = change(leaves[DOWN], leaves[UP], whole, shape)
        except RuntimeError as error:
            raise RefusedError("a factor has another shape") from error
    return out


PROGRAMS: dict[str, Callable[[Mapping[str, Tensor], Shapes], Outcome]] = {
    "AUTOMATIC1111": a1111, "Forge": forge, "ComfyUI": comfy, "InvokeAI": invoke, "kohya": kohya,
}  # fmt: skip
