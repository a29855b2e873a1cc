"""What the files of a folder are to one another: pictures, their captions, masks and repeats, without any configuration.

A caption comes from the first of these that says something: `NAME.txt`, `NAME.caption`, then the tables `captions.json`,
`metadata.jsonl`, `metadata.csv` (those nearest to the picture first), and last the folder's name, if it has kohya's form `3_name class`.
`NAME` is the picture's with or without its ending.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdlora.data import reasons, tables, texts
from sdlora.data.tables import Table
from sdlora.data.texts import Said
from sdlora.data.walk import SUFFIXES, Found, shown

TEXTS = (".txt", ".caption")
MASK = "-masklabel"
KOHYA = re.compile(r"([1-9]\d{0,2})_(.+)")  # "2019_summer" is a year and "01_front" a place in an order: neither means repeats
UNREAD = frozenset({".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".tga", ".ico", ".dng", ".cr2", ".nef", ".arw", ".raf"})


@dataclass(frozen=True)
class Picture:
    """A picture file and all that its folder says about it."""

    path: Path
    captions: tuple[str, ...]
    mask: Path | None
    repeats: int
    notes: tuple[str, ...]
    source: Path | None  # the file that says the captions; none where the folder's name does, or nothing


@dataclass(frozen=True)
class Layout:
    """A folder as it was understood; every file in it that has to do with pictures is in one of these."""

    pictures: Sequence[Picture]
    lost: Sequence[Found]  # named as pictures, and cannot be read
    strays: Sequence[Found]  # captions and masks of no picture, and formats that are not read
    problems: Sequence[str]  # to be put right before anything is used
    unlisted: Sequence[str]  # the same, but a caption for a picture puts it right


def understand(root: Path, found: Sequence[Found]) -> Layout:
    """Sort out the files below `root`; of all of them only text is opened."""
    roles: dict[str, list[Found]] = defaultdict(list)
    for one in found:
        roles[_role(one)].append(one)
    keys = {key for one in [*roles["picture"], *roles["lost"]] for key in _keys(one.path)}
    masks = {_mask_key(one.path): one.path for one in roles["mask"]}
    listed = [tables.read(one.path) for one in roles["table"]]
    sources, problems = _sources(root, [one.path for one in roles["text"] if _keys(one.path)[1] in keys], listed)
    said = {one.path: _of(one.path, sources) for one in roles["picture"]}
    problems += _unknown(root, listed, keys)
    some = any(source.captions for each in said.values() for source in each)
    strays = [one.noting("orphan-caption") for one in roles["text"] if _keys(one.path)[1] not in keys]
    strays += [one.noting("orphan-mask") for one in roles["mask"] if _mask_key(one.path) not in keys]
    strays += [one.noting("format-not-read") for one in roles["unread"]]
    strays += roles["odd"]
    return Layout(
        [_picture(root, one, said[one.path], masks.get(_keys(one.path)[1]), some) for one in roles["picture"]],
        roles["lost"],
        sorted(strays, key=lambda one: one.path),
        problems,
        list(_unlisted(root, listed, said)),
    )


def caption_files(found: Sequence[Found]) -> list[Path]:
    """The files beside pictures that hold their captions."""
    roles = [(_role(one), one.path) for one in found]
    keys = {key for role, path in roles if role == "picture" for key in _keys(path)}
    return [path for role, path in roles if role == "text" and _keys(path)[1] in keys]


def _role(one: Found) -> str:
    """What a file is, by its name and by what was noted of it."""
    suffix, stem = one.path.suffix.lower(), one.path.stem
    picture = suffix in SUFFIXES and not stem.endswith(MASK)
    if reasons.LEFT_OUT.keys() & one.notes:
        return "lost" if picture or "folder-not-readable" in one.notes else "odd"
    if "folder-seen-before" in one.notes:
        return "odd"
    if one.path.name.lower() in tables.READERS:
        return "table"
    roles = {"picture": picture, "mask": suffix in SUFFIXES, "text": suffix in TEXTS, "unread": suffix in UNREAD}
    return next((role for role, is_so in roles.items() if is_so), "")


def _keys(path: Path) -> tuple[str, str]:
    """The names that a picture goes by, with and without its ending; a caption file goes by the second of its own."""
    return tables.key(str(path)), tables.key(str(path.with_suffix("")))


def _mask_key(path: Path) -> str:
    return _keys(path)[1].removesuffix(MASK)


Sources = dict[str, list[tuple[int, Said]]]
"""By the name that a picture goes by: what is said of it, with the place of each source in the order of precedence."""


def _sources(root: Path, files: Sequence[Path], listed: Sequence[Table]) -> tuple[Sources, list[str]]:
    """All that caption files and tables say, and what cannot be read of them."""
    sources: Sources = defaultdict(list)
    problems = []
    for path in files:
        try:
            sources[_keys(path)[1]].append((TEXTS.index(path.suffix.lower()), replace(texts.caption_file(path), source=path)))
        except texts.BadTextError as error:
            problems.append(f"{_shown(path, root)}: {error}")
    order = list(tables.READERS)
    nearest = sorted(listed, key=lambda table: (-len(table.path.parts), order.index(table.path.name.lower())))
    for place, table in enumerate(nearest, len(TEXTS)):
        for name, said in table.said.items():
            sources[_entry(table, name)].append((place, replace(said, source=table.path)))
        problems += [f"{_shown(table.path, root)}: {problem}" for problem in table.problems]
    return sources, problems


def _entry(table: Table, name: str) -> str:
    return tables.key(str(table.path.parent / name))


def _of(path: Path, sources: Sources) -> list[Said]:
    """What is said of one picture, the first source first."""
    return [said for _, said in sorted((entry for key in _keys(path) for entry in sources.get(key, [])), key=lambda entry: entry[0])]


def _unknown(root: Path, listed: Sequence[Table], keys: set[str]) -> Iterator[str]:
    """Entries without a picture."""
    for table in listed:
        for name in table.said:
            if _entry(table, name) not in keys:
                yield f"{_shown(table.path, root)}: {shown(name)} is not in the folder"


def _unlisted(root: Path, listed: Sequence[Table], said: dict[Path, list[Said]]) -> Iterator[str]:
    """Pictures without the entry that they ought to have."""
    for table in listed:
        if table.names_all and not table.problems:  # of a line that cannot be read, nobody knows which picture it means
            for path, sources in said.items():
                if not sources and path.is_relative_to(table.path.parent):
                    yield f"{_shown(table.path, root)}: it has no entry for {_shown(path, table.path.parent)}"


def _picture(root: Path, one: Found, sources: Sequence[Said], mask: Path | None, some: bool) -> Picture:
    repeats, title = _kohya(root, one.path)
    first = next((said for said in sources if said.captions), Said(()))
    captions = first.captions
    codes = [note for said in sources for note in said.notes]
    if len(sources) > 1:
        codes.append("several-caption-sources")
    if not captions and title:
        captions = texts.clean([title]).captions
        codes.append("caption-from-folder")
    elif not captions and some and "caption-empty" not in codes:
        codes.append("caption-missing")
    return Picture(one.path, captions, mask, repeats, one.noting(*codes).notes, first.source)


def _kohya(root: Path, path: Path) -> tuple[int, str]:
    """Repeats and title of the nearest folder around a picture that is named as kohya's are."""
    for name in reversed(path.parent.relative_to(root).parts):
        named = KOHYA.fullmatch(name)
        if named:
            return int(named[1]), named[2]
    return 1, ""


def _shown(path: Path, root: Path) -> str:
    return shown(path.relative_to(root).as_posix())
