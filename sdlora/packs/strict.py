"""The header of a `.safetensors` file, judged to the last byte before anything is made of it.

The format: eight bytes for the header's length N (little-endian), N bytes of JSON, then the tensors' data without a gap. An entry says
`dtype`, `shape` and `data_offsets` (begin and end in the data). The library that reads tensors takes more than programs agree on:
duplicate keys, further fields, shapes of no element.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from sdlora.errors import UserError

MAX_HEADER, MAX_TENSORS, MAX_KEY, MAX_TEXT, MAX_AXES = 8 * 2**20, 20_000, 512, 1_000_000, 5
"""Bytes of header, tensors in a file, characters of a key and of a metadata value, axes of a tensor."""
FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
WIDTHS = {**FLOATS, "I8": 1, "U8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1}
"""Bytes of a number. What is not a float can only be an alpha or a switch."""
MISTAKEN = {
    b"PK\x03\x04": "a ZIP or a pickled checkpoint, which can run code and is never opened",
    b"\x80": "a pickle, which can run code and is never opened",
    b"version https://git-lfs": "a pointer to the file in Git LFS, not the file itself",
    b"<": "a web page, perhaps one that says why the download failed",
    b"{": "JSON",
}
"""How other things begin that go by the name of a pack."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def parse(content: bytes, where: object) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file by key, and its metadata. Raises `UserError` for any file that strays from the format."""
    length = int.from_bytes(content[:8], "little")
    if content[8:10] != b'{"' or not 2 <= length <= min(MAX_HEADER, len(content) - 8):
        other = next((said for start, said in MISTAKEN.items() if content.startswith(start)), "")
        if not other:
            other = f"its header would be {length} bytes long, of {len(content)} in all"
        raise refused(f"no safetensors file, but {other}" if "its header" not in other else f"no safetensors file: {other}", where)
    count = content.count(b'"data_offsets"', 8, 8 + length)
    if count > MAX_TENSORS:  # before anything is made of so many
        raise refused(f"it holds {count} tensors; 1 to {MAX_TENSORS} are sound", where)
    try:
        table = json.loads(content[8 : 8 + length].decode("utf-8"), object_pairs_hook=_once, parse_constant=_number)
        metadata = _metadata(table.pop("__metadata__", {}))
        entries = {key: _entry(key, value) for key, value in table.items()}
        _tile(entries.values(), len(content) - 8 - length)
    except RecursionError:
        raise refused("its header is nested too deep", where) from None
    except (ValueError, AttributeError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise refused(f"{error}", where) from None
    return entries, metadata


def refused(what: str, where: object) -> UserError:
    """The error of a file that is no pack."""
    return UserError("E-PACK-03", f"not a pack: {what}", where, "it may be cut short or changed: fetch it again")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different; which of two equal ones counts, readers do not agree on."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names something twice")
    return found


def _number(text: str) -> None:
    raise ValueError(f"its header holds {text}")


def _metadata(table: Any) -> dict[str, str]:
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise ValueError("its metadata are no table of texts")
    for key, value in table.items():
        if len(key) > MAX_KEY or len(value) > MAX_TEXT:
            raise ValueError(f'its metadata "{key[:40]}" are longer than {MAX_TEXT} characters')
        if "\0" in key + value or "<script" in (key + value).lower():
            raise ValueError(f'its metadata "{key[:40]}" hold what no text has: a NUL, or a script for whoever shows them in a page')
    return table


def _entry(key: str, value: Any) -> Entry:
    if not key.isprintable() or len(key) > MAX_KEY or not key or any(part in key for part in ("..", "/", "\\", ".__")):
        raise ValueError(f"a tensor is called {ascii(key)[:60]}")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{key} is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise ValueError(f"{key} is of the type {dtype!r:.20}, which no adapter is kept in")
    if not _counts(shape) or len(shape) > MAX_AXES or 0 in shape:
        raise ValueError(f"{key} has the shape {shape!r:.60}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * WIDTHS[dtype]:
        raise ValueError(f"{key} lies at {offsets!r:.60}, where {prod(shape)} numbers of {dtype} don't")
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _counts(value: Any) -> bool:
    """Whether it is a list of numbers from 0 on; a bool is none."""
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**48 for one in value)


def _tile(entries: Iterable[Entry], size: int) -> None:
    """Raise `ValueError` unless the tensors lie in the data without gap or overlap, up to its end."""
    placed = sorted((entry.begin, entry.end) for entry in entries)
    if not placed or len(placed) > MAX_TENSORS:
        raise ValueError(f"it holds {len(placed)} tensors; 1 to {MAX_TENSORS} are sound")
    at = 0
    for begin, end in placed:
        if begin != at:
            raise ValueError(f"its tensors overlap or leave a gap at byte {min(begin, at)} of the data")
        at = end
    if at != size:
        raise ValueError(f"its tensors end at byte {at} of the data, which has {size}")
