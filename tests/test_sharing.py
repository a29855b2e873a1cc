"""Packs in others' hands: what a header tells and what it must not, hashes, edits, bundles, the hub, and packs on pipelines."""

import base64
import hashlib
import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import small
import torch
import yaml
from click.testing import Result
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from typer.testing import CliRunner

from sdlora import api, export, family, hub, lookup, sharing
from sdlora.adapter import Bank
from sdlora.cli import app
from sdlora.config import Packing
from sdlora.errors import BAD_INPUT, UserError
from sdlora.packs import bundle, card, file, header, metadata, privacy, sheet
from sdlora.packs.privacy import Secrets


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose pictures have telling names and captions."""
    root = tmp_path_factory.mktemp("hidden-place")
    folder = small.draw_folder(root / "secret-pictures")
    for i, path in enumerate(sorted(folder.glob("*.png"))):
        path.rename(folder / f"holiday-{i}.png")
    for i, path in enumerate(sorted(folder.glob("*.txt"))):
        path.unlink()
        (folder / f"holiday-{i}.txt").write_text(f"grandmother, on the beach {i}", encoding="utf-8")
    settled = small.settled(folder, base, train__steps=1, preview__scales=[0.0, 1.0], preview__steps=1, **LETTERED)
    list(api.train(settled, root / "runs" / "one"))
    return root / "runs" / "one"


LETTERED: dict[str, Any] = {
    "pack__title": "Mira the ball",
    "pack__author": "A. Painter",
    "pack__description": "A ball that is called Mira.",
    "pack__license": "cc-by-4.0",
    "pack__tags": ["ball", "round"],
    "pack__recommended_scale": 0.75,
}


@pytest.fixture
def made(run: Path, tmp_path: Path) -> Path:
    """A copy of its pack, away from the run."""
    return Path(shutil.copy(run / "mira.safetensors", tmp_path / "mira.safetensors"))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def data_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


# ---------------------------------------------------------------- what a header says


def test_fields_are_typed_as_programs_read_them(run: Path) -> None:
    said = file.load(run / "mira.safetensors").metadata
    assert said["modelspec.title"] == "Mira the ball"
    assert (said["modelspec.author"], said["modelspec.license"]) == ("A. Painter", "cc-by-4.0")
    assert said["modelspec.tags"] == "ball, round"
    assert float(said["sdlora.recommended_scale"]) == 0.75
    assert said["trained_words"] == said["modelspec.trigger_phrase"] == "mira"
    counts = json.loads(said["ss_dataset_dirs"])
    assert sum(int(one["img_count"]) for one in counts.values()) == 5
    whole = ("ss_steps", "ss_epoch", "ss_num_epochs", "ss_num_batches_per_epoch", "ss_total_batch_size", "ss_keep_tokens", "ss_network_dim")
    assert all(int(said[key]) >= 0 for key in whole)
    assert all(float(said[key]) > 0 for key in ("ss_training_started_at", "ss_training_finished_at", "ss_learning_rate"))
    assert {said[key] for key in ("ss_v2", "ss_shuffle_caption", "ss_flip_aug", "ss_enable_bucket")} <= {"True", "False"}
    (cover,) = json.loads(said["ssmd_cover_images"])
    assert said["modelspec.thumbnail"] == f"data:image/jpeg;base64,{cover}"
    assert said["modelspec.date"][10] == "T"


TELLING = {  # of each setting of a pack: another value, and the field that shows it
    "title": ("Ball", "modelspec.title"),
    "author": ("B", "modelspec.author"),
    "description": ("Another.", "modelspec.description"),
    "license": ("mit", "modelspec.license"),
    "tags": (["blue"], "modelspec.tags"),
    "recommended_scale": (0.5, "sdlora.recommended_scale"),
    "privacy": ("shared", "ss_tag_frequency"),
    "thumbnail": (False, "modelspec.thumbnail"),
    "force": (True, "sdlora.warnings"),
}
"""Layouts, precision and embeddings show in the tensors: test_writing and test_words."""


@pytest.mark.parametrize("name", sorted(Packing.model_fields.keys() - {"layouts", "dtype", "embeddings_inside"}))
def test_every_setting_of_a_pack_shows_in_its_header(name: str, loaded: family.Family, base: Path, pictures: Path) -> None:
    value, key = TELLING[name]
    hidden = Secrets(tags={"1_pictures": {"ball": 1}})
    shown = {}
    for given in (None, value):
        settled = small.settled(pictures, base, **({f"pack__{name}": given} if given is not None else {}))
        wrong = ["one reader"] if settled.pack.force else []
        facts = metadata.Facts(1, 1, 0.0, 0.0, {}, Image.new("RGB", (8, 8)), hidden, wrong)
        shown[given is None] = metadata.describe(settled, loaded, facts, "0" * 64).get(key)
    assert shown[True] != shown[False]


def test_tags_are_counted_in_two_levels(base: Path, run: Path) -> None:
    hidden = Secrets(tags={"1_secret": {"ball": 2, "on grass": 1}, "3_other": {"ball": 1}}, pictures={"1_secret": 2, "3_other": 1})
    facts = metadata.Facts(3, 1, 0.0, 0.0, {}, hidden=hidden)
    for level, wanted in (
        ("public", None),
        ("shared", {"mira": {"ball": 3, "on grass": 1}}),
        ("full", {"1_secret": {"ball": 2, "on grass": 1}, "3_other": {"ball": 1}}),
    ):
        said = metadata.of_run(small.settled(run, base, pack__privacy=level), "base", facts)
        assert json.loads(said.get("ss_tag_frequency", "null")) == wanted
        assert ("1_secret" in said["ss_dataset_dirs"]) == (level == "full")


# ---------------------------------------------------------------- what it must not tell


def hidden_of() -> Secrets:
    names = {f"holiday-{i}" for i in range(5)} | {"secret-pictures"}
    return Secrets(frozenset(names), frozenset(f"grandmother, on the beach {i}" for i in range(3)))


def test_a_pack_tells_nothing_of_the_pictures(run: Path) -> None:
    said = file.load(run / "mira.safetensors").metadata
    assert privacy.leaks(said, hidden_of(), "public") == []
    assert "hidden-place" not in json.dumps(said)


LEAKS: dict[str, tuple[str, str]] = {
    "a path": ("modelspec.description", "made in /home/someone/pictures of it"),
    "a path of Windows": ("ss_training_comment", "C:\\Users\\someone\\x.png"),
    "a home": ("modelspec.author", "see ~/pictures/one"),
    "a network disk": ("modelspec.author", "\\\\server\\share"),
    "a path inside JSON": ("sdlora.config", json.dumps({"data": {"deep": ["/mnt/disk/pictures"]}})),
    "a file's name": ("modelspec.usage_hint", "like holiday-3.png"),
    "a folder's name": ("ss_dataset_dirs", json.dumps({"1_x": {}, "secret-pictures": {}})),
    "a caption": ("ss_training_comment", "Grandmother, on the beach 1"),
    "a caption inside JSON": ("sdlora.config", json.dumps({"preview": {"prompts": ["mira, grandmother, on the beach 2"]}})),
    "tags": ("ss_tag_frequency", "{}"),
    "no picture": ("modelspec.thumbnail", "data:image/jpeg;base64,L2hvbWUv"),
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_would_be_found(name: str, run: Path) -> None:
    key, value = LEAKS[name]
    said = {**file.load(run / "mira.safetensors").metadata, key: value}
    found = privacy.leaks(said, hidden_of(), "public")
    assert found
    assert all(line.startswith(key) for line in found)
    assert privacy.leaks(said, hidden_of(), "full") == []
    allowed = name in ("a caption", "a caption inside JSON", "tags")
    assert (privacy.leaks(said, hidden_of(), "shared") == []) == allowed


def test_addresses_and_patterns_are_no_paths() -> None:
    said = {"a": "https://example.org/one/two", "b": "owner/name", "c": "unet.*.attn2/to_q", "d": "1/2 and 3/4", "e": "image/jpeg"}
    assert privacy.leaks(said, Secrets(), "public") == []


def test_a_thumbnail_with_a_cameras_notes_is_noticed() -> None:
    notes = Image.Exif()
    notes[271] = "A camera"
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", exif=notes)
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    assert privacy.leaks({"modelspec.thumbnail": url}, Secrets(), "public")


def test_a_run_that_would_tell_is_stopped_before_it_trains(base: Path, pictures: Path, tmp_path: Path) -> None:
    settled = small.settled(pictures, base, pack__description="from /home/someone/pictures of mine")
    with pytest.raises(UserError, match="E-PACK-09"):
        list(api.train(settled, tmp_path / "run"))
    told = [event["kind"] for event in api.events(tmp_path / "run")[0]]
    assert told[-1] == "failed"
    assert "step" not in told
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_prompts_that_are_captions_are_left_out(base: Path, pictures: Path) -> None:
    settled = small.settled(pictures, base, preview__prompts=["mira, grandmother asleep", "a house"])
    told = metadata.public(settled, "base", Secrets(captions=frozenset({"grandmother asleep"})))
    assert told["preview"]["prompts"] == ["a house"]


# ---------------------------------------------------------------- silent misreadings stop an export


def dora_of(loaded: family.Family, axis: str) -> dict[str, torch.Tensor]:
    kind = lookup.find("adapters", "dora")
    bank = Bank(loaded.components)
    names = list(small.matching(loaded, kind, ["unet.*.attn2.to_k"]))
    bank.add("x", dict.fromkeys(names, (kind, kind.Config(rank=2, alpha=1.0, axis=axis))), small.stream_of)
    tensors = file.tensors_of(bank, "x", loaded)
    bank.eject()
    return tensors


def test_what_would_be_misread_is_not_written_unless_forced(
    loaded: family.Family, base: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(loaded), "architecture", lambda _: {"ss_base_model_version": "sd_v1"})
    usual, forced = (small.settled(pictures, base, pack__force=force) for force in (False, True))
    facts = metadata.Facts(1, 1, 0.0, 0.0, {})
    with pytest.raises(UserError, match="E-PACK-08") as caught:
        export.describing(usual, loaded, dora_of(loaded, "out"), facts)
    assert "adapter.axis" in str(caught.value)
    describe, told = export.describing(forced, loaded, dora_of(loaded, "out"), facts)
    assert [one.partition(":")[0] for one in json.loads(describe("0" * 64)["sdlora.warnings"])] == ["AUTOMATIC1111", "Forge", "ComfyUI"]
    assert [event.kind for event in told].count("warning") == 3
    describe, told = export.describing(usual, loaded, dora_of(loaded, "in"), facts)
    assert [event.kind for event in told] == ["note"], "the control: nothing is wrong with the other axis"
    assert "sdlora.warnings" not in describe("0" * 64)


def test_a_run_says_who_opens_its_pack(run: Path) -> None:
    notes = [json.loads(line).get("text", "") for line in (run / "events.jsonl").read_text().splitlines()]
    assert any(note.startswith("the pack: it opens in diffusers") for note in notes)


# ---------------------------------------------------------------- hashes and edits


def test_hashes_are_those_of_the_definitions(tmp_path: Path) -> None:
    tensors = {"lora_unet_x.lora_up.weight": torch.arange(400_000, dtype=torch.float32), "lora_unet_a.alpha": torch.ones(())}
    said = {"ss_seed": "1", "modelspec.title": "A"}
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors.torch.save(tensors, said))
    content = path.read_bytes()
    found = header.hashes(content, said)
    window = content[0x100000:0x110000]
    assert len(window) == 0x10000
    assert found["AutoV1"] == hashlib.sha256(window).hexdigest()[:8]
    assert found["SHA256"][:10] == found["AutoV2"] == hashlib.sha256(content).hexdigest()[:10]
    assert found["AutoV3"] == hashlib.sha256(data_of(path)).hexdigest()[:12]
    alone = safetensors.torch.save(tensors, {"ss_seed": "1"})
    assert header.legacy_hash(tensors, said) == hashlib.sha256(alone[0x100000:0x110000]).hexdigest()[:8]
    assert header.legacy_hash(tensors, {**said, "ss_seed": "22222222222222222"}) != header.legacy_hash(tensors, said)
    small_one = safetensors.torch.save({"a": torch.ones(1)}, {})
    assert header.hashes(small_one, {})["AutoV1"] == header.legacy_hash({"a": torch.ones(1)}, {}) == "e3b0c442"


def test_a_packs_own_hashes_are_true(run: Path) -> None:
    path = run / "mira.safetensors"
    found = api.about_pack(path)["hashes"]
    assert found["sshs_model_hash (said)"] == found["data"] == found["modelspec.hash_sha256 (said)"][2:]
    assert found["AutoV3"] == found["data"][:12]
    assert found["sshs_legacy_hash (said)"] == header.legacy_hash(file.load(path).tensors, file.load(path).metadata)


def test_an_edit_leaves_every_byte_of_the_tensors(made: Path, tmp_path: Path) -> None:
    before, hashed = data_of(made), api.about_pack(made)["hashes"]
    picture = tmp_path / "look.png"
    Image.new("RGB", (600, 300), "red").save(picture)
    done = call("pack", "edit", made, "--set", "modelspec.title=Ü, the ball", "--set", "modelspec.tags=", "--trigger", "miru",
                "--scale", "0.5",
                "--thumbnail", picture)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert data_of(made) == before
    content = made.read_bytes()
    assert content[8:10] == b'{"'
    assert int.from_bytes(content[:8], "little") % 8 == 0
    pack = api.open_pack(made)
    assert (pack.trigger, pack.recommended_scale, pack.metadata["modelspec.title"]) == ("miru", 0.5, "Ü, the ball")
    assert "modelspec.tags" not in pack.metadata
    assert metadata.picture_of(pack.metadata["modelspec.thumbnail"]).size == (256, 128)
    after = api.about_pack(made)["hashes"]
    assert after["AutoV3"] == hashed["AutoV3"]
    assert after["AutoV2"] != hashed["AutoV2"]
    assert safetensors.torch.load(content).keys() == pack.tensors.keys()


@pytest.mark.parametrize("setting", ["sshs_model_hash=1", "modelspec.hash_sha256=x", "sdlora.adapter=dora", "Not A Key=1", "nothing"])
def test_what_follows_from_the_tensors_cannot_be_set(setting: str, made: Path) -> None:
    before = made.read_bytes()
    done = call("pack", "edit", made, "--set", setting)
    assert done.exit_code == BAD_INPUT
    assert "E-PACK-10" in done.stderr
    assert made.read_bytes() == before


def test_inspect_and_check_show_tables(made: Path, base: Path) -> None:
    shown = call("pack", "inspect", made)
    assert shown.exit_code == 0, shown.output
    assert all(word in shown.output for word in ("kohya", "AutoV3", "Mira the ball", "lora"))
    table = json.loads(call("pack", "inspect", made, "--json").stdout)
    assert (table["kind"], table["layout"], table["ranks"], table["alphas"]) == ("lora", "kohya", [2], [16.0])
    assert (table["base"], table["trigger"], table["scale"], table["privacy"]) == ("small-base", "mira", 0.75, "public")
    unknown = call("pack", "check", made)
    assert unknown.exit_code == BAD_INPUT
    assert "--base" in unknown.stderr
    checked = call("pack", "check", made, "--base", base)
    assert checked.exit_code == 0, checked.output
    assert "not applicable" in checked.output
    rows = json.loads(call("pack", "check", made, "--base", base, "--json").stdout)
    assert [row["verdict"] for row in rows] == ["opens", *["not applicable"] * 5]
    assert rows[0]["matched"] == rows[0]["modules"] == len(sheet.sheet(file.load(made).tensors, {}).modules)


# ---------------------------------------------------------------- bundles


@pytest.fixture(scope="module")
def bundled(run: Path) -> dict[str, bytes]:
    return bundle.files(run / "mira.safetensors", bundle.Gallery(None, {}))


def test_a_bundle_has_what_each_program_wants(run: Path, tmp_path: Path) -> None:
    done = call("pack", "bundle", run, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"mira.safetensors", "mira.preview.png", "mira-strip.png", "mira.json", "README.md", "SHA256SUMS"}
    assert (tmp_path / "out" / "mira.safetensors").read_bytes() == (run / "mira.safetensors").read_bytes()
    side = json.loads((tmp_path / "out" / "mira.json").read_text())
    assert side["activation text"] == "mira"
    assert side["preferred weight"] == 0.75
    assert {"description", "sd version", "notes", "negative text"} <= side.keys()
    for picture in ("mira.preview.png", "mira-strip.png"):
        with Image.open(tmp_path / "out" / picture) as shown:
            assert shown.info == {}, "a picture carries nothing but what it shows"
    for line in (tmp_path / "out" / "SHA256SUMS").read_text().splitlines():
        digest, _, name = line.partition("  ")
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest


def test_the_cards_front_matter_is_what_the_hub_reads(run: Path) -> None:
    pack = file.load(run / "mira.safetensors")
    told = file.Pack("mi: ra", pack.tensors, {**pack.metadata, "sdlora.base": "owner/base", "ss_base_model_version": "sdxl_base_v1-0"})
    text = card.model_card(told, [("mira.preview.png", 'mira, "red": [x]')])
    _, front, body = text.split("---\n", 2)
    table = yaml.safe_load(front)
    assert table["base_model"] == "owner/base"
    assert table["license"] == "cc-by-4.0"
    assert table["instance_prompt"] == "mira"
    assert table["widget"] == [{"text": 'mira, "red": [x]', "output": {"url": "mira.preview.png"}}]
    assert {"lora", "text-to-image", "template:sd-lora", "ball", "stable-diffusion-xl"} <= set(table["tags"])
    assert "<Gallery />" in body
    assert card.web_version(sheet.sheet(told.tensors, told.metadata)).endswith("XL")


def test_a_folder_called_as_a_word_of_every_card_is_no_secret(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.toml"
    for name, tells in (("pictures", False), ("mira.safetensors is secret", False), ("grandmother", True)):
        config.write_text(re.sub(r"(?m)^folder = .*$", f'folder = "/somewhere/{name}"', config.read_text()))
        if not tells:
            assert sharing.bundled(tmp_path / "run")["README.md"]
            continue
        api.edit_pack(tmp_path / "run" / "mira.safetensors", {"modelspec.usage_hint": "as my grandmother"})
        with pytest.raises(UserError, match="E-PACK-09"):
            sharing.bundled(tmp_path / "run")


def test_a_zip_is_the_same_bytes_every_time(bundled: dict[str, bytes], tmp_path: Path) -> None:
    assert bundle.zipped(bundled) == bundle.zipped(dict(reversed(bundled.items())))
    bundle.write(tmp_path / "a.zip", bundled)
    assert bundle.read(str(tmp_path / "a.zip")) == bundled
    bundle.write(tmp_path / "folder", bundled)
    assert bundle.read(str(tmp_path / "folder")) == bundled
    with pytest.raises(UserError, match="E-PACK-11"):
        bundle.write(tmp_path / "folder", bundled)


def test_a_strip_whose_labels_are_captions_stays_at_home(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    names = sharing.bundled(tmp_path / "run")
    assert "mira-strip.png" in names
    path = tmp_path / "run" / "ledger.json"
    table = json.loads(path.read_text())
    table["pictures"][0]["captions"] = ["blue background"]
    path.write_text(json.dumps(table))
    assert "mira-strip.png" not in sharing.bundled(tmp_path / "run")


def test_a_card_that_would_tell_is_not_written(run: Path) -> None:
    hidden = Secrets(captions=frozenset({"the ball"}))
    with pytest.raises(UserError, match="E-PACK-09"):
        bundle.files(run / "mira.safetensors", bundle.Gallery(None, {}, hidden))


def link(folder: Path) -> None:
    (folder / "extra.png").symlink_to(folder / "mira.json")


def changed(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


BAD: dict[str, Callable[[Path], None]] = {
    "a link": link,
    "a pickle": changed("more.ckpt", b"x"),
    "a program": changed("run.py", b"x"),
    "a library": changed("x.so", b"x"),
    "a file that no sum is for": changed("other.png", b"x"),
    "another card": changed("README.md", b"x"),
    "another pack": changed("mira.safetensors", b"x"),
    "a missing file": lambda folder: (folder / "mira.json").unlink(),
    "no pack": lambda folder: [(folder / name).unlink() for name in ("mira.safetensors", "SHA256SUMS")] and None,
}


@pytest.mark.parametrize("name", BAD)
def test_a_bundle_with_something_wrong_is_not_taken(name: str, bundled: dict[str, bytes], tmp_path: Path) -> None:
    bundle.write(tmp_path / "in", bundled)
    assert api.take_pack(str(tmp_path / "in"), tmp_path / "control")[0]["trigger"] == "mira"
    BAD[name](tmp_path / "in")
    done = call("pack", "open", tmp_path / "in", "--out", tmp_path / "out")
    assert done.exit_code == BAD_INPUT
    assert "E-PACK-1" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../mira.json", "/etc/mira.json", "C:\\mira.json", "a\\..\\..\\mira.json", "virus.exe", "link.png"])
def test_a_zip_that_could_do_harm_is_not_taken(name: str, bundled: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(bundle.zipped(bundled))
    with zipfile.ZipFile(path, "a") as archive:
        entry = zipfile.ZipInfo(name)
        entry.external_attr = (0o120777 if name == "link.png" else 0o100644) << 16
        archive.writestr(entry, b"x")
    with pytest.raises(UserError, match="E-PACK-12"):
        api.take_pack(str(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.safetensors", bytes(10_000_000))
    with pytest.raises(UserError, match="times its size"):
        api.take_pack(str(tmp_path / "a.zip"), tmp_path / "out")


def test_generate_takes_a_bundle(bundled: dict[str, bytes], base: Path, tmp_path: Path) -> None:
    bundle.write(tmp_path / "a.zip", bundled)
    done = call("generate", tmp_path / "a.zip", "--base", base, "--steps", "1", "--prompt", "mira", "--out", tmp_path / "a.png")
    assert done.exit_code == 0, done.output
    assert "mira at scale 0.75" in done.output


# ---------------------------------------------------------------- the hub


class Hub:
    """In the place of huggingface_hub's client: what it was asked."""

    asked: list[tuple[str, Any]]

    def __init__(self, token: str) -> None:
        type(self).asked = [("token", token)]

    def create_repo(self, name: str, **rest: Any) -> None:
        self.asked.append(("repo", (name, rest["private"])))

    def create_commit(self, name: str, operations: list[Any], **_: Any) -> Any:
        self.asked.append(("commit", {one.path_in_repo: one.path_or_fileobj for one in operations}))
        return type("Done", (), {"commit_url": f"hub/{name}"})


