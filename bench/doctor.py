"""Measures how well the doctor finds defects that are planted into the pictures of given folders, and how often it errs.

    python bench/doctor.py FOLDER... [--tiles N] [--sweep]

Pictures are read below each folder; a `metadata.jsonl` there (file_name, text) names them. Every second picture, by name, is for choosing
limits (`--sweep` shows what each would give there); the figures are of the others. Copies are planted for every picture, one kind at a
time, and once of all kinds mixed, one for every fourth picture. A pair is true if both come of one picture, or if their pixels are equal.
All others are false, also those of drawings that are meant to look alike; the table's first lines name them.
Defects of one picture are planted into all: precision is that of a set of which half is sound.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from sdlora.data import doctor, fingerprints
from sdlora.data.looks import Look, look, thumbnails
from sdlora.data.scan import SUFFIXES, UnreadableError, read_picture

Picture = Image.Image
Plant = Callable[[Picture, random.Random], Picture]
Named = tuple[str, Picture]
Pairs = set[tuple[int, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--tiles", type=int, default=0, help="count N x N parts of each picture as pictures, to have more pairs of few")
    parser.add_argument("--sweep", action="store_true", help="show the limits' effect on the half for choosing")
    options = parser.parse_args()
    for folder in options.folders:
        pictures = read(folder, options.tiles)
        print(f"\n{folder.name}: {len(pictures)} pictures, half of them reported", flush=True)
        if options.sweep:
            sweep(pictures[::2])
        report(pictures[1::2])


def read(folder: Path, tiles: int) -> list[Named]:
    listing = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in listing.read_text("utf-8").splitlines()] if listing.is_file() else []
    names = {row["file_name"]: row["text"] for row in rows}
    found: list[Named] = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        try:
            picture = read_picture(path)
        except UnreadableError as error:
            print(f"left out {path.name}: {error}")
            continue
        name = names.get(path.name, str(path.relative_to(folder)))
        found += parts(name, picture, tiles) if tiles else [(name, picture)]
    return found


def parts(name: str, picture: Picture, tiles: int) -> list[Named]:
    """Parts that do not overlap; blank ones are left out, for they are alike."""
    w, h = picture.width // tiles, picture.height // tiles
    cut = [(f"{name} {x},{y}", picture.crop((x * w, y * h, x * w + w, y * h + h))) for x in range(tiles) for y in range(tiles)]
    return [(part, tile) for part, tile in cut if look(tile).contrast > 2 * doctor.LOWEST_CONTRAST]


# ---------------------------------------------------------------- what is planted


def resized(scale: float) -> Plant:
    filters = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
    return lambda picture, rng: picture.resize((round(picture.width * scale), round(picture.height * scale)), rng.choice(filters))


def jpeg(quality: int) -> Plant:
    def plant(picture: Picture, _: random.Random) -> Picture:
        file = BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return plant


def cropped(picture: Picture, rng: random.Random) -> Picture:
    """5 % off one to four sides."""
    sides = rng.sample(range(4), rng.randint(1, 4))
    left, upper, right, lower = (0.05 * (side in sides) for side in range(4))
    w, h = picture.size
    return picture.crop((round(left * w), round(upper * h), round(w - right * w), round(h - lower * h)))


def cropped_all_round(picture: Picture, _: random.Random) -> Picture:
    w, h = picture.size
    return picture.crop((round(0.05 * w), round(0.05 * h), round(0.95 * w), round(0.95 * h)))


def brightened(factor: float) -> Plant:
    return lambda picture, _: ImageEnhance.Brightness(picture).enhance(factor)


def blurred(share: float) -> Plant:
    return lambda picture, _: picture.filter(ImageFilter.GaussianBlur(share * min(picture.size)))


def blanked(picture: Picture, rng: random.Random) -> Picture:
    """The picture's mean colour, with a slope of 2 % and noise of 2 %."""
    mean = np.asarray(picture).reshape(-1, 3).mean(0)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 5, (picture.height, picture.width, 1))
    slope = np.linspace(-2.5, 2.5, picture.width)[:, None]
    return Image.fromarray((mean + noise + slope).round().clip(0, 255).astype(np.uint8))


COPIES: dict[str, Plant] = {
    "exact": lambda picture, _: picture.copy(),
    **{f"resized to {round(100 * scale)} %": resized(scale) for scale in (0.5, 0.75, 1.5)},
    **{f"JPEG quality {quality}": jpeg(quality) for quality in (40, 60, 85)},
    "5 % off some sides": cropped,
    "5 % off all sides": cropped_all_round,
    **{f"brightness {factor}": brightened(factor) for factor in (0.92, 1.08)},
}
FLAWS: dict[str, tuple[str, Plant]] = {
    **{f"blur of {100 * share:g} % of the side": ("blurred", blurred(share)) for share in (0.01, 0.015, 0.02)},
    **{f"JPEG quality {quality}": ("over-compressed", jpeg(quality)) for quality in (5, 7, 10)},
    **{f"JPEG quality {quality} (sound)": ("over-compressed", jpeg(quality)) for quality in (50, 75, 90)},
    "nearly uniform": ("nearly-uniform", blanked),
}

# ---------------------------------------------------------------- measuring


