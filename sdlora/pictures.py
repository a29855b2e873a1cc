"""Pictures as files: PNG with the recipe inside, and labelled sheets of many."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sdlora.generate import Recipe

CELL_PX = 144  # smaller pictures are enlarged to it on a sheet
INK, FAINT, PAPER = "#1d2430", "#6b7585", "#ffffff"


def images(pixels: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in 0..1 -> pictures, rounded to 8 bits."""
    array = (pixels.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(one)) for one in array]


def png(picture: Image.Image, recipe: Recipe, base: str, packs: Sequence[str]) -> bytes:
    """A PNG that says how it was made: as JSON under `sdlora`, and as text under `parameters`, where other programs look."""
    table: dict[str, Any] = asdict(recipe) | {"base": base, "packs": list(packs)}
    text = dict(recipe.text_scales)  # those programs name the text encoder's first
    apart = {name: f"{text[name]:g}:" for name in text}
    tags = "".join(f" <lora:{name}:{apart.get(name, '')}{scale:g}>" for name, scale in recipe.scales)
    size = f"Size: {recipe.width}x{recipe.height}"
    lines = [recipe.prompt + tags, f"Negative prompt: {recipe.negative}"] if recipe.negative else [recipe.prompt + tags]
    lines.append(f"Steps: {recipe.steps}, Sampler: DDIM, CFG scale: {recipe.guidance:g}, Seed: {recipe.seed}, {size}, Model: {base}")
    return encode(picture, {"sdlora": json.dumps(table), "parameters": "\n".join(lines)})


def encode(picture: Image.Image, texts: dict[str, str]) -> bytes:
    """A PNG with text fields."""
    info = PngInfo()
    for field, text in texts.items():
        info.add_itxt(field, text)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def small(picture: Image.Image, most_px: int = 320) -> bytes:
    """A JPEG for pages, at most so wide and high."""
    buffer, shown = io.BytesIO(), picture.convert("RGB")
    shown.thumbnail((most_px, most_px), Image.Resampling.LANCZOS)
    shown.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def row(images: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """Pictures of one size beside one another; small ones are enlarged as on a sheet."""
    factor = max(1, round(CELL_PX / min(images[0].size)))
    width, height = images[0].width * factor, images[0].height * factor
    paper = Image.new("RGB", (len(images) * (width + gap) - gap, height), PAPER)
    for i, picture in enumerate(images):
        paper.paste(picture.resize((width, height), Image.Resampling.BICUBIC) if factor > 1 else picture, (i * (width + gap), 0))
    return paper


def sheet(rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str], title: str = "") -> Image.Image:
    """One picture of many: a label over each column, and over each row its own."""
    width, height = rows[0][0].size
    factor = max(1, round(CELL_PX / min(width, height)))
    width, height, gap = width * factor, height * factor, 8
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    top, line = (34 if title else 6), 24
    total = (gap + len(column_labels) * (width + gap), top + line + len(rows) * (line + height + gap))
    paper = Image.new("RGB", total, PAPER)
    draw = ImageDraw.Draw(paper)
    draw.text((gap, 9), title, INK, font)
    for column, label in enumerate(column_labels):
        draw.text((gap + column * (width + gap) + width / 2, top + line / 2), label, INK, font, anchor="mm")
    for r, row in enumerate(rows):
        y = top + line + r * (line + height + gap)
        draw.text((gap, y + line / 2), row_labels[r], FAINT, small, anchor="lm")
        for c, picture in enumerate(row):
            enlarged = picture.resize((width, height), Image.Resampling.BICUBIC) if factor > 1 else picture
            paper.paste(enlarged, (gap + c * (width + gap), y + line))
    return paper
