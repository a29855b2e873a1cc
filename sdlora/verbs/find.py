"""`sdlora find ...`: what suits a set of pictures, measured."""

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure what suits a set of pictures.")


@app.callback()
def group() -> None:
    """Measure what suits a set of pictures."""
