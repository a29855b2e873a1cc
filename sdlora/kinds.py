"""`sdlora find kind`: kinds of adapters at several ranks, trained alike on the same pictures, judged and laid side by side."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image

from sdlora import devices, eyes, lookup, pictures, plan, safeio
from sdlora.adapter import Bank
from sdlora.config import Run, parse
from sdlora.errors import UserError, without_frames
from sdlora.events import Event
from sdlora.judge import Asking, Judge, Judged, material
from sdlora.learners import given, memory, pieces
from sdlora.plots import Curve, plot
from sdlora.search import HELD, Bench, Trial, holding_out, laid_over
from sdlora.settling import settle
from sdlora.studio import Studio

UPWARD = {"gain": "gain on the loss held out", "likeness": "likeness", "drift": "drift"}
ACROSS = {"parameters": ("parameters", 1.0), "memory_bytes": ("memory, GB", 1e9), "seconds": ("seconds a step", 1.0)}
"""What is drawn against what, how it is called, and in what unit."""


@dataclass(frozen=True)
class Wanted:
    """What is compared, and on which budget."""

    kinds: Sequence[str]
    ranks: Sequence[int]
    steps: int = 100
    seeds: int = 1  # trainings of each, of whose figures the mean is told


@dataclass(frozen=True)
class Cell:
    """One kind at one rank."""

    kind: str
    rank: int | None  # None: it has none
    settled: Run

    @property
    def label(self) -> str:
        return self.kind if self.rank is None else f"{self.kind} {self.rank}"


@without_frames
def find(table: Mapping[str, Any], wanted: Wanted, asking: Asking, out: Path, source: object = "") -> Iterator[Event]:
    """Train and judge each cell that `out`/kind.json does not hold yet; the last event's data is the table of all.

    `table`: the settings of a run, whose adapter's kind and rank are what is varied. The rate is LoRA's, times what suits the kind
    (`defaults.ADAPTER_RATES`), unless it is set.
    """
    grid, file = cells(table, wanted, source), out / "kind.json"
    bench = Bench(grid[0].settled, out / "kind")
    measures = [
        memory(cell.settled, bench.family, pieces(cell.settled, bench.family), bench.dataset) for cell in grid
    ]  # or says what is wrong
    if holding_out(grid[0].settled) is not grid[0].settled:
        count = len(bench.dataset.held)
        yield Event("note", f"the settings hold no picture out: {HELD:.0%} of them are, {count} in all, to measure and judge by")
    known, judge, rows = _known(file), None, []
    for cell, counted in zip(grid, measures, strict=True):
        key = _key(cell, bench, wanted, asking)
        if key in known:
            yield Event("note", f"{cell.label}: known from {file}")
        else:
            judge = judge or _judge(bench, asking)
            peak = plan.choose(cell.settled.train, counted, devices.free_bytes(bench.accelerator.device)).peak
            known[key] = {"kind": cell.kind, "rank": cell.rank, **_measured(bench, judge, cell, wanted.seeds, peak), "key": key}
            safeio.write(file, json.dumps({"rows": [*known.values()]}, indent=1))
            yield Event(
                "note", "{label}: gain {gain:.2%}, likeness {likeness:.3f}, drift {drift:.3f}".format(label=cell.label, **known[key])
            )
        rows.append(known[key])
    safeio.write(out / "kind.png", pictures.encode(drawn(rows), {}))
    yield Event("done", f"written: {file}, {out / 'kind.png'}", data={"rows": rows})


def cells(table: Mapping[str, Any], wanted: Wanted, source: object = "") -> list[Cell]:
    """Each kind at each rank, a kind without one once, on a budget that is the same for all."""
    if not wanted.kinds:
        raise UserError("E-FIND-06", "no kind of adapter is named", "--kinds", f"name some of {', '.join(lookup.names('adapters'))}")
    own, found = dict(table.get("adapter", {})), []
    for kind in dict.fromkeys(wanted.kinds):
        fields = lookup.find("adapters", kind).Config.model_fields
        kept = {name: value for name, value in own.items() if name in fields}
        ranks = wanted.ranks if "rank" in fields else [None]
        if not ranks:
            raise UserError("E-FIND-07", f"{kind} has a rank, and none is named", "--ranks", "write for example 1,4,16")
        for rank in ranks:
            adapter = {**kept, "kind": kind, **({} if rank is None else {"rank": rank})}
            settled = settle({**table, "adapter": adapter, "train": {**table.get("train", {}), "steps": wanted.steps}}, source)
            short = {"warmup_steps": min(given(settled.train.warmup_steps), wanted.steps // 10)}
            found.append(Cell(kind, rank, laid_over(settled, {"train": short})))
    return found


def drawn(rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Gain, likeness and drift, a row each, against parameters, memory and time."""
    plots = []
    for figure, upward in UPWARD.items():
        for measure, (across, unit) in ACROSS.items():
            curves = []
            for kind in dict.fromkeys(row["kind"] for row in rows):
                own = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["rank"] or 0)
                ranks = ["" if row["rank"] is None else str(row["rank"]) for row in own]
                curves.append(Curve(kind, [(row[measure] / unit, row[figure]) for row in own], names=ranks))
            plots.append(plot("", across, upward, curves, log_across=measure == "parameters"))
    width, height = plots[0].size
    paper = Image.new("RGB", (len(ACROSS) * width, len(UPWARD) * height))
    for i, one in enumerate(plots):
        paper.paste(one, (i % len(ACROSS) * width, i // len(ACROSS) * height))
    return paper


def _measured(bench: Bench, judge: Judge, cell: Cell, seeds: int, counted: int) -> dict[str, Any]:
    """The figures of a cell, means over its trainings."""
    trials: list[Trial] = []
    judged: list[Judged] = []

    def look(bank: Bank) -> None:
        judge.studio = Studio(bench.family, bank, {})
        judged.extend(judge.ask(cell.settled.name, cell.settled.train.steps or 0, [1.0]))

    for seed in range(cell.settled.seed, cell.settled.seed + seeds):
        trials.append(bench.trial(parse({**cell.settled.model_dump(exclude_none=True), "seed": seed}), then=look))
    measured = [trial.peak_bytes for trial in trials if trial.peak_bytes is not None]
    return {
        "parameters": trials[0].parameters,
        "seconds": mean(trial.seconds for trial in trials),
        "memory_bytes": max(measured) if measured else counted,
        "memory": "measured" if measured else "counted",
        "gain": mean(trial.gain for trial in trials),
        "gains": [trial.gain for trial in trials],
        **{name: mean(getattr(one, name) for one in judged) for name in ("likeness", "drift", "score", "memorisation")},
        "base": {name: getattr(judge.rows[0], name) for name in ("likeness", "score")},
        "eyes": judge.eyes.name,
    }


def _judge(bench: Bench, asking: Asking) -> Judge:
    studio = Studio(bench.family, Bank(bench.family.components), {})
    return Judge(studio, *material(bench.settled, bench.dataset, asking), eyes.opened(asking.eyes, bench.family))


def _known(file: Path) -> dict[str, dict[str, Any]]:
    """Cells that were finished before, by what they are made of; a file that is none of ours holds none."""
    try:
        return {row["key"]: row for row in json.loads(file.read_text("utf-8"))["rows"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _key(cell: Cell, bench: Bench, wanted: Wanted, asking: Asking) -> str:
    """All that the figures of a cell depend on."""
    parts = [cell.settled.model_dump(mode="json"), bench.base.name, bench.dataset.digest, wanted.seeds, asdict(asking)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
