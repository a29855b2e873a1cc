"""Packs: what is written is what was trained, under the names that other programs know; what is not a pack changes nothing."""

import hashlib
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import small
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdlora import api, family, generate, lookup
from sdlora.adapter import Bank
from sdlora.adapters import lora
from sdlora.errors import BAD_INPUT, NUMBERS, UserError
from sdlora.families.sd1 import SD1
from sdlora.family import Family
from sdlora.generate import Recipe
from sdlora.layers import choose_sites
from sdlora.packs import file, keys, metadata
from sdlora.packs.file import Pack
from sdlora.studio import Studio

KINDS = lookup.names("adapters")

# ---------------------------------------------------------------- names

KOHYA = {  # number and SHA-256 of the sorted module names that kohya's own generator gives for Stable Diffusion 1.5
    "unet": (278, "620b9a8905915e2523fcef094d7ccb9a486a442de589c0435a3951c3509cdf95"),
    "unet without 3x3": (192, "bdfc29d0bf3d9ac65c7fa59ebed1e95ebdcacaa740eb561446353b489c14244c"),
    "text encoder": (72, "8da961b9692b4294b54cc39cbeef6b3917cc9450df998138dca1ff9f56c308ee"),
}
OUTSIDE = ("unet.conv_in", "unet.conv_out", "unet.time_embedding.")


def summed(names: list[str]) -> tuple[int, str]:
    return len(names), hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def module_names(layers: dict[str, nn.Module]) -> list[str]:
    found = [name for name, layer in layers.items() if lora.fits(layer) and not name.startswith(OUTSIDE)]
    return [keys.module_name(name, SD1.prefixes) for name in found]


