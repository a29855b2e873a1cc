"""Stable Diffusion XL (Podell et al. 2023): two text encoders, and a network that is told where in which picture it is looking."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from sdlora import original
from sdlora.family import Base, whole_frames
from sdlora.latent_diffusion import LatentDiffusion, attention_of, recognised
from sdlora.source import Source

BLOCKS, LAYERS, ATTENDED = 3, 2, (0, 1)
"""Resolutions of the UNet, residual blocks at each on the way down, and the blocks on the way up that attend."""


def recognise(source: Source) -> dict[str, Any] | None:
    """Row of the defaults and the rest of `Base` for a base of this family; None for another's."""
    found, unet = recognised(source, "StableDiffusionXLPipeline"), source.config("unet")
    if found is None or [len(unet["block_out_channels"]), unet.get("layers_per_block", 2)] != [BLOCKS, LAYERS]:
        return None
    return {"row": "sdxl", **found}


class SDXL(LatentDiffusion):
    """See `Family`. The last row of its states is the pooled embedding of the second text encoder, padded with zeros."""

    prefixes: ClassVar = {
        "text_encoder": "lora_te1",
        "text_encoder_2": "lora_te2",
        **{f"unet.{ours}": f"lora_unet_{theirs.replace('.', '_')}" for ours, theirs in original.names(BLOCKS, LAYERS, ATTENDED)},
    }
    presets: ClassVar = {
        **LatentDiffusion.presets,
        # Frenkel et al. 2024 (B-LoRA, section 4.1): the first attention block of the way up settles what is shown, the second its look.
        "content-block": attention_of("unet.up_blocks.0.attentions.0."),
        "style-block": attention_of("unet.up_blocks.0.attentions.1."),
    }
    cross_attention_dim: ClassVar = 2048
    last_layer: ClassVar = 2

    def __init__(self, base: Base, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(base, device, dtype)
        self.text_encoder_2 = self._add_text(CLIPTextModelWithProjection, "_2", dtype)

    def states(self, tokens: Tensor) -> Tensor:
        first, second = (half.reshape(-1, self.row_tokens) for half in tokens.chunk(2, 1))
        one, two = self.text_encoder(first, output_hidden_states=True), self.text_encoder_2(second, output_hidden_states=True)
        layer = -(self.base.text.clip_skip + 1)
        rows = torch.cat([one.hidden_states[layer], two.hidden_states[layer]], -1)
        rows = rows.reshape(len(tokens), -1, rows.shape[2])
        pooled: Tensor = two.text_embeds[:: self.base.text.chunks]  # of the first piece
        return torch.cat([rows, nn.functional.pad(pooled, (0, rows.shape[2] - pooled.shape[1]))[:, None]], 1)

    def predict(self, x: Tensor, t: Tensor, states: Tensor, frame: Tensor | None = None) -> Tensor:
        told = whole_frames(x, self.latent_factor) if frame is None else frame
        pooled = states[:, -1, : self.text_encoder_2.config.projection_dim]
        added = {"text_embeds": pooled, "time_ids": told}
        prediction: Tensor = self.unet(x.to(self.unet.dtype), t, states[:, :-1], added_cond_kwargs=added).sample
        return prediction

    def true_architecture(self) -> dict[str, str]:
        return {
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_v2": "False",
        }


def load(base: Base, device: torch.device, dtype: torch.dtype) -> SDXL:
    """See `sdlora.family.load`."""
    return SDXL(base, device, dtype)
