"""`sdlora pack ...`: what a pack is, and its workshop."""

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after packs.")


@app.callback()
def group() -> None:
    """Look after packs."""
