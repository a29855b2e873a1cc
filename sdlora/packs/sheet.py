"""A pack as programs that read packs see it: its modules, which layer each is meant for, how that is spelt, and at which scale it acts."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from sdlora.packs import outline
from sdlora.packs.outline import OUTLINES, Layers

DOWN, UP = "lora_down.weight", "lora_up.weight"
RENAMED = {"lora_A": DOWN, "lora_B": UP, "lora_magnitude_vector": "dora_scale", "down": DOWN, "up": UP}
DOTTED = re.compile(r"(.+?)\.(?:(lora_A|lora_B|lora_magnitude_vector)|lora(?:_linear_layer)?\.(down|up))(?:\.weight)?")
PROCESSOR = re.compile(r"(.+\.attn[12])\.processor\.(to_(?:q|k|v|out))_lora\.(down|up)\.weight")
MARKS = {  # a leaf that no other kind has, in the order in which they are looked for
    "hada_": "loha",
    "lokr_": "lokr",
    "oft_": "oft",
    "on_input": "ia3",
    "a1.weight": "glora",
    "diff": "full",
    "w_norm": "norm",
    "dora_scale": "dora",
    "lora_mid": "tucker",
    "lora_": "lora",
}
RANKED = {"lora": (DOWN, 0), "tucker": (DOWN, 0), "dora": (DOWN, 0), "loha": ("hada_w1_b", 0)}
"""Leaf and axis that tell a kind's rank."""
CONTEXT = re.compile(r"attn2[_.]to_[kv]$")


@dataclass(frozen=True)
class Module:
    """The tensors that a pack has for one layer, under kohya's leaf names."""

    name: str
    layout: str  # kohya, lycoris (one prefix for all), peft (lora_A), dotted (lora.down) or processor (to_q_lora)
    leaves: dict[str, Tensor]
    layer: str = ""  # full name; empty: no layer of the model is called so
    spelt: str = ""  # UNet: diffusers or original; text encoders: te, te1, te2
    flat: bool = False  # whether `text_model` is missing in the name

    @property
    def kind(self) -> str:
        return next((kind for mark, kind in MARKS.items() if any(leaf.startswith(mark) for leaf in self.leaves)), "")

    @property
    def whole(self) -> bool:
        """Whether none of a product's two factors is missing."""
        return (DOWN in self.leaves) == (UP in self.leaves)

    @property
    def part(self) -> str:
        return self.layer.partition(".")[0]

    @property
    def rank(self) -> int | None:
        leaf, axis = RANKED.get(self.kind, ("", 0))
        if self.kind == "lokr":
            leaf = next((name for name in ("lokr_w2_b", "lokr_w1_b") if name in self.leaves), "")
        tensor = self.leaves.get(leaf)
        return tensor.shape[axis] if tensor is not None and tensor.ndim else None

    @property
    def alpha(self) -> float | None:
        tensor = self.leaves.get("alpha")
        return float(tensor) if tensor is not None and tensor.numel() == 1 else None

    @property
    def scale(self) -> float:
        """alpha / rank, the factor that it was trained with; 1 where it has no rank, or no alpha."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / max(self.rank, 1)


@dataclass(frozen=True)
class Sheet:
    """A pack beside the layers of the model that it is for."""

    modules: list[Module]
    strays: list[str]  # keys of no module
    metadata: Mapping[str, str]
    version: str  # what `ss_base_model_version` begins with; empty: a model that hardly any program runs
    layers: Layers = field(default_factory=dict)

    @property
    def two_encoders(self) -> bool:
        return any(name.startswith("text_encoder_2.") for name in self.layers)

    @property
    def layouts(self) -> set[str]:
        return {module.layout for module in self.modules}

    @property
    def known(self) -> list[Module]:
        return [module for module in self.modules if module.layer]


def sheet(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], layers: Layers | None = None) -> Sheet:
    """Read the keys. `layers` are those of the pack's base, where one is at hand; else those of the true model that it names, or fits."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    strays = []
    for key, tensor in tensors.items():
        module, layout, leaf = parted(key)
        if leaf:
            found.setdefault((module, layout), {})[leaf] = tensor
        else:
            strays.append(key)
    loose = [Module(name, layout, leaves) for (name, layout), leaves in found.items()]
    said = metadata.get("ss_base_model_version", "")
    version = next((name for name in OUTLINES if said.startswith(name)), "") if said else _fitting(loose)
    known = layers if layers is not None else outline.layers(OUTLINES[version or _fitting(loose)])
    spelling = {name: (layer, spelt, flat) for name, layer, spelt, flat in spellings(known)}
    named = [Module(one.name, one.layout, one.leaves, *spelling.get(one.name, ("", "", False))) for one in loose]
    return Sheet(named, strays, metadata, version, known)


def parted(key: str) -> tuple[str, str, str]:
    """A key's module, layout and leaf; the leaf is empty where it is none of any layout."""
    if old := PROCESSOR.fullmatch(key):
        return f"{old[1]}.{old[2]}{'.0' if old[2] == 'to_out' else ''}", "processor", RENAMED[old[3]]
    if key.startswith(("lora_unet_", "lora_te", "lycoris_", "oft_unet_")):
        module, _, leaf = key.partition(".")
        return module, "lycoris" if key.startswith("lycoris_") else "kohya", leaf
    if dotted := DOTTED.fullmatch(key):
        return dotted[1], "peft" if dotted[2] else "dotted", RENAMED[dotted[2] or dotted[3]]
    module, dot, leaf = key.rpartition(".")
    return (module, "peft", leaf) if dot and leaf == "alpha" else (key, "", "")


def spellings(layers: Layers) -> Iterator[tuple[str, str, str, bool]]:
    """Every name by which some program calls a layer: (module name, layer, spelling, whether it lacks `text_model`)."""
    for layer in layers:
        part, _, rest = layer.partition(".")
        flat = rest.replace(".", "_")
        if part == "unet":
            yield layer, layer, "diffusers", False
            yield from ((f"{prefix}_{flat}", layer, "diffusers", False) for prefix in ("lora_unet", "lycoris", "oft_unet"))
            yield f"lora_unet_{outline.original(layer, layers).replace('.', '_')}", layer, "original", False
            continue
        prefixes = ("te2",) if part.endswith("_2") else ("te", "te1")
        for short, dotted in ((False, rest), (True, rest.removeprefix("text_model."))):
            yield f"{part}.{dotted}", layer, prefixes[0], short and dotted != rest
            yield from ((f"lora_{te}_{dotted.replace('.', '_')}", layer, te, short and dotted != rest) for te in prefixes)


def _fitting(modules: list[Module]) -> str:
    """The true model whose text states are as wide as what the pack reads of them, else that has the most of its names."""
    widths = {m.leaves[DOWN].shape[1] for m in modules if CONTEXT.search(m.name) and DOWN in m.leaves and m.leaves[DOWN].ndim > 1}
    for version, one in OUTLINES.items():
        if widths == {one.context}:
            return version
    names = {module.name for module in modules}
    return max(OUTLINES, key=lambda version: len(names & {name for name, *_ in spellings(outline.layers(OUTLINES[version]))}))
