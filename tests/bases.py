"""Random bases of the families: every block of the true models, heads and groups as in them, only narrow, and shallow unless asked."""

from pathlib import Path
from typing import Any

import small
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

WIDTH = 64
"""The narrowest that heads of 64 and groups of 32 allow."""
DOWN, CROSS = "DownBlock2D", "CrossAttnDownBlock2D"
SD1: dict[str, Any] = {"cross_attention_dim": WIDTH, "block_out_channels": (WIDTH,) * 4, "attention_head_dim": 8}
SD2: dict[str, Any] = {**SD1, "attention_head_dim": (1,) * 4, "use_linear_projection": True}
SDXL: dict[str, Any] = {
    "cross_attention_dim": 2 * WIDTH,
    "block_out_channels": (WIDTH,) * 3,
    "attention_head_dim": (1,) * 3,
    "use_linear_projection": True,
    "down_block_types": (DOWN, CROSS, CROSS),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 48,
}
TRUE_SDXL: dict[str, Any] = {
    **SDXL,
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "projection_class_embeddings_input_dim": 6 * 256 + 1280,
}
TRUE_SD2: dict[str, Any] = {
    **SD2,
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
}


def autoencoder(factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(32,) * 4,
        layers_per_block=2, norm_num_groups=32, sample_size=64, scaling_factor=factor,
    )  # fmt: skip


def text_config(layers: int, act: str, projection: int = 48) -> CLIPTextConfig:
    tokenizer = small.new_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=layers, num_attention_heads=1,
        max_position_embeddings=small.TOKENS, projection_dim=projection, hidden_act=act, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.3,
    )  # fmt: skip


def schedule(kind: Any = DDIMScheduler, **other: Any) -> Any:
    given = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "timestep_spacing": "leading"}
    return kind(**given, **({"clip_sample": False, "set_alpha_to_one": False} if kind is DDIMScheduler else {}), **other)


def layers(deep: bool, true: int) -> int:
    """Of a text encoder."""
    return true if deep else 3


def make_sd(folder: Path, unet: dict[str, Any], layers: int, act: str, pad: str, prediction: str = "epsilon") -> Path:
    """A base with one text encoder, in diffusers layout."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network, text = UNet2DConditionModel(sample_size=8, **unet), CLIPTextModel(text_config(layers, act))
        parts = (autoencoder(0.18215), text, small.new_tokenizer(pad), network, schedule(prediction_type=prediction))
        StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False).save_pretrained(folder)
    return folder


def make_sd1(folder: Path, deep: bool = False) -> Path:
    return make_sd(folder, SD1, layers(deep, 12), "quick_gelu", "<|endoftext|>")


def make_sd2(folder: Path, deep: bool = False, prediction: str = "v_prediction") -> Path:
    return make_sd(folder, SD2, layers(deep, 23), "gelu", "!", prediction)


def make_sdxl(folder: Path, deep: bool = False) -> Path:
    """A base with two text encoders, its scheduler's config written as the true one's is."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = UNet2DConditionModel(sample_size=8, **(SDXL if deep else {**SDXL, "transformer_layers_per_block": (1, 1, 2)}))
        one = CLIPTextModel(text_config(layers(deep, 12), "quick_gelu"))
        two = CLIPTextModelWithProjection(text_config(layers(deep, 32), "gelu"))
        tokenizers = small.new_tokenizer(), small.new_tokenizer("!")
        parts = (autoencoder(0.13025), one, two, *tokenizers, network, schedule(EulerDiscreteScheduler))
        StableDiffusionXLPipeline(*parts).save_pretrained(folder)
    return folder
