"""One base in memory, any number of packs on it, pictures on demand: what the command line and the web page generate with."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from sdlora import defaults, devices, family, generate, pictures
from sdlora.adapter import Bank
from sdlora.devices import Portion
from sdlora.errors import RESOURCES, UserError
from sdlora.family import Base, Family
from sdlora.generate import Recipe
from sdlora.packs import file
from sdlora.packs.reading import Report

MAX_SIDE_PX, MAX_STEPS, MAX_PROMPT = 4096, 500, 2000


@dataclass
class Studio:
    """A loaded base with the packs that were opened on it, by name."""

    family: Family
    bank: Bank
    packs: dict[str, file.Pack]
    reports: dict[str, Report] = field(default_factory=dict)
    """What of each pack acts."""
    own: Base = field(init=False)
    """What the base is, and how it is read, when no pack says otherwise."""

    def __post_init__(self) -> None:
        self.own = self.family.base

    @classmethod
    def open(cls, base: Base, dtype: torch.dtype | None = None) -> "Studio":
        """Load a base for generation."""
        device, usual = devices.for_pictures()
        try:
            loaded = family.load(base, device, dtype or usual)
        except (RuntimeError, MemoryError) as error:
            if not devices.is_out_of_memory(error):
                raise
            what = f"memory does not suffice to load the base for pictures: {str(error).partition(chr(10))[0]}"
            raise UserError("E-MEM-04", what, base.name, "close what else uses this memory", RESOURCES) from None
        return cls(loaded, Bank(loaded.components), {})

    def add(self, pack: file.Pack, partial: bool = False) -> str:
        """Put a pack on the base, off until a recipe names it; returns the name it goes by. One that fits in part is refused, or named by
        `remarks` where `partial` allows it.

        The first one also says how prompts are read, and what the base predicts if its files do not.
        """
        name = pack.name.replace(".", "-")  # which no module may have in its name
        while name in self.packs:
            name += "+"
        self.reports[name] = file.attach(pack, name, self.bank, self.family, partial)
        if not self.packs:
            self.family.take_for(file.as_trained(pack, self.own))
        self.packs[name] = pack
        return name

    def otherwise_read(self) -> list[str]:
        """The packs that were trained on prompts read in another way than they are here."""
        return [name for name, pack in self.packs.items() if pack.reading not in (None, self.family.base.text)]

    def remarks(self) -> list[str]:
        """What of the packs is to be known: which act only in part, how much of them, and what may surprise."""
        said = [f"{name} acts only in part: {report.count()}" for name, report in self.reports.items() if not report.complete]
        return said + [f"{name}: {note}" for name, report in self.reports.items() for note in report.notes]

    def remove(self, name: str) -> None:
        self.bank.remove(name)
        del self.packs[name], self.reports[name]
        self.family.take_for(file.as_trained(next(iter(self.packs.values())), self.own) if self.packs else self.own)

    def recipe(self, prompt: str, size: str = "", guidance: float | None = None, **rest: object) -> Recipe:
        """A checked recipe; what is left open is the base's own: size "WxH" in px, guidance."""
        native = self.family.base.size_px
        width, height = parse_size(size) if size else (native, native)
        usual = defaults.settings("character", self.family.base.row)["preview.guidance"]
        made = Recipe(prompt, width=width, height=height, guidance=usual if guidance is None else guidance).at(**rest)
        self._check(made)
        return made

    def render(self, recipes: Sequence[Recipe], batch: int = 0) -> list[Image.Image]:
        """Pictures of recipes that agree in size, steps and guidance, `batch` of them at once (0: all)."""
        return pictures.images(self.pixels(recipes, batch))

    def pixels(self, recipes: Sequence[Recipe], batch: int = 0) -> Tensor:
        """As `render`, but (N, 3, H, W) in 0..1."""
        return generate.render(self.family, self.bank, recipes, batch)

    def strip(self, recipe: Recipe, names: Iterable[str], scales: Sequence[float]) -> list[Image.Image]:
        """One recipe at many scales of the named packs, rendered as one batch."""
        adapters = list(names)
        return self.render([replace(recipe, scales=tuple((name, scale) for name in adapters)) for scale in scales])

    def strips(self, recipes: Sequence[Recipe], names: Iterable[str], scales: Sequence[float]) -> list[list[Image.Image]]:
        """For each recipe: the base, without an adapter, then every scale; all of it in batches of one size."""
        adapters = list(names)
        plain = [recipe.at(scales=(), text_scales=()) for recipe in recipes]
        scaled = [[recipe.at(scales=tuple((name, scale) for name in adapters)) for scale in scales] for recipe in recipes]

        def drawn(portion: Portion) -> list[list[Image.Image]]:
            bases = self._full_batches(plain, portion)
            return [[base, *self._full_batches(own, portion)] for base, own in zip(bases, scaled, strict=True)]

        return devices.compute_in_portions(drawn, len(scales), f"picture of {recipes[0].width}x{recipes[0].height} px", can_tile=True)

    def _full_batches(self, recipes: Sequence[Recipe], portion: Portion) -> list[Image.Image]:
        """The pictures, none of them from a smaller batch than the others, so that what is equal in two of them is equal bit for bit."""
        padding = -len(recipes) % portion.rows
        pixels = generate.render_portion(self.family, self.bank, [*recipes, *[recipes[-1]] * padding], portion)
        return pictures.images(pixels[: len(recipes)])

    def png(self, picture: Image.Image, recipe: Recipe) -> bytes:
        """The picture as a PNG with its recipe inside."""
        return pictures.png(picture, recipe, self.family.base.name, [name for name, _ in recipe.scales])

    def _check(self, recipe: Recipe) -> None:
        step = self.family.step_px
        if recipe.width % step or recipe.height % step or not 0 < recipe.width <= MAX_SIDE_PX or not 0 < recipe.height <= MAX_SIDE_PX:
            raise UserError(
                "E-GEN-01",
                f"{recipe.width}x{recipe.height} px does not suit this base",
                "--size",
                f"sides in multiples of {step}, at most {MAX_SIDE_PX}",
            )
        if not (isinstance(recipe.steps, int) and 1 <= recipe.steps <= MAX_STEPS):
            raise UserError("E-GEN-02", f"{recipe.steps} is no number of steps from 1 to {MAX_STEPS}", "--steps")
        if not 0 <= recipe.guidance <= 100:
            raise UserError("E-GEN-03", f"{recipe.guidance} is no guidance from 0 to 100", "--guidance")
        if not 0 <= recipe.seed < 2**63:
            raise UserError("E-GEN-04", f"{recipe.seed} is no seed from 0 to 2^63 - 1", "--seed")
        if max(len(recipe.prompt), len(recipe.negative)) > MAX_PROMPT:
            raise UserError("E-GEN-05", f"a prompt is longer than {MAX_PROMPT} characters", "--prompt")

    def cut_prompts(self, prompts: Sequence[str]) -> list[str]:
        """The prompts of which the base reads only the beginning."""
        return self.family.too_long(prompts)


