"""Pixels of any kind become 8-bit sRGB on a ground: depth, colour model, colour profile, transparency, in this order."""

import io
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageCms, ImageColor

RANGES = (1.0, 255.0, 65535.0)
"""What white may be where a format does not say: fractions, 8 bits and 16 bits."""
NEARLY_SAME = 2
"""A profile that moves no colour by more than this many of 255 levels is sRGB, whatever its name."""
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0
"""TIFF's tag of what a number means; Pillow heeds it for 8 bits only."""


def to_rgb(picture: Image.Image, ground: str) -> tuple[Image.Image, list[str]]:
    """The picture as RGB, and notes on what that took: codes of `sdlora.data.reasons`."""
    alpha = _alpha(picture)
    colours, notes = _eight_bits(picture)
    colours = _to_srgb(colours, picture.info.get("icc_profile"), notes)
    if alpha is None or alpha.getextrema() == (255, 255):
        return (colours.copy() if colours is picture else colours), notes  # free of the file that it was read from
    notes += ["alpha-on-ground", *["fully-transparent"] * (alpha.getextrema() == (0, 0))]
    below = Image.new("RGB", colours.size, ImageColor.getrgb(ground)[:3])
    below.paste(colours, mask=alpha)
    return below, notes


def _alpha(picture: Image.Image) -> Image.Image | None:
    if not picture.has_transparency_data:
        return None
    if _is_deep(picture.mode):  # one value is transparent
        return Image.fromarray(np.where(np.asarray(picture) == picture.info["transparency"], 0, 255).astype(np.uint8))
    return (picture if picture.mode == "RGBA" else picture.convert("RGBA")).getchannel("A")


def _eight_bits(picture: Image.Image) -> tuple[Image.Image, list[str]]:
    """The colours without transparency, in mode L, RGB, CMYK or LAB; large pictures leave no room for copies that change nothing."""
    mode = picture.mode
    if mode == "RGB":
        return picture, []
    if _is_deep(mode):
        return _scaled_down(picture)
    if mode in ("L", "CMYK", "LAB"):
        return picture, {"L": ["grey"], "CMYK": ["cmyk"], "LAB": ["other-colours"]}[mode]
    if mode == "1":
        return picture.convert("L"), ["1-bit"]
    if mode in ("LA", "La"):
        return picture.convert("LA").convert("L"), ["grey"]
    if mode in ("P", "PA", "RGBa"):  # by way of RGBA, as their transparency cannot be dropped at once
        return picture.convert("RGBA").convert("RGB"), ["palette"] * mode.startswith("P")
    return picture.convert("RGB"), ["other-colours"] * (not mode.startswith("RGB"))


def _is_deep(mode: str) -> bool:
    return mode.startswith("I") or mode == "F"


def _scaled_down(picture: Image.Image) -> tuple[Image.Image, list[str]]:
    """Greys of more than 8 bits; Pillow's own conversion cuts them off at 255, which makes 16 bits white and fractions black."""
    notes = ["float" if picture.mode == "F" else "16-bit"]
    if picture.mode.startswith("I;16"):
        table = ((np.arange(65536) * 255 + 32767) // 65535).astype(np.uint8)
        greys = [table[band] for band in _bands(picture)]
    else:
        brightest, finite = 0.0, True
        for band in _bands(picture):
            sound = np.isfinite(band)
            finite &= bool(sound.all())
            brightest = max(brightest, float(band.max(where=sound, initial=0)))
        notes += ["not-finite"] * (not finite)
        white = np.float32(_white(brightest))
        greys = [(np.nan_to_num(band / white, nan=0.0).clip(0, 1) * 255 + 0.5).astype(np.uint8) for band in _bands(picture)]
    scaled = Image.fromarray(np.concatenate(greys))
    inverted = getattr(picture, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO
    return ImageChops.invert(scaled) if inverted else scaled, notes


def _bands(picture: Image.Image) -> Iterator[NDArray[Any]]:
    """A few rows at a time: all at once would be held several times over."""
    for top in range(0, picture.height, 256):
        yield np.asarray(picture.crop((0, top, picture.width, min(top + 256, picture.height))))


def _white(brightest: float) -> float:
    """The usual range that holds the values without leaving most of itself empty, or else the brightest value."""
    fits = [white for white in RANGES if brightest <= white and (brightest > white / 16 or white == RANGES[0])]
    return fits[0] if fits else brightest


def _to_srgb(colours: Image.Image, profile: object, notes: list[str]) -> Image.Image:
    if colours.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return _converted(colours, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
    if profile:
        try:
            mode, transform = _transform(bytes(profile) if isinstance(profile, bytes) else b"", colours.mode)
            if transform is not None:
                converted = _converted(colours.convert(mode), transform)
                notes.append("icc-to-srgb")
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError):
            notes.append("icc-broken")
    return colours if colours.mode == "RGB" else colours.convert("RGB")


def _converted(colours: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    converted = ImageCms.applyTransform(colours, transform)
    assert converted is not None  # it is None only when it works in place
    return converted


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode that colours must have, and their way to sRGB; None when they are sRGB already. Kept, as building one takes 8 ms."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if mode == "L" and source.profile.xcolor_space.strip() == "RGB":
        mode = "RGB"
    # Relative colorimetric with black point compensation: colours inside both gamuts stay as they are, and black stays black.
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
    steps: Any = np.linspace(0, 255, 9).round().astype(np.uint8)
    probe = Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3)).convert(mode)
    moved = np.abs(np.asarray(_converted(probe, transform), np.int16) - np.asarray(probe.convert("RGB"), np.int16)).max()
    return mode, None if moved <= NEARLY_SAME else transform
