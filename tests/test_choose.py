"""The screen Choose without a browser: it lets checkpoints be judged, shows what was found, and makes the chosen one a pack."""

import shutil
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import small

from sdlora import api, queue
from sdlora.api import UserError
from webui import app
from webui.calls import Calls
from webui.choose import Choose
from webui.house import House


@pytest.fixture(scope="module")
def trained(squares: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    settled = small.settled(squares, base, validation__share=0.4, data__prior_prompts=["a cat", "a house"])
    assert [*api.train(settled, root / "mira")][-1].kind == "done"
    return root


@pytest.fixture
def house(trained: Path, tmp_path: Path) -> House:
    shutil.copytree(trained, tmp_path / "root")
    (tmp_path / "outputs").mkdir()
    return app.new_house(tmp_path / "root", tmp_path / "outputs")


@pytest.fixture
def choose(house: House) -> Choose:
    with gr.Blocks() as page:
        return Choose(house, page.load)


def values(choose: Choose, **said: Any) -> dict[Any, Any]:
    """What the page sends."""
    fields = {choose.run: "mira", choose.scales: "0.5, 1", choose.most: 2, choose.prompts: 1, choose.sent: "6:0.5"}
    return fields | {getattr(choose, name): value for name, value in said.items()}


@pytest.mark.slow
def test_checkpoints_are_judged_by_the_queue_and_shown(choose: Choose, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    root = house.projects.root
    monkeypatch.setattr(queue, "start", lambda _: False)
    assert "Not judged yet" in house.live.choose("mira")
    assert choose.list_runs(values(choose))[choose.run].value == "mira"
    told = choose.judge(values(choose))
    assert told[choose.command] == f"sdlora find best {root}/mira --scales 0.5,1 --most 2 --prompts 1"
    assert "waits for its turn" in house.live.choose("mira")
    with pytest.raises(gr.Error, match="E-QUEUE-02"):
        choose.judge(values(choose))
    with pytest.raises(gr.Error, match="E-UI-21"):
        choose.judge(values(choose, scales=",".join(["1"] * 51)))
    with pytest.raises(gr.Error, match="E-UI-19"):
        choose.export(values(choose))
    assert [end for _, end in queue.work(root)] == ["begins", "finished"]
    shown = house.live.choose("mira")
    assert shown.count('data-send="6:') == 2
    assert shown.count("/shown/") == 2 * 5 + 2
    assert "score" not in house.live.home(), "a judging is no run of its own"
    assert [found.id for found in house.easel.shelf.packs()] == ["mira/mira.safetensors"]
    given = [file.value["orig_name"] for file in choose.export(values(choose)).values()]  # type: ignore[index]
    assert given == ["mira-score.html", "mira-grid.png"]


def test_the_chosen_checkpoint_becomes_a_pack_that_recommends_its_scale(choose: Choose, house: House) -> None:
    told = choose.take(values(choose))
    assert told[choose.command].endswith("run keep " + f"{house.projects.root}/mira --step 6 --scale 0.5")
    newest = house.easel.shelf.packs()[0]
    assert newest.id == "mira/mira-6.safetensors"
    assert api.open_pack(newest.path).recommended_scale == 0.5
    for sent, code in (("../x:1", "E-UI-20"), ("6:nan", "E-"), ("7:1", "E-RUN-08")):
        with pytest.raises(gr.Error, match=code):
            choose.take(values(choose, sent=sent))
    with pytest.raises(gr.Error, match="E-UI-13"):
        choose.take(values(choose, run="../mira"))


def test_the_studio_rests_while_checkpoints_are_judged(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "start", lambda _: False)
    api.enqueue_judging(house.projects.root, house.projects.root / "mira", [1.0])
    assert house.projects.busy() == ""
    program = queue.lock.held
    with program(house.projects.root / "queue"), program(house.projects.root / "mira" / "score"):
        assert house.projects.busy() == "mira: which checkpoint"


@pytest.mark.slow
def test_a_program_may_have_checkpoints_judged_and_keep_one(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = object.__new__(Calls)
    calls.house = house
    monkeypatch.setattr(queue, "start", lambda _: False)
    assert calls.score("mira") == {}
    assert calls.judge("mira", "0.5, 1", 1, 1) in [one.id for one in api.queued(house.projects.root)]
    assert [end for _, end in queue.work(house.projects.root)] == ["begins", "finished"]
    found = calls.score("mira")
    assert {row["scale"] for row in found["rows"]} == {0.0, 0.5, 1.0}
    assert calls.keep("mira", 6, 0.5) == "mira/mira-6.safetensors"
    for call in (
        lambda: calls.judge("../mira"),
        lambda: calls.score(".."),
        lambda: calls.keep("/", 6, 1.0),
        lambda: calls.judge("mira", "9"),
    ):
        with pytest.raises(UserError, match=r"E-UI-13|E-GEN-06"):
            call()
