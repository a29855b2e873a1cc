"""What stands behind the studio's page: bases kept in memory, packs read once, pictures drawn once."""

import hashlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from threading import Lock, RLock
from typing import TypeAlias

from PIL import Image, ImageChops, ImageStat

from sdlora import api
from sdlora.api import Learnt, Pack, Recipe, Studio, UserError
from webui.recent import Recent
from webui.shelf import Found, Shelf

NONE = ""  # the id of no pack: the base alone
STRIP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
SCALES = (-1.0, 2.0)  # ends of the slider
MAX_PICTURES, MAX_PACKS = 256, 16
ASPECTS = {"square": (1, 1), "portrait": (2, 3), "landscape": (3, 2)}

Key: TypeAlias = tuple[object, ...]


@dataclass(frozen=True)
class Wish:
    """What the page's controls say."""

    pack: str
    prompt: str
    negative: str
    seed: int | None
    steps: int
    guidance: float
    size: str
    scale: float
    text_scale: float | None = None  # in the text encoder, where it is another than in the UNet
    more: tuple[tuple[str, float], ...] = ()  # further packs, each with its own scale


@dataclass(frozen=True)
class Subject:
    """A pack, or none, with the base that it is drawn on."""

    base: str
    found: Found | None = None
    pack: Pack | None = None
    more: tuple[tuple[Found, Pack, float], ...] = ()


@dataclass(frozen=True)
class Choice:
    """What the page sets its controls to when a pack is chosen."""

    pack: str
    base: str
    trigger: str
    scale: float
    guidance: float
    sizes: dict[str, str]  # label: WxH


