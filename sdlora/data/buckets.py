"""Pictures of many shapes are trained at a few sizes of about one area: which size each takes, and what is cut off."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Size = tuple[int, int]  # (width, height) in px
Place = tuple[float, float]  # across and down: 0 at the left and the top, 1 at the right and the bottom
Box = tuple[float, float, float, float]  # left, upper, right, lower, in px
MAX_RATIO, MIN_AREA_SHARE = 2.0, 0.7
WHOLE_PX = 1e-6
"""Sides that differ from whole numbers of pixels by less only do so because of rounding."""


@dataclass(frozen=True)
class Crop:
    """What of a picture is shown, in shares, so that it holds for its mask and its thumbnail too."""

    place: Place = (0.5, 0.5)  # of the largest part that has the shape: where in the picture
    share: float = 1.0  # of that part's sides that is kept
    within: Place = (0.5, 0.5)  # where in that part


CENTRE = Crop()


def sizes(resolution_px: int, step_px: int) -> list[Size]:
    """Every size with sides in multiples of `step_px` whose area is at most the resolution's square and not much less."""
    area = resolution_px**2
    sides = range(step_px, int(resolution_px * MAX_RATIO) + 1, step_px)
    found = [(w, h) for w in sides for h in sides if MIN_AREA_SHARE * area <= w * h <= area and max(w / h, h / w) <= MAX_RATIO]
    return found or [(max(step_px, resolution_px // step_px * step_px),) * 2]


def choose(width: int, height: int, available: Sequence[Size]) -> Size:
    """The size that cuts off least; of equal ones the largest."""
    ratio = math.log(width / height)
    return min(available, key=lambda size: (round(abs(math.log(size[0] / size[1]) - ratio), 6), -size[0] * size[1]))


def crop_box(width: int, height: int, size: Size, crop: Crop = CENTRE) -> Box:
    """A part of a picture in the shape of `size`; by default the largest centred one."""
    scale = min(width / size[0], height / size[1])
    largest = scale * size[0], scale * size[1]
    kept = largest[0] * crop.share, largest[1] * crop.share
    left = (width - largest[0]) * crop.place[0] + (largest[0] - kept[0]) * crop.within[0]
    upper = (height - largest[1]) * crop.place[1] + (largest[1] - kept[1]) * crop.within[1]
    return left, upper, left + kept[0], upper + kept[1]


def taken(width: int, height: int, size: Size, crop: Crop = CENTRE) -> Box:
    """`crop_box` as it is taken: whole pixels where nothing is scaled."""
    box = crop_box(width, height, size, crop)
    if not _is_as_large(box, size):
        return box
    left, upper = int(box[0] + WHOLE_PX), int(box[1] + WHOLE_PX)
    return left, upper, left + size[0], upper + size[1]


def place_around(focus: Place, width: int, height: int, size: Size) -> Place:
    """Where the largest part in the shape of `size` has a point of the picture in its middle, or as near to it as the edges let it."""
    left, upper, right, lower = crop_box(width, height, size)
    sides = ((focus[0], width, right - left), (focus[1], height, lower - upper))
    across, down = (
        min(1.0, max(0.0, (at * side - part / 2) / (side - part))) if side - part > WHOLE_PX else 0.5 for at, side, part in sides
    )
    return across, down


def _is_as_large(box: Box, size: Size) -> bool:
    return abs(enlargement(box[2] - box[0], box[3] - box[1], size) - 1) < WHOLE_PX


def enlargement(width: float, height: float, size: Size) -> float:
    """How many times as long as in the picture things become in `size`; above 1 `fit` makes up pixels that the picture does not have."""
    return max(size[0] / width, size[1] / height)


def fit(picture: Image.Image, size: Size) -> Tensor:
    """Crop and scale an RGB picture: pixels (3, H, W) in -1..1, float32."""
    return pixels_of(scaled(picture, size))


def pixels_of(picture: Image.Image) -> Tensor:
    """An RGB picture as pixels (3, H, W) in -1..1, float32."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def scaled(picture: Image.Image, size: Size, crop: Crop = CENTRE) -> Image.Image:
    """Crop and scale an RGB picture, in 8 bits. What needs no scaling keeps its very pixels."""
    box = taken(*picture.size, size, crop)
    if _is_as_large(box, size):
        return picture.crop((round(box[0]), round(box[1]), round(box[2]), round(box[3])))
    if enlargement(box[2] - box[0], box[3] - box[1], size) > 1:
        return picture.resize(size, Image.Resampling.LANCZOS, box=box)
    light = [_shrunk(channel.point(_light().tolist(), "F"), size, box) for channel in picture.split()]
    return Image.fromarray(_levels()[(np.stack(light, -1) * 65535 + 0.5).astype(np.uint16)])


def _shrunk(light: Image.Image, size: Size, box: Box) -> NDArray[np.float32]:
    """Lanczos, which neither blurs nor makes patterns of fine detail, held to the range of the light around.

    Without that hold it would draw black rims around what is bright: light's scale is so uneven that a tenth of white is a middle grey.
    """
    sharp = np.asarray(light.resize(size, Image.Resampling.LANCZOS, box=box))
    around = np.asarray(light.resize(size, Image.Resampling.BOX, box=box))
    held: NDArray[np.float32] = np.clip(sharp, _extreme(around, np.minimum), _extreme(around, np.maximum))
    return held


def _extreme(values: NDArray[np.float32], of: np.ufunc) -> NDArray[np.float32]:
    """The extreme of each 3 x 3, which is that of the columns' extremes."""
    for _ in ("down", "across"):
        padded = np.concatenate([values[:1], values, values[-1:]])
        values = of(of(padded[:-2], padded[2:]), values).T
    return values


@lru_cache
def _light() -> NDArray[np.float32]:
    """The light of each of the 256 levels of sRGB (IEC 61966-2-1)."""
    level = np.arange(256) / 255
    return np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4).astype(np.float32)


@lru_cache
def _levels() -> NDArray[np.uint8]:
    """The level whose light is nearest to each of 65,536 steps of light, 20 of which lie between the two darkest levels."""
    middles = (_light()[1:] + _light()[:-1]) / 2
    return np.searchsorted(middles, np.arange(65536) / 65535).astype(np.uint8)
