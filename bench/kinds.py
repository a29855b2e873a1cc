"""Which kind of adapter learns how much of a folder, with about as many parameters each, as a table and a picture.

    python bench/kinds.py FOLDER [--steps 40] [--set a.b=c] [--out runs/kinds]

Gain: how far the loss on a fifth of the pictures, never trained on, falls below the base's, as a share of it; of each kind that of its
best rate among `--factors` times the default. Kinds with a rank get the one whose number of parameters is nearest to LoRA's of rank 4;
the others have one size, which the table shows.
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

RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


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
        wanted = size(bench, table, "lora", 4)
        rows = [measured(bench, table, kind, wanted, options.factors) for kind in options.kinds]
    print("| kind | parameters | lines of its file | seconds a step | rate | gain |\n|---|---|---|---|---|---|")
    for row in rows:
        print("| {kind} | {parameters:,} | {lines} | {seconds:.2f} | {lr:.2g} | {gain:.1%} |".format(**row))
    curves = [Curve(row["kind"], [(row["parameters"], row["gain"])], joined=False, names=[row["kind"]]) for row in rows]
    api.save_text(options.out / "kinds.json", lambda: json.dumps(rows, indent=1))
    api.save_sheet(options.out / "kinds.png", lambda: plot("What kinds of adapters learn", "parameters", "gain", curves, log_across=True))


def settled(table: dict[str, Any], kind: str, rank: int | None) -> api.Run:
    own = {"kind": kind, **({"rank": rank} if rank else {})}
    return search.holding_out(api.settle({"name": "kinds", **table, "adapter": {**table.get("adapter", {}), **own}}))


def size(bench: Bench, table: dict[str, Any], kind: str, rank: int | None) -> int:
    """Parameters of an adapter, from its shapes alone."""
    layers = bench.family.layers()
    put = pieces(settled(table, kind, rank), bench.family).items()
    return sum(p.numel() for name, (one, config) in put for p in one.Adapter(layers[name], config, stream(0, "size")).parameters())


def measured(bench: Bench, table: dict[str, Any], kind: str, wanted: int, factors: list[float]) -> dict[str, Any]:
    """The row of a kind, at its best rate."""
    module = lookup.find("adapters", kind)
    ranks = RANKS if "rank" in module.Config.model_fields else ()
    rank = min(ranks, key=lambda one: abs(size(bench, table, kind, one) - wanted), default=None)
    run = settled(table, kind, rank)
    trials: list[Trial] = []
    for factor in factors:
        rates = {name: factor * run.train.model_dump()[name] for name in ("lr", "text_encoder_lr")}
        trials.append(bench.trial(search.laid_over(run, {"train": rates})))
    best = max(trials, key=lambda one: one.gain)
    lines = len(Path(str(module.__file__)).read_text("utf-8").splitlines())
    return {
        "kind": kind,
        "parameters": best.parameters,
        "lines": lines,
        "seconds": best.seconds,
        "lr": best.settled.train.lr,
        "gain": best.gain,
    }


if __name__ == "__main__":
    main()
