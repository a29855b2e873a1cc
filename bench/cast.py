"""What a cast costs beside as many runs by themselves: from the command to the packs, in its steps alone, and in memory.

python bench/cast.py [--members 1,2,4] [--steps 60] [--batch 1] [--set a.b=c]...     trains; the pictures are the bundled character's
python bench/cast.py --packs 100     packs on one base: what an idle one costs, how fast one comes into play, merging and taking out
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from sdlora import api, lookup
from sdlora.packs import file
from sdlora.randomness import stream

ROOT = Path(__file__).parent.parent
SIZES = 5
"""Pictures of each member."""


def timed(arguments: Sequence[str]) -> tuple[float, float, float]:
    """Seconds of a command of `sdlora`, seconds of CPU time, and peak memory in MB."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "sdlora.cli", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: sdlora {' '.join(arguments)}")
    return time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3


def step_seconds(logs: Sequence[Path]) -> float:
    """Seconds of a step, between the first reading of the losses and the last."""
    told = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    first, *_, last = sorted({(one["step"], one["time"]) for one in told if one["kind"] == "step"})
    first_at = max(one["time"] for one in told if one["kind"] == "step" and one["step"] == first[0])
    return (last[1] - first_at) / (last[0] - first[0] - 9)  # the first reading tells of ten steps at once


def compare(count: int, steps: int, batch: int, rest: Sequence[str]) -> None:
    """Train a cast of so many, and each of them by itself."""
    names = [f"m{i}" for i in range(count)]
    common = [f"train.steps={steps}", f"train.batch_size={batch}", *rest]
    settings = [word for one in common for word in ("--set", one)]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        text = 'base = "tiny"\n'
        pictures = sorted((ROOT / "datasets" / "tavi").glob("*.png"))
        for i, name in enumerate(names):
            (place / "pictures" / name).mkdir(parents=True)
            for j in range(SIZES):
                one = pictures[(i * SIZES + j) % len(pictures)]
                for part in (one, one.with_suffix(".txt")):
                    (place / "pictures" / name / part.name).write_bytes(part.read_bytes())
            text += f'[[cast]]\nname = "{name}"\nseed = {i}\ndata.folder = {json.dumps(str(place / "pictures" / name))}\n'
        (place / "cast.toml").write_text(text)
        alone, own_steps = [], 0.0
        for i, name in enumerate(names):
            where = ["--name", name, "--base", "tiny", "--out", str(place / "alone" / name), "--set", f"seed={i}"]
            alone.append(timed(["train", str(place / "pictures" / name), *where, *settings]))
            own_steps += step_seconds([place / "alone" / name / "events.jsonl"])
        together = timed(["train", "--config", str(place / "cast.toml"), "--out", str(place / "cast"), *settings])
        step = step_seconds([place / "cast" / name / "events.jsonl" for name in names])
    apart = [sum(one[i] for one in alone) for i in (0, 1)]
    print(f"K = {count}, {steps} steps of batch {batch}")
    print(f"  command to packs: {together[0]:.1f} s against {apart[0]:.1f} s: {together[0] / apart[0]:.2f}")
    print(f"  CPU time: {together[1]:.1f} s against {apart[1]:.1f} s: {together[1] / apart[1]:.2f}")
    print(f"  a step of all: {step:.3f} s against {own_steps:.3f} s: {step / own_steps:.2f}")
    print(f"  peak memory: {together[2]:.0f} MB against {max(one[2] for one in alone):.0f} MB", flush=True)


def serve(count: int) -> None:
    """Put packs on one base and measure what they cost."""
    studio = api.open_studio([], "tiny")
    kind, family = lookup.find("adapters", "lora"), studio.family
    config = kind.Config(rank=16, alpha=16.0)
    layers = [name for name, layer in family.layers().items() if ".attn" in name and kind.fits(layer)]
    studio.bank.add("own", dict.fromkeys(layers, (kind, config)), lambda name: stream(0, name))
    for _, _, delta in studio.bank.deltas("own"):
        torch.nn.init.normal_(delta.get_parameter("up"), std=0.02)
    tensors = {key: tensor.detach().clone() for key, tensor in file.tensors_of(studio.bank, "own", family).items()}
    studio.bank.eject()
    recipe = studio.recipe("cat face, white background", steps=2)

    def drawn(name: str) -> float:
        """CPU seconds of a picture of two steps."""
        began = time.process_time()
        studio.render([recipe.at(scales=((name, 1.0),))])
        return time.process_time() - began

    studio.add(file.Pack("pack0", tensors, {"sdlora.adapter": "lora"}))
    drawn("pack0")
    one = median(drawn("pack0") for _ in range(9))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for i in range(1, count):
        studio.add(file.Pack(f"pack{i}", tensors, {"sdlora.adapter": "lora"}))
    seconds = (time.process_time() - began) / (count - 1)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3 / (count - 1)
    many = median(drawn("pack0") for _ in range(9))
    switches = []
    for name in studio.packs:
        began = time.monotonic()
        studio.bank.use({name: 1.0})
        switches.append(time.monotonic() - began)
    print(f"{count} packs of rank 16 on {len(layers)} layers: {memory:.2f} MB and {1e3 * seconds:.1f} ms to register each")
    print(f"a picture of 2 steps through one of them: {many:.3f} s of CPU time; through the only one: {one:.3f} s")
    print(f"one comes into play within {1e3 * max(switches):.2f} ms, median {1e3 * median(switches):.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", default="1,2,4")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--packs", type=int, default=0)
    asked = parser.parse_args()
    if asked.packs:
        serve(asked.packs)
        return
    for count in asked.members.split(","):
        compare(int(count), asked.steps, asked.batch, asked.set)


if __name__ == "__main__":
    main()
