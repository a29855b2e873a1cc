"""Stable Diffusion 1.x (Rombach et al. 2022): the last layer of CLIP ViT-L, attention between convolutions of one pixel.

The embedded base `tiny` is an instance of it with small numbers.
"""

from typing import Any, ClassVar

import torch

from sdlora.family import Base
from sdlora.latent_diffusion import LatentDiffusion, recognised
from sdlora.source import Source


def recognise(source: Source) -> dict[str, Any] | None:
    """Row of the defaults and the rest of `Base` for a base of this family; None for another's."""
    found = recognised(source, "StableDiffusionPipeline")
    if found is None or source.config("unet").get("use_linear_projection"):
        return None
    return {"row": "sd1" if found["size_px"] >= 256 else "tiny", **found}


class SD1(LatentDiffusion):
    """See `Family`."""

    cross_attention_dim: ClassVar = 768

    def true_architecture(self) -> dict[str, str]:
        return {"modelspec.architecture": "stable-diffusion-v1/lora", "ss_base_model_version": "sd_v1", "ss_v2": "False"}


def load(base: Base, device: torch.device, dtype: torch.dtype) -> SD1:
    """See `sdlora.family.load`."""
    return SD1(base, device, dtype)
