"""Draws the bundled dataset: "tavi", a figure of our own, as captioned pictures for training and for held-out checks.

    python tools/draw_dataset.py                      write datasets/tavi/: the training pictures NN.png with captions NN.txt
    python tools/draw_dataset.py --held-out DIR       write pictures with poses and grounds that training never shows

The figure lives in its own units: x to the right and y down as one complex number, about 200 units high, its middle near 0.
"""

import argparse
import cmath
import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageColor, ImageDraw

GROUNDS = {
    "white": "#ffffff", "black": "#101010", "grey": "#9a9a9a", "red": "#d8453a", "orange": "#f09a3c",
    "yellow": "#f7dc5a", "green": "#63b55b", "blue": "#4f8fd6", "purple": "#8d6cc4", "pink": "#f3a6bd",
}  # fmt: skip
LINE, WHITE = "#123640", "#ffffff"
TEAL, TEAL_SHADE, TEAL_LIGHT = "#2fbcb0", "#22a09b", "#62d4c7"
DARK, DARK_SHADE = "#157a82", "#0f626c"
CREAM, CREAM_SHADE = "#fff2d2", "#f2dbae"
ORANGE, ORANGE_SHADE, CHEEK = "#f78b3b", "#dd6c22", "#ff9a55"
MAGENTA, MAGENTA_SHADE, PINK = "#d42a78", "#ab1d62", "#ff9cc6"
YELLOW, YELLOW_SHADE = "#ffd43c", "#f2ae22"
MOUTH, TONGUE = "#6b1730", "#ff7d78"
TOUCHING = (  # the colours that meet without an outline between them
    (TEAL, TEAL_LIGHT), (TEAL, TEAL_SHADE), (TEAL, CREAM), (TEAL_SHADE, CREAM), (TEAL_SHADE, CREAM_SHADE), (CREAM, CREAM_SHADE),
    (TEAL, CHEEK), (TEAL_SHADE, CHEEK), (DARK, DARK_SHADE), (DARK, ORANGE), (DARK_SHADE, ORANGE), (ORANGE, ORANGE_SHADE),
    (MAGENTA, PINK), (MAGENTA, MAGENTA_SHADE), (PINK, MAGENTA_SHADE), (YELLOW, YELLOW_SHADE), (MOUTH, TONGUE),
)  # fmt: skip
OVERSAMPLE = 4
TOP_TO_TOE, MIDDLE, OUTLINE = 213, 2j, 3.4  # of the standing figure, in its units
BEHIND, FRONT, TOP = range(3)  # where an arm lies: behind the body, before it, before the scarf as well

Shape = list[complex]
Arms = list[tuple[int, "Arm"]]  # each with its side, -1 or 1
Drawings = list[tuple[str, Image.Image, str]]  # stem, picture, caption


@dataclass(frozen=True)
class Arm:
    """Elbow and hand of the right arm in figure units (the left one is its mirror image)."""

    elbow: complex
    hand: complex
    layer: int = BEHIND


@dataclass(frozen=True)
class Foot:
    at: complex = 25 + 92j
    turn: float = 8
    sole: bool = False


@dataclass(frozen=True)
class Pose:
    """Limbs as (left, right) in the picture; ears in degrees above the horizontal; lift in figure units."""

    arms: tuple[Arm, Arm]
    ears: tuple[float, float] = (40, 40)
    feet: tuple[Foot, Foot] = (Foot(), Foot())
    lift: float = 0


@dataclass(frozen=True)
class Picture:
    pose: str
    face: str
    ground: str
    frame: tuple[int, int]
    size: float = 0.88  # the figure's height as a share of the frame's
    tilt: float = 0
    antenna: float = 0
    gaze: complex = 0

    @property
    def caption(self) -> str:
        return f"tavi {self.pose}, {self.face}, {self.ground} background"


DOWN = Arm(64 + 54j, 76 + 70j)
WAVE = Arm(70 + 36j, 84 + 10j)
HIP = Arm(83 + 45j, 56 + 67j, FRONT)
FOLD_LOW, FOLD_HIGH = Arm(58 + 60j, -20 + 68j, FRONT), Arm(56 + 56j, -14 + 53j, FRONT)
BACK = Arm(72 + 52j, 46 + 68j)
PROP = Arm(66 + 54j, 80 + 78j)
CHEEKS = Arm(64 + 32j, 45 + 8j, TOP)
SOLE = Foot(32 + 86j, 16, True)

