"""Trackers are told the figures of the events, and a name that is wrong or not installed is said before anything is trained."""

from pathlib import Path

import pytest
import small

from sdlora import api, trackers
from sdlora.errors import UserError


def test_tensorboard_is_told_what_the_log_is_told(tmp_path: Path, base: Path, squares: Path) -> None:
    small.library("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = small.settled(squares, base, train__steps=3, train__trackers=["tensorboard"])
    losses = {event.step: event.loss for event in api.train(run, tmp_path / "run") if event.kind == "step"}
    told = EventAccumulator(str(tmp_path / "run" / "trackers" / "mira")).Reload()
    assert {one.step: one.value for one in told.Scalars("step/loss")} == pytest.approx(losses)
    assert told.Scalars("done/seconds")


def test_without_a_tracker_nothing_is_written(tmp_path: Path) -> None:
    with trackers.Trackers([], "mira", tmp_path / "trackers") as none:
        none.tell({"kind": "step", "step": 1, "loss": 0.5})
    assert not (tmp_path / "trackers").exists()


def test_a_misspelt_tracker_is_refused_and_the_right_name_offered(base: Path, squares: Path) -> None:
    with pytest.raises(UserError, match="did you mean tensorboard"):
        small.settled(squares, base, train__trackers=["tensorbord"])


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_spent(
    tmp_path: Path, base: Path, squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    run = small.settled(squares, base, train__trackers=["tensorboard"])
    with pytest.raises(UserError, match=r"E-TRACK-01 .*sdlora\[track\]"):
        next(api.train(run, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
