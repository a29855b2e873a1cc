"""Bases as they lie on disks: folders, single files, and whatever is wrong with them, told before anything is written."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bases
import pytest
import safetensors.torch
import small
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from typer.testing import CliRunner

from sdlora import api, family, hub
from sdlora.cli import app
from sdlora.errors import BAD_INPUT, UserError
from sdlora.family import Family
from sdlora.ldm import SingleFile
from sdlora.source import Folder, header

CPU = torch.device("cpu")
PX = {"modelspec.resolution": "64x64"}


def loaded(path: Path) -> Family:
    return family.load(family.find(str(path)), CPU, torch.float32)


# ---------------------------------------------------------------- one file


@pytest.fixture(scope="module")
def pairs(families: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Each base as a folder, and as one file."""
    made = tmp_path_factory.mktemp("files")
    return {name: (folder, bases.single_file(folder, made / name / "model.safetensors", **PX)) for name, folder in families.items()}


@pytest.mark.parametrize("name", bases.MAKERS)
def test_one_file_is_the_folder_it_was_made_of(pairs: dict[str, tuple[Path, Path]], name: str) -> None:
    folder, path = pairs[name]
    a, b = family.find(str(folder)), family.find(str(path))
    assert (a.family, a.row, a.size_px, a.prediction) == (b.family, b.row, b.size_px, b.prediction)
    one, two = loaded(folder), loaded(path)
    for part, module in one.parts().items():
        theirs = two.parts()[part].state_dict()
        assert theirs.keys() == module.state_dict().keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in module.state_dict().items())
    tokens = one.tokens(["a cat, é!", ""])
    assert torch.equal(tokens, two.tokens(["a cat, é!", ""]))
    x, t = small.numbers((2, 4, 8, 8)), torch.tensor([3, 700])
    with torch.no_grad():
        states = [each.states(tokens) for each in (one, two)]
        said = [each.predict(x, t, states[0]) for each in (one, two)]
    for a, b in (states, said):  # where in memory the weights lie, and so in which order a product is summed, is the file's own
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))
    assert torch.equal(one.alphas_cumprod, two.alphas_cumprod)


@pytest.mark.slow
def test_a_run_takes_one_file(pairs: dict[str, tuple[Path, Path]], squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pairs["sd1"][1]
    monkeypatch.chdir(path.parent)
    run = small.settled(squares, Path(path.name), train__steps=2, data__resolution_px=64)
    assert run.base == str(path), "it is found again from anywhere"
    list(api.train(run, tmp_path / "run"))
    pack = api.open_pack(tmp_path / "run" / "mira.safetensors")
    assert pack.base == "model.safetensors"
    assert pack.metadata["sdlora.base_unet_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("marks", "said", "prediction"),
    [
        ((), {}, "epsilon"),
        (("v_pred",), {}, "velocity"),
        (("v_pred", "ztsnr"), {}, "velocity"),
        ((), {"modelspec.prediction_type": "v"}, "velocity"),
    ],
)
def test_a_file_says_what_it_predicts(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path, marks: tuple[str, ...], said: dict[str, str], prediction: str
) -> None:
    path = bases.single_file(pairs["sd1"][0], tmp_path / "one" / "model.safetensors", marks, **said)
    assert family.find(str(path)).prediction == prediction
    scheduler = loaded(path).new_scheduler()
    assert (scheduler.alphas_cumprod[-1] < 1e-6) == ("ztsnr" in marks)
    assert scheduler.config.prediction_type == {"velocity": "v_prediction"}.get(prediction, prediction)


def outline(parts: dict[str, Any]) -> SingleFile:
    """A file with these tensors, of which only the shapes are known."""
    one = SingleFile.__new__(SingleFile)
    one.path, one.said = Path("model.safetensors"), {}
    one.shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
    one.text = {suffix: one._holder(suffix) for suffix in ("", "_2")}
    return one


SIDES = {"max_position_embeddings": 77, "vocab_size": 49408}
LARGE = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **SIDES)
HUGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"}
GIANT = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu"}
TRUE: dict[str, tuple[dict[str, Any], Any, Any, int]] = {
    "sd1": ({"cross_attention_dim": 768, "attention_head_dim": 8}, LARGE, None, 512),
    "sd2-768": (bases.TRUE_SD2, CLIPTextConfig(**HUGE, **SIDES), None, 768),
    "sdxl": (bases.TRUE_SDXL, LARGE, CLIPTextConfig(**GIANT, projection_dim=1280, **SIDES), 1024),
}


