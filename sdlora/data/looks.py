"""What can be measured of one decoded picture: a small record, computed once, so that no picture need stay in memory."""

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdlora.data import fingerprints
from sdlora.data.fingerprints import Bytes

WORKING_PX = 256
"""Sharpness is measured at most at this size: a blur that is not seen there does not matter in training."""
EDGE_LEVELS = 24
EDGE_PX = 8
BLOCK_PX = 8
LINES = 256
"""How many rows, and how many columns, are read to look for blocks."""


@dataclass(frozen=True)
class Look:
    """Plain values only, so that `Look(**json.loads(json.dumps(asdict(look)))) == look`."""

    width: int
    height: int
    digest: str  # of the pixels and their shape
    thumbnail: str  # base64 of the fingerprint
    contrast: float  # standard deviation of the thumbnail's colours, in 0..1
    steepness: float  # share of a sharp edge's height that lies between two neighbouring pixels, 0..1; 1 without edges
    block_share: float  # share of isolated steps that lie on one grid of 8 x 8 px: 1/8 by chance, towards 1 in blocks
    block_step: float  # median height of those steps, in levels of 255


def look(picture: Image.Image) -> Look:
    """Measure an RGB picture."""
    grey = picture.convert("L")
    thumbnail = fingerprints.thumbnail(picture)
    share, step = _blocks(np.asarray(grey))
    return Look(
        width=picture.width,
        height=picture.height,
        digest=digest(picture),
        thumbnail=base64.b64encode(thumbnail).decode(),
        contrast=float(fingerprints.stacked([thumbnail]).std((0, 1, 2)).max() / 255),
        steepness=_steepness(_reduced(grey)),
        block_share=share,
        block_step=step,
    )


def digest(picture: Image.Image) -> str:
    """A hash of a picture's pixels and their shape."""
    hashed = hashlib.sha256(picture.tobytes())
    hashed.update(f"{picture.width} {picture.height}".encode())
    return hashed.hexdigest()


def thumbnails(looks: Iterable[Look]) -> Bytes:
    """The fingerprints of many pictures: (N, 32, 32, 3)."""
    return fingerprints.stacked([base64.b64decode(one.thumbnail) for one in looks])


def _reduced(grey: Image.Image) -> Bytes:
    shrink = max(grey.size) / WORKING_PX
    if shrink > 1:
        size = (max(1, round(grey.width / shrink)), max(1, round(grey.height / shrink)))
        grey = grey.resize(size, Image.Resampling.BOX)
    return np.asarray(grey)


def _steepness(grey: Bytes) -> float:
    """Of the steeper edges (the upper quartile): the largest step between neighbours over the whole rise within 8 px.

    An edge blurred by a Gaussian of s px has erf(0.5 / s√2) / erf(3.5 / s√2). Unlike the variance of the Laplacian (Pech-Pacheco et al.
    2000) this does not depend on how much there is to see, so one limit serves drawings and photographs, as in the edge-width measures
    that began with Marziliano et al. 2002.
    """
    found = []
    for lines in (grey, grey.T):
        if len(lines) < 2 * EDGE_PX:
            continue
        highest, lowest = lines, lines
        steps = np.maximum(lines[1:], lines[:-1]) - np.minimum(lines[1:], lines[:-1])
        steepest = steps
        for reach in (1, 2, 4):  # doubling: extremes over 8 pixels, and over the 7 steps between them
            highest = np.maximum(highest[reach:], highest[:-reach])
            lowest = np.minimum(lowest[reach:], lowest[:-reach])
        for reach in (1, 2, 3):
            steepest = np.maximum(steepest[reach:], steepest[:-reach])
        rise = highest - lowest
        edges = rise >= EDGE_LEVELS
        found.append(steepest[edges] / rise[edges])
    shares = np.concatenate(found) if found else np.zeros(0)
    return float(np.quantile(shares, 0.75)) if shares.size else 1.0


def _blocks(grey: Bytes) -> tuple[float, float]:
    """The share and height of isolated steps on the most populated grid of 8 px, in the direction that shows it less.

    As in Wang, Bovik & Evans 2000 blocks show as steps at every eighth pixel. Only steps twice as high as both neighbours count, and a
    line counts a twentieth of its length at most: a drawn straight edge is one line, a block boundary is one of many. The grid's origin
    is searched, since a picture may have been cropped after it was compressed.
    """
    shares, heights = [], []
    for lines in (grey[:, :: -(-grey.shape[1] // LINES)], grey.T[:, :: -(-grey.shape[0] // LINES)]):
        if len(lines) < 4 * BLOCK_PX:
            return 0.0, 0.0
        steps = np.maximum(lines[1:], lines[:-1]) - np.minimum(lines[1:], lines[:-1])
        middle = steps[1:-1]
        isolated = (middle >= 2) & ((middle - 1) // 2 >= np.maximum(steps[:-2], steps[2:]))
        whole = len(middle) // BLOCK_PX * BLOCK_PX
        on_line = np.minimum(isolated[:whole].mean(1).reshape(-1, BLOCK_PX), 0.05)
        on_grid = on_line.sum(0) / (on_line.sum() + 0.002 * on_line.size)  # a picture without steps has no grid
        grid = int(on_grid.argmax())
        shares.append(float(on_grid[grid]))
        high = middle[grid:whole:BLOCK_PX][isolated[grid:whole:BLOCK_PX]]
        heights.append(float(np.median(high)) if high.size else 0.0)
    return min(shares), min(heights)
