"""The learning rate is a closed form of the step: where it begins, where it ends, and what is between."""

import itertools
import math
from typing import Any

import pytest

from sdlora import api
from sdlora.config import Train
from sdlora.errors import UserError
from sdlora.schedule import rate

SCHEDULES = ("constant", "linear", "cosine", "restarts", "wsd")


def rates(steps: int, warmup: int, schedule: str, **settings: Any) -> list[float]:
    train = Train(steps=steps, warmup_steps=warmup, schedule=schedule, **settings)  # type: ignore[arg-type]
    return [rate(step, train) for step in range(steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (100, 0), (5, 5), (1, 0), (3, 10), (7, 6)])
def test_every_schedule_warms_up_and_never_stands_still(schedule: str, steps: int, warmup: int) -> None:
    found = rates(steps, warmup, schedule)
    assert found[:warmup] == pytest.approx([(step + 1) / (warmup + 1) for step in range(min(warmup, steps))])
    assert all(0 < one <= 1 for one in found)
    if schedule != "restarts":
        assert found[warmup:] == sorted(found[warmup:], reverse=True), "then it falls, or stays"


def test_schedules_have_their_closed_forms() -> None:
    n, w = 110, 10
    after = range(n - w)
    assert rates(n, w, "constant")[w:] == [1.0] * (n - w)
    assert rates(n, w, "linear")[w:] == pytest.approx([1 - i / 100 for i in after])
    assert rates(n, w, "cosine")[w:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * i / 100) for i in after])
    assert rates(n, w, "restarts", cycles=4)[w:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * (i % 25) / 25) for i in after])
    assert rates(n, w, "restarts", cycles=1) == rates(n, w, "cosine")
    trapezoid = [1.0] * (n - w - 22) + [(22 - i) / 23 for i in range(22)]
    assert rates(n, w, "wsd", decay_share=0.2)[w:] == pytest.approx(trapezoid), "a fifth of all steps falls"
    assert rates(n, w, "wsd", decay_share=0.0) == rates(n, w, "constant")
    assert rates(n, w, "wsd", decay_share=1.0)[w:] == pytest.approx([(100 - i) / 101 for i in after])


def test_first_and_last_steps() -> None:
    wanted = {"constant": 1, "linear": 1 / 90, "cosine": 0.5 - 0.5 * math.cos(math.pi / 90), "restarts": 0.5 - 0.5 * math.cos(math.pi / 30),
              "wsd": 1 / 21}  # fmt: skip
    for schedule, last in wanted.items():
        found = rates(100, 10, schedule, cycles=3, decay_share=0.2)
        assert (found[0], found[10]) == pytest.approx((1 / 11, 1))
        assert found[-1] == pytest.approx(last)
    assert all(a != b for a, b in itertools.combinations([rates(100, 10, schedule) for schedule in SCHEDULES], 2))


def test_a_warm_up_may_be_a_share_of_the_steps() -> None:
    def settled(**train: Any) -> Train:
        return api.settle({"name": "mira", "train": train}).train

    assert settled(steps=200, warmup_share=0.05).warmup_steps == 10
    assert settled(steps=200, warmup_share=0.05, warmup_steps=10).warmup_steps == 10
    assert settled(steps=200).warmup_steps == 20, "the base's default"
    assert settled(steps=200, warmup_steps=3).warmup_steps == 3
    with pytest.raises(UserError, match=r"E-CONF-10.*train\.warmup_steps = 11.*10 of 200"):
        settled(steps=200, warmup_share=0.05, warmup_steps=11)
