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


def check(name: str, mask: Size, picture: Size) -> None:
    """Raise `UnreadableError` unless the mask of this name has the shape of its picture."""
    if abs(math.log(mask[0] / mask[1]) - math.log(picture[0] / picture[1])) > TOLERANCE:
        shapes = f"{mask[0]} x {mask[1]} px for a picture of {picture[0]} x {picture[1]} px"
        raise UnreadableError(f"its mask {name} has another shape: {shapes}", "mask-shape")


def weights(path: Path, size: Size, latent_factor: int, floor: float) -> Tensor:
    """(1, h, w) factors on the squared error: `floor` where the mask is black, up to 1 where it is white, scaled to a mean of 1.

    With that mean a small subject weighs as much in training as a large one.
    """
    mask = read_picture(path, "black").convert("L")
    small = mask.resize((size[0] // latent_factor, size[1] // latent_factor), Image.Resampling.BOX, box=crop_box(*mask.size, size))
    kept = floor + (1 - floor) * torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)[None]
    return kept / kept.mean()
