"""Headers: what is written can be read, what other programs write is read, and a refusal says what is true of the file."""

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import small
import torch
from PIL import Image
from typer.testing import CliRunner

from sdlora import api, export
from sdlora.cli import app
from sdlora.errors import UserError
from sdlora.packs import card, file, lookalikes, metadata, strict
from sdlora.packs.metadata import Facts
from sdlora.packs.privacy import Secrets
from sdlora.studio import MAX_PROMPT

TENSORS = {"lora_unet_x.alpha": torch.ones(())}
SOUND = safetensors.torch.save(TENSORS, {"ss_seed": "1"})


def code_of(content: bytes) -> tuple[str, str]:
    """The code of a file's refusal, and what it says."""
    with pytest.raises(UserError) as caught:
        strict.parse(content, "x.safetensors")
    return caught.value.code, str(caught.value)


def whole(table: Any, data: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [], "data_offsets": [0, 4], **changes}


# ---------------------------------------------------------------- what is no pack


OTHERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", lookalikes.AGAIN),
    "zeros": (bytes(5000), lookalikes.AGAIN),
    "a page": (b"\n<!doctype html><html><title>404</title>", lookalikes.SEEN),
    "a page with a mark": (b"\xef\xbb\xbf<html></html>", lookalikes.SEEN),
    "an answer": (b'{"error":"Access to this model is restricted"}', lookalikes.SEEN),
    "an answer whose ninth byte is a brace": (b'{"err": {"code": 403, "message": "no"}}', lookalikes.SEEN),
    "a sentence": ("Zugriff verweigert: größer".encode(), lookalikes.SEEN),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", lookalikes.POINTED),
    "a pickle": (b"\x80\x02}q\x00X\x05\x00\x00\x00alpha", lookalikes.TRUSTED),
    "a checkpoint of PyTorch": (b"PK\x03\x04" + bytes(26) + b"archive/data.pkl" + bytes(50), lookalikes.TRUSTED),
    "a ZIP": (b"PK\x03\x04" + bytes(26) + b"mira.safetensors" + bytes(50), lookalikes.UNPACK),
    "a gzip": (b"\x1f\x8b\x08" + bytes(40), lookalikes.UNPACK),
    "a GGUF": (b"GGUF\x03\0\0\0" + bytes(60), lookalikes.OTHER),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(60), lookalikes.OTHER),
    "noise": (bytes(range(200, 256)), lookalikes.OTHER),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_of_file_is_told_what_to_do_about(name: str) -> None:
    content, todo = OTHERS[name]
    code, said = code_of(content)
    assert code == "E-PACK-03"
    assert todo in said
    assert (lookalikes.AGAIN in said) == (todo == lookalikes.AGAIN), "to fetch it again helps few"


def test_kinds_of_files_are_told_apart() -> None:
    kinds = {name: found.what for name, (content, _) in OTHERS.items() if (found := lookalikes.lookalike(content))}
    assert set(OTHERS) - set(kinds) == {"noise"}
    assert kinds["a page"] == kinds["a page with a mark"]
    assert len(set(kinds.values())) == len(kinds) - 1
    assert lookalikes.lookalike(SOUND) is None, "the control"
    assert lookalikes.lookalike("é".encode() * lookalikes.GLANCE) is not None, "a letter may be cut where the glance ends"


# ---------------------------------------------------------------- what is a pack, and cannot be read


def test_what_is_cut_short_is_to_be_fetched_again_and_nothing_else_is() -> None:
    for kept in range(len(SOUND)):
        code, said = code_of(SOUND[:kept])
        assert (code, lookalikes.AGAIN in said) == ("E-PACK-03", True), kept
    assert strict.parse(SOUND, "x")[1] == {"ss_seed": "1"}, "the control"


