"""Text from a file: UTF-8, or an error that says where it is not and what it seems to be; cleaned of what nobody can see."""

import re
from dataclasses import dataclass
from pathlib import Path

MAX_BYTES = 256 * 2**20  # of any file of text
LARGE_BYTES = 64 * 2**10  # of one picture's caption; the longest prompt that any base reads is a hundredth of it

INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb]"
    "|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])"
)
"""Control characters, zero-width ones, those that turn the direction of writing, halves of characters (JSON can hold them); joiners only
where no script or emoji needs them."""
JAPANESE = re.compile(rb"([\x81-\x9f][\x40-\x7e\x80-\xfc]){2}")
"""Two characters of cp932 side by side; Western text has no two bytes so, for what it has beyond ASCII stands alone."""


class BadTextError(Exception):
    """A file is no text that can be read; the message says why."""


@dataclass(frozen=True)
class Said:
    """What one source says about a picture: its captions, and what was odd about them as codes of `sdlora.data.reasons`."""

    captions: tuple[str, ...]
    notes: tuple[str, ...] = ()
    source: Path | None = None  # the file that says it, where it was read from one


def read(path: Path) -> str:
    """The text of a file, without a byte order mark. Raises `BadTextError`."""
    return decode(_content(path))


def current(path: Path) -> str | None:
    """The text that a file holds now; None where there is none that can be read."""
    try:
        return read(path)
    except BadTextError:
        return None


def caption_file(path: Path) -> Said:
    """The captions of a picture, one a line. Raises `BadTextError`."""
    content = _content(path)
    said = clean(re.split(r"\r\n|\r|\n", decode(content)))
    odd = {
        "byte-order-mark": content.startswith(b"\xef\xbb\xbf"),
        "windows-line-ends": b"\r\n" in content,
        "caption-large": len(content) > LARGE_BYTES,
    }
    return Said(said.captions, (*(code for code, found in odd.items() if found), *said.notes))


def clean(captions: list[str]) -> Said:
    """Captions on one line each, without what cannot be seen, each once; empty ones are no captions."""
    visible = [INVISIBLE.sub("", caption) for caption in captions]
    kept = dict.fromkeys(" ".join(caption.split()) for caption in visible)
    kept.pop("", None)
    notes = []
    if visible != captions:
        notes.append("invisible-characters")
    if not kept:
        notes.append("caption-empty")
    if any(not _is_balanced(caption) for caption in kept):
        notes.append("braces-unbalanced")
    return Said(tuple(kept), tuple(notes))


def decode(content: bytes) -> str:
    """Bytes as UTF-8. Raises `BadTextError` that names the first wrong byte and the encoding that it looks like."""
    wrong = [content.find(0)] if 0 in content else []
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong.append(error.start)
    if wrong:
        raise BadTextError(f"not UTF-8 at byte {min(wrong)}, it looks like {guess(content)}; save it as UTF-8")
    return text.removeprefix("\ufeff")


def guess(content: bytes) -> str:
    """What bytes that are not UTF-8 are most likely."""
    halves = content[: len(content) // 2 * 2]
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or 0.3 < halves.count(0) / max(1, len(halves)) < 0.7:
        return "UTF-16"
    if 0 in content:
        return "a binary file (it holds NUL bytes)"
    try:
        content.decode("cp932")
        japanese = bool(JAPANESE.search(content))
    except UnicodeDecodeError:
        japanese = False
    return "cp932 (Japanese)" if japanese else "latin-1 (Western)"


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadTextError(f"more than {MAX_BYTES >> 20} MB, which no text about pictures is")
        return path.read_bytes()
    except OSError as error:
        raise BadTextError(f"cannot be read: {error.strerror}") from None


def _is_balanced(caption: str) -> bool:
    depth = 0
    for character in caption:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0
