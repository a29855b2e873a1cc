"""A base read otherwise than by default: another autoencoder, another layer of the text encoder, long captions, a revision of the hub."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bases
import huggingface_hub
import pytest
import small
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from huggingface_hub.errors import RevisionNotFoundError
from safetensors.torch import save_file

from sdlora import api, family, generate, hub, source
from sdlora.data import cache
from sdlora.data.store import Store
from sdlora.errors import UserError
from sdlora.family import Family, Reading
from sdlora.studio import Studio

CPU = torch.device("cpu")
LONG = "a red ball and a blue cube, "


def loaded(folder: Path, vae: object = "", **text: int) -> Family:
    return family.load(family.find(str(folder), str(vae), Reading(**text)), CPU, torch.float32)


# ---------------------------------------------------------------- autoencoder


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One and the same autoencoder for the families' bases, as it may lie on a disk."""
    place = tmp_path_factory.mktemp("vaes")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        vae = bases.autoencoder(0.5)
    vae.save_pretrained(place / "other-vae")
    original = {bases.vae_name(name): t[:, :, None, None] if t.ndim == 2 and ".to_" in name else t for name, t in vae.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in original.items()}, place / "alone.safetensors")
    save_file({f"first_stage_model.{name}": tensor.contiguous() for name, tensor in original.items()}, place / "inside.safetensors")
    vae.save_pretrained(place / "pipeline" / "vae")
    index = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (place / "pipeline" / "model_index.json").write_text(json.dumps(index))
    return {
        "folder": place / "other-vae", "pipeline": place / "pipeline", "alone": place / "alone.safetensors",
        "inside": place / "inside.safetensors", "weights": place / "other-vae" / "diffusion_pytorch_model.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "kinds"), [("sd1", ("folder", "pipeline", "alone", "inside", "weights")), ("sdxl", ("alone",))])
def test_an_autoencoder_is_the_same_however_it_lies(
    families: dict[str, Path], vaes: dict[str, Path], name: str, kinds: tuple[str, ...]
) -> None:
    plain, pixels = loaded(families[name]), small.numbers((1, 3, 64, 64)).clamp(-1, 1)
    theirs = AutoencoderKL.from_pretrained(vaes["folder"])
    wanted = theirs.encode(pixels).latent_dist.mean
    for kind in kinds:
        path = vaes[kind]
        own = loaded(families[name], path)
        scale = plain.vae.config.scaling_factor if path.suffix and kind != "weights" else 0.5  # type: ignore[attr-defined]
        torch.testing.assert_close(own.encode(pixels)[0], wanted * scale, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own.decode(wanted * scale), theirs.decode(wanted).sample, rtol=1e-3, atol=1e-4)
        assert own.base.fingerprint("vae") != plain.base.fingerprint("vae")
        assert own.base.fingerprint("unet") == plain.base.fingerprint("unet")
    assert (plain.encode(pixels)[0] - wanted * 0.5).abs().max() > 0.1, "the control"


@pytest.mark.slow
def test_another_autoencoder_is_taken_for_training_and_its_pictures(
    families: dict[str, Path], vaes: dict[str, Path], squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(vaes["folder"].parent)
    options = {"train__steps": 1, "data__resolution_px": 64, "preview__scales": [0.0], "preview__steps": 1}
    run = small.settled(squares, families["sd1"], vae="other-vae", **options)
    assert run.vae == str(vaes["folder"]), "it is found again from anywhere"
    list(api.train(run, tmp_path / "run"))
    list(api.train(small.settled(squares, families["sd1"], **options), tmp_path / "plain"))
    strips = [(tmp_path / name / "strip.png").read_bytes() for name in ("run", "plain")]
    assert strips[0] != strips[1]
    pack, plain = (api.open_pack(tmp_path / name / "mira.safetensors") for name in ("run", "plain"))
    assert any(not torch.equal(tensor, plain.tensors[key]) for key, tensor in pack.tensors.items())
    assert pack.metadata["sdlora.vae"] == json.loads(pack.metadata["sdlora.config"])["vae"] == "other-vae"
    assert pack.metadata["sdlora.vae_sha256"] == source.Folder(vaes["pipeline"]).fingerprint("vae")
    assert "sdlora.vae" not in plain.metadata
    assert str(tmp_path.anchor) not in json.loads(pack.metadata["sdlora.config"])["vae"]
    with pytest.raises(UserError, match=r"E-RUN-02.*vae was"):
        list(api.train(small.settled(squares, families["sd1"], **options), tmp_path / "run"))
    studio = api.open_studio([pack], str(families["sd1"]), "other-vae")
    assert studio.family.base.fingerprint("vae") == pack.metadata["sdlora.vae_sha256"]


def wide(folder: Path) -> Path:
    AutoencoderKL(latent_channels=16, block_out_channels=(32,)).save_pretrained(folder)
    return folder


def shallow(folder: Path) -> Path:
    AutoencoderKL(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
                  ).save_pretrained(folder)  # fmt: skip
    return folder


def shifted(folder: Path) -> Path:
    bases.autoencoder(0.5).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shift_factor": 0.1}))
    return folder


def pickled(folder: Path) -> Path:
    folder.mkdir()
    (folder / "vae.ckpt").write_bytes(b"x")
    return folder / "vae.ckpt"


def of_another_class(folder: Path) -> Path:
    bases.autoencoder(0.5).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "AutoencoderTiny"}))
    return folder


