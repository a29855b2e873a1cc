"""Settings: strict at the door with the right name offered, nothing left open once settled, and the same when read back."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small
from typer.testing import CliRunner

from sdlora import api, cli, config, defaults, lookup, settings
from sdlora.config import Data, Folder, Packing, Preview, Run, Text, Train, Validation
from sdlora.errors import BAD_INPUT, UserError
from sdlora.settings import Settings

ROOT = Path(__file__).parent.parent
ROWS = sorted({row for _, row in defaults.TABLE})
CONFIGS = [lookup.find(group, name).Config for group in ("adapters", "objectives", "optimizers") for name in lookup.names(group)]
KINDS = ["character", "style"]


@pytest.mark.parametrize(
    ("table", "wrong", "right"),
    [
        ({"naem": "mira"}, "naem", "name"),
        ({"trian": {"steps": 1}}, "trian", "train"),
        ({"data": {"foldr": "x"}}, "data.foldr", "folder"),
        ({"data": {"folders": [{"folder": "x", "repeat": 2}]}}, "data.folders.repeat", "repeats"),
        ({"train": {"step": 3}}, "train.step", "steps"),
        ({"train": {"batchsize": 3}}, "train.batchsize", "batch_size"),
        ({"preview": {"scale": [1.0]}}, "preview.scale", "scales"),
        ({"adapter": {"rnk": 3}}, "adapter.rnk", "rank"),
        ({"adapter": {"kind": "lora", "target": []}}, "adapter.target", "targets"),
        ({"objective": {"min_snr_gama": 3.0}}, "objective.min_snr_gama", "min_snr_gamma"),
        ({"optimizer": {"kind": "prodigy", "d_coeff": 2.0}}, "optimizer.d_coeff", "d_coef"),
        ({"train": {"weight_decay": 0.1}}, "train.weight_decay", "optimizer.weight_decay"),
    ],
)
def test_a_misspelt_setting_names_the_right_one(table: dict[str, Any], wrong: str, right: str) -> None:
    with pytest.raises(UserError, match="E-CONF-01") as caught:
        config.parse(table)
    assert f"{wrong}: no such setting; did you mean {right}?" in str(caught.value)
    assert caught.value.exit_code == BAD_INPUT


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"train": {"steps": "10"}}, "train.steps"),
        ({"train": {"steps": 10.5}}, "train.steps"),
        ({"train": {"steps": True}}, "train.steps"),
        ({"train": {"steps": 0}}, "train.steps"),
        ({"train": {"batch_size": -1}}, "train.batch_size"),
        ({"train": {"lr": float("nan")}}, "train.lr"),
        ({"train": {"lr": float("inf")}}, "train.lr"),
        ({"train": {"lr": 0.0}}, "train.lr"),
        ({"train": {"schedule": "cosin"}}, "train.schedule"),
        ({"train": {"keep_checkpoints": 1}}, "train.keep_checkpoints"),
        ({"train": 3}, "train"),
        ({"adapter": 3}, "adapter"),
        ({"adapter": {"rank": 0}}, "adapter.rank"),
        ({"adapter": {"alpha": 0}}, "adapter.alpha"),
        ({"adapter": {"alpha": float("nan")}}, "adapter.alpha"),
        ({"adapter": {"targets": "attention"}}, "adapter.targets"),
        ({"data": {"ground": "whitish"}}, "data.ground"),
        ({"data": {"caption_dropout": 1.5}}, "data.caption_dropout"),
        ({"data": {"folders": [{"folder": "x"}, {"folder": "y", "repeats": 0}]}}, "data.folders.1.repeats"),
        ({"data": {"folders": [{"folder": "x", "kind": "class"}]}}, "data.folders.0.kind"),
        ({"data": {"folders": [{"repeats": 2}]}}, "data.folders.0.folder"),
        ({"preview": {"scales": [9.0]}}, "preview.scales"),
        ({"preview": {"scales": [float("nan")]}}, "preview.scales"),
        ({"kind": "person"}, "kind"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"name": 3}, "name"),
    ],
    ids=str,
)
def test_a_wrong_value_is_an_error_that_names_its_setting(table: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match="E-CONF-01") as caught:
        config.parse(table, "my.toml")
    assert f"{named}" in str(caught.value)
    assert "my.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_everything_wrong_is_said_at_once() -> None:
    with pytest.raises(UserError) as caught:
        config.parse({"seed": -1, "train": {"stepz": 1, "lr": "fast"}})
    assert all(name in str(caught.value) for name in ("seed", "train.stepz", "train.lr"))


@pytest.mark.parametrize("name", ["a:b", "a,b", "a/b", "..", "-a", " a", "a\nb", "<a>", "none", "None", "x" * 101, "a\\b", "a:0.5"])
def test_names_that_break_readers_are_refused(name: str) -> None:
    for field in ("name", "trigger"):
        with pytest.raises(UserError, match=f"{field}: letters, digits"):
            config.parse({field: name})


@pytest.mark.parametrize("name", ["mira", "Mira 2", "a.b_c+d-e", "Zoë", "ミラ", "7"])
def test_plain_names_are_taken(name: str) -> None:
    assert config.parse({"name": name, "trigger": name}).name == name


@pytest.mark.parametrize("group", ["adapters", "objectives", "optimizers"])
def test_an_unknown_kind_lists_the_choices(group: str) -> None:
    known = lookup.names(group)
    for kind in (known[0] + "a", "unheard_of", 5):
        with pytest.raises(UserError) as caught:
            config.parse({group.removesuffix("s"): {"kind": kind}})
        assert all(name in str(caught.value) for name in known)
        assert caught.value.exit_code == BAD_INPUT
    with pytest.raises(UserError, match=f"did you mean {known[0]}"):
        lookup.find(group, known[0] + "a")


# ---------------------------------------------------------------- --set


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("train.steps=800", 800),
        ("train.lr=2e-4", 2e-4),
        ("data.skip_unreadable=true", True),
        ("adapter.targets=['a', \"b\"]", ["a", "b"]),
        ("train.schedule=constant", "constant"),
        ('train.schedule="constant"', "constant"),
        ("data.folder=a=b c", "a=b c"),
        ("data.folder=", ""),
        ("data.folder=C:\\pictures", "C:\\pictures"),
    ],
)
def test_an_assignment_is_a_toml_value_or_else_a_string(assignment: str, value: object) -> None:
    table: dict[str, Any] = {"train": {"steps": 1, "batch_size": 2}, "data": {}}
    settings.override(table, assignment)
    part, _, field = assignment.partition("=")[0].partition(".")
    assert table[part][field] == value
    assert table["train"]["batch_size"] == 2, "what is beside it stays"


@pytest.mark.parametrize("assignment", ["train.steps", "=3", ".steps=3", "train..steps=3", "train.=3", "", "train.steps.more=3"])
def test_what_is_no_assignment_is_refused(assignment: str) -> None:
    with pytest.raises(UserError, match="E-CONF-05"):
        settings.override({"train": {"steps": 1}}, assignment)


def test_the_command_line_comes_before_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("seed = 3\n[train]\nsteps = 5\n")
    table = api.read_settings(tmp_path / "a.toml", ["train.steps=7", "train.batch_size=2"])
    assert table == {"seed": 3, "train": {"steps": 7, "batch_size": 2}}


@pytest.mark.parametrize("content", [b"seed = ", b"\xff\xfe", None])
def test_a_file_that_is_no_toml_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"E-CONF-0[34]") as caught:
        settings.read(path)
    assert str(path) in str(caught.value)


# ---------------------------------------------------------------- settling


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_example_loads_and_settles(path: Path) -> None:
    for table in api.cast_tables(path) if api.is_cast(path) else [settings.read(path)]:
        run = config.parse(table, path)
        row = {"tiny": "tiny", "stabilityai/stable-diffusion-xl-base-1.0": "sdxl"}.get(run.base, "sd1")
        assert still_open(config.resolve(config.parse({**table, "name": run.name or "mira"}), row)) == []


def still_open(run: Run) -> list[str]:
    return [name for name, value in config.flat(run) if value is None]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", lookup.names("adapters"))
@pytest.mark.parametrize("objective", lookup.names("objectives"))
def test_nothing_is_left_open(row: str, kind: str, adapter: str, objective: str) -> None:
    table = {"name": "mira", "kind": kind, "adapter": {"kind": adapter}, "objective": {"kind": objective}}
    run = config.resolve(config.parse(table), row)
    assert still_open(run) == []
    assert run.trigger == "mira"
    assert run.preview.prompts
    assert all("mira" in prompt for prompt in run.preview.prompts)
    assert config.resolve(run, row).model_dump() == run.model_dump(), "settling twice changes nothing"
    assert still_open(config.parse(table)), "the control: something was open"


def test_what_a_user_says_stands() -> None:
    said = {"train": {"steps": 7, "lr": 0.5}, "adapter": {"rank": 3, "targets": ["x"]}, "data": {"caption_dropout": 0.0}}
    run = config.resolve(config.parse({"name": "mira", "trigger": "word", "preview": {"prompts": ["a [trigger]"]}, **said}), "tiny")
    assert (run.train.steps, run.train.lr, run.data.caption_dropout, run.trigger) == (7, 0.5, 0.0, "word")
    own = {"kind": "lora", "rank": 3, "alpha": 16.0, "targets": ["x"], "rank_stabilised": False, "init": "kaiming"}
    assert own.items() <= {key: value for key, value in run.adapter.model_dump().items() if key in own}.items()
    assert run.preview.prompts == ["a word"]


def test_a_run_is_called_after_its_folder(base: Path, tmp_path: Path) -> None:
    folder = small.draw_folder(tmp_path / "my pictures, of: Mira", 1)
    run = api.settle({"base": str(base), "data": {"folder": str(folder)}})
    assert run.name == run.trigger == "my-pictures--of--Mira"
    with pytest.raises(UserError, match="E-CONF-07"):
        api.settle({"base": str(base)})


def test_a_row_is_chosen_by_the_size_of_the_base(base: Path, sd15_base: Path, pictures: Path) -> None:
    table = {"data": {"folder": str(pictures)}}
    assert api.settle({**table, "base": str(base)}).train.lr == defaults.settings("character", "tiny")["train.lr"]
    assert api.settle({**table, "base": str(sd15_base)}).train.lr == defaults.settings("character", "sd1")["train.lr"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_reads_back_from_its_toml(kind: str, pictures: Path, base: Path) -> None:
    run = small.settled(pictures, base, kind=kind, adapter__targets=['unet.*"quoted"', "text-encoder"])
    assert config.parse(tomllib.loads(config.to_toml(run))).model_dump() == run.model_dump()
    assert api.settle(tomllib.loads(config.to_toml(run))).model_dump() == run.model_dump()


def test_every_default_belongs_to_a_setting() -> None:
    known = {name for name, _ in config.flat(config.parse({}))}
    assert {name for row in defaults.TABLE.values() for name in row} <= known


# ---------------------------------------------------------------- documentation


def fields(cls: type[Settings], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """(dotted name, description) of every setting; a table is described by its settings."""
    for name, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, (Data, Text, Train, Validation, Preview, Packing)):
            yield from fields(field.annotation, f"{prefix}{name}.")
        elif field.annotation == list[Folder]:
            yield from fields(Folder, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description


def undescribed(cls: type[Settings]) -> list[str]:
    return [name for name, description in fields(cls) if not (description or "").strip()]


class Careless(Settings):
    said: int = 0
    """Something."""
    unsaid: int = 0


@pytest.mark.parametrize("cls", [Run, *CONFIGS], ids=lambda cls: cls.__module__)
def test_every_setting_is_described(cls: type[Settings]) -> None:
    assert undescribed(cls) == []
    assert len(list(fields(cls))) >= 2
    assert undescribed(Careless) == ["unsaid"], "the control"


def test_settings_do_not_change_after_they_are_built() -> None:
    run = config.parse({})
    with pytest.raises(ValueError, match="frozen"):
        run.seed = 3  # type: ignore[misc]


# ---------------------------------------------------------------- settings as they come

BAD_SETTINGS: dict[str, tuple[str, str]] = {  # a TOML file, and what the error must say
    "unknown key": ("[train]\nstepz = 5", "train.stepz.*steps"),
    "wrong type": ("[train]\nsteps = 'many'", "train.steps"),
    "a number in quotes": ("[train]\nlr = '1e-4'", "train.lr.*take its quotes away"),
    "not a number": ("[train]\nlr = nan", "train.lr"),
    "infinite": ("[train]\nlr = inf", "train.lr"),
    "negative steps": ("[train]\nsteps = -1", "train.steps"),
    "rank 0": ("[adapter]\nrank = 0", "adapter.rank"),
    "rank beyond every layer": ("[adapter]\nrank = 1000", "E-ADAPT-04.*adapter.rank"),
    "seed -1": ("seed = -1", "seed"),
    "seed 2^64": (f"seed = {2**64}", "seed"),
    "a key twice": ("[train]\nsteps = 1\nsteps = 2", "E-CONF-04"),
    "resolution 100000": ("[data]\nresolution_px = 100000", "data.resolution_px"),
    "a hundred thousand levels deep": ("x = " + "[" * 100_000, "E-CONF-04"),
    "YAML": ("train:\n  steps: 5\n  x: !!python/object:os.system {}\n", "E-CONF-04"),
    "YAML's billion laughs": ("a: &a [lol]\nb: &b [*a, *a]\n", "E-CONF-04"),
    "the run in the folder of pictures": ("", "E-RUN-06"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings_that_cannot_be_are_one_clear_error(name: str, pictures: Path, base: Path, tmp_path: Path) -> None:
    content, said = BAD_SETTINGS[name]
    (tmp_path / "f.toml").write_text(content)
    out = pictures / "run" if "E-RUN-06" in said else tmp_path / "run"
    command = ["train", str(pictures), "--name", "mira", "--base", str(base), "--config", str(tmp_path / "f.toml"), "--out", str(out)]
    told = CliRunner().invoke(cli.app, command)
    assert told.exit_code == 2
    assert re.search(said, told.output), told.output
    assert "Traceback" not in told.output
    assert not out.exists()


def test_a_doubtful_setting_is_taken_and_said(squares: Path, base: Path, tmp_path: Path) -> None:
    run = small.settled(squares, base, train__steps=1, train__lr=1.0, adapter__rank=12)
    said = [event.text for event in api.train(run, tmp_path / "run") if event.kind == "warning"]
    assert any("train.lr = 1 is very high" in text for text in said)
    assert any("adapter.rank" in text for text in said)
    usual = [event.text for event in api.train(small.settled(squares, base, train__steps=1), tmp_path / "usual") if event.kind == "warning"]
    assert not any("train.lr" in text or "adapter.rank" in text for text in usual)


def test_a_resolution_below_the_bases_least_is_refused(pictures: Path, sd15_base: Path, tmp_path: Path) -> None:
    for changes in ({"data__resolution_px": 63}, {"data__resolution_px": 64, "data__further_resolutions_px": [63]}):
        with pytest.raises(UserError, match=r"E-CONF-06.*multiples of 64 px"):
            next(api.train(small.settled(pictures, sd15_base, **changes), tmp_path / "run"))
    assert not (tmp_path / "run").exists()
