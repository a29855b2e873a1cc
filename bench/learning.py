"""Measures what a run with the default settings learns on the embedded base: a character, and a style.

    python bench/learning.py [--noto FOLDER --fxemoji FOLDER] [--out runs/figures]

The character is the bundled one; the further pictures that its drawing code makes, in poses and on grounds never trained, are the truth.
The style needs the two captioned folders (`metadata.jsonl`: file_name, text, split). All distances are L2 of the autoencoder's means.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))

from draw_dataset import held_out  # noqa: E402

from sdlora import api, pictures, score  # noqa: E402
from sdlora.data import buckets  # noqa: E402
from sdlora.data.pixels import read_picture  # noqa: E402

OTHERS = [
    "dog face", "rose", "pizza", "rocket", "sunflower", "cat face", "red apple", "tomato",
    "octopus", "frog", "strawberry", "bus", "penguin", "cactus", "trumpet", "guitar",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noto", type=Path)
    parser.add_argument("--fxemoji", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "figures")
    parser.add_argument("--set", dest="assignments", action="append", default=[], help="a setting of both runs, a.b=c")
    options = parser.parse_args()
    figures: dict[str, Any] = {"character": character(options.out / "tavi", options.assignments)}
    if options.noto and options.fxemoji:
        figures["style"] = style(options.out, options.noto, options.fxemoji, options.assignments)
    print(json.dumps(figures, indent=1))
    (options.out / "figures.json").write_text(json.dumps(figures, indent=1))


def trained(out: Path, table: dict[str, Any], assignments: Sequence[str]) -> tuple[api.Studio, str]:
    """A studio with the pack of a run, made now if its folder holds none."""
    table = {**api.read_settings(None, assignments), **table}
    run = api.settle(table)
    pack = out / f"{run.name}.safetensors"
    if not pack.is_file():
        for event in api.train(run, out):
            if event.kind != "step":
                print(event.text, flush=True)
    studio = api.open_studio([api.open_pack(pack)])
    return studio, run.name


def drawn(studio: api.Studio, name: str, prompts: Sequence[str], scale: float, seeds: Sequence[int]) -> Tensor:
    """Pictures of every prompt at every seed, prompts fastest: (S * P, 3, H, W) in 0..1."""
    recipes = [studio.recipe(prompt, seed=seed, scales=((name, scale),)) for seed in seeds for prompt in prompts]
    return studio.pixels(recipes, batch=32)


def embedded(studio: api.Studio, images: Sequence[Image.Image]) -> Tensor:
    side = studio.family.base.size_px
    return score.embed(studio.family, torch.stack([buckets.fit(image.convert("RGB"), (side, side)) for image in images]) / 2 + 0.5)


def character(out: Path, assignments: Sequence[str]) -> dict[str, Any]:
    studio, name = trained(out, {"name": "tavi", "data": {"folder": str(ROOT / "datasets" / "tavi")}}, assignments)
    seeds = range(4)
    _, images, captions = zip(*held_out(), strict=True)
    captions = [caption.strip() for caption in captions]
    true = embedded(studio, images).repeat(len(seeds), 1)
    seen = embedded(studio, [read_picture(path) for path in sorted((ROOT / "datasets" / "tavi").glob("*.png"))])
    at = {scale: drawn(studio, name, captions, scale, seeds) for scale in (0.0, 1.0)}
    means = {scale: score.embed(studio.family, pixels) for scale, pixels in at.items()}
    other = {scale: drawn(studio, name, [f"{thing}, white background" for thing in OTHERS], scale, [0]) for scale in (0.0, 1.0)}
    moved = score.distance(score.embed(studio.family, other[0.0]), score.embed(studio.family, other[1.0])).mean().item()
    asked = score.distance(means[0.0], means[1.0]).mean().item()
    apart = {scale: score.distance(mean, true).mean().item() for scale, mean in means.items()}
    rows = [pictures.images(part) for part in (at[0.0][:8], at[1.0][:8], other[0.0][:8], other[1.0][:8])]
    rows.insert(0, [image.resize((64, 64)) for image in images])
    labels = ["drawn, never trained", "scale 0, their captions", "scale 1, their captions", "scale 0, without the trigger", "scale 1"]
    pictures.sheet(rows, labels, [""] * 8, "tavi").save(out / "figures.png")
    return {
        "distance_scale0": apart[0.0],
        "distance_scale1": apart[1.0],
        "distance_ratio": apart[1.0] / apart[0.0],
        "drift_ratio": moved / asked,
        "nearest_training_picture": torch.cdist(means[1.0], seen).min(1).values.mean().item(),
        "nearest_training_picture_of_the_true_ones": torch.cdist(true, seen).min(1).values.mean().item(),
    }


def style(out: Path, noto: Path, fxemoji: Path, assignments: Sequence[str]) -> dict[str, Any]:
    folder, rows = out / "fxemoji-train", [json.loads(line) for line in (fxemoji / "metadata.jsonl").read_text("utf-8").splitlines()]
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if row["split"] == "train":
            shutil.copyfile(fxemoji / row["file_name"], folder / row["file_name"])
            (folder / row["file_name"]).with_suffix(".txt").write_text(f"{row['text']}, white background")
    table = {"name": "fxemoji", "kind": "style", "data": {"folder": str(folder)}}
    studio, name = trained(out / "fxemoji", table, assignments)
    test = [row for row in rows if row["split"] == "test"]
    files = {row["text"]: row["file_name"] for row in map(json.loads, (noto / "metadata.jsonl").read_text("utf-8").splitlines())}
    images = [read_picture(fxemoji / row["file_name"]) for row in test]
    true, originals = embedded(studio, images), embedded(studio, [read_picture(noto / files[row["text"]]) for row in test])
    prompts = [f"{row['text']}, white background, {name} style" for row in test]
    at = {scale: drawn(studio, name, prompts, scale, [0]) for scale in (0.0, 1.0)}
    means = {scale: score.embed(studio.family, pixels) for scale, pixels in at.items()}
    goal = torch.stack([buckets.fit(image, (64, 64)) for image in images]) / 2 + 0.5
    wasserstein = {scale: colour_distance(pixels, goal) for scale, pixels in at.items()}
    gram = {scale: (grams(studio, pixels) - grams(studio, goal)).norm().item() for scale, pixels in at.items()}
    rank = {scale: own_rank(mean, originals) for scale, mean in means.items()}
    nearer = (score.distance(means[1.0], true) < score.distance(means[0.0], true)).float().mean().item()
    wrong = true.roll(1, 0)
    control = (score.distance(means[1.0], wrong) < score.distance(means[0.0], wrong)).float().mean().item()
    sheet = [pictures.images(part[:12]) for part in (goal, at[0.0], at[1.0])]
    pictures.sheet(sheet, ["fxemoji, never trained", "scale 0", "scale 1"], [row["text"] for row in test[:12]], name).save(
        out / "fxemoji" / "figures.png"
    )
    return {
        "colour_wasserstein_ratio": wasserstein[1.0] / wasserstein[0.0],
        "gram_ratio": gram[1.0] / gram[0.0],
        "own_noto_rank_scale0": rank[0.0],
        "own_noto_rank_scale1": rank[1.0],
        "content_ratio": rank[1.0] / rank[0.0],
        "nearer_to_true": nearer,
        "nearer_to_another": control,
    }


def own_rank(means: Tensor, originals: Tensor) -> float:
    """Mean place (from 1) of a picture's own original among all, by distance."""
    apart = torch.cdist(means, originals)
    return (apart < apart.diagonal()[:, None]).sum(1).add(1).float().mean().item()