POSES = {
    "standing": Pose((DOWN, DOWN)),
    "waving": Pose((DOWN, WAVE)),
    "hands on hips": Pose((HIP, HIP), feet=(Foot(29 + 92j), Foot(29 + 92j))),
    "arms folded": Pose((FOLD_LOW, FOLD_HIGH), ears=(30, 30)),
    "arms behind back": Pose((BACK, BACK), ears=(48, 48), feet=(Foot(20 + 93j, 4), Foot(20 + 93j, 4))),
    "sitting": Pose((PROP, PROP), ears=(34, 34), feet=(SOLE, SOLE)),
    "walking": Pose((Arm(68 + 48j, 88 + 48j), Arm(62 + 56j, 70 + 76j)), ears=(48, 30), feet=(Foot(18 + 96j, 4), Foot(40 + 80j, -34))),
    "ears down": Pose((DOWN, DOWN), ears=(-36, -36)),
    "one ear up": Pose((DOWN, DOWN), ears=(-28, 58)),
    "arms up": Pose((WAVE, WAVE), ears=(26, 26)),
    "one arm up": Pose((DOWN, Arm(68 + 28j, 76 - 4j)), ears=(40, 24)),
    "pointing": Pose((HIP, Arm(72 + 42j, 96 + 36j))),
    "jumping": Pose((Arm(70 + 32j, 88 + 20j),) * 2, ears=(56, 56), feet=(Foot(26 + 92j, 50),) * 2, lift=5),
    "leaning": Pose((Arm(70 + 46j, 88 + 44j), DOWN), ears=(50, 26), feet=(Foot(22 + 92j), Foot(36 + 88j, -14))),
    "holding its scarf": Pose((Arm(64 + 58j, 28 + 60j, TOP), DOWN), ears=(30, 30)),
    "hands on cheeks": Pose((CHEEKS, CHEEKS), ears=(52, 52)),
    "arms wide": Pose((Arm(72 + 40j, 94 + 34j),) * 2),
}

TRAINING = (
    Picture("standing", "happy", "white", (256, 256), 0.89),
    Picture("standing", "calm", "grey", (320, 320), 0.87, -2, 12, 1.5),
    Picture("standing", "surprised", "red", (256, 256), 0.89, 0, -14),
    Picture("standing", "winking", "white", (192, 192), 0.88, 2, 8),
    Picture("waving", "happy", "blue", (256, 256), 0.88, -2, 6),
    Picture("waving", "winking", "white", (320, 320), 0.89, 2, -8),
    Picture("waving", "surprised", "green", (288, 320), 0.80, 0, 10),
    Picture("hands on hips", "happy", "yellow", (256, 256), 0.90, 0, 4),
    Picture("hands on hips", "winking", "white", (288, 288), 0.86, -2, -12),
    Picture("arms folded", "calm", "orange", (256, 256), 0.88, 2, 8, -1.5),
    Picture("arms folded", "sleepy", "yellow", (320, 288), 0.89, -2, 18),
    Picture("arms behind back", "happy", "green", (256, 256), 0.87, 3, -6),
    Picture("sitting", "happy", "white", (288, 320), 0.80, 0, 6),
    Picture("sitting", "sleepy", "blue", (256, 256), 0.86, -3, 22),
    Picture("walking", "happy", "orange", (384, 384), 0.88, 2, -16, 2),
    Picture("walking", "surprised", "blue", (320, 288), 0.90, -2, 16, -2),
    Picture("ears down", "sleepy", "grey", (224, 224), 0.87, 0, 26),
    Picture("ears down", "calm", "white", (256, 256), 0.89, -4, 14, 2j),
    Picture("one ear up", "surprised", "yellow", (224, 224), 0.88, 2, -4),
    Picture("one ear up", "winking", "red", (256, 256), 0.85, -2, 8),
)

HELD_OUT = (
    Picture("arms up", "happy", "purple", (256, 256), 0.89),
    Picture("pointing", "winking", "pink", (256, 256), 0.87, -2, 8),
    Picture("jumping", "happy", "black", (256, 256), 0.88, 2, -10),
    Picture("leaning", "calm", "purple", (256, 256), 0.87, 5, -12, 1.5),
    Picture("holding its scarf", "sleepy", "pink", (256, 256), 0.89, -2, 14),
    Picture("one arm up", "surprised", "black", (256, 256), 0.88, -2, 6),
    Picture("hands on cheeks", "surprised", "purple", (256, 256), 0.88, 2, -6),
    Picture("arms wide", "happy", "pink", (256, 256), 0.86, -2, 10),
)


# ---------------------------------------------------------------- geometry


def mirrored(point: complex, side: int) -> complex:
    return complex(side * point.real, point.imag)


def turned(degrees: float) -> complex:
    return cmath.rect(1, math.radians(degrees))


