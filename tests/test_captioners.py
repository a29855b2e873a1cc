"""Captioners: what each says, where it is written, and that nothing which anybody wrote is lost."""

import json
import string
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from click.testing import Result
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import complaint, listing
from test_layouts import PICTURE, Files, lines, put, said
from transformers import (
    BartConfig,
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    Florence2VisionConfig,
    RobertaTokenizer,
)
from typer.testing import CliRunner

from sdlora import captioner, lookup
from sdlora.captioners import florence2, wd14
from sdlora.captioners.name import Name
from sdlora.cli import app
from sdlora.data import captioning, scan
from sdlora.data.captioning import Captioning
from sdlora.errors import BAD_INPUT, UserError


def run(folder: Path, by: str = "name", *more: object) -> Result:
    return CliRunner().invoke(app, ["data", "caption", str(folder), "--with", by, *map(str, more)])


def captions(folder: Path) -> dict[str, tuple[str, ...]]:
    """What training would say."""
    return said(scan.scan(folder, skip_unreadable=False))


# ---------------------------------------------------------------- the name


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("red-apple_02.png", "red apple"), ("a.b.jpg", "a b"), ("cat (3).png", "cat"), ("001.png", ""), ("3d-render.png", "3d render"),
        ("cat's toy.PNG", "cat's toy"), ("1girl, red_hair, 2.png", "1girl, red hair"), ("__.png", ""), ("猫_1.png", "猫"),
    ],
)  # fmt: skip
def test_a_name_says_its_words(name: str, wanted: str) -> None:
    assert Name().caption(Path("12-folder") / name, Image.new("RGB", (1, 1))) == wanted


# ---------------------------------------------------------------- where a caption is written

BOTH: Files = {"red-apple_1.png": PICTURE, "red-apple_1.jpg": PICTURE}
MIXED: Files = {
    "a-cat.png": PICTURE, "in/b-cat.png": PICTURE, "c-cat.png": PICTURE, "d-cat.png": PICTURE, "e-cat.png": PICTURE, "f-cat.png": PICTURE,
    "7.png": PICTURE, "c-cat.txt": "mine\ntoo\n", "d-cat.caption": "mine", "captions.json": json.dumps({"e-cat": "mine"}),
    "f-cat.TXT": " \n",
}  # fmt: skip


def test_pictures_without_a_caption_get_one(tmp_path: Path) -> None:
    before = listing(put(tmp_path, MIXED))
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    told = result.output.splitlines()
    assert told[-1] == "3 captions written, 4 pictures left as they were"
    assert f"{tmp_path / 'in' / 'b-cat.png'}: b cat" in told
    assert f"{tmp_path / '7.png'}: nothing written, for name has nothing to say of it" in told
    assert len(told) == 5
    after = listing(tmp_path)
    assert {path: after[path] for path in before} == before, "what was there is there"
    new = {str(Path(path).relative_to(tmp_path)): content for path, content in after.items() if path not in before}
    assert new == {"a-cat.txt": b"a cat\n", "in/b-cat.txt": b"b cat\n", "f-cat.txt": b"f cat\n"}
    again = run(tmp_path)
    assert again.output.splitlines()[-1] == "0 captions written, 7 pictures left as they were"
    assert listing(tmp_path) == after


def test_overwriting_is_what_training_says(tmp_path: Path) -> None:
    put(tmp_path, {**MIXED, "g-cat.png": PICTURE, "g-cat.png.txt": "mine", "g-cat.txt": "mine too"})
    assert captions(tmp_path)["g-cat.png"] == ("mine", "mine too")[:1], "the control"
    assert run(tmp_path, "name", "--overwrite").exit_code == 0
    wanted = {f"{where}-cat.png": (f"{where[-1]} cat",) for where in ("a", "in/b", "c", "d", "e", "f", "g")}
    assert captions(tmp_path) == {**wanted, "7.png": ()}
    assert (tmp_path / "captions.json").read_text() == MIXED["captions.json"]
    assert (tmp_path / "d-cat.caption").read_text() == "mine"


