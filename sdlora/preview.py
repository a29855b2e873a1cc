"""Looking at what was learnt: previews in training, the strip of scales at the end, and how near pictures come to those trained on."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdlora import pictures, score
from sdlora.config import Run
from sdlora.data import captions
from sdlora.data.ledger import Dataset
from sdlora.generate import Recipe
from sdlora.studio import Studio, as_prompt


def in_training(studio: Studio, settled: Run, scale: float) -> list[Image.Image]:
    """A picture of each prompt; nothing that training depends on changes."""
    return studio.render([recipe(studio, settled, prompt, settled.name, scale) for prompt in settled.preview.prompts])


def strip(studio: Studio, settled: Run, name: str) -> list[list[Image.Image]]:
    """A row for each prompt: the base, then every scale."""
    look = settled.preview
    return studio.strips([recipe(studio, settled, prompt, name, 1.0) for prompt in look.prompts], [name], look.scales)


def sheet(rows: Sequence[Sequence[Image.Image]], settled: Run, base: str) -> Image.Image:
    """The rows of `strip`, labelled."""
    columns = ["base", *(f"scale {scale:g}" for scale in settled.preview.scales)]
    return pictures.sheet(rows, settled.preview.prompts, columns, f"{settled.name} on {base}, seed {settled.preview.seed}")


def recipe(studio: Studio, settled: Run, prompt: str, name: str, scale: float) -> Recipe:
    """The recipe of one preview."""
    side, step = settled.data.resolution_px or 0, studio.family.step_px
    size = f"{side // step * step}x{side // step * step}"
    look = settled.preview
    return studio.recipe(prompt, size, look.guidance, seed=look.seed, steps=look.steps, scales=((name, scale),))


def likeness(
    studio: Studio, settled: Run, name: str, dataset: Dataset, latents: Sequence[Sequence[tuple[Tensor, Tensor]]], most: int = 8
) -> dict[str, Any]:
    """Distance from pictures generated of training captions to the training pictures, at scale 0 and 1, over the commonest size."""
    items = dataset.account.used
    shown = [i for i in dict.fromkeys(dataset.pool) if not items[i].regularisation]
    size = Counter(dataset.sizes[i] for i in shown).most_common(1)[0][0]
    chosen = [i for i in shown if dataset.sizes[i] == size][:most]
    said = [as_prompt(captions.final(items[i], settled, 0)) for i in chosen]
    true = torch.stack([latents[i][0][0].flatten() for i in chosen])
    apart = []
    for scale in (0.0, 1.0):
        recipes = [recipe(studio, settled, prompt, name, scale).at(width=size[0], height=size[1]) for prompt in said]
        seen = score.embed(studio.family, studio.pixels(recipes, batch=4)).cpu()
        apart.append(float(score.distance(seen, true).mean()))
    return {"pictures": len(chosen), "distance_base": round(apart[0], 2), "distance_adapter": round(apart[1], 2)}


def learnt(data: dict[str, Any]) -> str:
    """`likeness` in a sentence."""
    base, adapter = data["distance_base"], data["distance_adapter"]
    return (
        f"learnt: asked for {data['pictures']} of your captions, pictures come out at {adapter / base:.2f} times the base's distance "
        f"from your pictures ({base} at scale 0, {adapter} at scale 1; L2 of the autoencoder's means)"
    )
