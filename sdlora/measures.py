"""What an adapter does to pictures, in figures: each a function of features (rows of vectors), one number for each picture drawn.

Features are compared after the mean of a set that says nothing of the subject was taken off (`centred`): the raw ones share a large part
that all pictures have, and in which every cosine is near 1.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sdlora.randomness import stream

COPIED = 0.5
"""A picture nearer to a training picture than this share of that one's distance to its own nearest neighbour counts as a copy of it."""


def centred(features: Tensor, centre: Tensor) -> Tensor:
    """Unit vectors (N, D) of what sets features (N, D) apart from the mean of `centre` (M, D)."""
    return F.normalize(features - centre.mean(0), dim=1)


def likeness(drawn: Tensor, true: Tensor, fits: Tensor) -> Tensor:
    """(N,) cosine of each picture to the one that it is most like, of unit vectors (N, D), (M, D), among those that `fits` (N, M) says
    it may be compared with: DreamBooth's DINO and CLIP-I scores (Ruiz et al. 2023, section 4.1), with the best in place of the mean."""
    return (drawn @ true.T).masked_fill(~fits, -torch.inf).max(1).values


def fitting(asked: Sequence[str], says: Sequence[str]) -> Tensor:
    """(N, M) which pictures, by their captions, a prompt's are to be like: those of the same words where there are any, else all."""
    same = torch.tensor([[one == text for one in says] for text in asked])
    return same | ~same.any(1, keepdim=True)


def drift(base: Tensor, adapter: Tensor) -> Tensor:
    """(N,) 1 - cosine of pictures that the base drew and that the adapter drew from the same prompts and noise; 0: nothing changed."""
    return 1 - (base * adapter).sum(1)


def memorisation(drawn: Tensor, seen: Tensor) -> Tensor:
    """(N,) distance of each picture to its nearest training picture, as a share of that one's to its own nearest neighbour among the
    training pictures (Somepalli et al. 2023 compare the same two distances); near 0: a copy. One training picture gives no measure: nan."""
    if len(seen) < 2:
        return torch.full((len(drawn),), torch.nan)
    among = torch.cdist(seen, seen)
    own = among.masked_fill(torch.eye(len(seen), dtype=torch.bool), torch.inf).min(1).values
    near = torch.cdist(drawn, seen).min(1)
    return near.values / own[near.indices].clamp(min=1e-6)


def nearest(drawn: Tensor, seen: Tensor) -> list[int]:
    """The place of the training picture that each picture is nearest to, as `memorisation` measures it."""
    return [int(place) for place in torch.cdist(drawn, seen).argmin(1)]


def copied(ratios: Tensor) -> float:
    """The share of pictures whose `memorisation` is below `COPIED`."""
    return float((ratios < COPIED).float().mean()) if not ratios.isnan().any() else float("nan")


def diversity(drawn: Tensor, group: Sequence[str]) -> float:
    """Mean 1 - cosine over all pairs of pictures of one group, which are drawn of one prompt at several seeds; 0: all are alike."""
    same = torch.tensor([[i < j and a == b for j, b in enumerate(group)] for i, a in enumerate(group)])
    apart = (1 - drawn @ drawn.T)[same]
    return float(apart.mean()) if len(apart) else float("nan")


def following(drawn: Tensor, said: Tensor) -> Tensor:
    """(N,) cosine of pictures and the texts that they were drawn from, as one model sees both (Hessel et al. 2021, CLIPScore unscaled)."""
    return (F.normalize(drawn, dim=1) * F.normalize(said, dim=1)).sum(1)


def own_rank(drawn: Tensor, base: Tensor) -> Tensor:
    """(N,) place, from 1, of the base's picture of the same prompt among its pictures of all (unit vectors, row by row), as the adapter's
    picture is like them: whether a prompt still draws its own thing."""
    like = drawn @ base.T
    return (like > like.diagonal()[:, None]).sum(1) + 1.0


def resampled(count: int, rounds: int = 1000) -> Tensor:
    """(rounds, count) places of a bootstrap (Efron 1979): the same for all that is compared, so that differences are paired."""
    return torch.from_numpy(stream(0, "bootstrap", count).integers(0, count, (rounds, count)))


def interval(values: Tensor, share: float = 0.9) -> tuple[float, float]:
    """The middle share of bootstrap values (rounds,)."""
    low, high = torch.quantile(values, torch.tensor([(1 - share) / 2, (1 + share) / 2], dtype=values.dtype)).tolist()
    return low, high


def front(gain: Sequence[float], cost: Sequence[float]) -> list[int]:
    """The Pareto front: places of which no other has as much gain at less cost, or more at as little; by rising cost."""
    order = sorted(range(len(gain)), key=lambda i: (cost[i], -gain[i]))
    kept: list[int] = []
    for i in order:
        if not kept or gain[i] > gain[kept[-1]]:
            kept.append(i)
    return kept
