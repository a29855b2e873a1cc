"""What of its maker a pack may tell: three levels, and a look through the whole header that proves it before a pack is written.

public: no path, no file's name, no caption. shared: tags with their frequency, still without the names of files and folders. full: all.
"""

import base64
import binascii
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from sdlora.config import Run
from sdlora.data.ledger import Dataset

PATH = re.compile(r"(?<![\w.:/\\])(?:~?/|[A-Za-z]:[\\/]|\\\\)[^\s\"'\\/]+[\\/]|file://")
"""A place on a disk: what begins at a root or a home and goes on for at least one folder."""
PICTURES = ("modelspec.thumbnail", "ssmd_cover_images")
"""Fields that hold pictures, in which anything could be found by chance."""
SHORTEST = 6
"""Letters of a caption, or of a file's name without its ending, that are looked for: what is shorter stands anywhere."""


@dataclass(frozen=True)
class Secrets:
    """What a header must not tell."""

    files: frozenset[str] = frozenset()  # names of pictures and folders
    captions: frozenset[str] = frozenset()
    tags: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # of each folder: tag, and how many pictures have it
    pictures: Mapping[str, int] = field(default_factory=dict)  # of each folder


def secrets(dataset: Dataset, run: Run) -> Secrets:
    """What a data set holds that is nobody's business; what the user gave to be published is none of it."""
    account = dataset.account
    published = " ".join([run.name, run.trigger, *run.pack.tags, run.pack.title, run.pack.author, run.pack.description]).lower()
    files: set[str] = set()
    for item in account.used:
        files |= {item.path.name, item.path.stem, account.name(item.path)}
    for root in account.roots:
        files |= {root.name, str(root)}
    captions = {caption for item in account.used for caption in item.captions}
    tags: dict[str, Counter[str]] = {}
    pictures: Counter[str] = Counter()
    for item, said in zip(account.used, dataset.captions, strict=True):
        folder = f"{item.repeats}_{_root(item.path, account.roots).name}"
        pictures[folder] += 1
        tags.setdefault(folder, Counter()).update(tag.strip().lower() for tag in said[0].split(",") if tag.strip())
    return Secrets(frozenset(_telling(files, published)), frozenset(_telling(captions, published)), tags, pictures)


def leaks(header: Mapping[str, str], hidden: Secrets, level: str) -> list[str]:
    """What a header tells beyond its level, a line each with the field; empty if nothing."""
    if level == "full":
        return []
    words = [(word, "the name of a file or folder") for word in sorted(hidden.files)]
    words += [(word, "a caption") for word in sorted(hidden.captions)] if level == "public" else []
    found = []
    for key, value in header.items():
        if key in PICTURES:
            found += [f"{key}: {problem}" for problem in _in_pictures(value)]
            continue
        said = "\n".join(_texts(value))
        if path := PATH.search(said):
            found.append(f"{key}: a path, {path[0]}...")
        found += [f'{key}: {what}, "{word}"' for word, what in words if _stands(word, said)]
        if level == "public" and key == "ss_tag_frequency":
            found.append(f"{key}: tags of captions")
    return found


def scrubbed(value: Any, hidden: Secrets) -> Any:
    """Settings without the texts of lists that hold a caption or a file's name, such as prompts taken from captions."""
    if isinstance(value, dict):
        return {key: scrubbed(inner, hidden) for key, inner in value.items()}
    if isinstance(value, list):
        kept = [inner for inner in value if not isinstance(inner, str) or not _holds(inner, hidden)]
        return [scrubbed(inner, hidden) for inner in kept]
    return value


def _holds(text: str, hidden: Secrets) -> bool:
    return PATH.search(text) is not None or any(_stands(word, text) for word in hidden.files | hidden.captions)


def _stands(word: str, text: str) -> bool:
    """Whether a word stands in a text as such, and not inside another."""
    return word.lower() in text.lower() and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _telling(words: Iterable[str], published: str) -> Iterator[str]:
    for word in words:
        if len(word) >= SHORTEST and re.search(r"[^\W\d_]", word) and word.lower() not in published:
            yield word


def _texts(value: str) -> Iterator[str]:
    """All texts of a value, those inside its JSON as they are meant."""
    try:
        inner = json.loads(value) if value[:1] in "{[" else value
    except ValueError:
        inner = value
    stack = [inner]
    while stack:
        one = stack.pop()
        if isinstance(one, dict):
            stack += [*one, *one.values()]
        elif isinstance(one, list):
            stack += one
        else:
            yield str(one)


def _in_pictures(value: str) -> Iterator[str]:
    """What pictures in a header tell beside what they show."""
    urls: Sequence[str] = json.loads(value) if value.startswith("[") else [value]
    for url in urls:
        try:
            picture = Image.open(io.BytesIO(base64.b64decode(url.rpartition(",")[2], validate=True)))
        except (binascii.Error, UnidentifiedImageError, OSError):
            yield "no picture"
            continue
        if picture.getexif() or set(picture.info) & {"comment", "exif", "xmp", "photoshop"}:
            yield "a picture with notes of a camera or a program"


def _root(path: Path, roots: Sequence[Path]) -> Path:
    inside = [root for root in roots if path.is_relative_to(root)]
    return max(inside, key=lambda root: len(root.parts), default=path.parent)
