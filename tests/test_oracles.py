"""Packs in other programs, in numbers: ours do the same in all of them, what is broken is noticed, and our models say what they do."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from oracles import PROGRAMS, Outcome, RefusedError
from test_readers import ALL, OLD, OUTSIDE, SEEN, TRUE, UNKNOWN, Pipe, Tensors, dotted, judged, plain, trained, true_pipe
from torch import nn

from sdlora import family
from sdlora.adapter import Bank
from sdlora.errors import UserError
from sdlora.layers import is_linear
from sdlora.packs import file, readers, reading, sheet, writing
from sdlora.packs.pipelines import Host
from sdlora.packs.sheet import DOWN, UP


@pytest.fixture(scope="module")
def pipes(families: dict[str, Path]) -> dict[str, Pipe]:
    """The shapes of the small bases."""
    parts = {"sd1": ("unet", "text_encoder"), "sdxl": ("unet", "text_encoder", "text_encoder_2")}
    found = {}
    for name in TRUE:
        loaded = family.load(family.find(str(families[name])), torch.device("cpu"), torch.float32)
        layers = {layer: module for layer, module in loaded.layers().items() if is_linear(module) and layer.startswith(parts[name])}
        found[name] = Pipe(name, None, {layer: module.get_parameter("weight").shape for layer, module in layers.items()})
    return found


@pytest.fixture(scope="module")
def true_pipes() -> dict[str, Pipe]:
    return {"sd1": true_pipe("sd_v1"), "sdxl": true_pipe("sdxl_base")}


def outcome(program: str, tensors: Tensors, pipe: Pipe) -> Outcome | None:
    """None: it does not open the file."""
    try:
        found = PROGRAMS[program](tensors, pipe.shapes)
    except RefusedError:
        return None
    return found if found.changes else None


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    size = float(torch.linalg.vector_norm(b))
    return float(torch.linalg.vector_norm(a - b)) / size if size else float(torch.linalg.vector_norm(a))


def verdict(program: str, tensors: Tensors, pipe: Pipe, version: str) -> tuple[str, int, bool]:
    """(opens, partly or not; modules that act; whether something is otherwise than was trained, and not said) by numbers alone."""
    found = outcome(program, tensors, pipe)
    pack = sheet.sheet(tensors, {"ss_base_model_version": version})
    if found is None:
        return "not", 0, False
    wanted = {layer: change.double().reshape(pipe.shapes[layer]) for layer, change in trained(pack).items()}
    right = {layer for layer, change in found.changes.items() if far(change, wanted[layer]) < 1e-5}
    silent = not found.said and any(layer not in right for layer in wanted)
    return "opens" if len(right) == len(pack.modules) else "partly", len(found.changes), silent


FEW = ("down_blocks.1.attentions.0", "mid_block.attentions.0.transformer_blocks.0", "up_blocks.1.attentions.0", "resnets.0.conv1",
       "encoder.layers.0.")  # fmt: skip
"""Enough of a model for what names and alphas do; all of it is in what is seen of the programs, and in what we write."""
LORAS = [key for key in SEEN if key[1] not in ("LoHa", "DoRA, inputs", "DoRA, outputs")]


@pytest.mark.parametrize(("which", "name"), LORAS)
def test_the_oracles_do_what_was_seen_of_the_programs_and_our_models_what_they_do(
    which: str, name: str, true_pipes: dict[str, Pipe]
) -> None:
    make, seen = SEEN[which, name]
    pipe = true_pipes[which]
    tensors = make(pipe)
    models = judged(tensors, TRUE[which])
    for program, wanted in zip(PROGRAMS, seen[1:], strict=True):
        said, matched, silent = verdict(program, tensors, pipe, TRUE[which])
        assert said == wanted.rstrip("!"), program
        assert silent <= (wanted.endswith("!")), program
        assert models[program].verdict == said, program
        assert models[program].matched == matched, program


# ---------------------------------------------------------------- what we write


def unequal(pipe: Pipe) -> Tensors:
    """A LoRA on every layer, of ranks and alphas that differ from layer to layer."""
    found: Tensors = {}
    exact = plain(pipe, (*ALL, *OUTSIDE))
    for i, key in enumerate([key for key in exact if key.endswith(DOWN)]):
        module, times = key.removesuffix(f".{DOWN}"), 1 + i % 3
        found[key] = exact[key].repeat(times, *[1] * (exact[key].ndim - 1)) * torch.linspace(0.5, 1.5, 2 * times).view(
            -1, *[1] * (exact[key].ndim - 1)
        )
        found[f"{module}.{UP}"] = exact[f"{module}.{UP}"].repeat(1, times, *[1] * (exact[f"{module}.{UP}"].ndim - 2))
        found[f"{module}.alpha"] = torch.tensor(float(1 + i % 4))
    return found


@pytest.mark.parametrize("which", ["sd1", "sdxl"])
def test_a_pack_of_ours_is_the_same_change_in_every_program(which: str, true_pipes: dict[str, Pipe]) -> None:
    """As it was trained, to 1e-5, on each layer; layers that are not in it are left alone; and any two programs agree."""
    pipe = true_pipes[which]
    exact = unequal(pipe)
    wanted = trained(sheet.sheet(exact, {"ss_base_model_version": TRUE[which]}))
    written = writing.agreed(exact)
    assert len({float(t) for key, t in written.items() if key.endswith("alpha") and "unet" in key}) == 1, "one alpha for a component"
    found = {program: outcome(program, written, pipe) for program in PROGRAMS}
    for program, one in found.items():
        assert one is not None, program
        assert one.said == [], program
        left = {layer for layer in wanted if layer not in one.changes}
        assert left == ({"text_encoder_2.text_projection"} & left), program
        assert one.changes.keys() <= wanted.keys(), program
        assert max(far(change, wanted[layer]) for layer, change in one.changes.items()) < 1e-5, program
    first = found["ComfyUI"]
    assert first is not None
    apart = max(far(one.changes[layer], first.changes[layer]) for one in found.values() if one for layer in one.changes)
    print(f"{which}: {len(wanted)} layers, any program from any other: {apart:.1e} at most")
    assert apart < 1e-5
    unfolded = outcome("kohya", exact, pipe)
    assert unfolded is not None, "the control: these programs read every layer's own alpha"
    halves = {key: tensor.half() if "alpha" not in key else tensor for key, tensor in written.items()}
    rounded = outcome("ComfyUI", halves, pipe)
    assert rounded is not None
    assert 1e-5 < max(far(change, wanted[layer]) for layer, change in rounded.changes.items()) < 2e-3, "fp16 rounds"


# ---------------------------------------------------------------- what is broken


def first(tensors: Tensors, word: str, leaf: str = DOWN) -> str:
    return next(key for key in tensors if word in key and key.endswith(leaf))


def at(word: str, leaf: str, made: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Pipe], Tensors]:
    """Something done to one tensor."""

    def mutated(pipe: Pipe) -> Tensors:
        tensors = plain(pipe, FEW)
        key = first(tensors, word, leaf)
        return {**tensors, key: made(tensors[key])}

    return mutated


def less(word: str, leaf: str) -> Callable[[Pipe], Tensors]:
    """One tensor left out."""
    return lambda pipe: {k: t for k, t in plain(pipe, FEW).items() if k != first(plain(pipe, FEW), word, leaf)}


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {key.replace(old, new): tensor for key, tensor in tensors.items()}


def swapped(tensors: Tensors) -> Tensors:
    return renamed(renamed(renamed(tensors, "lora_te1_", "lora_x_"), "lora_te2_", "lora_te1_"), "lora_x_", "lora_te2_")


def doubled(tensors: Tensors) -> Tensors:
    """A module of twice the rank, with the alpha of before."""
    key = first(tensors, "attn1_to_q")
    up = key.replace(DOWN, UP)
    return {**tensors, key: torch.cat([tensors[key]] * 2), up: torch.cat([tensors[up]] * 2, 1)}


NAMES: dict[str, Callable[[Pipe], Tensors]] = {  # of names, alphas and axes, with which programs deal in their own ways
    "text_model dropped": lambda pipe: plain(pipe, FEW, text_model=False),
    "the other model's prefix of text": lambda pipe: plain(pipe, FEW, te="lora_te1" if pipe.family == "sd1" else "lora_te"),
    "the other model's block names": lambda pipe: plain(pipe, (*FEW, "upsamplers"), original=pipe.family == "sd1"),
    "two ways of naming": lambda pipe: plain(pipe, ("attn1",), original=True) | plain(pipe, ("attn2",), original=False),
    "part of an attention of te2": lambda pipe: {k: t for k, t in plain(pipe, FEW).items() if "te2" not in k or "self_attn_q" not in k},
    "half an alpha in attention": at("attn1_to_q", "alpha", lambda t: t / 2),
    "half an alpha before attention": at("proj_in", "alpha", lambda t: t / 2),
    "half an alpha in the text": at("self_attn_q", "alpha", lambda t: t / 2),
    "an alpha of 0": at("attn1_to_q", "alpha", lambda t: t * 0),
    "an alpha missing": less("attn1_to_q", "alpha"),
    "twice the rank, the old alpha": lambda pipe: doubled(plain(pipe, FEW)),
    "a linear layer with four axes": at("attn1_to_q", DOWN, lambda t: t[..., None, None]),
    "a stray key": lambda pipe: plain(pipe, FEW) | {"stray.x": torch.ones(1)},
    "an embedded word": lambda pipe: plain(pipe, FEW) | {"bundle_emb.x": torch.ones(1)},
    "an unknown module": lambda pipe: plain(pipe, FEW) | UNKNOWN,
    "a factor missing": less("attn1_to_q", UP),
    "PEFT's names": lambda pipe: dotted(pipe, "lora_A", "lora_B"),
    "processors' names": lambda pipe: dotted(pipe, "processor", "", OLD),
}  # fmt: skip
NUMBERS: dict[str, Callable[[Pipe], Tensors]] = {  # of what a reader meets only when it computes
    "factors exchanged": lambda pipe: renamed(renamed(renamed(plain(pipe, FEW), DOWN, "x"), UP, DOWN), ".x", f".{UP}"),
    "a factor of another width": at("attn1_to_q", DOWN, lambda t: t[:, :-1]),
    "not a number": at("attn1_to_q", DOWN, lambda t: t * math.nan),
    "endless": at("attn1_to_q", DOWN, lambda t: t * math.inf),
    "far too large": at("attn1_to_q", DOWN, lambda t: t * 1e30),
    "nothing in a factor": lambda pipe: {k: t * 0 if k.endswith(UP) else t for k, t in plain(pipe, FEW).items()},
    "whole numbers": at("attn1_to_q", DOWN, lambda t: t.char()),
}  # fmt: skip
ONE_ENCODER = ("two ways of naming", "part of an attention of te2")
"""What is no mutation, or another one, of a model with a single text encoder."""


def cases(some: Iterable[str]) -> list[tuple[str, str]]:
    return [(which, name) for which in TRUE for name in some if which != "sd1" or name not in ONE_ENCODER]


TWO = (*ONE_ENCODER, "text_model dropped", "the other model's prefix of text", "the other model's block names", "half an alpha in the text")
"""What fares otherwise with two text encoders; the rest is slow to try again."""


@pytest.mark.parametrize(("which", "name"), [one if one[0] == "sd1" or one[1] in TWO else pytest.param(*one, marks=pytest.mark.slow)
                                             for one in cases(NAMES)])  # fmt: skip
def test_our_models_say_of_a_mutation_what_the_programs_do_with_it(which: str, name: str, true_pipes: dict[str, Pipe]) -> None:
    pipe = true_pipes[which]
    tensors = NAMES[name](pipe)
    models = judged(tensors, TRUE[which])
    for program in PROGRAMS:
        said, matched, silent = verdict(program, tensors, pipe, TRUE[which])
        assert (models[program].verdict, models[program].matched) == (said, matched), (program, models[program])
        assert silent <= bool(models[program].misread), (program, models[program])
    assert any(one.verdict != "opens" or one.misread or one.scale != (0.5, 0.5) for one in models.values()), "nobody would notice"


@pytest.mark.parametrize("which", TRUE)
def test_every_mutation_is_noticed(which: str, pipes: dict[str, Pipe], families: dict[str, Path], tmp_path: Path) -> None:
    """By our own reader, or by what it says of other programs; the sound pack by neither."""
    pipe = pipes[which]
    loaded = family.load(family.find(str(families[which])), torch.device("cpu"), torch.float32)
    layers = {layer: len(shape) for layer, shape in pipe.shapes.items()}

    def noticed(tensors: Tensors) -> list[str]:
        path = tmp_path / "made.safetensors"
        safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        readings = readers.check(tensors, {"ss_base_model_version": TRUE[which]}, layers)
        found = [one.reader for one in readings if one.verdict != "opens" or one.misread or one.scale != (0.5, 0.5)]
        bank = Bank(loaded.components)
        try:
            file.attach(file.load(path), "made", bank, loaded)
        except UserError as error:
            found.append(error.code)
        finally:
            bank.eject()
        return found

    sound = noticed(plain(pipe, FEW))
    assert [one for one in sound if one != "InvokeAI"] == [], "the control; InvokeAI tells no base by a narrow model's shapes"
    made = {name: noticed(make(pipe)) for name, make in {**NAMES, **NUMBERS}.items() if (which, name) in cases([*NAMES, *NUMBERS])}
    caught = [name for name, found in made.items() if set(found) - set(sound)]
    print(f"{which}: {len(caught)} of {len(made)} mutations noticed")
    assert caught == list(made), {name: found for name, found in made.items() if name not in caught}


def test_swapped_text_encoders_are_noticed_by_their_shapes(true_pipes: dict[str, Pipe]) -> None:
    """The small bases' encoders are of one width; the true ones are not."""
    pipe = true_pipes["sdxl"]
    text = {layer: shape for layer, shape in pipe.shapes.items() if layer.startswith("text_encoder")}
    layers = {layer: nn.Linear(shape[1], shape[0], bias=False, device="meta") for layer, shape in text.items()}

    class Named(Host):
        def layers(self) -> dict[str, nn.Module]:
            return {**layers}

    model: Any = Named({"text_encoder_2": nn.Module()}, Any, Bank({}))  # type: ignore[arg-type]
    sound = plain(pipe, ("encoder.layers.0.",))
    assert reading.fit(sound, {}, model)[1].complete, "the control"
    assert not reading.fit(swapped(sound), {}, model)[1].complete
    for program in PROGRAMS:
        try:
            said = PROGRAMS[program](swapped(sound), pipe.shapes).said
        except (RuntimeError, RefusedError):
            continue
        assert said, f"{program} would swap them, and not say so"


HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "a number in the metadata": lambda head: head.replace(b'"1"', b"1"),
    "a key twice": lambda head: head.replace(b'{"__metadata__"', b'{"__metadata__":{},"__metadata__"'),
    "no JSON": lambda head: head.replace(b"{", b"[", 1),
    "tensors that overlap": lambda head: head.replace(b"[4,8]", b"[0,4]"),
    "a gap": lambda head: head.replace(b"[4,8]", b"[6,10]"),
    "an unknown format": lambda head: head.replace(b'"F32"', b'"X32"', 1),
    "more than there is": lambda head: head.replace(b"[4,8]", b"[4,80]"),
    "a negative side": lambda head: head.replace(b'"shape":[1]', b'"shape":[-1]', 1),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_broken_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    content = safetensors.torch.save({"a.lora_down.weight": torch.ones(1), "b.lora_down.weight": torch.ones(1)}, {"x": "1"})
    size = int.from_bytes(content[:8], "little")
    head, data = content[8 : 8 + size].rstrip(), content[8 + size :]
    for broken in (False, True):
        made = HEADERS[name](head) if broken else head
        assert (made != head) == broken
        path.write_bytes(len(made).to_bytes(8, "little") + made + data)
        if not broken:
            assert len(file.read(path).tensors) == 2, "the control"
    with pytest.raises(UserError, match="E-PACK"):
        file.read(path)
