"""`sdlora fleet`: many runs and casts over the CPUs or GPUs of a Ray cluster, or the same list for Slurm and Kubernetes."""

import getpass
import os
import secrets
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sdlora.errors import UserError
from sdlora.terminal import console, say, shown_errors

if TYPE_CHECKING:  # torch takes seconds to import: `sdlora --help` must not
    from sdlora.fleet.folder import Job, Standing, State
    from sdlora.fleet.work import Fleet

app = typer.Typer()
PRINTED = ("slurm", "ray-yaml")
ORDER: "Sequence[State]" = ("running", "failed", "stopped", "waiting", "finished")
SHOWN = 30
"""Rows of the table: what is read for each, again and again, must not grow with the fleet."""


@app.command()
def fleet(
    configs: Annotated[Optional[list[Path]], typer.Argument(help="TOML files of runs and casts", metavar="[F.toml]...")] = None,
    on: Annotated[str, typer.Option(help="Ray cluster: auto (the one on this machine) or ray://HOST; default: a Ray of its own")] = "",
    in_: Annotated[Path, typer.Option("--in", help="folder of the fleet; the same again goes on", metavar="DIR")] = Path("runs/fleet"),
    store: Annotated[str, typer.Option(help="where runs lie: a path that all nodes see, or s3://...; default: DIR/runs")] = "",
    set_: Annotated[Optional[list[str]], typer.Option("--set", metavar="A.B=C", help="set one setting of all; may be repeated")] = None,
    over: Annotated[Optional[list[str]], typer.Option(help="make each file a sweep: setting and its values, a.b=x,y")] = None,
    members: Annotated[int, typer.Option(help="cut casts and sweeps into casts of so many; 0: as a card holds", min=0)] = 0,
    card_gb: Annotated[float, typer.Option(help="memory of a card: several jobs are packed onto one by their plans", min=0)] = 0.0,
    gpus: Annotated[Optional[float], typer.Option(help="GPUs of each job; default: one if the cluster has any", min=0)] = None,
    cpus: Annotated[int, typer.Option(help="CPUs, and threads, of each job", min=1)] = 1,
    user: Annotated[str, typer.Option(help="whose jobs these are; default: who you are here")] = "",
    priority: Annotated[int, typer.Option(help="of these jobs; higher goes first")] = 0,
    limit: Annotated[Optional[list[str]], typer.Option(help="jobs of a user at once, USER=N; may be repeated")] = None,
    workers: Annotated[int, typer.Option(help="CPUs of the fleet's own Ray; 0: all of this machine", min=0)] = 0,
    attempts: Annotated[int, typer.Option(help="times that a job may be lost before it has failed", min=1)] = 5,
    add: Annotated[bool, typer.Option("--add", help="only add the jobs, also to a fleet that is at work")] = False,
    print_: Annotated[str, typer.Option("--print", help="write the list for slurm, or as ray-yaml for Kubernetes, instead")] = "",
    image: Annotated[str, typer.Option(help="for ray-yaml: container image with sdlora[ray] in it")] = "sdlora:latest",
    claim: Annotated[str, typer.Option(help="for ray-yaml: PersistentVolumeClaim that holds DIR")] = "sdlora-fleet",
) -> None:
    """Run many jobs over a cluster, or this machine's CPUs. Whatever dies is started elsewhere and goes on to the same bytes."""
    with shown_errors():
        if print_ and print_ not in PRINTED:
            raise UserError("E-FLEET-16", f'there is no script called "{print_}"', "--print", f"choose one of {', '.join(PRINTED)}")
        from sdlora import api
        from sdlora.fleet import asking, scripts
        from sdlora.fleet.folder import Folder, Job
        from sdlora.fleet.work import Fleet

        place = Fleet(Folder(in_.absolute()), _store(store, in_), _limits(limit or []), attempts)
        like = Job("", user or getpass.getuser(), priority, cpus, gpus)
        asked = list[tuple[Job, str]]()
        for config in configs or []:
            if api.is_cast(config):
                runs = api.settle_cast(api.cast_tables(config), config, set_ or [])
            else:
                table = api.read_settings(config, set_ or [])
                runs = api.sweep(table, over, config) if over else [api.settle(table, config)]
            asked += asking.jobs(config.stem, runs, asking.Terms(members, card_gb), like)
        new = asking.add(place.folder, place.store, asked)
        known = place.folder.jobs()
        if not known:
            raise UserError("E-FLEET-01", "there is no job in this fleet", in_, "name TOML files of runs: sdlora fleet configs/*.toml")
        if print_ == "slurm":
            print(scripts.slurm(place, known), end="")
        elif print_:
            print(scripts.ray_yaml(place, known, image, claim, workers or 1), end="")
        else:
            say(f"{new} new of {len(known)} jobs in {in_}")
            if not add:
                _drive(place, on, workers or os.cpu_count() or 1)


