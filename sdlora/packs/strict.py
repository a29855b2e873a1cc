"""The header of a `.safetensors` file, judged to the last byte before anything is made of it.

The format: eight bytes for the header's length N (little-endian), N bytes of JSON, then the tensors' data without a gap. An entry says
`dtype`, `shape` and `data_offsets` (begin and end in the data). The library that reads tensors takes more than programs agree on:
duplicate keys, further fields, shapes of no element.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from sdlora.errors import UserError
from sdlora.packs.lookalikes import AGAIN, OTHER, lookalike

MAX_HEADER = 100_000_000
"""Bytes of a header: beyond it safetensors itself reads none."""
MAX_TENSORS, MAX_FIELDS, MAX_KEY, MAX_AXES = 20_000, 10_000, 512, 5
"""Tensors in a file, fields of its metadata, characters of a key, axes of a tensor."""
MAX_WORDS = 1000
"""Characters of a field that is a name or a trigger: what is longer is none, and would be looked up, tokenized and shown all the same."""
MAX_STRINGS, MAX_MARKS = 5 * MAX_TENSORS + 2 * MAX_FIELDS, 8 * 2**20
"""JSON's strings in a header, and bytes of it outside of them: each costs many times its length in memory when it is read. A long value
costs its own length."""
FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
WIDTHS = {**FLOATS, "I8": 1, "U8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1}
"""Bytes of a number. What is not a float can only be an alpha or a switch."""
UNREAD = re.compile(r"F[468]_E\w+|F4|U16|U32|U64|C64")
"""Numbers that the format knows and that are not read here."""
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
"""A string in JSON; one that never ends goes on to the end, so that no byte is looked at twice."""
REMADE = "programs do not agree on such a file: load it with the program that wrote it and save it anew, or ask for another"


class FormatError(Exception):
    """What is wrong with a file, and what to do about it."""

    def __init__(self, what: str, todo: str = REMADE, code: str = "E-PACK-03") -> None:
        super().__init__(what)
        self.todo, self.code = todo, code


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def parse(content: bytes, where: object) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file by key, and its metadata. Raises `UserError` for any file that strays from the format."""
    try:
        return read_header(content)
    except FormatError as error:
        raise refused(str(error), where, error.todo, error.code) from None


def read_header(content: bytes) -> tuple[dict[str, Entry], dict[str, str]]:
    """The same for those who have more to say of what is wrong. Raises `FormatError`."""
    length = _header_length(content)
    table = _table(content, length)
    metadata = table.pop("__metadata__", {})
    check_metadata(metadata)
    entries = {key: _entry(key, value) for key, value in table.items()}
    _tile(entries.values(), len(content) - 8 - length, len(content))
    return entries, metadata


def refused(what: str, where: object, todo: str = REMADE, code: str = "E-PACK-03") -> UserError:
    """The error of a file that is no pack, or is none that can be read."""
    return UserError(code, what if what.startswith("not a pack") else f"this pack cannot be read: {what}", where, todo)


def size_of(text: str) -> int:
    """Bytes that a text takes in a header between its quotes: UTF-8, in which quotes, backslashes and control characters are escaped."""
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass")) - 2


def check_metadata(table: Any) -> None:
    """Raise `FormatError` unless it is a table of texts, each of which every program can read and show."""
    if not isinstance(table, dict):
        raise FormatError(f"its metadata are no table, but {_called(table)}")
    if len(table) > MAX_FIELDS:
        raise FormatError(f"its metadata have {len(table)} fields, of which at most {MAX_FIELDS} are read")
    for key, value in table.items():
        field = f'its metadata field "{ascii(key[:40])[1:-1]}"'
        if not isinstance(value, str):
            raise FormatError(f"{field} holds {_called(value)}, where the format has text alone")
        if len(key) > MAX_KEY:
            raise FormatError(f"{field} has a name of {len(key)} characters")
        check_text(key, field)
        check_text(value, field)


def check_text(text: str, called: str) -> None:
    """Raise `FormatError` for what no text in a header may hold; `called` names the text."""
    if "\0" in text:
        raise FormatError(f"{called} holds a NUL, which no text has")
    if re.search("<script", text, re.IGNORECASE):
        raise FormatError(f"{called} holds a script for whoever shows it in a page")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise FormatError(f"{called} holds half of a character (a lone surrogate), which UTF-8 has not")


def check_key(key: str) -> None:
    """Raise `FormatError` for what no tensor may be called."""
    if not key.isprintable() or len(key) > MAX_KEY or not key or any(part in key for part in ("..", "/", "\\", ".__")):
        raise FormatError(f"a tensor is called {key[:60]!a}")


