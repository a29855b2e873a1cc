"""What a terminal shows: lines, errors with their exit codes, and a run's progress."""

import logging
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
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
)

from sdlora.errors import OUR_BUG, UserError

if TYPE_CHECKING:  # torch takes seconds to import: `sdlora --help` must not
    from sdlora.events import Event


def say(text: str, error: bool = False) -> None:
    console(error).print(text, highlight=False, markup=False, soft_wrap=True)


def console(error: bool = False) -> Console:
    return Console(stderr=error, emoji=False)  # a folder may well be called :cat:


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
    ]
    return Progress(*columns, console=console)


def show(event: "Event", progress: Progress, bar: TaskID) -> str:
    """Put one event on the screen; returns the pack's path when it is there."""
    if event.kind == "step" and event.loss is not None:
        task = progress.tasks[bar]
        smooth = 0.95 * task.fields.get("smooth", event.loss) + 0.05 * event.loss
        first = task.fields.get("first", (time.monotonic(), event.step))
        figures = f"loss {smooth:.4f}  {pace(first, event.step, task.total or 0)}"
        progress.update(task.id, completed=event.step, visible=True, figures=figures, smooth=smooth, first=first)
    elif event.kind in ("note", "warning", "validation", "paused", *(["failed"] if event.member else [])):
        before = f"{event.member}: " if event.member else ""
        before += f"{event.kind}: " if event.kind in ("warning", "paused") else ""
        progress.console.print(before + event.text, highlight=False, markup=False, soft_wrap=True)
        if event.step:
            progress.update(bar, completed=event.step)
    return event.text if event.kind == "done" else ""


def pace(first: tuple[float, int], step: int, steps: float) -> str:
    """How fast steps are taken since the first that was told, (seconds, step), and how long the rest will take; several are told at once,
    so that of the first second nothing is to be said."""
    took, done = time.monotonic() - first[0], step - first[1]
    if took < 1 or done < 1:
        return ""
    return f"{done / took:.1f} steps/s, {timedelta(seconds=round((steps - step) * took / done))} left"


def numbers(text: str, where: str) -> list[int]:
    """`1,2,4` as numbers, rising."""
    try:
        found = sorted({int(part) for part in text.split(",")}) if text.strip() else []
    except ValueError:
        found = [0]
    if any(one < 1 for one in found):
        raise UserError("E-FIND-05", f'"{text}" is no list of sizes', where, "write for example 1,2,4,8")
    return found
