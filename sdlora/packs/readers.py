"""What becomes of a pack in the programs that read packs: one model of each, written from how its released code behaves.

The models are of diffusers 0.42 with transformers 5.6 or newer, AUTOMATIC1111 1.10, Forge (2025-06), ComfyUI 0.3.57, InvokeAI (2026-08)
and kohya's sd-scripts (2026-02). The tests hold that of diffusers to its real code, the others to behaviour that was found by running
theirs. A model says of every module by which factor on its trained change it acts there, and whether the program says so.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sdlora.packs.outline import OUTLINES, Layers
from sdlora.packs.sheet import DOWN, Module, Sheet, sheet

Verdict = Literal["opens", "partly", "not", "not applicable"]


@dataclass(frozen=True)
class Fate:
    """What becomes of one module."""

    factor: float = 1.0  # of the change that was trained; 0: none of it is applied; nan: another change
    why: str = ""
    said: bool = True  # whether the program says so
    fix: str = ""


@dataclass(frozen=True)
class Reading:
    """What becomes of a pack in one program."""

    reader: str
    verdict: Verdict
    matched: int  # modules that are applied
    modules: int
    scale: tuple[float, float] | None  # least and greatest factor on up @ down that is applied
    reason: str
    misread: str = ""  # what it does otherwise than was trained without saying so
    fix: str = ""


@dataclass(frozen=True)
class Reader:
    """A program that reads packs."""

    name: str
    reads: Callable[[Sheet], list[Fate] | str]
    """The fate of each module, or why the whole pack is refused."""
    any_base: bool = False


WHOLE = Fate()
FOLD = "multiply alpha / rank into the up factors and give all modules of a component one rank and an equal alpha"
KOHYA_NAMES = "write it in kohya layout, with diffusers' block names for one text encoder, and the original ones for two"


def check(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], layers: Layers | None = None) -> list[Reading]:
    """What each program makes of a pack; `layers` are those of its base, where that is at hand."""
    pack = sheet(tensors, metadata, layers)
    return [_reading(reader, pack) for reader in READERS]


def misread(readings: Sequence[Reading]) -> list[str]:
    """What programs would do otherwise than was trained, and not say; a line each."""
    return [f"{one.reader}: {one.misread}" for one in readings if one.misread]


def _reading(reader: Reader, pack: Sheet) -> Reading:
    if not pack.version and not reader.any_base:
        return Reading(reader.name, "not applicable", 0, len(pack.modules), None, "it runs no base of this size")
    fates = reader.reads(pack)
    if isinstance(fates, str) or not fates:
        return Reading(reader.name, "not", 0, len(pack.modules), None, str(fates) if fates else "the pack holds no module")
    pairs = list(zip(pack.modules, fates, strict=True))
    applied = [(module, fate) for module, fate in pairs if fate.factor]
    reasons = Counter(fate.why for _, fate in pairs if fate.why)
    reason = "; ".join(f"{count} modules: {why}" for why, count in reasons.most_common())
    if not applied:
        return Reading(reader.name, "not", 0, len(pairs), None, reason)
    silent = Counter((fate.why, fate.fix) for module, fate in pairs if module.layer and fate.factor != 1 and not fate.said)
    scales = [module.scale * fate.factor for module, fate in applied if not math.isnan(fate.factor)]
    whole = all(fate.factor == 1 for _, fate in pairs)
    return Reading(
        reader.name,
        "opens" if whole else "partly",
        len(applied),
        len(pairs),
        (min(scales), max(scales)) if scales else None,
        reason,
        "; ".join(f"{count} modules: {why}" for (why, _), count in silent.most_common()),
        "; ".join(dict.fromkeys(fix for _, fix in silent if fix)),
    )


# ---------------------------------------------------------------- diffusers


def _diffusers(pack: Sheet) -> list[Fate] | str:
    """A file of kohya's four prefixes is renamed, any other passes as it is; PEFT then holds one alpha for each component."""
    kohya = pack.layouts == {"kohya"} and not pack.strays and all(m.name.startswith(("lora_unet_", "lora_te")) for m in pack.modules)
    if not kohya:
        return _diffusers_dotted(pack)
    wrong = _diffusers_refuses(pack)
    if wrong:
        return wrong
    named = [_known_to_diffusers(module, pack) for module in pack.modules]
    mixed = {"original", "diffusers"} <= {module.spelt for module in pack.modules if module.part == "unet" and not _outside(module)}
    for part in {_component(module) for module in pack.modules}:
        found = [bool(module.layer) and good for module, good in zip(pack.modules, named, strict=True) if _component(module) == part]
        if not any(found):
            return f"refused: it finds none of the {part} layers under their names here"
    common = _commonest_alphas(pack)
    fates = []
    for module, good in zip(pack.modules, named, strict=True):
        if mixed and pack.two_encoders and module.spelt == "original":
            fates.append(Fate(0, "left out, as the file mixes two ways of naming blocks", said=False, fix=KOHYA_NAMES))
        elif not module.layer or not good:
            fates.append(Fate(0, "no layer is called so here; a warning says it"))
        elif module.kind == "dora":
            fates.append(Fate(math.nan, "the magnitudes are left out with a warning, and a plain LoRA is applied"))
        else:
            factor = _peft_alpha(module, common) / (module.alpha if module.alpha is not None else module.rank or 1)
            why = f"acts at {factor:.3g} times its strength, as its alpha is another than most of its component's"
            fates.append(WHOLE if math.isclose(factor, 1) else Fate(factor, why, said=False, fix=FOLD))
    return fates


