"""`sdlora pack merge, average, resize, diff, spectrum`: packs made of packs."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.table import Table
from rich.text import Text

from sdlora.terminal import console, say, shown_errors
from sdlora.verbs.pack import File, Json, app

__all__ = ["app"]

Out = Annotated[Path, typer.Option(help="pack to write", metavar="F.safetensors")]
Rank = Annotated[Optional[int], typer.Option(help="greatest rank", min=1)]


@app.command()
def merge(
    packs: Annotated[list[str], typer.Argument(help="packs, each with its scale", metavar="PACK[:SCALE]...")],
    out: Out,
    how: Annotated[str, typer.Option(help="concat: exact, ranks add; svd: to --rank; sum: exact, full matrices")] = "concat",
    rank: Rank = None,
) -> None:
    """Make one pack of several, whose effect is the weighted sum of theirs, and say what that cost."""
    with shown_errors():
        from sdlora import api

        say(f"{out}: {api.merge_packs(packs, out, how, rank).line()}")


@app.command()
def average(
    packs: Annotated[list[Path], typer.Argument(help="packs", metavar="PACK...")],
    out: Out,
    rank: Rank = None,
) -> None:
    """Make one pack whose effect is the mean of theirs; exact without --rank."""
    with shown_errors():
        from sdlora import api

        share = 1 / len(packs)
        say(f"{out}: {api.merge_packs([f'{pack}:{share!r}' for pack in packs], out, 'svd' if rank else 'concat', rank).line()}")


@app.command()
def resize(
    pack: File,
    out: Out,
    rank: Rank = None,
    energy: Annotated[Optional[float], typer.Option(help="share of the squared singular values to keep in each layer")] = None,
    error: Annotated[Optional[float], typer.Option(help="greatest relative error of each layer")] = None,
) -> None:
    """Write a pack at lower ranks, the best that they allow, and say what is lost."""
    with shown_errors():
        from sdlora import api

        say(f"{pack}: {pack.stat().st_size / 2**20:.2f} MiB" if pack.is_file() else str(pack))
        say(f"{out}: {api.resize_pack(pack, out, rank, energy, error).line()}")


@app.command()
def diff(a: File, b: File, most: Annotated[int, typer.Option(help="rows to show", min=1)] = 30, as_json: Json = False) -> None:
    """Compare what two packs add, layer by layer, the most different first."""
    with shown_errors():
        from sdlora import api

        found = api.compare_packs(a, b)
        if as_json:
            typer.echo(json.dumps([dataclasses.asdict(one) for one in found], indent=1))
            return
        if all(one.relative is not None and one.relative < 1e-9 for one in found):
            say("both packs add the same")
            return
        table = Table("module", "difference", "cosine", "only in", box=None, pad_edge=False, header_style="bold")
        for one in found[:most]:
            numbers = ("" if value is None else f"{value:.4f}" for value in (one.relative, one.cosine))
            table.add_row(Text(one.module, overflow="fold"), *numbers, one.only)
        console().print(table)


@app.command()
def spectrum(
    pack: File,
    out: Annotated[Optional[Path], typer.Option(help="picture of the curves to write", metavar="F.png")] = None,
    as_json: Json = False,
) -> None:
    """Show how many directions a pack uses in each layer, and advise a rank."""
    with shown_errors():
        from sdlora import api

        found, advice = api.pack_spectrum(pack, out)
        if as_json:
            typer.echo(json.dumps({"advised_rank": advice, "modules": [dataclasses.asdict(one) for one in found]}, indent=1))
            return
        table = Table("module", "rank", "effective", "stable", "for 95 %", box=None, pad_edge=False, header_style="bold")
        for one in found:
            cells = (str(len(one.values)), f"{one.effective:.2f}", f"{one.stable:.2f}", str(one.needed))
            table.add_row(Text(one.module, overflow="fold"), *cells)
        console().print(table)
        say(f"rank {advice} keeps 95 % of the energy in nine of ten layers")
