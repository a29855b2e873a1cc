"""How programs spell the layers and leaves of packs: every spelling of every layer, looked up, and a key's part behind it.

| layout | key |
|---|---|
| kohya | `lora_unet_down_blocks_0_..._to_q.lora_down.weight`; kohya's OFT says `oft_unet_`, LyCORIS alone `lycoris_` |
| diffusers, PEFT | `unet.down_blocks.0....to_q.lora_A.weight`, before that `....lora.down.weight` |
| processors | `unet....attn1.processor.to_q_lora.down.weight`, diffusers' oldest |
| original | `diffusion_model.input_blocks.1.1....`, `clip_l.text_model....`, `text_encoders.clip_l.transformer....` |

In any of them the UNet's blocks may be called as in diffusers or as in the original implementation, with or without `text_model`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from sdlora import original
from sdlora.packs import keys

DOWN, UP = "lora_down.weight", "lora_up.weight"
MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight", "magnitude")
LEAVES = {
    **dict.fromkeys(("lora_A.weight", "lora_A.default.weight", "lora.down.weight", "lora_linear_layer.down.weight", "down.weight"), DOWN),
    **dict.fromkeys(("lora_B.weight", "lora_B.default.weight", "lora.up.weight", "lora_linear_layer.up.weight", "up.weight"), UP),
    **dict.fromkeys(MAGNITUDES, "dora_scale"),
}
"""Other names of leaves, and ours."""
TEXTS = {
    "": ("lora_te_", "lora_te1_", "oft_te_", "oft_te1_", "lycoris_te_", "lycoris_te1_"),
    "_2": ("lora_te2_", "oft_te2_", "lycoris_te2_"),
}
CLIPS = {"": ("clip_l", "clip_h"), "_2": ("clip_g",)}
"""What text encoders are called, by the suffix of their component."""
WHOLE = {"w_norm": "diff", "b_norm": "diff_b"}
CORES = {"lora_mid.weight", "hada_t1", "hada_t2", "lokr_t2"}
FLAT, LONG = ("lora", "oft", "lycoris"), (*LEAVES, DOWN, UP, "lora_mid.weight")
ORIGINAL = ("diffusion_model", "text_encoders", *CLIPS[""], *CLIPS["_2"])
DEEPEST = 5
"""Dots in a leaf's name, at most, and one more."""
BUNDLED = "bundle_emb."


@dataclass
class Sorted:
    """A pack's keys by layer, under our names of leaves; each key is in one of the three."""

    layers: dict[str, dict[str, str]] = field(default_factory=dict)  # full layer name: leaf: key
    unknown: list[str] = field(default_factory=list)  # keys of no layer of this base
    twice: list[str] = field(default_factory=list)  # keys that give once more what another gave
    layouts: dict[str, int] = field(default_factory=dict)  # keys in each


def sort(names: Iterable[str], table: Mapping[str, tuple[str, str]]) -> Sorted:
    """Find every key's layer and leaf; `table` is of `spellings`."""
    found = Sorted()
    for key in names:
        place = find(key, table)
        if place is None:
            found.unknown.append(key)
            continue
        layer, layout, leaf = place
        found.layouts[layout] = found.layouts.get(layout, 0) + 1
        leaves = found.layers.setdefault(layer, {})
        if leaf in leaves:
            found.twice.append(key)
        leaves.setdefault(leaf, key)
    return found


def find(key: str, table: Mapping[str, tuple[str, str]]) -> tuple[str, str, str] | None:
    """(layer, layout, leaf) of a key, by a few look-ups: a kohya module ends at the first dot, others before at most `DEEPEST`."""
    module, _, leaf = key.partition(".")
    end = len(key)
    for _ in range(DEEPEST):
        if module in table:
            layer, layout = table[module]
            return layer, layout, LEAVES.get(leaf, leaf)
        end = key.rfind(".", 0, end)
        if end < 0:
            break
        module, leaf = key[:end], key[end + 1 :]
    return None


def spellings(layers: Iterable[str], prefixes: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Every spelling of every layer -> (full layer name, layout). What the family's own packs say counts before all else."""
    every = [name for name in layers if "." in name]
    table = {module: (name, "kohya") for module, name in keys.layer_names(every, prefixes).items()}
    theirs = original.of(name.removeprefix("unet.") for name in every if name.startswith("unet."))
    groups = {name.rpartition(".")[0] for name in every}  # `to_out` is no layer, and has the old name of `to_out.0`
    for name in (one for one in every if one not in groups):
        component, _, inner = name.partition(".")
        found = _unet(inner, original.renamed(inner, theirs)) if component == "unet" else _text(component, inner)
        for spelling, layout in found:
            table.setdefault(spelling, (name, layout))
    return table


def guess(key: str) -> tuple[str, str, str]:
    """(module, leaf, layout) of a key where no base says which layers there are."""
    if key.startswith(BUNDLED):
        return BUNDLED, key, "embeddings"
    module, _, leaf = key.partition(".")
    if "_" in module and module.split("_")[0] in FLAT:
        return module, LEAVES.get(leaf, leaf), "lycoris" if module.startswith("lycoris") else "kohya"
    leaf = next((name for name in sorted(LONG, key=len, reverse=True) if key.endswith(f".{name}")), key.rpartition(".")[2])
    started = key.partition(".")[0]
    layout = "processors" if ".processor." in key else "original" if started in ORIGINAL else "diffusers"
    return key[: -len(leaf) - 1], LEAVES.get(leaf, leaf), layout


def plain(leaves: Iterable[str]) -> set[str]:
    """The leaves that are left of these when they are converted, as far as their names tell."""
    return {WHOLE.get(name, name) for name in leaves} - CORES


def _unet(inner: str, other: str | None) -> Iterator[tuple[str, str]]:
    for name, layout in ((inner, "diffusers"), (other, "original")):
        if name is None:
            continue
        flat = name.replace(".", "_")
        yield from ((f"{start}{flat}", said) for start, said in (("lora_unet_", "kohya"), ("oft_unet_", "kohya"), ("lycoris_", "lycoris")))
        yield from ((f"{start}{name}", layout) for start in ("unet.", "diffusion_model.", "base_model.model.", ""))
    attention, _, projection = inner.rpartition(".to_")
    if attention:
        old = f"{attention}.processor.to_{projection.removesuffix('.0')}_lora"
        yield from ((f"unet.{old}", "processors"), (old, "processors"))


def _text(component: str, inner: str) -> Iterator[tuple[str, str]]:
    suffix = component.removeprefix("text_encoder")
    for name in (inner, inner.removeprefix("text_model.")):
        flat = name.replace(".", "_")
        yield from ((f"{start}{flat}", "lycoris" if start.startswith("lyc") else "kohya") for start in TEXTS.get(suffix, ()))
        yield f"{component}.{name}", "diffusers"
        for clip in CLIPS.get(suffix, ()):
            yield from ((f"{start}{name}", "original") for start in (f"{clip}.", f"text_encoders.{clip}.transformer."))
