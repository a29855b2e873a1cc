"""Every file below a folder is found once, whatever its name, and whatever links and pipes lie about."""

import os
import socket
from pathlib import Path

import pytest
import small

from sdlora.data import reasons
from sdlora.data.walk import Found, shown, walk
from sdlora.errors import BAD_INPUT, UserError


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def found(root: Path) -> dict[str, tuple[str, ...]]:
    return {str(one.path.relative_to(root)): one.notes for one in walk(root)}


def test_all_files_are_found_in_one_order(tmp_path: Path) -> None:
    names = ["b.png", "a.txt", "10_cat/1.jpg", "10_cat/deep/er/2.gif", "metadata.jsonl", "z/LOUD.PNG", "noext"]
    put(tmp_path, *names)
    assert found(tmp_path) == dict.fromkeys(names, ())
    listed = [one.path for one in walk(tmp_path)]
    assert listed == sorted(listed) == [one.path for one in walk(tmp_path)]


def test_what_systems_leave_behind_is_ignored(tmp_path: Path) -> None:
    root = tmp_path / ".hidden root"  # only what lies below the folder that was named can be hidden
    put(root, "a.png", ".b.png", "._a.png", ".cache/c.png", "__MACOSX/a.png", "in/__MACOSX/a.png", "Thumbs.db", "in/Desktop.ini")
    put(root, "@eaDir/a.png")
    assert found(root) == {"a.png": ()}


def test_circles_of_links_end(tmp_path: Path) -> None:
    root = put(tmp_path / "root", "b/1.png", "c/2.png")
    (root / "b" / "up").symlink_to(root)
    (root / "b" / "self").symlink_to(root / "b")
    (root / "a").symlink_to(root / "c")
    (root / "disk").symlink_to("/")
    once = ("folder-seen-before",)
    wanted = {"b/1.png": (), "c/2.png": (), "b/up": once, "b/self": once, "a": once, "disk": ("link-outside", *once)}
    assert found(root) == wanted, "what has two names goes by its own"


def test_links_out_of_the_folder_are_noted(tmp_path: Path) -> None:
    outside = put(tmp_path / "outside", "1.png", "below/2.png")
    root = put(tmp_path / "root", "own.png")
    (root / "link.png").symlink_to(outside / "1.png")
    (root / "all").symlink_to(outside)
    (root / "own too.png").symlink_to(root / "own.png")
    out = ("link-outside",)
    assert found(root) == {"own.png": (), "own too.png": (), "link.png": out, "all/1.png": out, "all/below/2.png": out}


def test_what_is_no_file_is_named_and_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    put(tmp_path, "folder.png/inside.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "one.png").symlink_to(tmp_path / "two.png")
    (tmp_path / "two.png").symlink_to(tmp_path / "one.png")
    (tmp_path / "null.png").symlink_to("/dev/null")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.png")
    assert found(tmp_path) == {
        "pipe.png": ("not-a-file",),
        "socket.png": ("not-a-file",),
        "null.png": ("link-outside", "not-a-file"),
        "folder.png": ("not-a-file",),
        "folder.png/inside.png": (),
        "gone.png": ("dangling-link",),
        "one.png": ("link-loop",),
        "two.png": ("link-loop",),
    }


def test_names_that_some_systems_take_for_one_are_noted(tmp_path: Path) -> None:
    put(tmp_path, "A.PNG", "a.png", "b.png", "b.jpg", "b.txt", "c.png", "C.txt", "caf\u00e9.png", "cafe\u0301.png", "x/a.png")
    notes = {name: codes for name, codes in found(tmp_path).items() if codes}
    assert notes == {
        "A.PNG": ("case-twin",),
        "a.png": ("case-twin",),
        "b.png": ("same-stem",),
        "b.jpg": ("same-stem",),
        "caf\u00e9.png": ("unicode-twin",),
        "cafe\u0301.png": ("unicode-twin",),
    }


def test_any_name_is_found_and_can_be_shown(tmp_path: Path) -> None:
    odd = {"two\nlines.png": "two\\nlines.png", os.fsdecode(b"caf\xe9.png"): "caf\\udce9.png", "rtl\u202egnp.png": "rtl\\u202egnp.png"}
    fine = ["it's.png", '"q".png', "[1].png", "%2e%2e.png", "-rf.png", "n" * 246 + ".png", "猫\u3000犬.png"]
    put(tmp_path, *odd, *fine)
    assert found(tmp_path) == dict.fromkeys(odd, ("odd-name",)) | dict.fromkeys(fine, ())
    assert {name: shown(name) for name in odd} == odd
    assert all(shown(name) == name for name in fine)
    with pytest.raises(UnicodeEncodeError):
        next(name for name in odd if "caf" in name).encode()


@pytest.mark.parametrize(("name", "why"), [("missing", "no such folder"), ("file", "not a folder"), ("nul\0", "cannot be listed")])
def test_a_root_that_cannot_be_listed_is_an_error(name: str, why: str, tmp_path: Path) -> None:
    put(tmp_path, "file")
    with pytest.raises(UserError, match=f"E-DATA-01.*{why}") as caught:
        walk(tmp_path / name)
    assert caught.value.exit_code == BAD_INPUT


def test_many_files_are_found_quickly(tmp_path: Path) -> None:
    """Twice as many by twice the calls, and each by few."""
    counts = []
    for many in (1000, 2000):
        put(tmp_path / str(many), *(f"{i % 10}/{i}.png" for i in range(many)))
        counts.append(small.calls(lambda many=many: walk(tmp_path / str(many))))  # type: ignore[misc]
        assert len(walk(tmp_path / str(many))) == many
    assert counts[1] < 2.1 * counts[0]
    assert counts[1] < 300 * 2000


def test_every_code_is_explained_once() -> None:
    groups = (reasons.FIXED, reasons.WARNED, reasons.LEFT_OUT)
    assert sum(map(len, groups)) == len(reasons.REASONS)
    assert [reasons.fate(codes) for codes in ([], ["cmyk"], ["cmyk", "multi-page"], ["damaged", "multi-page"])] == [
        "used", "fixed", "warned", "left_out"
    ]  # fmt: skip
    assert Found(Path("a"), ("grey",)).noting("grey", "cmyk").notes == ("grey", "cmyk")
