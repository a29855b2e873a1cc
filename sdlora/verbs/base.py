"""`sdlora base ...`: what a base model is."""

import json
from typing import Annotated

import typer

from sdlora.errors import BAD_INPUT
from sdlora.terminal import say, shown_errors

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="See what a base model is.")


@app.callback()
def group() -> None:
    """See what a base model is."""


@app.command()
def inspect(
    base: Annotated[str, typer.Argument(help="tiny, a diffusers folder, a .safetensors checkpoint, or a hub id", metavar="BASE")],
    as_json: Annotated[bool, typer.Option("--json", help="print all of it as JSON")] = False,
) -> None:
    """Say of which family a base is, what its network predicts, and whether all of it is there and sound."""
    with shown_errors():
        from sdlora import api

        found = api.inspect_base(base)
        if as_json:
            print(json.dumps(found, indent=1))
        else:
            how = "" if found["prediction_is_read"] else " (assumed: no file of it says so; a run measures it)"
            say(f"{found['name']}: {found['family']}, made for {found['size_px']} px, predicts {found['prediction']}{how}")
            for part, one in found.get("components", {}).items():
                say(f"{part}: {one['parameters']:,} parameters in {one['precision']}, SHA-256 {one['sha256']}")
            say("complete" if found["complete"] else f"not usable: {found['problem']}")
        if not found["complete"]:
            raise typer.Exit(BAD_INPUT)
