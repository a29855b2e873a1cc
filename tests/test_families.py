"""Stable Diffusion 2 and XL: recognised, named, trained, packed and drawn as other programs do it."""

import hashlib
from pathlib import Path
from typing import Any

import bases
import pytest
import small
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora import api, family, generate, learners
from sdlora.adapters import lora
from sdlora.data.buckets import Crop, pixels_of
from sdlora.data.looks import look
from sdlora.data.scan import Item
from sdlora.data.variants import Variant, frame
from sdlora.errors import UserError
from sdlora.families.sd2 import SD2
from sdlora.families.sdxl import SDXL
from sdlora.family import whole_frames
from sdlora.layers import choose_sites
from sdlora.packs import file, keys
from sdlora.packs.metadata import CLOCK
from sdlora.studio import Studio

NEW = ("sd2", "sdxl")


@pytest.fixture(scope="module")
def studios(families: dict[str, Path]) -> dict[str, Studio]:
    return {name: Studio.open(family.find(str(families[name])), torch.float32) for name in NEW}


# ---------------------------------------------------------------- what is what


def test_each_base_is_of_its_family(families: dict[str, Path], sd15_base: Path) -> None:
    found = {name: family.find(str(folder)) for name, folder in {**families, "sd1": sd15_base}.items()}
    assert {name: one.family for name, one in found.items()} == {name: name for name in found}
    assert {name: one.prediction for name, one in found.items()} == {"sd1": "epsilon", "sd2": "velocity", "sdxl": "epsilon"}
    assert {name: one.row for name, one in found.items()} == {name: name for name in found}


def test_only_true_models_are_called_so(studios: dict[str, Studio]) -> None:
    for kind, config, version in ((SD2, bases.TRUE_SD2, "sd_v2_v"), (SDXL, bases.TRUE_SDXL, "sdxl_base_v1-0")):
        studio = studios[kind.__name__.lower()]
        assert studio.family.architecture()["ss_base_model_version"] == "sdlora_tiny"
        true_one = kind.__new__(kind)
        true_one.base = studio.family.base
        with torch.device("meta"):
            true_one.unet = UNet2DConditionModel(**config)
        assert true_one.architecture()["ss_base_model_version"] == version


# ---------------------------------------------------------------- names

KOHYA = {  # number and SHA-256 of the sorted module names that kohya's own generator gives for Stable Diffusion XL
    "unet": (788, "6eaed2d7a4528e0a5cd7d54f06410bec8d1c8b707015310af1925b23533a4b69"),
    "text encoders": (264, "5667310192d9768f32791840b635861003a9f981963814cafaf7c0cef3fe6887"),
}
OUTSIDE = ("unet.conv_in", "unet.conv_out", "unet.time_embedding.", "unet.add_embedding.", "text_encoder_2.text_projection")


def summed(names: list[str]) -> tuple[int, str]:
    return len(names), hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


@pytest.fixture(scope="module")
def true_xl() -> dict[str, nn.Module]:
    """Stable Diffusion XL's own components, without memory for their weights."""
    sides = {"max_position_embeddings": 77, "vocab_size": 49408}
    one = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **sides)
    two = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280, **sides
    )
    with torch.device("meta"):
        text = CLIPTextModel(one)
        return {
            "unet": UNet2DConditionModel(**bases.TRUE_SDXL),
            "text_encoder": text if hasattr(text, "text_model") else nn.ModuleDict({"text_model": text}),
            "text_encoder_2": CLIPTextModelWithProjection(two),
        }


def layers_of(parts: dict[str, nn.Module]) -> dict[str, nn.Module]:
    found = {f"{part}.{name}": layer for part, module in parts.items() for name, layer in module.named_modules()}
    return {name: layer for name, layer in found.items() if lora.fits(layer)}


def test_the_names_of_xl_are_kohyas(true_xl: dict[str, nn.Module]) -> None:
    layers = layers_of(true_xl)
    names = [keys.module_name(name, SDXL.prefixes) for name in layers if not name.startswith(OUTSIDE)]
    unet = [name for name in names if name.startswith("lora_unet_")]
    text = [name for name in names if name.startswith(("lora_te1_text_model_", "lora_te2_text_model_"))]
    assert len(unet) + len(text) == len(names)
    assert summed(unet) == KOHYA["unet"]
    assert summed(text) == KOHYA["text encoders"]
    assert len(set(keys.layer_names(layers, SDXL.prefixes))) == len(layers) == 788 + 264 + 7, "no two layers share a name"
    assert summed([name.replace("te1", "te") for name in text]) != KOHYA["text encoders"], "the control"
    with torch.device("meta"):
        narrow = {f"unet.{name}" for name, layer in UNet2DConditionModel(**bases.SDXL).named_modules() if lora.fits(layer)}
    widened = {f"unet.down_blocks.{i}.resnets.0.conv_shortcut" for i in (1, 2)}
    assert {name for name in layers if name.startswith("unet.")} == narrow | widened, "the small one has the true structure, but one width"


