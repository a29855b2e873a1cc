"""No letter ends a run: whatever encoding the streams and the system have, and whatever bytes a name is made of."""

import io
import json
import logging
import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
from PIL import Image
from small import draw_folder

from sdlora import api, children, cli, queue, record, safeio, settings, streams
from sdlora.errors import UserError, escape_surrogates
from sdlora.events import Event, Log
from sdlora.generate import Recipe
from sdlora.terminal import console, progress, say, show
from webui import app
from webui.calls import Calls

NAMES = ("Zoë-é", "Мира", "猫ミラ", "قطة", "देवनागरी", "แมว", "😀cat")
ENCODINGS = ("cp1252", "cp932", "ascii")
ODD = os.fsdecode(b"caf\xe9")
"""A name as Linux has it that is no UTF-8."""
ONE_STEP = {"base": "tiny", "train": {"steps": 1, "batch_size": 1}, "adapter": {"rank": 2}, "preview": {"scales": [], "every": 0}}


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """Pictures and captions whose names and words are of many scripts, in a folder with a letter outside the first plane."""
    folder = tmp_path / "cats 😀 猫"
    folder.mkdir()
    for i, name in enumerate(NAMES):
        Image.new("RGB", (64, 64), (30 * i, 90, 200)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{name} by the sea", "utf-8")
    return folder


class Streams:
    """What was written to stdout and stderr of an encoding, which are no consoles."""

    def __init__(self, patch: pytest.MonkeyPatch, encoding: str) -> None:
        self.bytes = {name: io.BytesIO() for name in ("stdout", "stderr")}
        self.streams = {name: io.TextIOWrapper(place, encoding=encoding, errors="strict") for name, place in self.bytes.items()}
        for name, stream in self.streams.items():
            patch.setattr(sys, name, stream)

    def said(self, name: str) -> bytes:
        self.streams[name].flush()
        return self.bytes[name].getvalue()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_all_ways_to_say_something_say_it_in_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"{' '.join(NAMES)} · {ODD} :cat:"
    made = Streams(monkeypatch, encoding)
    with pytest.raises(UnicodeEncodeError):  # the control
        print(text, flush=True)
    monkeypatch.setenv("PYTHONIOENCODING", f"{encoding}:strict")
    made = Streams(monkeypatch, encoding)
    streams.make_streams_safe()
    told = text.encode(encoding, "backslashreplace")
    print(text)
    say(text)
    with progress(console()) as shown:
        show(Event("warning", text, step=1), shown, shown.add_task(text, total=2, figures=""))
    assert made.said("stdout").count(told) >= 4
    say(text, error=True)
    logger = logging.Logger("letters")  # of its own: what the tests' runner keeps of the others' words must be UTF-8
    logger.addHandler(logging.StreamHandler(sys.stderr))
    logger.warning(text)
    sys.stderr.write(warnings.formatwarning(text, UserWarning, "x.py", 1))
    try:
        raise ValueError(text)
    except ValueError:
        traceback.print_exc()
    assert made.said("stderr").count(told) == 4


def test_what_is_no_console_takes_utf8_unless_another_encoding_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for named, expected in (("", "utf-8"), (":strict", "utf-8"), ("cp932", "cp1252")):  # the last keeps what the stream was opened with
        monkeypatch.setenv("PYTHONIOENCODING", named)
        made = Streams(monkeypatch, "cp1252")
        streams.make_streams_safe()
        assert [stream.encoding for stream in made.streams.values()] == [expected] * 2
    monkeypatch.setenv("PYTHONIOENCODING", "")
    made = Streams(monkeypatch, "cp1252")
    monkeypatch.setattr(made.streams["stdout"], "isatty", lambda: True, raising=False)
    streams.make_streams_safe()
    assert made.streams["stdout"].encoding == "cp1252"
    monkeypatch.setattr(sys, "stdout", None)  # as where there is no console at all
    streams.make_streams_safe()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_pictures_of_any_name_are_checked_in_any_encoding(encoding: str, named: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    monkeypatch.setattr(sys, "argv", ["sdlora", "check", str(named)])
    made = Streams(monkeypatch, encoding)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    for name in NAMES:
        assert f"{name}.png".encode(encoding, "backslashreplace") in made.said("stdout")


def test_programs_that_are_started_write_utf8_whatever_was_asked_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUTF8", "0")
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    program = "import os, sys; print(sys.argv[1], os.environ['OWN'], sys.flags.utf8_mode); print('\\udce9')"
    with children.start(["-c", program, " ".join(NAMES)], {"OWN": "yes"}, stdout=children.READ) as process:
        assert process.stdout
        assert process.stdout.read() == f"{' '.join(NAMES)} yes 1\n\\udce9\n"
    wrong = subprocess.run([sys.executable, "-c", "print('猫')"], capture_output=True, check=False)  # the control
    assert b"UnicodeEncodeError" in wrong.stderr


def test_a_log_holds_names_that_are_no_utf8_such_as_can_be_read(tmp_path: Path) -> None:
    event = Event("done", f"r/{ODD}.safetensors", 3, data={"file": ODD, "list": [ODD, 1]})
    Log(tmp_path / "events.jsonl").add(event)
    (found,) = record.events(tmp_path)[0]
    assert (found["text"], found["data"]) == ("r/caf\\udce9.safetensors", {"file": "caf\\udce9", "list": ["caf\\udce9", 1]})
    (tmp_path / "events.jsonl").write_text(json.dumps({"time": 1, "kind": "done", "text": ODD}) + "\n")
    assert record.events(tmp_path)[0] == []  # the control: so it was not read
    assert str(UserError("E-DATA-01", "no picture", ODD)).encode() == "E-DATA-01 · no picture · caf\\udce9".encode()
    assert escape_surrogates("猫 😀") == "猫 😀"


def test_what_no_file_can_hold_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    for table in ({"data": {"folder": ODD}}, {"preview": {"prompts": ["a", ODD]}}, {"data": {"folders": [{"folder": ODD}]}}):
        with pytest.raises(UserError, match="E-CONF-01"):
            api.settle({"name": "x", **table})
    for prompts in ({"prompt": ODD}, {"prompt": "", "negative": ODD}):
        with pytest.raises(UserError, match="E-GEN-08"):
            Recipe(**prompts)
    with pytest.raises(UserError, match="E-PACK-10"):
        api.header_changes([f"modelspec.title={ODD}"])
    with pytest.raises(UserError, match="E-DISK-04"):
        safeio.write(tmp_path / "x.txt", ODD)
    assert list(tmp_path.iterdir()) == []


def test_a_name_in_a_queue_is_no_longer_than_itself_and_comes_back(tmp_path: Path) -> None:
    for i, name in enumerate(("देवनागरी" * 8, "猫" * 64, "a%2Fb c", ODD, "deep/er")):
        entry = queue.add(tmp_path, "", tmp_path / name)
        assert queue.entries(tmp_path)[i].out == tmp_path / name
        assert len(os.fsencode(entry)) < 230
        assert unquote(safeio.file_name(name)) == name
    assert set(safeio.file_name('%/\\:*?"<>|\n')) <= set("%0123456789ABCDEF")


def test_a_setting_is_put_as_it_is() -> None:
    for value in ("pics 😀", 'a "b" \\ c', "a\x7fb", "{x}"):
        table: dict[str, object] = {}
        settings.put(table, "data.folder", value)
        assert table == {"data": {"folder": value}}
    with pytest.raises(UserError, match="E-CONF-05"):
        settings.put({"data": 1}, "data.folder", "x")


def read_anew(monkeypatch: pytest.MonkeyPatch, encoding: str, system: str) -> list[list[str]]:
    begun: list[list[str]] = []
    monkeypatch.setattr(streams.os, "execv", lambda path, words: begun.append([path, *words]))
    monkeypatch.setattr(
        streams, "sys", SimpleNamespace(executable="py", orig_argv=["py", "-m", "x"], getfilesystemencoding=lambda: encoding)
    )
    monkeypatch.setattr(streams, "os", SimpleNamespace(name=system, execv=os.execv))
    streams.read_names_as_utf8()
    return begun


def test_where_the_system_knows_ascii_alone_the_program_begins_anew_with_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_anew(monkeypatch, "ascii", "posix") == [["py", "py", "-X", "utf8", "-m", "x"]]
    monkeypatch.undo()
    for encoding, system in (("utf-8", "posix"), ("ascii", "nt")):
        assert read_anew(monkeypatch, encoding, system) == []
        monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}])
