"""`sdlora pack ...`: what a pack is, and its workshop."""

from pathlib import Path
from typing import Annotated

import typer

from sdlora.terminal import say, shown_errors

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after packs.")


@app.callback()
def group() -> None:
    """Look after packs."""


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