@pytest.mark.parametrize(
    ("files", "overwrite"),
    [
        ({}, False), ({"x.txt": "mine"}, True), ({"x.png.txt": "mine"}, False), ({"x.png.txt": "mine", "x.txt": "mine"}, True),
        ({"x.png.TXT": "mine", "x.txt": "mine"}, True),
        ({"metadata.jsonl": lines({"file_name": "x"})}, False), ({"metadata.jsonl": lines({"file_name": "x", "text": "mine"})}, True),
    ],
)  # fmt: skip
def test_pictures_of_one_name_get_captions_of_their_own(files: Files, overwrite: bool, tmp_path: Path) -> None:
    put(tmp_path, {"x.png": PICTURE, "x.jpg": PICTURE, **files})
    kept = captions(tmp_path)["x.png"]
    _, written = captioning.caption(tmp_path, Captioning("name", prefix="new", overwrite=overwrite))
    assert [path.name for path, _ in written] == (["x.jpg"] if kept and not overwrite else ["x.jpg", "x.png"])
    assert captions(tmp_path) == {"x.jpg": ("new x",), "x.png": kept if kept and not overwrite else ("new x",)}
    if "x.txt" in files:
        assert (tmp_path / "x.txt").read_text() == "mine"
    if "metadata.jsonl" in files:
        assert [json.loads(line)["file_name"] for line in (tmp_path / "metadata.jsonl").open()] == ["x", "x.jpg", "x.png"]


TABLE = (
    '{"file_name": "a-cat.png", "score": 0.50, "text": null, "tags": ["x", "y"], "who": "Zoë \\ud83d"}\r\n'
    "\n"
    '{"prompt":"mine","file_name":"b-cat.png"}\n'
    '{"file_name": "in/c-cat", "caption": "", "prompt": "not read"}'
)


def rows(folder: Path) -> list[object]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines() if line]


def test_a_table_gets_captions_and_keeps_all_else(tmp_path: Path) -> None:
    """Rows without a caption, and a picture without a row, which training would refuse."""
    put(tmp_path, dict.fromkeys(("a-cat.png", "b-cat.png", "in/c-cat.png", "d-cat.png"), PICTURE) | {"metadata.jsonl": TABLE})
    with pytest.raises(UserError, match="no entry for d-cat"):
        captions(tmp_path)
    result = run(tmp_path, "name", "--prefix", "[trigger],")
    assert result.output.splitlines()[-1] == "3 captions written, 1 pictures left as they were"
    a, b, c = (json.loads(line) for line in TABLE.splitlines() if line)
    new = "[trigger], {} cat"
    assert rows(tmp_path) == [
        {**a, "text": new.format("a")}, b, {**c, "caption": new.format("c")}, {"file_name": "d-cat.png", "text": new.format("d")}
    ]  # fmt: skip
    text = (tmp_path / "metadata.jsonl").read_bytes().decode()
    assert TABLE.splitlines()[2] in text.splitlines(), "a line that is not changed is the same to the letter"
    assert "Zoë \\ud83d" in text
    assert text.count("\r\n") == 1
    assert not list(tmp_path.rglob("*.txt"))
    assert captions(tmp_path)["in/c-cat.png"] == ("[trigger], c cat",)
    assert captions(tmp_path)["b-cat.png"] == ("mine",)
    assert run(tmp_path, "name", "--overwrite").exit_code == 0
    assert captions(tmp_path) == {f"{where}-cat.png": (f"{where[-1]} cat",) for where in ("a", "b", "in/c", "d")}
    assert rows(tmp_path)[1] == {"prompt": "b cat", "file_name": "b-cat.png"}


def test_the_nearest_table_takes_a_caption_unless_another_file_counts_before_it(tmp_path: Path) -> None:
    table = lines({"file_name": "x.png", "text": "mine"})
    put(
        tmp_path,
        {"x.png": PICTURE, "x.txt": "first", "in/x.png": PICTURE, "in/y.png": PICTURE, "metadata.jsonl": table, "in/metadata.jsonl": table},
    )
    assert run(tmp_path, "name", "--overwrite").exit_code == 0
    assert captions(tmp_path) == {"x.png": ("x",), "in/x.png": ("x",), "in/y.png": ("y",)}
    assert (tmp_path / "metadata.jsonl").read_text() == table
    assert rows(tmp_path / "in") == [{"file_name": "x.png", "text": "x"}, {"file_name": "y.png", "text": "y"}]
    assert (tmp_path / "x.txt").read_text() == "x\n"


