"""Pixels of any kind become 8-bit sRGB on a ground: depth, colour model, colour profile, transparency, in this order."""

import io
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageCms, ImageColor

RANGES = (1.0, 255.0, 65535.0)
"""What white may be where a format does not say: fractions, 8 bits and 16 bits."""
NEARLY_SAME = 2
"""A profile that moves no colour by more than this many of 255 levels is sRGB, whatever its name."""
SRGB_GAMMA, SRGB_COLOURS = 0.45455, (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
"""What a PNG says of sRGB in gAMA and cHRM (white, red, green, blue): its numbers are light to the power of that."""
D50 = (0.9642, 1.0, 0.8249)
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0
"""TIFF's tag of what a number means; Pillow heeds it for 8 bits only."""


def to_rgb(picture: Image.Image, ground: str) -> tuple[Image.Image, Image.Image | None, list[str]]:
    """The picture as RGB, its transparency unless it has none (L), and notes on what that took: codes of `sdlora.data.reasons`."""
    alpha = _alpha(picture)
    colours, notes = _eight_bits(picture)
    colours = _to_srgb(colours, picture.info, notes)
    if alpha is None or alpha.getextrema() == (255, 255):
        return (colours.copy() if colours is picture else colours), None, notes  # free of the file that it was read from
    notes += ["alpha-on-ground", *["fully-transparent"] * (alpha.getextrema() == (0, 0))]
    below = Image.new("RGB", colours.size, ImageColor.getrgb(ground)[:3])
    below.paste(colours, mask=alpha)
    return below, alpha, notes


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


def _to_srgb(colours: Image.Image, info: Mapping[Any, Any], notes: list[str]) -> Image.Image:
    if colours.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return _converted(colours, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
    profile, done, broken = info.get("icc_profile"), "icc-to-srgb", "icc-broken"
    try:
        if not profile and "gamma" in info and "srgb" not in info:
            done, broken = "png-gamma-to-srgb", "png-gamma-broken"
            profile = _profile(info["gamma"], info.get("chromaticity", SRGB_COLOURS))
        if profile:
            mode, transform = _transform(bytes(profile) if isinstance(profile, bytes) else b"", colours.mode)
            if transform is not None:
                converted = _converted(colours.convert(mode), transform)
                notes.append(done)
                return converted
    except (ImageCms.PyCMSError, OSError, ValueError, ArithmeticError, struct.error):
        notes.append(broken)
    return colours if colours.mode == "RGB" else colours.convert("RGB")


def _converted(colours: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    converted = ImageCms.applyTransform(colours, transform)
    assert converted is not None  # it is None only when it works in place
    return converted


def _profile(gamma: float, chromaticity: Sequence[float]) -> bytes:
    """What a PNG says in gAMA and cHRM as a colour profile (ICC.1:2001-04, matrix and curves); of sRGB's own nothing, as browsers do."""
    if np.abs(np.subtract([gamma, *chromaticity], [SRGB_GAMMA, *SRGB_COLOURS])).max() < 0.005:
        return b""
    if not 0.01 <= gamma <= 10:
        raise ValueError("no display has such a gamma")
    white, *primaries = [np.array([x / y, 1, (1 - x - y) / y]) for x, y in zip(chromaticity[::2], chromaticity[1::2], strict=True)]
    xyz = np.stack(primaries, 1)
    adapted = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D50) / (BRADFORD @ white)) @ BRADFORD
    columns = (adapted @ xyz @ np.diag(np.linalg.solve(xyz, white))).T
    parts = [
        (name, b"XYZ \0\0\0\0" + _fixed(place)) for name, place in zip((b"rXYZ", b"gXYZ", b"bXYZ", b"wtpt"), [*columns, D50], strict=True)
    ]
    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(256 / gamma))
    parts += [(name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")]
    parts += [(b"desc", b"desc\0\0\0\0" + struct.pack(">I", 1) + bytes(79)), (b"cprt", b"text\0\0\0\0\0\0\0\0")]
    start, table, body = 132 + 12 * len(parts), struct.pack(">I", len(parts)), b""
    for name, part in parts:
        padded = part + bytes(-len(part) % 4)
        table, body = table + struct.pack(">4sII", name, start + len(body), len(part)), body + padded
    head = struct.pack(">I4xI4s4s4s12x4s28x", start + len(body), 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp") + _fixed(D50) + bytes(48)
    return head + table + body


def _fixed(values: Sequence[float] | NDArray[Any]) -> bytes:
    return struct.pack(">3i", *(round(float(value) * 65536) for value in values))


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
