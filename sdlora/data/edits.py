"""Changes to many caption files at once: planned and shown first, then written as they were shown."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdlora import safeio
from sdlora.data import layouts, texts
from sdlora.data.captions import tags_of
from sdlora.data.walk import walk
from sdlora.errors import UserError

Change = tuple[Path, str, str]  # a caption file, its text before and after


@dataclass(frozen=True)
class Edit:
    """What is done to each caption, in this order."""

    find: str = ""  # any part of it, as it is written
    replace: str = ""  # what stands there instead
    remove: str = ""  # one of its comma-separated tags, in upper or lower case
    add: str = ""  # a last tag, unless it is one already


def edit(caption: str, change: Edit) -> str:
    """One caption with the change made; what the change does not touch stays as it is."""
    found = bool(change.find) and change.find in caption
    text = caption.replace(change.find, change.replace) if found else caption
    tags = [tag for tag in tags_of(text) if not change.remove or tag.casefold() != change.remove.casefold()]
    if (found and not change.replace) or len(tags) < len(tags_of(text)):  # no comma is left without its tag
        text = ", ".join(tags)
    if change.add and change.add.casefold() not in (tag.casefold() for tag in tags):
        text = f"{text}, {change.add}" if text.strip() else change.add
    return text


def plan(folder: Path, change: Edit) -> list[Change]:
    """What would become of the caption files of the folder's pictures, those only that would change. Raises `UserError`."""
    if not (change.find or change.remove or change.add):
        raise UserError("E-DATA-09", "nothing is to be changed", folder, "say what to find, add or remove")
    changes, problems = [], []
    for path in layouts.caption_files(walk(folder)):
        try:
            before = texts.read(path)
        except texts.BadTextError as error:
            problems.append(f"{path.name}: {error}")
            continue
        after = "".join(edit(part, change) if i % 2 == 0 and (part.strip() or i == 0) else part for i, part in enumerate(_lines(before)))
        if after != before:
            changes.append((path, before, after))
    if problems:
        raise UserError("E-DATA-04", f"{len(problems)} captions cannot be read: {'; '.join(problems)}", folder, "mend them first")
    return changes


def apply(changes: Sequence[Change]) -> None:
    """Write a plan, each file whole or not at all; nothing at all if a file is no longer what it was when the plan was made."""
    for path, before, _ in changes:
        if texts.current(path) != before:
            raise UserError("E-DATA-08", "this caption has changed since the plan was made; nothing is written", path, "plan again")
    for path, _, after in changes:
        safeio.write(path, after)


def _lines(text: str) -> list[str]:
    """Lines and the breaks between them in turn."""
    return re.split(r"(\r\n|\r|\n)", text)
