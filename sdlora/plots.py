"""Curves and points as a picture, for whoever opens a file instead of a page (`charts` draws into pages)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

from sdlora.charts import Point, labels, ticks
from sdlora.pictures import FAINT, INK, PAPER

WIDTH, HEIGHT = 900, 540
LEFT, RIGHT, TOP, BOTTOM = 90, 30, 52, 64
FINE = 2
"""Drawn so many times as large, and scaled down: PIL draws no smooth lines."""
COLOURS = ("#2266cc", "#cc5522", "#2a8a4a", "#8844aa", "#b08a00", "#008899", "#cc3377", "#666666")
GRID = "#e3e7ee"


@dataclass(frozen=True)
class Curve:
    """Points that a line joins, or not; some of them may be named."""

    label: str
    points: Sequence[Point]
    joined: bool = True
    names: Sequence[str] = field(default=())  # beside each point


def plot(title: str, across: str, upward: str, curves: Sequence[Curve], log_across: bool = False) -> Image.Image:
    """Curves over one pair of axes; with `log_across` the horizontal one shows powers of ten. Points that are not finite are left out."""
    shown = [Curve(c.label, [p for p in c.points if all(map(math.isfinite, p))], c.joined, c.names) for c in curves]
    frame = _Frame([p for curve in shown for p in curve.points] or [(1.0, 0.0)], log_across)
    paper = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), PAPER)
    draw, font = ImageDraw.Draw(paper), ImageFont.load_default(15 * FINE)
    draw.text((LEFT * FINE, 14 * FINE), title, INK, font)
    _axes(draw, font, frame, across, upward)
    for i, curve in enumerate(shown):
        _drawn(draw, font, frame, curve, COLOURS[i % len(COLOURS)], dots=len(shown) <= len(COLOURS))
    _legend(draw, font, [curve.label for curve in shown])
    return paper.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


class _Frame:
    """Numbers to places in the drawing."""

    def __init__(self, points: Sequence[Point], log_across: bool) -> None:
        self.log = log_across
        self.x_low, self.x_high = _room([self.scaled(x) for x, _ in points], 0.03)
        self.y_low, self.y_high = _room([y for _, y in points], 0.08)

    def scaled(self, x: float) -> float:
        return math.log10(x) if self.log else x

    def at(self, x: float, y: float) -> tuple[float, float]:
        right, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        share = (self.scaled(x) - self.x_low) / (self.x_high - self.x_low), (y - self.y_low) / (self.y_high - self.y_low)
        return (LEFT + share[0] * right) * FINE, (HEIGHT - BOTTOM - share[1] * down) * FINE

    def marks(self) -> list[tuple[float, str]]:
        """(value, label) along the horizontal axis."""
        if not self.log:
            values = ticks(self.x_low, self.x_high)
            return list(zip(values, labels(values), strict=True))
        powers = range(math.ceil(self.x_low - 1e-9), math.floor(self.x_high + 1e-9) + 1)
        return [(10.0**power, f"1e{power}") for power in powers]


def _room(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = share * (high - low) or abs(low) / 2 or 0.5
    return low - room, high + room


def _axes(draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, frame: _Frame, across: str, upward: str) -> None:
    heights = ticks(frame.y_low, frame.y_high)
    for value, label in zip(heights, labels(heights), strict=True):
        _, y = frame.at(1.0, value)
        draw.line([(LEFT * FINE, y), ((WIDTH - RIGHT) * FINE, y)], GRID, FINE)
        draw.text(((LEFT - 10) * FINE, y), label, FAINT, font, anchor="rm")
    foot = (HEIGHT - BOTTOM) * FINE
    draw.line([(LEFT * FINE, foot), ((WIDTH - RIGHT) * FINE, foot)], INK, FINE)
    for value, label in frame.marks():
        x, _ = frame.at(value, 0.0)
        draw.line([(x, foot), (x, foot + 5 * FINE)], INK, FINE)
        draw.text((x, foot + 18 * FINE), label, FAINT, font, anchor="mm")
    draw.text(((LEFT + WIDTH - RIGHT) / 2 * FINE, (HEIGHT - 20) * FINE), across, INK, font, anchor="mm")
    draw.text((LEFT * FINE, (TOP - 12) * FINE), upward, FAINT, font, anchor="lm")


def _drawn(
    draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, frame: _Frame, curve: Curve, colour: str, dots: bool
) -> None:
    spots = [frame.at(x, y) for x, y in curve.points]
    if curve.joined and len(spots) > 1:
        draw.line(spots, colour, 2 * FINE if dots else FINE, joint="curve")
    if (dots or not curve.joined) and len(spots) <= 60:
        for x, y in spots:
            draw.ellipse((x - 4 * FINE, y - 4 * FINE, x + 4 * FINE, y + 4 * FINE), colour, PAPER, FINE)
    for (x, y), name in zip(spots, curve.names, strict=False):
        side, shift = ("rm", -9) if x > 0.8 * WIDTH * FINE else ("lm", 9)
        draw.text((x + shift * FINE, y - 10 * FINE), name, FAINT, font, anchor=side)


def _legend(draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, names: Sequence[str]) -> None:
    x = float(WIDTH - RIGHT) * FINE
    for i in reversed(range(len(names))):
        if names[i]:
            draw.text((x, (TOP - 12) * FINE), names[i], COLOURS[i % len(COLOURS)], font, anchor="rm")
            x -= draw.textlength(names[i], font) + 18 * FINE
