"""What of a picture counts in the loss: its mask, cropped and scaled as the picture itself, at the size of its latents."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdlora.data.buckets import Size, crop_box
from sdlora.data.pixels import UnreadableError, read_picture

TOLERANCE = 0.01
"""By which the shapes of a picture and of its mask may differ, as masks are often made at another size."""


def check(path: Path, width: int, height: int) -> None:
    """Raise `UnreadableError` unless the mask can be read and has the shape of its picture."""
    mask = read_picture(path, "black")
    if abs(math.log(mask.width / mask.height) - math.log(width / height)) > TOLERANCE:
        shapes = f"{mask.width} x {mask.height} px for a picture of {width} x {height} px"
        raise UnreadableError(f"its mask {path.name} has another shape: {shapes}", "mask-shape")


def weights(path: Path, size: Size, latent_factor: int, floor: float) -> Tensor:
    """(1, h, w) factors on the squared error: `floor` where the mask is black, up to 1 where it is white, scaled to a mean of 1.

    With that mean a small subject weighs as much in training as a large one.
    """
    mask = read_picture(path, "black").convert("L")
    small = mask.resize((size[0] // latent_factor, size[1] // latent_factor), Image.Resampling.BOX, box=crop_box(*mask.size, size))
    kept = floor + (1 - floor) * torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)[None]
    return kept / kept.mean()
