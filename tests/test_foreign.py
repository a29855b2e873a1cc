"""Kinds and names that only other programs write: GLoRA, butterflies, OpenCLIP's names and textual inversions, each beside its formula."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import small
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from typer.testing import CliRunner

from sdlora import family
from sdlora.adapter import Bank
from sdlora.cli import app
from sdlora.errors import UserError
from sdlora.family import Family
from sdlora.packs import file, reading
from sdlora.packs.file import Pack

LINEAR, CONV = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "unet.down_blocks.0.resnets.0.conv1"
Leaves = dict[str, Tensor]


def some(*shape: int, seed: int = 0) -> Tensor:
    return 0.2 * small.numbers(shape, 17 * seed + sum(shape))


def put_on(tensors: Leaves, loaded: Family, **how: Any) -> tuple[Bank, reading.Report]:
    bank = Bank(loaded.components)
    return bank, file.attach(Pack("theirs", {key: t.contiguous() for key, t in tensors.items()}, {}), "theirs", bank, loaded, **how)


def change(bank: Bank, layer: str) -> Tensor:
    found: Tensor = next(delta.difference(inner).detach().double() for name, inner, delta in bank.deltas("theirs") if name == layer)
    return found


def weight_of(loaded: Family, layer: str) -> Tensor:
    weight: Tensor = loaded.layers()[layer].get_parameter("weight").detach().double()
    return weight


def same(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).norm() <= 1e-5 * theirs.norm()) and bool(theirs.norm() > 0)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("layer", [LINEAR, CONV])
def test_glora_of_either_form(layer: str, old: bool, loaded: Family) -> None:
    """W a1 a2 + b1 b2, position by position of the kernel; in the old form each pair is named the other way round."""
    w = weight_of(loaded, layer)
    ones = [1] * (w.ndim - 2)
    a1, a2 = some(w.shape[1], 2, *ones, seed=1), some(2, w.shape[1], *ones, seed=2)
    b1, b2 = some(len(w), 2, *ones, seed=3), some(2, *w.shape[1:], seed=4)
    four = [a2, a1, b2, b1] if old else [a1, a2, b1, b2]
    tensors = dict(zip((f"{layer}.{n}.weight" for n in ("a1", "a2", "b1", "b2")), four, strict=True)) | {f"{layer}.alpha": torch.ones(())}
    a, b = a1.flatten(1).double() @ a2.flatten(1).double(), b1.flatten(1).double() @ b2.flatten(1).double()
    columns = w.flatten(2) if w.ndim > 2 else w[..., None]
    through = torch.stack([columns[..., i] @ a for i in range(columns.shape[2])], -1).reshape(w.shape)
    bank, report = put_on(tensors, loaded)
    assert report.complete
    assert same(change(bank, layer), (through + b.reshape(w.shape)) / 2)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("layer", [LINEAR, CONV])
def test_butterflies_are_the_product_of_their_matrices(layer: str, rescaled: bool, loaded: Family) -> None:
    """Every level as one dense matrix, whose entries are placed one by one."""
    w = weight_of(loaded, layer)
    size, out = 4, len(w)
    levels = 2
    blocks = some(levels, out // size, size, size)
    whole = torch.eye(out, dtype=torch.float64)
    for level in range(levels):
        skew = (blocks[level] - blocks[level].mT).double()
        turns = (torch.eye(size) + skew) @ torch.linalg.inv(torch.eye(size) - skew)
        apart = 2**level * size // 2
        order = [2 * apart * c + k + g * apart for c in range(out // (2 * apart)) for k in range(apart) for g in range(2)]
        dense = torch.zeros(out, out, dtype=torch.float64)
        for block in range(out // size):
            rows = order[block * size : (block + 1) * size]
            for i, row in enumerate(rows):
                for j, column in enumerate(rows):
                    dense[row, column] = turns[block, i, j]
        whole = dense @ whole
    scale = 1 + some(out, *[1] * (w.ndim - 1))
    tensors = {f"{layer}.oft_blocks": blocks} | ({f"{layer}.rescale": scale} if rescaled else {})
    turned = (whole @ w.flatten(1)).reshape(w.shape)
    bank, report = put_on(tensors, loaded)
    assert report.complete
    assert same(change(bank, layer), (scale.double() * turned if rescaled else turned) - w)
    with pytest.raises(UserError, match="beyond their bound"):
        put_on({**tensors, f"{layer}.alpha": torch.tensor(1e-3)}, loaded)


@pytest.mark.parametrize("start", ["lora_te_", "cond_stage_model.model.", "clip_l."])
def test_openclips_fused_attention_is_three_layers(start: str, loaded: Family) -> None:
    width = weight_of(loaded, "text_encoder.text_model.encoder.layers.1.self_attn.q_proj").shape[0]
    flat = start.endswith("_")
    fused, single = (f"transformer.resblocks.1.{name}" for name in ("attn.in_proj", "mlp.c_fc"))
    fused, single = (start + (name.replace(".", "_") if flat else name) for name in (fused, single))
    down, up = some(2, width), some(3 * width, 2)
    inner = weight_of(loaded, "text_encoder.text_model.encoder.layers.1.mlp.fc1")
    first, second = some(2, width, seed=5), some(len(inner), 2, seed=6)
    tensors = {f"{fused}.lora_down.weight": down, f"{fused}.lora_up.weight": up, f"{fused}.alpha": torch.tensor(1.0),
               f"{single}.lora_down.weight": first, f"{single}.lora_up.weight": second}  # fmt: skip
    bank, report = put_on(tensors, loaded)
    assert report.complete
    assert len(report.applied) == 4
    whole = up.double() @ down.double() / 2
    for part, rows in zip("qkv", whole.chunk(3), strict=True):
        assert same(change(bank, f"text_encoder.text_model.encoder.layers.1.self_attn.{part}_proj"), rows)
    assert same(change(bank, "text_encoder.text_model.encoder.layers.1.mlp.fc1"), second.double() @ first.double())
    bank.eject()
    odd = {f"{fused}.lokr_w1": some(3, 1), f"{fused}.lokr_w2": some(width, width)}
    _, report = put_on({f"{LINEAR}.diff": some(*weight_of(loaded, LINEAR).shape), **odd}, loaded, partial=True)
    assert sorted(report.unknown) == sorted(odd), "what rows do not part is named"


@pytest.mark.parametrize(("name", "keys"), [
    ("sd1", ["bundle_emb.mira.string_to_param.*"]), ("sd1", ["bundle_emb.mira.emb_params"]),
    ("sdxl", ["bundle_emb.mira.clip_l", "bundle_emb.mira.clip_g"])])  # fmt: skip
def test_a_bundled_embedding_is_the_word(name: str, keys: list[str], families: dict[str, Path]) -> None:
    """The rows of the embedding layer where the word stands are the file's own."""
    one = family.load(family.find(str(families[name])), torch.device("cpu"), torch.float32)
    spelt = one.spelling("mira")
    vectors = {key: some(len(ids), weight_of(one, layer).shape[1], seed=i) for i, (key, (layer, ids)) in
               enumerate(zip(keys, spelt.items(), strict=True))}  # fmt: skip
    bank, report = put_on(vectors, one)
    assert report.complete
    bank.use({"theirs": 1.0})
    for half, (layer, rows) in zip(
        one.tokens(["a mira, red"]).chunk(len(spelt), 1), zip(spelt, vectors.values(), strict=True), strict=True
    ):
        at = next(i for i in range(half.shape[1]) if half[0, i : i + len(rows)].tolist() == spelt[layer])
        found = bank.sites[layer](half)
        torch.testing.assert_close(found[0, at : at + len(rows)], rows, rtol=1e-5, atol=1e-6)
        assert torch.equal(found[0, :at], bank.sites[layer].layer(half)[0, :at])
    bank.eject()
    with pytest.raises(UserError, match="which this base spells with"):
        put_on({key: rows[:-1] for key, rows in vectors.items()}, one)