def _known_to_diffusers(module: Module, pack: Sheet) -> bool:
    """Whether its renaming finds the layer."""
    if module.spelt == "original":
        return pack.two_encoders or _outside(module)
    return not module.layer.startswith("unet.add_embedding.") and not (module.flat and module.spelt == "te2")


def _diffusers_refuses(pack: Sheet) -> str:
    """Why it raises an error over a file in kohya layout."""
    others = sorted({module.kind or "unknown" for module in pack.modules} - {"lora", "dora"})
    if others:
        return f"refused: it reads no leaves but LoRA's, and there are some of the kind {others[0]}"
    if not all(module.whole and DOWN in module.leaves for module in pack.modules):
        return "refused: a module lacks one of its factors"
    if any(module.leaves[DOWN].ndim != pack.layers[module.layer] for module in pack.known):
        return "refused: a factor has another number of axes than its layer's weight"
    if "lora_adapter_metadata" in pack.metadata and any(module.alpha is not None for module in pack.modules):
        return "refused: alphas are in the tensors and in lora_adapter_metadata"
    zero = next((module.name for module in pack.modules if module.alpha == 0), "")
    return f"not judged: the alpha of {zero} is 0" if zero else ""


def _diffusers_dotted(pack: Sheet) -> list[Fate] | str:
    """Layouts of diffusers' own: there is no alpha but that of the header."""
    if any("lora" not in key for key in pack.strays) or any("alpha" in module.leaves for module in pack.modules):
        return "refused: it holds tensors that are no LoRA's"
    if pack.layouts <= {"kohya", "lycoris"}:
        return "nothing is applied: some names are not those of kohya's layout"
    fates = []
    for module in pack.modules:
        if not module.layer or module.layout in ("kohya", "lycoris"):
            fates.append(Fate(0, "no layer is called so here; a warning says it"))
        elif module.kind == "dora" and module.part != "unet":
            fix = "adapt the UNet alone, or train a LoRA"
            fates.append(Fate(math.nan, "the magnitudes of text encoders are left as they start", said=False, fix=fix))
        else:
            fates.append(WHOLE)
    return fates


def _commonest_alphas(pack: Sheet) -> dict[str, float]:
    """Of each component that has alphas."""
    found: dict[str, Counter[float]] = {}
    for module in pack.modules:
        if module.alpha is not None:
            found.setdefault(_component(module), Counter())[module.alpha] += 1
    return {part: alphas.most_common(1)[0][0] for part, alphas in found.items()}


def _peft_alpha(module: Module, common: Mapping[str, float]) -> float:
    """The alpha it gives a module: the commonest of the component, or the module's own where the list of exceptions reaches it."""
    if module.part == "unet":
        reached = not re.search(r"\.to_(q|k|v|out\.0)$", module.layer)
    else:  # of the encoders only the second keeps `text_model` in its names, by which the exceptions are looked up
        reached = module.part.endswith("_2") and ".mlp." in module.layer
    own = module.alpha if reached else None
    return common.get(_component(module), float(module.rank or 1)) if own is None else own


