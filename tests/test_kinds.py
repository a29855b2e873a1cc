"""Kinds of adapters side by side: what is trained, what is not trained again, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import small
from PIL import Image
from typer.testing import CliRunner

from sdlora import api, kinds, search
from sdlora.cli import app
from sdlora.errors import UserError

ASKING = api.Asking(prompts=2, seeds=1, steps=2, eyes="base")


def table(squares: Path, base: Path, **changes: Any) -> dict[str, Any]:
    run = small.settled(squares, base, **{"data__prior_prompts": ["a cat", "a house"], **changes})
    whole: dict[str, Any] = run.model_dump(exclude_none=True)
    return {**whole, "adapter": {"rank": 2}, "train": {"batch_size": 2, "precision": "fp32", "lr": 1e-2, "text_encoder_lr": 0.0}}


def test_a_kind_without_a_rank_stands_once_and_all_have_the_same_budget(squares: Path, base: Path) -> None:
    grid = kinds.cells(table(squares, base), kinds.Wanted(["lora", "ia3", "dora"], [1, 2], 10))
    assert [cell.label for cell in grid] == ["lora 1", "lora 2", "ia3", "dora 1", "dora 2"]
    assert {cell.settled.train.steps for cell in grid} == {10}
    assert len({cell.settled.seed for cell in grid}) == 1
    assert len({json.dumps(cell.settled.data.model_dump(mode="json")) for cell in grid}) == 1


def test_what_cannot_be_compared_is_refused_before_anything_is_trained(squares: Path, base: Path) -> None:
    own = table(squares, base)
    for wanted, code in [
        (kinds.Wanted(["lorra"], [1]), "did you mean lora"),
        (kinds.Wanted([], [1]), "E-FIND-06"),
        (kinds.Wanted(["lora"], []), "E-FIND-07"),
        (kinds.Wanted(["lora"], [0]), r"E-CONF-01.*adapter\.rank"),
    ]:
        with pytest.raises(UserError, match=code):
            kinds.cells(own, wanted)
    said = CliRunner().invoke(app, ["find", "kind", "--data", str(squares), "--ranks", "0"])
    assert said.exit_code == 2
    assert "E-FIND-05" in said.output


@pytest.mark.slow
def test_kinds_are_trained_judged_and_not_trained_again(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, out = table(squares, base), tmp_path / "found"
    events = [*kinds.find(own, kinds.Wanted(["lora", "ia3"], [1, 2], 4, 2), ASKING, out)]
    assert "hold no picture out: 20%" in events[0].text
    rows = events[-1].data["rows"]
    assert json.loads((out / "kind.json").read_text())["rows"] == rows
    assert Image.open(out / "kind.png").size == (2700, 1620)
    assert rows[0]["parameters"] * 2 == rows[1]["parameters"]
    assert all(row["memory"] == "counted" and row["seconds"] > 0 and len(row["gains"]) == 2 for row in rows)
    assert rows[0]["memory_bytes"] < rows[1]["memory_bytes"]
    assert all(row["drift"] > 0 for row in rows), "the adapter was on the base when it was judged"
    assert rows[0]["gains"][0] != rows[0]["gains"][1], "each training has a seed of its own"

    trained: list[str] = []
    trial = search.Bench.trial
    monkeypatch.setattr(search.Bench, "trial", lambda *args, **rest: trained.append(args[1].adapter.kind) or trial(*args, **rest))
    assert [*kinds.find(own, kinds.Wanted(["lora", "ia3"], [1, 2], 4, 2), ASKING, out)][-1].data["rows"] == rows
    assert not trained
    again = [*kinds.find(own, kinds.Wanted(["lora", "ia3"], [2, 3], 4, 2), ASKING, out)][-1].data["rows"]
    assert trained == ["lora", "lora"], "rank 3, twice"
    assert again[0] == rows[1]
    [*kinds.find(own, kinds.Wanted(["ia3"], [], 5, 1), ASKING, out)]
    assert trained[2:] == ["ia3"], "the control: another budget is another cell"
