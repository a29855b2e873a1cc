"""Regularisation pictures that the base draws itself (Ruiz et al. 2023, section 3.2), kept with their captions in the run's cache."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from sdlora import safeio
from sdlora.adapter import Bank
from sdlora.config import Run
from sdlora.data import ledger
from sdlora.data.ledger import Dataset
from sdlora.data.store import Store
from sdlora.family import Family
from sdlora.generate import Recipe
from sdlora.randomness import stream
from sdlora.studio import Studio

STEPS = 25
"""Its own, so that another preview does not change what is trained on."""
BATCH = 4
"""Drawn together, always the same ones: a picture's last bits depend on the batch that it is drawn in."""


def with_drawn(dataset: Dataset, run: Run, loaded: Family, cache: Path, kept: Store) -> Dataset:
    """The dataset with what the base has drawn, or draws now where that is missing; no adapter may be on it."""
    if not run.data.prior_pictures:
        return dataset
    folder = cache / "prior"
    draw(run, loaded, folder)
    return ledger.fit_dataset(ledger.read_dataset(run, cache, kept, folder), run, loaded)


def draw(run: Run, loaded: Family, folder: Path) -> None:
    """Let the folder hold the pictures that the run asks for, with captions beside them, and no others."""
    studio = Studio(loaded, Bank(loaded.components), {})
    wanted = dict(named(run, studio))
    for path in folder.glob("*"):
        if path.stem not in wanted:
            safeio.remove(path)
    names = list(wanted)
    for start in range(0, len(names), BATCH):
        some = names[start : start + BATCH]
        if all((folder / f"{name}{suffix}").is_file() for name in some for suffix in (".png", ".txt")):
            continue
        for name, picture in zip(some, studio.render([wanted[name] for name in some]), strict=True):
            safeio.write(folder / f"{name}.png", studio.png(picture, wanted[name]))
            safeio.write(folder / f"{name}.txt", wanted[name].prompt)


def named(run: Run, studio: Studio) -> Iterator[tuple[str, Recipe]]:
    """The recipes of all pictures, by names that say everything which they depend on: the prompts in turn, each time of another seed."""
    prompts = run.data.prior_prompts or []
    step = studio.family.step_px
    side = max(1, (run.data.resolution_px or 0) // step) * step
    usual = studio.recipe("", f"{side}x{side}", steps=STEPS)
    base = studio.family.base.fingerprint("unet")
    for number in range(run.data.prior_pictures):
        seed = int(stream(run.seed, "prior picture", number).integers(2**63))
        recipe = replace(usual, prompt=prompts[number % len(prompts)], seed=seed)
        digest = hashlib.blake2b(json.dumps([asdict(recipe), base]).encode(), digest_size=6).hexdigest()
        yield f"{number:05d}-{digest}", recipe