@pytest.mark.parametrize("row", TRUE)
def test_the_shapes_of_true_models_tell_their_configs(row: str) -> None:
    config, one, two, size_px = TRUE[row]
    with torch.device("meta"):
        unet, text = UNet2DConditionModel(**config), CLIPTextModel(one)
        second = CLIPTextModelWithProjection(two) if two else None
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )  # fmt: skip
        tensors = bases.original(unet, vae, text, second)
    file = outline(tensors)
    again = family.lookup.find("families", row.partition("-")[0]).recognise(file)
    assert (again["row"], again["size_px"]) == (row, size_px)
    with torch.device("meta"):
        for part, kind, model in (("unet", UNet2DConditionModel, unet), ("vae", AutoencoderKL, vae)):
            made = kind.from_config(file.config(part))
            assert {n: p.shape for n, p in made.state_dict().items()} == {n: p.shape for n, p in model.state_dict().items()}
    heads = [unet.config.attention_head_dim] if row == "sd1" else [*unet.config.attention_head_dim]
    assert file.config("unet")["attention_head_dim"] == (heads if row != "sd1" else 8)
    for suffix, wanted in (("", one), ("_2", two)):
        if wanted:
            said = file.config(f"text_encoder{suffix}")
            keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
            assert [said[key] for key in keys] == [getattr(wanted, key) for key in keys]
            assert said["eos_token_id"] == 49407


def test_a_missing_vocabulary_is_said_with_its_place(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copy(pairs["sd1"][1], path)
    kept: dict[tuple[str, str], Path] = {}
    monkeypatch.setattr(hub, "kept", lambda name, file: kept.get((name, file)))
    with pytest.raises(UserError, match="E-BASE-14") as caught:
        loaded(path)
    assert all(word in str(caught.value) for word in ("vocab.json", "merges.txt", str(path.parent / "tokenizer"), "clip-vit-large-patch14"))
    for name in ("vocab.json", "merges.txt"):
        kept["openai/clip-vit-large-patch14", name] = pairs["sd1"][1].parent / "tokenizer" / name
    assert loaded(path).tokens(["a"]).shape == (1, small.TOKENS), "what the hub's cache holds is taken"


def test_only_files_that_are_there_are_had_from_the_hubs_cache() -> None:
    assert hub.kept("nobody/nothing", "vocab.json") is None


# ---------------------------------------------------------------- what is wrong with a base


def in_json(name: str, **fields: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        table = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**table, **fields}))

    return damage


def in_weights(change: Callable[[dict[str, torch.Tensor]], Any], part: str = "unet") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (path,) = (folder / part).glob("*.safetensors")
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file(tensors, path, {"format": "pt"})

    return damage


