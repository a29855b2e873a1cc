"""`sdlora run ...`: what became of runs, and how one is going. None of it loads torch."""

import dataclasses
import json
import shlex
import signal
from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.table import Table
from rich.text import Text

from sdlora.errors import UserError
from sdlora.terminal import console, numbers, progress, say, show, shown_errors

if TYPE_CHECKING:
    from sdlora.api import Event, Run, Stop

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="See what became of runs, and how one is going.")

Folder = Annotated[Path, typer.Argument(help="run folder", metavar="RUN")]


@app.command("list")
def list_(
    root: Annotated[Path, typer.Argument(help="folder with runs in it", metavar="DIR")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="print all of it as JSON")] = False,
) -> None:
    """List the runs in a folder, the newest first."""
    with shown_errors():
        from sdlora import record

        if not root.is_dir():
            raise UserError("E-RUN-05", "there is no such folder", root, "name the folder that holds your runs")
        found = record.runs(root)
        if as_json:
            print(json.dumps([dataclasses.asdict(one) for one in found], indent=1, default=str))
            return
        if not found:
            say(f"no run lies in {root}")
            return
        table = Table("run", "state", "step", "loss", "began", "pack", box=None, pad_edge=False, header_style="bold")
        for one in found:
            began = f"{datetime.fromtimestamp(one.started):%Y-%m-%d %H:%M}" if one.started else ""
            loss = f"{one.loss:.4f}" if one.loss is not None else ""
            cells = (one.name, one.state, f"{one.step}/{one.steps}", loss, began, str(one.pack or f"none in {one.folder}"))
            table.add_row(*(Text(cell, overflow="fold") for cell in cells))
        console().print(table)


@app.command()
def watch(run: Folder) -> None:
    """Show how a run is going until it ends. Ctrl-C only stops the showing."""
    with shown_errors():
        from sdlora import record

        checked(run)
        try:
            attach(run)
        except KeyboardInterrupt:
            say(f"no longer shown; the run itself is left as it was. Look again with: sdlora run watch {run}")
            return
        one = record.read(run)
        say(f"pack: {one.pack}" if one.state == "finished" else f"{one.state} at step {one.step}. Go on with: sdlora resume {run}")


@app.command()
def report(
    run: Folder,
    out: Annotated[Optional[Path], typer.Option(help="page to write; default: report.html in the run folder", metavar="F.html")] = None,
) -> None:
    """Write the report of a run again: one page that needs no other file."""
    with shown_errors():
        from sdlora import report

        checked(run)
        report.write(run, out)
        say(str(out or run / "report.html"))


@app.command()
def average(
    run: Folder,
    last: Annotated[int, typer.Option(min=2, help="how many of the newest checkpoints")] = 3,
    steps: Annotated[str, typer.Option(help="or these, as 400,500,600")] = "",
    out: Annotated[Optional[Path], typer.Option(help="pack to write; default: NAME-average.safetensors in the run folder")] = None,
) -> None:
    """Write a pack with the mean of a finished run's checkpoints, exactly: of LoRA's, the ranks add up."""
    with shown_errors():
        from sdlora import api, record

        checked(run)
        path = out or run / f"{record.read(run).name}-average.safetensors"
        pack = api.average_run(run, path, numbers(steps, "--steps"), last)
        say(f"{path}: the mean of steps {pack.metadata['sdlora.average_of_steps']}")


@app.command()
def keep(
    run: Folder,
    step: Annotated[int, typer.Option(min=1, help="of the checkpoint")],
    scale: Annotated[float, typer.Option(min=-4, max=4, help="scale that the pack recommends")] = 1.0,
    out: Annotated[Optional[Path], typer.Option(help="pack to write; default: NAME-STEP.safetensors in the run folder")] = None,
) -> None:
    """Write a checkpoint of a finished run as a pack, as the one that `sdlora find best` recommends."""
    with shown_errors():
        from sdlora import api

        checked(run)
        say(f"{api.keep_checkpoint(run, step, scale, out)}: step {step}, to be used at scale {scale:g}")


def attach(run: Path) -> None:
    """Show what was, and what comes until the run ends."""
    from sdlora import record

    past, since = record.events(run)
    one = record.read(run)
    with progress(console()) as shown:
        bar = shown.add_task("training", total=one.steps or None, figures="", visible=False)
        for event in past:
            if event["kind"] != "step":
                show(told(event), shown, bar)
        if one.loss is not None:  # in one stride: the bar's speed is that of what it sees
            shown.update(bar, completed=one.step, visible=True, figures=f"loss {one.loss:.4f}", smooth=one.loss)
        if not past or past[-1]["kind"] not in record.ENDS:
            for event in record.follow(run, since):
                show(told(event), shown, bar)


def checked(run: Path) -> None:
    """Raise `UserError` if this is no run folder."""
    from sdlora import record

    if not record.is_run(run):
        raise UserError("E-RUN-04", "no run lies here: config.toml or events.jsonl is missing", run, "`sdlora run list` shows the runs")


def told(event: dict[str, Any]) -> Any:
    """A line of the log in the form that the terminal shows."""
    return SimpleNamespace(**{"member": "", **event})


def assisting(train: "Callable[[Stop], Iterator[Event]]") -> None:
    """Take part, without a word, in what another process leads, tells and writes."""
    from sdlora import api

    stop = api.Stop()
    try:
        with stop.on_signals():
            deque(train(stop), 0)
    except KeyboardInterrupt as interrupted:
        raise typer.Exit(getattr(interrupted, "exit_code", 130)) from None


def casting(runs: "list[Run]", out: Path) -> None:
    """Train a cast, a line of progress for each member, then say where the packs lie."""
    from sdlora import api

    again, packs, stop = shlex.join(["sdlora", "resume", str(out)]), dict[str, str](), api.Stop()
    try:
        with stop.on_signals(), progress(console()) as shown:
            bars = {run.name: shown.add_task(run.name, total=run.train.steps, figures="") for run in runs}
            for event in api.train_cast(runs, out, stop):
                if event.kind != "note" or event.step or event.data:  # of each member's beginning its folder tells more
                    pack = show(event, shown, bars[event.member])
                    packs |= {event.member: pack} if pack else {}
    except KeyboardInterrupt as interrupted:
        say(f"stopped at once. Go on from the last checkpoints with: {again}")
        raise typer.Exit(getattr(interrupted, "exit_code", 130)) from None
    finally:
        for pack in packs.values():
            say(f"pack: {pack}")
    if len(packs) < len(runs):
        say(f"stopped, and saved. Go on with: {again}, or with one of them: {again}/NAME")
        raise typer.Exit(128 + (stop.signum or signal.SIGINT))


@app.command()
def queue(root: Annotated[Path, typer.Argument(help="folder of the runs, with a folder `queue`", metavar="DIR")] = Path("runs")) -> None:
    """Train the runs that wait, one after another, until none does. The web page starts this by itself."""
    with shown_errors():
        from sdlora import queue

        for name, what in queue.work(root):
            say(f"{name}: {what}")