def test_the_true_model_is_of_the_published_size(true_xl: dict[str, nn.Module]) -> None:
    counts = [sum(p.numel() for p in module.parameters()) for module in true_xl.values()]
    assert counts == [2_567_463_684, 123_060_480, 694_659_840]


@pytest.mark.parametrize(("preset", "count"), [("cross-attention", 280), ("attention", 560), ("all-linear", 722), ("text-encoder", 264)])
def test_presets_on_xl(true_xl: dict[str, nn.Module], preset: str, count: int) -> None:
    assert len(choose_sites(layers_of(true_xl), [preset], SDXL.presets)) == count


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("kind", ["character", "style"])
def test_usual_settings_are_complete(families: dict[str, Path], studios: dict[str, Studio], pictures: Path, name: str, kind: str) -> None:
    run = api.settle({"base": str(families[name]), "kind": kind, "name": "mira", "data": {"folder": str(pictures)}})
    parts = [dotted.partition(".")[0] for dotted in learners.pieces(run, studios[name].family)]
    assert run.train.lr == 1e-4
    assert parts.count("unet") == {"sd2character": 64, "sd2style": 128}.get(name + kind, 8 * (2 + 4 + 2 + 6 + 3))
    assert parts.count("text_encoder") == (18 if name == "sd2" else 0), "the encoders of XL are left alone"


# ---------------------------------------------------------------- frames


def item(width: int, height: int) -> Item:
    return Item(Path("a.png"), width, height, look(Image.new("RGB", (8, 8))), ())


@pytest.mark.parametrize(
    ("size", "variant", "wanted"),
    [
        ((640, 480), Variant((640, 480)), [480, 640, 0, 0, 480, 640]),
        ((640, 480), Variant((320, 240)), [480, 640, 0, 0, 240, 320]),
        ((640, 480), Variant((240, 240)), [480, 640, 0, 40, 240, 240]),
        ((480, 640), Variant((240, 240)), [640, 480, 40, 0, 240, 240]),
        ((640, 480), Variant((240, 240), Crop((0.0, 0.5))), [480, 640, 0, 0, 240, 240]),
        ((640, 480), Variant((240, 240), Crop((0.0, 0.5)), flip=True), [480, 640, 0, 80, 240, 240]),
        ((640, 480), Variant((320, 240), Crop(share=0.5)), [480, 640, 120, 160, 240, 320]),
    ],
)
def test_a_frame_says_where_in_its_picture_a_cut_lies(size: tuple[int, int], variant: Variant, wanted: list[int]) -> None:
    assert frame(item(*size), variant).tolist() == wanted


def test_only_xl_looks_at_frames(studios: dict[str, Studio]) -> None:
    for name, studio in studios.items():
        loaded = studio.family
        with torch.no_grad():
            states, x, t = loaded.states(loaded.tokens(["a cat"])), small.numbers((1, 4, 8, 8)), torch.tensor([500])
            plain = loaded.predict(x, t, states)
            assert torch.equal(loaded.predict(x, t, states, whole_frames(x, loaded.latent_factor)), plain)
            cut = loaded.predict(x, t, states, torch.tensor([[900.0, 800.0, 50.0, 0.0, 64.0, 64.0]]))
        assert torch.equal(cut, plain) == (name != "sdxl")


# ---------------------------------------------------------------- packs and pictures


def drawn_by_diffusers(pipe: Any, recipe: generate.Recipe, latents: Tensor) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": recipe.steps, "guidance_scale": recipe.guidance, "width": recipe.width, "height": recipe.height}
    pixels: Tensor = pipe(recipe.prompt, negative_prompt=recipe.negative, latents=latents.clone(), output_type="pt", **options).images
    return pixels


