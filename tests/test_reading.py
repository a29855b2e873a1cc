"""Packs of other programs: every layout and kind gives the ΔW of its own formula, computed here in double precision, or is named."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import small
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from sdlora import family
from sdlora.adapter import Bank
from sdlora.errors import UserError
from sdlora.family import Family
from sdlora.packs import file, layouts, reading
from sdlora.packs.file import Pack

DOWN, UP = "lora_down.weight", "lora_up.weight"
LINEAR, TEXT = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "text_encoder.text_model.encoder.layers.1.mlp.fc1"
OUT0, CONV = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0", "unet.down_blocks.0.resnets.0.conv1"
POINT, NORM = "unet.down_blocks.0.attentions.0.proj_in", "unet.down_blocks.0.resnets.0.norm1"
Leaves = dict[str, Tensor]


def some(*shape: int, seed: int = 0) -> Tensor:
    return 0.2 * small.numbers(shape, 17 * seed + sum(shape))


def flat(layer: str) -> str:
    return layer.replace("text_encoder.", "lora_te_").replace("unet.", "lora_unet_").replace(".", "_")


def weight_of(loaded: Family, layer: str) -> Tensor:
    weight: Tensor = loaded.layers()[layer].get_parameter("weight").detach().double()
    return weight


def put_on(tensors: Leaves, loaded: Family, metadata: dict[str, str] | None = None, partial: bool = False) -> tuple[Bank, reading.Report]:
    bank = Bank(loaded.components)
    found = file.attach(
        Pack("theirs", {key: t.contiguous() for key, t in tensors.items()}, metadata or {}), "theirs", bank, loaded, partial
    )
    return bank, found


def differences(bank: Bank) -> dict[str, Tensor]:
    return {dotted: delta.difference(layer).detach().double() for dotted, layer, delta in bank.deltas("theirs")}


def same(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).norm() <= 1e-5 * theirs.norm()) and bool(theirs.norm() > 0)


# ---------------------------------------------------------------- layouts


def lora_of(loaded: Family, layer: str, rank: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """down, up, and their product in double precision."""
    weight = weight_of(loaded, layer)
    down, up = some(rank, *weight.shape[1:], seed=1), some(len(weight), rank, *[1] * (weight.ndim - 2), seed=2)
    return down, up, (up.flatten(1).double() @ down.flatten(1).double()).reshape(weight.shape)


def untext(layer: str) -> str:
    return layer.replace("text_model.", "")


def processor(layer: str) -> str:
    return re.sub(r"\.to_(\w+?)(\.0)?$", r".processor.to_\1_lora", layer)


LAYOUTS: dict[str, tuple[Callable[[str], str], str, str, bool]] = {  # module, down, up, has alpha
    "kohya": (flat, DOWN, UP, True),
    "kohya without alpha": (flat, DOWN, UP, False),
    "kohya, flat text encoder": (lambda layer: flat(untext(layer)), DOWN, UP, True),
    "kohya, te1": (lambda layer: flat(layer).replace("lora_te_", "lora_te1_"), DOWN, UP, True),
    "kohya with PEFT's leaves": (flat, "lora_A.weight", "lora_B.weight", True),
    "LyCORIS alone": (lambda layer: flat(layer).replace("lora_unet_", "lycoris_"), DOWN, UP, True),
    "PEFT": (str, "lora_A.weight", "lora_B.weight", False),
    "PEFT with an adapter's name": (str, "lora_A.default.weight", "lora_B.default.weight", False),
    "PEFT, flat text encoder": (untext, "lora_A.weight", "lora_B.weight", False),
    "ai-toolkit, alpha in it": (str, "lora_A.weight", "lora_B.weight", True),
    "diffusers": (str, "lora.down.weight", "lora.up.weight", False),
    "diffusers' text encoder": (str, "lora_linear_layer.down.weight", "lora_linear_layer.up.weight", False),
    "processors": (processor, "down.weight", "up.weight", False),
    "processors of a network": (lambda layer: processor(layer).removeprefix("unet."), "down.weight", "up.weight", False),
    "bare clip_l": (lambda layer: layer.replace("text_encoder.", "clip_l."), DOWN, UP, True),
    "ComfyUI": (
        lambda layer: layer.replace("text_encoder.", "text_encoders.clip_l.transformer.").replace("unet.", "diffusion_model."),
        "lora_A.weight", "lora_B.weight", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read(name: str, loaded: Family) -> None:
    module, down_leaf, up_leaf, alphas = LAYOUTS[name]
    wanted, tensors = {}, {}
    for layer in (LINEAR, OUT0, TEXT, *(() if "processors" in name else (CONV, POINT))):
        down, up, product = lora_of(loaded, layer)
        tensors |= {f"{module(layer)}.{down_leaf}": down, f"{module(layer)}.{up_leaf}": up}
        tensors |= {f"{module(layer)}.alpha": torch.tensor(1.0)} if alphas else {}
        wanted[layer] = product * (0.5 if alphas else 1.0)
    bank, report = put_on(tensors, loaded)
    assert report.complete
    found = differences(bank)
    assert found.keys() == wanted.keys()
    assert all(same(found[layer], wanted[layer]) for layer in wanted)


# Of blocks that two namings have; pairs from the table of the original implementation's names.
PAIRS = {
    "sd1": {
        "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "mid_block_attentions_0_proj_in": "middle_block_1_proj_in",
        "up_blocks_0_upsamplers_0_conv": "output_blocks_2_1_conv",
        "up_blocks_1_upsamplers_0_conv": "output_blocks_5_2_conv",
        "down_blocks_2_downsamplers_0_conv": "input_blocks_9_0_op",
        "up_blocks_1_resnets_0_conv_shortcut": "output_blocks_3_0_skip_connection",
        "time_embedding_linear_2": "time_embed_2",
        "conv_out": "out_2",
    },
    "sdxl": {
        "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "mid_block_attentions_0_proj_in": "middle_block_1_proj_in",
        "up_blocks_0_upsamplers_0_conv": "output_blocks_2_2_conv",
        "up_blocks_1_upsamplers_0_conv": "output_blocks_5_2_conv",
        "add_embedding_linear_1": "label_emb_0_0",
        "down_blocks_0_resnets_1_time_emb_proj": "input_blocks_2_0_emb_layers_1",
    },
}


@pytest.mark.parametrize("name", PAIRS)
def test_both_namings_of_blocks_mean_the_same_layers(name: str, families: dict[str, Path]) -> None:
    base = family.load(family.find(str(families[name])), torch.device("cpu"), torch.float32)
    table = layouts.spellings(base.layers(), base.prefixes)
    for ours, theirs in PAIRS[name].items():
        assert table[f"lora_unet_{ours}"][0] == table[f"lora_unet_{theirs}"][0]
        assert table[f"lora_unet_{ours}"][0].replace(".", "_") == f"unet_{ours}"
    if name == "sdxl":
        first = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
        last = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
        assert {table[f"{start}text_model_encoder_layers_0_mlp_fc1"][0] for start in ("lora_te_", "lora_te1_")} == {first}
        assert table["lora_te2_encoder_layers_0_mlp_fc1"][0] == table["clip_g.text_model.encoder.layers.0.mlp.fc1"][0] == last


@pytest.mark.parametrize("name", ["kohya", "PEFT", "processors"])
def test_diffusers_reads_the_same_from_the_file(name: str, base: Path, loaded: Family, tmp_path: Path) -> None:
    """Its own loader is the oracle: the weights that it merges."""
    module, down_leaf, up_leaf, alphas = LAYOUTS[name]
    tensors = {}
    for layer in (LINEAR, OUT0):
        down, up, _ = lora_of(loaded, layer)
        tensors |= {f"{module(layer)}.{down_leaf}": down, f"{module(layer)}.{up_leaf}": up}
        tensors |= {f"{module(layer)}.alpha": torch.tensor(1.0)} if alphas else {}
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors")
    pipe: Any = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    pipe.load_lora_weights(str(tmp_path), weight_name="theirs.safetensors")
    pipe.fuse_lora()
    bank, _ = put_on(file.load(tmp_path / "theirs.safetensors").tensors, loaded)
    for layer, ours in differences(bank).items():
        merged = pipe.unet.get_submodule(layer.removeprefix("unet.")).base_layer.weight.detach().double()
        assert (merged - weight_of(loaded, layer) - ours).norm() <= 1e-5 * ours.norm()


@pytest.mark.parametrize(("rslora", "pattern", "scale"), [(False, {}, 4.0), (True, {}, 8 / 2**0.5), (False, {"attn1.to_q": 1}, 0.5)])
def test_a_header_says_pefts_alpha(rslora: bool, pattern: dict[str, int], scale: float, loaded: Family) -> None:
    down, up, product = lora_of(loaded, LINEAR)
    said = {"unet.lora_alpha": 8, "unet.r": 2, "unet.use_rslora": rslora, "unet.alpha_pattern": pattern}
    tensors = {f"{LINEAR}.lora_A.weight": down, f"{LINEAR}.lora_B.weight": up}
    bank, _ = put_on(tensors, loaded, {"lora_adapter_metadata": json.dumps(said)})
    assert same(differences(bank)[LINEAR], scale * product)
    said["unet.alpha_pattern"] = {"(a+)+b": 1}
    with pytest.raises(UserError, match="expression"):
        put_on(tensors, loaded, {"lora_adapter_metadata": json.dumps(said)})


# ---------------------------------------------------------------- kinds


def kron(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ac,bd->abcd", a, b).reshape(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])


def sizes(weight: Tensor) -> tuple[int, int, int]:
    return len(weight), weight.shape[1], weight[0, 0].numel()


def locon(w: Tensor) -> tuple[Leaves, Tensor]:
    out, into, _ = sizes(w)
    leaves = {DOWN: some(3, into, 1, 1), "lora_mid.weight": some(2, 3, 3, 3), UP: some(out, 2, 1, 1), "alpha": torch.tensor(1.0)}
    d, m, u = (leaves[name].double() for name in (DOWN, "lora_mid.weight", UP))
    return leaves, torch.einsum("oi,ijkl,jn->onkl", u[:, :, 0, 0], m, d[:, :, 0, 0]) / 2


def loha(w: Tensor) -> tuple[Leaves, Tensor]:
    out, into, k = sizes(w)
    leaves = {f"hada_w{i}_{s}": some(*(out, 3) if s == "a" else (3, into * k), seed=i) for i in (1, 2) for s in "ab"}
    one, two = (leaves[f"hada_w{i}_a"].double() @ leaves[f"hada_w{i}_b"].double() for i in (1, 2))
    return {**leaves, "alpha": torch.tensor(1.5)}, (one * two / 2).reshape(w.shape)


def loha_tucker(w: Tensor) -> tuple[Leaves, Tensor]:
    out, into, _ = sizes(w)
    leaves = {f"hada_w{i}_{s}": some(3, out if s == "a" else into, seed=i) for i in (1, 2) for s in "ab"}
    leaves |= {f"hada_t{i}": some(3, 3, 3, 3, seed=5 + i) for i in (1, 2)}
    d = {name: tensor.double() for name, tensor in leaves.items()}
    one, two = (torch.einsum("ijkl,jr,ip->prkl", d[f"hada_t{i}"], d[f"hada_w{i}_b"], d[f"hada_w{i}_a"]) for i in (1, 2))
    return {**leaves, "alpha": torch.tensor(1.5)}, one * two / 2


def lokr(first: bool, second: str) -> Callable[[Tensor], tuple[Leaves, Tensor]]:
    def make(w: Tensor) -> tuple[Leaves, Tensor]:
        out, into, k = sizes(w)
        leaves = {"lokr_w1_a": some(4, 2), "lokr_w1_b": some(2, 2)} if first else {"lokr_w1": some(4, 2)}
        b, d = out // 4, into // 2
        if second == "whole":
            leaves["lokr_w2"] = some(b, d, *w.shape[2:])
        elif second == "factors":
            leaves |= {"lokr_w2_a": some(b, 2), "lokr_w2_b": some(2, d * k)}
        else:
            leaves |= {"lokr_t2": some(2, 2, *w.shape[2:]), "lokr_w2_a": some(2, b), "lokr_w2_b": some(2, d)}
        v = {name: tensor.double() for name, tensor in leaves.items()}
        w1 = v["lokr_w1_a"] @ v["lokr_w1_b"] if first else v["lokr_w1"]
        if second == "tucker":
            w2 = torch.einsum("ijkl,ip,jr->prkl", v["lokr_t2"], v["lokr_w2_a"], v["lokr_w2_b"])
        else:
            w2 = v["lokr_w2"] if second == "whole" else v["lokr_w2_a"] @ v["lokr_w2_b"]
        scale = 0.25 if first or second != "whole" else 1.0
        return {**leaves, "alpha": torch.tensor(0.5)}, scale * kron(w1, w2.reshape(b, -1)).reshape(w.shape)

    return make


def dora(axis: int) -> Callable[[Tensor], tuple[Leaves, Tensor]]:
    def make(w: Tensor) -> tuple[Leaves, Tensor]:
        out, into, _ = sizes(w)
        ones = [1] * (w.ndim - 2)
        leaves = {DOWN: some(2, *w.shape[1:]), UP: some(out, 2, *ones), "alpha": torch.tensor(1.0)}
        leaves["dora_scale"] = 1 + some(*((out, 1) if axis == 0 else (1, into)), *ones).abs()
        return leaves, turned(
            w, (leaves[UP].flatten(1).double() @ leaves[DOWN].flatten(1).double()).reshape(w.shape) / 2, leaves["dora_scale"]
        )

    return make


def turned(w: Tensor, change: Tensor, scale: Tensor) -> Tensor:
    whole, axis = w + change, 0 if scale.shape[0] > 1 else 1
    norm = (whole**2).sum([i for i in range(w.ndim) if i != axis], keepdim=True).sqrt()
    return scale.double() * whole / norm - w


def loha_dora(w: Tensor) -> tuple[Leaves, Tensor]:
    leaves, change = loha(w)
    scale = 1 + some(len(w), *[1] * (w.ndim - 1)).abs()
    return {**leaves, "dora_scale": scale}, turned(w, change, scale)


def ia3(on_input: bool) -> Callable[[Tensor], tuple[Leaves, Tensor]]:
    def make(w: Tensor) -> tuple[Leaves, Tensor]:
        vector = some(w.shape[on_input])
        shape = [1] * w.ndim
        shape[on_input] = -1
        return {"weight": vector, "on_input": torch.tensor(on_input)}, w * vector.double().view(shape)

    return make


def cayley(blocks: Tensor) -> Tensor:
    skew = (blocks - blocks.mT).double()
    eye = torch.eye(skew.shape[-1], dtype=torch.float64)
    return (eye + skew) @ torch.linalg.inv(eye - skew)


def oft(form: str) -> Callable[[Tensor], tuple[Leaves, Tensor]]:
    def make(w: Tensor) -> tuple[Leaves, Tensor]:
        blocks = some(len(w) // 4, 4, 4)
        turns = cayley(blocks)
        rotated = torch.einsum("knm,kni->kmi", turns, w.reshape(len(w) // 4, 4, -1)).reshape(w.shape)
        if form == "diag":
            return {"oft_diag": turns.float()}, rotated - w
        if form == "rescale":
            scale = 1 + some(len(w), *[1] * (w.ndim - 1))
            return {"oft_blocks": blocks, "rescale": scale}, scale.double() * rotated - w
        return {"oft_blocks": blocks, "alpha": torch.tensor(1e4)}, rotated - w

    return make


def whole(w: Tensor) -> tuple[Leaves, Tensor]:
    diff = some(*w.shape)
    return {"diff": diff}, diff.double()


FORMS: dict[str, tuple[Callable[[Tensor], tuple[Leaves, Tensor]], tuple[str, ...]]] = {
    "locon tucker": (locon, (CONV,)),
    "loha": (loha, (LINEAR, CONV, TEXT)),
    "loha tucker": (loha_tucker, (CONV,)),
    **{f"lokr {first} {second}": (lokr(first, second), (LINEAR, CONV, TEXT)) for first in (False, True) for second in ("whole", "factors")},
    **{f"lokr {first} tucker": (lokr(first, "tucker"), (CONV,)) for first in (False, True)},
    "dora out": (dora(0), (LINEAR, CONV, TEXT)),
    "dora in": (dora(1), (LINEAR, CONV, TEXT)),
    "loha with magnitudes": (loha_dora, (LINEAR, CONV)),
    "ia3 out": (ia3(False), (LINEAR, CONV)),
    "ia3 in": (ia3(True), (LINEAR, CONV)),
    "oft": (oft("blocks"), (LINEAR, CONV)),
    "oft diag": (oft("diag"), (LINEAR, CONV)),
    "oft rescaled": (oft("rescale"), (LINEAR, CONV)),
    "full": (whole, (LINEAR, CONV, TEXT)),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_kind_has_the_change_of_its_formula(name: str, loaded: Family) -> None:
    make, layers = FORMS[name]
    wanted: dict[str, Tensor] = {}
    tensors: Leaves = {}
    for layer in layers:
        leaves, wanted[layer] = make(weight_of(loaded, layer))
        tensors |= {f"{flat(layer)}.{leaf}": tensor for leaf, tensor in leaves.items()}
    bank, report = put_on(tensors, loaded)
    assert report.complete
    assert all(same(found, wanted[layer]) for layer, found in differences(bank).items())


def test_one_pack_has_several_kinds_ranks_and_alphas(loaded: Family) -> None:
    tensors, wanted = {}, {}
    for layer, name in ((LINEAR, "loha"), (CONV, "lokr True factors"), (TEXT, "dora in"), (OUT0, "full")):
        leaves, wanted[layer] = FORMS[name][0](weight_of(loaded, layer))
        tensors |= {f"{flat(layer)}.{leaf}": tensor for leaf, tensor in leaves.items()}
    down, up, product = lora_of(loaded, POINT, rank=5)
    tensors |= {f"{flat(POINT)}.{DOWN}": down, f"{flat(POINT)}.{UP}": up, f"{flat(POINT)}.alpha": torch.tensor([10])}
    bank, report = put_on(tensors, loaded)
    assert sorted(report.applied.values()) == ["dora", "full", "loha", "lokr", "lora"]
    assert any("several kinds" in note for note in report.notes)
    assert all(same(found, {**wanted, POINT: 2 * product}[layer]) for layer, found in differences(bank).items())


@pytest.mark.parametrize(("layer", "leaves"), [(CONV, {DOWN, UP, "diff_b"}), (LINEAR.replace("to_q", "to_out.0"), {"diff", "diff_b"}),
                                               (NORM, {"w_norm", "b_norm"}), (NORM, {"b_norm"})])  # fmt: skip
def test_biases_and_norms_change_what_comes_out(layer: str, leaves: set[str], loaded: Family) -> None:
    """The oracle is the layer itself with the sums as its weight and bias."""
    module: Any = loaded.layers()[layer]
    w = weight_of(loaded, layer)
    given = {"diff_b": some(len(w)), "b_norm": some(len(w)), "w_norm": some(len(w), seed=3), "diff": some(*w.shape)}
    given |= {DOWN: some(2, *w.shape[1:]), UP: some(len(w), 2, *[1] * (w.ndim - 2))}
    product = (given[UP].flatten(1) @ given[DOWN].flatten(1)).reshape(w.shape) if UP in leaves else 0.0
    change = product + sum(given[name] for name in ("diff", "w_norm") if name in leaves)
    x = some(2, 5, w.shape[1]) if w.ndim == 2 else some(2, w.shape[1] if w.ndim == 4 else len(w), 8, 8)
    wanted: Tensor = torch.func.functional_call(
        module,
        {"weight": module.weight + change, "bias": module.bias + sum(given[name] for name in ("diff_b", "b_norm") if name in leaves)},
        (x,),
    )
    before = module(x)
    bank, _ = put_on({f"{flat(layer)}.{leaf}": given[leaf] for leaf in leaves}, loaded)
    bank.use({"theirs": 1.0})
    site = bank.sites[layer]
    assert torch.allclose(site(x), wanted, atol=1e-5)
    assert not torch.allclose(before, wanted, atol=1e-2), "the control"
    if "w_norm" in leaves:
        assert {key.rpartition(".")[2] for key in file.tensors_of(bank, "theirs", loaded)} == {"w_norm", "b_norm"}


# ---------------------------------------------------------------- what is unlike others


@pytest.mark.parametrize("alpha", [torch.tensor(3), torch.tensor([3.0]), torch.tensor(3.0).half(), None, torch.tensor(0.0)])
def test_an_alpha_in_any_form_is_read(alpha: Tensor | None, loaded: Family) -> None:
    down, up, product = lora_of(loaded, LINEAR)
    other = {f"{flat(TEXT)}.{leaf}": t for leaf, t in zip((DOWN, UP), lora_of(loaded, TEXT)[:2], strict=True)}
    tensors = {f"{flat(LINEAR)}.{DOWN}": down, f"{flat(LINEAR)}.{UP}": up, **other}
    tensors |= {} if alpha is None else {f"{flat(LINEAR)}.alpha": alpha}
    bank, report = put_on(tensors, loaded)
    scale = 1.0 if alpha is None else float(alpha) / 2
    assert torch.allclose(differences(bank)[LINEAR], scale * product, atol=1e-6)
    assert bool(report.notes) == (scale == 0), "that it does nothing is said"


@pytest.mark.parametrize("layer", [POINT, LINEAR])
def test_factors_may_have_other_axes_of_length_one(layer: str, loaded: Family) -> None:
    down, up, product = lora_of(loaded, layer)
    down, up = (t.flatten(1) if t.ndim == 4 else t[..., None, None] for t in (down, up))
    bank, _ = put_on({f"{flat(layer)}.{DOWN}": down, f"{flat(layer)}.{UP}": up}, loaded)
    assert same(differences(bank)[layer], product)


def partly(loaded: Family) -> Iterator[tuple[str, str, Leaves]]:
    """What cannot be applied, and the words it is named with."""
    w = weight_of(loaded, LINEAR)
    yield "lora_unet_nowhere.alpha", "no layer of this base", {"lora_unet_nowhere.alpha": torch.ones(())}
    yield "bundle_emb.mira.string_to_param.*", "which this base spells with", {"bundle_emb.mira.string_to_param.*": some(2, 16)}
    glora = {f"{flat(TEXT)}.{name}.weight": some(2, 2) for name in ("a1", "a2", "b1", "b2")}
    yield f"{flat(TEXT)}.a1.weight", "GLoRA's factors", glora
    yield f"{flat(TEXT)}.odd_w1", "no kind of adapter keeps its weights so", {f"{flat(TEXT)}.odd_w1": some(2, 2)}
    yield f"{flat(TEXT)}.{DOWN}", "lacks 'lora_up.weight'", {f"{flat(TEXT)}.{DOWN}": lora_of(loaded, TEXT)[0]}
    yield f"{LINEAR}.lora_A.weight", "under another name", {f"{LINEAR}.lora_A.weight": some(2, w.shape[1], seed=9)}


def test_what_cannot_be_applied_is_named_and_refused_unless_allowed(loaded: Family) -> None:
    down, up, product = lora_of(loaded, LINEAR)
    sound = {f"{flat(LINEAR)}.{DOWN}": down, f"{flat(LINEAR)}.{UP}": up}
    for key, why, more in partly(loaded):
        with pytest.raises(UserError) as caught:
            put_on({**sound, **more}, loaded)
        assert key in str(caught.value)
        assert why in str(caught.value)
        bank, report = put_on({**sound, **more}, loaded, partial=True)
        assert not report.complete
        assert any(key in line and why in line for line in report.lines())
        assert same(differences(bank)[LINEAR], product)
        bank.eject()
        with pytest.raises(UserError):
            put_on(more, loaded, partial=True) if "lora_A" not in key else put_on({}, loaded, partial=True)
    assert Pack("a", {"bundle_emb.mira.string_to_param.*": some(2, 16)}, {}).embeddings.keys() == {"mira"}


def test_a_summary_needs_no_base(loaded: Family, tmp_path: Path) -> None:
    path = small.random_pack(tmp_path / "mira.safetensors", loaded, rank=3, alpha=2.0)
    found = file.summary(file.load(path))
    modules = found["modules"]
    assert (found["layouts"], found["kinds"]) == ({"kohya": 3 * modules}, {"lora": modules})
    assert (found["ranks"], found["alphas"]) == ({3: modules}, {2.0: modules})
    assert found["dtypes"] == {"float16": 2 * modules, "float32": modules}
    assert len(found["sha256"]) == 64
    theirs = {f"{LINEAR}.lora_A.weight": some(2, 16), f"{LINEAR}.lora_B.weight": some(16, 2), "bundle_emb.a.string_to_param.*": some(1, 16)}
    other = file.summary(Pack("a", theirs, {}))
    assert (other["layouts"], other["ranks"], other["embeddings"]) == ({"diffusers": 2, "embeddings": 1}, {2: 1}, ["a"])


def test_a_network_of_true_size_is_sorted_at_once() -> None:
    """Every key by a few look-ups: their number, not a clock, is counted."""

    class Counting(dict[str, tuple[str, str]]):
        asked = 0

        def __contains__(self, key: object) -> bool:
            Counting.asked += 1
            return super().__contains__(key)

    names = [f"unet.down_blocks.{i}.attentions.0.transformer_blocks.{j}.attn1.to_q" for i in range(10) for j in range(100)]
    table = Counting(layouts.spellings(names, {"unet": "lora_unet"}))
    tensors = [f"{name}.{leaf}" for name in names for leaf in ("lora_A.weight", "lora_B.weight")]
    assert len(layouts.sort(tensors, table).layers) == 1000
    assert Counting.asked <= layouts.DEEPEST * len(tensors)


def test_nothing_of_a_layer_is_left_behind(loaded: Family) -> None:
    """The control of all that is attached here: the modules are the base's own again."""
    before = small.modules(loaded)
    bank, _ = put_on(dict(zip((f"{flat(LINEAR)}.{DOWN}", f"{flat(LINEAR)}.{UP}"), lora_of(loaded, LINEAR)[:2], strict=True)), loaded)
    assert isinstance(bank.sites[LINEAR], nn.Module)
    assert small.modules(loaded) != before
    bank.eject()
    assert small.modules(loaded) == before