# ---------------------------------------------------------------- programs that look modules up in a table of names


def _a1111(pack: Sheet) -> list[Fate] | str:
    """Names are rewritten by patterns; what fits nothing goes to a log that is off by default."""
    if not all(module.whole for module in pack.modules):
        return "refused: a module lacks one of its factors"
    attention = Counter(_block(m) for m in pack.known if m.part == "text_encoder_2" and ".self_attn." in m.layer)
    fates = []
    for module in pack.modules:
        unseen = module.layout != "kohya" or not module.layer or module.flat
        unseen |= pack.two_encoders and (module.spelt == "te" or _odd_in_a1111(module) or module.layer.endswith("text_projection"))
        if unseen or not module.kind:
            fates.append(Fate(0, "its name means nothing there", said=False, fix=KOHYA_NAMES))
        elif module.part == "text_encoder_2" and ".self_attn." in module.layer and attention[_block(module)] < 4:
            fix = "adapt all of q, k, v and out in a layer of the second text encoder, or none"
            fates.append(Fate(0, "queries, keys, values and outputs are one there, and not all are in the pack", said=False, fix=fix))
        else:
            fates.append(_output_dora(module) or WHOLE)
    return fates


def _forge(pack: Sheet) -> list[Fate] | str:
    kinds = {"lora", "tucker", "dora", "loha", "lokr", "full", "norm", "glora"}
    seen = [_in_table(module, kinds) for module in pack.modules]
    lost = sum(len(module.leaves) for module, good in zip(pack.modules, seen, strict=True) if not good) + len(pack.strays)
    if lost > 12:
        return f"refused: {lost} of its tensors fit nothing there, more than 12"
    return [_tabled(module, good) for module, good in zip(pack.modules, seen, strict=True)]


def _comfy(pack: Sheet) -> list[Fate] | str:
    kinds = {"lora", "tucker", "dora", "loha", "lokr", "full", "norm", "glora", "oft"}
    return [_tabled(module, _in_table(module, kinds)) for module in pack.modules]


def _in_table(module: Module, kinds: set[str]) -> bool:
    """Whether a table of kohya's, LyCORIS's and old diffusers' names has it: no dotted name of attention, no name without `text_model`."""
    dotted = module.layout in ("peft", "dotted") and re.search(r"\.attn[12]\.to_|\.self_attn\.", module.layer) and module.part == "unet"
    return bool(module.layer) and module.kind in kinds and module.whole and not dotted and not module.flat


def _tabled(module: Module, good: bool) -> Fate:
    return (_output_dora(module) or WHOLE) if good else Fate(0, "not loaded, which a message says")


# ---------------------------------------------------------------- InvokeAI, kohya's scripts


def _invoke(pack: Sheet) -> list[Fate] | str:
    """The base is told by the tensors' shapes, the file must be of kohya's layout throughout."""
    strays = [key for key in pack.strays if not key.startswith("bundle_emb")]
    spelt = {module.spelt for module in pack.modules if module.part == "unet" and not _outside(module)}
    if strays or pack.layouts != {"kohya"}:
        return "refused: not all of it is in kohya's layout"
    if pack.two_encoders and (any(module.spelt == "te" for module in pack.modules) or len(spelt) > 1):
        return "refused: prefixes or block names are not all of one kind"
    if not all(module.whole for module in pack.modules):
        return "refused: a module lacks one of its factors"
    taken = _told_by_shapes(pack)
    if taken != OUTLINES[pack.version].context:
        return "refused: its shapes tell no base" if not taken else "its shapes are taken for those of another base"
    fates = []
    for module in pack.modules:
        if module.kind in ("", "oft", "glora"):
            return f"refused: it has no kind of adapter with {min(module.leaves)}"
        if not pack.two_encoders and module.spelt == "te1":
            fates.append(Fate(0, "the prefix lora_te1_ means nothing there", said=False, fix="write lora_te_ for a single text encoder"))
        elif not module.layer or module.flat or (module.spelt == "original" and not pack.two_encoders):
            fates.append(Fate(0, "no layer is called so there, which a warning says"))
        else:
            fates.append(_output_dora(module) or WHOLE)
    return fates


