"""Curves as SVG that stands in a page: colours come from the page's style, so that they suit light, dark and paper."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH, HEIGHT = 720, 290
LEFT, RIGHT, TOP, BOTTOM = 72, 14, 12, 40
MOST_POINTS = 800
SHOWN_SHARE = 0.98
"""Of the dots that the vertical axis makes room for; a few outliers would press all others flat."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    label: str
    points: Sequence[Point]  # x rising
    look: Literal["dots", "line", "marks"]
    """`dots` are faint and may leave the frame, `line` is strong, `marks` is a line with its points marked."""


def chart(name: str, title: str, across: str, series: Sequence[Series]) -> str:
    """One drawing; `name` must be its own in the page. Whoever does not see it is told its range in words."""
    told = [one for one in series if one.points]
    xs = [x for one in told for x, _ in one.points]
    x_low, x_high = _widened(min(xs), max(xs))
    y_low, y_high = _range(told)
    frame = _Frame(x_low, x_high, y_low, y_high)
    said = "; ".join(f"{one.label}: from {one.points[0][1]:.4g} to {one.points[-1][1]:.4g}" for one in told)
    desc = f"{across} {min(xs):g} to {max(xs):g}. {said}."
    lines = [*_grid(frame), f'<g clip-path="url(#{name}-frame)">', *(_drawn(one, frame) for one in told), "</g>"]
    box = f'x="{LEFT - 4}" y="{TOP}" width="{WIDTH - LEFT - RIGHT + 8}" height="{HEIGHT - TOP - BOTTOM}"'  # a mark at the edge is whole
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(desc)}</desc>'
        f'<clipPath id="{name}-frame"><rect {box}/></clipPath>{"".join(lines)}</svg>'
    )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers from `low` to `high`, a step of 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """Ticks in words, all with as many decimals as tell them apart."""
    step = abs(values[1] - values[0]) if len(values) > 1 else abs(values[0]) or 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    digits = decimals + math.floor(math.log10(max(map(abs, values), default=0) or 1))
    if decimals <= 4 or digits > 2:
        return [f"{value:,.{decimals}f}" for value in values]
    return [f"{value:.{digits}e}".replace(".0e", "e").replace("e-0", "e-") if value else "0" for value in values]


@dataclass(frozen=True)
class _Frame:
    """Numbers to places in the drawing."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def _range(series: Sequence[Series]) -> tuple[float, float]:
    kept = [y for one in series if one.look != "dots" for _, y in one.points]
    for one in series:
        if one.look == "dots":
            ordered = sorted(y for _, y in one.points)
            over = int(len(ordered) * (1 - SHOWN_SHARE) / 2)
            kept += [ordered[over], ordered[-1 - over]]
    low, high = _widened(min(kept), max(kept))
    room = 0.06 * (high - low)
    return (0.0 if 0 <= low < 0.4 * high else low - room), high + room


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    around = abs(low) / 2 or 0.5
    return low - around, high + around


def _grid(frame: _Frame) -> list[str]:
    down, along = ticks(frame.y_low, frame.y_high), ticks(frame.x_low, frame.x_high, 6)
    lines = [f'<path class="grid" d="M{LEFT} {frame.y(value):.1f}H{WIDTH - RIGHT}"/>' for value in down]
    lines += [
        f'<text class="end" x="{LEFT - 9}" y="{frame.y(value):.1f}" dy=".35em">{label}</text>'
        for value, label in zip(down, labels(down), strict=True)
    ]
    foot = HEIGHT - BOTTOM
    lines.append(f'<path class="axis" d="M{LEFT} {foot}H{WIDTH - RIGHT}"/>')
    for value, label in zip(along, labels(along), strict=True):
        at = frame.x(value)
        side = "end" if at > WIDTH - RIGHT - 24 else "middle"
        lines.append(f'<path class="axis" d="M{at:.1f} {foot}v5"/><text class="{side}" x="{at:.1f}" y="{foot + 21}">{label}</text>')
    return lines


def _drawn(series: Series, frame: _Frame) -> str:
    if series.look == "dots":
        spots = "".join(f"M{frame.x(x):.1f} {frame.y(y):.1f}h0" for x, y in _thinned(series.points))
        return f'<path class="dots" d="{spots}"/>'
    points = series.points if len(series.points) <= MOST_POINTS else series.points[:: math.ceil(len(series.points) / MOST_POINTS)]
    if points[-1] != series.points[-1]:
        points = [*points, series.points[-1]]
    path = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points)
    marks = ""
    if series.look == "marks" or len(points) == 1:
        marks = "".join(f'<circle class="{series.look}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.2"/>' for x, y in points)
    return f'<path class="{series.look}" d="M{path}"/>{marks}'


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """Of many points the lowest and the highest of each stretch, so that what stands out stays."""
    if len(points) <= 2 * MOST_POINTS:
        return points
    size = math.ceil(len(points) / MOST_POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [spot for part in parts for spot in (min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1]))]
