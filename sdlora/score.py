"""Whether something was learnt, in figures: distances between pictures as the base's own autoencoder sees them."""

import torch
from torch import Tensor

from sdlora.family import Family


def embed(family: Family, pixels: Tensor, batch: int = 32) -> Tensor:
    """Means of the latents of pictures (N, 3, H, W) in 0..1, as float32 vectors (N, D)."""
    return torch.cat([family.encode(part * 2 - 1)[0].flatten(1) for part in torch.split(pixels, batch)])


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance of each pair of rows: (N, D), (N, D) -> (N,)."""
    lengths: Tensor = torch.linalg.vector_norm(a - b, dim=1)
    return lengths
