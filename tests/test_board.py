"""The screens without a browser: projects on the disk, forms made from settings, captions, and what programs may call."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import gradio as gr
import pytest
from gradio_client import Client
from small import any_port, draw_folder

from sdlora import api, config, lock
from sdlora.api import Edit, UserError
from webui import app, live
from webui.board import Board
from webui.easel import NONE
from webui.form import Form, written
from webui.goal import KNOB, MIDDLE, RANK, STEPS
from webui.house import House
from webui.projects import SAMPLE


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return app.new_house(tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="module")
def board(house: House) -> Board:
    with gr.Blocks() as demo:
        return Board(house, demo)


def values_of(board: Board, name: str, **said: Any) -> dict[Any, Any]:
    """What the page sends of the screen Goal."""
    goal = board.goal
    empty: dict[Any, Any] = dict.fromkeys(goal.form.controls.values(), "")
    empty |= {goal.project: name, goal.kind: "character", goal.base: "tiny", goal.trigger: "", goal.knob: MIDDLE}
    return empty | {goal.form.controls[key]: value for key, value in said.items()}


def test_pictures_are_copied_put_aside_and_taken_back(house: House, tmp_path: Path) -> None:
    source = draw_folder(tmp_path / "source", square=True)
    project = house.projects.begin("copied")
    house.projects.bring_files(project, sorted(source.iterdir()))
    found = project.look()
    assert found["totals"]["used"] == 5
    name = found["pictures"][0]["file"]
    html = house.live.pictures("copied")
    assert html.count("<article") == 5
    project.put_aside(name)
    assert project.look()["totals"]["found"] == 4
    assert "left aside" in house.live.pictures("copied")
    project.put_aside(f".{name}")
    assert project.look()["totals"]["found"] == 5
    assert len(list(source.iterdir())) == len(list(project.pictures.iterdir()))  # nothing is deleted, here or there
    with pytest.raises(UserError, match=r"E-UI-12 .* more than once"):
        house.projects.bring_files(project, [tmp_path / "a" / "x.png", tmp_path / "b" / "x.png"])


def test_a_project_is_called_as_a_pack_can_be(house: House) -> None:
    for name in ("", "..", "a/b", "a\\b", ".hidden", "x" * 65, "<b>", "a\0"):
        with pytest.raises(UserError, match="E-UI-11"):
            house.projects.begin(name)
    house.projects.begin("mira v1.2")
    with pytest.raises(UserError, match=r"E-UI-11 .* already"):
        house.projects.begin("mira v1.2")


def test_every_setting_has_a_control_with_its_reason(board: Board) -> None:
    fields = {one.name for one in api.described()}
    assert {name for name, _ in config.flat(api.settle({"name": "x"})) if name != "data.folders"} <= fields
    assert board.goal.form.controls.keys() == {key for key, one in Form().settings.items()}
    assert all(one.reason for one in api.described())


def test_what_is_left_empty_stays_usual_and_kinds_bring_their_own(board: Board) -> None:
    form = board.goal.form
    assert form.table(values_of(board, "")) == {}
    said = {"train.steps": "60", "train.lr": "1e-3", "data.flip": "true", "preview.prompts": '["a", "b"]', "adapter.rank@lora": "4"}
    table = form.table(values_of(board, "", **said))
    assert table == {
        "train": {"steps": 60, "lr": 1e-3}, "data": {"flip": True}, "preview": {"prompts": ["a", "b"]}, "adapter": {"rank": 4},
    }  # fmt: skip
    assert "rank" not in form.table(values_of(board, "", **said, **{"adapter.kind": "ia3"}))["adapter"]
    shown = form.filled(table, api.settle({"name": "x"}).model_dump())
    again = {control: update.value if hasattr(update, "value") else update["value"] for control, update in shown.items()}
    assert form.table(again) == table


def test_the_knob_names_the_settings_that_it_sets(board: Board) -> None:
    steps, rank = board.goal.form.controls[STEPS], board.goal.form.controls[RANK]
    usual = api.settle({"name": "x"}).train.steps
    assert usual is not None
    for place, (more, _) in KNOB.items():
        turned = board.goal.turn({**values_of(board, ""), board.goal.knob: place})
        assert turned[steps].value == ("" if place == MIDDLE else str(round(usual * more)))
    assert turned[rank].value == "32"


def test_start_lets_the_run_wait_with_the_settings_that_were_said(
    board: Board, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = house.projects.begin("started")
    house.projects.bring_files(project, sorted(draw_folder(tmp_path / "s", square=True).iterdir()))
    monkeypatch.setattr("sdlora.queue.start", lambda _: False)
    names = [board.goal.begin(values_of(board, "started", **{"train.steps": "7"})) for _ in range(2)]
    assert names == ["started", "started-2"]
    waiting = api.queued(house.projects.root)
    assert [(one.name, one.state) for one in waiting] == [("started", "waiting"), ("started-2", "waiting")]
    run = api.settle(api.read_settings(house.projects.root / "queue" / f"{waiting[0].id}.toml", []))
    assert (run.train.steps, run.data.folder) == (7, str(project.pictures.absolute()))
    command = board.goal.keep(values_of(board, "started", **{"train.steps": "7"}))[board.goal.command]
    assert (
        api.settle(api.read_settings(Path(command.split()[3]), [])).model_dump() == run.model_dump()
    )  # the line that is shown makes the same run
    with pytest.raises(gr.Error, match="E-CONF-01"):
        board.goal.begin(values_of(board, "started", **{"train.steps": "many"}))
    with pytest.raises(gr.Error, match="E-UI-06"):
        board.goal.begin({**values_of(board, "started"), board.goal.base: "/etc/passwd"})
    assert "waits for its turn" in house.live.watch("")
    for one in waiting:
        api.take_out(house.projects.root, one.id)


def test_edits_of_captions_are_taken_back_one_by_one(house: House, tmp_path: Path) -> None:
    project = house.projects.begin("said")
    house.projects.bring_files(project, sorted(draw_folder(tmp_path / "s", square=True).iterdir()))
    before = dict(api.captions(project.pictures))
    first = next(path for path, said in before.items() if said)
    api.put_captions(project.pictures, {first: "a  red\nhat"})
    assert dict(api.captions(project.pictures))[first] == "a red hat"
    assert project.edit(Edit(find="red", replace="blue")) == 1
    assert project.edit(Edit(add="indoors")) >= 1
    assert dict(api.captions(project.pictures))[first] == "a blue hat, indoors"
    project.undo()
    project.undo()
    assert dict(api.captions(project.pictures))[first] == "a red hat"
    with pytest.raises(UserError, match="E-UI-09"):
        project.undo()


def test_captions_say_how_long_they_are_for_the_base(board: Board, house: House, tmp_path: Path) -> None:
    project, words = house.projects.begin("long"), board.words
    house.projects.bring_files(project, sorted(draw_folder(tmp_path / "s", square=True).iterdir()))
    first, second = project.files()[:2]
    api.put_captions(project.pictures, {first: "hat, " * 60, second: "a {red|dark blue} hat"})
    rows = {row[0]: row[2] for row in words.show("long")[words.table]}
    found = {row["file"]: max(row["tokens"]) for row in project.look()["pictures"]}
    assert all(found[name] == rows[name] for name in (first.name, second.name)), "what the ledger says, of the longest option"
    assert rows[first.name] > 75 > rows[second.name] > 4

    def meter(place: str) -> str:
        event = SimpleNamespace(row_value=[place, "", ""])
        return str(words.see({words.project: "long"}, event)[words.picture])  # type: ignore[arg-type]

    assert f"{rows[first.name]} of 75 tokens, the end is not read: {rows[first.name] - 75} tokens" in meter(first.name)
    assert f"{rows[second.name]} of 75 tokens</p>" in meter(second.name)
    project.keep({**project.table(), "text": {"chunks": 2}})
    assert f"{rows[first.name]} of 150 tokens</p>" in meter(first.name)
    project.settings.write_text('base = "owner/not-here"')
    assert words.show("long")[words.table][0][2] == ""


def test_a_finished_run_leads_to_its_pack(board: Board, house: House) -> None:
    told = board.open({board.home.opened: "pack:mira/mira.safetensors"})
    assert told[board.studio.drawn] is True, "it is drawn at once"
    assert told[board.tabs].selected == "studio"
    assert told[board.studio.controls["pack"]].value == NONE, "a pack that is not there is not chosen"
    run = house.projects.root / "led"
    run.mkdir()
    (run / "config.toml").write_text('name = "led"\n[train]\nsteps = 2\n')
    lines = [
        {"time": 1.0, "kind": "step", "step": 1, "loss": 0.1, "data": {"memory_bytes": 2 * 10**9}},
        {"time": 2.0, "kind": "done", "step": 2},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "See it" not in house.live.watch("led"), "there is no pack yet"
    (run / "led.safetensors").write_bytes(b"x")
    os.utime(run / "events.jsonl", (9, 9))
    assert 'data-send="pack:led/led.safetensors"' in house.live.watch("led")
    assert board.open({board.home.opened: "pack:led/led.safetensors"})[board.studio.controls["pack"]].value == "led/led.safetensors"
    with lock.held(run):
        (run / "events.jsonl").write_text(json.dumps(lines[0]) + "\n")
        assert "2.00 GB of memory" in house.live.watch("led")
    shutil.rmtree(run)


def test_the_sample_is_ready_at_once(house: House) -> None:
    assert SAMPLE.is_dir()
    project = house.projects.sample()
    assert len(project.files()) == 20
    assert house.projects.sample() == project
    assert api.settle(project.table()).name == "tavi"


def test_time_and_memory_are_told_in_words() -> None:
    totals = {"steps": 1000, "epochs": 4.5, "disk_bytes": 2e6, "memory_bytes": {"total": 3.3e9}, "seconds": 125.0}
    assert "3.30 GB" in live.takes(totals)
    assert "2 min" in live.takes(totals)
    assert "known once" in live.takes({**totals, "seconds": None})
    assert live.seconds_a_step([{"kind": "step", "step": 1, "time": 0.0}, {"kind": "step", "step": 11, "time": 5.0}]) == 0.5
    assert live.seconds_a_step([]) == 0.0
    assert written([1, 'a"b', True, 0.5]) == '[1, "a\\"b", true, 0.5]'


def test_a_program_may_draw_list_and_ask(tmp_path: Path) -> None:
    served = app.launch(tmp_path, any_port())
    try:
        client = Client(served.url, verbose=False)
        with urlopen(f"{served.url}/gradio_api/info") as answer:
            offered = json.load(answer)["named_endpoints"]
        assert {"/packs", "/projects", "/runs", "/events", "/start", "/ask", "/judge", "/score", "/keep", "/draw"} == set(offered)
        assert client.predict(api_name="/packs") == []
        drawn = client.predict("", "cat face", 1.0, 3, 2, 0.0, "", api_name="/draw")
        assert drawn["base"]["sha256"] == drawn["pack"]["sha256"]  # without a pack both are the base
        assert drawn["base"]["url"].startswith("/shown/")
        assert "--seed 3" in drawn["command"]
        for odd in (("../x",), ("", "x" * 1_000_000), ("", "a", 1.0, -1), ("", "a", 1.0, 0, 10**9), ("", "a", 1.0, 0, 2, 0.0, "9x9")):
            with pytest.raises(Exception, match=r"E-GEN|E-UI"):
                client.predict(*odd, api_name="/draw")
        with pytest.raises(Exception, match="E-UI-10"):
            client.predict("../..", api_name="/start")
    finally:
        served.close()


def test_the_page_answers_while_nothing_is_there(house: House) -> None:
    assert json.dumps(house.live.watch("")).startswith('"<div class')
    assert "about to begin" in house.live.watch("nothing")
