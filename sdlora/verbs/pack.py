"""`sdlora pack ...`: what a pack is and who opens it, its header, and packs handed on."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.table import Table
from rich.text import Text

from sdlora.terminal import console, say, shown_errors

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after packs.")

File = Annotated[Path, typer.Argument(help="the pack: a .safetensors file", metavar="PACK")]
Any_ = Annotated[Path, typer.Argument(help="the pack: a .safetensors file or a bundle", metavar="PACK")]
Source = Annotated[Path, typer.Argument(help="a run folder or a pack", metavar="RUN|PACK")]
Json = Annotated[bool, typer.Option("--json", help="print all of it as JSON")]


@app.callback()
def group() -> None:
    """Look after packs."""


@app.command()
def check(
    pack: Any_,
    base: Annotated[str, typer.Option(help="its base, where that is none of the well-known models")] = "",
    as_json: Json = False,
) -> None:
    """Say what becomes of a pack in each program that reads packs: opened, in part, or not, and at which scale."""
    with shown_errors():
        from sdlora import api

        found = api.check_pack(pack, base)
        if as_json:
            print(json.dumps([dataclasses.asdict(one) for one in found], indent=1))
            return
        table = Table("program", "opens", "modules", "scale", "why", box=None, pad_edge=False, header_style="bold")
        for one in found:
            scale = "" if one.scale is None else " to ".join(dict.fromkeys(f"{value:g}" for value in one.scale))
            why = one.reason if not one.misread else f"silently: {one.reason}. To mend it: {one.fix}"
            cells = (one.reader, one.verdict, f"{one.matched} of {one.modules}", scale, why)
            table.add_row(*(Text(cell, overflow="fold") for cell in cells))
        console().print(table)


@app.command()
def inspect(pack: File, as_json: Json = False) -> None:
    """Show what a pack is: kind, layout, ranks, alpha, base, trigger, scale, size, and the hashes by which it is known."""
    with shown_errors():
        from sdlora import api

        found = api.about_pack(pack)
        if as_json:
            print(json.dumps(found, indent=1))
            return
        table = Table(box=None, pad_edge=False, show_header=False)
        for name, value in api.about_rows(found):
            table.add_row(Text(name), Text(value, overflow="fold"))
        console().print(table)


@app.command()
def edit(
    pack: File,
    set_: Annotated[Optional[list[str]], typer.Option("--set", metavar="KEY=VALUE", help="a field; an empty value takes it out")] = None,
    trigger: Annotated[Optional[str], typer.Option(help="word that calls it up")] = None,
    scale: Annotated[Optional[float], typer.Option(help="recommended scale", min=-4, max=4)] = None,
    thumbnail: Annotated[Optional[Path], typer.Option(help="picture to carry", metavar="F.png")] = None,
    out: Annotated[Optional[Path], typer.Option(help="pack to write; default: the same", metavar="F.safetensors")] = None,
) -> None:
    """Change what a pack says of itself; its tensors stay as they are, byte for byte, and so does the hash that sites know it by."""
    with shown_errors():
        from sdlora import api

        say(str(api.edit_pack(pack, api.header_changes(set_ or [], trigger, scale), thumbnail, out)))


@app.command()
def bundle(
    source: Source,
    out: Annotated[Path, typer.Option(help="folder or ZIP to write", metavar="DIR|F.zip")],
) -> None:
    """Make a unit to hand on: pack, preview, model card, the file that web UIs read, and checksums."""
    with shown_errors():
        from sdlora import api

        files = api.bundle_pack(source, out)
        say(f"{out}: {', '.join(files)}")


@app.command()
def push(
    source: Annotated[Path, typer.Argument(help="a run folder, a pack or a bundle", metavar="RUN|PACK|BUNDLE")],
    repository: Annotated[str, typer.Argument(help="repository of the hub", metavar="OWNER/NAME")],
    public: Annotated[bool, typer.Option("--public/--private", help="who sees a repository that is made for it")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run/--send", help="only say what would be sent, or send it")] = True,
) -> None:
    """Send a pack to the hub. Without --send nothing leaves this machine; HF_TOKEN in the environment is the token."""
    with shown_errors():
        from sdlora import api

        made = api.push_pack(source, repository, private=not public)
        for line in made.lines():
            say(line)
        say("nothing was sent. Send it with --send" if dry_run else made.send())


@app.command("open")
def open_(
    source: Annotated[str, typer.Argument(help="a bundle, a pack, or owner/name[@revision] of the hub", metavar="SOURCE")],
    out: Annotated[Path, typer.Option(help="new folder to put it in", metavar="DIR")],
) -> None:
    """Take somebody's pack: checksums are verified, pickles, code and names that lead elsewhere refused, and said is what it is."""
    with shown_errors():
        from sdlora import api

        for one in api.take_pack(source, out):
            said = f"{one['kind']} of rank {', '.join(map(str, one['ranks']))} for {one['base'] or one['model'] or 'an unnamed base'}"
            say(f"{out / one['file']}: {said}, trigger {one['trigger'] or 'not said'}, scale {one['scale']:g}")


@app.command()
def convert(
    pack: Annotated[Path, typer.Argument(help="the pack: a .safetensors file of any layout")],
    layout: Annotated[str, typer.Option(help="kohya or diffusers")],
    out: Annotated[Path, typer.Option(help="the new file")],
    dtype: Annotated[str, typer.Option(help="fp16, bf16 or fp32")] = "fp16",
    base: Annotated[str, typer.Option(help="its base, where the pack does not name it")] = "",
) -> None:
    """Write a pack in another layout, with the same effect on its base."""
    with shown_errors():
        from sdlora import api

        for line in api.convert_pack(pack, layout, out, dtype, base):
            say(line)
