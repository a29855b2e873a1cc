"""Plots show what they are given: colour where a curve runs, nothing where it does not, and no complaint of what cannot be drawn."""

import math

import numpy as np
from PIL import ImageColor

from sdlora.plots import COLOURS, HEIGHT, LEFT, RIGHT, WIDTH, Curve, plot


def inked(picture, colour: str) -> np.ndarray:  # type: ignore[no-untyped-def,type-arg]
    """Places (row, column) that are about of a colour."""
    apart = np.abs(np.asarray(picture).astype(int) - np.array(ImageColor.getrgb(colour))).sum(2)
    return np.argwhere(apart < 60)


def test_a_rising_curve_rises() -> None:
    places = inked(plot("t", "x", "y", [Curve("", [(0, 0), (1, 1), (2, 2)])]), COLOURS[0])
    left, right = places[places[:, 1] < LEFT + 100], places[places[:, 1] > WIDTH - RIGHT - 100]
    assert left[:, 0].min() > right[:, 0].max()
    assert len(places) > 500


def test_each_curve_has_its_own_colour_and_points_alone_no_line() -> None:
    joined = plot("t", "x", "y", [Curve("a", [(0, 0), (2, 2)]), Curve("b", [(0, 2), (2, 0)])])
    apart = plot("t", "x", "y", [Curve("a", [(0, 0), (2, 2)], joined=False)])
    assert len(inked(joined, COLOURS[1])) > 500
    assert len(inked(apart, COLOURS[1])) == 0
    assert len(inked(apart, COLOURS[0])) < len(inked(joined, COLOURS[0])) / 2


def test_powers_of_ten_are_evenly_apart() -> None:
    points = [(1e-4, 1.0), (1e-3, 1.0), (1e-2, 1.0)]
    columns = inked(plot("t", "x", "y", [Curve("", points, joined=False)], log_across=True), COLOURS[0])[:, 1]
    groups = np.split(np.unique(columns), np.flatnonzero(np.diff(np.unique(columns)) > 1) + 1)
    middles = [group.mean() for group in groups]
    assert len(middles) == 3
    assert abs((middles[1] - middles[0]) - (middles[2] - middles[1])) < 2


def test_what_is_not_finite_is_left_out_and_nothing_at_all_is_no_error() -> None:
    sound = plot("t", "x", "y", [Curve("", [(0, 1), (1, 2)])])
    assert plot("t", "x", "y", [Curve("", [(0, 1), (0.5, math.nan), (1, 2), (math.inf, 3)])]).tobytes() == sound.tobytes()
    assert plot("t", "x", "y", [Curve("", [])]).size == (WIDTH, HEIGHT)
    assert plot("t", "x", "y", [Curve("", [(1, 5)])], log_across=True).size == (WIDTH, HEIGHT)
