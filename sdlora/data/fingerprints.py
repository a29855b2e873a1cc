"""Which pictures of a set show the same thing, though resized, recompressed, brightened or cropped a little.

A picture's fingerprint is a thumbnail of 32 x 32 colours. Every pair is compared by tangent distance (Simard, LeCun & Denker 1993): the
distance of two thumbnails that no small crop and no change of contrast can explain, which is a few matrix products for a whole set. The
few pairs that are near are aligned in earnest (Lucas & Kanade 1981) and judged where they differ most: two drawings of one family differ
in one place, say the mouth, and a copy differs a little everywhere.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Indices = NDArray[np.intp]

SIDE_PX = 32
COARSE_PX = 8
LOWEST_CONTRAST = 0.02
"""Below this, in 0..1, what differs between two pictures is noise rather than content."""
MAX_NEIGHBOURS = 8
"""A set of film frames has more like pairs than anyone can read; each picture is aligned with the nearest only, which still links them."""
LARGEST_WARP = 0.16
"""Furthest change of a side or a place, in half pictures: a crop of 5 % from each side is 0.11, and some is left for finding it."""
WHITE = 0.985
"""From here up a value may have been cut off, and does not tell how much brighter a picture is."""
ROWS_AT_ONCE, PAIRS_AT_ONCE = 256, 64


@dataclass(frozen=True)
class Nearness:
    """What a pair may differ by and count as the same; `bench/doctor.py --sweep` shows what other limits would give."""

    tangent: float = 0.12  # squared distance of the normalised 8 x 8 thumbnails, crops explained
    spot_at_16: float = 0.3  # largest difference of means over an eighth of the picture, in 0..1, roughly aligned
    spot: float = 0.07  # the same, aligned at full size
    relative: float = 0.18  # the same, in standard deviations of the picture: plain grounds differ little, but are not copies


class Pair(NamedTuple):
    first: int
    second: int
    spot: float
    relative: float


def thumbnail(picture: Image.Image) -> bytes:
    """The fingerprint of an RGB picture: 32 x 32 x 3 bytes, whatever its shape."""
    return picture.resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR, reducing_gap=3.0).tobytes()


def stacked(thumbnails: Sequence[bytes]) -> Bytes:
    """Thumbnails as (N, 32, 32, 3)."""
    return np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, SIDE_PX, SIDE_PX, 3)


def near_pairs(thumbs: Bytes, nearness: Nearness | None = None) -> list[Pair]:
    """Pairs of pictures (N, 32, 32, 3) that show the same thing; at most `MAX_NEIGHBOURS` of them begin with one picture."""
    limits = nearness or Nearness()
    found: list[Pair] = []
    for first, second in _candidates(thumbs, limits.tangent):
        one, other = _floats(thumbs[first]), _floats(thumbs[second])
        warp, spot, _ = aligned(halved(one), halved(other), np.zeros((len(first), 4), np.float32), 3)
        close = spot <= limits.spot_at_16
        first, second = first[close], second[close]
        _, spot, relative = aligned(one[close], other[close], warp[close], 2)
        same = (spot <= limits.spot) & (relative <= limits.relative)
        columns = (column[same].tolist() for column in (first, second, spot, relative))
        found += (Pair(*row) for row in zip(*columns, strict=True))
    return sorted(found)


def groups(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Pictures linked by pairs, directly or through others."""
    parent: dict[int, int] = {}

    def root(one: int) -> int:
        while parent.setdefault(one, one) != one:
            parent[one] = one = parent[parent[one]]
        return one

    for a, b in pairs:
        parent[root(b)] = root(a)
    members: dict[int, list[int]] = {}
    for one in sorted(parent):
        members.setdefault(root(one), []).append(one)
    return [tuple(group) for group in members.values()]


def _floats(thumbs: Bytes) -> Floats:
    """From levels of 255 to 0..1."""
    return thumbs.astype(np.float32) / np.float32(255)


