"""Regularisation pictures that the base draws: as many as are asked for, of the prompts, the same again when some are lost."""

import json
from pathlib import Path
from typing import Any

import pytest
import small

from sdlora import api, priors
from sdlora.config import Run
from sdlora.errors import UserError
from sdlora.family import Family

ASKED: dict[str, Any] = {"data__prior_pictures": 4, "data__prior_prompts": ["a dog", "red"]}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(priors, "STEPS", 3)


def drawn(run: Run, loaded: Family, folder: Path) -> dict[str, bytes]:
    priors.draw(run, loaded, folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_run_trains_on_what_the_base_draws_and_its_ledger_says_so(squares: Path, base: Path, tmp_path: Path) -> None:
    run, out = small.settled(squares, base, train__steps=9, train__batch_size=1, **ASKED), tmp_path / "run"
    assert list(api.train(run, out))[-1].kind == "done"
    table = json.loads((out / "ledger.json").read_text())
    made = [row for row in table["pictures"] if row["file"].startswith("prior/")]
    assert [row["regularisation"] for row in table["pictures"]].count(True) == len(made) == 4
    assert sorted(row["captions"][0] for row in made) == ["a dog"] * 2 + ["red"] * 2, "without the trigger"
    assert [row["shown"] for row in table["pictures"]] == [1] * 9, "an epoch shows all"
    checked = api.check(run, tmp_path / "check")[0]
    table["totals"]["seconds"] = checked["totals"]["seconds"]  # known once a run has been
    assert {key: checked[key] for key in table} == table
    plain = api.check(small.settled(squares, base), tmp_path / "plain")[0]
    assert plain["totals"]["found"] == 5, "the control"
    assert not (tmp_path / "plain").exists()


def test_what_is_drawn_is_kept_and_what_is_lost_comes_back_the_same(squares: Path, base: Path, loaded: Family, tmp_path: Path) -> None:
    run, folder = small.settled(squares, base, **{**ASKED, "data__prior_pictures": priors.BATCH + 2}), tmp_path / "prior"
    first = drawn(run, loaded, folder)
    assert len(first) == 12
    assert len({content for name, content in first.items() if name.endswith(".png")}) == 6
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert drawn(run, loaded, folder) == first
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times, "nothing is drawn again"
    for suffix in (".png", ".txt"):
        (folder / next(name for name in first if name.endswith(suffix))).unlink()
        assert drawn(run, loaded, folder) == first
    other = drawn(small.settled(squares, base, **{**ASKED, "data__prior_prompts": ["a cat"]}), loaded, folder)
    assert len(other) == 8
    assert not set(other) & set(first), "the control: of other prompts other pictures, and none of the old ones"


def test_pictures_of_nothing_are_refused(squares: Path, base: Path) -> None:
    with pytest.raises(UserError, match="E-CONF-08"):
        small.settled(squares, base, data__prior_pictures=3, data__prior_prompts=[])
