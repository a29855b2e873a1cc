"""Captions: read strictly, varied as pure functions of seed and sample, edited only as was shown."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from PIL import Image
from test_layouts import PICTURE, Files, drawn, lines, notes, put, said
from typer.testing import CliRunner

from sdlora import api, config
from sdlora.cli import app
from sdlora.config import Run
from sdlora.data import captions, edits, reasons, scan, texts
from sdlora.data.batches import micro_batch
from sdlora.data.edits import Edit
from sdlora.data.looks import look
from sdlora.data.scan import Item
from sdlora.errors import BAD_INPUT, UserError
from sdlora.family import Family

# ---------------------------------------------------------------- reading: the corpus of bad captions, by its numbers

TWO: Files = {"a.png": PICTURE, "b.png": PICTURE, "b.txt": "a dog"}
WARNED: dict[str, tuple[Files, dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]] = {
    "67 empty": ({"a.txt": ""}, {"a.png": ()}, {"a.png": ("caption-empty",)}),
    "68 whitespace": ({"a.txt": " \t\r\n\u3000\n"}, {"a.png": ()}, {"a.png": ("windows-line-ends", "caption-empty")}),
    "69 missing for some": ({}, {"a.png": ()}, {"a.png": ("caption-missing",)}),
    "70 byte order mark": ({"a.txt": "\ufeffa cat"}, {"a.png": ("a cat",)}, {"a.png": ("byte-order-mark",)}),
    "75 CRLF": ({"a.txt": "a cat\r\na tom\r\n"}, {"a.png": ("a cat", "a tom")}, {"a.png": ("windows-line-ends",)}),
    "76 a megabyte": ({"a.txt": "very " * 200_000}, {"a.png": (" ".join(["very"] * 200_000),)}, {"a.png": ("caption-large",)}),
    "78 zero width": ({"a.txt": "a\u200b c\u200dat\u2060"}, {"a.png": ("a cat",)}, {"a.png": ("invisible-characters",)}),
    "78 direction": ({"a.txt": "a \u202etac\u202c\x07"}, {"a.png": ("a tac",)}, {"a.png": ("invisible-characters",)}),
    "79 identical": ({"a.txt": "a dog"}, {"a.png": ("a dog",)}, {"a.png": ()}),
    "80 orphan": ({"a.txt": "a cat", "c.txt": "a cow"}, {"a.png": ("a cat",)}, {"a.png": ()}),
    "half a character": ({"captions.json": '{"a": "a \\ud83d cat"}'}, {"a.png": ("a cat",)}, {"a.png": ("invisible-characters",)}),
    "no text in a table": ({"captions.json": '{"a": null}'}, {"a.png": ()}, {"a.png": ("caption-missing",)}),
    "half a brace": ({"a.txt": "a {red cat"}, {"a.png": ("a {red cat",)}, {"a.png": ("braces-unbalanced",)}),
    "an emoji's and a script's joiner": ({"a.txt": "👩\u200d🚀 می\u200cخواهم"}, {"a.png": ("👩\u200d🚀 می\u200cخواهم",)}, {"a.png": ()}),
}


@pytest.mark.parametrize("case", WARNED)
def test_an_odd_caption_is_used_and_noted(case: str, tmp_path: Path) -> None:
    files, wanted, noted = WARNED[case]
    account = scan.scan(put(tmp_path, {**TWO, **files}), skip_unreadable=False)
    assert said(account) == {**wanted, "b.png": ("a dog",)}
    assert notes(account) == {**noted, "b.png": ()}
    assert [out.why for out in account.strays] == ([("orphan-caption",)] if case == "80 orphan" else [])
    assert {note for codes in noted.values() for note in codes} <= reasons.REASONS.keys()


def test_no_caption_at_all_is_usual(tmp_path: Path) -> None:
    assert notes(scan.scan(put(tmp_path, {"a.png": PICTURE}), False)) == {"a.png": ()}


def test_77_a_caption_that_is_cut_is_said(base: Path, tmp_path: Path) -> None:
    """Of a choice of words the longest counts."""
    put(tmp_path / "x", {"a.png": PICTURE, "a.txt": "mira {very|" + "very " * 40 + "}", "b.png": PICTURE, "b.txt": "{a|b}"})
    events = list(api.train(small.settled(tmp_path / "x", base, train__steps=1), tmp_path / "run"))
    (warning,) = [event.text for event in events if event.kind == "warning" and "caption-too-long" in event.text]
    assert "(a.png)" in warning
    assert "very very" in warning
    assert len(warning) < 300


REFUSED: dict[str, tuple[bytes, int, str]] = {
    "71 UTF-16 with mark": ("a cat".encode("utf-16"), 0, "UTF-16"),
    "71 UTF-16": ("a cat".encode("utf-16-le"), 1, "UTF-16"),
    "71 UTF-16 of no Latin": ("猫と犬".encode("utf-16"), 0, "UTF-16"),
    "72 latin-1": ("cream cheese or Käse".encode("latin-1"), 17, "latin-1"),
    "72 latin-1 all over": ("crème brûlée, façade".encode("latin-1"), 2, "latin-1"),
    "72 cp1252's quotes": ("a “quoted” cat".encode("cp1252"), 2, "latin-1"),
    "73 cp932": ("a 猫です".encode("cp932"), 2, "cp932"),
    "73 cp932 katakana": ("キャット, 1girl".encode("cp932"), 0, "cp932"),
    "74 NUL": (b"a cat\0", 5, "NUL"),
    "74 NUL amid UTF-8": ("猫\0".encode(), 3, "NUL"),
}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_a_caption_that_is_not_utf8_is_refused(case: str, skip: bool, tmp_path: Path) -> None:
    content, offset, encoding = REFUSED[case]
    put(tmp_path, {**TWO, "a.txt": content})
    with pytest.raises(UserError, match="E-DATA-04") as caught:
        scan.scan(tmp_path, skip_unreadable=skip)
    assert f"a.txt: not UTF-8 at byte {offset}, it looks like {encoding}" in str(caught.value).replace("a binary file (it holds NUL", "NUL")
    assert caught.value.exit_code == BAD_INPUT
    assert (tmp_path / "a.txt").read_bytes() == content


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    put(tmp_path, {**TWO, "a.txt": b"\xff", "in/c.png": b"x", "in/metadata.jsonl": "[]\n", "captions.json": '{"z": 1}'})
    with pytest.raises(UserError) as caught:
        scan.scan(tmp_path, skip_unreadable=False)
    assert all(
        part in str(caught.value) for part in ("a.txt: not UTF-8", "in/c.png: not a pict", "in/metadata.jsonl: line 1", "captions.json: ")
    )
    with pytest.raises(UserError) as caught:
        scan.scan(tmp_path, skip_unreadable=True)
    assert "in/c.png" not in str(caught.value)


ROWS = [{"file_name": f"{i}.png", "text": f"picture {i}"} for i in range(9)]
PICTURES: Files = {f"{i}.png": PICTURE for i in range(9)}


def change(number: int, *rows: object) -> str:
    """The nine rows with the one of this number replaced."""
    return lines(*ROWS[:number], *rows, *ROWS[number + 1 :])


TABLES: dict[str, tuple[str, Sequence[str]]] = {
    "81 bad line": (lines(*ROWS[:6]) + '{"file_name": "6.png", "text": "x"\n' + lines(*ROWS[7:]), ["line 7: not JSON"]),
    "81 no object": (change(6, 3), ["line 7: not an object"]),
    "81 no name": (change(6, {"text": "x"}), ["line 7: no file_name"]),
    "81 a key twice": (change(6).replace('"7.png",', '"7.png", "text": "y",'), ["line 7: not sound JSON", '"text" stands in it twice']),
    "81 far too deep": (change(6) + "[" * 100_000 + "\n", ["line 9: not"]),
    "82 missing picture": (lines(*ROWS, {"file_name": "no.png", "text": "x"}), ["no.png is not in the folder"]),
    "83 extra picture": (change(4), ["it has no entry for 4.png"]),
    "84 duplicate": (lines(*ROWS, ROWS[2]), ["line 10: 2.png has an entry"]),
    "84 duplicate under another spelling": (lines(*ROWS, {"file_name": "./2.png", "text": "x"}), ["line 10: ./2.png has an entry"]),
    "85 leads out": (lines(*ROWS, {"file_name": "../2.png", "text": "x"}), ["line 10: ../2.png leads out"]),
    "85 leads out, other slash": (lines(*ROWS, {"file_name": "x\\..\\..\\2.png", "text": "x"}), ["leads out"]),
    "85 absolute": (lines(*ROWS, {"file_name": "/etc/passwd", "text": "x"}), ["line 10: /etc/passwd is an absolute path"]),
    "85 drive": (lines(*ROWS, {"file_name": "C:\\2.png", "text": "x"}), ["absolute path"]),
    "86 number": (change(3, {"file_name": "3.png", "text": 3}), ["line 4: the caption of 3.png is 3, not text"]),
    "86 number for a name": (change(3, {"file_name": 3, "text": "x"}), ["line 4: 3 is no file's name"]),
    "86 number in a list": (change(3, {"file_name": "3.png", "text": ["x", 1.5]}), ["line 4: the caption of 3.png"]),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_faulty_table_is_refused(case: str, tmp_path: Path) -> None:
    text, why = TABLES[case]
    with pytest.raises(UserError, match="E-DATA-04") as caught:
        scan.scan(put(tmp_path, {**PICTURES, "metadata.jsonl": text}), skip_unreadable=True)
    assert all(part in str(caught.value) for part in ["metadata.jsonl: ", *why])
    assert "\n" not in str(caught.value)


def test_a_sound_table_is_taken(tmp_path: Path) -> None:
    """The control of all the faulty ones."""
    account = scan.scan(put(tmp_path, {**PICTURES, "metadata.jsonl": lines(*ROWS) + "\n"}), False)
    assert said(account) == {f"{i}.png": (f"picture {i}",) for i in range(9)}


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("metadata.csv", "file_name,text\na.png,x\nb.png\n", "line 3: not as many fields"),
        ("metadata.csv", "file_name,text\na.png,x\nb.png,y,z\n", "line 3: not as many fields"),
        ("metadata.csv", "name,text\na.png,x\n", "line 2: no file_name"),
        ("metadata.csv", 'file_name,text\na.png,"x\n', "unexpected end of data"),
        ("metadata.csv", "file_name,text\na.png,x\na.png,y\n", "line 3: a.png has an entry"),
        ("captions.json", "[]", "not an object of the form"),
        ("captions.json", '{"a": 3}', "the caption of a is 3"),
        ("captions.json", '{"a": "x", "a": "y"}', "stands in it twice"),
        ("captions.json", '{"nobody": "x"}', "nobody is not in the folder"),
        ("captions.json", '{"../a": "x"}', "leads out"),
        ("captions.json", '{"no\\nbody": 3}', "the caption of no\\nbody is 3"),
        ("metadata.jsonl", "\udce4".encode("utf-8", "surrogateescape").decode("latin-1"), "line 1: not JSON"),
    ],
)
def test_other_tables_are_held_to_the_same(name: str, text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="E-DATA-04") as caught:
        scan.scan(put(tmp_path, {"a.png": PICTURE, name: text}), False)
    assert why in str(caught.value)


def test_a_table_need_not_list_what_has_a_caption_of_its_own(tmp_path: Path) -> None:
    account = scan.scan(put(tmp_path, {**TWO, "metadata.jsonl": lines({"file_name": "a.png", "text": "a cat"})}), False)
    assert said(account) == {"a.png": ("a cat",), "b.png": ("a dog",)}


def test_a_huge_file_is_no_caption(tmp_path: Path) -> None:
    put(tmp_path, TWO)
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(20 * 2**30)  # sparse: it takes no room
    with pytest.raises(UserError, match=r"a\.txt: more than"):
        scan.scan(tmp_path, False)


# ---------------------------------------------------------------- variants


def run_of(**data: Any) -> Run:
    return config.parse({"name": "mira", "trigger": "mira", "seed": 5, "data": data})


def item_of(*said: str, regularisation: bool = False) -> Item:
    return Item(Path("a.png"), 16, 16, look(Image.new("RGB", (16, 16))), said, regularisation=regularisation)


def variants(item: Item, run: Run, count: int = 400) -> Counter[str]:
    return Counter(captions.final(item, run, number) for number in range(count))


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("a {red|blue} cat", {"a red cat": 0.5, "a blue cat": 0.5}),
        ("{a|b|c}", {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}),
        ("a {very |}red cat", {"a very red cat": 0.5, "a red cat": 0.5}),
        ("{a {b|c}|d}", {"a b": 0.25, "a c": 0.25, "d": 0.5}),
        ("{{a|b}|{c|{d|e}}}", {"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.125, "e": 0.125}),
        ("{red}, {{x}}", {"{red}, {{x}}": 1.0}),
        ("a|b", {"a|b": 1.0}),
        ("{a|b", {"{a|b": 1.0}),
        ("}{a|b}{", {"}a{": 0.5, "}b{": 0.5}),
    ],
)
def test_one_of_each_choice_is_said(caption: str, wanted: dict[str, float]) -> None:
    found = variants(item_of(caption, regularisation=True), run_of())
    assert found.keys() == wanted.keys()
    assert all(abs(found[text] / 400 - share) < 0.11 for text, share in wanted.items())


HARD: list[Callable[[int], str]] = [
    lambda n: "{" * n, lambda n: "{|" * n, lambda n: "{a|b}" * n, lambda n: "{" * n + "a|b" + "}" * n, lambda n: "{" + "|" * n,
]  # fmt: skip


@pytest.mark.parametrize("hard", range(len(HARD)))
def test_no_caption_takes_long(hard: int) -> None:
    """What is twice as long takes twice the calls. One of 100,000 braces is read, too."""
    one, two = (small.calls(lambda n=n: captions.longest(HARD[hard](n))) for n in (1000, 2000))  # type: ignore[misc]
    assert two < 2.1 * one
    assert captions.longest(HARD[hard](10**5))


def test_what_compares_all_with_all_would_be_noticed() -> None:
    """The control of the law before."""
    one, two = (small.calls(lambda n=n: [max(i, j) for i in range(n) for j in range(n)]) for n in (50, 100))  # type: ignore[misc]
    assert two > 3.5 * one


def test_two_choices_are_made_apart() -> None:
    assert len(variants(item_of("{a|b} {a|b} {a|b}", regularisation=True), run_of())) == 8


def test_one_of_several_captions_is_said() -> None:
    found = variants(item_of("a cat", "on a mat", "asleep"), run_of())
    assert found.keys() == {"mira, a cat", "mira, on a mat", "mira, asleep"}
    assert min(found.values()) > 90
    assert [captions.choose("abc", 5, number) for number in range(20)] == [captions.choose("abc", 5, number) for number in range(20)]
    assert len({tuple(captions.choose("abc", seed, number) for number in range(20)) for seed in range(9)}) == 9


def test_tags_are_mixed_as_is_set() -> None:
    item = item_of("1girl, red hair,smile , ,hat, tree")
    found = variants(item, run_of(shuffle_tags=True, keep_tokens=2))
    assert len(found) == 6, "all orders of the three tags that may move"
    assert all(text.startswith("mira, 1girl, red hair, ") for text in found)
    assert all(sorted(text.split(", ")) == sorted(["mira", "1girl", "red hair", "smile", "hat", "tree"]) for text in found)
    assert len(variants(item, run_of(shuffle_tags=True))) > 100
    assert variants(item, run_of(keep_tokens=2)).keys() == {"mira, 1girl, red hair,smile , ,hat, tree"}, "untouched unless asked for"


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_tags_are_dropped_as_often_as_is_set(share: float) -> None:
    run = run_of(tag_dropout=share, keep_tokens=1)
    found = [captions.final(item_of("1girl, red, [trigger] smiles, hat"), run, number).split(", ") for number in range(400)]
    assert all(tags[0] == "1girl" for tags in found)
    assert all("mira smiles" in tags for tags in found), "the trigger is never dropped"
    for tag in ("red", "hat"):
        assert abs(sum(tag not in tags for tags in found) / 400 - share) < 0.1
    order = ["1girl", "red", "mira smiles", "hat"]
    assert all(tags == [tag for tag in order if tag in tags] for tags in found), "the order stays"


def test_a_caption_is_a_function_of_seed_and_sample() -> None:
    item = item_of("{a|b|c}, {d|e}, f, g, h", "i, j, k, l")
    run = run_of(shuffle_tags=True, tag_dropout=0.2)
    once = [captions.final(item, run, number) for number in range(50)]
    assert [captions.final(item, run, number) for number in reversed(range(50))] == once[::-1], "whatever was asked before"
    other = run.model_copy(update={"seed": 6})
    assert [captions.final(item, other, number) for number in range(50)] != once
    assert len(set(once)) > 25


def test_captions_of_regularisation_stay_as_they_are() -> None:
    assert captions.final(item_of("a cat", regularisation=True), run_of(), 0) == "a cat"
    assert captions.final(item_of(regularisation=True), run_of(), 0) == ""
    assert captions.final(item_of(), run_of(), 0) == "mira"


@pytest.mark.parametrize(
    ("said", "data", "wanted"),
    [
        (("a, b",), {}, False), (("a", "b"), {}, False), ((), {"shuffle_tags": True}, False), (("a",), {"shuffle_tags": True}, False),
        (("a, b",), {"shuffle_tags": True}, True), (("a, b",), {"tag_dropout": 0.1}, True), (("x", "{a|b}"), {}, True),
        (("{a}",), {}, False),
    ],
)  # fmt: skip
def test_only_what_varies_is_read_anew(said: tuple[str, ...], data: dict[str, Any], wanted: bool) -> None:
    run = run_of(**data)
    assert captions.vary([item_of(*said)], run.data) == wanted
    if len(said) < 2:
        assert (len(variants(item_of(*said), run)) > 1) == wanted, "and only that varies"


@pytest.mark.parametrize("text", ["a cat\na dog", "a {red|blue} cat"])
def test_training_says_what_the_sample_says(text: str, base: Path, loaded: Family, tmp_path: Path) -> None:
    put(tmp_path / "x", {"a.png": PICTURE, "a.txt": text, "b.png": PICTURE, "b.txt": "a cow"})
    dataset, learner = drawn([{"folder": str(tmp_path / "x")}], base, loaded, tmp_path)
    assert (learner.final is not None) == ("|" in text)
    (batch,) = micro_batch([learner], range(30))
    run = small.settled(tmp_path / "x", base)
    shown = batch.latents[:, 0, 0, 0].long().tolist()
    wanted = [captions.final(dataset.account.used[picture], run, number) for number, picture in enumerate(shown)]
    assert len(set(wanted)) == 3
    assert torch.equal(batch.text, loaded.tokens(wanted))


# ---------------------------------------------------------------- edits


@pytest.mark.parametrize(
    ("caption", "change", "wanted"),
    [
        ("a cat, on a mat", Edit(find="cat", replace="dog"), "a dog, on a mat"),
        ("a cat, on a mat", Edit(find="Cat", replace="dog"), "a cat, on a mat"),
        ("a cat, on a mat", Edit(find="a cat", replace=""), "on a mat"),
        ("a cat", Edit(add="masterpiece"), "a cat, masterpiece"),
        ("a cat, Masterpiece", Edit(add="masterpiece"), "a cat, Masterpiece"),
        ("", Edit(add="x"), "x"),
        ("a, b, c", Edit(remove="b"), "a, c"),
        ("a, ab, B", Edit(remove="b"), "a, ab"),
        ("a,  b,c", Edit(remove="z"), "a,  b,c"),
        ("a, b", Edit(find="a", replace="b", add="c", remove="b"), "c"),
    ],
)
def test_an_edit_does_what_it_says(caption: str, change: Edit, wanted: str) -> None:
    assert edits.edit(caption, change) == wanted
    assert edits.edit(wanted, Edit(add=change.add, remove=change.remove)) == wanted, "adding and removing twice is once"


def test_edits_are_planned_then_made(tmp_path: Path) -> None:
    files: Files = {
        "a.png": PICTURE, "a.txt": "a cat\na tom cat\n", "b.png": PICTURE, "in/c.caption": "no change", "in/c.png": PICTURE,
        "b.caption": "cat\r\n", "captions.json": json.dumps({"a": "cat"}), "readme.txt": "cat",
    }  # fmt: skip
    put(tmp_path, files)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    plan = edits.plan(tmp_path, Edit(find="cat", replace="dog", add="x"))
    assert [(path.name, old, new) for path, old, new in plan] == [
        ("a.txt", "a cat\na tom cat\n", "a dog, x\na tom dog, x\n"),
        ("b.caption", "cat\r\n", "dog, x\r\n"),
        ("c.caption", "no change", "no change, x"),
    ], "captions of pictures, each line for itself"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before, "planned only"
    edits.apply(plan)
    assert {path: path.read_text("utf-8") for path in before if path.suffix in (".txt", ".caption") and path.name != "readme.txt"} == {
        path: new.replace("\r\n", "\n") for path, _, new in plan
    }
    assert edits.plan(tmp_path, Edit(find="cat", replace="dog", add="x")) == []


def test_the_command_line_shows_before_it_writes(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": PICTURE, "a.txt": "cat", "b.png": PICTURE, "b.txt": "cow"})
    asked = ["data", "edit", str(tmp_path), "--find", "cat", "--replace", "dog"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0
    assert "- cat\n+ dog\n1 caption files would change" in shown.output
    assert (tmp_path / "a.txt").read_text() == "cat"
    assert "1 caption files changed" in CliRunner().invoke(app, [*asked, "--write"]).output
    assert (tmp_path / "a.txt").read_text() == "dog"
    assert CliRunner().invoke(app, ["data", "edit", str(tmp_path)]).exit_code == BAD_INPUT


def test_a_plan_that_is_out_of_date_is_not_made(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": PICTURE, "a.txt": "cat", "b.png": PICTURE, "b.txt": "cat"})
    plan = edits.plan(tmp_path, Edit(find="cat", replace="dog"))
    (tmp_path / "b.txt").write_text("cow")
    with pytest.raises(UserError, match=r"E-DATA-08.*b\.txt"):
        edits.apply(plan)
    assert (tmp_path / "a.txt").read_text() == "cat", "all or nothing"


def test_edits_refuse_what_they_cannot_read(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": PICTURE, "a.txt": b"\xff", "b.png": PICTURE, "b.txt": b"\0"})
    with pytest.raises(UserError, match="E-DATA-04") as caught:
        edits.plan(tmp_path, Edit(add="x"))
    assert all(name in str(caught.value) for name in ("a.txt", "b.txt"))


def test_edits_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="E-DATA-09"):
        edits.plan(put(tmp_path, TWO), Edit(replace="x"))


def test_the_guess_is_of_the_whole_text() -> None:
    assert texts.guess("これは猫です".encode("cp932")) == "cp932 (Japanese)"
    assert texts.guess("Straße, Öl, Ärger".encode("latin-1")) == "latin-1 (Western)"
