"""Diffusers' own training script, whole, on a base of random weights: seconds a step, from two runs of it that differ in their steps."""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import arms
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

STEPS = (2, 7)
TRIES = 3


def base(folder: Path, small: bool) -> Path:
    """Stable Diffusion 1.5 in diffusers layout, with random weights, and a vocabulary of single bytes."""
    device = torch.device("cpu")
    unet, encoders = arms.network(arms.NARROW if small else arms.SD15, device, torch.bfloat16), arms.Encoders.new(small, device)
    letters = sorted(ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    marks = {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "model_max_length": arms.TOKENS}
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], **marks)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    pipe = StableDiffusionPipeline(encoders.vae, encoders.text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return folder


def pictures(folder: Path, px: int) -> Path:
    """Eight plain pictures with captions, as its image folder wants them."""
    folder.mkdir()
    for i in range(8):
        Image.new("RGB", (px, px), (30 * i, 200 - 20 * i, 90)).save(folder / f"{i}.png")
    lines = "".join(f'{{"file_name": "{i}.png", "text": "picture {i}"}}\n' for i in range(8))
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return folder


def seconds(file: Path, small: bool, px: int) -> list[float]:
    """Seconds of one of its steps, by as many tries: the difference of two runs, so that its start does not count."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model, shown = base(folder / "base", small), pictures(folder / "pictures", px)
        known = {"pretrained_model_name_or_path": model, "train_data_dir": shown, "output_dir": folder / "out", "resolution": px,
                 "train_batch_size": 1, "rank": arms.RANK, "mixed_precision": "bf16", "learning_rate": 1e-4, "seed": 0}  # fmt: skip

        def took(steps: int) -> float:
            told = {**known, "max_train_steps": steps}
            command = [sys.executable, str(file), *(word for key, value in told.items() for word in (f"--{key}", str(value)))]
            began = time.perf_counter()
            ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
            if ended.returncode:
                raise SystemExit(f"{file} failed: {re.sub(r'.*Traceback', 'Traceback', ended.stderr, flags=re.DOTALL)}")
            return time.perf_counter() - began

        return [(took(STEPS[1]) - took(STEPS[0])) / (STEPS[1] - STEPS[0]) for _ in range(TRIES)]


def row(file: Path, small: bool, px: int) -> str:
    """Its row in the table of arms; which layers it adapts is its own choice, and its samples are its own."""
    own = seconds(file, small, px)
    said = f"{statistics.median(own):.3f} ({min(own):.3f} to {max(own):.3f})"
    return f"| {file.name}, whole; attention's layers, samples of its own | 1 | {said} | | | | |"