@dataclass(frozen=True)
class Picture:
    """A drawn picture: a PNG file with its recipe inside, and the SHA-256 of its RGB bytes."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class Pair:
    """Base and adapter on one seed, each drawn as a batch of one, so that they can be compared bit for bit."""

    base: Picture
    adapter: Picture
    command: str
    cut: bool  # whether the base leaves the end of the prompt unread
    apart: float  # mean difference of the two, in levels of 255


class Easel:
    """Draws wishes for every session of the process; one base is loaded once, one picture drawn at a time.

    Only the packs that are wished for sit on a base, which takes milliseconds: so nothing that was looked at before can touch a picture's
    last bits, a pack's name in the recipe is its own, and it is the very picture that the command line draws.
    """

    def __init__(self, shelf: Shelf, folder: Path, busy: Callable[[], str] = str) -> None:
        self.shelf, self.folder = shelf, folder
        self.busy = busy  # the name of a run that needs the device for itself, or nothing
        self._numbers = count(1)
        self._studios: dict[str, Studio] = {}
        self._seated: dict[str, tuple[list[Found], list[str]]] = {}  # base: the packs that sit on it, and the names they go by
        self._packs: Recent[Pack] = Recent(MAX_PACKS)
        self._pictures: Recent[Picture] = Recent(MAX_PICTURES, lambda picture: picture.path.unlink(missing_ok=True))
        self._keeping, self._drawing = RLock(), Lock()  # whoever holds both took `_drawing` first

    def choose(self, id: str) -> Choice:
        """Read a pack and load its base, and say what suits them. Raises `UserError`."""
        subject = self._subject(id)
        studio = self._studio(subject.base)
        usual = studio.recipe("")
        pack = subject.pack
        scale = min(max(pack.recommended_scale, SCALES[0]), SCALES[1]) if pack else 0.0
        return Choice(id, subject.base, pack.trigger if pack else "", scale, usual.guidance, sizes(usual.width, studio.family.step_px))

    def pair(self, wish: Wish) -> Pair:
        """The base and the adapter at the wish's scale. Raises `UserError`."""
        with self._drawing:
            subject, studio, recipe = self._ready(wish)
            (base,) = self._draw(subject, studio, [recipe])
            (adapter,) = self._draw(subject, studio, self._scaled(subject, recipe, [wish.scale], wish.text_scale))
            cut = bool(studio.cut_prompts([wish.prompt, wish.negative]))
        return Pair(base, adapter, command(wish, subject), cut, apart(base.path, adapter.path))

    def strip(self, wish: Wish) -> list[Picture]:
        """The adapter at each scale of `STRIP`, drawn as one batch. Raises `UserError`."""
        with self._drawing:
            subject, studio, recipe = self._ready(wish)
            if subject.pack is None:
                raise UserError("E-UI-02", "the base alone has no scales to compare", "pack", "choose a pack first")
            return self._draw(subject, studio, self._scaled(subject, recipe, STRIP, wish.text_scale))

    def learnt(self, wish: Wish) -> Learnt:
        """How much of its own pictures a pack has learnt, at scale 1. Raises `UserError`, also where it does nothing."""
        with self._drawing:
            subject, studio, _ = self._ready(replace(wish, more=()))
            if subject.found is None:
                raise UserError("E-UI-02", "the base alone has learnt nothing", "pack", "choose a pack first")
            return api.learnt(subject.found.path.parent, studio, self._seated[subject.base][1][0])

    def rest(self) -> None:
        """Give the bases' memory back, for a run that is about to begin; pictures already drawn stay."""
        with self._drawing:
            self._clear()

    def make_room(self) -> None:
        """The same for a run that somebody else began; not while a picture is drawn, for whoever looks asks again soon."""
        if self._studios and self.busy() and self._drawing.acquire(blocking=False):
            try:
                self._clear()
            finally:
                self._drawing.release()

    def _clear(self) -> None:
        with self._keeping:
            self._studios.clear()
            self._seated.clear()
        api.free_memory()

    def _ready(self, wish: Wish) -> tuple[Subject, Studio, Recipe]:
        """The wish with its base loaded, its pack on it, and its recipe checked, at no scale yet."""
        if wish.seed is None:
            raise UserError("E-UI-03", "no seed is given", "seed", "write a whole number from 0 on")
        for scale in (wish.scale, wish.text_scale or 0.0, *(one for _, one in wish.more)):
            api.parse_scale(f"{scale:g}")
        subject = self._subject(wish.pack)
        if wish.more:
            found = [(self.shelf.find(other), scale) for other, scale in wish.more if other not in (NONE, wish.pack)]
            subject = replace(subject, more=tuple((one, self._read(one), scale) for one, scale in found))
        studio = self._studio(subject.base)
        recipe = studio.recipe(wish.prompt, wish.size, wish.guidance, negative=wish.negative, seed=wish.seed, steps=wish.steps)
        self._seat(subject, studio)
        return subject, studio, recipe

    def _subject(self, id: str) -> Subject:
        if id != NONE:
            found = self.shelf.find(id)
            pack = self._read(found)
            return Subject(base_of(found, pack), found, pack)
        for found in self.shelf.packs()[:1]:  # the base alone is that of the newest pack
            try:
                return Subject(base_of(found, self._read(found)))
            except UserError:
                break
        return Subject("tiny")

    def _read(self, found: Found) -> Pack:
        with self._keeping:
            pack = self._packs.get(found)
            if pack is None:
                pack = api.open_pack(found.path)
                self._packs.put(found, pack)
            return pack

    def _studio(self, base: str) -> Studio:
        busy = self.busy()
        if busy:
            what = f'the studio rests while "{busy}" is at work, so that the run has the memory to itself'
            raise UserError("E-UI-05", what, "", "ask the run for a picture on the page Watch, or pause it there")
        with self._keeping:
            if base not in self._studios:
                self._studios[base] = api.open_studio(base=base)
            return self._studios[base]

    def _seat(self, subject: Subject, studio: Studio) -> None:
        """Let the subject's packs, and no others, sit on its base."""
        wanted = [(subject.found, subject.pack)] if subject.found and subject.pack else []
        wanted += [(found, pack) for found, pack, _ in subject.more]
        seated = self._seated.get(subject.base)
        if not wanted or (seated and seated[0] == [found for found, _ in wanted]):
            return
        if seated:
            del self._seated[subject.base]
            for name in seated[1]:
                studio.remove(name)
        self._seated[subject.base] = [found for found, _ in wanted], [studio.add(pack) for _, pack in wanted]

    def _scaled(self, subject: Subject, recipe: Recipe, scales: Sequence[float], text: float | None) -> list[Recipe]:
        """The recipe at each scale of the first pack; the others stay at their own."""
        if subject.pack is None and not subject.more:
            return [recipe] * len(scales)
        names = self._seated[subject.base][1]
        own = [round(scale, 3) for _, _, scale in subject.more]
        first = [[round(scale, 3)] if subject.pack else [] for scale in scales]
        apart = ((names[0], round(text, 3)),) if subject.pack and text is not None else ()
        return [replace(recipe, scales=tuple(zip(names, [*one, *own], strict=True)), text_scales=apart) for one in first]

    def _draw(self, subject: Subject, studio: Studio, recipes: list[Recipe]) -> list[Picture]:
        """The pictures of one batch. A picture belongs to its batch's size: its last bits depend on it."""
        packs = (subject.found, *(found for found, _, _ in subject.more))
        owners = [packs if recipe.scales else None for recipe in recipes]
        base = subject.base, studio.family.base.text, studio.family.prediction  # a pack says how prompts are read on it
        wanted: list[Key] = [(*base, owner, recipe, len(recipes)) for owner, recipe in zip(owners, recipes, strict=True)]
        kept = [picture for picture in map(self._pictures.get, wanted) if picture and picture.path.is_file()]  # /tmp may be swept
        if len(kept) == len(recipes):
            return kept
        drawn = [self._keep(studio, picture, recipe) for picture, recipe in zip(studio.render(recipes), recipes, strict=True)]
        for key, picture in zip(wanted, drawn, strict=True):
            self._pictures.put(key, picture)
        return drawn

    def _keep(self, studio: Studio, picture: Image.Image, recipe: Recipe) -> Picture:
        named = [f"{name}-scale{scale:g}" for name, scale in recipe.scales] or ["base"]
        plain = "".join(c if c.isalnum() or c in "._+-" else "-" for c in "-".join(named))
        path = self.folder / f"{plain}-seed{recipe.seed}-{next(self._numbers):04}.png"
        api.save_picture(path, studio, picture, recipe)
        return Picture(path, hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest())