def found_pairs(looks: Sequence[Look], nearness: fingerprints.Nearness) -> Pairs:
    """As the doctor finds them: equal pixels, and near ones."""
    near = {(pair.first, pair.second) for pair in fingerprints.near_pairs(thumbnails(looks), nearness)}
    return near | equal_pairs(looks)


def equal_pairs(looks: Sequence[Look]) -> Pairs:
    places: dict[str, list[int]] = {}
    for k, one in enumerate(looks):
        places.setdefault(one.digest, []).append(k)
    return {pair for group in places.values() for pair in combinations(group, 2)}


def judged(names: Sequence[str], looks: Sequence[Look], nearness: fingerprints.Nearness) -> tuple[Pairs, Pairs, Pairs]:
    """True pairs found, true pairs there, and false pairs found. Pictures of one name are of one picture."""
    found = found_pairs(looks, nearness)
    places: dict[str, list[int]] = {}
    for k, name in enumerate(names):
        places.setdefault(name, []).append(k)
    true = equal_pairs(looks) | {pair for group in places.values() for pair in combinations(group, 2)}
    return found & true, true, found - true


def counted(kind: str, names: Sequence[str], looks: Sequence[Look], nearness: fingerprints.Nearness) -> None:
    if kind == "exact":  # what the doctor calls a duplicate is found by equal pixels alone
        places = len(names) // 2
        equal = equal_pairs(looks)
        there = {(k, k + places) for k in range(places)}
        row(kind, len(equal), len(equal | there), 0)
        return
    hit, there, wrong = judged(names, looks, nearness)
    row(kind, len(hit), len(there), len(wrong))


def row(kind: str, hit: int, there: int, wrong: int) -> None:
    print(
        f"{kind:32} precision {hit / max(1, hit + wrong):.4f}  recall {hit / max(1, there):.4f}  ({hit} of {there}, {wrong} false)",
        flush=True,
    )


def report(pictures: Sequence[Named]) -> None:
    names = [name for name, _ in pictures]
    rng = random.Random(0)
    start = time.perf_counter()
    sound = [look(picture) for _, picture in pictures]
    measured = time.perf_counter() - start
    nearness = fingerprints.Nearness()
    start = time.perf_counter()
    hit, _, wrong = judged(names, sound, nearness)
    paired = time.perf_counter() - start
    pairs = len(pictures) * (len(pictures) - 1) // 2
    print(f"as they are: {len(wrong)} false of {pairs} pairs, {1e4 * len(wrong) / max(1, pairs):.3f} in 10,000; {len(hit)} equal pairs")
    for first, second in sorted(wrong):
        print(f"  false: {names[first]} | {names[second]}")
    print(f"seconds per 1,000 pictures: {1000 * measured / len(pictures):.2f} measuring, {1000 * paired / len(pictures):.2f} comparing")
    print("copies")
    kinds = list(COPIES)
    for kind, plant in COPIES.items():
        copies = [look(plant(picture, rng)) for _, picture in pictures]
        counted(kind, [*names, *names], [*sound, *copies], nearness)
    mixed = [(name, look(COPIES[rng.choice(kinds)](picture, rng))) for name, picture in pictures[::4]]
    counted("mixed, one in four", [*names, *(name for name, _ in mixed)], [*sound, *(one for _, one in mixed)], nearness)
    print("flaws")
    for kind, (code, plant) in FLAWS.items():
        flawed = sum(has(code, look(plant(picture, rng))) for _, picture in pictures)
        if kind.endswith("(sound)"):
            print(f"{kind:32} called {code}: {flawed / len(pictures):.4f}  ({flawed} of {len(pictures)})")
        else:
            row(kind, flawed, len(pictures), sum(has(code, one) for one in sound))


def has(code: str, seen: Look) -> bool:
    return any(finding.code == code for finding in doctor.of_picture("", seen, 1))


def sweep(pictures: Sequence[Named]) -> None:
    names = [name for name, _ in pictures]
    rng = random.Random(1)
    sound = [look(picture) for _, picture in pictures]
    kinds = [kind for kind in COPIES if kind != "exact"]
    copies = [look(COPIES[rng.choice(kinds)](picture, rng)) for _, picture in pictures]
    for field, values in (
        ("tangent", (0.06, 0.09, 0.12, 0.15)),
        ("spot_at_16", (0.2, 0.3, 0.4)),
        ("spot", (0.05, 0.07, 0.1)),
        ("relative", (0.12, 0.15, 0.18, 0.21, 0.25)),
    ):
        for value in values:
            counted(f"{field} {value}", [*names, *names], [*sound, *copies], replace(fingerprints.Nearness(), **{field: value}))
    for kind, (_, plant) in FLAWS.items():
        seen = [look(plant(picture, rng)) for _, picture in pictures]
        for field in ("steepness", "block_share", "block_step", "contrast"):
            marks = np.quantile([[getattr(one, field) for one in group] for group in (sound, seen)], (0.02, 0.5, 0.98), axis=1).T.round(3)
            print(f"{kind:32} {field:12} quantiles .02 .5 .98: sound {marks[0]}, planted {marks[1]}")


if __name__ == "__main__":
    main()
