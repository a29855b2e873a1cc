"""What the families of latent diffusion (Rombach et al. 2022) share: CLIP text encoders, a UNet, a KL autoencoder, a discrete schedule."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from sdlora.errors import UserError
from sdlora.family import Base, Family, mark_words
from sdlora.fused import spare
from sdlora.source import WHOLE, Source


def attention_of(start: str) -> tuple[str, ...]:
    """Patterns of all attention in the blocks whose names begin so."""
    return f"{start}*.attn[12].to_[qkv]", f"{start}*.attn[12].to_out.0"


ATTENTION = attention_of("unet.")
LINEAR = (*ATTENTION, "unet.*.ff.net.*", "unet.*.proj_in", "unet.*.proj_out")
SCHEDULE: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
"""How these models are sampled, whatever scheduler wrote their config and thus left it out."""
PREDICTIONS = {"velocity": "v_prediction"}
"""What schedulers call what a network predicts, where that is not the objective's name."""
AT_ONCE_PX = 512 * 512
"""Pixels that go through the autoencoder at once: one picture of 512 px or of more, many small ones. It needs 3 GiB for each megapixel."""
TILE_PX = 512
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
    return {"size_px": size_px, "prediction": "velocity" if said == "v_prediction" else said, "said": source.says_prediction()}


