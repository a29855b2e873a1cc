"""Features in which pictures are compared: a model that was made for likeness, where one is at hand, else the base's own autoencoder and
how much goes on where."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from sdlora import hub, score
from sdlora.devices import Portion, compute_in_portions
from sdlora.errors import UserError
from sdlora.family import Family

KEPT = {"dinov2": "facebook/dinov2-base", "clip": "openai/clip-vit-large-patch14"}
"""Models that are used when they were downloaded before; none is downloaded unasked."""
FILES = ["*.json", "*.txt", "*.safetensors"]
BATCH = 16
CONTRAST = 2.0
"""Weight of local contrast beside latents."""
FAINT = 0.02
"""Of a picture's range: less contrast than this is noise."""


class Eyes(ABC):
    """A way to see pictures."""

    name: str
    """What every figure that was made by it says."""

    @abstractmethod
    def see(self, pixels: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in 0..1 -> features (N, D), float32, on the CPU."""

    def read(self, texts: Sequence[str]) -> Tensor | None:  # noqa: ARG002
        """Texts as features (N, D) of the same space, if it knows texts."""
        return None


class Autoencoder(Eyes):
    """Means of the base's own latents (as `score.embed`): sees shape, place and colour, little of what a thing is, and hardly a blur."""

    def __init__(self, family: Family) -> None:
        self.name, self.family = f"autoencoder of {family.base.name}", family

    def see(self, pixels: Tensor) -> Tensor:
        return score.embed(self.family, pixels, BATCH).float().cpu()


class Detailed(Eyes):
    """The autoencoder's latents beside how much goes on where: a blurred picture has nearly the latents of a sharp one, not its contrast.

    Both parts are scaled to their number of values, the contrast weighs `CONTRAST` times as much: so that a sharp picture moved by 2 px is
    more like itself than a blurred one in its place.
    """

    def __init__(self, family: Family) -> None:
        self.latents = Autoencoder(family)
        self.name = f"{self.latents.name} and local contrast"

    def see(self, pixels: Tensor) -> Tensor:
        parts = (self.latents.see(pixels), CONTRAST * contrast(pixels.float().cpu()))
        return torch.cat([part / part.shape[1] ** 0.5 for part in parts], 1)


def contrast(pixels: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in 0..1 -> (N, 3·3·16) logarithms of the root mean square of each colour in three octaves of a Laplacian
    pyramid (Burt & Adelson 1983), in each of 4 x 4 tiles; what is below `FAINT` counts as nothing."""
    found = []
    for _ in range(3):
        coarse = F.avg_pool2d(pixels, 2)
        band = pixels - F.interpolate(coarse, pixels.shape[-2:], mode="bilinear")
        found.append(0.5 * (F.adaptive_avg_pool2d(band**2, 4) + FAINT**2).log().flatten(1))
        pixels = coarse
    return torch.cat(found, 1)


class Transformer(Eyes):
    """DINOv2 (Oquab et al. 2023) or CLIP (Radford et al. 2021): the class token, or the projected one."""

    def __init__(self, name: str, folder: Path, device: torch.device) -> None:
        self.name, self.device = name, device
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        kinds: dict[str, Any] = {"dinov2": transformers.Dinov2Model, "clip": transformers.CLIPModel}
        if config.model_type not in kinds:
            raise ValueError(f"it is a {config.model_type}, and {' or '.join(kinds)} is wanted")
        loaded, found = kinds[config.model_type].from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        if found["missing_keys"]:  # transformers would go on with random numbers in their place
            raise ValueError(f"it lacks weights, such as {min(found['missing_keys'])}")
        self.model = loaded.to(device).eval().requires_grad_(False)
        self.is_clip = config.model_type == "clip"
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True) if self.is_clip else None
        seen = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) for values in (seen.image_mean, seen.image_std))
        self.side = int(config.vision_config.image_size if self.is_clip else 224)  # DINOv2 takes any multiple of its patch

    @torch.no_grad()
    def see(self, pixels: Tensor) -> Tensor:
        def seen(portion: Portion) -> Tensor:
            return torch.cat([self._features(part).float().cpu() for part in torch.split(pixels.float().cpu(), portion.rows)])

        return compute_in_portions(seen, BATCH, f"picture that {self.name} is to see")

    def _features(self, pixels: Tensor) -> Tensor:
        x = (F.interpolate(pixels, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1) - self.mean) / self.std
        if self.is_clip:
            projected: Tensor = self.model.visual_projection(self.model.vision_model(x.to(self.device)).pooler_output)
            return projected
        token: Tensor = self.model(x.to(self.device)).last_hidden_state[:, 0]
        return token

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Tensor | None:
        if self.tokenizer is None:
            return None
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        said: Tensor = self.model.text_projection(self.model.text_model(**tokens).pooler_output)
        return said.float().cpu()


def opened(wanted: str, family: Family) -> Eyes:
    """The eyes of a name: `auto` (the best that is at hand), `base`, `dinov2`, `clip`, a folder or a hub id. Raises `UserError`."""
    if wanted == "base":
        return Detailed(family)
    if wanted == "auto":
        name = next((name for name in KEPT.values() if hub.kept(name, "model.safetensors")), "")
        return _transformer(name, family.device) if name else Detailed(family)
    return _transformer(KEPT.get(wanted, wanted), family.device)


def _transformer(name: str, device: torch.device) -> Eyes:
    todo = f"name base, {', '.join(KEPT)}, a folder, or a hub id such as {KEPT['dinov2']}"
    if not Path(name).is_dir() and not hub.is_id(name):
        raise UserError("E-EYES-01", f'no model called "{name}" to see with: no such folder, and no hub id', "--eyes", todo)
    try:
        return Transformer(name, Path(name) if Path(name).is_dir() else hub.download(name, FILES), device)
    except hub.UnreachableError as error:
        raise UserError("E-EYES-02", f'"{name}" could not be had from the hub: {error}', "--eyes", todo) from error
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError("E-EYES-03", f"this model cannot be used to see with: {reason}", name, todo) from error