FAULTS: dict[str, tuple[bytes, str, str]] = {
    "fp8": (whole({"lora_unet_q.lora_up.weight": entry(dtype="F8_E4M3", shape=[4])}, bytes(4)), "E-PACK-37", "lora_unet_q.lora_up.weight"),
    "another fp8": (whole({"a.alpha": entry(dtype="F8_E5M2", shape=[4])}, bytes(4)), "E-PACK-37", "F8_E5M2"),
    "fp4": (whole({"a.alpha": entry(dtype="F4", shape=[8])}, bytes(4)), "E-PACK-37", "F4"),
    "an unknown type": (whole({"a.alpha": entry(dtype="Q4_K")}, bytes(4)), "E-PACK-03", "Q4_K"),
    "a number": (whole({"__metadata__": {"ss_steps": 3}, "a.alpha": entry()}, bytes(4)), "E-PACK-03", "ss_steps"),
    "null": (whole({"__metadata__": {"ss_steps": None}, "a.alpha": entry()}, bytes(4)), "E-PACK-03", "ss_steps"),
    "half a character": (whole({"__metadata__": {"ss_note": "a\ud800"}, "a.alpha": entry()}, bytes(4)), "E-PACK-03", "ss_note"),
    "a script": (whole({"__metadata__": {"ss_note": "<ScRipt>"}, "a.alpha": entry()}, bytes(4)), "E-PACK-03", "ss_note"),
    "twice": (whole(b'{"a.alpha":1,"a.alpha":2}'), "E-PACK-03", "'a.alpha'"),
    "no tensor": (whole({"__metadata__": {"a": "b"}}), "E-PACK-03", lookalikes.OTHER),
    "too many tensors": (whole({f"x{i}": entry() for i in range(20_001)}, bytes(4)), "E-PACK-03", "20001"),
    "too many fields": (whole({"__metadata__": {f"x{i}": "" for i in range(10_001)}, "a": entry()}, bytes(4)), "E-PACK-03", "10001"),
    "trailing bytes": (SOUND + bytes(7), "E-PACK-03", "7 bytes"),
    "a space first": (whole(b' {"a.alpha":1}'), "E-PACK-03", strict.REMADE),
    "overlap": (whole({"a": entry(), "b": entry()}, bytes(4)), "E-PACK-03", strict.REMADE),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name: str) -> None:
    content, wanted, told = FAULTS[name]
    code, said = code_of(content)
    assert code == wanted
    assert told in said
    assert "cut short" not in said
    assert len(said) < 600


def test_the_missing_bytes_are_counted() -> None:
    assert "3 of its" in code_of(SOUND[:-3])[1]


# ---------------------------------------------------------------- what other programs write


def foreign(path: Path, pack: Path, **fields: str) -> Path:
    """A pack as another program wrote it."""
    path.write_bytes(safetensors.torch.save(safetensors.torch.load_file(pack), fields))
    return path


