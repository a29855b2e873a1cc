"""Pictures of many shapes are trained at a few sizes of about one area: which size each takes, and what is cut off."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Size = tuple[int, int]  # (width, height) in px
MAX_RATIO, MIN_AREA_SHARE = 2.0, 0.7


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


def crop_box(width: int, height: int, size: Size) -> tuple[float, float, float, float]:
    """The largest centred part of a picture in the shape of `size`: left, upper, right, lower, in px."""
    scale = min(width / size[0], height / size[1])
    left, upper = (width - scale * size[0]) / 2, (height - scale * size[1]) / 2
    return left, upper, left + scale * size[0], upper + scale * size[1]


def enlargement(width: int, height: int, size: Size) -> float:
    """How many times as long as in the picture things become in `size`; above 1 `fit` makes up pixels that the picture does not have."""
    return max(size[0] / width, size[1] / height)


def fit(picture: Image.Image, size: Size) -> Tensor:
    """Crop and scale an RGB picture: pixels (3, H, W) in -1..1, float32."""
    return torch.from_numpy(np.asarray(scaled(picture, size), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def scaled(picture: Image.Image, size: Size) -> Image.Image:
    """Crop and scale an RGB picture, in 8 bits. What needs no scaling keeps its very pixels."""
    box = crop_box(*picture.size, size)
    times = enlargement(*picture.size, size)
    if times == 1:
        left, upper = int(box[0]), int(box[1])
        return picture.crop((left, upper, left + size[0], upper + size[1]))
    if times > 1:
        return picture.resize(size, Image.Resampling.LANCZOS, box=box)
    light = [_shrunk(channel.point(_light().tolist(), "F"), size, box) for channel in picture.split()]
    return Image.fromarray(_levels()[(np.stack(light, -1) * 65535 + 0.5).astype(np.uint16)])


def _shrunk(light: Image.Image, size: Size, box: tuple[float, float, float, float]) -> NDArray[np.float32]:
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