@pytest.fixture(scope="module")
def narrow(sd15_base: Path) -> Family:
    return family.load(family.find(str(sd15_base)), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def true_size() -> dict[str, nn.Module]:
    """Stable Diffusion 1.5's own network and text encoder, without memory for their weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=77
            )
        )
    return {"unet": unet, "text_encoder": text if hasattr(text, "text_model") else nn.ModuleDict({"text_model": text})}


def test_module_names_are_kohyas(narrow: Family) -> None:
    names = module_names(narrow.layers())
    unet = [name for name in names if name.startswith("lora_unet_")]
    text = [name for name in names if name.startswith("lora_te_")]
    assert len(unet) + len(text) == len(names)
    assert summed(unet) == KOHYA["unet"]
    assert summed([name for name in unet if "_resnets_" not in name and "samplers_" not in name]) == KOHYA["unet without 3x3"]
    assert summed(text) == KOHYA["text encoder"]
    assert all(name.startswith("lora_te_text_model_encoder_layers_") for name in text)
    assert summed([name.replace("text_model_", "") for name in text]) != KOHYA["text encoder"]


def test_the_true_model_has_the_same_names(narrow: Family, true_size: dict[str, nn.Module]) -> None:
    assert sum(p.numel() for p in true_size["unet"].parameters()) == 859_520_964
    layers = {f"{part}.{name}": layer for part, module in true_size.items() for name, layer in module.named_modules()}
    assert module_names(layers) == module_names(narrow.layers())


@pytest.mark.parametrize("kind", ["character", "style"])
def test_the_usual_targets_on_the_true_structure(narrow: Family, sd15_base: Path, pictures: Path, kind: str) -> None:
    run = api.settle({"base": str(sd15_base), "kind": kind, "name": "mira", "data": {"folder": str(pictures)}})
    fitting = {name: layer for name, layer in narrow.layers().items() if lora.fits(layer)}
    names = choose_sites(fitting, run.adapter.model_dump()["targets"], narrow.presets)
    parts = [name.partition(".")[0] for name in names]
    assert parts.count("unet") == (64 if kind == "character" else 128)
    assert parts.count("text_encoder") == 72


def test_names_lead_back_to_layers(narrow: Family) -> None:
    layers = [name for name, layer in narrow.layers().items() if lora.fits(layer)]
    known = keys.layer_names(layers, narrow.prefixes)
    assert len(known) == len(layers), "no two layers share a name"
    assert all(known[keys.module_name(name, narrow.prefixes)] == name for name in layers)


# ---------------------------------------------------------------- tensors


def banked(loaded: Family, targets: list[str], rank: int = 2, alpha: float = 1.0, kind: Any = lora) -> Bank:
    fitting = {name: layer for name, layer in loaded.layers().items() if kind.fits(layer)}
    bank = Bank(loaded.components)
    bank.add(
        "mira", dict.fromkeys(choose_sites(fitting, targets, loaded.presets), (kind, small.some_config(kind, rank, alpha))), small.stream_of
    )
    small.randomise(bank, "mira")
    return bank


def plain(sha256: str) -> dict[str, str]:
    return {"sshs_model_hash": sha256}


def test_pack_file_pack_is_the_same(loaded: Family, tmp_path: Path) -> None:
    bank = banked(loaded, ["all-linear", "text-encoder", "unet.*.conv1"], rank=3, alpha=1.7)
    tensors = file.tensors_of(bank, "mira", loaded)
    bank.eject()
    file.save(tmp_path / "mira.safetensors", tensors, plain)
    read = file.load(tmp_path / "mira.safetensors")
    assert read.tensors.keys() == tensors.keys()
    file.attach(read, "again", bank, loaded)
    assert bank.route is None
    again = file.tensors_of(bank, "again", loaded)
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(again[key], tensor), key
        assert again[key].dtype == tensor.dtype == (torch.float32 if key.endswith(".alpha") else torch.float16)
    assert all(delta.alpha == pytest.approx(1.7) for _, _, delta in bank.deltas("again"))


@pytest.mark.parametrize("name", KINDS)
def test_a_pack_of_any_kind_is_known_by_its_leaves(name: str, loaded: Family, tmp_path: Path) -> None:
    kind = lookup.find("adapters", name)
    layers = ["attention", "text-encoder", "unet.*.conv1", "unet.conv_in", "unet.*.conv_shortcut"]
    bank = banked(loaded, ["words"] if name == "prompt" else layers if kind.Adapter.merges else ["cross-attention-blocks"], kind=kind)
    tensors = file.tensors_of(bank, "mira", loaded)
    bank.eject()
    file.save(tmp_path / "mira.safetensors", tensors, plain)
    read = file.load(tmp_path / "mira.safetensors")
    assert {leaf for leaves in keys.by_module(tensors).values() for leaf in leaves} <= kind.Adapter.leaves
    assert read.kind is lookup.find("adapters", "full" if name == "subspace" else name), "whose ΔW say no more than that they are some"
    file.attach(read, "again", bank, loaded)
    again = file.tensors_of(bank, "again", loaded)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) and again[key].dtype == tensor.dtype for key, tensor in tensors.items())
    other = {**tensors, f"{next(iter(tensors))}s": torch.ones(1)}
    with pytest.raises(UserError, match="E-PACK-07"):
        file.attach(Pack("odd", other, {}), "odd", bank, loaded)


def test_the_header_names_the_kind_before_the_leaves_do(pack: Pack) -> None:
    assert Pack("a", {"x.alpha": torch.ones(())}, {"sdlora.adapter": "lora"}).kind is lora
    assert Pack("a", pack.tensors, {}).kind is lora


def test_every_module_has_its_leaves_in_their_shapes(loaded: Family) -> None:
    bank = banked(loaded, ["all-linear", "text-encoder", "unet.*.conv1"], rank=3, alpha=2.0)
    modules = keys.by_module(file.tensors_of(bank, "mira", loaded))
    layers = {keys.module_name(dotted, loaded.prefixes): layer for dotted, layer, _ in bank.deltas("mira")}
    assert modules.keys() == layers.keys()
    for name, leaves in modules.items():
        assert set(leaves) == {"lora_down.weight", "lora_up.weight", "alpha"}
        alpha, down, up = leaves["alpha"], leaves["lora_down.weight"], leaves["lora_up.weight"]
        assert alpha.dtype == torch.float32
        assert alpha.shape == ()
        assert alpha == 2.0
        weight = layers[name].get_parameter("weight")
        assert down.shape == (3, *weight.shape[1:])
        assert up.shape == (weight.shape[0], 3, *[1] * (weight.ndim - 2))
        assert name.startswith(("lora_unet_", "lora_te_text_model_"))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e5])
def test_a_weight_that_fp16_cannot_hold_is_not_written(loaded: Family, value: float) -> None:
    bank = banked(loaded, ["attention"])
    with torch.no_grad():
        next(iter(bank.parameters("mira").values())).view(-1)[0] = value
    with pytest.raises(UserError, match="E-NUM-02") as caught:
        file.tensors_of(bank, "mira", loaded)
    assert caught.value.exit_code == NUMBERS


def test_two_packs_lie_on_one_base(studio: Studio, loaded: Family, tmp_path: Path) -> None:
    paths = [small.random_pack(tmp_path / f"{name}.safetensors", loaded, seed) for seed, name in enumerate("ab")]
    packs = [file.load(path) for path in paths]
    recipe = studio.recipe("a cat", steps=2)
    alone = []
    for pack in packs:
        name = studio.add(pack)
        alone.append(studio.pixels([recipe.at(scales=((name, 1.0),))]))
        studio.remove(name)
    for pack in packs:
        studio.add(pack)
    for name, pixels in zip("ab", alone, strict=True):
        assert (studio.pixels([recipe.at(scales=((name, 1.0),))]) - pixels).abs().max() <= 1e-4
    both = studio.pixels([recipe.at(scales=(("a", 1.0), ("b", 1.0)))])
    assert min((both - pixels).abs().max() for pixels in alone) > 1e-3


# ---------------------------------------------------------------- diffusers


def theirs(pipe: StableDiffusionPipeline, recipe: Recipe, latents: Tensor) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    pixels: Tensor = pipe(
        recipe.prompt,
        negative_prompt=recipe.negative,
        num_inference_steps=recipe.steps,
        guidance_scale=recipe.guidance,
        width=recipe.width,
        height=recipe.height,
        latents=latents.clone(),
        output_type="pt",
    ).images
    return pixels


def test_diffusers_opens_the_pack_and_draws_our_picture(
    base: Path, studio: Studio, loaded: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    targets = ("all-linear", "text-encoder", "unet.*.conv1", "unet.*.conv_shortcut")
    path = small.random_pack(tmp_path / "mira.safetensors", loaded, rank=3, alpha=2.0, targets=targets)
    studio.add(file.load(path))
    recipe = studio.recipe("a cat", guidance=3.0, steps=4, scales=(("mira", 1.0),))
    latents = generate.initial_latents(loaded, recipe)[None]
    assert latents.shape == (1, 4, 8, 8)
    pipe = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    before = theirs(pipe, recipe, latents)
    diffusers.utils.logging.enable_propagation()
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    diffusers.utils.logging.disable_propagation()
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []
    after = theirs(pipe, recipe, latents)
    assert (studio.pixels([recipe]) - after).abs().max() <= 1e-4
    assert (after - before).abs().max() > 1e-2, "the control: the pack changes the picture"
    assert (studio.pixels([recipe.at(scales=())]) - before).abs().max() <= 1e-4


# ---------------------------------------------------------------- metadata


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run from and in places whose names are nobody's business."""
    root = tmp_path_factory.mktemp("private-place")
    folder = small.draw_folder(root / "secret-pictures")
    run = small.settled(folder, base, train__steps=2, preview__scales=[0.0, 1.0], adapter__alpha=1.0)
    list(api.train(run, root / "hidden-runs" / "one"))
    return root / "hidden-runs" / "one" / "mira.safetensors"


def private(header: dict[str, str]) -> list[str]:
    """Fields that tell where or from which files a pack was made."""
    words = ("private-place", "secret-pictures", "hidden-runs", "bases", str(Path.home()) + "/", os.getcwd(), ".png", ".jpg", "ball 0")
    return [key for key, value in header.items() if any(word in value for word in words)]


def test_metadata_say_what_readers_look_for(finished: Path) -> None:
    content = finished.read_bytes()
    assert content[8:10] == b'{"'
    pack = file.load(finished)
    header = pack.metadata
    assert all(isinstance(value, str) for value in header.values())
    assert header["modelspec.trigger_phrase"] == header["ss_output_name"] == header["modelspec.title"] == "mira"
    assert header["modelspec.resolution"] == "32x32"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("2", "1.0")
    assert header["ss_network_module"] == "networks.lora"
    assert json.loads(header["ss_network_args"])["targets"] == ["all-linear", "text-encoder"]
    assert json.loads(header["ss_bucket_info"])["buckets"]["0"]["count"] >= 1
    assert float(header["ss_training_finished_at"]) >= float(header["ss_training_started_at"])
    assert pack.trigger == "mira"
    assert pack.base == header["ss_sd_model_name"] == "small-base"
    assert -4 <= pack.recommended_scale <= 4
    assert header["modelspec.sai_model_spec"].startswith("1.")
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert header["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert header["modelspec.hash_sha256"] == f"0x{header['sshs_model_hash']}"
    assert all(re.fullmatch(r"[a-z]\w*(\.\w+)?", key) for key in header)
    assert len(content) - len(data) < 1_000_000


def test_metadata_name_no_private_place(finished: Path) -> None:
    header = file.load(finished).metadata
    assert private(header) == []
    assert "folder" not in json.loads(header["sdlora.config"])["data"]
    assert private({**header, "x": f"from {finished.parent}"}) == ["x"], "the control"


def test_metadata_hold_a_small_picture(finished: Path) -> None:
    picture = metadata.picture_of(file.load(finished).metadata["modelspec.thumbnail"])
    assert picture.format == "JPEG"
    assert max(picture.size) <= 256
    assert picture.getexif() == {}


def test_the_settings_in_a_pack_train_it_again(finished: Path, pictures: Path, base: Path) -> None:
    table = json.loads(file.load(finished).metadata["sdlora.config"])
    run = api.settle({**table, "base": str(base), "data": {**table["data"], "folder": str(pictures)}})
    assert metadata.public(run, "small-base") == table


def test_only_a_true_sd1_is_called_one(loaded: Family, true_size: dict[str, nn.Module]) -> None:
    small_one = loaded.architecture()
    assert not re.search("stable-diffusion|sd_v1|sdxl", " ".join(small_one.values()))
    true_one = SD1.__new__(SD1)
    true_one.unet = true_size["unet"]
    wanted = {"modelspec.architecture": "stable-diffusion-v1/lora", "ss_base_model_version": "sd_v1", "ss_v2": "False"}
    assert true_one.architecture() == wanted
    assert small_one.keys() == wanted.keys()


# ---------------------------------------------------------------- what is no pack


def changed(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """A sound pack with something changed in its tensors."""

    def write(path: Path) -> None:
        pack = file.load(path)
        tensors = dict(pack.tensors)
        change(tensors)
        path.write_bytes(safetensors.torch.save(tensors, pack.metadata))

    return write


def with_header(**fields: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        pack = file.load(path)
        header = {key.replace("__", "."): value for key, value in fields.items()}
        path.write_bytes(safetensors.torch.save(pack.tensors, {**pack.metadata, **header}))

    return write


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)]) and None


def content(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def first(tensors: dict[str, Tensor], leaf: str) -> str:
    return next(key for key in sorted(tensors) if key.endswith(leaf))


def put(leaf: str, value: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        key = first(tensors, leaf)
        tensors[key] = value(tensors[key]).contiguous()

    return changed(change)


DOWN, UP = "lora_down.weight", "lora_up.weight"
BAD: dict[str, Callable[[Path], None]] = {
    **{f"cut at {share}": cut(share) for share in (0.0, 0.0001, 0.001, 0.1, 0.5, 0.99, 0.9999)},
    "no file": Path.unlink,
    "a folder": folder_instead,
    "eight bytes": content(b"\x08" + b"\0" * 7),
    "pickle": content(pickle.dumps({"a": 1})),
    "zipped pickle": content(b"PK\x03\x04" + bytes(100)),
    "JSON": content(b'{"lora_unet": [1, 2, 3], "more": "text"}'),
    "HTML": content(b"<!DOCTYPE html><html><body>404</body></html>"),
    "header without end": content(b"\xff" * 7 + b"\x7f" + b'{"a": 1}'),
    "header of no tensors": content((2).to_bytes(8, "little") + b"{}"),
    "no tensors": changed(dict.clear),
    "NaN": put(UP, lambda t: t * math.nan),
    "infinity": put(DOWN, lambda t: t / 0),
    "NaN alpha": put("alpha", lambda t: t * math.nan),
    "alpha of two numbers": put("alpha", lambda t: torch.stack([t, t])),
    "alpha of none": put("alpha", lambda _: torch.zeros(0)),
    "down too wide": put(DOWN, lambda t: torch.cat([t, t], 1)),
    "down without axes": put(DOWN, lambda _: torch.ones(())),
    "down with one axis": put(DOWN, lambda t: t[0]),
    "up too long": put(UP, lambda t: torch.cat([t, t])),
    "up of another rank": put(UP, lambda t: t[:, :1]),
    "rank 0": changed(lambda t: t.update({(k := first(t, DOWN)): t[k][:0], (k := first(t, UP)): t[k][:, :0].contiguous()})),
    "half a module": changed(lambda t: t.pop(first(t, UP))),
    "other half": changed(lambda t: t.pop(first(t, DOWN))),
    "unknown layer": changed(lambda t: t.update({"lora_unet_nowhere.lora_up.weight": torch.ones(1)})),
    "unknown leaf": changed(lambda t: t.update({first(t, UP).replace("lora_up", "lora_mid"): torch.ones(1)})),
    "no leaf": changed(lambda t: t.update({first(t, UP).partition(".")[0]: torch.ones(1)})),
    "stray": changed(lambda t: t.update({"bundle_emb.x": torch.ones(1)})),
    "whole model": changed(lambda t: (t.clear(), t.update({"conv_in.weight": torch.ones(1)}))),
    "unknown kind": with_header(sdlora__adapter="unheard_of"),
    "kind with a path": with_header(sdlora__adapter="../family"),
}


def opened(path: Path, bank: Bank, loaded: Family) -> None:
    file.attach(file.load(path), "bad", bank, loaded)


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_pack_is_refused_and_changes_nothing(name: str, pack_path: Path, loaded: Family, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    shutil.copy(pack_path, path)
    modules = small.modules(loaded)
    bank = Bank(loaded.components)
    BAD[name](path)
    with pytest.raises(UserError) as caught:
        opened(path, bank, loaded)
    assert caught.value.exit_code == BAD_INPUT
    assert (bank.adapters, bank.sites) == ([], {})
    assert small.modules(loaded) == modules
    opened(pack_path, bank, loaded)
    assert bank.adapters == ["bad"], "the control: the sound pack is taken"


@pytest.mark.parametrize("text", ["", "much", "nan", "inf", "1e9"])
def test_a_recommended_scale_is_always_a_scale(text: str, pack_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    shutil.copy(pack_path, path)
    with_header(sdlora__recommended_scale=text)(path)
    try:
        scale = file.load(path).recommended_scale
    except UserError as error:
        scale = 1.0 if error.exit_code == BAD_INPUT else math.nan
    assert -4 <= scale <= 4


@pytest.mark.parametrize("base_name", ["small-base", "tiny"])
def test_a_pack_for_another_base_is_refused_by_name(base_name: str, narrow: Family, loaded: Family, tmp_path: Path) -> None:
    path = small.random_pack(tmp_path / "wide.safetensors", narrow)
    pack = file.load(path)
    bank = Bank(loaded.components)
    told = Pack(pack.name, pack.tensors, {**pack.metadata, "sdlora.base": base_name})
    with pytest.raises(UserError, match="does not fit the base small-base") as caught:
        file.attach(told, "wide", bank, loaded)
    assert ("made for tiny" in str(caught.value)) == (base_name == "tiny")
    assert bank.sites == {}


def test_a_pack_without_alphas_has_alpha_equal_to_rank(pack: Pack, loaded: Family) -> None:
    tensors = {key: tensor for key, tensor in pack.tensors.items() if not key.endswith("alpha")}
    bank = Bank(loaded.components)
    file.attach(Pack("foreign", tensors, {}), "foreign", bank, loaded)
    assert {(delta.alpha, delta.rank) for _, _, delta in bank.deltas("foreign")} == {(2.0, 2)}
