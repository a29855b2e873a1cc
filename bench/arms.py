"""Ways to take the same training step: ours, PEFT's as diffusers' scripts have it, whole loops; and networks with random weights.

All start from the same factors, and see the same latents, noise and texts: AdamW at 1e-4 (fused), gradients clipped at 1.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
import torch.nn.functional as F
from counting import Counted, counted, full_norms, hollow
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel

from sdlora import lookup
from sdlora.adapter import Bank
from sdlora.fused import spare
from sdlora.randomness import normal, stream
from sdlora.routing import Route

TYPES = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
         "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "sample_size": 128}  # fmt: skip
SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL: dict[str, Any] = {**TYPES, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
                        "transformer_layers_per_block": (1, 2, 10), "projection_class_embeddings_input_dim": 2816}  # fmt: skip
NARROW: dict[str, Any] = {"sample_size": 64, "block_out_channels": (8, 16, 24, 24), "cross_attention_dim": 16, "attention_head_dim": 2,
                          "norm_num_groups": 8}  # fmt: skip
NARROW_XL: dict[str, Any] = {**TYPES, "block_out_channels": (8, 16, 24), "attention_head_dim": 2, "cross_attention_dim": 16,
                             "transformer_layers_per_block": (1, 1, 2), "norm_num_groups": 8, "addition_time_embed_dim": 8,
                             "projection_class_embeddings_input_dim": 64}  # fmt: skip
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
"""Endings of the layers that the preset "all-linear" means."""
RANK = 16
TOKENS = 77
Named = dict[str, nn.Parameter]
Sample = dict[str, Tensor]
"""latents (B, 4, h, w), noise alike, t (B,), text (B, 77, D); pooled (B, P) and frame (B, 6) for XL; pixels and ids for whole loops."""


@dataclass
class Arm:
    """One way to train: what its network says of (noised latents, sample), and its factors by the name of the layer."""

    unet: nn.Module
    predict: Callable[[Tensor, Sample], Tensor]
    downs: Named
    ups: Named
    encode: Callable[[Sample], Sample] | None = None  # latents and text of pixels and ids, in each step anew
    asks: bool = False  # each step waits for its loss

    def __post_init__(self) -> None:
        self.trained = [*self.downs.values(), *self.ups.values()]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=1e-2, fused=True)

    def loss(self, sample: Sample) -> Tensor:
        sample = self.encode(sample) if self.encode else sample
        kept = alphas(sample["latents"].device)[sample["t"]].view(-1, 1, 1, 1)
        x = kept.sqrt() * sample["latents"] + (1 - kept).sqrt() * sample["noise"]
        return F.mse_loss(self.predict(x, sample).float(), sample["noise"])

    def gradients(self, sample: Sample) -> Tensor:
        loss = self.loss(sample)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def move(self) -> None:
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, sample: Sample) -> Tensor:
        loss = self.gradients(sample)
        self.move()
        if self.asks:
            loss.item()
        return loss


def alphas(device: torch.device) -> Tensor:
    """Stable Diffusion's schedule: what of the picture's power is left at each of its 1,000 places."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=device) ** 2, 0)


def network(config: dict[str, Any], device: torch.device, dtype: torch.dtype, filled: bool = True) -> UNet2DConditionModel:
    """A frozen UNet; not `filled`, its weights are whatever memory holds."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    return ready(unet, device, dtype, filled)  # type: ignore[no-any-return]


def ready(module: Any, device: torch.device, dtype: torch.dtype, filled: bool = True) -> Any:
    """A module of the meta device, with weights drawn as torch's layers draw theirs; in bf16, so that they are the same in both dtypes."""
    nn.Module.to(module, dtype)
    module.to_empty(device=device).requires_grad_(False).eval()
    if not filled:
        return module
    rng = torch.Generator(device).manual_seed(0)
    for layer in module.modules():
        own = dict(layer.named_parameters(recurse=False))
        for name, one in own.items():
            fan_in = own["weight"][0].numel() if "weight" in own else 1
            drawn = torch.empty(one.shape, dtype=torch.bfloat16, device=device)
            if own.get("weight", one).ndim == 1:  # of a norm
                one.fill_(float(name == "weight"))
            else:
                bound = 1 / math.sqrt(fan_in)
                one.copy_(drawn.uniform_(-bound, bound, generator=rng))
        for buffer in layer.buffers(recurse=False):
            buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))  # CLIP's positions: all that is there
    return module


def names_in(unet: nn.Module) -> list[str]:
    return [name for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d) and name.endswith(ADAPTED)]


def said(unet: nn.Module, x: Tensor, sample: Sample, dtype: torch.dtype) -> Tensor:
    added = {"text_embeds": sample["pooled"].to(dtype), "time_ids": sample["frame"].to(dtype)} if "pooled" in sample else None
    found: Tensor = unet(x.to(dtype), sample["t"], sample["text"].to(dtype), added_cond_kwargs=added).sample
    return found


def ours(unet: nn.Module, rank: int = RANK) -> Arm:
    spare(unet)
    names, kind, bank = names_in(unet), lookup.find("adapters", "lora"), Bank({"unet": unet})
    bank.add("a", {f"unet.{name}": (kind, kind.Config(rank=rank, alpha=float(rank))) for name in names}, lambda dotted: stream(0, dotted))

    def predict(x: Tensor, sample: Sample) -> Tensor:
        bank.route = Route(torch.ones(1, device=x.device))
        return said(unet, x, sample, torch.bfloat16)

    found = bank.parameters("a")
    downs, ups = ({name: found[f"unet.{name}.{side}"] for name in names} for side in ("down", "up"))
    return Arm(unet, predict, downs, ups)


