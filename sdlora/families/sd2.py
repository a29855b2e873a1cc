"""Stable Diffusion 2.x: the last layer but one of OpenCLIP ViT-H, linear layers around attention, noise or velocity predicted.

The text encoder's config leaves the unused last layer out, so that what it gives last is what the network was trained on.
"""

from typing import Any, ClassVar

import torch

from sdlora.family import Base
from sdlora.latent_diffusion import LatentDiffusion, recognised
from sdlora.source import Source


def recognise(source: Source) -> dict[str, Any] | None:
    """Row of the defaults and the rest of `Base` for a base of this family; None for another's."""
    found = recognised(source, "StableDiffusionPipeline")
    if found is None or not source.config("unet").get("use_linear_projection"):
        return None
    return {"row": "sd2-768" if found["size_px"] >= 768 else "sd2", **found}


class SD2(LatentDiffusion):
    """See `Family`."""

    cross_attention_dim: ClassVar = 1024

    def true_architecture(self) -> dict[str, str]:
        velocity = self.base.prediction == "velocity"
        side = "768-v" if velocity else "512"
        version = "sd_v2_v" if velocity else "sd_v2"
        return {"modelspec.architecture": f"stable-diffusion-v2-{side}/lora", "ss_base_model_version": version, "ss_v2": "True"}


def load(base: Base, device: torch.device, dtype: torch.dtype) -> SD2:
    """See `sdlora.family.load`."""
    return SD2(base, device, dtype)