def test_a_file_of_an_inversion_alone_is_a_pack(base: Path, loaded: Family) -> None:
    """As diffusers applies it."""
    layer, ids = next(iter(loaded.spelling("theirs").items()))
    vectors = some(len(ids), weight_of(loaded, layer).shape[1])
    bank, _ = put_on({"emb_params": vectors}, loaded)
    bank.use({"theirs": 1.0})
    with torch.no_grad():
        ours = loaded.states(loaded.tokens(["a theirs, red"]))
    pipe: Any = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    pipe.load_textual_inversion({"emb_params": vectors}, token="theirs")
    with torch.no_grad():
        rows = pipe.encode_prompt("a theirs, red", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(ours, rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("number", "value", "said"), [(123, 1e30, "E-PACK-05"), (124, 1e-40, "E-PACK-31"), (124, 0.0, "E-PACK-31")])
def test_cases_123_and_124(number: int, value: float, said: str, pack: Pack, loaded: Family, tmp_path: Path) -> None:
    """Numbers that no training makes, and a pack in which every factor is denormal or zero."""
    tensors = {key: t if key.endswith("alpha") else torch.full_like(t.float(), value) for key, t in pack.tensors.items()}
    before = small.modules(loaded)
    path = tmp_path / "bad.safetensors"
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(UserError, match=said):
        file.attach(file.load(path), "bad", Bank(loaded.components), loaded)
    assert small.modules(loaded) == before, number


def test_a_pack_that_acts_in_part_is_refused_or_said(base: Path, pack: Pack, pack_path: Path, tmp_path: Path) -> None:
    """The count is that of what was added to a sound pack; the sound one is the control."""
    odd = {**pack.tensors, "lora_unet_nowhere.alpha": torch.ones(()), "bundle_emb.x.emb_params": torch.ones(9, 3)}
    path = tmp_path / "odd.safetensors"
    safetensors.torch.save_file(odd, path)
    for verb, how in (("generate", ["--prompt", "a", "--steps", "1"]), ("grid", ["--prompts", "a", "--scales", "0,1"])):
        given = [verb, str(path), "--base", str(base), *how, "--out", str(tmp_path / f"{verb}.png")]
        refused = CliRunner().invoke(app, given)
        assert refused.exit_code == 2
        assert "2 of its keys and layers cannot be applied" in refused.stderr
        taken = CliRunner().invoke(app, [*given, "--partial"])
        assert taken.exit_code == 0, taken.output
        assert "warning: odd acts only in part" in taken.stderr
        assert "2 of its keys and layers cannot be applied" in taken.stderr
        assert "lora_unet_nowhere.alpha" in taken.stderr
        sound = CliRunner().invoke(app, [verb, str(pack_path), *given[2:], "--partial"])
        assert sound.exit_code == 0, sound.output
        assert "only in part" not in sound.stderr