def test_a_run_over_such_names_ends_with_its_pack(more: dict[str, str], named: Path, tmp_path: Path) -> None:
    words = ["train", str(named), "--name", NAMES[2]]
    words += ["--set", "train.steps=1", "--set", "train.batch_size=1", "--set", "preview.scales=[]", "--out", str(tmp_path / "выход")]
    environment = {**os.environ, "PYTHONUTF8": "0", **more}
    ended = subprocess.run([sys.executable, "-m", "sdlora.cli", *words], capture_output=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "выход" / f"{NAMES[2]}.safetensors").is_file()
    assert record.read(tmp_path / "выход").state == "finished"


@pytest.mark.slow
def test_a_run_that_the_page_began_ends_with_its_pack(named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUTF8", "0")
    monkeypatch.setenv("PYTHONIOENCODING", "cp932")
    root, logs = tmp_path / "корень", list[str]()
    root.mkdir()
    house = app.new_house(root, tmp_path)
    project = house.projects.begin("猫ミラ Мира é")
    house.projects.bring_files(project, sorted(named.iterdir()))
    project.keep({"name": project.name, **ONE_STEP})
    calls = object.__new__(Calls)
    calls.house = house
    run, remove = calls.start(project.name), queue._remove

    def remove_and_keep(root: Path, entry: str) -> None:
        logs.append((root / "queue" / f"{entry}.log").read_bytes().decode())
        remove(root, entry)

    monkeypatch.setattr(queue, "_remove", remove_and_keep)
    assert [what for _, what in queue.work(root)] == ["begins", "finished"]
    assert (root / run / f"{project.name}.safetensors").is_file()
    assert f"pack: {root / run / project.name}.safetensors" in logs[-1]


def test_a_folder_whose_names_are_no_utf8_is_checked_and_its_odd_names_are_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = draw_folder(tmp_path / "p", 2, square=True)
    try:
        (folder / "0.png").rename(folder / f"{ODD}.png")
    except OSError:
        pytest.skip("this disk has no such names")
    found, page = api.check(api.settle({**ONE_STEP, "name": "x", "data": {"folder": str(folder)}}), tmp_path / "unpacked")
    assert {row["file"] for row in found["pictures"]} == {"1.png", "caf\\udce9.png"}
    assert "caf\\udce9.png" in page() if callable(page) else page
    monkeypatch.setattr(sys, "argv", ["sdlora", "check", f"{folder}/{ODD}"])
    monkeypatch.setenv("PYTHONIOENCODING", "")
    made = Streams(monkeypatch, "ascii")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert b"E-CONF-01" in made.said("stderr")


def test_the_page_lists_what_has_an_odd_name_and_says_why_it_cannot_be_taken(tmp_path: Path) -> None:
    house = app.new_house(tmp_path / "root", tmp_path)
    run = tmp_path / "root" / ODD
    try:
        run.mkdir(parents=True)
    except OSError:
        pytest.skip("this disk has no such names")
    for name, text in (("config.toml", 'name = "x"'), ("events.jsonl", ""), ("x.safetensors", "")):
        (run / name).write_text(text)
    project = house.projects.begin("p")
    draw_folder(project.pictures, 1)
    (project.pictures / "0.png").rename(project.pictures / f"{ODD}.png")
    calls = object.__new__(Calls)
    calls.house = house
    assert ([one["id"] for one in calls.runs()], calls.packs()) == (["caf\\udce9"], ["caf\\udce9/x.safetensors"])
    for attempt in (lambda: house.projects.run("caf\\udce9"), lambda: house.easel.shelf.find("caf\\udce9/x.safetensors")):
        with pytest.raises(UserError, match="E-DISK-04"):
            attempt()
    project.look()
    assert "caf\\udce9.png" in house.live.pictures("p")
    assert 'class="badge' in house.live.pictures("p"), "what becomes of it is known by the same name"
    project.put_aside("caf\\udce9.png")
    assert [path.name for path in project.files()] == [f".{ODD}.png"]
