"""What of a picture counts in the loss: its mask, cropped and scaled as the picture itself, at the size of its latents."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdlora.data.buckets import Crop, Place, Size, taken
from sdlora.data.pixels import UnreadableError, decode, read_picture

TOLERANCE = 0.01
"""By which the shapes of a picture and of its mask may differ, as masks are often made at another size."""


def check(name: str, mask: Size, picture: Size) -> None:
    """Raise `UnreadableError` unless the mask of this name has the shape of its picture."""
    if abs(math.log(mask[0] / mask[1]) - math.log(picture[0] / picture[1])) > TOLERANCE:
        shapes = f"{mask[0]} x {mask[1]} px for a picture of {picture[0]} x {picture[1]} px"
        raise UnreadableError(f"its mask {name} has another shape: {shapes}", "mask-shape")


def read(path: Path, picture: Path) -> Image.Image:
    """A mask in mode L; a picture that is named as its own mask has it in its transparency."""
    if path != picture:
        return read_picture(path, "black").convert("L")
    alpha = decode(path).alpha
    if alpha is None:
        raise UnreadableError("it is no longer transparent, and its transparency was to be its mask")
    return alpha


def focus(mask: Image.Image) -> Place:
    """The middle of what a mask shows, weighed by how white it is; of a black one its own middle."""
    white = np.asarray(mask, dtype=np.float64)
    if not white.any():
        return 0.5, 0.5
    across, down = (float((np.arange(len(line)) + 0.5) @ line / line.sum() / len(line)) for line in (white.sum(0), white.sum(1)))
    return across, down


def weights(mask: Image.Image, size: Size, crop: Crop, latent_factor: int, floor: float) -> Tensor:
    """(1, h, w) factors on the squared error: `floor` where the mask is black, up to 1 where it is white, scaled to a mean of 1.

    With that mean a small subject weighs as much in training as a large one.
    """
    box = taken(*mask.size, size, crop)
    small = mask.resize((size[0] // latent_factor, size[1] // latent_factor), Image.Resampling.BOX, box=box)
    kept = floor + (1 - floor) * torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)[None]
    return kept / kept.mean()
