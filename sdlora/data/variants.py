"""The ways in which one picture is shown: its sizes, crops, colours and mirror images, all known before the run, so that each is encoded
once and every sample only chooses among them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from sdlora.config import Run
from sdlora.data import buckets, masks
from sdlora.data.buckets import CENTRE, Crop, Size
from sdlora.data.scan import Item
from sdlora.randomness import stream

LOOKS = 4
"""Crops and colours of a picture where they vary, the plain ones among them: more would be a cache of more than four times the size."""
Factors = tuple[float, float, float]  # brightness, contrast, saturation
PLAIN: Factors = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Variant:
    size: Size
    crop: Crop = CENTRE
    colour: Factors = PLAIN
    flip: bool = False


def variants(item: Item, run: Run, available: Sequence[Sequence[Size]]) -> tuple[Variant, ...]:
    """Every way of showing a picture, given the sizes of each resolution: first as it is at its first size, its mirror images last."""
    data = run.data
    focus = masks.focus(masks.read(item.mask, item.path)) if item.mask and data.crop == "subject" else (0.5, 0.5)
    found: dict[Variant, None] = {}
    for size in sizes(item.width, item.height, available):
        place = buckets.place_around(focus, item.width, item.height, size)
        least = max(1 - data.crop_jitter, min(1.0, buckets.enlargement(item.width, item.height, size)))
        found[Variant(size, Crop(place))] = None
        for number in range(1, LOOKS if data.crop_jitter or data.colour_jitter else 1):
            # by content, so that no other picture's coming or going changes it
            across, down, smaller, *shifts = stream(run.seed, f"variant/{item.look.digest}", number).random(6).tolist()
            share = 1 - smaller * (1 - least)
            crop = Crop(place, share, (across, down)) if share < 1 else Crop(place)
            brightness, contrast, saturation = (1 + data.colour_jitter * (2 * shift - 1) for shift in shifts)
            found[Variant(size, crop, (brightness, contrast, saturation))] = None
    mirrored = [replace(one, flip=True) for one in found] if data.flip else []
    return (*found, *mirrored)


def sizes(width: int, height: int, available: Sequence[Sequence[Size]]) -> list[Size]:
    """A picture's size at each resolution that does not enlarge it; where all would, at the one that does so least."""
    found = list(dict.fromkeys(buckets.choose(width, height, some) for some in available))
    sound = [size for size in found if buckets.enlargement(width, height, size) <= 1]
    return sound or [min(found, key=lambda size: buckets.enlargement(width, height, size))]


def frame(item: Item, variant: Variant) -> Tensor:
    """What of its picture a variant shows, (6,) in px: height and width of the picture, top and left of the cut and its height and width
    in the scale of what is shown (Podell et al. 2023, section 2.2)."""
    left, upper, right, _ = buckets.taken(item.width, item.height, variant.size, variant.crop)
    scale = variant.size[0] / (right - left)
    aside = item.width - right if variant.flip else left
    corner = (round(side * scale) for side in (upper, aside))
    return torch.tensor([item.height, item.width, *corner, *variant.size[::-1]], dtype=torch.float32)


def pixels(picture: Image.Image, variant: Variant) -> Tensor:
    """A picture as one variant shows it: (3, H, W) in -1..1, float32."""
    shown = buckets.scaled(picture, variant.size, variant.crop)
    for enhance, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), variant.colour, strict=True):
        shown = enhance(shown).enhance(factor) if factor != 1 else shown
    found = buckets.pixels_of(shown)
    return found.flip(2) if variant.flip else found
