"""Another autoencoder than the base's own: from a folder in diffusers layout, one file, or the hub."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import dtype as DType
from transformers import CLIPTokenizer

from sdlora import hub
from sdlora.errors import UserError
from sdlora.ldm import VAE, SingleFile
from sdlora.source import CONVERT, INDEX, PICKLES, Folder, Place, Source, header, needed, only_pickled, read_json

PART, CONFIG = "vae", "config.json"
SETTING = "use an autoencoder that was made for this base, or leave the setting out"
ALIKE = {"latents_mean": "its latents are shifted by a mean", "shift_factor": "its latents are shifted"}
"""What an autoencoder's config has only where no base of the known families could be used with it."""


class VaeFolder(Folder):
    """An autoencoder alone in a folder."""

    def config(self, part: str) -> dict[str, Any]:  # noqa: ARG002
        return read_json(self.path / CONFIG)

    def _at(self, part: str) -> Path:  # noqa: ARG002
        return self.path


class VaeFile(SingleFile):
    """An autoencoder in a file with the original implementation's names, alone or in a whole model.

    Such a file does not say by what the latents are scaled: it is taken to be what the base does.
    """

    def __init__(self, path: Path, scaling_factor: float) -> None:
        self.path, self.scaling_factor, self.text = path, scaling_factor, {"": "", "_2": ""}
        found, self.said = header(path)
        self.alone = not any(name.startswith(VAE) for name in found)
        self.header = {f"{VAE}{name}": one for name, one in found.items()} if self.alone else found
        self.shapes = {name: tuple(one["shape"]) for name, one in self.header.items()}
        if f"{VAE}encoder.conv_in.weight" not in self.shapes or f"{VAE}encoder.down.0.block.0.conv1.weight" not in self.shapes:
            what = "this file holds no autoencoder under the names of the original implementation"
            raise UserError("E-VAE-03", what, path, "name an autoencoder's folder in diffusers layout, or its original file")

    def config(self, part: str) -> dict[str, Any]:
        return {**super().config(part), "scaling_factor": self.scaling_factor}

    def _tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        names = {name: name.removeprefix(VAE) if self.alone else name for name in self.shapes if name.startswith(prefix)}
        with safe_open(self.path, "pt") as file:
            return {name: file.get_tensor(inside) for name, inside in names.items()}


class Exchanged(Source):
    """A base with another autoencoder."""

    def __init__(self, base: Source, vae: Source) -> None:
        self.path, self.base, self.vae = base.path, base, vae

    def config(self, part: str) -> dict[str, Any]:
        return self._of(part).config(part)

    def fingerprint(self, part: str) -> str:
        return self._of(part).fingerprint(part)

    def precision(self, part: str) -> list[str]:
        return self._of(part).precision(part)

    def places(self, part: str) -> dict[str, Place]:
        return self._of(part).places(part)

    def model(self, kind: Any, part: str, dtype: DType) -> Any:
        return self._of(part).model(kind, part, dtype)

    def tokenizer(self, part: str) -> CLIPTokenizer:
        return self.base.tokenizer(part)

    def says_prediction(self) -> bool:
        return self.base.says_prediction()

    def _of(self, part: str) -> Source:
        return self.vae if part == PART else self.base


def exchanged(base: Source, name: str) -> Source:
    """The base with the autoencoder of that name. Raises `UserError` where there is none, or it does not suit the base."""
    own = base.config(PART)
    vae = _found(name, float(own.get("scaling_factor", 0.18215)))
    theirs = vae.config(PART)
    shifted = next((why for field, why in ALIKE.items() if theirs.get(field)), None)
    channels = [int(config.get("latent_channels", 4)) for config in (own, theirs)]
    sides = [2 ** (len(config.get("block_out_channels", [0])) - 1) for config in (own, theirs)]
    if channels[0] != channels[1]:
        shifted = f"its latents have {channels[1]} channels, and the network reads {channels[0]}"
    elif sides[0] != sides[1]:
        shifted = f"it makes one latent of {sides[1]} px a side, and the base was trained on one of {sides[0]}"
    if shifted:
        raise UserError("E-VAE-02", f"this autoencoder does not suit the base: {shifted}", vae.path, SETTING)
    return Exchanged(base, vae)


def _found(name: str, scaling_factor: float) -> Source:
    path = Path(name)
    if not path.exists():
        return _from_hub(name)
    if path.is_file():
        if path.suffix in PICKLES:
            raise UserError("E-BASE-08", "a pickled autoencoder, which can run code and is never opened", path, CONVERT)
        beside = (path.parent / CONFIG).is_file() and path.stem.startswith("diffusion_pytorch_model")
        return VaeFolder(path.parent, [path.name]) if beside else VaeFile(path, scaling_factor)
    if (path / INDEX).is_file():
        return Folder(path)
    if (path / CONFIG).is_file():
        return VaeFolder(path)
    raise UserError("E-VAE-03", f"this folder holds no autoencoder in diffusers layout: it has no {CONFIG}", path, SETTING)


def _from_hub(name: str) -> Source:
    if not hub.is_id(name):
        what = f'no autoencoder called "{name}": no such folder or file, and no hub id (owner/name)'
        raise UserError("E-VAE-03", what, "vae", "use an autoencoder's folder, a .safetensors file, or a hub id")
    try:
        files = hub.listed(name)
        kind, place = (Folder, PART) if INDEX in files else (VaeFolder, "")
        pickled = next(only_pickled(files, [place]), None)
        if pickled:
            raise UserError("E-BASE-08", "only pickled weights, which can run code and are never opened", f"{name}/{pickled}", CONVERT)
        chosen = needed(files, half=False, parts=[place])
        return kind(hub.download(name, chosen), chosen)
    except hub.UnreachableError as error:
        what = f'"{name}" is no folder here and could not be had from the hub: {error}'
        raise UserError("E-VAE-04", what, "vae", "check the name and the connection, or name a folder") from error