def agree_with_diffusers(folder: Path, studio: Studio, tmp_path: Path) -> None:
    """A pack is written, read back, and means the same picture to both."""
    targets = ("attention", "text-encoder", "unet.*.conv1", "unet.*.proj_out", "unet.*samplers.0.conv")
    path = small.random_pack(tmp_path / "mira.safetensors", studio.family, rank=2, alpha=1.0, targets=targets)
    pack = file.load(path)
    studio.add(pack)
    try:
        again = file.tensors_of(studio.bank, "mira", studio.family)
        assert again.keys() == pack.tensors.keys()
        assert all(torch.equal(again[key], tensor) for key, tensor in pack.tensors.items()), "pack, bank, pack"
        recipe = studio.recipe("a cat", guidance=3.0, steps=2, negative="a dog", scales=(("mira", 1.0),))
        ours, plain = studio.pixels([recipe]), studio.pixels([recipe.at(scales=())])
    finally:
        studio.remove("mira")
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    if isinstance(pipe.scheduler, EulerDiscreteScheduler):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    latents = generate.initial_latents(studio.family, recipe)[None]
    before = drawn_by_diffusers(pipe, recipe, latents)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    after = drawn_by_diffusers(pipe, recipe, latents)
    assert (ours - after).abs().max() <= 1e-4
    assert (plain - before).abs().max() <= 1e-4
    assert (after - before).abs().max() > 1e-2, "the control: the pack changes the picture"


@pytest.mark.parametrize("name", NEW)
def test_diffusers_opens_the_pack_and_draws_our_picture(
    families: dict[str, Path], studios: dict[str, Studio], tmp_path: Path, name: str
) -> None:
    agree_with_diffusers(families[name], studios[name], tmp_path)


def test_a_pack_of_one_family_is_refused_by_the_others(studios: dict[str, Studio], pack_path: Path, tmp_path: Path) -> None:
    packs = {name: small.random_pack(tmp_path / f"{name}.safetensors", studio.family) for name, studio in studios.items()}
    for name, path in {**packs, "sd1": pack_path}.items():
        for other, studio in studios.items():
            if other != name:
                with pytest.raises(UserError, match=r"E-PACK-0[46]"):
                    studio.add(file.load(path))
                assert studio.bank.adapters == []


# ---------------------------------------------------------------- training


def losses(studio: Studio, out: Path, folder: Path) -> tuple[float, float]:
    """Mean squared error on a fixed batch of noised pictures without the pack, and with it."""
    loaded = studio.family
    name = studio.add(file.load(out / "mira.safetensors"))
    pixels = torch.stack([pixels_of(Image.open(path).convert("RGB").resize((64, 64))) for path in sorted(folder.glob("*.png"))])
    latents, noise = loaded.encode(pixels)[0], small.numbers((len(pixels), 4, 8, 8), 5)
    t = torch.arange(len(pixels)) * 150 + 200
    alpha = loaded.alphas_cumprod[t].view(-1, 1, 1, 1)
    found = []
    for scale in (0.0, 1.0):
        studio.bank.use({name: scale})
        with torch.no_grad():
            states = loaded.states(loaded.tokens(["mira"] * len(pixels)))
            said = loaded.predict(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, t, states)
        found.append(float((said - noise).square().mean()))
    studio.remove(name)
    return found[0], found[1]


def settings(steps: int, save_every: int) -> dict[str, Any]:
    wide = {"adapter__targets": ["all-linear", "text-encoder"], "train__text_encoder_lr": 5e-3, "train__lr": 3e-2}
    return {"train__steps": steps, "train__batch_size": 1, "train__save_every": save_every, "data__resolution_px": 64, **wide}


def stopped_and_resumed(run: Any, out: Path, stop_at: int) -> None:
    running = api.train(run, out)
    for event in running:
        if event.kind == "step" and event.step == stop_at:
            running.close()  # type: ignore[attr-defined]
            break
    list(api.train(run, out))


def same(one: Path, other: Path) -> None:
    a, b = (file.load(out / "mira.safetensors") for out in (one, other))
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(tensor, b.tensors[key]) for key, tensor in a.tensors.items())
    assert {key for key in a.metadata if a.metadata[key] != b.metadata[key]} <= set(CLOCK)


@pytest.mark.slow
def test_a_run_goes_on_as_if_never_stopped(families: dict[str, Path], squares: Path, tmp_path: Path) -> None:
    run = small.settled(squares, families["sdxl"], **settings(4, 2))
    list(api.train(run, tmp_path / "whole"))
    stopped_and_resumed(run, tmp_path / "parts", 3)
    same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_a_base_of_true_depth_learns(squares: Path, tmp_path: Path, name: str) -> None:
    folder = bases.MAKERS[name](tmp_path / "deep", deep=True)
    run = small.settled(squares, folder, **settings(20, 7))
    list(api.train(run, tmp_path / "whole"))
    studio = Studio.open(family.find(str(folder)), torch.float32)
    before, after = losses(studio, tmp_path / "whole", squares)
    assert after < 0.97 * before
    stopped_and_resumed(run, tmp_path / "parts", 16)
    same(tmp_path / "whole", tmp_path / "parts")
    agree_with_diffusers(folder, studio, tmp_path)
