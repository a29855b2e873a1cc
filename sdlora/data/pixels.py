"""Any picture file becomes an upright sRGB picture, with notes on what that took; what is unsafe or damaged is refused with a reason."""

import errno
import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from types import MappingProxyType
from typing import Any

from PIL import Image, ImageChops, UnidentifiedImageError, features
from PIL.ImageFile import ImageFile

from sdlora.data import colours, exif
from sdlora.data.walk import FORMATS

MAX_PIXELS = 64_000_000
MAX_BYTES = 600_000_000
"""No picture of the largest size is stored in more: 64 million pixels of 4 × 16 bits are 512 MB."""
MIN_SIDE_PX = 16
"""A shorter side holds nothing to learn, and a picture of such a side is enlarged more than fourfold even for the smallest base."""
PNG_END, JPEG_START, JPEG_END = b"IEND\xaeB`\x82", b"\xff\xd8\xff", b"\xff\xd9"
TURNS: Mapping[int, Image.Transpose] = MappingProxyType(
    {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
)
"""What puts a picture upright, by EXIF's orientation."""
BITS_PER_SAMPLE, ORIENTATION = 258, 274  # tags of TIFF
SIGNATURES = (b"\x89PNG\r\n\x1a\n", JPEG_START, b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
FAILURES = (
    OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, RuntimeError, AssertionError,
    struct.error, zlib.error,
)  # fmt: skip
"""What Pillow raises on files that are damaged, by design and by oversight."""


class UnreadableError(Exception):
    """One picture or its caption cannot be read; the message says why, and `code` is one of `sdlora.data.reasons`."""

    def __init__(self, why: str, code: str = "unreadable") -> None:
        super().__init__(why)
        self.code = code


@dataclass(frozen=True)
class Decoded:
    picture: Image.Image  # RGB, sRGB, upright
    notes: tuple[str, ...]  # codes of `sdlora.data.reasons`
    alpha: Image.Image | None = None  # L, 255 where nothing is seen through; none where that is everywhere


def read_picture(path: Path, ground: str = "white") -> Image.Image:
    """The picture as RGB: turned as the camera noted, transparent parts laid on `ground`. Raises `UnreadableError`."""
    return decode(path, ground).picture


def decode(path: Path, ground: str = "white") -> Decoded:
    """The picture as it is meant to be seen, and what that took. Raises `UnreadableError`."""
    content = _read(path)
    try:
        formats = sorted({*FORMATS.values()} - ({"AVIF"} if not features.check("avif") else set()))
        opened = Image.open(io.BytesIO(content + _look_ahead(content)), formats=formats)
        _refuse_extremes(opened)
        notes = _about_the_file(opened, path.suffix.lower(), content)
        tag = _tiff(opened).get(ORIENTATION)
        opened.load()
    except UnidentifiedImageError:
        if content.startswith(SIGNATURES):
            raise UnreadableError("its first part is cut off or damaged", "damaged") from None
        raise UnreadableError("not a picture that can be read here", "not-a-picture") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableError(f"more than {MAX_PIXELS // 10**6} megapixels", "too-large") from None
    except FAILURES as error:
        if "MAX_TEXT" in str(error):
            raise UnreadableError("its text parts unpack to more than is safe", "too-much-text") from None
        raise UnreadableError(f"cut off or damaged ({str(error) or type(error).__name__})", "damaged") from None
    turned, broken = exif.checked(tag) if _tiff(opened) else exif.orientation(opened.info)  # known only now: it may follow the pixels
    notes += ["exif-turned"] * (turned != exif.UPRIGHT) + broken
    picture, alpha, more = colours.to_rgb(_as_stored(opened, content), ground)
    if turned != exif.UPRIGHT and not _tiff(opened):  # Pillow has turned a TIFF as it read it
        picture, alpha = picture.transpose(TURNS[turned]), alpha and alpha.transpose(TURNS[turned])
    return Decoded(picture, (*notes, *more), alpha)


def _read(path: Path) -> bytes:
    """The file at once, so that what is checked is what is decoded; asked of the file system first, as reading a pipe waits for ever."""
    try:
        status = path.stat()
        if not S_ISREG(status.st_mode):
            raise UnreadableError("not a regular file", "not-a-file")
        if status.st_size > MAX_BYTES:
            raise UnreadableError(f"its {status.st_size // 10**6} MB are more than a picture can need", "too-large")
        content = path.read_bytes()
    except OSError as error:
        codes = {errno.ENOENT: "dangling-link", errno.ELOOP: "link-loop", errno.EACCES: "no-permission"}
        raise UnreadableError(error.strerror or str(error), codes.get(error.errno or 0, "unreadable")) from None
    if not content:
        raise UnreadableError("the file is empty", "empty-file")
    return content


def _refuse_extremes(opened: Image.Image) -> None:
    """By the header alone, before any pixel takes memory."""
    shape = f"{opened.width} x {opened.height} px"
    if opened.width * opened.height > MAX_PIXELS:
        raise UnreadableError(f"{shape} is more than {MAX_PIXELS // 10**6} megapixels", "too-large")
    if min(opened.size) < MIN_SIDE_PX:
        raise UnreadableError(f"{shape} is too small: a side has at least {MIN_SIDE_PX} px", "too-small")


def _tiff(opened: Image.Image) -> Mapping[int, Any]:
    """A TIFF's tags; of all others nothing."""
    tags: Mapping[int, Any] = getattr(opened, "tag_v2", {})
    return tags


def _about_the_file(opened: ImageFile, suffix: str, content: bytes) -> list[str]:
    """Notes on the file itself; before its pixels are loaded, as asking a GIF for more frames drops them."""
    kind = "JPEG" if opened.format == "MPO" else opened.format
    notes = ["wrong-extension"] * (FORMATS.get(suffix, kind) != kind)
    if getattr(opened, "is_animated", False):
        notes.append({"TIFF": "multi-page", "JPEG": "several-pictures"}.get(str(kind), "animation-first-frame"))
    if kind in ("PNG", "JPEG"):
        behind = _behind(content, str(kind))
        notes += ["no-end-marker"] * (behind is None) + ["data-behind"] * bool(behind and opened.format != "MPO")
    if opened.mode.startswith("RGB") and (_png_depth(opened, content) == 16 or 16 in _tiff(opened).get(BITS_PER_SAMPLE, ())):
        notes.append("16-bit")  # of the colours Pillow itself keeps the upper 8 bits; of the greys it does not
    return notes


def _behind(content: bytes, kind: str) -> bytes | None:
    """What follows the end of a picture in its file but padding; None when the file has no such end."""
    mark, start = (PNG_END, 0) if kind == "PNG" else (JPEG_END, _start_of_scan(content))
    end = content.find(mark, start)
    return None if end < 0 else content[end + len(mark) :].strip(b"\0")


def _look_ahead(content: bytes) -> bytes:
    """What libjpeg wants to see behind a JPEG's last pixels if the end mark is missing; less than a block of 8 x 8 pixels could use."""
    return bytes(16) if content.startswith(JPEG_START) and _behind(content, "JPEG") is None else b""


def _start_of_scan(content: bytes) -> int:
    """Where a JPEG's pixels start: behind its segments, which may hold a smaller JPEG with an end mark of its own."""
    place = 2
    while content[place : place + 1] == b"\xff" and content[place + 1 : place + 2] != b"\xda":
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return place


def _png_depth(opened: Image.Image, content: bytes) -> int:
    """Bits of a channel as the file's header says; Pillow's mode tells it of greys only."""
    return content[24] if opened.format == "PNG" else 8


def _as_stored(opened: Image.Image, content: bytes) -> Image.Image:
    """The pixels as the file means them, where Pillow takes them otherwise."""
    if opened.format in ("JPEG", "MPO") and opened.mode == "CMYK" and "adobe" not in opened.info:
        return ImageChops.invert(opened)  # only Adobe's are stored inverted; Pillow takes all for Adobe's
    depth, key = _png_depth(opened, content), opened.info.get("transparency")
    if depth == 16 and isinstance(key, tuple):
        opened.info["transparency"] = tuple(part >> 8 for part in key)  # as the colours that it is compared with
    elif depth < 8 and isinstance(key, int) and opened.mode == "L":
        opened.info["transparency"] = key * 255 // (2**depth - 1)
    return opened
