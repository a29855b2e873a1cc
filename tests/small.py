"""Small things to test with: a random base of Stable Diffusion's structure, folders of pictures, runs of a few steps."""

import importlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdlora import api, lookup
from sdlora.adapter import Bank, Targeted
from sdlora.config import Run
from sdlora.family import Family
from sdlora.packs import file

TOKENS = 16
PATIENCE_S = 3000.0
"""How long is waited for a state: against hanging alone, far above what the busiest machine takes to come to it."""
SMALL_UNET: dict[str, Any] = {
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
NARROW_SD15: dict[str, Any] = {"sample_size": 64, "block_out_channels": (8, 16, 24, 24), "cross_attention_dim": 16, "attention_head_dim": 2,
                               "norm_num_groups": 8}  # fmt: skip
"""The structure of Stable Diffusion 1.5 in all but its widths."""


def make_base(folder: Path, unet: dict[str, Any], text_layers: int, vae_levels: int, seed: int = 0) -> Path:
    """A base with random weights in diffusers layout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = new_tokenizer()
        network = UNet2DConditionModel(**unet)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * vae_levels,
            up_block_types=("UpDecoderBlock2D",) * vae_levels,
            block_out_channels=(8, 16, 16, 16)[:vae_levels],
            norm_num_groups=4,
            sample_size=unet["sample_size"] * 2 ** (vae_levels - 1),
            mid_block_add_attention=False,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=text_layers, num_attention_heads=2,
                max_position_embeddings=TOKENS, projection_dim=16, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.3,
            )
        )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pipe = StableDiffusionPipeline(vae, text, tokenizer, network, scheduler, None, None, requires_safety_checker=False)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def new_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer over single bytes, without a learnt merge."""
    letters = sorted(ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocab = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], unk_token="<|endoftext|>", pad_token=pad, model_max_length=TOKENS)


def copy_base(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    return folder


def draw_folder(folder: Path, count: int = 5, square: bool = False) -> Path:
    """Pictures of several shapes: the second is wide, the third transparent, the fourth turned by its EXIF field, the fifth tall."""
    folder.mkdir(parents=True)
    sizes = [(48, 48)] if square else [(48, 48), (64, 40), (48, 48), (40, 64), (36, 56)]
    for i in range(count):
        size = sizes[i % len(sizes)]
        picture = Image.new("RGBA", size, (40 * i % 256, 200 - 30 * i % 200, 90, 255))
        draw = ImageDraw.Draw(picture)
        draw.ellipse((6 + i, 8, 30 + i, 34), fill=(250 - 35 * i % 250, 30 * i % 256, 60, 255))
        if i == 2:
            draw.rectangle((0, 0, 20, 20), fill=(0, 0, 0, 0))
        if i == 3:
            exif = Image.Exif()
            exif[0x0112] = 6  # the camera was turned: width and height change places
            picture.convert("RGB").save(folder / f"{i}.jpg", exif=exif)
        else:
            (picture if i == 2 else picture.convert("RGB")).save(folder / f"{i}.png")
        if i % 2 == 0:
            (folder / f"{i}.txt").write_text(f"ball {i}", encoding="utf-8")
    return folder


def settled(folder: Path, base: Path, **overrides: Any) -> Run:
    """A run of six steps in fp32; `train__steps=3` overrides `train.steps`."""
    train = {"steps": 6, "batch_size": 2, "warmup_steps": 1, "save_every": 2, "log_every": 1, "lr": 1e-2, "text_encoder_lr": 5e-3}
    table: dict[str, Any] = {
        "name": "mira",
        "base": str(base),
        "data": {"folder": str(folder), "resolution_px": 32, "prior_share": 0.0},
        "adapter": {"rank": 2},
        "train": {**train, "precision": "fp32"},
        "preview": {"scales": [], "steps": 2, "every": 0},
    }
    for key, value in overrides.items():
        *path, last = key.split("__")
        part = table
        for step in path:
            part = part.setdefault(step, {})
        part[last] = value
    return api.settle(table)


def modules(family: Family) -> dict[str, int]:
    """Which module stands at every place of a base."""
    return {f"{part}.{name}": id(module) for part, whole in family.components.items() for name, module in whole.named_modules()}


def some_config(kind: Any, rank: int = 3, alpha: float = 1.5) -> Targeted:
    """A kind's settings, of which a rank and an alpha are given where it has them."""
    given = {"rank": rank, "alpha": alpha, "bottleneck": 2 * rank, "tokens": rank, "dimension": 40 + rank}
    config: Targeted = kind.Config(**{key: value for key, value in given.items() if key in kind.Config.model_fields}).spelt((3, 1))
    return config


def numbers(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def randomise(bank: Bank, name: str, seed: int = 1, size: float = 0.3) -> None:
    """Give an adapter weights that do something."""
    with torch.no_grad():
        for i, parameter in enumerate(bank.parameters(name).values()):
            parameter.copy_(size * numbers(tuple(parameter.shape), 1000 * seed + i))


def random_pack(path: Path, family: Family, seed: int = 1, rank: int = 2, alpha: float = 1.0, targets: tuple[str, ...] = ()) -> Path:
    """Write a pack with random weights for a base."""
    kind = lookup.find("adapters", "lora")
    bank = Bank(family.components)
    patterns = [pattern for preset in targets or ("attention", "text-encoder") for pattern in family.presets.get(preset, [preset])]
    bank.add("random", dict.fromkeys(matching(family, kind, patterns), (kind, some_config(kind, rank, alpha))), stream_of)
    randomise(bank, "random", seed)
    tensors = file.tensors_of(bank, "random", family)
    bank.eject()
    header = {"sdlora.base": family.base.name, "sdlora.adapter": "lora", "modelspec.trigger_phrase": "mira"}
    file.save(path, tensors, lambda sha256: header | {"sshs_model_hash": sha256})
    return path


def matching(family: Family, kind: Any, patterns: list[str]) -> Iterator[str]:
    from fnmatch import fnmatchcase

    for name, layer in family.layers().items():
        if kind.fits(layer) and any(fnmatchcase(name, pattern) for pattern in patterns):
            yield name


def stream_of(dotted: str) -> Any:
    from sdlora.randomness import stream

    return stream(0, f"init/{dotted}")


def lacks(what: str) -> NoReturn:
    """Skip a test for want of something that `.ci/run` installs; there the want is an error."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def library(name: str) -> Any:
    """A package that only some users install, and whoever works on this."""
    try:
        return importlib.import_module(name)
    except ImportError:
        lacks(f"{name} is not installed: pip install -e '.[dev]'")


def until(happens: Callable[[], object]) -> None:
    """Wait for a state."""
    end = time.monotonic() + PATIENCE_S
    while not happens():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def calls(work: Callable[[], object]) -> int:
    """How many functions a piece of work calls, Python's and C's: its length, by a measure that is no machine's own."""
    counted, before = [0], sys.getprofile()

    def count(_: Any, event: str, __: Any) -> None:
        counted[0] += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return counted[0]


def any_port() -> int:
    """A port that the system itself gives to nobody else now: test processes run side by side."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