def oval(centre: complex, rx: float, ry: float, degrees: float = 0, start: float = 0, end: float = 360) -> Shape:
    angles = [math.radians(start + (end - start) * k / 96) for k in range(97)]
    return [centre + complex(rx * math.cos(a), ry * math.sin(a)) * turned(degrees) for a in angles]


def smooth(points: Shape, closed: bool = False) -> Shape:
    """A Catmull-Rom curve through the points."""
    ring = [points[-1], *points, *points[:2]] if closed else [2 * points[0] - points[1], *points, 2 * points[-1] - points[-2]]
    curve: Shape = []
    for a, b, c, d in zip(ring, ring[1:], ring[2:], ring[3:], strict=False):
        for t in (k / 16 for k in range(16)):
            curve.append(0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3))
    return curve if closed else [*curve, points[-1]]


def leaf(base: complex, length: float, width: float, degrees: float, bend: float) -> Shape:
    """A pointed leaf that grows from `base`, widest before its middle; `bend` moves its middle sideways."""
    there = [(k / 40, 3.2 * width) for k in range(41)]
    back = [(t, -w) for t, w in there[::-1]]
    edge = [complex(length * t, bend * math.sin(math.pi * t) + w * t**0.7 * (1 - t)) for t, w in there + back]
    return [base + p * turned(degrees) for p in edge]


def star(centre: complex, radius: float, degrees: float) -> Shape:
    corners = [centre + (radius if k % 2 == 0 else 0.54 * radius) * turned(degrees - 90 + 36 * k) for k in range(10)]
    return [a + (b - a) * t / 8 for a, b in zip(corners, corners[1:] + corners[:1], strict=True) for t in range(8)]


def both(half: Shape) -> Shape:
    """A left-right symmetric closed shape from its right half, top to bottom on the axis."""
    return smooth(half + [mirrored(p, -1) for p in half[-2:0:-1]], closed=True)


BODY = both([-58j, 26 - 52j, 43 - 34j, 49 - 10j, 47 + 10j, 53 + 30j, 62 + 54j, 58 + 78j, 36 + 91j, 95j])
BAND = both([21j, 24 + 19j, 50 + 9j, 54 + 17j, 50 + 26j, 26 + 36j, 38j])  # the scarf around the neck
KNOT = -24 + 32j


# ---------------------------------------------------------------- the sheet


@dataclass(frozen=True)
class Tube:
    """A round limb along a path, from one radius to another."""

    path: Shape
    start: float
    end: float


class Sheet:
    """The oversized picture, and the way from figure units to its pixels."""

    def __init__(self, picture: Picture, lift: float) -> None:
        width, height = (side * OVERSAMPLE for side in picture.frame)
        self.image = Image.new("RGB", (width, height), GROUNDS[picture.ground])
        self.scale = picture.size * height / TOP_TO_TOE
        self.turn = self.scale * turned(picture.tilt)
        self.origin = complex(width, height) / 2 - self.turn * (MIDDLE + 1j * lift)

    def _draw(self, image: Image.Image, part: Shape | Tube, colour: str | int, grow: float = 0, shift: complex = 0) -> None:
        draw = ImageDraw.Draw(image)
        points = [self.origin + self.turn * (p + shift) for p in (part.path if isinstance(part, Tube) else part)]
        start, end = (part.start, part.end) if isinstance(part, Tube) else (0, 0)
        if not isinstance(part, Tube):
            draw.polygon([(z.real, z.imag) for z in points], fill=colour)
            if grow == 0:
                return
        for k, z in enumerate(points):  # discs, for ImageDraw.line leaves hairline gaps between the short pieces of a wide curve
            r = self.scale * (start + (end - start) * k / (len(points) - 1) + grow)
            draw.ellipse((z.real - r, z.imag - r, z.real + r, z.imag + r), fill=colour)

    def paint(self, part: Shape | Tube, colour: str, outline: float = OUTLINE) -> None:
        if outline > 0:
            self._draw(self.image, part, LINE, outline)
        self._draw(self.image, part, colour)

    def _mask(self, part: Shape | Tube, shift: complex = 0) -> Image.Image:
        mask = Image.new("L", self.image.size)
        self._draw(mask, part, 255, shift=shift)
        return mask

    def inside(self, outer: Shape | Tube, part: Shape | Tube, colour: str) -> None:
        """Paint the area of `part` that lies within `outer`."""
        self.image.paste(colour, mask=ImageChops.multiply(self._mask(outer), self._mask(part)))

    def shade(self, part: Shape | Tube, colour: str, shift: complex) -> None:
        """Paint the rim of `part` that a copy moved by `shift` leaves free: light falls from the upper left."""
        self.image.paste(colour, mask=ImageChops.subtract(self._mask(part), self._mask(part, shift)))

    def stroke(self, path: Shape, colour: str, width: float) -> None:
        self._draw(self.image, Tube(path, width / 2, width / 2), colour)


