"""Whether a process keeps what it takes: memory, tensors and modules after runs, studios and searches, twenty of each in one process.

python bench/memory.py [--times 20] [--what runs,studios,searches] [--write]

All on the embedded base. Runs end in turn as a pack, as a pack with held-out loss, previews and a judge, as a cast of two, by an error, by
a stop, and by nobody following them; they take two steps. A process for each kind of work; RSS is as the system tells it, with whatever
the C library's allocator holds back. Ends with 1 where more than a tenth came after the second time.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import living
import psutil
import rows

from sdlora import api

PICTURES = Path(__file__).resolve().parent.parent / "datasets" / "tavi"
FEW = 4
"""Of them, so that most of the time goes by at beginnings and ends, where memory is taken and given back."""
SHOWN = (1, 2, 5, 10, 20)
MOST = 0.1
RICH = {"preview": {"scales": [1.0], "every": 1, "steps": 2}, "validation": {"share": 0.25, "judge": 1}}
ASKING = api.Asking(scales=(1.0,), prompts=1, seeds=1, steps=2)
Do = Callable[[int], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--what", default=",".join(WORK))
    parser.add_argument("--write", action="store_true", help="put the table into docs/measured.md")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.inside:
        print(json.dumps(measured(WORK[said.what], said.times)))
        return
    found = {what: apart(what, said.times) for what in said.what.split(",")}
    text = table(found)
    print(text)
    if said.write:
        rows.put("memory", f"{text}\n\n{rows.conditions()} `python bench/memory.py`")
    sys.exit(int(max(map(drift, found.values())) > MOST))


def apart(what: str, times: int) -> list[list[int]]:
    """The figures of one kind of work, done in a process of its own."""
    words = [sys.executable, __file__, "--inside", "--what", what, "--times", str(times)]
    lines = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    return list(json.loads(lines.splitlines()[-1]))


def measured(work: Callable[[Path], Do], times: int) -> list[list[int]]:
    """After each time: bytes resident, tensors, their bytes, modules; nobody calls Python's collector."""
    with tempfile.TemporaryDirectory() as root:
        do, found = work(Path(root)), list[list[int]]()
        for i in range(times):
            do(i)
            found.append([psutil.Process().memory_info().rss, *living.count()])
    return found


def drift(found: list[list[int]]) -> float:
    """The last RSS over that after the second time, less 1."""
    return found[-1][0] / found[min(1, len(found) - 1)][0] - 1


def table(found: dict[str, list[list[int]]]) -> str:
    """RSS in MB, and tensors with their MB, and modules, after the times that are shown."""
    shown = [i for i in SHOWN if i <= min(map(len, found.values()))]
    lines = [f"| after | {' | '.join(map(str, shown))} | after the last, over the second |", "|---|" + "---|" * (len(shown) + 1)]
    for what, each in found.items():
        lines.append(f"| {what}: RSS, MB | {' | '.join(str(each[i - 1][0] // 2**20) for i in shown)} | {drift(each):+.1%} |")
        kept = [f"{tensors}, {size / 2**20:.1f}, {modules}" for _, tensors, size, modules in (each[i - 1] for i in shown)]
        lines.append(f"| ... tensors, their MB, modules | {' | '.join(kept)} | |")
    return "\n".join(lines)


def settled(root: Path, **tables: Any) -> api.Run:
    """Two steps on a few pictures of the bundled character."""
    for path in sorted(PICTURES.iterdir())[: 2 * FEW]:  # each with its caption
        (root / "pictures").mkdir(exist_ok=True)
        shutil.copy(path, root / "pictures")
    train = {"steps": 2, "batch_size": 2, "save_every": 1}
    usual = {"name": "mira", "data": {"folder": str(root / "pictures")}, "train": train, "preview": {"scales": [], "every": 0, "steps": 2}}
    return api.settle({**usual, **tables})


def exhaust(events: Iterator[api.Event], until: str = "") -> None:
    for event in events:
        if event.kind == until:
            break


def runs(root: Path) -> Do:
    """Train, to another end each time."""

    def stopped(out: Path) -> None:
        stop = api.Stop()
        stop.stop = True
        exhaust(api.train(settled(root), out, stop))

    def failed(out: Path) -> None:
        train = {"steps": 2, "batch_size": 2, "memory_gb": 1e-6}
        try:
            exhaust(api.train(settled(root, train=train), out))
        except api.UserError:
            return
        raise SystemExit("a run fitted into a kilobyte")

    ends: list[Callable[[Path], None]] = [
        lambda out: exhaust(api.train(settled(root), out)),
        lambda out: exhaust(api.train(settled(root, **RICH), out)),
        lambda out: exhaust(api.train_cast([settled(root, name="mira"), settled(root, name="nora")], out)),
        failed,
        stopped,
        lambda out: exhaust(api.train(settled(root, **RICH), out), until="step"),
    ]
    turns = itertools.cycle([1, 0, 2, 3, 4, 5])  # what takes most comes first: the second time is to have seen it
    return lambda i: ends[next(turns)](root / str(i))


def studios(root: Path) -> Do:
    """Open a studio with a pack, draw, put another on, draw, take one off."""
    exhaust(api.train(settled(root), root / "run"))
    pack = api.open_pack(root / "run" / "mira.safetensors")

    def do(i: int) -> None:
        studio = api.open_studio([pack])
        second = studio.add(pack)
        studio.render([studio.recipe("mira", steps=2, seed=i, scales=tuple((name, 0.5) for name in studio.packs))])
        studio.remove(second)

    return do


def searches(root: Path) -> Do:
    """A rate, kinds, the best of a run, in turn."""
    run = settled(root, validation={"share": 0.25})
    exhaust(api.train(run, root / "run"))
    wanted = api.KindsWanted(["lora", "ia3"], [1], steps=2)
    turns: list[Do] = [
        lambda i: exhaust(api.find_kind(run.model_dump(exclude_none=True), wanted, ASKING, root / f"kind-{i}")),
        lambda i: exhaust(api.find_best(root / "run", ASKING, out=root / f"best-{i}")),
        lambda i: exhaust(api.find_rate(run, root / f"rate-{i}", 8, 1e-4, 1e-2)),
    ]
    return lambda i: turns[i % len(turns)](i)


WORK: dict[str, Callable[[Path], Do]] = {"runs": runs, "studios": studios, "searches": searches}


if __name__ == "__main__":
    main()
