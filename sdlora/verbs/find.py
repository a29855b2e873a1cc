"""`sdlora find ...`: what suits a set of pictures, measured."""

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.table import Table
from rich.text import Text

from sdlora.terminal import console, say, shown_errors
from sdlora.verbs.run import casting

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure what suits a set of pictures.")


@app.callback()
def group() -> None:
    """Measure what suits a set of pictures."""


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
