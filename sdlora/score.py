"""Whether something was learnt, in figures: distances between pictures as the base's own autoencoder sees them."""

import torch
from torch import Tensor

from sdlora.devices import Portion, compute_in_portions
from sdlora.family import Family


def embed(family: Family, pixels: Tensor, batch: int = 32) -> Tensor:
    """Means of the latents of pictures (N, 3, H, W) in 0..1, as float32 vectors (N, D)."""

    def encoded(portion: Portion) -> Tensor:
        parts = torch.split(pixels, portion.rows)
        return torch.cat([family.encode(part * 2 - 1, portion.tiled)[0].flatten(1) for part in parts])

    return compute_in_portions(encoded, min(batch, len(pixels)), "picture to encode", can_tile=True)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance of each pair of rows: (N, D), (N, D) -> (N,)."""
    lengths: Tensor = torch.linalg.vector_norm(a - b, dim=1)
    return lengths
