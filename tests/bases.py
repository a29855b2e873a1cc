"""Random bases of the families: every block of the true models, heads and groups as in them, only narrow, and shallow unless asked."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
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
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

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


def new_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer without a merge, its tokens in CLIP's order: `!` first, the marks of begin and end last."""
    letters = sorted(ByteLevel.alphabet())
    vocab = {word: i for i, word in enumerate([*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[], unk_token="<|endoftext|>", pad_token=pad, model_max_length=small.TOKENS)


def text_config(layers: int, act: str, projection: int = 48) -> CLIPTextConfig:
    tokenizer = new_tokenizer()
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
        parts = (autoencoder(0.18215), text, new_tokenizer(pad), network, schedule(prediction_type=prediction))
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
        tokenizers = new_tokenizer(), new_tokenizer("!")
        parts = (autoencoder(0.13025), one, two, *tokenizers, network, schedule(EulerDiscreteScheduler))
        StableDiffusionXLPipeline(*parts).save_pretrained(folder)
    return folder


MAKERS: dict[str, Callable[..., Path]] = {"sd1": make_sd1, "sd2": make_sd2, "sdxl": make_sdxl}


# ---------------------------------------------------------------- one file

RESIDUAL = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
            "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip


def unet_name(name: str, attended: set[int]) -> str:
    """The original implementation's name of a UNet's tensor; `attended` are the levels on the way up that have attention."""
    whole = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "conv_norm_out": "out.0", "time_embedding.linear_1": "time_embed.0",
             "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
             "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip
    stem, _, leaf = name.rpartition(".")
    if stem in whole:
        return f"{whole[stem]}.{leaf}"
    if found := re.fullmatch(r"(down|up)_blocks\.(\d)\.(?:down|up)samplers\.0\.conv\.(.*)", name):
        level = int(found[2])
        if found[1] == "down":
            return f"input_blocks.{3 * (level + 1)}.0.op.{found[3]}"
        return f"output_blocks.{3 * level + 2}.{2 if level in attended else 1}.conv.{found[3]}"
    found = re.fullmatch(r"(down_blocks|mid_block|up_blocks)\.(?:(\d)\.)?(resnets|attentions)\.(\d)\.(.*)", name)
    assert found, name
    where, level, place, rest = found[1], int(found[2] or 0), int(found[4]), found[5]
    if found[3] == "resnets":
        part = next(part for part in RESIDUAL if rest.startswith(part))
        rest = RESIDUAL[part] + rest.removeprefix(part)
    inner = int(found[3] == "attentions")
    if where == "mid_block":
        return f"middle_block.{1 if inner else 2 * place}.{rest}"
    block = f"input_blocks.{1 + 3 * level + place}" if where == "down_blocks" else f"output_blocks.{3 * level + place}"
    return f"{block}.{inner}.{rest}"


def vae_name(name: str, levels: int = 4) -> str:
    """The original implementation's name of an autoencoder's tensor."""
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
    for ours, theirs in {
        "down_blocks.": "down.", ".resnets.": ".block.", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
        "conv_shortcut": "nin_shortcut", "mid_block.attentions.0": "mid.attn_1", "mid_block.block.0": "mid.block_1",
        "mid_block.block.1": "mid.block_2", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
        "conv_norm_out": "norm_out",
    }.items():  # fmt: skip
        name = name.replace(ours, theirs)
    return name


def open_clip(tensors: dict[str, Tensor], unused: bool) -> dict[str, Tensor]:
    """A text encoder as OpenCLIP has it, with a last layer that nobody uses where asked."""
    found: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        name = full.removeprefix("text_model.")
        if layer := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            three = [tensors[full.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[2]}"] = torch.cat(three)
        elif "k_proj" in name or "v_proj" in name:
            continue
        elif name.startswith("text_projection"):
            found["text_projection"] = tensor.T.contiguous()
        else:
            for ours, theirs in {
                "encoder.layers.": "transformer.resblocks.", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj",
                "self_attn": "attn", "final_layer_norm": "ln_final", "embeddings.token_embedding": "token_embedding",
                "embeddings.position_embedding.weight": "positional_embedding",
            }.items():  # fmt: skip
                name = name.replace(ours, theirs)
            found[name] = tensor
    last = max(int(name.split(".")[2]) for name in found if name.startswith("transformer."))
    if unused:
        found |= {n.replace(f".{last}.", f".{last + 1}.", 1): t + 1 for n, t in found.items() if f"resblocks.{last}." in n}
    return found


def original(unet: Any, vae: Any, text: Any, second: Any = None) -> dict[str, Tensor]:
    """A model's tensors with the original implementation's names."""
    attended = {i for i, kind in enumerate(unet.config.up_block_types) if "Attn" in kind}
    tensors = {f"model.diffusion_model.{unet_name(name, attended)}": tensor for name, tensor in unet.state_dict().items()}
    for name, tensor in vae.state_dict().items():
        wide = ".attentions.0.to_" in name and name.endswith("weight")  # convolutions of one pixel, in the original
        tensors[f"first_stage_model.{vae_name(name)}"] = tensor[:, :, None, None] if wide else tensor
    if unet.config.use_linear_projection and not second:
        return tensors | {f"cond_stage_model.model.{name}": tensor for name, tensor in open_clip(text.state_dict(), unused=True).items()}
    place = "conditioner.embedders.0" if second else "cond_stage_model"
    for name, tensor in text.state_dict().items():
        tensors[f"{place}.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    if second:
        tensors |= {f"conditioner.embedders.1.model.{n}": t for n, t in open_clip(second.state_dict(), unused=False).items()}
    return tensors


def single_file(folder: Path, path: Path, marks: tuple[str, ...] = (), **said: str) -> Path:
    """A base in diffusers layout as one file, with CLIP's vocabulary beside it."""
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    kinds |= {"text_encoder_2": CLIPTextModelWithProjection} if (folder / "text_encoder_2").is_dir() else {}
    tensors = original(*(kind.from_pretrained(folder, subfolder=part) for part, kind in kinds.items()))
    tensors |= {mark: torch.ones(1) for mark in marks}
    path.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, said)
    beside = path.parent / "tokenizer"
    beside.mkdir(exist_ok=True)
    (beside / "vocab.json").write_text(json.dumps(new_tokenizer().get_vocab()))
    (beside / "merges.txt").write_text("#version: 0.2\n")
    return path
