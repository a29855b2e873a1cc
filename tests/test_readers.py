"""What other programs make of a pack: the model of diffusers is held to its code, those of the others to what was seen of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bases
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from sdlora.packs import outline, readers, sheet
from sdlora.packs.outline import OUTLINES
from sdlora.packs.readers import Reading
from sdlora.packs.sheet import DOWN, UP

Tensors = dict[str, Tensor]
PREFIXES = {"sd1": {"text_encoder": "lora_te"}, "sdxl": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}}
RANK, ALPHA = 2, 1.0
SOME = ("attn2.to_q", "attn1.to_out.0", "proj_in", "ff.net.2", "resnets.0.conv1", "time_emb_proj", "samplers.0.conv", "self_attn.", "mlp.")
OUTSIDE = ("unet.conv_", "unet.time_embedding", "unet.add_embedding")


@dataclass
class Pipe:
    """A pipeline of diffusers, and the shapes of the layers that packs may name."""

    family: str
    pipeline: Any
    shapes: dict[str, torch.Size]  # by full name, with `text_model` in those of text encoders

    def model(self, part: str) -> nn.Module:
        module: nn.Module = getattr(self.pipeline, part)
        return module


def shapes_of(parts: dict[str, nn.Module]) -> dict[str, torch.Size]:
    found = {}
    for part, model in parts.items():
        for name, layer in model.named_modules():
            full = name if part == "unet" or name.startswith("text_") else f"text_model.{name}"
            if isinstance(layer, nn.Linear | nn.Conv2d):
                found[f"{part}.{full}"] = layer.weight.shape
    return found


@pytest.fixture(scope="module")
def pipes(families: dict[str, Path]) -> dict[str, Pipe]:
    found = {}
    for name, kind in (("sd1", StableDiffusionPipeline), ("sdxl", StableDiffusionXLPipeline)):
        pipeline = kind.from_pretrained(families[name], dtype=torch.float32, use_safetensors=True)
        parts = ["unet", *PREFIXES[name]]
        found[name] = Pipe(name, pipeline, shapes_of({part: getattr(pipeline, part) for part in parts}))
    return found


# ---------------------------------------------------------------- packs that are made for this


def kohya(layer: str, family: str, original: bool | None = None, te: str = "", text_model: bool = True) -> str:
    """A layer's module name as kohya writes it, or in one of the ways in which it should not be written."""
    part, _, rest = layer.partition(".")
    if part == "unet":
        levels = {"sd1": {1, 2, 3}, "sdxl": {0, 1}}[family]
        swap = family == "sdxl" if original is None else original
        name = bases.unet_name(f"{rest}.weight", levels).removesuffix(".weight") if swap else rest
        return f"lora_unet_{name.replace('.', '_')}"
    rest = rest if text_model else rest.removeprefix("text_model.")
    return f"{(te if part == 'text_encoder' else '') or PREFIXES[family][part]}_{rest.replace('.', '_')}"


def lora(shape: torch.Size, rank: int = RANK, alpha: float | None = ALPHA, seed: int = 0) -> Tensors:
    dice = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=dice)
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=dice)
    return {DOWN: down, UP: up, **({} if alpha is None else {"alpha": torch.tensor(alpha)})}


def plain(pipe: Pipe, chosen: tuple[str, ...] = SOME, **how: Any) -> Tensors:
    """A LoRA in kohya layout."""
    found = {}
    for seed, (layer, shape) in enumerate(pipe.shapes.items()):
        if any(word in layer for word in chosen):
            module = kohya(layer, pipe.family, **how)
            found |= {f"{module}.{leaf}": tensor for leaf, tensor in lora(shape, seed=seed).items()}
    return found


def without_alpha(tensors: Tensors, word: str = "") -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if not (key.endswith(".alpha") and word in key)}


def other_alpha(tensors: Tensors, word: str) -> Tensors:
    return {key: tensor / 2 if key.endswith(".alpha") and word in key else tensor for key, tensor in tensors.items()}


def wider(tensors: Tensors, word: str, alpha: bool) -> Tensors:
    """Some modules with twice the rank; alpha stays rank wherever there is one."""
    found = dict(tensors)
    for key in tensors:
        if key.endswith(DOWN) and word in key:
            up = key.replace(DOWN, UP)
            found[key], found[up] = torch.cat([tensors[key]] * 2), torch.cat([tensors[up]] * 2, 1)
    for key in list(found):
        if key.endswith(".alpha"):
            found[key] = torch.tensor(float(len(found[key.replace("alpha", DOWN)])))
    return found if alpha else without_alpha(found)


