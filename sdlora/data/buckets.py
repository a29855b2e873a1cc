"""Pictures of many shapes are trained at a few sizes of about one area: which size each takes, and what is cut off."""

import math
from collections.abc import Sequence

import numpy as np
import torch
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


def fit(picture: Image.Image, size: Size) -> Tensor:
    """Crop and scale an RGB picture: pixels (3, H, W) in -1..1, float32."""
    scaled = picture.resize(size, Image.Resampling.LANCZOS, box=crop_box(*picture.size, size))
    return torch.from_numpy(np.asarray(scaled, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