def sizes(native_px: int, step_px: int) -> dict[str, str]:
    """Sizes of about the area that a base was trained on, in multiples of its step: what they are called, and WxH."""
    found = {}
    for name, (wide, high) in ASPECTS.items():
        ratio = (wide / high) ** 0.5
        width, height = (max(1, round(native_px * side / step_px)) * step_px for side in (ratio, 1 / ratio))
        found[f"{name}, {width} × {height}"] = f"{width}x{height}"
    return found


def apart(one: Path, other: Path) -> float:
    """Mean difference of two pictures of one size, in levels of 255."""
    with Image.open(one) as a, Image.open(other) as b:
        means = ImageStat.Stat(ImageChops.difference(a.convert("RGB"), b.convert("RGB"))).mean
    return float(sum(means) / len(means))


def base_of(found: Found, pack: Pack) -> str:
    """The base to draw a pack on: its own, by the path that its run knew if that is a folder here; else `tiny`."""
    config = found.path.parent / "config.toml"
    if pack.base and config.is_file():
        known = str(api.read_settings(config, []).get("base", ""))
        if Path(known).is_dir() and Path(known).resolve().name == pack.base:
            return known
    return pack.base or "tiny"


def command(wish: Wish, subject: Subject) -> str:
    """The command line that draws the same picture."""
    words = ["sdlora", "generate"]
    if subject.found:
        text = "" if wish.text_scale is None else f":{round(wish.text_scale, 3):g}"
        words.append(f"{subject.found.path}:{round(wish.scale, 3):g}{text}")
    words += [f"{found.path}:{round(scale, 3):g}" for found, _, scale in subject.more]
    if subject.base != (subject.pack.base if subject.pack else "tiny"):
        words += ["--base", subject.base]
    words += ["--prompt", wish.prompt]
    if wish.negative:
        words += ["--negative", wish.negative]
    words += ["--seed", str(wish.seed), "--steps", str(wish.steps), "--guidance", f"{wish.guidance:g}"]
    if wish.size:
        words += ["--size", wish.size]
    return shlex.join([*words, "--out", "picture.png"])