def test_a_folders_title_is_no_caption_of_a_picture(tmp_path: Path) -> None:
    put(tmp_path, {"3_mira cat/red-apple.png": PICTURE})
    assert captions(tmp_path) == {"3_mira cat/red-apple.png": ("mira cat",)}
    run(tmp_path)
    assert captions(tmp_path) == {"3_mira cat/red-apple.png": ("red apple",)}


def test_each_caption_is_written_as_it_is_made_and_an_edit_meanwhile_is_kept(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": PICTURE, "b.png": PICTURE, "c.png": PICTURE})
    left, written = captioning.caption(tmp_path, Captioning("name"))
    assert (left, next(written)) == (0, (tmp_path / "a.png", "a"))
    assert captions(tmp_path) == {"a.png": ("a",), "b.png": (), "c.png": ()}
    (tmp_path / "b.txt").write_text("by hand")
    with pytest.raises(UserError, match=r"E-DATA-08.*b\.txt"):
        next(written)
    left, written = captioning.caption(tmp_path, Captioning("name"))
    assert (left, [path.name for path, _ in written]) == (2, ["c.png"])
    assert captions(tmp_path)["b.png"] == ("by hand",)


# ---------------------------------------------------------------- what is wrong

REFUSED: dict[str, tuple[Files, Sequence[object], str]] = {
    "pictures": ({"b.png": b"x", "c.png": b""}, ["name"], "2 of 3 pictures cannot be read: b.png: not a picture"),
    "captions": ({"a.txt": b"\xff"}, ["name", "--overwrite"], "a.txt: not UTF-8"),
    "a table": ({"metadata.jsonl": "[]\n"}, ["name"], "line 1: not an object"),
    "a captioner": ({}, ["florence"], "did you mean florence2?"),
    "a model for nothing": ({}, ["name", "--model", "x/y"], "name uses no model"),
    "no such model": ({}, ["wd14", "--model", "nothing"], "no such folder, and no hub id"),
    "a hub id, offline": ({}, ["florence2", "--model", "nobody/nothing"], "could not be had from the hub"),
    "another kind's folder": ({}, ["florence2", "--model", "HERE"], "cannot be loaded"),
    "another kind's folder, too": ({}, ["wd14", "--model", "HERE"], "cannot be loaded: [Errno 2]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_told_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    files, how, why = REFUSED[case]
    before = listing(put(tmp_path, {"a.png": PICTURE, **files}))
    result = run(tmp_path, *(str(part).replace("HERE", str(tmp_path)) for part in how))
    assert complaint(result) == []
    assert why in result.stderr
    assert listing(tmp_path) == before


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    assert "E-DATA-02" in run(tmp_path).stderr
    assert "E-DATA-01" in run(tmp_path / "nowhere").stderr
    assert run(put(tmp_path, {"a.png": PICTURE})).exit_code == 0, "the control"


def test_a_library_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sdlora.captioners.wd14")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run(put(tmp_path, {"a.png": PICTURE}), "wd14")
    assert result.exit_code == BAD_INPUT
    assert "onnxruntime" in result.stderr
    assert "sdlora[caption]" in result.stderr
    assert run(tmp_path, "name").exit_code == 0, "the others do without it"


def test_no_model_is_loaded_for_nothing(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": PICTURE, "a.txt": "mine"})
    assert run(tmp_path, "wd14", "--model", "nobody/nothing").exit_code == 0
    assert run(tmp_path, "wd14", "--model", "nobody/nothing", "--overwrite").exit_code == BAD_INPUT, "the control"


def test_the_captioners_are_those_that_the_help_names() -> None:
    told = CliRunner().invoke(app, ["data", "caption", "--help"]).output
    assert lookup.names("captioners") == ["florence2", "name", "wd14"]
    assert all(name in told for name in lookup.names("captioners"))


# ---------------------------------------------------------------- wd14: a network of one matrix, written by hand


def field(number: int, value: int | str | bytes) -> bytes:
    """One field of a protocol buffer: a number, or bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def linear(weights: np.ndarray, offsets: np.ndarray) -> bytes:
    """An ONNX model (its onnx.proto has the numbers of the fields): offsets + picture · weights, (H, W, 3, tags)."""

    def described(name: str, *sides: int) -> bytes:
        shape = b"".join(field(1, field(1, side)) for side in sides)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, shape)))

    def constant(name: str, values: np.ndarray) -> bytes:
        return b"".join(field(1, side) for side in values.shape) + field(2, 1) + field(8, name) + field(9, values.astype("<f4").tobytes())

    def node(kind: str, given: Sequence[str], out: str) -> bytes:
        return b"".join(field(1, name) for name in given) + field(2, out) + field(4, kind)

    nodes = field(1, node("Flatten", ["picture"], "flat")) + field(1, node("Gemm", ["flat", "weights", "offsets"], "tags"))
    constants = field(5, constant("weights", weights.reshape(-1, weights.shape[-1]))) + field(5, constant("offsets", offsets))
    ends = field(11, described("picture", 1, *weights.shape[:3])) + field(12, described("tags", 1, weights.shape[-1]))
    return field(1, 8) + field(7, nodes + field(2, "g") + constants + ends) + field(8, field(1, "") + field(2, 13))


SIDE = 8
TAGS: dict[str, tuple[int, tuple[int, int, int] | None, float]] = {
    "general": (9, None, 0.99),
    "left_red": (0, (SIDE // 2, 0, 2), 0.02),
    "left_blue": (0, (SIDE // 2, 0, 0), 0.01),
    "top_blue": (0, (0, SIDE // 2, 0), 0.0),
    "sure_thing": (0, None, 0.36),
    "unsure_thing": (0, None, 0.34),
    ">_<": (0, None, 0.5),
    "some_(body)": (4, None, 0.86),
    "some_other": (4, None, 0.84),
}
"""By name: category, the pixel (row, column, channel) whose light out of 255 is the probability, and what is added."""


def make_tagger(folder: Path) -> Path:
    weights = np.zeros((SIDE, SIDE, 3, len(TAGS)))
    for i, (_, pixel, _) in enumerate(TAGS.values()):
        if pixel:
            weights[(*pixel, i)] = 1 / 255
    rows = [f"{i},{name},{category},1" for i, (name, (category, _, _)) in enumerate(TAGS.items())]
    files = {"selected_tags.csv": "\n".join(["tag_id,name,category,count", *rows]), "model.onnx": b""}
    put(folder, {**files, "model.onnx": linear(weights, np.array([offset for *_, offset in TAGS.values()]))})
    return folder


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tagger(tmp_path_factory.mktemp("tagger"))


ALWAYS = "some (body)"
REST = ">_<, sure thing"


@pytest.mark.parametrize(
    ("size", "colour", "wanted"),
    [
        ((48, 48), "red", f"left red, {REST}"),
        ((48, 48), "blue", f"left blue, top blue, {REST}"),
        ((96, 48), "red", f"left red, top blue, {REST}"),  # white above and below
        ((48, 96), "blue", f"left red, left blue, top blue, {REST}"),  # white on both sides
        ((48, 48), "black", REST),
        ((3000, 16), "black", f"left red, left blue, top blue, {REST}"),  # a line one pixel high
    ],
)
def test_tags_are_those_of_the_network(size: tuple[int, int], colour: str, wanted: str, tagger: Path, tmp_path: Path) -> None:
    """Blue first, 0 to 255, the shape kept on white; characters, then the others, the likeliest first; ratings never."""
    Image.new("RGB", size, colour).save(tmp_path / "a.png")
    result = run(tmp_path, "wd14", "--model", tagger)
    assert result.exit_code == 0, result.output
    assert captions(tmp_path) == {"a.png": (f"{ALWAYS}, {wanted}",)}


def test_a_faded_colour_is_below_the_threshold(tagger: Path, tmp_path: Path) -> None:
    for light, found in ((87, True), (81, False)):  # (light / 255 + 0.02) on both sides of 0.35
        Image.new("RGB", (16, 16), (light, 0, 0)).save(tmp_path / f"{light}.png")
        model = captioner.load(wd14, str(tagger), torch.device("cpu"), torch.float32)
        assert ("left red" in model.caption(tmp_path, Image.open(tmp_path / f"{light}.png"))) == found


@pytest.mark.parametrize(
    ("tag", "wanted"),
    [
        ("long_hair", "long hair"), ("o_o", "o_o"), ("(o)_(o)", "(o)_(o)"), ("<|>_<|>", "<|>_<|>"), ("||_||", "||_||"), ("3_3", "3_3"),
        (">_o", ">_o"), ("._.", "._."), ("x_mark", "x mark"), ("mira_(the_cat)", "mira (the cat)"),
    ],
)  # fmt: skip
def test_faces_keep_their_underscores(tag: str, wanted: str) -> None:
    assert wd14.words(tag) == wanted


@pytest.mark.parametrize("file", ["model.onnx", "selected_tags.csv"])
def test_a_tagger_that_is_not_whole_is_refused(file: str, tmp_path: Path) -> None:
    folder = make_tagger(tmp_path / "model")
    (folder / file).write_bytes((folder / file).read_bytes()[:-20])
    result = run(put(tmp_path / "x", {"a.png": PICTURE}), "wd14", "--model", folder)
    assert complaint(result) == []
    assert "E-CAP-05" in result.stderr


# ---------------------------------------------------------------- florence2: random weights


def make_florence(folder: Path) -> Path:
    """A model of the same structure with random weights, which speaks in letters."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<image>", "Ġ", *string.ascii_letters, "."]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = RobertaTokenizer(vocab=vocab, merges=[], extra_special_tokens={"image_token": "<image>"})
    side = 32
    pictures = CLIPImageProcessor(size={"height": side, "width": side}, do_center_crop=False)
    pictures.image_seq_length = (side // 8) ** 2 + 1
    vision = Florence2VisionConfig(
        depths=(1, 1), patch_size=(7, 3), patch_stride=(4, 2), patch_padding=(3, 1), patch_prenorm=(False, True), embed_dim=(8, 16),
        num_heads=(1, 2), num_groups=(1, 2), window_size=4, projection_dim=16, drop_path_rate=0.0, initializer_range=0.5,
    )  # fmt: skip
    text = BartConfig(
        vocab_size=len(words), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=320, init_std=0.5, bos_token_id=0, pad_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Florence2ForConditionalGeneration(Florence2Config(text_config=text, vision_config=vision, image_token_id=vocab["<image>"]))
    model.save_pretrained(folder)
    Florence2Processor(pictures, tokenizer, post_processor_config={"pure_text": {}}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def florence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_florence(tmp_path_factory.mktemp("florence"))


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(florence2, "MOST_TOKENS", 12)


@pytest.mark.usefixtures("briefly")
def test_sentences_are_those_of_the_network(florence: Path, tmp_path: Path) -> None:
    """What the documented way to use the model gives, for the picture as it is seen."""
    stored = Image.new("RGB", (40, 24), "red")
    stored.paste("blue", (0, 0, 20, 24))
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was held upside down
    stored.save(tmp_path / "a.png", exif=exif)
    result = run(tmp_path, "florence2", "--model", florence, "--prefix", "a photo of")
    assert result.exit_code == 0, result.output
    processor = Florence2Processor.from_pretrained(florence)
    model = Florence2ForConditionalGeneration.from_pretrained(florence).eval()
    wanted = {}
    for task in ("<DETAILED_CAPTION>", "<CAPTION>"):
        for turned in (True, False):
            asked = processor(text=task, images=stored.rotate(180) if turned else stored, return_tensors="pt")
            tokens = model.generate(**asked, max_new_tokens=12, num_beams=3, do_sample=False)
            text = processor.batch_decode(tokens, skip_special_tokens=False)[0]
            answer = processor.post_process_generation(text, task=task, image_size=stored.size)[task]
            wanted[task, turned] = " ".join(f"a photo of {answer}".split())
    assert captions(tmp_path) == {"a.png": (wanted["<DETAILED_CAPTION>", True],)}
    assert len(set(wanted.values())) == 4, "the controls: another task or another picture says something else"


def test_a_model_without_all_its_weights_is_refused(florence: Path, tmp_path: Path) -> None:
    """transformers would fill the gap with random numbers."""
    folder = small.copy_base(florence, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "vision" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, folder / "model.safetensors", {"format": "pt"})
    result = run(put(tmp_path / "x", {"a.png": PICTURE}), "florence2", "--model", folder)
    assert "E-CAP-05" in result.stderr
    assert "lacks weights" in result.stderr
    assert not list((tmp_path / "x").glob("*.txt"))
