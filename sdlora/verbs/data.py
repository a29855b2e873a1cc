"""`sdlora data ...`: looking after a folder of pictures."""

from pathlib import Path
from typing import Annotated

import typer

from sdlora.terminal import say, shown_errors

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after a folder of pictures.")


@app.command()
def edit(
    folder: Annotated[Path, typer.Argument(help="folder with the pictures", metavar="DIR")],
    find: Annotated[str, typer.Option(help="text to replace wherever it stands")] = "",
    replace: Annotated[str, typer.Option(help="text to put there")] = "",
    remove: Annotated[str, typer.Option(help="tag to take out")] = "",
    add: Annotated[str, typer.Option(help="tag to put at the end")] = "",
    write: Annotated[bool, typer.Option("--write", help="make the changes instead of showing them")] = False,
) -> None:
    """Change the captions of a folder; without --write it only shows what would change."""
    with shown_errors():
        from sdlora import api

        changes = api.edit_captions(folder, api.Edit(find, replace, remove, add), write)
        for path, before, after in changes:
            say(f"{path}\n- {before.strip()}\n+ {after.strip()}")
        say(f"{len(changes)} caption files {'changed' if write else 'would change; --write does it'}")


@app.command()
def caption(
    folder: Annotated[Path, typer.Argument(help="folder with the pictures", metavar="DIR")],
    by: Annotated[str, typer.Option("--with", help="name (the file's), florence2 (sentences) or wd14 (tags)")],
    model: Annotated[str, typer.Option(help="folder or hub id of its model; default: one that is downloaded once")] = "",
    prefix: Annotated[str, typer.Option(help="text before each caption; [trigger] stands for the run's trigger")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="new captions for pictures that have one, too")] = False,
) -> None:
    """Give captions to the pictures of a folder that have none, as .txt files or in its metadata.jsonl."""
    with shown_errors():
        from sdlora import api
        from sdlora.data.walk import shown

        left, written = api.caption_folder(folder, api.Captioning(by, model, prefix, overwrite))
        captions = []
        for path, text in written:
            say(f"{shown(path)}: {text or f'nothing written, for {by} has nothing to say of it'}")
            captions.append(text)
        say(f"{sum(map(bool, captions))} captions written, {left + captions.count('')} pictures left as they were")