def dora(pipe: Pipe, axis: int) -> Tensors:
    found = plain(pipe)
    for key, tensor in list(found.items()):
        if key.endswith(DOWN):
            up = found[key.replace(DOWN, UP)]
            ones = [1] * (tensor.ndim - 2)
            found[key.replace(DOWN, "dora_scale")] = torch.ones((1, tensor.shape[1], *ones) if axis else (len(up), 1, *ones))
    return found


def loha(pipe: Pipe) -> Tensors:
    found = {}
    for layer, shape in pipe.shapes.items():
        if "attn2.to_k" in layer:
            sides = {"hada_w1_a": (shape[0], 2), "hada_w1_b": (2, shape[1]), "hada_w2_a": (shape[0], 2), "hada_w2_b": (2, shape[1])}
            tensors = {leaf: torch.ones(side) for leaf, side in sides.items()} | {"alpha": torch.tensor(1.0)}
            found |= {f"{kohya(layer, pipe.family)}.{leaf}": tensor for leaf, tensor in tensors.items()}
    return found


def dotted(pipe: Pipe, down: str, up: str, text: tuple[str, str] = ("", ""), magnitude: bool = False) -> Tensors:
    """Layouts of diffusers' own."""
    found = {}
    for seed, (layer, shape) in enumerate(pipe.shapes.items()):
        if any(word in layer for word in ("attn2.to_", "attn1.to_", "self_attn.")):
            first, second = (down, up) if layer.startswith("unet") or not text[0] else text
            tensors = lora(shape, alpha=None, seed=seed)
            if "processor" in first:
                start, _, last = layer.removesuffix(".0").rpartition(".")
                found |= {f"{start}.processor.{last}_lora.{leaf}.weight": tensors[own] for leaf, own in (("down", DOWN), ("up", UP))}
                continue
            found |= {f"{layer}.{first}.weight": tensors[DOWN], f"{layer}.{second}.weight": tensors[UP]}
            found |= {f"{layer}.lora_magnitude_vector": torch.ones(shape[0])} if magnitude else {}
    return found


def flattened(tensors: Tensors) -> Tensors:
    """Convolutions of one pixel stored as if they were linear."""
    return {key: tensor.flatten(1) if tensor.ndim == 4 and "proj_in" in key else tensor for key, tensor in tensors.items()}


OLD = ("lora_linear_layer.down", "lora_linear_layer.up")
UNKNOWN = {f"lora_unet_nowhere_at_all.{leaf}": tensor for leaf, tensor in lora(torch.Size((8, 8))).items()}
Made = Callable[[Pipe], Tensors]
PACKS: dict[str, Made] = {
    "ours": plain,
    "outside the blocks": lambda pipe: plain(pipe, (*SOME, *OUTSIDE)),
    "UNet alone": lambda pipe: plain(pipe, ("attn2.to_k", "attn2.to_v")),
    "text alone": lambda pipe: plain(pipe, ("self_attn.",)),
    "LoHa": loha,
    "DoRA, inputs": lambda pipe: dora(pipe, 1),
    "DoRA, outputs": lambda pipe: dora(pipe, 0),
    "no alpha": lambda pipe: without_alpha(plain(pipe)),
    "no alpha in attention": lambda pipe: without_alpha(plain(pipe), "attn2_to_q"),
    "other alpha in attention": lambda pipe: other_alpha(plain(pipe), "attn2_to_q"),
    "other alpha in convolutions": lambda pipe: other_alpha(plain(pipe), "proj_in"),
    "other alpha in text attention": lambda pipe: other_alpha(plain(pipe), "layers_0_self_attn_q"),
    "other alpha in text layers": lambda pipe: other_alpha(plain(pipe), "layers_0_mlp_fc1"),
    "other ranks, alpha the rank": lambda pipe: wider(plain(pipe), "attn2_to_q", alpha=True),
    "other ranks, no alpha": lambda pipe: wider(plain(pipe), "attn2_to_q", alpha=False),
    "unknown module": lambda pipe: plain(pipe) | UNKNOWN,
    "stray tensor": lambda pipe: plain(pipe) | {"bundle_emb.x": torch.ones(1)},
    "original names": lambda pipe: plain(pipe, original=True),
    "original names, outside too": lambda pipe: plain(pipe, (*SOME, *OUTSIDE), original=True),
    "diffusers names": lambda pipe: plain(pipe, (*SOME, *OUTSIDE), original=False),
    "mixed names": lambda pipe: plain(pipe, ("attn2.to_q",), original=True) | plain(pipe, ("attn1.to_q",), original=False),
    "lora_te1": lambda pipe: plain(pipe, te="lora_te1"),
    "lora_te": lambda pipe: plain(pipe, te="lora_te"),
    "without text_model": lambda pipe: plain(pipe, text_model=False),
    "PEFT": lambda pipe: dotted(pipe, "lora_A", "lora_B"),
    "PEFT DoRA": lambda pipe: dotted(pipe, "lora_A", "lora_B", magnitude=True),
    "PEFT with alpha": lambda pipe: dotted(pipe, "lora_A", "lora_B") | {"unet.conv_in.alpha": torch.tensor(1.0)},
    "lora.down": lambda pipe: dotted(pipe, "lora.down", "lora.up", OLD),
    "processors": lambda pipe: dotted(pipe, "processor", "", OLD),
    "convolution with two axes": lambda pipe: flattened(plain(pipe)),
    "half a module": lambda pipe: {key: tensor for i, (key, tensor) in enumerate(plain(pipe).items()) if i != 1},
}


