"""Layouts: whatever folder people have is understood, each picture is shown as often as is set, and a ZIP does no harm."""

import json
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from unicodedata import normalize

import pytest
import small
import torch
from PIL import Image

from sdlora import api, learners, lookup, train
from sdlora.adapter import Bank
from sdlora.config import Folder
from sdlora.data import ledger, reasons, scan, unzip
from sdlora.data.batches import Prepared, micro_batch
from sdlora.data.scan import Account
from sdlora.errors import BAD_INPUT, UserError
from sdlora.family import Family

PICTURE = None
Files = Mapping[str, str | bytes | None]


def put(folder: Path, files: Files) -> Path:
    """A folder of small files; a picture for each name that has no content."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (24, 18), (len(name) * 9 % 256, 90, 40)).save(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def said(account: Account) -> dict[str, tuple[str, ...]]:
    return {account.name(item.path): item.captions for item in account.used}


def notes(account: Account) -> dict[str, tuple[str, ...]]:
    return {account.name(item.path): item.notes for item in account.used}


# ---------------------------------------------------------------- layouts

LAYOUTS: dict[str, tuple[Files, dict[str, tuple[str, ...]]]] = {
    "plain": ({"a.png": PICTURE, "b.JPG": PICTURE, "a.txt": "one"}, {"a.png": ("one",), "b.JPG": ()}),
    "caption": ({"a.png": PICTURE, "a.caption": "one"}, {"a.png": ("one",)}),
    "caption of the full name": ({"a.png": PICTURE, "a.png.txt": "one"}, {"a.png": ("one",)}),
    "nested": (
        {"x/a.png": PICTURE, "x/y/a.png": PICTURE, "x/a.txt": "one", "x/y/a.txt": "two"},
        {"x/a.png": ("one",), "x/y/a.png": ("two",)},
    ),
    "several lines": ({"a.png": PICTURE, "a.txt": "one\n\n two  words \r\none\n"}, {"a.png": ("one", "two words")}),
    "captions.json": (
        {"a.png": PICTURE, "b.png": PICTURE, "in/c.png": PICTURE, "d.png": PICTURE,
         "captions.json": json.dumps({"a.png": "one", "b": ["two", "three"], "in/c": "four", "d": None})},
        {"a.png": ("one",), "b.png": ("two", "three"), "in/c.png": ("four",), "d.png": ()},
    ),
    "metadata.jsonl": (
        {"a.png": PICTURE, "in/b.png": PICTURE, "c.png": PICTURE, "d.png": PICTURE, "e.png": PICTURE,
         "metadata.jsonl": lines(
             {"file_name": "a.png", "text": "one", "caption": "other"}, {"file_name": "./in/b.png", "caption": "two"},
             {"file_name": "c.png", "prompt": "three"}, {"file_name": "d.png", "label": 3},
             {"file_name": "e.png", "text": ["four", "five"]})},
        {"a.png": ("one",), "in/b.png": ("two",), "c.png": ("three",), "d.png": (), "e.png": ("four", "five")},
    ),
    "metadata.csv": (
        {"a.png": PICTURE, "in/b.png": PICTURE, "metadata.csv": 'file_name,text\r\na.png,"one, with ""a"" comma"\r\nin\\b.png,two\r\n'},
        {"a.png": ('one, with "a" comma',), "in/b.png": ("two",)},
    ),
    "a table in each folder": (
        {"train/a.png": PICTURE, "train/metadata.jsonl": lines({"file_name": "a.png", "text": "one"}),
         "test/a.png": PICTURE, "test/metadata.csv": "file_name,text\na.png,two\n"},
        {"train/a.png": ("one",), "test/a.png": ("two",)},
    ),
    "kohya": (
        {"3_mira cat/a.png": PICTURE, "3_mira cat/b.png": PICTURE, "3_mira cat/b.txt": "own", "20_dog/deep/c.png": PICTURE,
         "2019_summer/d.png": PICTURE, "01_front/e.png": PICTURE},
        {"3_mira cat/a.png": ("mira cat",), "3_mira cat/b.png": ("own",), "20_dog/deep/c.png": ("dog",), "2019_summer/d.png": (),
         "01_front/e.png": ()},
    ),
    "two Unicode forms of one name": (
        {normalize("NFD", "é.png"): PICTURE, normalize("NFC", "é.txt"): "one"}, {normalize("NFD", "é.png"): ("one",)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_understood(layout: str, tmp_path: Path) -> None:
    files, wanted = LAYOUTS[layout]
    account = scan.scan(put(tmp_path / "pictures", files), skip_unreadable=False)
    assert said(account) == wanted
    assert account.strays == account.left_out == []
    assert account.line().startswith(f"{len(wanted)} pictures found, {len(wanted)} used (")
    assert all(note in reasons.REASONS for item in account.used for note in item.notes)


def test_kohyas_folders_say_repeats(tmp_path: Path) -> None:
    account = scan.scan(put(tmp_path, LAYOUTS["kohya"][0]), skip_unreadable=False)
    repeats = {account.name(item.path): item.repeats for item in account.used}
    assert repeats == {"3_mira cat/a.png": 3, "3_mira cat/b.png": 3, "20_dog/deep/c.png": 20, "2019_summer/d.png": 1, "01_front/e.png": 1}
    assert "caption-from-folder" in notes(account)["3_mira cat/a.png"]
    assert "1 with a caption of their own, 2 with a caption of the folder's name, 28 samples an epoch" in account.line()


def test_masks_belong_to_pictures(tmp_path: Path) -> None:
    files = {"a.jpg": PICTURE, "a-masklabel.png": PICTURE, "b.png": PICTURE, "in/c.png": PICTURE, "in/c-masklabel.png": PICTURE}
    account = scan.scan(put(tmp_path, {**files, "lost-masklabel.png": PICTURE}), skip_unreadable=False)
    masks = {account.name(item.path): account.name(item.mask) if item.mask else None for item in account.used}
    assert masks == {"a.jpg": "a-masklabel.png", "b.png": None, "in/c.png": "in/c-masklabel.png"}
    assert [(account.name(out.path), out.why) for out in account.strays] == [("lost-masklabel.png", ("orphan-mask",))]
    assert "2 with a mask" in account.line()


SOURCES: dict[str, tuple[str, str]] = {  # what names its file, and what says nothing
    "a.txt": ("a.txt", " "),
    "a.caption": ("a.caption", ""),
    "captions.json": ('{"a": "captions.json"}', '{"a": ""}'),
    "metadata.jsonl": (lines({"file_name": "a.png", "text": "metadata.jsonl"}), lines({"file_name": "a.png"})),
    "metadata.csv": ("file_name,text\na.png,metadata.csv\n", "file_name,text\na.png,\n"),
}


@pytest.mark.parametrize("first", range(len(SOURCES)))
def test_of_several_sources_the_first_counts(first: int, tmp_path: Path) -> None:
    names = [*list(SOURCES)[first:], "class"]
    put(tmp_path, {"3_class/a.png": PICTURE, **{f"3_class/{name}": SOURCES[name][0] for name in names[:-1]}})
    (item,) = scan.scan(tmp_path, False).used
    assert item.captions == (names[0],)
    assert ("several-caption-sources" in item.notes) == (len(names) > 2)
    put(tmp_path, {f"3_class/{names[0]}": SOURCES[names[0]][1]})
    (item,) = scan.scan(tmp_path, False).used
    assert item.captions == (names[1],), "a source that says nothing leaves the word to the next"


def test_the_nearest_table_counts(tmp_path: Path) -> None:
    tables = {"captions.json": '{"in/a": "far"}', "in/metadata.csv": "file_name,text\na.png,near\n"}
    account = scan.scan(put(tmp_path, {"in/a.png": PICTURE, **tables}), False)
    assert said(account) == {"in/a.png": ("near",)}
    assert notes(account) == {"in/a.png": ("several-caption-sources",)}


def test_every_file_that_concerns_pictures_is_accounted_for(tmp_path: Path) -> None:
    files = {
        "a.png": PICTURE,
        "b.heic": "x",
        "b.txt": "one",
        "c.caption": "two",
        "d-masklabel.png": PICTURE,
        "README.md": "x",
        "e.mp4": "x",
    }
    put(tmp_path, files)
    (tmp_path / "f.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "g.png").symlink_to(tmp_path / "nowhere.png")
    account = scan.scan(tmp_path, skip_unreadable=True)
    assert {account.name(out.path): out.why for out in account.strays} == {
        "b.heic": ("format-not-read",),
        "b.txt": ("orphan-caption",),
        "c.caption": ("orphan-caption",),
        "d-masklabel.png": ("orphan-mask",),
        "f.txt": ("dangling-link",),
    }
    assert [(account.name(out.path), out.why) for out in account.left_out] == [("g.png", ("dangling-link",))]
    assert account.line() == (
        "2 pictures found, 1 used (0 with a caption of their own), 1 left out (g.png: dangling-link); 5 other files (b.heic: "
        "format-not-read; b.txt: orphan-caption; c.caption: orphan-caption; d-masklabel.png: orphan-mask; f.txt: dangling-link)"
    )


# ---------------------------------------------------------------- several folders


def test_folders_have_repeats_weight_and_kind_of_their_own(base: Path, tmp_path: Path) -> None:
    put(tmp_path / "first", {"a.png": PICTURE, "2_x/b.png": PICTURE, "prior/c.png": PICTURE, "prior/c.txt": "a cat"})
    folders = [
        {"folder": str(tmp_path / "first"), "repeats": 3, "weight": 0.5},
        {"folder": str(tmp_path / "first" / "prior"), "kind": "regularisation"},
    ]
    settled = small.settled(tmp_path, base, data__folder="", data__folders=folders)
    dataset = ledger.read_dataset(settled, tmp_path / "cache")
    account = dataset.account
    found = {account.name(item.path): (item.repeats, item.weight, item.regularisation) for item in account.used}
    assert found == {"first/a.png": (3, 0.5, False), "first/2_x/b.png": (6, 0.5, False), "prior/c.png": (1, 1.0, True)}
    assert dataset.captions == [["mira, x"], ["mira"], ["a cat"]], "what is for regularisation does not name the trigger"
    assert "1 for regularisation, 10 samples an epoch" in account.line()


@pytest.mark.parametrize(("names", "code"), [(["a", "b/../a"], "E-DATA-06"), (["a", "nowhere"], "E-DATA-01")])
def test_folders_that_cannot_be_together_are_refused(names: list[str], code: str, tmp_path: Path) -> None:
    put(tmp_path, {"a/a.png": PICTURE, "b/b.png": PICTURE})
    with pytest.raises(UserError, match=code):
        scan.scan_all([Folder(folder=str(tmp_path / name)) for name in names], False, tmp_path)
    assert len(scan.scan_all([Folder(folder=str(tmp_path / name)) for name in ("a", "b")], False, tmp_path).used) == 2, "the control"


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    put(tmp_path, {"a/set/1.png": PICTURE, "b/set/1.png": PICTURE, "c/1.png": PICTURE})
    account = scan.scan_all([Folder(folder=str(tmp_path / name)) for name in ("a/set", "b/set", "c")], False, tmp_path)
    assert [account.name(item.path) for item in account.used] == [f"{tmp_path}/a/set/1.png", f"{tmp_path}/b/set/1.png", "c/1.png"]


def test_regularisation_alone_teaches_nothing(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": PICTURE})
    with pytest.raises(UserError, match="E-DATA-02"):
        scan.scan_all([Folder(folder=str(tmp_path), kind="regularisation")], False, tmp_path)


def drawn(folders: list[dict[str, object]], base: Path, loaded: Family, where: Path) -> tuple[ledger.Dataset, Prepared]:
    settled = small.settled(where, base, data__folder="", data__folders=folders)
    dataset = ledger.fit_dataset(ledger.read_dataset(settled, where / "cache"), settled, loaded)
    latents = [[(torch.full((4, 8, 8), float(i)), torch.zeros(4, 8, 8))] for i in range(len(dataset.sizes))]
    return dataset, learners.prepared(learners.Job(settled, loaded.base, where, 0.0, dataset, ["text_encoder.x"]), loaded, latents)


def test_an_epoch_shows_each_picture_as_often_as_is_set(base: Path, loaded: Family, tmp_path: Path) -> None:
    put(tmp_path, {"x/a.png": PICTURE, "x/4_y/b.png": PICTURE, "z/c.png": PICTURE})
    folders: list[dict[str, object]] = [{"folder": str(tmp_path / "x"), "repeats": 2}, {"folder": str(tmp_path / "z"), "repeats": 3}]
    dataset, learner = drawn(folders, base, loaded, tmp_path)
    wanted = {i: item.repeats for i, item in enumerate(dataset.account.used)}
    assert sorted(wanted.values()) == [2, 3, 8]
    epoch = sum(wanted.values())
    orders = []
    for start in range(0, 3 * epoch, epoch):
        (batch,) = micro_batch([learner], range(start, start + epoch))
        seen = batch.latents[:, 0, 0, 0].long().tolist()
        assert Counter(seen) == wanted
        orders.append(tuple(seen))
    assert len(set(orders)) == 3, "each epoch in another order"


def test_a_weight_is_a_factor_on_the_loss(base: Path, loaded: Family, tmp_path: Path) -> None:
    put(tmp_path, {"x/a.png": PICTURE})
    settled = small.settled(tmp_path / "x", base)
    bank, losses = Bank(loaded.components), {}
    objective = lookup.find("objectives", "epsilon")
    for weight in (1.0, 2.5):
        _, learner = drawn([{"folder": str(tmp_path / "x"), "weight": weight}], base, loaded, tmp_path)
        (batch,) = micro_batch([learner], range(2))
        losses[weight] = train.sample_losses(loaded, bank, batch, [train.Goal(objective.noise, settled.objective)])
    torch.testing.assert_close(losses[2.5], 2.5 * losses[1.0], rtol=1e-6, atol=0)


# ---------------------------------------------------------------- ZIP


def pack(path: Path, entries: Mapping[str, bytes], change: Callable[[zipfile.ZipInfo], None] = lambda _: None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            change(info)
            archive.writestr(info, content)
    return path


def picture_bytes(tmp_path: Path) -> bytes:
    return (put(tmp_path / "source", {"a.png": PICTURE}) / "a.png").read_bytes()


def test_a_zip_is_a_folder(tmp_path: Path) -> None:
    content = picture_bytes(tmp_path)
    entries = {"set\\": b"", "set/3_x/a.png": content, "set\\b.png": content, "set/b.txt": b"one", "__MACOSX/._a.png": b"x"}
    archive = pack(tmp_path / "set.zip", entries)
    before = archive.read_bytes()
    account = scan.scan_all([Folder(folder=str(archive))], False, tmp_path / "cache")
    assert said(account) == {"set/3_x/a.png": ("x",), "set/b.png": ("one",)}
    (folder,) = (tmp_path / "cache").iterdir()
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert unzip.unzip(archive, tmp_path / "cache") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == made, "the second time nothing is written"
    (folder / "set" / "b.txt").write_bytes(b"cut")
    (folder / "set" / "b.png").write_bytes(b"cut")
    unzip.unzip(archive, tmp_path / "cache")
    assert (folder / "set" / "b.png").read_bytes() == content, "what is not whole is unpacked again"
    other = pack(tmp_path / "set.zip", {**entries, "c.png": content})
    assert unzip.unzip(other, tmp_path / "cache") != folder, "other content, other folder"
    assert before == pack(tmp_path / "again.zip", entries).read_bytes(), "the control"


@pytest.mark.parametrize("rate", [0.0, 5e-3])
def test_a_run_trains_on_a_zip(rate: float, base: Path, tmp_path: Path) -> None:
    archive = pack(tmp_path / "mira.zip", {"a.png": picture_bytes(tmp_path), "a.txt": b"a cat\n{red|blue} dog"})
    settled = small.settled(archive, base, name="", train__steps=2, train__text_encoder_lr=rate)
    assert settled.name == "mira"
    for _ in range(2):  # the second time it goes on, and the folder that the ZIP left is no other file
        events = list(api.train(settled, tmp_path / "run"))
        assert events[-1].kind == "done"
    written = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert [(row["file"], row["captions"]) for row in written["pictures"]] == [("a.png", ["mira, a cat", "mira, {red|blue} dog"])]
    text = b"".join(path.read_bytes() for path in (tmp_path / "run").glob("*.safetensors"))
    assert str(tmp_path).encode() not in text, "no path of this machine is in the pack"


def link(info: zipfile.ZipInfo) -> None:
    info.external_attr = 0o120777 << 16


def pipe(info: zipfile.ZipInfo) -> None:
    info.external_attr = 0o010644 << 16


SMALL = unzip.Limits(files=3, file_bytes=5000, total_bytes=9000, ratio=20)
ATTACKS: dict[str, tuple[Mapping[str, bytes], str]] = {
    "absolute": ({"/etc/a.png": b"x"}, "absolute"),
    "drive": ({"C:\\a.png": b"x"}, "absolute"),
    "share": ({"\\\\host\\a.png": b"x"}, "absolute"),
    "up": ({"in/../../a.png": b"x"}, "leads out"),
    "up with the other slash": ({"..\\a.png": b"x"}, "leads out"),
    "case": ({"a.png": b"x", "A.PNG": b"y"}, "only in case"),
    "Unicode form": ({normalize("NFC", "é.png"): b"x", normalize("NFD", "é.png"): b"y"}, "Unicode form"),
    "file and folder": ({"a": b"x", "A/b.png": b"y"}, "both a file and a folder"),
    "empty": ({"./": b""}, "no file's name"),
    "many": ({f"{i}.png": b"x" for i in range(4)}, "4 entries"),
    "one too large": ({"a.png": bytes(range(256)) * 20}, "5120 bytes"),
    "all too large": ({f"{i}.png": bytes(4000) for i in range(3)}, "12000 bytes"),
    "bomb": ({"a.png": bytes(4900)}, "times its size"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_zip_that_could_do_harm_is_refused_whole(attack: str, tmp_path: Path) -> None:
    entries, why = ATTACKS[attack]
    archive = pack(tmp_path / "a.zip", {"good.png": b"x"} | dict(entries) if len(entries) < 3 else entries)
    refused(archive, why, tmp_path)


def refused(archive: Path, why: str, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match="E-DATA-07") as caught:
        unzip.unzip(archive, tmp_path / "cache", SMALL)
    assert why in str(caught.value)
    assert caught.value.exit_code == BAD_INPUT
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize(("change", "why"), [(link, "is a link"), (pipe, "no regular file")])
def test_a_zip_holds_files_only(change: Callable[[zipfile.ZipInfo], None], why: str, tmp_path: Path) -> None:
    refused(pack(tmp_path / "a.zip", {"a.png": b"/etc/passwd"}, change), why, tmp_path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_a_name_twice_is_refused(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.zip", {"a.png": b"x"})
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("a.png", b"y")
    refused(archive, "2 times", tmp_path)


def damaged(content: bytes, what: str) -> bytes:
    central = content.index(b"PK\x01\x02")
    if what == "encrypted":
        flags = struct.pack("<H", 1)
        return content[:6] + flags + content[8 : central + 8] + flags + content[central + 10 :]
    if what == "method":
        method = struct.pack("<H", 99)
        return content[:8] + method + content[10 : central + 10] + method + content[central + 12 :]
    if what == "checksum":
        return content[: central + 16] + bytes(4) + content[central + 20 :]
    if what == "name with NUL":
        return content.replace(b"a.png", b"a\0png")
    return {"cut": content[: len(content) // 2], "no ZIP": b"<html>not found</html>", "nothing": b""}[what]


@pytest.mark.parametrize("what", ["encrypted", "method", "checksum", "name with NUL", "cut", "no ZIP", "nothing"])
def test_a_zip_that_cannot_be_read_is_refused(what: str, tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.zip", {"a.png": b"some content"})
    archive.write_bytes(damaged(archive.read_bytes(), what))
    (tmp_path / "cache").mkdir()
    why = {"encrypted": "encrypted", "name with NUL": "no file's name"}.get(what, "cannot be read")
    refused(archive, why, tmp_path)


def test_a_zip_within_the_limits_is_unpacked(tmp_path: Path) -> None:
    """The control of all the attacks: the same limits, honest entries."""
    entries = {"in/a.png": bytes(range(256)) * 10, "b.png": b"y", "in/": b""}
    folder = unzip.unzip(pack(tmp_path / "a.zip", entries), tmp_path / "cache", SMALL)
    assert {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == {
        name: content for name, content in entries.items() if content
    }