WRONG: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "16 channels": ("E-VAE-02.*16 channels.*reads 4", wide),
    "another factor": ("E-VAE-02.*2 px a side.*8", shallow),
    "shifted latents": ("E-VAE-02.*shifted", shifted),
    "a pickle": ("E-BASE-08", pickled),
    "another class": ("E-BASE-10.*AutoencoderTiny", of_another_class),
    "an empty folder": ("E-VAE-03", lambda folder: folder.mkdir() or folder),
    "nothing": ("E-VAE-03.*no hub id", lambda _: Path("nothing-there")),
    "out of reach": ("E-VAE-04", lambda _: Path("nobody/nothing")),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_autoencoder_that_does_not_suit_is_refused(name: str, families: dict[str, Path], squares: Path, tmp_path: Path) -> None:
    said, make = WRONG[name]
    with pytest.raises(UserError, match=said):
        list(api.train(small.settled(squares, families["sd1"], vae=str(make(tmp_path / "vae"))), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_pack_is_no_autoencoder(families: dict[str, Path], pack_path: Path) -> None:
    with pytest.raises(UserError, match="E-VAE-03"):
        loaded(families["sd1"], pack_path)


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("name", bases.MAKERS)
def test_a_skipped_layer_is_diffusers_clip_skip(families: dict[str, Path], name: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(families[name], dtype=torch.float32, use_safetensors=True)
    if isinstance(pipe.scheduler, EulerDiscreteScheduler):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.__dict__.setdefault("text_model", pipe.text_encoder)  # as it was called before transformers 5.6
    pictures = []
    for skip in (1, 2):
        studio = Studio.open(family.find(str(families[name]), text=Reading(clip_skip=skip)), torch.float32)
        recipe = studio.recipe("a cat", guidance=1.0, steps=2)  # in negative prompts diffusers never skips
        options = {"num_inference_steps": 2, "guidance_scale": 1.0, "width": recipe.width, "height": recipe.height, "output_type": "pt"}
        latents = generate.initial_latents(studio.family, recipe)[None]
        theirs = pipe("a cat", latents=latents, clip_skip=skip - 1 or None, **options).images
        pictures.append(studio.pixels([recipe]))
        assert (pictures[-1] - theirs).abs().max() <= 1e-4
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3, "the control"


@pytest.mark.parametrize(("name", "most"), [("sd1", 3), ("sdxl", 2)])
def test_no_more_layers_are_skipped_than_there_are(families: dict[str, Path], squares: Path, tmp_path: Path, name: str, most: int) -> None:
    loaded(families[name], clip_skip=most)
    with pytest.raises(UserError, match=f"E-TEXT-01.*1 to {most}"):
        list(api.train(small.settled(squares, families[name], text__clip_skip=most + 1), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("chunks", [0, 5])
def test_pieces_out_of_range_are_refused(squares: Path, base: Path, chunks: int) -> None:
    with pytest.raises(UserError, match=r"E-CONF-01.*text.chunks"):
        small.settled(squares, base, text__chunks=chunks)


@pytest.mark.parametrize("name", bases.MAKERS)
def test_one_piece_is_what_the_tokenizer_makes_of_a_caption(families: dict[str, Path], name: str) -> None:
    one = loaded(families[name])
    for caption in ("", "a cat", LONG * 3):
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": small.TOKENS}
        wanted = [i for tokenizer in one.tokenizers for i in tokenizer(caption, **options).input_ids]  # type: ignore[attr-defined]
        assert one.tokens([caption])[0].tolist() == wanted


@pytest.mark.parametrize("name", bases.MAKERS)
def test_a_long_caption_is_read_in_pieces(families: dict[str, Path], name: str) -> None:
    """The raw text encoders, one forward for each piece that is put together here."""
    three, words = loaded(families[name], chunks=3), small.TOKENS - 2
    encoders = [three.parts()[part] for part in ("text_encoder", "text_encoder_2") if part in three.parts()]
    for caption in ("", "a cat", LONG, LONG * 3):
        rows, pooled = [], None
        for tokenizer, encoder in zip(three.tokenizers, encoders, strict=True):  # type: ignore[attr-defined]
            ids, found = tokenizer(caption).input_ids[1:-1], []
            for piece in (ids[i * words : (i + 1) * words] for i in range(3)):
                whole = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
                whole += [tokenizer.pad_token_id] * (small.TOKENS - len(whole))
                with torch.no_grad():
                    said = raw(encoder)(torch.tensor([whole]), output_hidden_states=True)
                found.append(said.hidden_states[-2] if name == "sdxl" else said.last_hidden_state)
                pooled = said.text_embeds if pooled is None and "text_embeds" in said else pooled
            rows.append(torch.cat(found, 1))
        with torch.no_grad():
            ours = three.states(three.tokens(["another", caption]))[1:]
        wanted = torch.cat(rows, 2)
        torch.testing.assert_close(ours[:, : 3 * small.TOKENS], wanted, rtol=1e-4, atol=1e-5)
        if name == "sdxl":
            assert pooled is not None
            torch.testing.assert_close(ours[:, -1, : pooled.shape[1]], pooled, rtol=1e-4, atol=1e-5)
    assert three.too_long([LONG, LONG * 3]) == [LONG * 3], "and what is longer still is named"
    assert loaded(families[name]).too_long([LONG]) == [LONG], "the control"


def raw(encoder: Any) -> Any:
    """The text encoder as transformers made it."""
    return encoder.text_model if type(encoder).__name__ == "ModuleDict" else encoder


def test_states_of_another_reading_are_not_taken_from_the_cache(families: dict[str, Path]) -> None:
    store = Store()
    read = [cache.states(one.tokens(["a cat"]), one, store) for one in (loaded(families["sd1"], clip_skip=skip) for skip in (1, 2, 1))]
    assert torch.equal(read[0], read[2])
    assert not torch.equal(read[0], read[1])


@pytest.mark.slow
def test_a_pack_says_how_prompts_are_read(families: dict[str, Path], squares: Path, tmp_path: Path) -> None:
    options = {"train__steps": 1, "data__resolution_px": 64, "train__text_encoder_lr": 0.0}
    for name, text in (("plain", {}), ("read", {"text__clip_skip": 2, "text__chunks": 2})):
        list(api.train(small.settled(squares, families["sdxl"], name=name, **text, **options), tmp_path / name))
    plain, read = (api.open_pack(tmp_path / name / f"{name}.safetensors") for name in ("plain", "read"))
    assert (plain.metadata["ss_clip_skip"], read.metadata["ss_clip_skip"]) == ("None", "2")
    studio = api.open_studio([read], str(families["sdxl"]))
    assert studio.family.base.text == Reading(2, 2)
    assert studio.cut_prompts([LONG]) == [], "a long prompt is read to its end"
    assert studio.otherwise_read() == []
    studio.add(plain)
    assert (studio.family.base.text, studio.otherwise_read()) == (Reading(2, 2), ["plain"]), "the first pack counts"
    studio.remove("read")
    assert studio.family.base.text == Reading()
    broken = api.Pack("x", {}, {"sdlora.config": '{"text": {"clip_skip": 99, "chunks": "many"}}'})
    assert broken.reading is None


# ---------------------------------------------------------------- the hub

OTHERS = ["README.md", "v1.ckpt", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.non_ema.safetensors",
          "safety_checker/model.safetensors", "vae_1_0/diffusion_pytorch_model.safetensors", "text_encoder/model.onnx"]  # fmt: skip


class Hub:
    """A hub with one model in two revisions, and a cache of what was asked for."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache, self.asked, self.online = folder, cache, list[list[str]](), True

    def list_repo_files(self, place: str, revision: str | None = None) -> list[str]:
        if not self.online:
            raise ConnectionError("no network")
        if place != "owner/name" or revision not in (None, "v2"):
            response = type("Response", (), {"headers": {}, "request": None})()
            raise RevisionNotFoundError("404", response=response)  # type: ignore[arg-type]
        return [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]

    def snapshot_download(
        self, place: str, revision: str | None = None, allow_patterns: Sequence[str] = (), local_files_only: bool = False
    ) -> str:
        assert place == "owner/name"
        snapshot = self.cache / f"commit-{revision or 'main'}"
        if self.online and not local_files_only:
            self.asked.append(sorted(allow_patterns))
            for name in allow_patterns:
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.folder / name, snapshot / name)
        elif not snapshot.is_dir():
            raise FileNotFoundError("not in the cache")
        return str(snapshot)


@pytest.fixture
def stub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    folder = small.copy_base(base, tmp_path / "repo")
    for name in OTHERS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    for path in [*folder.glob("unet/diffusion_pytorch_model.safetensors"), *folder.glob("text_encoder/model.safetensors")]:
        shutil.copy(path, path.with_name(f"{path.stem}.fp16.safetensors"))
    made = Hub(folder, tmp_path / "snapshots")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


@pytest.mark.parametrize("half", [False, True])
def test_only_one_version_of_the_weights_is_downloaded(stub: Hub, half: bool) -> None:
    found = family.find("owner/name", half=half)
    (asked,) = stub.asked
    weights = [name for name in asked if name.endswith(".safetensors")]
    mark = ".fp16" if half else ""
    assert weights == [f"text_encoder/model{mark}.safetensors", f"unet/diffusion_pytorch_model{mark}.safetensors",
                       "vae/diffusion_pytorch_model.safetensors"]  # fmt: skip
    assert not set(asked) & set(OTHERS)
    assert {"model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"} <= set(asked)
    assert (found.name, found.revision) == ("owner/name", "commit-main")
    family.load(found, CPU, torch.float32)


def test_a_base_is_the_same_whatever_else_was_downloaded(stub: Hub) -> None:
    path = stub.folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    save_file({"other": torch.zeros(1)}, path)
    before = family.find("owner/name", half=False).fingerprint("unet")
    other = family.find("owner/name", half=True).fingerprint("unet")
    assert family.find("owner/name", half=False).fingerprint("unet") == before != other


@pytest.mark.usefixtures("stub")
def test_a_revision_is_taken_and_recorded(squares: Path, tmp_path: Path) -> None:
    run = small.settled(squares, Path("owner/name@v2"), train__steps=1)
    assert run.base == "owner/name@v2"
    list(api.train(run, tmp_path / "run"))
    pack = api.open_pack(tmp_path / "run" / "mira.safetensors")
    assert (pack.base, pack.metadata["sdlora.base_revision"]) == ("owner/name@v2", "commit-v2")
    assert api.open_studio([pack]).family.base.revision == "commit-v2"
    assert api.inspect_base("owner/name@v2")["revision"] == "commit-v2"
    with pytest.raises(UserError, match=r'E-BASE-06.*no revision "v3"'):
        small.settled(squares, Path("owner/name@v3"))


def test_without_a_network_what_was_downloaded_is_taken(stub: Hub) -> None:
    before = family.find("owner/name@v2", half=True)
    stub.online = False
    for half in (True, False):
        assert family.find("owner/name@v2", half=half).fingerprint("unet") == before.fingerprint("unet")
    with pytest.raises(UserError, match=r"E-BASE-06.*no network"):
        family.find("owner/name@v3")


def test_a_model_with_pickled_weights_alone_is_not_downloaded(stub: Hub) -> None:
    for path in stub.folder.glob("unet/*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match=r"E-BASE-08.*unet/diffusion_pytorch_model.bin"):
        family.find("owner/name")
    assert stub.asked == []


def test_an_autoencoder_comes_from_the_hub(stub: Hub, base: Path) -> None:
    assert family.find(str(base), "owner/name").vae == "owner/name"
    assert stub.asked == [["model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]]
    for path in [*stub.folder.glob("vae/*")]:
        shutil.move(path, stub.folder / path.name)
    (stub.folder / "model_index.json").unlink()
    family.load(family.find(str(base), "owner/name@v2"), CPU, torch.float32)
    assert stub.asked[1] == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_shards_are_taken_whole_with_their_index() -> None:
    shards = [f"unet/diffusion_pytorch_model{mark}-0000{i}-of-00002.safetensors" for mark in ("", ".fp16") for i in (1, 2)]
    index = ["unet/diffusion_pytorch_model.safetensors.index.json"]
    for half in (False, True):
        assert source.needed([*shards, *index], half) == index + shards[2 * half : 2 * half + 2]
    assert hub.is_id("owner/name@refs/pr/3")
    assert not hub.is_id("owner/name/more")