def colour_distance(a: Tensor, b: Tensor, directions: int = 64) -> float:
    """Sliced Wasserstein-1 distance of two sets' pixel colours (Bonneel et al. 2015); the sets have equally many pixels."""
    lines = np.random.default_rng(0).standard_normal((3, directions))
    lines /= np.linalg.norm(lines, axis=0)
    sorted_a, sorted_b = (np.sort(set_.permute(0, 2, 3, 1).reshape(-1, 3).numpy() @ lines, axis=0) for set_ in (a, b))
    return float(np.abs(sorted_a - sorted_b).mean())


def grams(studio: api.Studio, pixels: Tensor) -> Tensor:
    """Mean Gram matrices of the autoencoder's encoder blocks over a set (Gatys et al. 2016), each scaled by its size, in one vector."""
    found: list[Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: Any, features: Tensor) -> None:
        flat = features.flatten(2)
        gram = (flat @ flat.transpose(1, 2) / flat.shape[2]).mean(0)
        found.append((gram / gram.shape[0]).flatten())

    hooks = [block.register_forward_hook(keep) for block in studio.family.vae.encoder.down_blocks]  # type: ignore[attr-defined]
    studio.family.encode(pixels * 2 - 1)
    for hook in hooks:
        hook.remove()
    return torch.cat(found)


if __name__ == "__main__":
    main()