def at_once(height: int, width: int) -> int:
    """How many pictures of so many pixels the autoencoder takes at once; it depends on nothing else, so that equal batches are equal."""
    return max(1, AT_ONCE_PX // (height * width))


class LatentDiffusion(Family):
    """A family with one text encoder; others add to it. See `Family`."""

    presets: ClassVar[Mapping[str, Sequence[str]]] = {
        "cross-attention": ["unet.*.attn2.to_[qkv]", "unet.*.attn2.to_out.0"],
        "qv": ["unet.*.attn[12].to_[qv]"],  # what the LoRA paper adapts (Hu et al. 2021, section 7.1)
        "attention": ATTENTION,
        "all-linear": LINEAR,
        "all-linear+conv": [*LINEAR, "unet.*.resnets.*.conv*", "unet.*samplers.0.conv"],
        "up-blocks": attention_of("unet.up_blocks."),
        "cross-attention-blocks": ["unet.*.attn2"],
        "blocks": ["unet.*.attn[12]", "unet.*.ff"],
        "words": ["text_encoder*.token_embedding"],
        "text-encoder": ["text_encoder*.self_attn.*_proj", "text_encoder*.mlp.fc[12]"],
    }
    prefixes: ClassVar[Mapping[str, str]] = {"unet": "lora_unet", "text_encoder": "lora_te"}
    cross_attention_dim: ClassVar[int]
    """Of the true model; other programs know it by this."""
    last_layer: ClassVar[int] = 1
    """Of the text encoders' layers the one that it was trained on, counted from their end."""

    def __init__(self, base: Base, device: torch.device, dtype: torch.dtype) -> None:
        self.base, self.device = base, device
        self.unet = base.source.model(UNet2DConditionModel, "unet", dtype).to(device)
        spare(self.unet)
        # The autoencoder overflows in fp16 and loses detail in bf16; it is small and used seldom.
        self.vae = base.source.model(AutoencoderKL, "vae", torch.float32).to(device)
        self.vae.requires_grad_(False).eval()
        self.components = {"unet": self.unet}
        self.tokenizers: list[Any] = []
        self.text_encoder = self._add_text(CLIPTextModel, "", dtype)
        self.row_tokens = int(self.text_encoder.config.max_position_embeddings)  # that the text encoder reads at once
        self.take_for(base)
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
        deepest = encoder.config.num_hidden_layers + 1 - self.last_layer
        if self.base.text.clip_skip > deepest:
            what = f"text.clip_skip = {self.base.text.clip_skip}, and its text_encoder{suffix} has layers for 1 to {deepest}"
            raise UserError("E-TEXT-01", what, "text.clip_skip", "set it lower; 1 is the layer that the base was trained on")
        # transformers 5.6 took `text_model.` out of the module names, but every reader of packs expects it.
        nested = hasattr(encoder, "text_model")
        self.components[f"text_encoder{suffix}"] = encoder if nested else nn.ModuleDict({"text_model": encoder})
        self.tokenizers.append(tokenizer)
        mark_words(encoder, tokenizer)
        return encoder

    def take_for(self, base: Base) -> None:
        super().take_for(base)
        self.most_tokens = (self.row_tokens - 2) * base.text.chunks  # beside the marks of begin and end

    @torch.no_grad()
    def encode(self, pixels: Tensor, tiled: bool = False) -> tuple[Tensor, Tensor]:
        height, width = pixels.shape[2:]
        with self.at_hand("vae"), self._tiles(height, width, tiled):
            posteriors = [self.vae.encode(part.to(self.device)).latent_dist for part in torch.split(pixels, at_once(height, width))]
        factor = self.vae.config.scaling_factor
        mean, std = (torch.cat([getattr(one, name) for one in posteriors]) for name in ("mean", "std"))
        return mean * factor, std * factor

    @torch.no_grad()
    def decode(self, latents: Tensor, tiled: bool = False) -> Tensor:
        height, width = (side * self.latent_factor for side in latents.shape[2:])
        latents = latents.float() / self.vae.config.scaling_factor
        with self.at_hand("vae"), self._tiles(height, width, tiled):
            return torch.cat([self._decoded(part) for part in torch.split(latents, at_once(height, width))])

    def _decoded(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.vae.decode(latents.to(self.vae.dtype)).sample.float()
        if self.vae.dtype != torch.float32 and not pixels.isfinite().all():
            half = self.vae.dtype
            pixels = self.vae.float().decode(latents).sample
            self.vae.to(half)
        return pixels

    @contextlib.contextmanager
    def _tiles(self, height: int, width: int, tiled: bool) -> Iterator[None]:
        """Let the autoencoder take pictures in overlapping squares of half their longer side, at most of `TILE_PX`, if that is wished."""
        if not tiled:
            yield
            return
        side = max(4, min(TILE_PX, max(height, width) // 2) // self.latent_factor // 4 * 4)  # latents; it overlaps by a quarter
        before = self.vae.tile_latent_min_size, self.vae.tile_sample_min_size
        self.vae.enable_tiling()
        self.vae.tile_latent_min_size, self.vae.tile_sample_min_size = side, side * self.latent_factor
        try:
            yield
        finally:
            self.vae.disable_tiling()
            self.vae.tile_latent_min_size, self.vae.tile_sample_min_size = before

    def attend(self, by: str) -> None:
        if by == "xformers":
            self.unet.enable_xformers_memory_efficient_attention()

    def tokens(self, captions: Sequence[str]) -> Tensor:
        rows = [[self._row(tokenizer, caption) for caption in captions] for tokenizer in self.tokenizers]
        return torch.cat([torch.tensor(one) for one in rows], 1).to(self.device)

    def _row(self, tokenizer: Any, caption: str) -> list[int]:
        """The tokens of a caption in pieces, each between the marks of begin and end, and filled up after them."""
        ids = tokenizer(caption, add_special_tokens=False, verbose=False).input_ids
        row: list[int] = []
        for start in range(0, self.most_tokens, self.row_tokens - 2):
            piece = ids[start : start + self.row_tokens - 2]
            filling = [tokenizer.pad_token_id] * (self.row_tokens - 2 - len(piece))
            row += [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id, *filling]
        return row

    def spans(self, caption: str) -> list[tuple[int, int]]:
        return [*self.tokenizers[0](caption, add_special_tokens=False, return_offsets_mapping=True, verbose=False).offset_mapping]

    def spelling(self, word: str) -> dict[str, list[int]]:
        encoders = [name for name in self.components if name.startswith("text_encoder")]
        read = (tokenizer(word, add_special_tokens=False, verbose=False).input_ids for tokenizer in self.tokenizers)
        return {f"{name}.text_model.embeddings.token_embedding": [*ids] for name, ids in zip(encoders, read, strict=True)}

    def states(self, tokens: Tensor) -> Tensor:
        with self.at_hand("text_encoder"):
            said = self.text_encoder(tokens.reshape(-1, self.row_tokens), output_hidden_states=True)
            states: Tensor = said.last_hidden_state
            if self.base.text.clip_skip > 1:
                text: Any = self.components["text_encoder"]
                states = text.text_model.final_layer_norm(said.hidden_states[-self.base.text.clip_skip])
        return states.reshape(len(tokens), -1, states.shape[2])

    def predict(self, x: Tensor, t: Tensor, states: Tensor, frame: Tensor | None = None) -> Tensor:  # noqa: ARG002
        prediction: Tensor = self.unet(x.to(self.unet.dtype), t, states).sample
        return prediction

    def new_scheduler(self) -> DDIMScheduler:
        known = inspect.signature(DDIMScheduler.__init__).parameters
        config = {key: value for key, value in self.base.source.config("scheduler").items() if key in known}
        config["prediction_type"] = PREDICTIONS.get(self.base.prediction, self.base.prediction)
        if self.base.zero_snr:
            config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return DDIMScheduler.from_config({**SCHEDULE, **config})

    def architecture(self) -> dict[str, str]:
        return self.true_architecture() if self.unet.config.cross_attention_dim == self.cross_attention_dim else UNKNOWN

    def true_architecture(self) -> dict[str, str]:
        """`architecture` of a base that is the family's true model, and no small likeness."""
        raise NotImplementedError
