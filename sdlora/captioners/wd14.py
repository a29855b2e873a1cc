"""Danbooru's tags by one of SmilingWolf's taggers: a network in ONNX that takes a square picture and gives a probability for each tag."""

import csv
import io
import re
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image

from sdlora.captioner import Captioner

MODEL = "SmilingWolf/wd-swinv2-tagger-v3"
FILES = ("model.onnx", "selected_tags.csv")
THRESHOLDS = {"4": 0.85, "0": 0.35}
"""By the tags' category, characters first: the probability above which a tag is said. Others are ratings, of which none is."""


class Tagger(Captioner):
    def __init__(self, folder: Path, device: torch.device) -> None:
        table = csv.DictReader(io.StringIO((folder / "selected_tags.csv").read_text(encoding="utf-8")))
        self.tags = [(row["category"], words(row["name"])) for row in table]
        network = (folder / "model.onnx").read_bytes()
        wanted = [*(["CUDAExecutionProvider"] if device.type == "cuda" else []), "CPUExecutionProvider"]
        try:
            providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
            self.session = onnxruntime.InferenceSession(network, providers=providers)
        except Exception as error:  # the runtime's own kinds of error have no other parent
            raise ValueError(str(error)) from error
        self.input = self.session.get_inputs()[0]
        _, self.side_px, _, channels = self.input.shape  # (B, H, W, C)
        tags = self.session.get_outputs()[0].shape[-1]
        if (channels, tags) != (3, len(self.tags)) or not isinstance(self.side_px, int):
            raise ValueError(f"its network takes {self.input.shape} and gives {tags} numbers, for {len(self.tags)} tags in its table")

    def caption(self, path: Path, picture: Image.Image) -> str:
        (chances,) = self.session.run(None, {self.input.name: squared(picture, self.side_px)})[0]
        likely = sorted(zip(chances, self.tags, strict=True), key=lambda pair: -pair[0])
        return ", ".join(tag for kind, least in THRESHOLDS.items() for chance, (its, tag) in likely if its == kind and chance > least)


def squared(picture: Image.Image, side_px: int) -> np.ndarray:
    """The picture on a white square: (1, H, W, 3) in 0..255, blue first."""
    scale = side_px / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    ground = Image.new("RGB", (side_px, side_px), "white")
    ground.paste(picture.resize((width, height), Image.Resampling.BICUBIC), ((side_px - width) // 2, (side_px - height) // 2))
    return np.ascontiguousarray(np.asarray(ground, dtype=np.float32)[None, :, :, ::-1])


def words(tag: str) -> str:
    """A tag as it is said, with spaces; but in a face such as `>_<` or `o_o`, where no two letters stand together, underscores stay."""
    return tag.replace("_", " ") if re.search(r"[^\W_]{2}", tag) else tag


def load(folder: Path, device: torch.device, _: torch.dtype) -> Captioner:
    return Tagger(folder, device)