def in_file(name: str, change: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda folder: change(folder / name) and None


class Evil:
    def __reduce__(self) -> Any:
        return Path.write_text, (Path("ran"), "it")


def only_pickles(content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (path,) = (folder / "unet").glob("*.safetensors")
        path.unlink()
        path.with_suffix(".bin").write_bytes(content)

    return damage


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def halved(tensors: dict[str, torch.Tensor]) -> None:
    for name in sorted(tensors)[::2]:
        tensors[name] = tensors[name].half()


def grown(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("token_embedding.weight"))
    tensors[name] = torch.cat([tensors[name], tensors[name][:3]])


def regrown(folder: Path) -> None:
    in_json("text_encoder/config.json", vocab_size=len(small.new_tokenizer()) + 3)(folder)
    in_weights(grown, "text_encoder")(folder)


UNET = "unet/diffusion_pytorch_model.safetensors"
FIRST = "conv_in.weight"
BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "an empty folder": ("E-BASE-02", emptied, ""),
    "a config that is no JSON": ("E-BASE-05", in_file("unet/config.json", lambda path: path.write_text("{")), "unet/config.json"),
    "a config that is a list": ("E-BASE-05", in_file("vae/config.json", lambda path: path.write_text("[]")), "vae/config.json"),
    "a config that is missing": ("E-BASE-05", in_file("unet/config.json", Path.unlink), "unet/config.json"),
    "a size that is text": ("E-BASE-05", in_json("unet/config.json", sample_size="large"), "large"),
    "a part that is a number": ("E-BASE-05", in_json("model_index.json", text_encoder=5), ""),
    "no groups": ("E-BASE-04", in_json("unet/config.json", norm_num_groups=0), ""),
    "text for a number": ("E-BASE-04", in_json("unet/config.json", cross_attention_dim="wide"), ""),
    "another class": ("E-BASE-10", in_json("unet/config.json", _class_name="UNet3DConditionModel"), "unet/config.json"),
    "another text encoder": (
        "E-BASE-10",
        in_json("text_encoder/config.json", architectures=["T5EncoderModel"]),
        "text_encoder/config.json",
    ),
    "weights cut short": ("E-BASE-05", in_file(UNET, lambda path: path.write_bytes(path.read_bytes()[:-1000])), UNET),
    "weights cut in the header": ("E-BASE-05", in_file(UNET, lambda path: path.write_bytes(path.read_bytes()[:1000])), UNET),
    "weights of no bytes": ("E-BASE-05", in_file(UNET, lambda path: path.write_bytes(b"")), UNET),
    "a missing tensor": ("E-BASE-07", in_weights(lambda t: t.pop(FIRST)), FIRST),
    "a missing tensor of the text": ("E-BASE-07", in_weights(lambda t: t.pop(sorted(t)[-1]), "text_encoder"), "text_encoder"),
    "no weights": ("E-BASE-07", in_file(UNET, Path.unlink), "unet"),
    "NaN": ("E-BASE-13", in_weights(lambda t: t[FIRST].view(-1).__setitem__(3, float("nan"))), FIRST),
    "infinity in the autoencoder": ("E-BASE-13", in_weights(lambda t: t["quant_conv.bias"].fill_(float("inf")), "vae"), "quant_conv"),
    "only pickles": ("E-BASE-08", only_pickles(pickle.dumps({"a": 1})), ".bin"),
    "an evil pickle": ("E-BASE-08", only_pickles(pickle.dumps(Evil())), ".bin"),
    "code": ("E-BASE-09", in_file("unet/my_unet.py", lambda path: path.write_text("open('ran', 'w')")), "my_unet.py"),
    "a class that is a list": ("E-BASE-03", in_json("model_index.json", _class_name=["StableDiffusionPipeline", "my_pipeline"]), ""),
    "a class of the system": ("E-BASE-10", in_json("model_index.json", unet=["os", "system"]), "unet"),
    "two precisions": ("E-BASE-11", in_weights(halved), "unet"),
    "two revisions": ("E-BASE-04", in_weights(lambda t: t.update({FIRST: t[FIRST][:-1].contiguous()})), ""),
    "another tokenizer": ("E-BASE-12", regrown, "tokenizer"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_base_is_said_before_anything_is_written(
    name: str, base: Path, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, out = small.copy_base(base, tmp_path / "base"), tmp_path / "run"
    code, damage, named = BAD[name]
    damage(folder)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        list(api.train(small.settled(squares, folder), out))
    said = str(caught.value)
    assert said.startswith(code)
    assert caught.value.exit_code == BAD_INPUT
    assert str(folder) in said
    assert named in said
    assert len(said.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "nothing was written or run"


FILE_BAD: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any]]] = {
    "no text encoder": ("E-BASE-02", lambda t: [t.pop(name) for name in list(t) if name.startswith("cond_stage_model.")]),
    "a missing tensor": ("E-BASE-07", lambda t: t.pop("model.diffusion_model.out.2.weight")),
    "a missing tensor that tells the structure": ("E-BASE-07", lambda t: t.pop("model.diffusion_model.middle_block.1.proj_in.weight")),
    "NaN": ("E-BASE-13", lambda t: t["model.diffusion_model.out.2.bias"].fill_(float("nan"))),
    "an autoencoder of another shape": ("E-BASE-07", lambda t: t.update({"first_stage_model.quant_conv.bias": torch.zeros(9)})),
}


@pytest.mark.parametrize("name", FILE_BAD)
def test_what_is_wrong_with_a_file_is_said(name: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    (code, damage), whole_file = FILE_BAD[name], pairs["sd1"][1]
    tensors = safetensors.torch.load_file(whole_file)
    damage(tensors)
    shutil.copytree(whole_file.parent / "tokenizer", tmp_path / "tokenizer")
    safetensors.torch.save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=code) as caught:
        loaded(tmp_path / "bad.safetensors")
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickled_checkpoints_are_refused_with_the_way_to_convert_them(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"E-BASE-08.*never opened.*save_pretrained"):
        family.find(str(path))


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, pack_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello, this is no model at all")
    for path, code in ((tmp_path / "a.txt", "E-BASE-05"), (pack_path, "E-BASE-02")):
        with pytest.raises(UserError, match=code):
            family.find(str(path))


def test_a_folder_with_half_precision_weights_alone_is_read(base: Path, tmp_path: Path) -> None:
    folder = small.copy_base(base, tmp_path / "base")
    for path in [*folder.glob("*/*.safetensors")]:
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    one, two = loaded(base), loaded(folder)
    assert all(torch.equal(a, b) for a, b in zip(one.unet.state_dict().values(), two.unet.state_dict().values(), strict=True))  # type: ignore[attr-defined]


# ---------------------------------------------------------------- inspect


def test_inspect_says_what_a_base_is(base: Path, tmp_path: Path) -> None:
    found = api.inspect_base(str(base))
    assert (found["family"], found["prediction"], found["complete"]) == ("sd1", "epsilon", True)
    assert found["components"]["unet"]["precision"] == "F32"
    (weights,) = (base / "unet").glob("*.safetensors")
    assert found["components"]["unet"]["parameters"] == sum(torch.Size(one["shape"]).numel() for one in header(weights)[0].values())
    assert found["components"]["unet"]["sha256"] == Folder(base).fingerprint("unet")
    told = CliRunner().invoke(app, ["base", "inspect", str(base)])
    assert told.exit_code == 0
    assert "complete" in told.output
    folder = small.copy_base(base, tmp_path / "bad")
    BAD["NaN"][1](folder)
    told = CliRunner().invoke(app, ["base", "inspect", str(folder), "--json"])
    assert told.exit_code == BAD_INPUT
    assert "E-BASE-13" in json.loads(told.stdout)["problem"]
