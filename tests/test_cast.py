"""Laws of a cast: who is trained beside others ends as if alone, whatever becomes of them, and its folder is that of a run by itself."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from PIL import Image
from safetensors.torch import load_file
from test_resume import differences, pack
from typer.testing import CliRunner

from sdlora import api, cli, job, plan, settings, state
from sdlora.api import Event
from sdlora.config import Run
from sdlora.errors import UserError
from sdlora.families import sd1
from sdlora.plan import Plan
from sdlora.stop import Stop

APART = 1e-3
"""Largest difference of two packs' tensors, as a share of the tensor's largest number, in fp32."""
ROOT = Path(__file__).parent.parent


def go(runs: Sequence[Run], out: Path, act: Callable[[Event], None] | None = None, stop: Stop | None = None) -> list[Event]:
    seen = []
    for event in api.train_cast(runs, out, stop):
        seen.append(event)
        if act:
            act(event)
    return seen


def alone(run: Run, out: Path) -> Path:
    assert list(api.train(run, out))[-1].kind == "done"
    return out


def apart(a: Path, b: Path) -> float:
    """The largest relative difference between what two folders' last checkpoints hold of the adapter."""
    ours, theirs = (load_file(state.folder(one, state.steps(one)[-1]) / "adapter.safetensors") for one in (a, b))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-12)) for name in ours)


@pytest.fixture(scope="module")
def members(squares: Path, pictures: Path, base: Path) -> list[Run]:
    """Three that differ in whatever may differ: data, kind, rank, optimizer, objective, batch, schedule, length."""
    slow = {"train__lr": 1e-3, "train__text_encoder_lr": 5e-4}
    first = small.settled(squares, base, name="mira", **slow, validation__share=0.3, train__ema=0.5)
    second = small.settled(pictures, base, name="tavi", **slow, seed=3, adapter__rank=3, objective__huber=0.5, data__flip=True,
                           train__accumulation=2, train__steps=8, train__schedule="linear", optimizer__kind="lion",
                           train__batch_size=3)  # fmt: skip
    third = small.settled(squares, base, name="ora", train__lr=1e-3, train__text_encoder_lr=0.0, train__steps=4, train__save_every=4,
                          data__prior_share=0.5, data__prior_prompts=["a dog"], adapter__kind="loha", train__clip_norm=0.1)  # fmt: skip
    return [first, second, third]


