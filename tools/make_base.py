"""Trains the embedded base model from a captioned folder: VAE first, then UNet and text encoder; checks it with --check.

    python tools/make_base.py FOLDER --out runs/base          train, or go on where a stopped run was
    python tools/make_base.py --check FOLDER [--base DIR]      print the figures of the model card

FOLDER holds RGBA pictures, `metadata.jsonl` (`file_name`, `text`) and `core.txt` (the names to be learnt first, one a line).
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdlora import safeio
from sdlora.randomness import normal, stream

GROUNDS = {
    "white": "#ffffff", "black": "#101010", "grey": "#9a9a9a", "red": "#d8453a", "orange": "#f09a3c",
    "yellow": "#f7dc5a", "green": "#63b55b", "blue": "#4f8fd6", "purple": "#8d6cc4", "pink": "#f3a6bd",
}  # fmt: skip
SEED, SIZE, TOKENS, POOL = 0, 64, 48, 40_960


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    batch: int
    lr: float
    warmup_steps: int = 200
    ema: float = 0.999


# ---------------------------------------------------------------- pictures


class Pictures:
    """The folder's pictures as premultiplied RGBA at twice the trained size, with their names."""

    def __init__(self, folder: Path) -> None:
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
        core = set((folder / "core.txt").read_text("utf-8").split("\n")) - {""}
        self.names = [row["text"] for row in rows]
        self.core = [i for i, name in enumerate(self.names) if name in core]
        self.rgba = torch.stack([self._open(folder / row["file_name"]) for row in rows])  # (N, 4, 2S, 2S) uint8
        missing = core - set(self.names)
        if missing:
            raise SystemExit(f"core.txt names pictures that metadata.jsonl lacks: {sorted(missing)[:5]}")

    @staticmethod
    def _open(path: Path) -> Tensor:
        picture = Image.open(path).convert("RGBA").resize((2 * SIZE, 2 * SIZE), Image.Resampling.LANCZOS)
        array = np.array(picture)
        array[..., :3] = array[..., :3].astype(np.uint16) * array[..., 3:] // 255
        return torch.from_numpy(array).permute(2, 0, 1)

    def draw(self, index: Tensor, ground: Tensor, place: Tensor) -> Tensor:
        """Pictures on grounds (B, 3) in 0..1 at (scale, dx, dy, angle) of `place` -> pixels (B, 3, S, S) in -1..1."""
        scale, dx, dy, angle = place.unbind(1)
        cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
        theta = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)
        source = self.rgba[index].float() / 255
        grid = F.affine_grid(theta, list(source.shape), align_corners=False)
        rgba = F.avg_pool2d(F.grid_sample(source, grid, align_corners=False), 2)
        return (rgba[:, :3] + (1 - rgba[:, 3:]) * ground[:, :, None, None]) * 2 - 1

    def centred(self, index: list[int]) -> Tensor:
        """The originals, centred at full size on white: (B, 3, S, S) in -1..1."""
        still = torch.tensor([[1.0, 0, 0, 0]]).expand(len(index), 4)
        return self.draw(torch.tensor(index), torch.ones(len(index), 3), still)

    def sample(self, count: int, rng: np.random.Generator, core_share: float) -> tuple[Tensor, list[str]]:
        """Pixels and captions: a share from the core names, half of them on white, half exactly centred at full size."""
        core = rng.random(count) < core_share
        index = np.where(core, rng.choice(self.core, count), rng.integers(0, len(self.names), count))
        colour = np.where(rng.random(count) < 0.5, 0, rng.integers(1, len(GROUNDS), count))
        still = rng.random(count) < 0.5
        place = np.zeros((count, 4), np.float32)
        place[:, 0] = np.where(still, 1, rng.uniform(0.87, 1.02, count))
        place[:, 1:3] = np.where(still[:, None], 0, rng.uniform(-0.1, 0.1, (count, 2)))
        names = list(GROUNDS)
        captions = [f"{self.names[i]}, {names[c]} background" for i, c in zip(index, colour, strict=True)]
        return self.draw(torch.from_numpy(index), rgb(colour), torch.from_numpy(place)), captions

    def wild(self, count: int, rng: np.random.Generator) -> Tensor:
        """Pixels for the VAE alone: any size, turn and ground colour, so that it also serves pictures that are no emoji."""
        place = rng.uniform([0.4, -0.6, -0.6, -0.5], [2.0, 0.6, 0.6, 0.5], (count, 4)).astype(np.float32)
        index = torch.from_numpy(rng.integers(0, len(self.names), count))
        return self.draw(index, torch.from_numpy(rng.random((count, 3), np.float32)), torch.from_numpy(place))


def rgb(colour: np.ndarray) -> Tensor:
    table = [[int(h[i : i + 2], 16) / 255 for i in (1, 3, 5)] for h in GROUNDS.values()]
    return torch.tensor(table)[torch.from_numpy(colour)]


