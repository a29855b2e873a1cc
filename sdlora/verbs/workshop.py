"""`sdlora pack merge, average, resize, bake, extract, diff, spectrum`: packs made of packs and of bases."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Optional, Protocol

import typer
from rich.table import Table
from rich.text import Text

from sdlora.terminal import console, say, shown_errors
from sdlora.verbs.pack import File, Json, app

__all__ = ["app"]

Out = Annotated[Path, typer.Option(help="pack to write", metavar="F.safetensors")]
Rank = Annotated[Optional[int], typer.Option(help="greatest rank", min=1)]
Energy = Annotated[Optional[float], typer.Option(help="share of the squared singular values to keep in each layer")]
Error = Annotated[Optional[float], typer.Option(help="greatest relative error of each layer")]
Base = Annotated[str, typer.Option(help="their base: takes packs of any layout and kind, and compares pictures", metavar="BASE")]
Packs = Annotated[list[str], typer.Argument(help="packs, each with its scale", metavar="PACK[:SCALE]...")]
Pictures = Annotated[bool, typer.Option(help="compare pictures, too")]


def tell(what: object, cost: "Line", pictures: "Line | None") -> None:
    """Say what was written and what it cost."""
    say(f"{what}: {cost.line()}")
    if pictures:
        say(pictures.line())


class Line(Protocol):
    """What says itself in a line."""

    def line(self) -> str: ...


@app.command()
def merge(
    packs: Packs,
    out: Out,
    how: Annotated[str, typer.Option(help="concat: exact, ranks add; svd: to --rank; sum: exact, full matrices")] = "concat",
    rank: Rank = None,
    base: Base = "",
) -> None:
    """Make one pack of several, whose effect is the weighted sum of theirs, and say what that cost."""
    with shown_errors():
        from sdlora import api

        tell(out, *api.merge_packs(packs, out, how, rank, base))


@app.command()
def average(
    packs: Annotated[list[Path], typer.Argument(help="packs", metavar="PACK...")],
    out: Out,
    rank: Rank = None,
    base: Base = "",
) -> None:
    """Make one pack whose effect is the mean of theirs; exact without --rank."""
    with shown_errors():
        from sdlora import api

        share = 1 / len(packs)
        tell(out, *api.merge_packs([f"{pack}:{share!r}" for pack in packs], out, "svd" if rank else "concat", rank, base))


@app.command()
def resize(
    pack: File,
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    error: Error = None,
    base: Base = "",
) -> None:
    """Write a pack at lower ranks, the best that they allow, and say what is lost."""
    with shown_errors():
        from sdlora import api

        say(f"{pack}: {pack.stat().st_size / 2**20:.2f} MiB" if pack.is_file() else str(pack))
        tell(out, *api.resize_pack(pack, out, rank, energy, error, base))


@app.command()
def bake(
    packs: Packs,
    base: Annotated[str, typer.Option(help="the base: tiny, a folder, a .safetensors file, or a hub id", metavar="BASE")],
    out: Annotated[Path, typer.Option(help="folder, or .safetensors file where the base is one, to write")],
    pictures: Pictures = True,
) -> None:
    """Write a copy of a base with packs in its weights, and say what rounding cost."""
    with shown_errors():
        from sdlora import api

        tell(out, *api.bake_packs(packs, base, out, pictures))


@app.command()
def extract(
    base: Annotated[str, typer.Option(help="what was there before: tiny, a folder, a .safetensors file, or a hub id", metavar="BASE")],
    tuned: Annotated[str, typer.Option(help="and what was trained from it", metavar="BASE")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    error: Error = None,
    pictures: Pictures = True,
) -> None:
    """Write what one base has over another as a pack, and say what is not in it."""
    with shown_errors():
        from sdlora import api

        tell(out, *api.extract_pack(base, tuned, out, api.Budget(rank, energy, error), pictures))


@app.command()
def diff(
    a: File, b: File, most: Annotated[int, typer.Option(help="rows to show", min=1)] = 30, base: Base = "", as_json: Json = False
) -> None:
    """Compare what two packs add, layer by layer, the most different first."""
    with shown_errors():
        from sdlora import api

        found, pictures = api.compare_packs(a, b, base)
        if pictures and not as_json:
            say(pictures.line())
        if as_json:
            print(json.dumps([dataclasses.asdict(one) for one in found], indent=1))
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
    base: Annotated[str, typer.Option(help="its base: also finds intruder dimensions", metavar="BASE")] = "",
    as_json: Json = False,
) -> None:
    """Show how many directions a pack uses in each layer, and advise a rank."""
    with shown_errors():
        from sdlora import api

        found, advice = api.pack_spectrum(pack, out, base)
        if as_json:
            print(json.dumps({"advised_rank": advice, "modules": [dataclasses.asdict(one) for one in found]}, indent=1))
            return
        intruding = ["intruders"] if base else []
        table = Table("module", "rank", "effective", "stable", "for 95 %", *intruding, box=None, pad_edge=False, header_style="bold")
        for one in found:
            cells = (str(len(one.values)), f"{one.effective:.2f}", f"{one.stable:.2f}", str(one.needed))
            new = [" ".join(map(str, one.intruders or ())) or "none"] if base else []
            table.add_row(Text(one.module, overflow="fold"), *cells, *new)
        console().print(table)
        say(f"rank {advice} keeps 95 % of the energy in nine of ten layers")