# ---------------------------------------------------------------- diffusers itself


def trained(pack: sheet.Sheet) -> dict[str, Tensor]:
    """The change of each layer that the pack means, by its full name."""
    return {m.layer: (m.leaves[UP].flatten(1) @ m.leaves[DOWN].flatten(1)) * m.scale for m in pack.known if {UP, DOWN} <= set(m.leaves)}


def applied(pipe: Pipe) -> Iterator[tuple[str, Tensor]]:
    """The change of each layer that diffusers applies."""
    for part in ("unet", *PREFIXES[pipe.family]):
        for name, layer in pipe.model(part).named_modules():
            if isinstance(layer, BaseTunerLayer):
                full = name if part == "unet" or name.startswith("text_") else f"text_model.{name}"
                yield f"{part}.{full}", layer.get_delta_weight(layer.active_adapters[0]).detach().flatten(1)  # type: ignore[operator]


def real_factors(pipe: Pipe, path: Path, pack: sheet.Sheet) -> dict[str, float] | None:
    """By which factor diffusers applies each layer of a pack; None if it does not open it."""
    wanted = trained(pack)
    try:
        try:
            pipe.pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
        except (ValueError, KeyError, RuntimeError, IndexError):
            return None
        found = {}
        for layer, change in applied(pipe):
            found[layer] = float((change * wanted[layer]).sum() / wanted[layer].square().sum())
            assert torch.allclose(change, found[layer] * wanted[layer], atol=1e-4, rtol=1e-4), layer
        return found
    finally:
        pipe.pipeline.unload_lora_weights()


ON_XL = ("original names", "diffusers names", "without text_model", "other alpha in text layers")
"""Packs that fare otherwise with two text encoders; the rest is slow to try again."""


@pytest.mark.parametrize(
    ("family", "name"),
    [("sd1", name) for name in PACKS] + [pytest.param("sdxl", name, marks=() if name in ON_XL else pytest.mark.slow) for name in PACKS],
)
def test_the_model_of_diffusers_does_as_diffusers_does(name: str, family: str, pipes: dict[str, Pipe], tmp_path: Path) -> None:
    pipe = pipes[family]
    tensors = {key: tensor.contiguous() for key, tensor in PACKS[name](pipe).items()}
    save_file(tensors, tmp_path / "made.safetensors")
    pack = sheet.sheet(tensors, {}, {layer: len(shape) for layer, shape in pipe.shapes.items()})
    real = real_factors(pipe, tmp_path / "made.safetensors", pack)
    ours = readers.READERS[0].reads(pack)
    if real is None or not any(real.values()):
        assert isinstance(ours, str) or not any(fate.factor for fate in ours), "the model opens what diffusers does not"
        return
    assert not isinstance(ours, str), f"diffusers opens it, and the model says {ours}"
    said = {module.layer: fate for module, fate in zip(pack.modules, ours, strict=True) if fate.factor}
    assert said.keys() == real.keys()
    for layer, fate in said.items():
        if fate.factor == fate.factor:
            assert fate.factor == pytest.approx(real[layer], rel=1e-3), layer
        else:
            assert "magnitude" in fate.why


# ---------------------------------------------------------------- the others, by what was seen of them