def halved(thumbs: Floats) -> Floats:
    """Means of 2 x 2 pixels: (N, n, n, 3) -> (N, n/2, n/2, 3)."""
    return (thumbs[:, ::2, ::2] + thumbs[:, 1::2, ::2] + thumbs[:, ::2, 1::2] + thumbs[:, 1::2, 1::2]) * np.float32(0.25)


def _slopes(thumbs: Floats) -> tuple[Floats, Floats]:
    """Derivatives along x and y, per half picture; 0 on the border."""
    along_x, along_y = np.zeros_like(thumbs), np.zeros_like(thumbs)
    scale = (thumbs.shape[1] - 1) / 4
    along_x[:, :, 1:-1] = (thumbs[:, :, 2:] - thumbs[:, :, :-2]) * scale
    along_y[:, 1:-1] = (thumbs[:, 2:] - thumbs[:, :-2]) * scale
    return along_x, along_y


def _warps(thumbs: Floats) -> list[Floats]:
    """How a picture changes with its width, its place in x, its height and its place in y."""
    x = np.linspace(-1, 1, thumbs.shape[1], dtype=np.float32)
    along_x, along_y = _slopes(thumbs)
    return [along_x * x[:, None], along_x, along_y * x[:, None, None], along_y]


def _coarse(thumbs: Floats) -> Floats:
    """Means over 4 x 4 pixels without their common mean: (N, 192)."""
    flat = halved(halved(thumbs)).reshape(len(thumbs), -1)
    centred: Floats = flat - flat.mean(1, keepdims=True)
    return centred


def _described(thumbs: Floats) -> tuple[Floats, Floats]:
    """Descriptors (N, 192) of length 1, and an orthonormal basis (N, 4, 192) of what small crops do to them."""
    flat = _coarse(thumbs)
    length = np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), LOWEST_CONTRAST * math.sqrt(flat.shape[1]))
    flat = flat / length
    changes = np.stack([_coarse(change) / length for change in _warps(thumbs)], 1)  # (N, 4, 192)
    changes -= (changes @ flat[:, :, None]) * flat[:, None]  # a change of length is a change of contrast, which is no difference
    gram = changes @ changes.transpose(0, 2, 1) + 1e-4 * np.eye(4, dtype=np.float32)
    return flat, np.linalg.solve(np.linalg.cholesky(gram), changes)


def _candidates(thumbs: Bytes, limit: float) -> Iterator[tuple[Indices, Indices]]:
    """Pairs i < j within the tangent distance, the nearest of each i, a few at a time: memory stays flat."""
    parts = [_described(_floats(thumbs[start : start + ROWS_AT_ONCE])) for start in range(0, len(thumbs), ROWS_AT_ONCE)]
    flat = np.concatenate([part[0] for part in parts]) if parts else np.zeros((0, 3 * COARSE_PX**2), np.float32)
    size = (flat**2).sum(1)
    for block, (rows, basis) in enumerate(parts):
        start = block * ROWS_AT_ONCE
        later = flat[start:].T
        distance = size[start : start + len(rows), None] + size[start:] - 2 * (rows @ later)
        for k in range(basis.shape[1]):
            explained = basis[:, k] @ later - (basis[:, k] * rows).sum(1, keepdims=True)
            distance -= np.square(explained, out=explained)
        i, j = np.nonzero(distance <= limit)
        i, j = i[j > i], j[j > i]
        order = np.lexsort((distance[i, j], i))
        i, j = i[order], j[order]
        nearest = np.arange(len(i)) - np.searchsorted(i, i) < MAX_NEIGHBOURS
        i, j = i[nearest] + start, j[nearest] + start
        for at in range(0, len(i), PAIRS_AT_ONCE):
            yield i[at : at + PAIRS_AT_ONCE], j[at : at + PAIRS_AT_ONCE]


