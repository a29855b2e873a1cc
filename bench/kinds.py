"""Which kind of adapter learns how much of a folder, with about as many parameters each, as a table and a picture.

    python bench/kinds.py FOLDER [--steps 40] [--set a.b=c] [--out runs/kinds]

Gain: how far the loss on a fifth of the pictures, never trained on, falls below the base's, as a share of it; of each kind that of its
best rate among `--factors` times LoRA's default; where the best is at an end, the next beyond it is tried as well. Kinds with a setting
of their size get the one whose number of parameters is nearest to LoRA's of rank 4; the others have one size, which the table shows.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sdlora import api, lookup, search
from sdlora.learners import pieces
from sdlora.plots import Curve, plot
from sdlora.randomness import stream
from sdlora.search import Bench, Trial

SIZES = {
    "rank": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
    "bottleneck": (1, 2, 4, 8, 12, 16, 24, 32),
    "tokens": (1, 2, 4, 8, 16, 32, 64, 128),
    "dimension": (1024, 4096, 8192, 16384, 32768),
    "block_size": (2, 4, 8, 16, 32),
}
"""Settings that say how large a kind is, and the ladder of each."""
BEYOND = 2
"""Rates tried beyond an end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kinds", nargs="*", default=lookup.names("adapters"))
    parser.add_argument("--factors", nargs="*", type=float, default=[0.3, 1.0, 3.0], help="on the default rates")
    parser.add_argument("--set", dest="assignments", action="append", default=[], help="a setting of all runs, a.b=c")
    parser.add_argument("--out", type=Path, default=Path("runs/kinds"))
    options = parser.parse_args()
    table = api.read_settings(
        None, [f"data.folder={json.dumps(str(options.folder))}", f"train.steps={options.steps}", *options.assignments]
    )
    with TemporaryDirectory() as scratch:
        bench = Bench(api.settle({"name": "kinds", **table}), Path(scratch))
        wanted = size(bench, table, "lora", {"rank": 4})
        rows = [measured(bench, table, kind, wanted, options.factors) for kind in options.kinds]
    print("| kind | parameters | lines of its file | seconds a step | factor on LoRA's rate | gain |\n|---|---|---|---|---|---|")
    for row in rows:
        print("| {kind} | {parameters:,} | {lines} | {seconds:.2f} | {factor:g} | {gain:.1%} |".format(**row))
    curves = [Curve(row["kind"], [(row["parameters"], row["gain"])], joined=False, names=[row["kind"]]) for row in rows]
    api.save_text(options.out / "kinds.json", lambda: json.dumps(rows, indent=1))
    api.save_sheet(options.out / "kinds.png", lambda: plot("What kinds of adapters learn", "parameters", "gain", curves, log_across=True))


def settled(table: dict[str, Any], kind: str, own: dict[str, Any]) -> api.Run:
    return search.holding_out(api.settle({"name": "kinds", **table, "adapter": {**table.get("adapter", {}), "kind": kind, **own}}))


def size(bench: Bench, table: dict[str, Any], kind: str, own: dict[str, Any]) -> int:
    """Parameters of an adapter, from its shapes alone."""
    layers = bench.family.layers()
    put = list(pieces(settled(table, kind, own), bench.family).items())
    made = (one.Adapter(layers[name], config, stream(0, "size")) for name, (one, config) in put)
    counts = (sum(p.numel() for p in delta.parameters()) for delta in made)
    return next(counts) if lookup.find("adapters", kind).Adapter.shared else sum(counts)


def fitting(bench: Bench, table: dict[str, Any], kind: str, wanted: int) -> dict[str, Any]:
    """The setting by which a kind has nearest to as many parameters, if it has one."""
    known = lookup.find("adapters", kind).Config.model_fields
    for name, ladder in SIZES.items():
        if name in known:
            return {name: min(ladder, key=lambda one: abs(size(bench, table, kind, {name: one}) - wanted))}
    return {}


def measured(bench: Bench, table: dict[str, Any], kind: str, wanted: int, factors: list[float]) -> dict[str, Any]:
    """The row of a kind, at its best rate."""
    module, usual = lookup.find("adapters", kind), settled(table, "lora", {}).train.model_dump()
    run = settled(table, kind, fitting(bench, table, kind, wanted))
    tried: dict[float, Trial] = {}

    def attempt(factor: float) -> None:
        rates = {name: factor * usual[name] for name in ("lr", "text_encoder_lr")}
        tried[factor] = bench.trial(search.laid_over(run, {"train": rates}))
        print(f"{kind}: {tried[factor].parameters:,} parameters, x {factor:g}, gain {tried[factor].gain:.2%}", flush=True)

    for factor in factors:
        attempt(factor)
    for _ in range(BEYOND):
        at = sorted(tried)
        best = max(at, key=lambda one: tried[one].gain)
        if best not in (at[0], at[-1]):
            break
        attempt(float(f"{best * 10**0.5 if best == at[-1] else best / 10**0.5:.1g}"))
    best = max(tried, key=lambda one: tried[one].gain)
    return {
        "kind": kind,
        "parameters": tried[best].parameters,
        "lines": len(Path(str(module.__file__)).read_text("utf-8").splitlines()),
        "seconds": tried[best].seconds,
        "factor": best,
        "gain": tried[best].gain,
        "tried": {factor: trial.gain for factor, trial in tried.items()},
    }


if __name__ == "__main__":
    main()