def _header_length(content: bytes) -> int:
    """Raises `FormatError` if this is no safetensors file, or does not hold the whole of its header."""
    said, rest = int.from_bytes(content[:8], "little"), len(content) - 8
    if content and rest < 2:
        raise FormatError(f"it is cut short: it has {len(content)} bytes", AGAIN)
    if content[8:10] != b'{"' or said > MAX_HEADER:
        if said <= MAX_HEADER and content[8:9] in (b"{", b" ", b"\t", b"\n", b"\r"):
            raise FormatError('its header does not begin with {", by which programs know a pack')
        if other := lookalike(content):
            raise FormatError(f"not a pack: this file is {other.what}", other.todo)
    if content[8:10] != b'{"':
        raise FormatError("not a pack: this is no safetensors file, and like no other kind of file that is known", OTHER)
    if not 2 <= said <= MAX_HEADER:
        todo = f"it is damaged, or its metadata are longer than programs read: {AGAIN}"
        raise FormatError(f"its header would be {said} bytes long, where 2 to {MAX_HEADER} are read", todo)
    if said > rest:
        raise FormatError(f"it is cut short: its header alone has {said} bytes, and {rest} are there", AGAIN)
    return said


def _table(content: bytes, length: int) -> dict[str, Any]:
    """The header's JSON, read only where that takes bounded memory. Raises `FormatError`."""
    count = content.count(b'"data_offsets"', 8, 8 + length)
    if count > MAX_TENSORS:
        raise _too_many(count)
    header = memoryview(content)[8 : 8 + length]
    _check_extent(header)
    try:
        table = json.loads(str(header, "utf-8"), object_pairs_hook=_once, parse_constant=_number)
    except RecursionError:
        raise FormatError("its header is nested too deep", AGAIN) from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are
        raise FormatError(f"its header is no JSON: {str(error)[:200]}", f"it is damaged: {AGAIN}") from None
    if not isinstance(table, dict):
        raise FormatError(f"its header is no table, but {_called(table)}")
    return table


def _check_extent(header: memoryview) -> None:
    """Raise `FormatError` for what would take many times its length in memory."""
    if len(header) <= MAX_MARKS:
        return
    at = marks = 0
    for strings, found in enumerate(STRING.finditer(header)):
        marks, at = marks + found.start() - at, found.end()
        if strings >= MAX_STRINGS or marks > MAX_MARKS:
            raise FormatError("its header is made of more parts than any pack's")
    if marks + len(header) - at > MAX_MARKS:
        raise FormatError("its header is made of more parts than any pack's")


def _too_many(count: int) -> FormatError:
    return FormatError(f"it holds {count} tensors, and a LoRA at most {MAX_TENSORS}", f"it is another model, or several: {OTHER}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different; which of two equal ones counts, readers do not agree on."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise FormatError(f"its header names {key[:60]!a} twice")
        found[key] = value
    return found


def _number(text: str) -> None:
    raise FormatError(f"its header holds {text}, which JSON has not")


def _called(value: Any) -> str:
    """What a value of JSON is, in a word."""
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a table", str: "a text"}
    return names.get(type(value), "null")


def _entry(key: str, value: Any) -> Entry:
    check_key(key)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{key} is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if isinstance(dtype, str) and UNREAD.fullmatch(dtype):
        todo = "get it in fp16, bf16 or fp32, or save it so with the program that wrote it"
        raise FormatError(f"{key} is kept as {dtype[:20]}, a kind of number that is not read here", todo, "E-PACK-37")
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise FormatError(f"{key} is of the type {dtype!r:.20}, which the format does not know")
    if not _counts(shape) or len(shape) > MAX_AXES or 0 in shape:
        raise FormatError(f"{key} has the shape {shape!r:.60}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * WIDTHS[dtype]:
        raise FormatError(f"{key} lies at {offsets!r:.60}, where {prod(shape)} numbers of {dtype} don't", f"it is damaged: {AGAIN}")
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _counts(value: Any) -> bool:
    """Whether it is a list of numbers from 0 on; a bool is none."""
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**48 for one in value)


def _tile(entries: Iterable[Entry], size: int, whole: int) -> None:
    """Raise `FormatError` unless tensors fill the data without gap or overlap; the file has `whole` bytes, of them `size` of data."""
    placed = sorted((entry.begin, entry.end) for entry in entries)
    if not placed:
        raise FormatError("not a pack: it holds no tensor", OTHER)
    if len(placed) > MAX_TENSORS:
        raise _too_many(len(placed))
    at = 0
    for begin, end in placed:
        if begin != at:
            raise FormatError(f"its tensors overlap or leave a gap at byte {min(begin, at)} of the data")
        at = end
    if at > size:
        raise FormatError(f"it is cut short: {at - size} of its {whole + at - size} bytes are missing", AGAIN)
    if at < size:
        todo = f"something was added to the file, and no program reads it so: {AGAIN}"
        raise FormatError(f"{size - at} bytes follow its last tensor and belong to none", todo)
