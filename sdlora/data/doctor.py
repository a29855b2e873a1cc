"""What is wrong with a set of pictures and captions, said before a run is spent on it. It judges; nothing is changed or left out here."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sdlora.data import fingerprints
from sdlora.data.fingerprints import Bytes, Floats
from sdlora.data.looks import Look, thumbnails

REASONS = {
    "tiny": "The picture must be enlarged to more than twice its size, which teaches softness; take a larger original.",
    "extreme-aspect": "The picture is so long that much of it is cropped away; crop it yourself to what should be learnt.",
    "blurred": "Even the sharpest edges are soft, and softness is learnt with the rest; take a sharper picture or leave this one out.",
    "over-compressed": "Blocks of strong JPEG compression show, and are learnt as texture; take a better copy or leave this one out.",
    "nearly-uniform": "There is hardly anything to see; probably a blank or a failed export: leave it out.",
    "duplicate": "The same pixels are there more than once, so this picture counts that many times over; keep one of them.",
    "near-duplicate": "The pictures differ only in size, compression, brightness or a slight crop, so this one counts more; keep the best.",
    "same-ground": "Nearly all pictures have one background, which is learnt as part of the subject; vary it, or name it in the captions.",
    "same-framing": "Nearly all pictures show their subject at one place and size, and so will every result; add other framings.",
    "captions-identical": "Many pictures share one caption, so what sets them apart cannot be told apart by words; describe each.",
    "caption-too-long": "The text encoder reads only the beginning; shorten the caption, or move what matters to its front.",
    "trigger-is-a-word": "The base already knows the trigger as one common word, which blends with what you teach; invent a name.",
}
"""What each code means, and what to do about it."""

SMALL_SHARE = 0.5
"""Of the resolution trained at; a picture whose shorter side has less is enlarged more than twice."""
LONGEST_ASPECT = 2.5
"""A fifth and more is lost when this is cropped to 2 : 1."""
LOWEST_CONTRAST = 0.02
"""Five levels of 255, after noise is averaged away in the thumbnail."""
LOWEST_STEEPNESS = 0.48
LARGEST_BLOCK_SHARE = 0.25
BLOCK_STEPS = (8.0, 48.0)
"""Of blocks that trouble: JPEG quality 10 makes steps of about ten levels, 50 of two; higher ones than this are drawn, as in pixel art."""
SET_SIZE = 4
"""Fewer pictures are not called uniform."""
SET_SHARE = 0.8
CAPTION_SHARE = 0.5
MARGIN_SHARE = 0.6
GROUND_DISTANCE = 0.05
SUBJECT_LEVELS = 25
FRAMING_DISTANCE = 0.04
"""Of the picture's side, by which the subject's middle and spread may differ."""

Severity = Literal["warn", "note"]


@dataclass(frozen=True)
class Finding:
    code: str  # of `REASONS`
    files: tuple[str, ...]
    detail: str
    severity: Severity


def examine(looks: Mapping[str, Look], resolution_px: int) -> list[Finding]:
    """All that the pictures show, those to be warned of first. `looks` goes by file."""
    found = [finding for file, look in looks.items() for finding in of_picture(file, look, resolution_px)]
    found += of_set(looks)
    return sorted(found, key=lambda finding: finding.severity == "note")


def of_picture(file: str, look: Look, resolution_px: int) -> Iterator[Finding]:
    shorter, longer = sorted((look.width, look.height))
    if shorter < SMALL_SHARE * resolution_px:
        yield Finding("tiny", (file,), f"{look.width} x {look.height} px for training at {resolution_px} px", "warn")
    if longer > LONGEST_ASPECT * shorter:
        yield Finding("extreme-aspect", (file,), f"{look.width} x {look.height} px, {longer / shorter:.1f} : 1", "warn")
    if look.contrast < LOWEST_CONTRAST:
        yield Finding("nearly-uniform", (file,), f"its colours vary by {100 * look.contrast:.1f} % of the range", "warn")
        return  # nothing is there to be sharp or broken into blocks
    if look.steepness < LOWEST_STEEPNESS:
        yield Finding("blurred", (file,), f"the steepest step of an edge is {100 * look.steepness:.0f} % of its height", "warn")
    if look.block_share > LARGEST_BLOCK_SHARE and BLOCK_STEPS[0] <= look.block_step <= BLOCK_STEPS[1]:
        yield Finding("over-compressed", (file,), f"steps of {look.block_step:.0f} levels between blocks of 8 x 8 px", "warn")


def of_set(looks: Mapping[str, Look]) -> Iterator[Finding]:
    same: dict[str, list[str]] = {}
    for file, look in looks.items():
        same.setdefault(look.digest, []).append(file)
    for files in same.values():
        if len(files) > 1:
            yield Finding("duplicate", tuple(files), f"{len(files)} times the same pixels", "warn")
    distinct = [files[0] for files in same.values()]
    if not distinct:
        return
    thumbs = thumbnails(looks[file] for file in distinct)
    seen = np.array([looks[file].contrast >= LOWEST_CONTRAST for file in distinct])  # blank pictures are all alike, and are named as such
    shown = np.flatnonzero(seen)
    for group in fingerprints.groups([(pair.first, pair.second) for pair in fingerprints.near_pairs(thumbs[shown])]):
        yield Finding("near-duplicate", tuple(distinct[shown[k]] for k in group), f"{len(group)} versions of one picture", "warn")
    for code, alike in (
        ("same-ground", seen & (_ground_distance(thumbs) <= GROUND_DISTANCE)),
        ("same-framing", seen & (_framing_distance(thumbs) <= FRAMING_DISTANCE)),
    ):
        if len(distinct) >= SET_SIZE and alike.sum() >= SET_SHARE * len(distinct):
            members = tuple(distinct[k] for k in np.flatnonzero(alike))
            yield Finding(code, members, f"{len(members)} of {len(distinct)} pictures", "note")


def of_captions(
    captions: Mapping[str, Sequence[str]], spans: Callable[[str], Sequence[tuple[int, int]]], most_tokens: int
) -> Iterator[Finding]:
    """`captions` goes by file; `spans` gives where in a caption each of its tokens begins and ends; `most_tokens` are read.

    That a caption says nothing is the scan's to note, with the picture.
    """
    for file, texts in captions.items():
        for text in texts:
            tokens = spans(text)
            if len(tokens) > most_tokens:
                dropped = text[tokens[most_tokens][0] :].strip()
                yield Finding("caption-too-long", (file,), f"{len(tokens)} tokens, {most_tokens} are read; dropped: {dropped!r}", "warn")
    said = {file: "\n".join(texts).strip() for file, texts in captions.items()}
    for text, count in Counter(text for text in said.values() if text).items():
        if count >= max(2, CAPTION_SHARE * len(captions)):
            files = tuple(file for file, other in said.items() if other == text)
            yield Finding("captions-identical", files, f"{count} of {len(captions)} pictures: {text!r}", "note")


def of_trigger(trigger: str, pieces: Callable[[str], int]) -> Iterator[Finding]:
    """`pieces` gives the number of tokens that a word is split into: one for a word that the text encoder was taught."""
    words = trigger.split()
    if words and all(pieces(word) == 1 for word in words):
        yield Finding("trigger-is-a-word", (), f"{trigger!r} is {'one token' if len(words) == 1 else 'made of known words'}", "warn")


def _ring(thumbs: Bytes) -> Floats:
    """The outermost pixels of each thumbnail: (N, 124, 3), in 0..1."""
    ring = np.concatenate((thumbs[:, 0], thumbs[:, -1], thumbs[:, 1:-1, 0], thumbs[:, 1:-1, -1]), 1)
    return ring.astype(np.float32) / np.float32(255)


def _ground_distance(thumbs: Bytes) -> Floats:
    """How far most of each picture's margin is from the set's median margin: (N,), in 0..1. A subject may cover the rest of it."""
    ring = _ring(thumbs)
    distance: Floats = np.quantile(np.abs(ring - np.median(ring, axis=0)).max(2), MARGIN_SHARE, axis=1)
    return distance


def _framing_distance(thumbs: Bytes) -> Floats:
    """How far the middle and the spread, in x and y, of what differs from the ground are from the set's median: (N,), in sides."""
    ground = (255 * np.median(_ring(thumbs), axis=1)).astype(np.uint8)[:, None, None]
    differs = (np.maximum(thumbs, ground) - np.minimum(thumbs, ground)).max(3) > SUBJECT_LEVELS
    place = (np.arange(thumbs.shape[1]) + 0.5) / thumbs.shape[1]
    measured = []
    for axis in (1, 2):
        along = differs.sum(axis) + 1e-6
        along /= along.sum(1, keepdims=True)
        middle = (along * place).sum(1)
        measured += [middle, np.sqrt((along * np.square(place - middle[:, None])).sum(1))]
    framing = np.stack(measured, 1)
    distance: Floats = np.abs(framing - np.median(framing, axis=0)).max(1)
    return distance
