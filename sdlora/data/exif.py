"""Which way up a picture is, from the metadata in its file: EXIF, or XMP without one.

Read here and not by Pillow, which warns on standard error of metadata that is broken, or fails on it. EXIF 2.32, section 4.6.
"""

import re
import struct
from collections.abc import Mapping
from typing import Any

UPRIGHT, KNOWN = 1, range(1, 9)
ORIENTATION, SHORT = 0x0112, 3


def orientation(info: Mapping[Any, Any]) -> tuple[int, list[str]]:
    """One of EXIF's eight orientations, and notes on metadata that is broken; `info` is a Pillow picture's."""
    content = info.get("exif") or _from_text(info.get("Raw profile type exif"))
    value, notes = _first_folder(content.removeprefix(b"Exif\0\0")) if content else (None, [])
    xmp = info.get("xmp")
    if isinstance(xmp, bytes):
        if not _is_text(xmp):
            notes.append("xmp-broken")
        if value is None and (match := re.search(rb'tiff:Orientation(?:="|>)(\d+)', xmp)):
            value = int(match[1])
    turned, unknown = checked(value)
    return turned, [*notes, *unknown]


def checked(value: object) -> tuple[int, list[str]]:
    """The orientation if it is one of the eight, and a note if it is not."""
    if value is None:
        return UPRIGHT, []
    return (value, []) if isinstance(value, int) and value in KNOWN else (UPRIGHT, ["exif-orientation-unknown"])


def _first_folder(content: bytes) -> tuple[int | None, list[str]]:
    """The orientation in the first image file directory, as far as that can be read."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(content[:4])
    if order is None or len(content) < 8:
        return None, ["metadata-broken"]
    (start,) = struct.unpack_from(f"{order}I", content, 4)
    if start + 2 > len(content):
        return None, ["metadata-broken"]
    (count,) = struct.unpack_from(f"{order}H", content, start)
    fit = min(count, (len(content) - start - 2) // 12)
    for place in range(start + 2, start + 2 + 12 * fit, 12):
        tag, kind, number = struct.unpack_from(f"{order}HHI", content, place)
        if tag == ORIENTATION and kind == SHORT and number == 1:
            return struct.unpack_from(f"{order}H", content, place + 8)[0], ["metadata-broken"] * (fit < count)
    return None, ["metadata-broken"] * (fit < count)


def _from_text(text: object) -> bytes:
    """EXIF as older programs put it into a PNG: a name, a length and hexadecimal lines."""
    try:
        return bytes.fromhex("".join(str(text).split("\n")[3:])) if text else b""
    except ValueError:
        return b""


def _is_text(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
