"""A base in one `.safetensors` file with the original implementation's names: its configs are told by the shapes of its tensors."""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from torch import dtype as DType
from torch import nn
from transformers import CLIPTokenizer

from sdlora import hub
from sdlora.errors import UserError
from sdlora.source import WHOLE, Place, Source, check_complete, check_precision, header, precisions

UNET, HEAD, GROUPS = "model.diffusion_model.", 64, 32
"""Where the UNet lies; the width of an attention head, and the groups of a normalisation, which no tensor's shape tells."""
VAE = "first_stage_model."
CLIP = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.")
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
"""Tensors by which a file says that it predicts velocity, and that its last timestep is pure noise."""
VOCABULARY = ("vocab.json", "merges.txt")
HOLDERS = (
    ("openai/clip-vit-large-patch14", ""),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/"),
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer/"),
)
"""Models of the hub that hold CLIP's vocabulary, which is the same for all, and where."""
Shapes = Mapping[str, tuple[int, ...]]


class SingleFile(Source):
    """See the module."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header, self.said = header(path)
        self.shapes: Shapes = {name: tuple(one["shape"]) for name, one in self.header.items()}
        self.text = {suffix: self._holder(suffix) for suffix in ("", "_2")}
        """Where the text encoders lie."""
        if not any(name.startswith(UNET) for name in self.shapes) or not self.text[""]:
            what = "this file holds no whole model: it has no UNet, or no text encoder, under the names of the original implementation"
            raise UserError("E-BASE-02", what, path, "name a checkpoint of Stable Diffusion, a diffusers folder, a hub id, or tiny")

    def config(self, part: str) -> dict[str, Any]:
        made = {"": self._index, "unet": self._unet, "vae": self._vae, "scheduler": self._scheduler}
        return made[part]() if part in made else self._text(part.removeprefix("text_encoder"))

    def fingerprint(self, part: str) -> str:  # noqa: ARG002  one file holds all
        return self._digest

    def precision(self, part: str) -> list[str]:
        return precisions(one for name, one in self.header.items() if name.startswith(self._place(part)))

    @cached_property
    def _digest(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def places(self, part: str) -> dict[str, Place]:
        """The converters are shown tensors that hold nothing but their own number, and then ones that hold their rows' numbers."""
        config, start = self.config(part), self._place(part)
        names = [name for name in self.shapes if name.startswith(start)]
        numbers = {name: torch.tensor(float(i)).expand(self.shapes[name]) for i, name in enumerate(names)}
        found = {}
        held = self._named(part, config, nested=True, tensors={name: _rows(self.shapes[name]) for name in names})
        for name, number in self._named(part, config, nested=True, tensors=numbers).items():
            tensor, marks = names[int(number.flatten()[0])], held[name]
            turned = marks.ndim > 1 and marks.shape[1] > 1 and bool(marks.flatten(1)[0, 0] != marks.flatten(1)[0, 1])
            rows = (int(marks.min()), int(marks.max()) + 1)
            found[name] = Place(self.path, tensor, rows, turned)
        return found

    def model(self, kind: Any, part: str, dtype: DType) -> Any:
        config = self.config(part)
        check_precision(part, self.path, self.precision(part))
        with init_empty_weights(include_buffers=False):
            model = kind(kind.config_class(**config)) if part.startswith("text") else kind.from_config(config)
        wanted = model.state_dict()
        named = self._named(part, config, hasattr(model, "text_model"), self._tensors(self._place(part)))
        found = {name: tensor for name, tensor in named.items() if name in wanted}
        check_complete(part, self.path, [name for name in wanted if name not in found])
        other = next((name for name, tensor in found.items() if tensor.shape != wanted[name].shape), None)
        if other:
            what = f"{other} of its {part} is of the shape {tuple(found[other].shape)} instead of {tuple(wanted[other].shape)}"
            raise UserError("E-BASE-07", what, self.path, "this kind of model is not known here")
        # copied, for the file may change while it is mapped
        model.load_state_dict({name: tensor.to(dtype, copy=True).contiguous() for name, tensor in found.items()}, assign=True)
        return model.eval()

    def tokenizer(self, part: str) -> CLIPTokenizer:
        """CLIP's vocabulary from beside the file, or from a model that the hub's cache holds; its padding is that of the encoder's kind."""
        beside = self.path.parent / "tokenizer"
        places: list[list[Path | None]] = [[beside / name for name in VOCABULARY]]
        places += [[hub.kept(one, inner + name) for name in VOCABULARY] for one, inner in HOLDERS]
        whole = [[str(file) for file in files if file and file.is_file()] for files in places]
        found = next((files for files in whole if len(files) == len(VOCABULARY)), None)
        if found is None:
            what = f"a single file holds no tokenizer, and CLIP's {' and '.join(VOCABULARY)} are not here"
            todo = f"copy both (1.4 MB) from the hub's {HOLDERS[0][0]} into {beside}"
            raise UserError("E-BASE-14", what, self.path, todo)
        suffix = part.removeprefix("tokenizer")
        pad = "!" if self.text[suffix] in OPEN_CLIP else "<|endoftext|>"
        length = self.config(f"text_encoder{suffix}")["max_position_embeddings"]
        return CLIPTokenizer(vocab=found[0], merges=found[1], pad_token=pad, unk_token="<|endoftext|>", model_max_length=length)

    def says_prediction(self) -> bool:
        return V_MARK in self.shapes or bool(self.said.get("modelspec.prediction_type"))

    def _place(self, part: str) -> str:
        """What the names of a component's tensors begin with."""
        return {"unet": UNET, "vae": VAE}.get(part) or self.text[part.removeprefix("text_encoder")]

    def _holder(self, suffix: str) -> str:
        places = OPEN_CLIP[1:] if suffix else (*CLIP, OPEN_CLIP[0])
        return next((place for place in places if any(name.startswith(place) for name in self.shapes)), "")

    def _tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        names = [name for name in self.shapes if name.startswith(prefix)]
        with safe_open(self.path, "pt") as file:
            return {name: file.get_tensor(name) for name in names}

    def _named(self, part: str, config: dict[str, Any], nested: bool, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A component's tensors under diffusers' names."""
        found: dict[str, torch.Tensor]
        if part == "unet":
            found = single_file_utils.convert_ldm_unet_checkpoint(tensors, config)
            return found
        if part == "vae":
            found = single_file_utils.convert_ldm_vae_checkpoint(tensors, config)
            return found
        place = self._place(part)
        if place in OPEN_CLIP:
            width = nn.Module()
            width.config = _Width(config["hidden_size"])  # type: ignore[assignment]
            found = single_file_utils.convert_open_clip_checkpoint(width, tensors, place)
        else:
            found = {name.removeprefix(place): tensor for name, tensor in tensors.items()}
        plain = {name.removeprefix("text_model."): tensor for name, tensor in found.items()}
        outside = "text_projection"
        return {f"text_model.{name}" if nested and not name.startswith(outside) else name: tensor for name, tensor in plain.items()}

    def _index(self) -> dict[str, Any]:
        name = "StableDiffusionXLPipeline" if self.text["_2"] else "StableDiffusionPipeline"
        return {"_class_name": name, "text_encoder": ["transformers", "CLIPTextModel"]}

    def _scheduler(self) -> dict[str, Any]:
        zero_snr = ZERO_SNR_MARK in self.shapes
        return {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction" if self._says_velocity() else "epsilon",
            "rescale_betas_zero_snr": zero_snr,
            "timestep_spacing": "trailing" if zero_snr else "leading",
        }

    def _says_velocity(self) -> bool:
        """By its marks; where there are none, models with OpenCLIP alone do so, as most of them."""
        said = self.said.get("modelspec.prediction_type", "")
        return said.startswith("v") if said else V_MARK in self.shapes or self.text[""] in OPEN_CLIP

    def _side(self) -> int:
        """Of the pictures it was trained on, in px."""
        said = self.said.get("modelspec.resolution", "").partition("x")[0]
        if said.isdecimal() and int(said) > 0:
            return int(said)
        return 1024 if self.text["_2"] else 768 if self._scheduler()["prediction_type"] == "v_prediction" else 512

    def _count(self, pattern: str) -> int:
        """How many numbers in a row, from 0 on, stand for the star of a beginning of names."""
        start, _, rest = pattern.partition("*")
        count = 0
        while any(name.startswith(f"{start}{count}{rest}") for name in self.shapes):
            count += 1
        return count

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            raise UserError("E-BASE-07", f"a tensor that tells this model's structure is missing: {name}", self.path, WHOLE)
        return self.shapes[name]

    def _unet(self) -> dict[str, Any]:
        blocks = self._count(f"{UNET}input_blocks.*.")
        ends = [i for i in range(blocks) if f"{UNET}input_blocks.{i}.0.op.weight" in self.shapes]
        starts = [1, *(end + 1 for end in ends)]
        deep = [self._count(f"{UNET}input_blocks.{i}.1.transformer_blocks.*.") for i in starts]
        middle = self._count(f"{UNET}middle_block.1.transformer_blocks.*.")
        widths = [self._shape(f"{UNET}input_blocks.{i}.0.out_layers.3.weight")[0] for i in starts]
        projection = len(self._shape(f"{UNET}middle_block.1.proj_in.weight")) == 2
        attends = f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
        config: dict[str, Any] = {
            "sample_size": self._side() // 8,
            "in_channels": self._shape(f"{UNET}input_blocks.0.0.weight")[1],
            "block_out_channels": widths,
            "layers_per_block": (ends[0] if ends else blocks) - 1,
            "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in deep],
            "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(deep)],
            "transformer_layers_per_block": [*(depth or 1 for depth in deep[:-1]), middle],
            "cross_attention_dim": self._shape(attends)[1],
            "attention_head_dim": [width // HEAD for width in widths] if projection else 8,  # the number of heads, whatever its name
            "use_linear_projection": projection,
            "norm_num_groups": GROUPS,
        }
        if f"{UNET}label_emb.0.0.weight" in self.shapes:
            added = self._shape(f"{UNET}label_emb.0.0.weight")[1]
            config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": added}
        return config

    def _vae(self) -> dict[str, Any]:
        levels = self._count(f"{VAE}encoder.down.*.")
        return {
            "block_out_channels": [self._shape(f"{VAE}encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)],
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "layers_per_block": self._count(f"{VAE}encoder.down.0.block.*."),
            "latent_channels": self._shape(f"{VAE}post_quant_conv.weight")[0],
            "norm_num_groups": GROUPS,
            "sample_size": self._side(),
            "scaling_factor": 0.13025 if self.text["_2"] else 0.18215,
        }

    def _text(self, suffix: str) -> dict[str, Any]:
        place = self.text[suffix]
        if place in OPEN_CLIP:
            layers, words, positions = f"{place}transformer.resblocks.", f"{place}token_embedding.weight", f"{place}positional_embedding"
            inner, act = f"{layers}0.mlp.c_fc.weight", "gelu"
        else:
            inside = f"{place}text_model." if any(name.startswith(f"{place}text_model.") for name in self.shapes) else place
            layers, embeddings = f"{inside}encoder.layers.", f"{inside}embeddings."
            words, positions = f"{embeddings}token_embedding.weight", f"{embeddings}position_embedding.weight"
            inner, act = f"{layers}0.mlp.fc1.weight", "quick_gelu"
        vocabulary, width = self._shape(words)
        unused = 1 if place == OPEN_CLIP[0] else 0  # the network was trained on what comes before the last layer
        return {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": self._shape(inner)[0],
            "num_hidden_layers": self._count(f"{layers}*.") - unused,
            "num_attention_heads": width // HEAD,
            "max_position_embeddings": self._shape(positions)[0],
            "projection_dim": self._shape(f"{place}text_projection")[1] if suffix else width,
            "hidden_act": act,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": 0 if place in OPEN_CLIP else vocabulary - 1,
        }


def _rows(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of this shape whose every element is the number of its row."""
    return torch.arange(float(shape[0] if shape else 1)).view(-1, *[1] * (len(shape) - 1)).expand(shape) if shape else torch.zeros(())


class _Width:
    """All that a converter asks of a text encoder."""

    def __init__(self, hidden_size: int) -> None:
        self.hidden_size = hidden_size
