"""Stable Diffusion 1.x (Rombach et al. 2022): one CLIP text encoder, a UNet that predicts noise, a KL autoencoder.

The embedded base `tiny` is an instance of it with small numbers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from sdlora.family import Base, Family, read_json

CROSS_ATTENTION_DIM = 768  # of every true SD 1.x; other programs know the model by it


def recognise(folder: Path) -> dict[str, Any] | None:
    """Row of the defaults and native size of a folder that holds this family; None for another's."""
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != "StableDiffusionPipeline" or index.get("text_encoder", [None, None])[1] != "CLIPTextModel":
        return None
    unet, vae = (read_json(folder / part / "config.json") for part in ("unet", "vae"))
    if unet.get("cross_attention_dim") == 1024:  # SD 2.x, whose text encoder is another
        return None
    size_px = int(unet.get("sample_size", 64)) * 2 ** (len(vae.get("block_out_channels", [0])) - 1)
    return {"row": "sd1" if size_px >= 256 else "tiny", "size_px": size_px}


class SD1(Family):
    """See `Family`."""

    presets: ClassVar = {
        "cross-attention": ["unet.*.attn2.to_[qkv]", "unet.*.attn2.to_out.0"],
        "attention": ["unet.*.attn[12].to_[qkv]", "unet.*.attn[12].to_out.0"],
        "all-linear": ["unet.*.attn[12].to_[qkv]", "unet.*.attn[12].to_out.0", "unet.*.ff.net.*", "unet.*.proj_in", "unet.*.proj_out"],
        "text-encoder": ["text_encoder.*.self_attn.*_proj", "text_encoder.*.mlp.fc[12]"],
    }
    prefixes: ClassVar = {"unet": "lora_unet", "text_encoder": "lora_te"}

    def __init__(self, base: Base, device: torch.device, dtype: torch.dtype) -> None:
        folder = str(base.folder)
        self.base, self.device = base, device
        self.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype, use_safetensors=True).to(device)
        self.text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype, use_safetensors=True).to(device)
        # The autoencoder overflows in fp16 and loses detail in bf16; it is small and used seldom.
        self.vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32, use_safetensors=True).to(device)
        self.vae.requires_grad_(False).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
        # transformers 5.6 took `text_model.` out of the module names, but every reader of packs expects it.
        nested = hasattr(self.text_encoder, "text_model")
        text = self.text_encoder if nested else nn.ModuleDict({"text_model": self.text_encoder})
        self.components = {"unet": self.unet, "text_encoder": text}
        scheduler = self.new_scheduler()
        self.alphas_cumprod = scheduler.alphas_cumprod.to(device)
        said = str(scheduler.config.prediction_type)
        self.prediction = "velocity" if said == "v_prediction" else said
        self.most_tokens = int(self.text_encoder.config.max_position_embeddings) - 2  # beside the marks of begin and end
        self.latent_channels = int(self.vae.config.latent_channels)
        self.latent_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.step_px = self.latent_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels.to(self.device)).latent_dist
        factor = self.vae.config.scaling_factor
        return posterior.mean * factor, posterior.std * factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.vae.decode(latents.float() / self.vae.config.scaling_factor).sample
        return pixels

    def tokens(self, captions: Sequence[str]) -> Tensor:
        ids: Tensor = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.most_tokens + 2, return_tensors="pt"
        ).input_ids
        return ids.to(self.device)

    def spans(self, caption: str) -> list[tuple[int, int]]:
        return [*self.tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True, verbose=False).offset_mapping]

    def states(self, tokens: Tensor) -> Tensor:
        states: Tensor = self.text_encoder(tokens).last_hidden_state
        return states

    def predict(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        prediction: Tensor = self.unet(x.to(self.unet.dtype), t, states).sample
        return prediction

    def new_scheduler(self) -> DDIMScheduler:
        return DDIMScheduler.from_pretrained(str(self.base.folder), subfolder="scheduler")

    def architecture(self) -> dict[str, str]:
        if self.unet.config.cross_attention_dim != CROSS_ATTENTION_DIM:
            return {"modelspec.architecture": "sdlora-tiny/lora", "ss_base_model_version": "sdlora_tiny", "ss_v2": "False"}
        return {"modelspec.architecture": "stable-diffusion-v1/lora", "ss_base_model_version": "sd_v1", "ss_v2": "False"}


def load(base: Base, device: torch.device, dtype: torch.dtype) -> SD1:
    """See `sdlora.family.load`."""
    return SD1(base, device, dtype)