def pefts(unet: Any, start: dict[str, Tensor], rank: int = RANK) -> Arm:
    """As diffusers' scripts train: factors in fp32 on a network that computes under autocast; on one in fp32 there is none."""
    names, device = names_in(unet), next(unet.parameters()).device
    unet.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    dtype = unet.dtype

    def predict(x: Tensor, sample: Sample) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float32):
            return said(unet, x, sample, dtype)

    found = dict(unet.named_parameters())
    downs, ups = ({name: found[f"{name}.lora_{side}.default.weight"] for name in names} for side in "AB")
    with torch.no_grad():
        for name, value in start.items():
            downs[name].copy_(value)
    return Arm(unet, predict, downs, ups)


def starts(unet: nn.Module) -> dict[str, Tensor]:
    """The downs that `ours` starts with."""
    shapes = {name: layer.weight.shape for name, layer in unet.named_modules() if name in set(names_in(unet))}
    kind = lookup.find("adapters", "lora")
    with torch.device("cpu"):
        made = {name: nn.Conv2d(shape[1], 1, 1) if len(shape) == 4 else nn.Linear(shape[1], 1) for name, shape in shapes.items()}
    config = kind.Config(rank=RANK, alpha=float(RANK))
    return {name: kind.Adapter(layer, config, stream(0, f"unet.{name}")).down.detach() for name, layer in made.items()}


@dataclass
class Encoders:
    """An autoencoder and a text encoder with random weights, in bf16, as diffusers' script has both."""

    vae: Any
    text: Any

    @classmethod
    def new(cls, small: bool, device: torch.device) -> "Encoders":
        widths = (8, 8, 8, 8) if small else (128, 256, 512, 512)
        of_text = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2} if small else {
            "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}  # fmt: skip
        with torch.device("meta"):
            vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=widths,
                layers_per_block=2, norm_num_groups=min(widths[0], 32),
            )  # fmt: skip
            words = 514 if small else 49408
            text = CLIPTextModel(CLIPTextConfig(vocab_size=words, bos_token_id=words - 2, eos_token_id=words - 1, **of_text))
        return cls(*(ready(one, device, torch.bfloat16) for one in (vae, text)))

    @torch.no_grad()
    def __call__(self, sample: Sample) -> Sample:
        posterior = self.vae.encode(sample["pixels"].to(self.vae.dtype)).latent_dist
        latents = (posterior.mean + posterior.std * sample["posterior"].to(self.vae.dtype)) * self.vae.config.scaling_factor
        return {**sample, "latents": latents.float(), "text": self.text(sample["ids"]).last_hidden_state.float()}


def samples(count: int, batch: int, px: int, config: dict[str, Any], device: torch.device, pixels: bool = False) -> Iterator[Sample]:
    """The sample of each step; with `pixels`, latents and texts are yet to be encoded."""
    side, width = px // 8, config["cross_attention_dim"]
    for i in range(count):
        shape = (batch, 4, side, side)
        one = {"noise": normal(shape, i, "noise"), "t": torch.from_numpy(stream(i, "t").integers(0, 1000, batch))}
        if pixels:
            vocabulary = 514 if width < 768 else 49408
            one |= {"pixels": normal((batch, 3, px, px), i, "pixels").clamp(-1, 1), "posterior": normal(shape, i, "posterior")}
            one |= {"ids": torch.from_numpy(stream(i, "ids").integers(0, vocabulary, (batch, TOKENS)))}
        else:
            one |= {"latents": normal(shape, i, "x"), "text": normal((batch, TOKENS, width), i, "text")}
        if "addition_embed_type" in config:
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            one |= {"pooled": normal((batch, pooled), i, "pooled"), "frame": torch.tensor([[px, px, 0, 0, px, px]] * batch)}
        yield {name: value.to(device) for name, value in one.items()}


def counts(config: dict[str, Any], batch: int, px: int, full: bool) -> tuple[Counted, Counted]:
    """Ours and PEFT's under autocast, counted without memory and without computing; `full`: norms in fp32 there, as on a GPU."""
    device = torch.device("cpu")
    arms = [ours(network(config, device, torch.bfloat16, False)), pefts(network(config, device, torch.bfloat16, False), {})]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for arm in arms:
        hollow(arm.unet, mode)
    (sample,) = samples(1, batch, px, config, device)
    with mode:
        own = counted(lambda: arms[0].gradients(sample))
        if not full:
            return own, counted(lambda: arms[1].gradients(sample))
        with full_norms():
            return own, counted(lambda: arms[1].gradients(sample))


def apart(losses: Sequence[float], others: Sequence[float]) -> float:
    """The largest relative difference of losses."""
    return max(abs(a - b) / b for a, b in zip(losses, others, strict=True))


def cosine(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of what was learnt, ΔW of all layers in a row, from "NAME.down" and "NAME.up" (the inner products of ΔW need no ΔW)."""
    names = [name.removesuffix(".up") for name in one if name.endswith(".up")]

    def product(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        found = 0.0
        for name in names:
            left = a[f"{name}.up"].flatten(1).double().T @ b[f"{name}.up"].flatten(1).double()
            right = a[f"{name}.down"].flatten(1).double() @ b[f"{name}.down"].flatten(1).double().T
            found += float((left * right).sum())
        return found

    return product(one, other) / math.sqrt(product(one, one) * product(other, other))