def true_pipe(version: str) -> Pipe:
    """The names of a true model, with the widths by which programs tell it, and elsewhere narrow layers."""
    one = OUTLINES[version]
    widths = {"attn2.to_k": one.context, "attn2.to_v": one.context, "text_encoder.": 768, "text_encoder_2.": 1280}
    shapes = {}
    for layer, axes in outline.layers(one).items():
        width = next((width for word, width in widths.items() if word in layer), 1280 if layer.endswith("time_emb_proj") else 8)
        kernel = 3 if axes == 4 and ".proj_" not in layer else 1
        shapes[layer] = torch.Size((8, width, *[kernel] * (axes - 2)))
    return Pipe("sdxl" if len(one.encoders) > 1 else "sd1", None, shapes)


TRUE = {"sd1": "sd_v1", "sdxl": "sdxl_base_v1-0"}
ALL = ("unet.down", "unet.mid", "unet.up", "text_encoder.text_model", "text_encoder_2.text_model")
PROGRAMS = ("diffusers", "AUTOMATIC1111", "Forge", "ComfyUI", "InvokeAI", "kohya")


@pytest.fixture(scope="module")
def true_pipes() -> dict[str, Pipe]:
    return {"sd1": true_pipe("sd_v1"), "sdxl": true_pipe("sdxl_base")}


def judged(tensors: Tensors, version: str, **header: str) -> dict[str, Reading]:
    return {one.reader: one for one in readers.check(tensors, {"ss_base_model_version": version, **header})}


def word(one: Reading) -> str:
    """opens, partly or not; with ! where it is otherwise than was trained and the program does not say so."""
    return one.verdict + ("!" if one.misread else "")


Y, P, N, S = "opens", "partly", "not", "partly!"
SEEN: dict[tuple[str, str], tuple[Made, list[str]]] = {  # in the order of PROGRAMS
    ("sd1", "ours"): (lambda pipe: plain(pipe, ALL), [Y, Y, Y, Y, Y, Y]),
    ("sd1", "original names, attention"): (lambda pipe: plain(pipe, ("attn2",), original=True), [N, Y, Y, Y, N, N]),
    ("sd1", "original names, all"): (lambda pipe: plain(pipe, (*ALL, *OUTSIDE), original=True), [P, Y, Y, Y, P, S]),
    ("sd1", "lora_te1"): (lambda pipe: plain(pipe, ALL, te="lora_te1"), [Y, Y, Y, Y, S, S]),
    ("sdxl", "ours"): (lambda pipe: plain(pipe, ALL), [Y, Y, Y, Y, Y, Y]),
    ("sdxl", "diffusers names"): (lambda pipe: plain(pipe, (*ALL, *OUTSIDE), original=False), [P, S, Y, Y, Y, Y]),
    ("sdxl", "lora_te"): (lambda pipe: plain(pipe, ALL, te="lora_te"), [Y, S, Y, Y, N, S]),
    ("sdxl", "mixed"): (lambda pipe: plain(pipe, ("attn1",), original=True) | plain(pipe, ("attn2",), original=False), [S, Y, Y, Y, N, N]),
    ("sd1", "PEFT"): (lambda pipe: dotted(pipe, "lora_A", "lora_B"), [Y, N, N, P, N, N]),
    ("sdxl", "PEFT"): (lambda pipe: dotted(pipe, "lora_A", "lora_B"), [Y, N, N, P, N, N]),
    ("sd1", "processors"): (lambda pipe: dotted(pipe, "processor", "", OLD), [Y, N, Y, Y, N, N]),
    ("sd1", "lora.down"): (lambda pipe: dotted(pipe, "lora.down", "lora.up", OLD), [Y, N, N, P, N, N]),
    ("sd1", "without text_model"): (lambda pipe: plain(pipe, ALL, text_model=False), [Y, S, N, P, P, S]),
    ("sd1", "convolution with two axes"): (lambda pipe: flattened(plain(pipe, ALL)), [N, Y, Y, Y, Y, N]),
    ("sd1", "stray tensor"): (lambda pipe: plain(pipe, ALL) | {"stray.x": torch.ones(1)}, [N, Y, Y, Y, N, Y]),
    ("sd1", "embedded word"): (lambda pipe: plain(pipe, ALL) | {"bundle_emb.x": torch.ones(1)}, [N, Y, Y, Y, Y, Y]),
    ("sd1", "unknown module"): (lambda pipe: plain(pipe, ALL) | UNKNOWN, [P, P, P, P, P, P]),
    ("sd1", "half a module"): (PACKS["half a module"], [N, N, P, P, N, N]),
    ("sd1", "LoHa"): (loha, [N, Y, Y, Y, Y, N]),
    ("sd1", "DoRA, inputs"): (lambda pipe: dora(pipe, 1), [P, Y, Y, Y, Y, N]),
    ("sd1", "DoRA, outputs"): (lambda pipe: dora(pipe, 0), [P, S, S, S, S, N]),
    ("sd1", "other alpha in attention"): (PACKS["other alpha in attention"], [S, Y, Y, Y, Y, Y]),
    ("sd1", "no alpha"): (PACKS["no alpha"], [Y, Y, Y, Y, Y, Y]),
    ("sdxl", "q and v of the second text encoder"): (
        lambda pipe: plain(pipe, ("unet.mid", "text_encoder_2.text_model.encoder.layers.0.self_attn.q")), [Y, S, Y, Y, Y, Y]),
    ("sd1", "self-attention alone"): (lambda pipe: plain(pipe, ("attn1",)), [Y, Y, Y, Y, N, Y]),
    ("sd1", "residual blocks alone"): (lambda pipe: plain(pipe, ("resnets",)), [Y, Y, Y, Y, N, Y]),
}  # fmt: skip