@pytest.fixture(scope="module")
def whole(members: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cast") / "whole"
    seen = go(members, out)
    assert sorted(event.member for event in seen if event.kind == "done") == ["mira", "ora", "tavi"]
    return out


def test_each_ends_as_if_trained_alone(members: list[Run], whole: Path, tmp_path: Path) -> None:
    for run in members:
        own = alone(run, tmp_path / run.name)
        assert apart(whole / run.name, own) <= APART
        files = {place.relative_to(own) for place in own.rglob("*") if "cache" not in place.parts}
        assert files == {place.relative_to(whole / run.name) for place in (whole / run.name).rglob("*") if "cache" not in place.parts}
        assert (own / "config.toml").read_text() == (whole / run.name / "config.toml").read_text()
        (told, theirs) = ([(one["kind"], one.get("step")) for one in api.events(place)[0]] for place in (whole / run.name, own))
        assert told == theirs
    assert apart(whole / "mira", alone(members[0].model_copy(update={"seed": 5}), tmp_path / "other")) > 10 * APART, "the control"
    assert sorted(one.name for one in api.runs(whole)) == ["mira", "ora", "tavi"]
    assert all(one.state == "finished" for one in api.runs(whole))


@pytest.mark.slow
def test_a_cast_stopped_anywhere_goes_on_as_if_never_stopped(members: list[Run], whole: Path, tmp_path: Path) -> None:
    stop = Stop()
    seen = go(members, tmp_path / "asked", lambda event: setattr(stop, "stop", stop.stop or event.step == 3), stop)
    assert [event.kind for event in seen].count("stopped") >= 2
    assert not [event for event in seen if event.kind == "done"]
    assert {state.steps(tmp_path / "asked" / run.name)[-1] for run in members} == {4}, "all of them after one step"
    events = api.train_cast(members, tmp_path / "cut")
    assert next(event for event in events if event.kind == "checkpoint" and event.step == 4)  # the others have not saved that step
    events.close()  # type: ignore[attr-defined]
    for name in ("asked", "cut"):
        again = api.settle_cast(api.cast_tables(tmp_path / name))
        assert [run.model_dump() for run in again] == [run.model_dump() for run in members]
        go(again, tmp_path / name)
        for run in members:
            assert differences(pack(tmp_path / name / run.name, run.name), pack(whole / run.name, run.name)) == []


@pytest.mark.slow
def test_members_go_on_alone_and_runs_join(members: list[Run], whole: Path, tmp_path: Path) -> None:
    stop = Stop()
    go(members, tmp_path / "cast", lambda event: setattr(stop, "stop", stop.stop or event.step == 2), stop)
    assert apart(alone(members[0], tmp_path / "cast" / "mira"), whole / "mira") <= APART
    seen = go(members, tmp_path / "cast")
    assert not [event for event in seen if event.kind == "step" and event.member == "mira"], "it has nothing left to do"
    assert apart(tmp_path / "cast" / "tavi", whole / "tavi") <= APART


@pytest.mark.slow
def test_a_stop_of_one_leaves_the_others_to_go_on(members: list[Run], whole: Path, tmp_path: Path) -> None:
    def act(event: Event) -> None:
        if event.step == 1:
            (tmp_path / "cast" / "mira" / "stop").touch()

    seen = go(members, tmp_path / "cast", act)
    assert [event.member for event in seen if event.kind == "stopped"] == ["mira"]
    assert sorted(event.member for event in seen if event.kind == "done") == ["ora", "tavi"]
    assert apart(tmp_path / "cast" / "tavi", whole / "tavi") <= APART
    go(members, tmp_path / "cast")
    assert apart(tmp_path / "cast" / "mira", whole / "mira") <= APART


def test_who_breaks_leaves_the_others_as_they_are(members: list[Run], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = job.new_learner

    def new_learner(one: Any, *rest: Any) -> Any:
        learner = really(one, *rest)
        if learner.name == "tavi":
            with torch.no_grad():
                next(iter(learner.params.values())).fill_(float("nan"))
        return learner

    monkeypatch.setattr(job, "new_learner", new_learner)
    seen: list[Event] = []
    with pytest.raises(UserError, match="E-NUM-01"):
        go(members, tmp_path / "cast", seen.append)
    assert [event.member for event in seen if event.kind == "failed"] == ["tavi"]
    assert sorted(event.member for event in seen if event.kind == "done") == ["mira", "ora"]
    assert json.loads((tmp_path / "cast" / "tavi" / "events.jsonl").read_text().splitlines()[-1])["kind"] == "failed"
    for name in ("mira", "ora"):
        assert apart(tmp_path / "cast" / name, whole / name) <= APART


@pytest.mark.slow
def test_memory_that_does_not_suffice_costs_rounding_alone(
    members: list[Run], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, largest = sd1.SD1.predict, []

    def predict(self: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(x) > 3 and x.requires_grad is False and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        largest.append(len(x))
        return really(self, x, *rest)

    monkeypatch.setattr(sd1.SD1, "predict", predict)
    seen = go(members[:2], tmp_path / "cast")
    assert [event for event in seen if event.kind == "warning" and "samples go through the network at once" in event.text]
    assert apart(tmp_path / "cast" / "tavi", whole / "tavi") <= APART


@pytest.mark.slow
def test_all_of_a_cast_keep_to_the_memory_that_is_set(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really, largest, planned = sd1.SD1.predict, list[int](), list[Plan]()

    def predict(self: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and x.shape[2] > 1 and planned:
            largest.append(len(x))
        return really(self, x, *rest)

    def choose(train: Any, measured: Any, _: int | None, *rest: Any) -> Plan:
        limit = Plan("full", True, 1, measured.parts("full", True, 1), None).peak if tight else None
        planned.append(chosen(train, measured, limit, *rest))
        return planned[-1]

    chosen = plan.choose
    monkeypatch.setattr(plan, "choose", choose)
    monkeypatch.setattr(sd1.SD1, "predict", predict)
    runs = [small.settled(squares, base, name=name, train__steps=1, data__resolution_px=32) for name in ("mira", "tavi")]
    for tight, most in ((True, 1), (False, 4)):
        planned.clear()
        largest.clear()
        (note,) = (event.text for event in go(runs, tmp_path / str(tight)) if "adapters over one base" in event.text)
        assert f"{most} of 4 samples of a step" in note
        assert max(largest) == most
        assert f"about {planned[0].peak / 1e9:.2f} GB" in note


# ---------------------------------------------------------------- what makes no sense


def file_of(folder: Path, base: Path, *members: str, common: str = "") -> Path:
    text = f'base = "{base}"\n{common}\n' + "\n".join(f"[[cast]]\n{one}" for one in members)
    (folder / "cast.toml").write_text(text)
    return folder / "cast.toml"


@pytest.fixture
def wrong(base: Path, tmp_path: Path) -> Callable[..., None]:
    def check(what: str, *members: str, out: Path = tmp_path / "out", common: str = "") -> None:
        with pytest.raises(UserError, match=what):
            go(api.settle_cast(api.cast_tables(file_of(tmp_path, base, *members, common=common))), out)
        assert not out.exists() or not list(out.glob("*/config.toml")), "nothing has begun"

    return check


def test_casts_that_make_no_sense_are_refused(wrong: Callable[..., None], squares: Path, base: Path, tmp_path: Path) -> None:
    mira, tavi = (f'name = "{name}"\ndata.folder = "{squares}"\n' for name in ("mira", "tavi"))
    wrong("E-CAST-03.*mira", mira, mira)
    wrong("E-CAST-03.*Mira", mira, mira.replace("mira", "Mira"))
    wrong("E-DATA-01.*named for ora", mira, 'name = "ora"')
    wrong("E-CAST-04.*train.precision", mira, tavi + 'train.precision = "bf16"')
    other = small.copy_base(base, tmp_path / "other")
    wrong("E-CAST-04.*base", mira, tavi + f'base = "{other}"')
    wrong("no such setting; did you mean steps", mira, tavi + "train.stepz = 3")
    wrong("E-CONF-01.*cast", mira + "[[cast.cast]]\n", tavi)
    empty = tmp_path / "empty"
    empty.mkdir()
    wrong("E-DATA-.*empty", mira, f'name = "ora"\ndata.folder = "{empty}"')
    inside = small.draw_folder(tmp_path / "out2" / "mira" / "pictures", 1)
    wrong("E-CAST-05.*tavi", mira, f'name = "tavi"\ndata.folder = "{inside}"', out=tmp_path / "out2")
    wrong("E-CAST-05.*tavi", mira, f'name = "tavi"\ndata.folder = "{tmp_path}"', out=tmp_path / "out3")
    (tmp_path / "none.toml").write_text("cast = 3")
    with pytest.raises(UserError, match="E-CAST-01"):
        api.cast_tables(tmp_path / "none.toml")


def test_what_is_common_and_what_is_a_members_own(squares: Path, base: Path, tmp_path: Path) -> None:
    file = file_of(
        tmp_path, base,
        f'name = "a"\ndata.folder = "{squares}"\ntrain.steps = 7', f'name = "b"\ndata.folder = "{squares}"\nadapter.rank = 3',
        common="train.steps = 5\ntrain.lr = 1e-3\nadapter.rank = 2",
    )  # fmt: skip
    first, second = api.settle_cast(api.cast_tables(file))
    assert (first.train.steps, second.train.steps, first.train.lr, second.train.lr) == (7, 5, 1e-3, 1e-3)
    assert [run.adapter.model_dump()["rank"] for run in (first, second)] == [2, 3]
    assert [run.train.steps for run in api.settle_cast(api.cast_tables(file), file, ["train.steps=9"])] == [9, 9]


@pytest.mark.slow
def test_the_command_line_trains_the_config_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    few = ["train.steps=2", "train.batch_size=1", "preview.scales=[]", "preview.every=0", "data.prior_share=0.0", "train.log_every=1"]
    words = [word for one in few for word in ("--set", one)]
    done = CliRunner().invoke(cli.app, ["train", "--config", "configs/cast.toml", "--out", str(tmp_path / "cast"), *words])
    assert done.exit_code == 0, done.output
    assert done.output.count("pack: ") == 2
    assert (tmp_path / "cast" / "tavi" / "tavi.safetensors").is_file()
    again = CliRunner().invoke(cli.app, ["resume", str(tmp_path / "cast"), "--set", "train.steps=3"])
    assert again.exit_code == 0, again.output
    assert [one.step for one in api.runs(tmp_path / "cast")] == [3, 3]
    assert CliRunner().invoke(cli.app, ["train", "datasets/tavi", "--config", "configs/cast.toml"]).exit_code == 2


# ---------------------------------------------------------------- sweeps


@pytest.mark.slow
def test_a_sweep_is_a_cast_of_all_choices_laid_side_by_side(squares: Path, base: Path, tmp_path: Path) -> None:
    text = f'name = "mira"\nbase = "{base}"\ndata.folder = "{squares}"\ndata.resolution_px = 32\npreview.prompts = ["one", "two"]\n'
    text += "preview.steps = 2\npreview.every = 0\npreview.scales = []\ntrain.steps = 3\ntrain.batch_size = 1\ntrain.log_every = 1\n"
    (tmp_path / "sweep.toml").write_text(text)
    words = ["find", "sweep", str(tmp_path / "sweep.toml"), "--over", "train.lr=1e-4,1e-2", "--over", "adapter.rank=1,2"]
    done = CliRunner().invoke(cli.app, [*words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    found = {one.name: one for one in api.runs(tmp_path / "out")}
    assert sorted(found) == ["mira lr 1e-2 rank 1", "mira lr 1e-2 rank 2", "mira lr 1e-4 rank 1", "mira lr 1e-4 rank 2"]
    tables = {name: settings.read(one.folder / "config.toml") for name, one in found.items()}
    assert {(table["train"]["lr"], table["adapter"]["rank"]) for table in tables.values()} == {(1e-2, 1), (1e-2, 2), (1e-4, 1), (1e-4, 2)}
    assert {table["trigger"] for table in tables.values()} == {"mira"}
    assert all(name in done.output.replace("\n", " ") for name in ("mira lr 1e-2 rank 1", "loss held out"))
    with Image.open(tmp_path / "out" / "grid.png") as sheet:
        assert sheet.width > 4 * 128
        assert sheet.height > 2 * 128
    assert (tmp_path / "out" / "curves.png").is_file()


@pytest.mark.parametrize(("code", "over"), [("E-SWEEP-01", "train.lr"), ("E-SWEEP-02", "train.lr=1"), ("E-CONF-01", "train.lrr=1,2")])
def test_sweeps_that_make_no_sense_are_refused(code: str, over: str, squares: Path, base: Path) -> None:
    with pytest.raises(UserError, match=code):
        api.sweep({"name": "mira", "base": str(base), "data": {"folder": str(squares)}}, [over])
