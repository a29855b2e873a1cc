"""Packs as they are written: every layout, precision and mixture of ranks is the same ΔW to those who read it."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import small
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from typer.testing import CliRunner

from sdlora import api, lookup
from sdlora.adapter import Bank
from sdlora.cli import app
from sdlora.errors import UserError
from sdlora.family import Family
from sdlora.packs import file, precision, writing
from sdlora.packs.file import Pack

DOWN, UP = "lora_down.weight", "lora_up.weight"


def mixed(loaded: Family) -> Bank:
    """A LoRA of several ranks and alphas on linear layers, convolutions and the text encoder."""
    bank, lora = Bank(loaded.components), lookup.find("adapters", "lora")
    names = list(small.matching(loaded, lora, ["unet.*attn*.to_*", "unet.*.conv1", "text_encoder*.self_attn.*_proj"]))
    bank.add("mira", {name: (lora, small.some_config(lora, 1 + i % 3, 1.0 + i % 2)) for i, name in enumerate(names)}, small.stream_of)
    small.randomise(bank, "mira")
    return bank


def changes(bank: Bank, name: str = "mira") -> dict[str, Tensor]:
    return {dotted: delta.difference(layer).detach() for dotted, layer, delta in bank.deltas(name)}


def far(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours)


@pytest.mark.parametrize("layout", writing.LAYOUTS)
def test_diffusers_reads_unequal_ranks_and_alphas_as_we_do(layout: str, base: Path, loaded: Family, tmp_path: Path) -> None:
    bank = mixed(loaded)
    wanted = changes(bank)
    tensors = file.written(bank, "mira", loaded, [layout], torch.float32)[0][layout]
    bank.eject()
    safetensors.torch.save_file(tensors, tmp_path / "mira.safetensors")
    if layout == "kohya":
        alphas = Counter((key.split("_")[1], float(tensor)) for key, tensor in tensors.items() if key.endswith("alpha"))
        assert len(alphas) == 2, "one for each component"
    pipe: Any = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    pipe.load_lora_weights(str(tmp_path), weight_name="mira.safetensors")
    pipe.fuse_lora()
    layers = loaded.layers()
    for name, change in wanted.items():
        part, _, inner = name.partition(".")
        module = getattr(pipe, part)
        inner = inner if part == "unet" or hasattr(module, "text_model") else inner.removeprefix("text_model.")
        merged = module.get_submodule(inner).base_layer.weight.detach()
        assert (merged - layers[name].get_parameter("weight") - change).norm() <= 1e-5 * change.norm()
    file.attach(Pack("again", tensors, {}), "again", bank, loaded)
    assert far(changes(bank, "again"), wanted) <= 1e-6


def test_a_pack_with_one_rank_and_alpha_is_left_as_it_is(loaded: Family, tmp_path: Path) -> None:
    pack = file.load(small.random_pack(tmp_path / "mira.safetensors", loaded, rank=3))
    bank = Bank(loaded.components)
    again = file.converted(pack, bank, loaded, "kohya", torch.float16)
    assert bank.adapters == []
    assert again.keys() == pack.tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in pack.tensors.items())


@pytest.mark.parametrize(("dtype", "most"), [("fp16", 2e-3), ("bf16", 2e-2), ("fp32", 1e-6)])
def test_layouts_and_precisions_lead_into_one_another(dtype: str, most: float, loaded: Family) -> None:
    bank = mixed(loaded)
    wanted, tensors = changes(bank), file.tensors_of(bank, "mira", loaded, torch.float32)
    bank.eject()
    there = file.converted(Pack("a", tensors, {}), bank, loaded, "diffusers", precision.DTYPES[dtype])
    back = file.converted(Pack("a", there, {}), bank, loaded, "kohya", precision.DTYPES[dtype])
    assert {tensor.dtype for key, tensor in back.items() if not key.endswith("alpha")} == {precision.DTYPES[dtype]}
    file.attach(Pack("again", back, {}), "again", bank, loaded)
    assert far(changes(bank, "again"), wanted) <= most


@pytest.mark.parametrize(("kind", "axis"), [("dora", "in"), ("loha", "")])
def test_what_diffusers_cannot_hold_is_not_written_for_it(kind: str, axis: str, loaded: Family) -> None:
    module, bank = lookup.find("adapters", kind), Bank(loaded.components)
    names = small.matching(loaded, module, ["unet.*attn1.to_q"])
    bank.add("mira", {name: (module, small.some_config(module)) for name in names}, small.stream_of)
    with pytest.raises(UserError, match="E-PACK-32"):
        file.written(bank, "mira", loaded, ["kohya", "diffusers"])
    with pytest.raises(UserError, match="E-PACK-33"):
        file.written(bank, "mira", loaded, ["unheard of"])
    assert axis in str(getattr(module.Config(), "axis", ""))


@pytest.mark.parametrize("size", [1e-6, 1e-7, 1e-9])
def test_small_factors_are_not_lost_in_half_precision(size: float) -> None:
    """As `up` is after few steps: fp16 holds nothing below 6e-8."""
    down, up = small.numbers((4, 64)), size * small.numbers((64, 4), 1)
    exact = {f"lora_unet_x.{DOWN}": down, f"lora_unet_x.{UP}": up, "lora_unet_x.alpha": torch.tensor(4.0)}
    tensors, lost = precision.cast(exact, torch.float16, {"alpha"})
    found = tensors[f"lora_unet_x.{UP}"].double() @ tensors[f"lora_unet_x.{DOWN}"].double()
    wanted = up.double() @ down.double()
    assert (found - wanted).norm() <= 1e-3 * wanted.norm()
    assert lost <= 0.01 * up.numel()
    plainly = up.half().double() @ down.half().double()
    assert (plainly - wanted).norm() > 1e-3 * wanted.norm(), "the control: as they are they would be"
    alone = {"lora_unet_x.diff": 1e-9 * small.numbers((64, 64))}
    assert precision.cast(alone, torch.float16, ())[1] == 64 * 64, "what has no other factor is counted"
    assert precision.cast(alone, torch.bfloat16, ())[1] == 0


def test_numbers_that_fit_are_not_touched() -> None:
    exact = {f"lora_unet_x.{DOWN}": small.numbers((4, 64)), f"lora_unet_x.{UP}": 1e-2 * small.numbers((64, 4))}
    tensors, _ = precision.cast(exact, torch.float16, ())
    assert all(torch.equal(tensors[key], exact[key].half()) for key in exact)


def test_a_run_writes_each_layout_it_is_asked_for(squares: Path, base: Path, tmp_path: Path) -> None:
    given = {"train__steps": 2, "pack__layouts": ["diffusers", "kohya"], "pack__dtype": "bf16"}
    list(api.train(small.settled(squares, base, **given), tmp_path / "run"))
    packs = [file.load(tmp_path / "run" / f"mira{more}.safetensors") for more in ("", ".kohya")]
    assert [set(file.summary(pack)["layouts"]) for pack in packs] == [{"diffusers"}, {"kohya"}]
    assert packs[0].tensors["unet.mid_block.attentions.0.proj_in.lora_A.weight"].dtype == torch.bfloat16
    studio = api.open_studio(packs, str(base))
    one, two = (changes(studio.bank, name) for name in studio.packs)
    assert far(one, two) <= 2e-2


def test_the_command_line_converts(pack_path: Path, base: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    for source, layout, out in ((pack_path, "diffusers", there), (there, "kohya", back)):
        result = CliRunner().invoke(app, ["pack", "convert", str(source), "--layout", layout, "--out", str(out), "--base", str(base)])
        assert result.exit_code == 0, result.output
    read = file.load(back)
    assert read.tensors.keys() == file.load(pack_path).tensors.keys()
    assert read.metadata["sshs_model_hash"] == read.sha256 == read.metadata["modelspec.hash_sha256"].removeprefix("0x")
    result = CliRunner().invoke(app, ["pack", "convert", str(there), "--layout", "kohya", "--out", str(back), "--dtype", "int3"])
    assert result.exit_code == 2
    assert "E-PACK-34" in result.stderr