# ---------------------------------------------------------------- the figure


def draw_antenna(sheet: Sheet, degrees: float) -> None:
    base = -52j
    stalk = [base + (p - base) * turned(degrees) for p in smooth([base, -8 - 66j, -10 - 80j, 0 - 91j, 14 - 86j])]
    sheet.paint(Tube(stalk, 3.4, 2.6), DARK, 2.6)
    shape = star(stalk[-1], 16, degrees + 12)
    sheet.paint(shape, YELLOW)
    sheet.shade(shape, YELLOW_SHADE, -3 - 3j)


def draw_ears(sheet: Sheet, ears: list[tuple[int, float]]) -> None:
    base = 33 - 36j
    for side, degrees in ears:
        along = turned(-degrees)
        outer = [mirrored(p, side) for p in leaf(base, 64, 20, -degrees, -5)]
        inner = [mirrored(p, side) for p in leaf(base + 12 * along, 42, 11.5, -degrees, -5)]
        sheet.paint(outer, DARK)
        sheet.shade(outer, DARK_SHADE, -2 - 4j)
        sheet.paint(inner, ORANGE, 0)
        sheet.stroke([mirrored(base + p * along, side) for p in smooth([12 + 0j, 28 - 4j, 42 - 4.5j])], ORANGE_SHADE, 2)


def draw_arms(sheet: Sheet, arms: Arms, layer: int) -> None:
    for side, arm in arms:
        if arm.layer == layer:
            tube = Tube(smooth([mirrored(p, side) for p in (47 + 37j, arm.elbow, arm.hand)]), 7, 8)
            sheet.paint(tube, DARK)
            sheet.shade(tube, DARK_SHADE, -1.5 - 3.5j)
            along = tube.path[-1] - tube.path[-4]
            mitten = oval(tube.path[-1], 11.5, 10, math.degrees(cmath.phase(along)))
            sheet.paint(mitten, MAGENTA)
            sheet.shade(mitten, MAGENTA_SHADE, -2 - 3j)


def draw_feet(sheet: Sheet, feet: list[tuple[int, Foot]]) -> None:
    for side, foot in feet:
        at, degrees = mirrored(foot.at, side), side * foot.turn
        shape = oval(at, 16, 18, degrees) if foot.sole else oval(at, 20, 11.5, degrees)
        sheet.paint(shape, DARK)
        sheet.shade(shape, DARK_SHADE, -2 - 4j)
        if foot.sole:
            sheet.paint(oval(at + 1j, 9.5, 11.5, degrees), ORANGE, 0)


def draw_body(sheet: Sheet) -> None:
    sheet.paint(BODY, TEAL)
    sheet.shade(BODY, TEAL_SHADE, -7 - 5j)
    sheet.inside(BODY, oval(-24 - 42j, 13, 6, -38), TEAL_LIGHT)
    sheet.inside(BODY, [p + 5j for p in BAND], TEAL_SHADE)
    belly = oval(66j, 37, 25)
    sheet.inside(BODY, belly, CREAM)
    sheet.shade(belly, CREAM_SHADE, -4 - 4j)


def draw_scarf_tail(sheet: Sheet, swing: float) -> None:
    def hung(points: Shape) -> Shape:
        return [KNOT + p * turned(swing) for p in points]

    tail = hung(smooth([-8 + 0j, 8 + 0j, 10 + 20j, 11 + 36j, -11 + 36j, -10 + 20j], True))
    sheet.paint(tail, MAGENTA)
    for top in (12j, 25j):
        sheet.inside(tail, hung([top - 20, top + 20, top + 20 + 6j, top - 20 + 6j]), PINK)


def draw_scarf_band(sheet: Sheet) -> None:
    sheet.paint(BAND, MAGENTA)
    for x in range(-50, 60, 18):
        sheet.inside(BAND, [x + 4 + 0j, x + 11 + 0j, x + 7 + 44j, x + 44j], PINK)
    sheet.shade(BAND, MAGENTA_SHADE, -0.5 - 4j)
    knot = oval(KNOT, 10.5, 9, 12)
    sheet.paint(knot, MAGENTA)
    sheet.shade(knot, MAGENTA_SHADE, -2 - 3j)