@pytest.mark.parametrize(("family", "name"), SEEN)
def test_every_program_is_judged_as_it_was_seen_to_do(family: str, name: str, true_pipes: dict[str, Pipe]) -> None:
    make, wanted = SEEN[family, name]
    found = judged(make(true_pipes[family]), TRUE[family])
    assert {reader: word(one) for reader, one in found.items()} == dict(zip(PROGRAMS, wanted, strict=True)), found
    assert all(one.reason or one.verdict == "opens" for one in found.values())
    assert all(one.fix for one in found.values() if one.misread)


def test_the_scale_is_the_one_that_each_program_applies(true_pipes: dict[str, Pipe]) -> None:
    found = judged(PACKS["other alpha in attention"](true_pipes["sd1"]), "sd_v1")
    assert found["ComfyUI"].scale == (0.25, 0.5)
    assert found["diffusers"].scale == (0.5, 0.5)
    assert "2 times" in found["diffusers"].misread
    zero = {key: tensor * 0 if key.endswith("alpha") else tensor for key, tensor in plain(true_pipes["sd1"]).items()}
    assert judged(zero, "sd_v1")["Forge"].scale == (0.0, 0.0)
    assert word(judged(zero, "sd_v1")["kohya"]) == "partly!"


def test_a_base_that_a_program_cannot_run_is_no_fault_of_the_pack(true_pipes: dict[str, Pipe]) -> None:
    found = judged(plain(true_pipes["sd1"]), "sdlora_tiny")
    assert [one.verdict for one in found.values()] == ["opens", *["not applicable"] * 5]
    assert readers.misread(list(found.values())) == []


def test_a_pack_that_names_no_base_is_judged_by_the_one_it_fits(true_pipes: dict[str, Pipe]) -> None:
    for family, version in (("sd1", "sd_v1"), ("sdxl", "sdxl_base")):
        assert sheet.sheet(plain(true_pipes[family], ALL), {}).version == version
        assert sheet.sheet(plain(true_pipes[family], ("mlp.", "resnets")), {}).version == version


def test_the_outlines_are_the_true_models() -> None:
    kinds = {"sd_v1": {"sample_size": 64, "cross_attention_dim": 768}, "sd_v2": bases.TRUE_SD2, "sdxl_base": bases.TRUE_SDXL}
    for version, config in kinds.items():
        with torch.device("meta"):
            real = outline.of({f"unet.{name}": layer for name, layer in UNet2DConditionModel(**config).named_modules()})
        ours = outline.layers(OUTLINES[version])
        assert {name: axes for name, axes in ours.items() if name.startswith("unet.")} == real
    counts = {version: sum(not name.startswith("unet.") for name in outline.layers(one)) for version, one in OUTLINES.items()}
    assert counts == {"sd_v1": 72, "sd_v2": 138, "sdxl_base": 72 + 192 + 1}


def test_original_names_are_those_of_the_original(true_pipes: dict[str, Pipe]) -> None:
    for family, levels in (("sd1", {1, 2, 3}), ("sdxl", {0, 1})):
        known = {layer: len(shape) for layer, shape in true_pipes[family].shapes.items()}
        for layer in known:
            if layer.startswith("unet."):
                theirs = bases.unet_name(f"{layer.removeprefix('unet.')}.weight", levels).removesuffix(".weight")
                assert outline.original(layer, known) == theirs