def _drive(place: "Fleet", on: str, cpus: int) -> None:
    """Work the fleet off before the user's eyes."""
    if not on:  # a Ray of its own listens to the whole network: nobody else may come in. Ray reads this when it is imported
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        from sdlora.fleet import rays
    except ImportError as error:
        raise UserError("E-FLEET-17", f"fleets need Ray ({error})", "ray", 'pip install "sdlora[ray]"') from None
    from sdlora.fleet import work
    from sdlora.stop import noted

    standings: list[tuple[Job, Standing]] = []
    screen = Live(console=console(), auto_refresh=False, transient=True)
    with place.folder.held(), rays.cluster(on, cpus) as engine, noted() as asked, screen:
        for standings in place.work(engine, asked):
            if screen.console.is_terminal:
                screen.update(table(standings, place), refresh=True)
    console().print(table(standings, place))
    if asked:
        say("stopped. Go on with the same command")
        raise typer.Exit(128 + asked[0])
    work.check(standings, place.folder.place)
    say(f"runs: {place.store}")


def table(standings: "Sequence[tuple[Job, Standing]]", place: "Fleet") -> Table:
    """How many jobs stand how, and the first of them one by one: those at work, then those that failed."""
    from sdlora import record
    from sdlora.fleet.storage import Storage

    found = Table("job", "user", "priority", "state", "step", "loss", "attempts", "node", "why", box=None, header_style="bold")
    count = Counter(one.state for _, one in standings)
    found.caption = ", ".join(f"{count[state]} {state}" for state in ORDER if count[state])
    for job, one in sorted(standings, key=lambda both: ORDER.index(both[1].state))[:SHOWN]:
        step, loss = "", ""
        if Storage.is_local(place.store):
            runs = record.runs(Path(place.store) / job.name) if (Path(place.store) / job.name).is_dir() else []
            step = f"{min(run.step for run in runs)}/{max(run.steps for run in runs)}" if runs else ""
            loss = " ".join(f"{run.loss:.4f}" for run in runs if run.loss is not None)
        node = one.attempts[-1].node if one.attempts else ""
        cells = (job.name, job.user, str(job.priority), one.state, step, loss, str(len(one.attempts)), node, one.why)
        found.add_row(*(Text(cell, overflow="fold") for cell in cells))
    return found


def _store(store: str, place: Path) -> str:
    """Where runs lie, in words that hold on every node."""
    from sdlora.fleet.storage import Storage

    if not store:
        return str(place.absolute() / "runs")
    return str(Path(store).absolute()) if Storage.is_local(store) else store


def _limits(said: Sequence[str]) -> dict[str, int]:
    found = {}
    for one in said:
        user, equals, number = one.rpartition("=")
        if not equals or not user or not number.isdecimal() or int(number) < 1:
            raise UserError("E-FLEET-18", f'"{one}" is not of the form USER=N', "--limit", "write for example --limit anna=2")
        found[user] = int(number)
    return found
