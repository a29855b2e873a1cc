"""What the families of latent diffusion (Rombach et al. 2022) share: CLIP text encoders, a UNet, a KL autoencoder, a discrete schedule."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from sdlora.errors import UserError
from sdlora.family import Base, Family
from sdlora.source import WHOLE, Source

ATTENTION = ("unet.*.attn[12].to_[qkv]", "unet.*.attn[12].to_out.0")
SCHEDULE: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
"""How these models are sampled, whatever scheduler wrote their config and thus left it out."""
UNKNOWN = {"modelspec.architecture": "sdlora-tiny/lora", "ss_base_model_version": "sdlora_tiny", "ss_v2": "False"}
"""What a pack says whose base is of a family's structure, but not of its size."""


def recognised(source: Source, pipeline: str, text_encoder: str = "CLIPTextModel") -> dict[str, Any] | None:
    """Native size and what the network predicts, if the base is of that pipeline and draws pictures from text alone; else None."""
    index = source.config("")
    if index.get("_class_name") != pipeline or (index.get("text_encoder") or [None])[-1] != text_encoder:
        return None
    unet, vae = (source.config(part) for part in ("unet", "vae"))
    if unet.get("in_channels", 4) != vae.get("latent_channels", 4) or vae.get("latents_mean"):
        return None
    size_px = int(unet.get("sample_size", 64)) * 2 ** (len(vae.get("block_out_channels", [0])) - 1)
    said = str(source.config("scheduler").get("prediction_type", "epsilon"))
    return {"size_px": size_px, "prediction": "velocity" if said == "v_prediction" else said}


class LatentDiffusion(Family):
    """A family with one text encoder; others add to it. See `Family`."""

    presets: ClassVar[Mapping[str, Sequence[str]]] = {
        "cross-attention": ["unet.*.attn2.to_[qkv]", "unet.*.attn2.to_out.0"],
        "attention": ATTENTION,
        "all-linear": [*ATTENTION, "unet.*.ff.net.*", "unet.*.proj_in", "unet.*.proj_out"],
        "cross-attention-blocks": ["unet.*.attn2"],
        "blocks": ["unet.*.attn[12]", "unet.*.ff"],
        "text-encoder": ["text_encoder*.self_attn.*_proj", "text_encoder*.mlp.fc[12]"],
    }
    prefixes: ClassVar[Mapping[str, str]] = {"unet": "lora_unet", "text_encoder": "lora_te"}
    cross_attention_dim: ClassVar[int]
    """Of the true model; other programs know it by this."""

    def __init__(self, base: Base, device: torch.device, dtype: torch.dtype) -> None:
        self.base, self.device, self.prediction = base, device, base.prediction
        self.unet = base.source.model(UNet2DConditionModel, "unet", dtype).to(device)
        # The autoencoder overflows in fp16 and loses detail in bf16; it is small and used seldom.
        self.vae = base.source.model(AutoencoderKL, "vae", torch.float32).to(device)
        self.vae.requires_grad_(False).eval()
        self.components = {"unet": self.unet}
        self.tokenizers: list[Any] = []
        self.text_encoder = self._add_text(CLIPTextModel, "", dtype)
        self.alphas_cumprod = self.new_scheduler().alphas_cumprod.to(device)
        self.most_tokens = int(self.text_encoder.config.max_position_embeddings) - 2  # beside the marks of begin and end
        self.latent_channels = int(self.vae.config.latent_channels)
        self.latent_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.step_px = self.latent_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def _add_text(self, kind: type[nn.Module], suffix: str, dtype: torch.dtype) -> Any:
        """Load a text encoder and its tokenizer."""
        source = self.base.source
        encoder, tokenizer = source.model(kind, f"text_encoder{suffix}", dtype).to(self.device), source.tokenizer(f"tokenizer{suffix}")
        words, rows = len(tokenizer), encoder.config.vocab_size
        if words != rows:
            what = f"its tokenizer{suffix} knows {words} tokens and its text_encoder{suffix} {rows}: they do not belong together"
            raise UserError("E-BASE-12", what, source.path, WHOLE)
        # transformers 5.6 took `text_model.` out of the module names, but every reader of packs expects it.
        nested = hasattr(encoder, "text_model")
        self.components[f"text_encoder{suffix}"] = encoder if nested else nn.ModuleDict({"text_model": encoder})
        self.tokenizers.append(tokenizer)
        return encoder

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
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": self.most_tokens + 2, "return_tensors": "pt"}
        return torch.cat([tokenizer(list(captions), **options).input_ids for tokenizer in self.tokenizers], 1).to(self.device)

    def spans(self, caption: str) -> list[tuple[int, int]]:
        return [*self.tokenizers[0](caption, add_special_tokens=False, return_offsets_mapping=True, verbose=False).offset_mapping]

    def states(self, tokens: Tensor) -> Tensor:
        states: Tensor = self.text_encoder(tokens).last_hidden_state
        return states

    def predict(self, x: Tensor, t: Tensor, states: Tensor, frame: Tensor | None = None) -> Tensor:  # noqa: ARG002
        prediction: Tensor = self.unet(x.to(self.unet.dtype), t, states).sample
        return prediction

    def new_scheduler(self) -> DDIMScheduler:
        known = inspect.signature(DDIMScheduler.__init__).parameters
        config = {key: value for key, value in self.base.source.config("scheduler").items() if key in known}
        return DDIMScheduler.from_config({**SCHEDULE, **config})

    def architecture(self) -> dict[str, str]:
        return self.true_architecture() if self.unet.config.cross_attention_dim == self.cross_attention_dim else UNKNOWN

    def true_architecture(self) -> dict[str, str]:
        """`architecture` of a base that is the family's true model, and no small likeness."""
        raise NotImplementedError
