"""What a terminal shows: lines, errors with their exit codes, and a run's progress."""

import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sdlora.errors import OUR_BUG, UserError

if TYPE_CHECKING:  # torch takes seconds to import: `sdlora --help` must not
    from sdlora.events import Event


def say(text: str, error: bool = False) -> None:
    console(error).print(text, highlight=False, markup=False, soft_wrap=True)


def console(error: bool = False) -> Console:
    return Console(stderr=error)


@contextmanager
def shown_errors() -> Iterator[None]:
    """User errors as one line and their exit code; anything else is our own bug, with its traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # wherever it is installed it warns of kernels that nothing here calls
    try:
        yield
    except UserError as error:
        say(f"error: {error}", error=True)
        raise typer.Exit(error.exit_code) from None
    except (KeyboardInterrupt, typer.Exit):
        raise
    except Exception:
        traceback.print_exc()
        say("error: E-BUG · this is a bug of sdlora, not of yours · please report the lines above", error=True)
        raise typer.Exit(OUR_BUG) from None


def progress(console: Console) -> Progress:
    """The bar of a run, for `show`."""
    columns: list[str | ProgressColumn] = [
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    return Progress(*columns, console=console)


def show(event: "Event", progress: Progress, bar: TaskID) -> str:
    """Put one event on the screen; returns the pack's path when it is there."""
    if event.kind == "step" and event.loss is not None:
        task = progress.tasks[bar]
        speed = f"{task.speed:.1f} steps/s" if task.speed else ""
        before = task.fields.get("smooth", event.loss)
        smooth = 0.95 * before + 0.05 * event.loss
        progress.update(task.id, completed=event.step, visible=True, figures=f"loss {smooth:.4f}  {speed}", smooth=smooth)
    elif event.kind in ("note", "warning", "validation", "paused", *(["failed"] if event.member else [])):
        before = f"{event.member}: " if event.member else ""
        before += f"{event.kind}: " if event.kind in ("warning", "paused") else ""
        progress.console.print(before + event.text, highlight=False, markup=False, soft_wrap=True)
        if event.step:
            progress.update(bar, completed=event.step)
    return event.text if event.kind == "done" else ""


def numbers(text: str, where: str) -> list[int]:
    """`1,2,4` as numbers, rising."""
    try:
        found = sorted({int(part) for part in text.split(",")}) if text.strip() else []
    except ValueError:
        found = [0]
    if any(one < 1 for one in found):
        raise UserError("E-FIND-05", f'"{text}" is no list of sizes', where, "write for example 1,2,4,8")
    return found