def draw_eye(sheet: Sheet, side: int, face: str, gaze: complex) -> None:
    at = complex(20 * side, -20)
    if face == "sleepy":
        sheet.stroke(oval(at - 4j, 12, 10, 0, 10, 170), LINE, 4.6)
        return
    if face == "winking" and side > 0:
        sheet.stroke(oval(at + 5j, 12, 11, 0, 190, 350), LINE, 4.6)
        return
    wide = face == "surprised"
    white = oval(at, 14.5, 18) if wide else oval(at, 13, 16)
    sheet.paint(white, WHITE, 2.4)
    centre = at + gaze - side * 1.5
    sheet.inside(white, oval(centre, 7.5, 9.5) if wide else oval(centre, 9, 12), LINE)
    sheet.inside(white, oval(centre - 3 - 4.5j, 3.6, 4), WHITE)
    sheet.inside(white, oval(centre + 3 + 5j, 1.9, 1.9), WHITE)


def draw_mouth(sheet: Sheet, face: str) -> None:
    if face == "calm":
        sheet.stroke(oval(1j, 9, 6, 0, 15, 165), LINE, 3.8)
        return
    grin = smooth([-12 + 0j, 1.5j, 12 + 0j, 8 + 10j, 13j, -8 + 10j], True)
    mouth = {"surprised": oval(7j, 6.5, 8), "sleepy": oval(2 + 5j, 7, 4.5, -8)}.get(face, grin)
    sheet.paint(mouth, MOUTH, 2)
    if face != "sleepy":
        sheet.inside(mouth, oval(13.5j, 7, 5.5), TONGUE)


def draw_face(sheet: Sheet, face: str, gaze: complex) -> None:
    for side in (-1, 1):
        sheet.inside(BODY, oval(complex(38 * side, 2), 9, 6.5), CHEEK)
        draw_eye(sheet, side, face, gaze)
    draw_mouth(sheet, face)


def draw(picture: Picture) -> Image.Image:
    pose, (left, right) = POSES[picture.pose], (-1, 1)
    arms = [(left, pose.arms[0]), (right, pose.arms[1])]
    sheet = Sheet(picture, pose.lift)
    draw_antenna(sheet, picture.antenna)
    draw_ears(sheet, [(left, pose.ears[0]), (right, pose.ears[1])])
    draw_arms(sheet, arms, BEHIND)
    draw_body(sheet)
    draw_face(sheet, picture.face, picture.gaze)
    draw_scarf_tail(sheet, picture.antenna / 2)
    draw_arms(sheet, arms, FRONT)
    draw_scarf_band(sheet)
    draw_feet(sheet, [(left, pose.feet[0]), (right, pose.feet[1])])
    draw_arms(sheet, arms, TOP)
    return sheet.image.resize(picture.frame, Image.Resampling.LANCZOS)


def palette(ground: str) -> Image.Image:
    """The figure's colours with their blends along its edges: few enough for small files, and alike in all pictures."""
    outlined = dict.fromkeys(colour for pair in TOUCHING for colour in pair)
    pairs = [(GROUNDS[ground], LINE), (WHITE, LINE), *((colour, LINE) for colour in outlined), *TOUCHING]
    rgb = [(ImageColor.getrgb(a), ImageColor.getrgb(b)) for a, b in pairs]
    blends = [tuple(round(p + (q - p) * k / 6) for p, q in zip(a, b, strict=True)) for a, b in rgb for k in range(7)]
    flat = Image.new("P", (1, 1))
    flat.putpalette([part for blend in dict.fromkeys(blends) for part in blend])
    return flat


def drawn(pictures: tuple[Picture, ...], mode: str = "RGB") -> Drawings:
    few = [draw(picture).quantize(palette=palette(picture.ground), dither=Image.Dither.NONE) for picture in pictures]
    return [(f"{k:02d}", image.convert(mode), picture.caption) for k, (image, picture) in enumerate(zip(few, pictures, strict=True), 1)]


def training() -> Drawings:
    """The training set, with the files' exact pixels."""
    return drawn(TRAINING)


def held_out() -> Drawings:
    """The same figure in poses and on grounds that the training set lacks."""
    return drawn(HELD_OUT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", type=Path, metavar="DIR", help="write the held-out pictures into DIR instead")
    held = parser.parse_args().held_out
    folder = held or Path(__file__).resolve().parents[1] / "datasets" / "tavi"
    folder.mkdir(parents=True, exist_ok=True)
    for stem, picture, caption in drawn(HELD_OUT if held else TRAINING, "P"):
        picture.save(folder / f"{stem}.png", optimize=True)
        (folder / f"{stem}.txt").write_text(caption + "\n", "utf-8", newline="\n")


if __name__ == "__main__":
    main()