def as_prompt(caption: str) -> str:
    """A caption as it may be asked for: no base reads as much as is left of a longer one."""
    return caption[:MAX_PROMPT]


def parse_size(text: str) -> tuple[int, int]:
    """ "640x512" -> (640, 512)."""
    width, _, height = text.lower().partition("x")
    if not (width + height).isascii() or not (width.isdigit() and height.isdigit()):
        raise UserError("E-GEN-01", f'"{text}" is no size', "--size", "write for example 512x768")
    return int(width), int(height)


def parse_scale(text: str) -> float:
    """A scale as typed, from -4 to 4."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not -4 <= value <= 4:
        raise UserError("E-GEN-06", f'"{text}" is no scale from -4 to 4', "--scale", "0 is the base, 1 what was trained")
    return value


class Named(NamedTuple):
    """A pack as it is named on a command line."""

    path: Path
    scale: float | None = None
    text_scale: float | None = None  # in the text encoders, where it is another


def parse_pack(text: str) -> Named:
    """`PACK`, `PACK:SCALE` or `PACK:SCALE:SCALE_IN_THE_TEXT_ENCODER`."""
    scales: list[float] = []
    while len(scales) < 2 and not Path(text).exists():
        path, colon, scale = text.rpartition(":")
        if not colon or "/" in scale or "\\" in scale or (scales and not _is_number(scale)):  # the colon belongs to the path (C:\...)
            break
        text, scales = path, [parse_scale(scale), *scales]
    return Named(Path(text), *scales)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