def _warped(thumbs: Floats, warp: Floats) -> tuple[Floats, Floats]:
    """Thumbnails (M, n, n, 3) read at (1 + a) x + b and (1 + c) y + d of their coordinates in -1..1, and where that lies inside them."""
    many, side = thumbs.shape[:2]
    x = np.linspace(-1, 1, side, dtype=np.float32)
    across, down = (1 + warp[:, :1]) * x + warp[:, 1:2], (1 + warp[:, 2:3]) * x + warp[:, 3:]
    weights = [
        np.maximum(0, 1 - np.abs((place.clip(-1, 1)[:, :, None] + 1) * (side - 1) / 2 - np.arange(side, dtype=np.float32)))
        for place in (across, down)
    ]  # linear interpolation as a matrix (M, n, n) for each axis
    read = (weights[1] @ thumbs.reshape(many, side, 3 * side)).reshape(thumbs.shape)
    inside = (np.abs(down) <= 1)[:, :, None] & (np.abs(across) <= 1)[:, None]
    return weights[0][:, None] @ read, inside[..., None].astype(np.float32)


def aligned(target: Floats, moved: Floats, warp: Floats, steps: int) -> tuple[Floats, Floats, Floats]:
    """Warps (M, 4) that lay `moved` on `target`, and what then differs: in the worst spot, in 0..1, and relative to contrast.

    Each step solves for the warp with contrast and brightness, linearised (Gauss-Newton); what lies outside counts nowhere.
    """
    many, values = len(target), math.prod(target.shape[1:])
    for _ in range(steps):
        read, inside = _warped(moved, warp)
        terms = np.stack([*_warps(read), read, np.ones_like(read)], 1) * inside[:, None]
        change = _fitted(terms.reshape(many, 6, values), ((target - read) * inside).reshape(many, values), 1e-2)
        warp = (warp + change[:, :4].clip(-LARGEST_WARP / 2, LARGEST_WARP / 2)).clip(-LARGEST_WARP, LARGEST_WARP)
    read, inside = _warped(moved, warp)
    rest = _relit(target, read, inside) * inside
    eighth = target.shape[1] // 8
    windows = np.lib.stride_tricks.sliding_window_view(rest, (eighth, eighth), axis=(1, 2))
    spot = windows[:, :: eighth // 2, :: eighth // 2].mean((-1, -2))
    counted = inside.sum((1, 2)) + 1e-6  # (M, 1)
    mean = (target * inside).sum((1, 2)) / counted
    contrast = np.sqrt((np.square(target - mean[:, None, None]) * inside).sum((1, 2)) / counted).max(1)
    worst = np.abs(spot).max((1, 2, 3))
    return warp, worst, worst / np.maximum(contrast, LOWEST_CONTRAST)


def _relit(target: Floats, read: Floats, inside: Floats) -> Floats:
    """What differs when one of the two is brightened, or given more contrast, to match the other. White stays white when brightened."""
    many, values = len(target), math.prod(target.shape[1:])
    telling = inside * (np.maximum(target, read) < WHITE)
    terms = np.stack([read, np.ones_like(read)], 1) * telling[:, None]
    light = _fitted(terms.reshape(many, 2, values), ((target - read) * telling).reshape(many, values), 1e-3)
    gain, bias = (1 + light[:, 0].clip(-0.2, 0.25)), light[:, 1].clip(-0.12, 0.12)
    gain, bias = gain[:, None, None, None], bias[:, None, None, None]
    brighter, darker = target - (gain * read + bias).clip(0, 1), ((target - bias) / gain).clip(0, 1) - read
    rest: Floats = np.where(gain * 0.5 + bias > 0.5, brighter, darker)
    return rest


def _fitted(terms: Floats, target: Floats, ridge: float) -> Floats:
    """Least squares: the factors (M, K) of terms (M, K, P) that add up to target (M, P)."""
    gram = terms @ terms.transpose(0, 2, 1) + ridge * np.eye(terms.shape[1], dtype=np.float32)
    solved: Floats = np.linalg.solve(gram, terms @ target[:, :, None])[..., 0]
    return solved