def test_nothing_is_sent_unless_asked(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", "secret")
    Hub.asked = []
    shown = call("pack", "push", run, "owner/mira")
    assert shown.exit_code == 0, shown.output
    assert Hub.asked == []
    for word in ("owner/mira", "visible to you alone", "mira.safetensors", "README.md", "bytes", "privacy is public", "nothing was sent"):
        assert word in shown.output
    assert "secret" not in shown.output
    sent = call("pack", "push", run, "owner/mira", "--public", "--send")
    assert sent.exit_code == 0, sent.output
    assert Hub.asked[:2] == [("token", "secret"), ("repo", ("owner/mira", False))]
    files = Hub.asked[2][1]
    assert files["mira.safetensors"] == (run / "mira.safetensors").read_bytes()
    assert files.keys() == {"mira.safetensors", "mira.preview.png", "mira-strip.png", "mira.json", "README.md", "SHA256SUMS"}
    assert "visible to everybody" in sent.output


@pytest.mark.parametrize("repository", ["mira", "a/b/c", "-/ "])
def test_a_repository_has_an_owner_and_a_name(repository: str, made: Path) -> None:
    with pytest.raises(UserError, match="E-PACK-16"):
        api.push_pack(made, repository)


def test_without_a_token_nothing_is_sent(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="HF_TOKEN"):
        api.push_pack(made, "owner/mira").send()


def test_a_name_that_diffusers_passes_over_is_not_sent(made: Path) -> None:
    other = made.rename(made.with_name("mira-checkpoint.safetensors"))
    with pytest.raises(UserError, match="E-PACK-16"):
        api.push_pack(other, "owner/mira").send()


def test_a_pack_comes_from_the_hub_at_a_revision(bundled: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle.write(tmp_path / "blobs", bundled)
    (tmp_path / "snapshot").mkdir()
    for name in bundled:  # the hub's cache holds links to its own files
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    asked = []
    monkeypatch.setattr(hub, "download", lambda name, _: asked.append(name) or tmp_path / "snapshot")
    (told,) = api.take_pack("owner/mira@v2", tmp_path / "out")
    assert asked == ["owner/mira@v2"]
    assert told["trigger"] == "mira"
    assert not (tmp_path / "out" / "mira.safetensors").is_symlink()


def test_what_is_too_large_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Large:
        size = 9 * 2**30

        def model_info(self, _: str, **rest: Any) -> Any:
            assert rest["files_metadata"]
            rows = [SimpleNamespace(rfilename="mira.safetensors", size=self.size), SimpleNamespace(rfilename="other.bin", size=2**50)]
            return SimpleNamespace(siblings=rows)

    asked: list[str] = []

    def download(name: str, _: Any) -> Path:
        asked.append(name)
        raise hub.UnreachableError("asked")

    monkeypatch.setattr("huggingface_hub.HfApi", Large)
    monkeypatch.setattr(hub, "download", download)
    with pytest.raises(UserError, match=r"E-PACK-12.*9\.7 GB would be downloaded"):
        api.take_pack("owner/mira", tmp_path / "out")
    assert asked == []
    monkeypatch.setattr(Large, "size", 2**20)
    with pytest.raises(UserError, match="E-PACK-02"):
        api.take_pack("owner/mira", tmp_path / "out")
    assert asked == ["owner/mira"], "the control: what is small enough is asked for, whatever else lies there"


def test_a_header_that_is_older_than_the_tensors(base: Path, made: Path, tmp_path: Path) -> None:
    """Ours: damaged. Another program's: taken, and said."""
    pack = file.load(made)
    tensors = {key: tensor * (1 if key.endswith("alpha") else 0.5) for key, tensor in pack.tensors.items()}
    for ours in (True, False):
        said = {key: value for key, value in pack.metadata.items() if ours or not key.startswith("sdlora.")}
        safetensors.torch.save_file(tensors, tmp_path / "changed.safetensors", said)
        if ours:
            with pytest.raises(UserError, match="E-PACK-30"):
                file.load(tmp_path / "changed.safetensors")
    changed = file.load(tmp_path / "changed.safetensors")
    assert changed.is_stale
    assert not pack.is_stale
    drawn = call("generate", tmp_path / "changed.safetensors", "--base", base, "--prompt", "a", "--steps", 1, "--out", tmp_path / "a.png")
    assert drawn.exit_code == 0, drawn.output
    assert "warning: changed: its tensors are not those" in drawn.stderr


# ---------------------------------------------------------------- on diffusers' pipelines


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_pack_acts_on_a_pipeline_and_leaves_it(name: str, families: dict[str, Path], tmp_path: Path) -> None:
    kind = {"sd1": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[name]
    pipeline: Any = kind.from_pretrained(families[name], dtype=torch.float32, use_safetensors=True)
    loaded = family.load(family.find(str(families[name])), torch.device("cpu"), torch.float32)
    targets = ("attention", "unet.*.conv1", "text-encoder")
    path = small.random_pack(tmp_path / "mira.safetensors", loaded, targets=targets)
    before = {id(module) for module in pipeline.unet.modules()}
    plain = pictured(pipeline)
    pack = api.Pack.open(path)
    applied = pack.apply(pipeline)
    on = pictured(pipeline)
    applied.scale = 0.0
    assert torch.equal(pictured(pipeline), plain)
    applied.scale = 0.5
    half = pictured(pipeline)
    assert (on - plain).abs().max() > 1e-3
    assert (half - on).abs().max() > 1e-3
    laid_out = tmp_path / "peft.safetensors"
    pack.save(laid_out, torch.float32, "diffusers", pipeline)
    with pytest.raises(UserError, match="E-PACK-36"):
        pack.save(laid_out, layout="diffusers")
    assert all("lora_A" in key or "lora_B" in key for key in file.load(laid_out).tensors)
    again: Any = kind.from_pretrained(families[name], dtype=torch.float32, use_safetensors=True)
    again.load_lora_weights(str(laid_out))
    assert (pictured(again) - on).abs().max() < 1e-3, "diffusers draws the same from it"
    other = pack.apply(pipeline, scale=0.5)
    assert (pictured(pipeline) - on).abs().max() < 1e-4, "two halves are a whole"
    other.remove()
    applied.remove()
    assert torch.equal(pictured(pipeline), plain)
    assert {id(module) for module in pipeline.unet.modules()} == before
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    assert (pictured(pipeline) - on).abs().max() < 1e-4, "as diffusers itself applies it"
    pipeline.unload_lora_weights()
    pack.merge(pipeline)
    assert (pictured(pipeline) - on).abs().max() < 1e-4
    assert {id(module) for module in pipeline.unet.modules()} == before


def pictured(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    dice = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=dice)
    found: torch.Tensor = pipeline(
        "mira", num_inference_steps=2, guidance_scale=2.0, height=64, width=64, latents=latents, output_type="latent"
    ).images
    return found


def test_a_pack_is_saved_in_another_precision(made: Path, tmp_path: Path) -> None:
    pack = api.Pack.open(made)
    pack.save(tmp_path / "b.safetensors", dtype=torch.bfloat16)
    again = api.Pack.open(tmp_path / "b.safetensors")
    assert {tensor.dtype for key, tensor in again.tensors.items() if not key.endswith("alpha")} == {torch.bfloat16}
    assert all(tensor.dtype == torch.float32 for key, tensor in again.tensors.items() if key.endswith("alpha"))
    found = api.about_pack(tmp_path / "b.safetensors")["hashes"]
    assert found["sshs_model_hash (said)"] == found["data"]
    pack.save(tmp_path / "c.safetensors")
    assert data_of(tmp_path / "c.safetensors") == data_of(made)


def test_a_pipeline_without_a_unet_takes_no_pack(made: Path) -> None:
    with pytest.raises(UserError, match="E-PACK-15"):
        api.Pack.open(made).apply(object())
