"""What is told of a run beforehand: memory as it is counted at the run's own size, time as an earlier run of the kind took it."""

import itertools
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small
import torch
from torch import nn

from sdlora import api, cli, estimate, job, learners
from sdlora.data.store import Store
from sdlora.family import Family


def activations(loaded: Family, base: Path, side: int, batch: int = 1, **changes: Any) -> int:
    run = small.settled(base, base, train__batch_size=batch, **changes)
    return estimate.memory(run, loaded, learners.pieces(run, loaded), [(side // 2, side), (side, side)]).parts()["activations"]


def counted(loaded: Family, base: Path, side: int) -> int:
    """Of one forward at its real size."""
    bank = estimate.Bank(loaded.components)
    run = small.settled(base, base)
    bank.add("mira", learners.pieces(run, loaded), small.stream_of)
    bank.use({"mira": 1.0})
    found = estimate._kept(loaded, (side, side))
    bank.eject()
    return round(found.plain)


def test_memory_is_what_is_counted_at_the_runs_own_size(loaded: Family, base: Path) -> None:
    told = activations(loaded, base, 64)
    assert told == pytest.approx(counted(loaded, base, 64), rel=0.02)
    assert told > 4 * counted(loaded, base, 24), "the control: a smaller size keeps less"
    assert activations(loaded, base, 64, batch=6) == 6 * told
    assert activations(loaded, base, 64, train__precision="bf16") == told // 2
    assert activations(loaded, base, 64, adapter__targets=["unet.conv_out"]) < told / 4, "of few layers little is kept"


def test_a_network_that_keeps_attention_matrices_would_be_noticed(loaded: Family, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the law before: then memory grows with the square of the area, and two small forwards do not tell it."""

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(-1) @ v

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", plain)
    assert activations(loaded, base, 64) < 0.9 * counted(loaded, base, 64)


def test_weights_are_counted_once_and_the_base_is_left_as_it_was(loaded: Family, base: Path) -> None:
    before = small.modules(loaded)
    run = small.settled(base, base)
    parts = estimate.memory(run, loaded, learners.pieces(run, loaded), [(32, 32)]).parts()
    assert small.modules(loaded) == before
    assert parts["total"] == sum(parts[name] for name in ("base", "adapter", "activations"))
    files = sum(path.stat().st_size for path in base.rglob("*.safetensors"))
    assert parts["base"] == pytest.approx(files, rel=0.1)


@pytest.mark.slow
def test_time_is_that_of_the_last_run_of_the_kind(
    squares: Path, base: Path, loaded: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which two steps, after which the loss is read, take 3 s."""
    monkeypatch.setattr(job, "time", SimpleNamespace(time=time.time, monotonic=itertools.count(0, 3).__next__))
    run = small.settled(squares, base, train__steps=12, train__log_every=2, train__save_every=12)
    assert api.check(run, tmp_path)[0]["totals"]["seconds"] is None
    list(api.train(run, tmp_path / "run"))
    table = api.check(run, tmp_path)[0]
    assert table["totals"]["seconds"] == 18.0
    assert "about 1 min of steps" in cli.report(table).splitlines()[-1]
    assert "GB beside the libraries" in cli.report(table).splitlines()[-1]
    names = {estimate.pace_name(small.settled(squares, base, train__batch_size=size), loaded) for size in (2, 2, 3)}
    assert len(names) == 2, "the control: another kind of run"


def test_a_pace_needs_two_readings(tmp_path: Path) -> None:
    kept = Store(tmp_path)
    estimate.keep_pace("x.pace", kept, [(10, 5.0)])
    assert estimate.known_pace("x.pace", kept) is None
    estimate.keep_pace("x.pace", kept, [(10, 5.0), (20, 7.0), (30, 9.0)])
    assert estimate.known_pace("x.pace", kept) == pytest.approx(0.2)
