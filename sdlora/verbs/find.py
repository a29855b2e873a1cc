"""`sdlora find ...`: what suits a set of pictures, measured."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.table import Table
from rich.text import Text

from sdlora.safeio import scratch_folder
from sdlora.terminal import console, numbers, say, shown_errors
from sdlora.verbs.run import casting

if TYPE_CHECKING:
    from sdlora.api import Event, Run

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure what suits a set of pictures.")

Source = Annotated[Path, typer.Argument(help="folder with the pictures, or a TOML file of settings", metavar="DIR|F.toml")]
Set = Annotated[Optional[list[str]], typer.Option("--set", metavar="A.B=C", help="set one setting; may be repeated")]
Steps = Annotated[int, typer.Option(min=10, help="steps of each short run")]
Out = Annotated[Path, typer.Option(help="folder for the picture and the figures", metavar="DIR")]


@app.callback()
def group() -> None:
    """Measure what suits a set of pictures."""


@app.command()
def lr(
    source: Source,
    steps: Steps = 120,
    low: Annotated[float, typer.Option(min=1e-9, help="lowest rate that is tried")] = 1e-6,
    high: Annotated[float, typer.Option(max=10.0, help="highest rate that is tried")] = 1e-1,
    set_: Set = None,
    out: Out = Path("found"),
) -> None:
    """Propose a learning rate: one short run in which it grows until the loss on pictures held out rises."""
    with shown_errors(), scratch_folder() as scratch:
        from sdlora import api

        run = settled(source, set_)
        told(api.find_rate(run, Path(scratch), steps, low, high), out / "lr")


@app.command()
def dimension(
    source: Source,
    steps: Steps = 100,
    ranks: Annotated[str, typer.Option(help="ladder of ranks")] = "1,2,4,8,16,32",
    dimensions: Annotated[str, typer.Option(help="ladder of dimensions of a subspace; empty: none")] = "",
    set_: Set = None,
    out: Out = Path("found"),
) -> None:
    """Find the smallest adapter that learns nine tenths of what the largest does, by short runs of each size."""
    with shown_errors(), scratch_folder() as scratch:
        from sdlora import api

        ladders = {"rank": numbers(ranks, "--ranks"), "dimension": numbers(dimensions, "--dimensions")}
        run = settled(source, set_)
        told(api.find_dimension(run, Path(scratch), steps, {name: ladder for name, ladder in ladders.items() if ladder}), out / "dimension")


@app.command()
def kind(
    data: Annotated[Path, typer.Option(help="folder with the pictures, or a TOML file of settings", metavar="DIR|F.toml")],
    kinds: Annotated[str, typer.Option(help="kinds of adapters, separated by commas")] = "lora,dora,full",
    ranks: Annotated[str, typer.Option(help="ranks of the kinds that have one")] = "1,4,16,64",
    steps: Steps = 100,
    seeds: Annotated[int, typer.Option(help="trainings of each, whose mean is told", min=1)] = 1,
    prompts: Annotated[int, typer.Option(help="prompts that name the trigger, and as many that do not", min=1)] = 6,
    eyes: Annotated[str, typer.Option(help="what compares pictures: auto, base, dinov2, clip, a folder or a hub id")] = "auto",
    set_: Set = None,
    out: Out = Path("found"),
) -> None:
    """Train kinds of adapters at several ranks alike, and lay what they learn beside what they cost; what is done is not done again."""
    with shown_errors():
        from sdlora import api

        wanted = api.KindsWanted([name.strip() for name in kinds.split(",") if name.strip()], numbers(ranks, "--ranks"), steps, seeds)
        table, file = settings(data, set_)
        rows: list[dict[str, Any]] = []
        for event in api.find_kind(table, wanted, api.Asking(prompts=prompts, eyes=eyes), out, file or "command line"):
            say(event.text)
            rows = event.data.get("rows", rows)
        shown = Table(
            "kind", "rank", "parameters", "GB", "s a step", "gain", "likeness", "drift", box=None, pad_edge=False, header_style="bold"
        )
        for row in rows:
            cost = (f"{row['parameters']:,}", f"{row['memory_bytes'] / 1e9:.3f}", f"{row['seconds']:.3f}")
            shown.add_row(row["kind"], str(row["rank"] or ""), *cost, f"{row['gain']:.1%}", f"{row['likeness']:.3f}", f"{row['drift']:.3f}")
        console().print(shown)
        say(f"memory is {rows[0]['memory']}; the base's likeness is {rows[0]['base']['likeness']:.3f}; seen by {rows[0]['eyes']}")


def settled(source: Path, assignments: Optional[list[str]]) -> "Run":
    """The run that a folder or a file of settings, and assignments, mean."""
    from sdlora import api

    table, file = settings(source, assignments)
    return api.settle(table, file or "command line")


def settings(source: Path, assignments: Optional[list[str]]) -> tuple[dict[str, Any], Optional[Path]]:
    """The table of a folder or a file of settings with assignments laid over it, and that file."""
    from sdlora import api
    from sdlora.settings import put

    file = source if source.suffix == ".toml" else None
    table = api.read_settings(file, assignments or [])
    if not file:
        put(table, "data.folder", str(source))
    return table, file


def told(events: "Iterator[Event]", place: Path) -> None:
    """Say what a search does; its end is written as PLACE.png and PLACE.json."""
    from sdlora import api

    for event in events:
        say(event.text)
        if event.kind == "done":
            found: dict[str, Any] = {**event.data}
            picture = found.pop("picture")
            api.save_text(place.with_suffix(".json"), lambda found=found: json.dumps(found, indent=1))  # type: ignore[misc]
            api.save_sheet(place.with_suffix(".png"), lambda picture=picture: picture)  # type: ignore[misc]
            say(f"written: {place.with_suffix('.png')}, {place.with_suffix('.json')}")


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(help="TOML file of settings", metavar="F.toml")],
    over: Annotated[list[str], typer.Option(help="setting and its values, a.b=x,y; may be repeated: all combinations")],
    set_: Annotated[Optional[list[str]], typer.Option("--set", metavar="A.B=C", help="set one setting; may be repeated")] = None,
    out: Annotated[Optional[Path], typer.Option(help="folder of the runs; default: runs/sweep-NAME", metavar="DIR")] = None,
) -> None:
    """Train one run per choice of values, all at once over one base, and lay them side by side."""
    with shown_errors():
        from sdlora import api

        runs = api.sweep(api.read_settings(config, set_ or []), over, config)
        place = out or Path("runs") / f"sweep-{config.stem}"
        casting(runs, place)
        table = Table("run", "loss", "loss held out", "distance", box=None, pad_edge=False, header_style="bold")
        for one in api.sweep_results(runs, place):
            figures = ["" if one[key] is None else f"{one[key]:.4g}" for key in ("loss", "loss_held_out", "distance")]
            table.add_row(*(Text(cell, overflow="fold") for cell in [str(one["name"]), *figures]))
        console().print(table)
        say(f"look: {place / 'grid.png'}, {place / 'curves.png'}")


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
    out: Annotated[
        Optional[Path], typer.Option(help="folder for score.json, score.html and pictures; default: beside it", metavar="DIR")
    ] = None,
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
            print(json.dumps(table, indent=1))
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
