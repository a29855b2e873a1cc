"""What a run costs against the number of its pictures, and against its rank: time to the first step and its parts, a step, memory.

    python bench/scale.py [--pictures 10,1000] [--ranks 4,16,64,128] [--drawn 10,1000,100000] [--processes 1,2] [--steps 20] [--write]

Whole runs of `sdlora train` on the embedded base, each a process with a cache of its own, on generated pictures of 64 px with captions;
for more pictures than are sensibly encoded here, drawing samples alone, from latents made up for as many; and the steps of a run that
several processes take together, on as many threads.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rows
import torch
from PIL import Image

from sdlora.data.batches import Prepared, grouped

QUIET = ("preview.scales=[]", "preview.every=0", "train.log_every=1", "data.prior_share=0")
STAGES = ("pictures", "base", "plan", "latents", "step")


def pictures(folder: Path, count: int) -> Path:
    """Squares of sixteen random colours each; every one is another."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        colours = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(colours.repeat(16, 0).repeat(16, 1)).save(folder / f"{i:06d}.png", compress_level=1)
        (folder / f"{i:06d}.txt").write_text(f"squares {i}", encoding="utf-8")
    return folder


def trained(shown: Path, place: Path, settings: Sequence[str], processes: int = 1, threads: int = 0) -> tuple[list[dict[str, Any]], Any]:
    """The events of one run, and what the system counted of it."""
    command = [sys.executable, "-m", "sdlora"]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["train", str(shown), "--name", "scale", "--out", str(place / "run")]
    command += [word for setting in (*QUIET, *settings) for word in ("--set", setting)]
    environment = {**os.environ, "SDLORA_CACHE": str(place / "cache"), **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    with (place / "said").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit((place / "said").read_text())
    return [json.loads(line) for line in (place / "run" / "events.jsonl").read_text().splitlines()], usage


def step_ms(events: Sequence[dict[str, Any]]) -> float:
    times = [event["time"] for event in events if event["kind"] == "step"]
    return 1e3 * statistics.median(b - a for a, b in itertools.pairwise(times[1:]))


def one_run(shown: Path, rank: int, steps: int, place: Path) -> str:
    """Cells of one run: seconds of stages, milliseconds a step, peak memory, bytes of the pack."""
    settings = (f"train.steps={steps}", f"adapter.rank={rank}", f"adapter.alpha={rank}", f"train.save_every={steps}")
    events, usage = trained(shown, place, settings)
    startup = next(event["data"]["startup_s"] for event in events if "startup_s" in event.get("data", {}))
    size = (place / "run" / "scale.safetensors").stat().st_size
    stages = " | ".join(f"{startup[stage]:.1f}" for stage in STAGES)
    return f"{startup['process']:.1f} | {stages} | {step_ms(events):.0f} | {usage.ru_maxrss / 2**10:.0f} | {size / 1e6:.2f} |"


def shared(shown: Path, processes: int, threads: int, steps: int, place: Path) -> str:
    """Cells of a run that several processes take together."""
    events, _ = trained(shown, place, (f"train.steps={steps}", f"train.save_every={steps}"), processes, threads)
    said = next((event["data"]["gradient_bytes"] for event in events if "gradient_bytes" in event.get("data", {})), 0)
    return f"{step_ms(events):.0f} | {said / 1e6:.2f} |"


def drawing(count: int, batch: int = 4, times: int = 200) -> str:
    """Cells: milliseconds to draw a batch, megabytes that so many pictures take."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    latents = [[(torch.zeros(4, 16, 16), torch.ones(4, 16, 16))] for _ in range(count)]
    text = torch.zeros(count + 1, 77, dtype=torch.long)
    one = Prepared(
        seed=0, latents=latents, text=text, caption_dropout=0.1, pool=range(count), rows=[[i] for i in range(count)],
        frames=[[torch.zeros(6)]] * count, weights=[[torch.ones(1, 1, 1)]] * count, prior=[count], prior_share=0.0,
    )  # fmt: skip
    took = []
    for i in range(times):
        began = time.perf_counter()
        list(grouped([one], [(0, number) for number in range(i * batch, (i + 1) * batch)]))
        took.append(1e3 * (time.perf_counter() - began))
    held = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    return f"{statistics.median(took):.2f} ({min(took):.2f} to {max(took):.2f}) | {held:.0f} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lists = {"pictures": "10,1000", "ranks": "4,16,64,128", "drawn": "10,1000,100000", "processes": "1,2"}
    for name, value in lists.items():
        parser.add_argument(f"--{name}", default=value)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="put the figures into docs/measured.md")
    options = parser.parse_args(arguments)
    chosen = {name: [int(one) for one in getattr(options, name).split(",") if one] for name in lists}
    head = "imports, s | pictures read | base | plan | latents | first step | ms a step | peak, MB | pack, MB |"
    lines = [rows.conditions(), "", f"| pictures | rank | {head}", "|" + "---|" * 11]
    few = min(chosen["pictures"], default=10)
    runs = [(count, 16) for count in chosen["pictures"]] + [(few, rank) for rank in chosen["ranks"]]
    for count, rank in dict.fromkeys(runs):
        with tempfile.TemporaryDirectory() as place:
            shown = pictures(Path(place) / "pictures", count)
            lines.append(f"| {count:,} | {rank} | {one_run(shown, rank, options.steps, Path(place))}")
    lines += [
        "",
        "| processes | threads of each | ms a step of 16 samples | MB of gradients that pass between them a step |",
        "|---|---|---|---|",
    ]
    most = max(chosen["processes"], default=0)
    for count, threads in dict.fromkeys([(1, most), *((count, 1) for count in chosen["processes"])] if most else []):
        with tempfile.TemporaryDirectory() as place:
            shown = pictures(Path(place) / "pictures", few)
            lines.append(f"| {count} | {threads} | {shared(shown, count, threads, options.steps, Path(place))}")
    lines += ["", "| pictures, as latents of 16 x 16 | ms to draw a batch of 4 (least to most) | MB in memory |", "|---|---|---|"]
    lines += [f"| {count:,} | {drawing(count)}" for count in chosen["drawn"]]
    print("\n".join(lines))
    if options.write:
        rows.put("scale", "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
