"""From settings files to the jobs of a fleet: a run each, a cast each, or a sweep or large cast in as many casts as it takes."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sdlora import cast, config
from sdlora.config import Run
from sdlora.errors import UserError
from sdlora.fleet import packing
from sdlora.fleet.folder import Folder, Job
from sdlora.fleet.storage import Storage


@dataclass(frozen=True)
class Terms:
    """How jobs are to be cut and packed."""

    members: int = 0  # of a cast at most; 0: as many as a card holds, or all
    card_gb: float = 0.0  # memory of one card; 0: nothing is packed by memory


def jobs(name: str, runs: Sequence[Run], terms: Terms, like: Job) -> Iterator[tuple[Job, str]]:
    """The jobs for one run, or for runs over one base, and the settings of each; `like` has what is alike in all. Raises `UserError`."""
    card_bytes = terms.card_gb * 1e9
    sizes = packing.measured(runs) if card_bytes else []
    groups = packing.groups(runs, terms.members, sizes, card_bytes)
    for number, group in enumerate(groups, 1):
        own = [runs[i] for i in group]
        job = replace(like, name=own[0].name if len(own) == 1 else name if len(groups) == 1 else f"{name}-{number}", added=time.time())
        if sizes:
            peak = packing.needed(own, [sizes[i] for i in group], card_bytes)
            job = replace(job, gpus=packing.share(peak, card_bytes))
            own = [_held_to(run, peak) for run in own]
        yield job, config.to_toml(own[0]) if len(own) == 1 else cast.text(own)


def _held_to(run: Run, peak_bytes: int) -> Run:
    """The run with the memory that it was counted to take as its limit: the rest of the card is others'."""
    limit_gb = math.ceil(peak_bytes / 1e6) / 1e3
    return run.model_copy(update={"train": run.train.model_copy(update={"memory_gb": limit_gb})})


def add(folder: Folder, store: str, asked: Sequence[tuple[Job, str]]) -> int:
    """Put jobs into a fleet, and their settings into its shared storage; how many are new. Raises `UserError` before any is added."""
    names = [job.name.casefold() for job, _ in asked]
    twice = next((job.name for job, _ in asked if names.count(job.name.casefold()) > 1), "")
    if twice:
        raise UserError(
            "E-FLEET-03", f'two jobs are called "{twice}", and each has a folder of its name', folder.place, "rename one of them"
        )
    shared = None if Storage.is_local(store) else Storage.open(store)
    new = 0
    for job, settings in asked:
        if folder.add(job, settings):
            new += 1
        if shared:
            shared.write(f"jobs/{job.name}.toml", settings.encode())
    return new
