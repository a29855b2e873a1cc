"""`sdlora find ...`: what suits a set of pictures, measured."""

import json
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.table import Table

from sdlora.terminal import console, say, shown_errors

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure what suits a set of pictures.")


@app.callback()
def group() -> None:
    """Measure what suits a set of pictures."""


@app.command()
def best(
    source: Annotated[Path, typer.Argument(help="run folder, or the .safetensors file of a pack", metavar="RUN|PACK")],
    data: Annotated[Optional[str], typer.Option(help="folder with the pictures that a pack was to learn; a run knows its own")] = None,
    scales: Annotated[str, typer.Option(help="scales, separated by commas")] = "0.5,0.75,1,1.25",
    prompts: Annotated[int, typer.Option(help="prompts that name the trigger, and as many that do not", min=1)] = 6,
    seeds: Annotated[int, typer.Option(help="seeds at which each is drawn", min=1)] = 2,
    most: Annotated[int, typer.Option(help="checkpoints of a run", min=1)] = 6,
    eyes: Annotated[str, typer.Option(help="what compares pictures: auto, base, dinov2, clip, a folder or a hub id")] = "auto",
    base: Annotated[str, typer.Option(help="base model; default: the run's or the pack's own")] = "",
    out: Annotated[Optional[Path], typer.Option(help="folder for score.json and two pictures; default: beside it", metavar="DIR")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print all of it as JSON")] = False,
) -> None:
    """Say which checkpoint and which scale to use, and why."""
    with shown_errors():
        from sdlora import api

        asking = api.Asking(tuple(api.parse_scale(scale) for scale in scales.split(",")), prompts, seeds, eyes=eyes, most=most)
        table = {}
        for event in api.find_best(source, asking, data or "", base, out):
            if event.kind == "done":
                table = event.data
            elif not as_json:
                say(event.text)
        if as_json:
            typer.echo(json.dumps(table, indent=1))
            return
        rows = Table("", "scale", "likeness", "drift", "score (90 %)", "copies", "follows", box=None, pad_edge=False, header_style="bold")
        for row in table["rows"]:
            score = f"{row['score']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
            cells = (row["name"], f"{row['scale']:g}", f"{row['likeness']:.3f}", f"{row['drift']:.3f}", score)
            copied = "" if row["copied"] is None else f"{row['copied']:.0%}"
            rows.add_row(*cells, copied, f"{row['following']:.2f}")
        console().print(rows)
        say(f"seen by {table['eyes']}; likeness to {table['likeness_to']}")
        say(table["words"])
