"""What a run or a pack is judged by: its pictures, its prompts, and its checkpoints as packs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sdlora import api, eyes  # noqa: F401
from sdlora.config import Run, parse
from sdlora import settings
from sdlora.data import buckets, captions, ledger
from sdlora.data.pixels import read_picture
from sdlora.judge import Questions, Truth, unrelated
from sdlora.studio import Studio


@dataclass(frozen=True)
class Asking:
    scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25)
    prompts: int = 4
    seeds: int = 2


def settled_of(run: Path) -> Run:
    return parse(settings.read(run / "config.toml"), run / "config.toml")


def material(settled: Run, studio: Studio, asking: Asking) -> tuple[Questions, Truth]:
    dataset = ledger.fit_dataset(ledger.read_dataset(settled, Path("/tmp/unpacked")), settled, studio.family)
    items = dataset.account.used
    size = dataset.buckets.most_common(1)[0][0]

    def seen(places: Sequence[int]) -> torch.Tensor:
        shown = [buckets.fit(read_picture(items[i].path, settled.data.ground), size) / 2 + 0.5 for i in places]
        return torch.stack(shown) if shown else torch.empty(0, 3, size[1], size[0])

    pool = [i for i in dict.fromkeys(dataset.pool) if not items[i].regularisation]
    places = (dataset.held or pool)[: asking.prompts]
    asked = [captions.final(items[i], settled, 0) for i in places]
    other = unrelated(settled.data.prior_prompts, 2 * asking.prompts)
    return Questions(asked, other, range(asking.seeds), asking.scales, size), Truth(seen(pool), seen(dataset.held))