@pytest.mark.parametrize("size", [1_500_000, 9_000_000])
def test_long_metadata_are_read_and_kept(size: int, pack_path: Path, base: Path, tmp_path: Path) -> None:
    tags = json.dumps({"1_x": {f'tag "{i}" [of] a {{long}} caption, 猫': 1 for i in range(size // 45)}})
    assert len(tags) > size
    path = foreign(tmp_path / "big-1.5.safetensors", pack_path, ss_tag_frequency=tags, empty="", sshs_legacy_hash="00000000")
    assert file.load(path).metadata["ss_tag_frequency"] == tags
    assert len(str(card.rows(api.about_pack(path)))) < 5000
    out = tmp_path / "edited.safetensors"
    api.edit_pack(path, {"modelspec.title": "Mira"}, out=out)
    kept = file.load(out).metadata
    assert (kept["ss_tag_frequency"] == tags, kept["empty"], kept["modelspec.title"]) == (True, "", "Mira")
    api.convert_pack(path, "diffusers", out, base=str(base))
    kept = file.load(out).metadata
    assert (kept["ss_tag_frequency"] == tags, kept["empty"]) == (True, "")


def test_an_edit_that_could_not_be_read_is_not_written(pack_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = foreign(tmp_path / "a.safetensors", pack_path, note="x")
    before = path.read_bytes()
    for value in ("<script>", "a\0", "\ud800"):
        with pytest.raises(UserError, match="E-PACK-10"):
            api.edit_pack(path, {"modelspec.title": value})
    monkeypatch.setattr(strict, "MAX_HEADER", int.from_bytes(before[:8], "little") + 50)
    with pytest.raises(UserError, match="E-PACK-10"):
        api.edit_pack(path, {"modelspec.title": "猫" * 20})
    assert path.read_bytes() == before
    api.edit_pack(path, {"modelspec.title": "x"})
    assert file.load(path).metadata == {"note": "x", "modelspec.title": "x"}, "the control"


def test_a_pack_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for bad in ({"note": "<script>"}, {"note": "\ud800"}):
        with pytest.raises(UserError, match="E-PACK-38"):
            file.save(path, TENSORS, lambda _, bad=bad: bad)  # type: ignore[misc]
        assert not path.exists()
    file.save(path, TENSORS, lambda _: {"note": "x"})
    assert file.read(path).metadata == {"note": "x"}, "the control"


def test_a_long_header_of_many_parts_is_refused_before_it_is_read() -> None:
    for part, end in ((b"[],", b"[]]}"), (b'"",', b'""]}'), (b'"\\', b"")):
        text = b'{"a":[' + part * (10_000_000 // len(part)) + end
        tracemalloc.start()
        code, _ = code_of(whole(text))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert code == "E-PACK-03"
        assert peak < 5 * len(text), part


def test_a_pack_with_strange_fields_is_taken(pack_path: Path, tmp_path: Path) -> None:
    deep, long = "[" * 100_000, "x" * 100_000
    fields = {"sdlora.config": deep, "sdlora.warnings": deep, "modelspec.trigger_phrase": long, "modelspec.description": long}
    pack = file.load(foreign(tmp_path / "a.safetensors", pack_path, **fields))
    assert pack.reading is None
    assert card.warnings(pack.metadata) == []
    assert len(pack.trigger) == strict.MAX_WORDS
    assert len(card.model_card(pack, [])) + len(card.sidecar(pack)) < 3 * card.TOLD + 10_000
    assert card.cut("abc", 2) != "abc"
    assert card.cut("abc", 3) == "abc"


# ---------------------------------------------------------------- what is written


def test_the_most_frequent_tags_are_kept() -> None:
    tags = {"b": {"rare": 1, "often": 9}, "a": {"twice": 2, "often": 9}}
    assert metadata.most_frequent(tags, 1000) == {"a": {"often": 9, "twice": 2}, "b": {"often": 9, "rare": 1}}
    assert list(metadata.most_frequent(tags, 1000)["b"]) == ["often", "rare"]
    room = strict.size_of(json.dumps({"a": {"often": 9, "twice": 2}, "b": {"often": 9}})) + 3 * len(", ")
    assert metadata.most_frequent(tags, room) == {"a": {"often": 9, "twice": 2}, "b": {"often": 9}}
    assert metadata.most_frequent({"a": {"x" * 99: 5, "y": 1}}, 40) == {"a": {"y": 1}}, "one that is too long is passed over"
    assert metadata.most_frequent(tags, 5) == {}


ODD = ["a", "long hair", "猫", "ß", "😀", '"', "\\", "\n", "\x1f", "\x7f", "<script>", "</b>", "\ud800", "\u2028", "{", "]", "%"]


def odd(rng: random.Random, most: int) -> str:
    return "".join(rng.choices(ODD, k=rng.randrange(1, 6))) * (1 if rng.random() < 0.9 else rng.randrange(1, most))


def written(fields: dict[str, str]) -> dict[str, str]:
    """Fields as they are read again."""
    return strict.parse(safetensors.torch.save(TENSORS, fields), "x")[1]


def test_whatever_tags_there_are_their_field_is_read_as_it_was_meant(pictures: Path, base: Path) -> None:
    usual, cuts = small.settled(pictures, base), 0
    for seed in range(16):
        rng = random.Random(seed)
        settled = usual.model_copy(update={"pack": usual.pack.model_copy(update={"privacy": ("shared", "full")[seed % 2]})})
        tags = {odd(rng, 40): {odd(rng, 6_000): rng.randrange(1, 500) for _ in range(10 ** rng.randrange(4))} for _ in range(3)}
        hidden = Secrets(tags=tags, pictures=dict.fromkeys(tags, 1))
        fields = metadata.of_run(settled, "base", Facts(3, 1, 0.0, 0.0, {(64, 64): 3}, hidden=hidden))
        export.check_fields(fields, settled)
        assert written(fields) == fields
        said = json.loads(fields.get("ss_tag_frequency", "{}"))
        assert strict.size_of(fields.get("ss_tag_frequency", "")) <= metadata.MAX_FIELD
        every = metadata._all_tags(settled, hidden)
        assert all(every[folder][tag] == count for folder, inside in said.items() for tag, count in inside.items())
        everything = sum(map(len, every.values())) == sum(map(len, said.values()))
        assert everything == (metadata.tags_left_out(settled, hidden) == "")
        cuts += not everything
    assert 0 < cuts < 16, "the control"


def test_whatever_is_not_refused_before_training_is_read(pictures: Path, base: Path) -> None:
    met = {"taken": 0, "E-PACK-38": 0}
    usual = small.settled(pictures, base)
    for seed in range(80):
        rng = random.Random(seed)
        field, text = rng.choice(["title", "author", "description", "license"]), odd(rng, 100_000)
        settled = usual.model_copy(update={"pack": usual.pack.model_copy(update={field: text})})
        fields = metadata.of_run(settled, "base", Facts(3, 1, 0.0, 0.0, {}))
        try:
            export.check_fields(fields, settled)
        except UserError as error:
            met[error.code] += f" · pack.{field} · " in str(error)
        else:
            met["taken"] += 1
            assert written(fields) == fields
    assert min(met.values()) > 10, "the control"


def test_what_is_refused_before_training_would_not_be_read() -> None:
    with pytest.raises(UserError, match="E-PACK-03"):
        written({"modelspec.title": "<script>"})
    assert metadata.too_long({"a": "猫" * 90_000, "b": "x" * metadata.MAX_FIELD, "c": '"' * 200_000}) == ["a", "c"], "bytes count"
    assert written({"modelspec.title": metadata.as_json("<script>")}) == {"modelspec.title": '"\\u003cscript>"'}


LONG = "long " * 60_000
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a long description": ({"pack__description": LONG}, "pack.description"),
    "a description of letters that take many bytes": ({"pack__description": "猫" * 90_000}, "pack.description"),
    "many tags": ({"pack__tags": ["a tag"] * 50_000}, "pack.tags"),
    "a long prompt": ({"preview__prompts": [LONG]}, "preview.prompts"),
    "a script": ({"pack__author": "<script>"}, "pack.author"),
    "a NUL": ({"pack__license": "a\0"}, "pack.license"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_is_too_long_is_refused_with_its_setting(name: str, pictures: Path, base: Path) -> None:
    given, setting = REFUSED[name]
    facts = Facts(3, 1, 0.0, 0.0, {})
    settled = small.settled(pictures, base, **given)
    with pytest.raises(UserError, match="E-PACK-38") as caught:
        export.check_fields(metadata.of_run(settled, "base", facts), settled)
    assert f" · {setting} · " in str(caught.value)
    usual = small.settled(pictures, base)
    export.check_fields(metadata.of_run(usual, "base", facts), usual)


def test_a_run_that_could_not_be_read_is_stopped_before_it_trains(base: Path, pictures: Path, tmp_path: Path) -> None:
    settled = small.settled(pictures, base, pack__title="<script>")
    with pytest.raises(UserError, match="E-PACK-38"):
        list(api.train(settled, tmp_path / "run"))
    told = [event["kind"] for event in api.events(tmp_path / "run")[0]]
    assert told[-1] == "failed"
    assert "step" not in told


def test_tensors_that_would_not_be_read_are_refused(pictures: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"lora_unet_x.lora_up.weight": torch.empty(2**20, 64, device="meta")}
    monkeypatch.setattr(file, "MAX_BYTES", strict.MAX_HEADER + 2 * 2**26)
    export.check_tensors(large, small.settled(pictures, base))
    with pytest.raises(UserError, match="E-PACK-38"):
        export.check_tensors(large, small.settled(pictures, base, pack__dtype="fp32"))


def test_the_largest_thumbnail_fits() -> None:
    noise = Image.frombytes("RGB", (256, 256), random.Random(0).randbytes(3 * 256 * 256))
    assert strict.size_of(metadata.data_url(noise)) < metadata.MAX_FIELD


def test_a_run_with_more_tags_than_a_field_holds_ends_well(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small.draw_folder(tmp_path / "pictures", 2, square=True)
    for i in range(2):
        (folder / f"{i}.txt").write_text(", ".join(["often", *(f"tag {i}-{j}" for j in range(1000))]), encoding="utf-8")
    assert len((folder / "0.txt").read_text()) > MAX_PROMPT, "captions are asked for at the end"
    monkeypatch.setattr(metadata, "MAX_FIELD", 10_000)
    settled = small.settled(folder, base, train__steps=1, pack__privacy="shared", preview__scales=[1.0], preview__steps=1)
    events = list(api.train(settled, tmp_path / "run"))
    assert events[-1].kind == "done"
    said = json.loads(file.load(tmp_path / "run" / "mira.safetensors").metadata["ss_tag_frequency"])["mira"]
    assert said["often"] == 2
    assert 400 < len(said) < 2001
    assert any(f"{len(said):,} of 2,00" in event.text for event in events if event.kind == "note")
    done = CliRunner().invoke(app, ["pack", "inspect", str(tmp_path / "run" / "mira.safetensors")])
    assert done.exit_code == 0, done.output