def _told_by_shapes(pack: Sheet) -> int:
    """Width of the text states by which it knows the base; 0: it tells none."""
    widths = {
        module.leaves[leaf].shape[1]
        for module in pack.modules
        for leaf in (DOWN, "hada_w1_b", "diff")
        if leaf in module.leaves and module.leaves[leaf].ndim > 1 and re.search(r"attn2_to_[kv]$", module.name)
    }
    encoders = {
        (module.spelt, module.leaves[DOWN].shape[1])
        for module in pack.modules
        if DOWN in module.leaves and ".self_attn." in module.layer and module.spelt != "te1"
    }
    if widths:
        return max(widths)
    if any(spelt == "te2" for spelt, _ in encoders):
        return 2048
    if encoders:
        return max(width for _, width in encoders)
    if any(
        module.layer.endswith("time_emb_proj") and DOWN in module.leaves and module.leaves[DOWN].shape[-1] == 1280 for module in pack.known
    ):
        return 2048
    lokr = any(module.kind in ("lokr", "ia3") for module in pack.modules)
    return OUTLINES[pack.version].context if lokr else 0


def _kohya(pack: Sheet) -> list[Fate] | str:
    """Modules of its own network are looked up by their exact names; the rest is passed over."""
    spelt = {module.spelt for module in pack.modules if module.part == "unet" and not _outside(module)}
    if pack.two_encoders and len(spelt) > 1:
        return "refused: it breaks on two ways of naming blocks"
    if any(module.kind not in ("lora", "") for module in pack.modules):
        kind = next(module.kind for module in pack.modules if module.kind not in ("lora", ""))
        return f"its own network module reads LoRA, and this is {kind}"
    if not all(module.whole for module in pack.modules) or any(
        module.layout == "kohya" and module.leaves[DOWN].ndim != pack.layers[module.layer] for module in pack.known if DOWN in module.leaves
    ):
        return "refused: a factor is missing, or has another number of axes than its layer's weight"
    fates = []
    for module in pack.modules:
        wrong_te = module.spelt == ("te" if pack.two_encoders else "te1")
        strange = module.layout != "kohya" or not module.layer or wrong_te or module.flat or module.layer.endswith("text_projection")
        if strange or (module.spelt == "original" and not pack.two_encoders):
            fates.append(Fate(0, "its name means nothing there", said=False, fix=KOHYA_NAMES))
        elif module.alpha == 0:
            fates.append(Fate(math.nan, "an alpha of 0 is read as the rank", said=False, fix="leave out what has no effect"))
        else:
            fates.append(WHOLE)
    return fates


# ---------------------------------------------------------------- what several share


def _component(module: Module) -> str:
    """UNet or text encoder, by its prefix where the layer is unknown."""
    if module.part:
        return module.part
    start = re.match(r"lora_(unet|te2|te)", module.name)
    return {"unet": "unet", "te2": "text_encoder_2", "te": "text_encoder"}[start[1]] if start else ""


def _outside(module: Module) -> bool:
    """Whether it is a layer before, after or beside the UNet's blocks, whose names are understood in both ways."""
    return module.part == "unet" and "block" not in module.layer


def _block(module: Module) -> str:
    return module.layer.partition(".self_attn.")[0]


def _odd_in_a1111(module: Module) -> bool:
    """With diffusers' block names it does not find an XL model's first upsampler, nor the embedding of sizes."""
    odd = module.layer == "unet.up_blocks.0.upsamplers.0.conv" or module.layer.startswith("unet.add_embedding.")
    return module.spelt == "diffusers" and odd


def _output_dora(module: Module) -> Fate | None:
    """With magnitudes for each output these programs divide by another norm than that of the changed weight."""
    magnitude = module.leaves.get("dora_scale")
    if magnitude is None or (magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] == module.leaves[DOWN].shape[1]):
        return None
    fix = 'train with adapter.axis = "in", which all programs that know DoRA apply as it was trained'
    return Fate(math.nan, "magnitudes along the outputs are divided by another norm", said=False, fix=fix)


READERS = (
    Reader("diffusers", _diffusers, any_base=True),
    Reader("AUTOMATIC1111", _a1111),
    Reader("Forge", _forge),
    Reader("ComfyUI", _comfy),
    Reader("InvokeAI", _invoke),
    Reader("kohya", _kohya),
)
