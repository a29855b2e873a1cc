"""A sweep: one run's settings, some of them in several values, trained as one cast and laid side by side."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora import family, pictures, preview, record
from sdlora.config import Run
from sdlora.errors import UserError
from sdlora.packs import file
from sdlora.plots import Curve, plot
from sdlora.settings import override
from sdlora.studio import Studio

MOST = 64


def members(run: Run, over: Sequence[str], table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tables of the cast: `run`'s, as `table` has it, once for each choice of `a.b=x,y` in `over`; its trigger stays one."""
    axes = []
    for one in over:
        key, equals, values = one.partition("=")
        if not equals or not values:
            raise UserError("E-SWEEP-01", f'"{one}" is not of the form a.b=x,y', "--over", "write for example --over train.lr=1e-4,3e-4")
        axes.append([(key, value) for value in values.split(",")])
    choices = list(itertools.product(*axes))
    if not 2 <= len(choices) <= MOST:
        raise UserError("E-SWEEP-02", f"a sweep over {len(choices)} choices", "--over", f"name values for 2 to {MOST} of them")
    found = []
    for choice in choices:
        own = {key: dict(part) if isinstance(part, Mapping) else part for key, part in table.items()}
        for key, value in choice:
            override(own, f"{key}={value}")
        said = " ".join(f"{key.rpartition('.')[2]} {value}" for key, value in choice)
        found.append({**own, "name": re.sub(r"[^\w .+-]", "_", f"{run.name} {said}"), "trigger": run.trigger})
    return found


def results(runs: Sequence[Run], out: Path) -> list[dict[str, Any]]:
    """What became of each member: its losses, and how near its pictures come to those trained on."""
    found = []
    for run in runs:
        one, log = record.read_whole(out / run.name)
        measured = [event["data"]["loss"] for event in log if event["kind"] == "validation" and event["step"]]
        held_out = measured[-1] if measured else None
        near = [event["data"].get("distance_adapter") for event in log if event["kind"] == "done"]
        figures = {"loss": one.loss, "loss_held_out": held_out, "distance": near[-1] if near else None}
        found.append({"name": run.name, **figures, "state": one.state})
    return found


def curves(runs: Sequence[Run], out: Path) -> Image.Image:
    """The smoothed losses of all, step by step."""
    drawn = []
    for run in runs:
        losses = record.curve(record.events(out / run.name)[0])
        drawn.append(Curve(run.name, list(zip(map(float, losses), record.smooth(list(losses.values())), strict=True))))
    return plot("loss, smoothed", "step", "loss", drawn)


def grid(runs: Sequence[Run], out: Path) -> Image.Image:
    """A picture of each prompt through each member's pack: a row's pictures are of one seed, and one batch on one base."""
    studio = Studio.open(family.find(runs[0].base))
    names = [studio.add(file.load(out / run.name / f"{run.name}.safetensors")) for run in runs]
    rows = []
    for prompt in runs[0].preview.prompts:
        rows.append(studio.render([preview.recipe(studio, runs[0], prompt, name, 1.0) for name in names]))
    return pictures.sheet(rows, runs[0].preview.prompts, [run.name for run in runs], f"seed {runs[0].preview.seed}, scale 1")
