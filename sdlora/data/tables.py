"""Captions of many pictures in one file: `metadata.jsonl` and `metadata.csv` as Hugging Face's imagefolder has them, `captions.json`."""

import csv
import io
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from unicodedata import normalize

from sdlora.data import texts
from sdlora.data.texts import Said
from sdlora.data.walk import shown

COLUMNS = ("text", "caption", "prompt")
"""Where a row of metadata may have its caption; of several the first that is there counts."""


@dataclass
class Table:
    """What such a file says, and all that is wrong with it."""

    path: Path
    names_all: bool  # metadata lists every picture below its folder; captions.json need not
    said: dict[str, Said] = field(default_factory=dict)  # by name relative to the file's own folder, as `key` writes it
    problems: list[str] = field(default_factory=list)

    def enter(self, where: str, name: Any, value: Any) -> None:
        """One entry; `where` says where in the file it stands."""
        wrong = _wrong_name(name)
        captions = [] if value is None else value if isinstance(value, list) else [value]
        if wrong:
            self.problems.append(f"{where}: {wrong}")
        elif not all(isinstance(caption, str) for caption in captions):
            self.problems.append(f"{where}: the caption of {shown(name)} is {json.dumps(value)[:40]}, not text")
        elif key(name) in self.said:
            self.problems.append(f"{where}: {shown(name)} has an entry before this one")
        else:
            self.said[key(name)] = Said(()) if value is None else texts.clean(captions)


def read(path: Path) -> Table:
    """The captions in a file of one of the names in `READERS`."""
    table = Table(path, names_all=path.name.lower() != "captions.json")
    try:
        READERS[path.name.lower()](table, texts.read(path))
    except texts.BadTextError as error:
        table.problems.append(str(error))
    return table


def key(name: str) -> str:
    """A picture's name as tables are searched by it: with forward slashes, in one Unicode form."""
    return normalize("NFC", PurePosixPath(name.replace("\\", "/")).as_posix())


def _jsonl(table: Table, text: str) -> None:
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if line.strip():
            _row(table, f"line {number}", *_parsed(line))


def _csv(table: Table, text: str) -> None:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in rows:
            short = None in row.values() or None in row
            _row(table, f"line {rows.line_num}", row, "not as many fields as the first line names" if short else "")
    except csv.Error as error:
        table.problems.append(f"line {rows.line_num}: {error}")


def _captions(table: Table, text: str) -> None:
    entries, wrong = _parsed(text)
    if wrong or not isinstance(entries, dict):
        table.problems.append(wrong or "not an object of the form {picture: caption}")
        return
    for name, value in entries.items():
        table.enter(f'"{shown(name)}"', name, value)


READERS = {"captions.json": _captions, "metadata.jsonl": _jsonl, "metadata.csv": _csv}


def _row(table: Table, where: str, row: Any, wrong: str) -> None:
    if not wrong and not isinstance(row, dict):
        wrong = "not an object"
    if not wrong and "file_name" not in row:
        wrong = "no file_name"
    if wrong:
        table.problems.append(f"{where}: {wrong}")
    else:
        table.enter(where, row["file_name"], next((row[column] for column in COLUMNS if column in row), None))


def _parsed(text: str) -> tuple[Any, str]:
    """A JSON value, and what is wrong with it."""
    try:
        return json.loads(text, object_pairs_hook=_once), ""
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg} before {text[error.pos : error.pos + 20]!r}"
    except (ValueError, RecursionError) as error:
        return None, f"not sound JSON: {error}"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f'"{shown(name)}" stands in it twice')
    return table


def _wrong_name(name: Any) -> str:
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        return f"{json.dumps(name)[:40]} is no file's name"
    parts = name.replace("\\", "/").split("/")
    if not parts[0] or re.fullmatch("[A-Za-z]:.*", name):
        return f"{shown(name)} is an absolute path; names are relative to this file's folder"
    return f"{shown(name)} leads out of this file's folder" if ".." in parts else ""
