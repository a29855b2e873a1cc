"""Captions for pictures that have none: every picture is read first, then each caption is written as soon as it is made.

It goes where a sample will find it: into the file that says it now if that is a `.txt` or a `metadata.jsonl`; for a picture without a
caption into the nearest `metadata.jsonl`, and where there is none, or a file that counts before it, into a `.txt` beside the picture.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from PIL import Image

from sdlora import captioner, devices, safeio
from sdlora.data import tables, texts
from sdlora.data.layouts import Picture, understand
from sdlora.data.pixels import UnreadableError, read_picture
from sdlora.data.scan import DECODERS, listed
from sdlora.data.walk import SUFFIXES, Found, shown, walk
from sdlora.errors import UserError

JSONL = "metadata.jsonl"
Written = tuple[Path, str]  # a picture, and its new caption; empty where there was nothing to say and nothing is written


@dataclass(frozen=True)
class Captioning:
    """How a folder gets its captions."""

    by: str  # a file in `sdlora/captioners`
    model: str = ""  # a folder or a hub id; empty: the captioner's own
    prefix: str = ""  # stands before every caption, as it is typed
    overwrite: bool = False  # pictures that have a caption get a new one


def caption(folder: Path, how: Captioning) -> tuple[int, Iterator[Written]]:
    """How many pictures are left as they are, and the others as they get their captions. Raises `UserError` before anything is written."""
    kind = captioner.find(how.by, how.model)
    found = walk(folder)
    pictures = _readable(folder, found)
    todo = [picture for picture in pictures if how.overwrite or picture.source is None]
    rows = {one.path.parent: one.path for one in found if one.path.name.lower() == JSONL}
    return len(pictures) - len(todo), _write([(picture, _place(picture, rows)) for picture in todo], kind, how)


def read(folder: Path) -> list[tuple[Path, str]]:
    """Every picture of a folder with its caption, as far as it has one. Raises `UserError`."""
    return [(picture.path, " / ".join(picture.captions)) for picture in understand(folder, walk(folder)).pictures]


def put(folder: Path, said: Mapping[Path, str]) -> None:
    """Give some pictures of a folder the captions that were typed for them, each where a sample finds it. Raises `UserError`."""
    found = walk(folder)
    rows = {one.path.parent: one.path for one in found if one.path.name.lower() == JSONL}
    for picture in understand(folder, found).pictures:
        if picture.path in said:
            place, text = _place(picture, rows), " ".join(said[picture.path].split())
            if place.name.lower() == JSONL:
                table = Rows(texts.current(place) or "")
                table.put(tables.key(picture.path.relative_to(place.parent).as_posix()), text, _shares_its_name(picture))
                text = table.text()
            else:
                text += "\n"
            safeio.write(place, text)


def _readable(folder: Path, found: Sequence[Found]) -> Sequence[Picture]:
    """The pictures of a folder, of which each can be read, with its caption if it has one."""
    layout = understand(folder, found)
    if layout.problems:
        what = f"{len(layout.problems)} faults in captions: {listed(layout.problems)}; nothing is written"
        raise UserError("E-DATA-04", what, folder, "mend or remove them")
    with ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1)) as pool:
        faults = list(pool.map(_fault, (picture.path for picture in layout.pictures)))
    bad = [(one.path, ", ".join(one.notes)) for one in layout.lost]
    bad += [(picture.path, fault) for picture, fault in zip(layout.pictures, faults, strict=True) if fault]
    if bad:
        lines = [f"{shown(path.relative_to(folder))}: {fault}" for path, fault in sorted(bad)]
        what = f"{len(bad)} of {len(faults) + len(layout.lost)} pictures cannot be read: {listed(lines)}; nothing is written"
        raise UserError("E-DATA-03", what, folder, "mend or remove them")
    if not layout.pictures:
        raise UserError("E-DATA-02", "no usable picture in this folder", folder, f"pictures end in {', '.join(sorted(SUFFIXES))}")
    return layout.pictures


def _fault(path: Path) -> str:
    try:
        read_picture(path)
    except UnreadableError as error:
        return str(error)
    return ""


def _place(picture: Picture, rows: dict[Path, Path]) -> Path:
    """The file for a picture's caption; `rows` has the `metadata.jsonl` of each folder with one."""
    path, source = picture.path, picture.source
    place = source or next((rows[parent] for parent in path.parents if parent in rows), None)
    if place and place.name.lower() == JSONL:
        return place
    alone = not _shares_its_name(picture)
    if source and source.suffix.lower() == ".txt" and (alone or source.stem == path.name):
        return source
    return path.with_suffix(".txt") if alone else path.with_name(f"{path.name}.txt")


def _shares_its_name(picture: Picture) -> bool:
    return "same-stem" in picture.notes


def _write(todo: Sequence[tuple[Picture, Path]], kind: ModuleType, how: Captioning) -> Iterator[Written]:
    known = {place: texts.current(place) for _, place in todo}
    rows = {place: Rows(known[place] or "") for place in known if place.name.lower() == JSONL}
    if not todo:
        return
    model = captioner.load(kind, how.model, *devices.for_pictures())
    for picture, place in todo:
        (said,) = texts.clean([f"{how.prefix} {model.caption(picture.path, _picture(picture.path))}"]).captions or ("",)
        if said:
            if place in rows:
                rows[place].put(tables.key(picture.path.relative_to(place.parent).as_posix()), said, _shares_its_name(picture))
            after = rows[place].text() if place in rows else f"{said}\n"
            if texts.current(place) != known[place]:
                what = "this file has changed since its pictures were looked through; it stays as it is"
                raise UserError("E-DATA-08", what, place, "start again: what has a caption by now is left alone")
            safeio.write(place, after)
            known[place] = after
        yield picture.path, said


def _picture(path: Path) -> Image.Image:
    try:
        return read_picture(path)
    except UnreadableError as error:
        raise UserError(
            "E-DATA-03", f"this picture can be read no more: {error}", path, "start again: what has a caption is kept"
        ) from None


class Rows:
    """The lines of a `metadata.jsonl`, of which those that are given a caption change, in that field alone."""

    def __init__(self, text: str) -> None:
        self.parts = re.split(r"(\r\n|\r|\n)", text)  # lines and the breaks between them in turn
        self.lines = {tables.key(json.loads(line)["file_name"]): i for i, line in enumerate(self.parts) if line.strip()}

    def put(self, name: str, caption: str, shares_its_name: bool) -> None:
        """Give a picture its caption; it has a row under its name, under its name without the ending if that is its alone, or a new one."""
        stem = tables.key(str(Path(name).with_suffix("")))
        place = self.lines.get(name, None if shares_its_name else self.lines.get(stem))
        if place is None:
            if self.parts[-1]:
                self.parts += ["\n", ""]
            place = self.lines[name] = len(self.parts) - 1
            self.parts += ["\n", ""]
        row = json.loads(self.parts[place] or json.dumps({"file_name": name}))
        row[next((column for column in tables.COLUMNS if column in row), tables.COLUMNS[0])] = caption
        line = json.dumps(row, ensure_ascii=False)
        self.parts[place] = re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", line)

    def text(self) -> str:
        return "".join(self.parts)
