"""The contract of a captioner, and how one is found and given its model.

A captioner is a file with `MODEL`, the model that it uses where none is named (empty: it needs none), `FILES`, what of it is downloaded,
and `load(folder, device, dtype)`, which gives a `Captioner`. What the file imports is loaded only when it is asked for.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image

from sdlora import hub, lookup
from sdlora.errors import UserError


class Captioner(ABC):
    """A loaded model, or whatever else knows what to say."""

    @abstractmethod
    def caption(self, path: Path, picture: Image.Image) -> str:
        """What is said about a picture (RGB, upright): any text, which may be none."""


def find(name: str, model: str) -> ModuleType:
    """The file of a captioner that can use this model, or its own if that is empty; nothing is loaded. Raises `UserError`."""
    try:
        kind = lookup.find("captioners", name)
    except ModuleNotFoundError as error:
        if (error.name or "sdlora").startswith("sdlora"):
            raise
        todo = 'install it: pip install "sdlora[caption]"'
        raise UserError("E-CAP-01", f"{name} needs {error.name}, which is not installed", "--with", todo) from error
    if model and not kind.MODEL:
        raise UserError("E-CAP-02", f'{name} uses no model, so that "{model}" would do nothing', "--model", "leave it out")
    return kind


def load(kind: ModuleType, model: str, device: torch.device, dtype: torch.dtype) -> Captioner:
    """A captioner with its model from a folder or the hub. Raises `UserError`."""
    name = model or kind.MODEL
    folder = Path(name) if not name or Path(name).is_dir() else _download(name, kind)
    try:
        captioner: Captioner = kind.load(folder, device, dtype)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            "E-CAP-05", f"this model cannot be loaded: {reason}", folder, "check that it is complete and of this kind"
        ) from error
    return captioner


def _download(name: str, kind: ModuleType) -> Path:
    todo = f"name a folder or a hub id such as {kind.MODEL}"
    if not hub.is_id(name):
        raise UserError("E-CAP-03", f'no model called "{name}": no such folder, and no hub id (owner/name)', "--model", todo)
    try:
        return hub.download(name, kind.FILES)
    except hub.UnreachableError as error:
        what = f'"{name}" is no folder here and could not be had from the hub: {error}'
        raise UserError("E-CAP-04", what, "--model", "check the name and the connection, or name a folder") from error
