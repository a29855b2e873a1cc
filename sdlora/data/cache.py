"""Latents are encoded once and kept by content: edit a picture or change the autoencoder, and only what changed is encoded again."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sdlora import safeio
from sdlora.data import variants
from sdlora.data.pixels import read_picture
from sdlora.data.scan import Item
from sdlora.data.variants import Variant
from sdlora.family import Family


def latents(
    items: Sequence[Item], shown: Sequence[Sequence[Variant]], ground: str, family: Family, folder: Path
) -> list[list[tuple[Tensor, Tensor]]]:
    """Mean and standard deviation (C, h, w) of the latents of each picture's variants, float32, on the CPU.

    Mirror images are encoded too: an encoder's latents of one are not its latents mirrored.
    """
    fingerprint = family.base.fingerprint("vae")
    found = []
    for item, some in zip(items, shown, strict=True):
        picture = read_picture(item.path, ground)
        found.append([_entry(variants.pixels(picture, one), fingerprint, family, folder) for one in some])
    return found


def _entry(pixels: Tensor, fingerprint: str, family: Family, folder: Path) -> tuple[Tensor, Tensor]:
    path = folder / f"{key(pixels, fingerprint)}.safetensors"
    entry = _read(path)
    if entry is None:
        mean, std = (part[0].cpu().contiguous() for part in family.encode(pixels[None]))
        entry = mean, std
        safeio.write(path, safetensors.torch.save({"mean": mean, "std": std}))
    return entry


def key(pixels: Tensor, fingerprint: str) -> str:
    """Name of a cache entry: a hash of the very pixels that are encoded, their shape, and the encoder's weights."""
    digest = hashlib.blake2b(pixels.contiguous().numpy().tobytes(), digest_size=20)
    digest.update(f"{tuple(pixels.shape)} {fingerprint}".encode())
    return digest.hexdigest()


def _read(path: Path) -> tuple[Tensor, Tensor] | None:
    try:
        entry = safetensors.torch.load(path.read_bytes())
    except (OSError, SafetensorError):  # absent or damaged: either way it is made again
        return None
    if set(entry) != {"mean", "std"} or not all(torch.isfinite(part).all() for part in entry.values()):
        return None
    return entry["mean"], entry["std"]