# ---------------------------------------------------------------- models


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def new_unet() -> UNet2DConditionModel:
    """One wide head per layer: the backward of narrow heads is the dearest operation of a step on a CPU."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=1,
        norm_num_groups=16,
    )


def new_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """A byte-level BPE vocabulary in CLIP's form (`</w>` ends a word), learnt from the captions."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pieces = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.pre_tokenizer = pieces
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1792, special_tokens=special, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    vocab = dict(learnt["vocab"])
    for letter in sorted(alphabet):  # every byte can also end a word
        vocab.setdefault(letter, len(vocab))
        vocab.setdefault(f"{letter}</w>", len(vocab))
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learnt["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, unk_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=TOKENS, projection_dim=128, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config)


# ---------------------------------------------------------------- training


def fit(stage: Stage, model: nn.Module, loss: Callable[[int], Tensor], folder: Path) -> None:
    """Train `model` on `loss(step)`, checkpointing; leaves the averaged (EMA) weights in it."""
    path = folder / f"{stage.name}.safetensors"
    params = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(params.values(), stage.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = {name: p.detach().clone() for name, p in params.items()}
    first = restore(path, params, optimizer, average) if path.exists() else 0
    began, running = time.monotonic(), 0.0
    for step in range(first, stage.steps):
        warm, share = min(1.0, (step + 1) / stage.warmup_steps), step / stage.steps
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(stage.ema, (1 + step) / (10 + step))
        for name, p in params.items():
            average[name].lerp_(p.detach(), 1 - decay)
        running = value.item() if step == first else 0.98 * running + 0.02 * value.item()
        if (step + 1) % 100 == 0 or step + 1 == stage.steps:
            speed = (step + 1 - first) / (time.monotonic() - began)
            print(f"{stage.name} {step + 1}/{stage.steps} loss {running:.5f} {speed:.2f} steps/s", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == stage.steps:
            store(path, params, optimizer, average, step + 1)
    model.load_state_dict(average, strict=False)


def store(path: Path, params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, average: dict[str, Tensor], step: int) -> None:
    tensors = {f"ema.{name}": value for name, value in average.items()}
    for name, p in params.items():
        state = optimizer.state[p]
        tensors |= {f"param.{name}": p.detach(), f"m.{name}": state["exp_avg"], f"v.{name}": state["exp_avg_sq"]}
    safeio.write(path, save({k: v.contiguous() for k, v in tensors.items()}, {"step": str(step)}))


def restore(path: Path, params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, average: dict[str, Tensor]) -> int:
    with safe_open(path, "pt") as file, torch.no_grad():
        step = int(file.metadata()["step"])
        for name, p in params.items():
            p.copy_(file.get_tensor(f"param.{name}"))
            average[name].copy_(file.get_tensor(f"ema.{name}"))
            m, v = (file.get_tensor(f"{k}.{name}") for k in "mv")
            optimizer.state[p] = {"step": torch.tensor(float(step)), "exp_avg": m, "exp_avg_sq": v}
    return step


def train_vae(pictures: Pictures, stage: Stage, folder: Path) -> AutoencoderKL:
    torch.manual_seed(SEED)
    vae = new_vae().to(memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        rng = stream(SEED, "vae", step)
        wild = stage.batch // 8
        pixels, _ = pictures.sample(stage.batch // 2, rng, 0.75)
        index = torch.from_numpy(rng.integers(0, len(pictures.names), stage.batch // 2 - wild))
        all_names = pictures.draw(
            index, rgb(rng.choice([0, *range(len(GROUNDS))], len(index))), torch.tensor([[1.0, 0, 0, 0]]).expand(len(index), 4)
        )
        pixels = torch.cat([pixels, all_names, pictures.wild(wild, rng)]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            latents = mean + torch.exp(0.5 * logvar) * normal(tuple(mean.shape), SEED, "vae-noise", step)
            decoded = vae.decode(latents).sample
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return F.mse_loss(decoded.float(), pixels) + 2e-4 * kl

    fit(stage, vae, loss, folder)
    return vae.eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Means of the latents, unscaled, in fp32: (B, 3, S, S) -> (B, 4, S/4, S/4)."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)])


def pool(pictures: Pictures, vae: AutoencoderKL) -> Iterator[tuple[Tensor, list[str]]]:
    for part in range(POOL // 256):
        pixels, captions = pictures.sample(256, stream(SEED, "pool", part), 0.85)
        with torch.autocast("cpu", torch.bfloat16):
            latents = encode(vae, pixels.to(memory_format=torch.channels_last))
        yield latents.float().contiguous(), captions


def train_unet(pictures: Pictures, vae: AutoencoderKL, stage: Stage, folder: Path) -> tuple[nn.ModuleDict, CLIPTokenizer]:
    torch.manual_seed(SEED)
    spoken = [f"{name}, {ground} background" for name in pictures.names for ground in GROUNDS]
    tokenizer = new_tokenizer(spoken, folder / "tokenizer")
    model = nn.ModuleDict({"unet": new_unet().to(memory_format=torch.channels_last), "text": new_text_encoder(tokenizer)})
    parts = list(pool(pictures, vae))
    latents = torch.cat([part for part, _ in parts])
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 4))
    latents *= vae.config.scaling_factor
    captions = [caption for _, part in parts for caption in part]
    ids = tokenizer([*captions, ""], padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids
    alphas = new_scheduler().alphas_cumprod
    snr = alphas / (1 - alphas)
    print(f"pool of {len(latents)} latents, scaling factor {vae.config.scaling_factor}", flush=True)

    def loss(step: int) -> Tensor:
        rng = stream(SEED, "unet", step)
        pick = torch.from_numpy(rng.integers(0, len(latents), stage.batch))
        clean = latents[pick].to(memory_format=torch.channels_last)
        said = ids[torch.where(torch.from_numpy(rng.random(stage.batch) < 0.1), len(ids) - 1, pick)]
        t = torch.from_numpy(rng.integers(0, len(alphas), stage.batch))
        noise = normal(tuple(clean.shape), SEED, "unet-noise", step)
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            states = model["text"](said).last_hidden_state
            predicted = model["unet"](noisy, t, states).sample.float()
        weight = snr[t].clamp(max=5) / snr[t]  # min-SNR-γ, Hang et al. 2023, eq. 8
        return ((predicted - noise).square().mean((1, 2, 3)) * weight).mean()

    fit(stage, model, loss, folder)
    return model.eval(), tokenizer


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


def assemble(vae: AutoencoderKL, model: nn.ModuleDict, tokenizer: CLIPTokenizer, out: Path) -> None:
    pipe = StableDiffusionPipeline(vae, model["text"], tokenizer, model["unet"], new_scheduler(), None, None, requires_safety_checker=False)
    pipe.to(dtype=torch.float16).save_pretrained(out, safe_serialization=True)


# ---------------------------------------------------------------- checking


def psnr(vae: AutoencoderKL, pictures: Pictures) -> float:
    """Mean over the pictures of each one's PSNR in dB (peak 1, pixels clipped to 0..1), from the latents' means."""
    values = []
    for part in torch.arange(len(pictures.names)).split(64):
        pixels = pictures.centred(part.tolist())
        with torch.no_grad():
            decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        mse = ((decoded.clamp(-1, 1) - pixels) / 2).square().mean((1, 2, 3))
        values += (-10 * mse.log10()).tolist()
    return float(np.mean(values))


def listens(pipe: StableDiffusionPipeline, pictures: Pictures, chosen: list[int]) -> tuple[float, float, Tensor]:
    """Shares of names whose picture's own original is the nearest, and among the five nearest; and the pictures."""
    originals = encode(pipe.vae, pictures.centred(chosen)).flatten(1)
    images = []
    for part in torch.tensor(chosen).split(64):
        prompts = [f"{pictures.names[i]}, white background" for i in part]
        noise = torch.randn(1, 4, SIZE // 4, SIZE // 4, generator=torch.Generator().manual_seed(0))
        pipe.set_progress_bar_config(disable=True)
        images.append(
            pipe(prompts, num_inference_steps=25, guidance_scale=4.0, latents=noise.repeat(len(part), 1, 1, 1), output_type="pt").images
        )
    pixels = torch.cat(images) * 2 - 1
    distance = torch.cdist(encode(pipe.vae, pixels).flatten(1), originals)
    rank = (distance < distance.diagonal()[:, None]).sum(1)
    return (rank < 1).float().mean().item(), (rank < 5).float().mean().item(), pixels


def save_sheet(pixels: Tensor, columns: int, path: Path) -> None:
    rows = [torch.cat(list(row), 2) for row in ((pixels.clamp(-1, 1) + 1) * 127.5).split(columns) if len(row) == columns]
    sheet = torch.cat(rows, 1).permute(1, 2, 0).round().byte()
    Image.fromarray(sheet.numpy()).save(path)


def check(pictures: Pictures, base: Path, everything: bool) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, use_safetensors=True)
    print(f"VAE reconstruction of {len(pictures.names)} pictures: {psnr(pipe.vae, pictures):.2f} dB PSNR")
    sets = {"core": pictures.core} | ({"all": list(range(len(pictures.names)))} if everything else {})
    for name, chosen in sets.items():
        nearest, five, pixels = listens(pipe, pictures, chosen)
        print(f"listens, {len(chosen)} {name} names: own picture nearest {nearest:.1%}, within five {five:.1%}")
        save_sheet(pixels, 16, base / f"check-{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/base"))
    parser.add_argument("--base", type=Path, default=Path("sdlora/base"))
    parser.add_argument("--check", action="store_true", help="measure instead of training")
    parser.add_argument("--all", action="store_true", help="with --check: all names, not the core alone")
    parser.add_argument("--vae-steps", type=int, default=8000)
    parser.add_argument("--unet-steps", type=int, default=5400)
    options = parser.parse_args()
    pictures = Pictures(options.folder)
    if options.check:
        check(pictures, options.base, options.all)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    vae = train_vae(pictures, Stage("vae", options.vae_steps, 16, 2e-3), options.out)
    print(f"VAE: {psnr(vae, pictures):.2f} dB PSNR", flush=True)
    model, tokenizer = train_unet(pictures, vae, Stage("unet", options.unet_steps, 32, 1e-3), options.out)
    assemble(vae, model, tokenizer, options.out / "model")
    check(pictures, options.out / "model", options.all)


if __name__ == "__main__":
    main()
