"""The training step beside others on a CPU: Stable Diffusion 1.5's UNet with random weights, and a check that all compute the same.

    python bench/speed.py [--small] [--batches 1,4] [--rounds 5] [--parity 20] [--script FILE] [--write] [--out bench.json]

Arms: ours (bf16); PEFT in fp32; PEFT under bf16 autocast, as diffusers' text-to-image script trains; that script's whole loop,
emulated: it encodes pixels and texts in each step, and waits for its loss; and, with --script, the script itself
(`train_text_to_image_lora.py`). Same weights, factors, pictures, noise and texts. Each arm is a process of its own, so that its peak
memory is; they take turns, a step each, none computing while another does. Seconds are wall and CPU time; two warm-up steps are left
out, medians are told with their spread. If the losses of ours or the loop differ by over 1e-3 from the autocast arm's in the first 20
steps, or their ΔW has a cosine of 0.99 or less with its, that is no result: the command fails.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import arms
import rows
import script
import torch
from safetensors.torch import load_file, save_file

from sdlora.plots import Curve, plot

AUTOCAST = "PEFT, bf16 autocast"
ARMS = {"ours, bf16": 2, AUTOCAST: 2, "PEFT, fp32": 0, "diffusers' loop, emulated": 1}
"""2: what the others are held to, and what is; 1: is; 0: computes in another precision."""
WARM = 2


def made(name: str, small: bool) -> arms.Arm:
    config, device = arms.NARROW if small else arms.SD15, torch.device("cpu")
    if name.startswith("ours"):
        return arms.ours(arms.network(config, device, torch.bfloat16))
    unet = arms.network(config, device, torch.float32 if "fp32" in name else torch.bfloat16)
    arm = arms.pefts(unet, arms.starts(unet))
    if "loop" in name:
        arm.encode, arm.asks = arms.Encoders.new(small, device), True
    return arm


def work(name: str, small: bool, threads: int, wire: Connection) -> None:
    """An arm's process: steps on samples that it is sent by file, until it is sent none."""
    torch.set_num_threads(threads)
    arm = made(name, small)
    wire.send(None)
    while path := wire.recv():
        sample, wall, cpu = load_file(path), time.perf_counter(), time.process_time()
        loss = float(arm.step(sample))
        wire.send((loss, time.perf_counter() - wall, time.process_time() - cpu))
    learnt = {f"{layer}.down": one.detach() for layer, one in arm.downs.items()}
    learnt |= {f"{layer}.up": one.detach() for layer, one in arm.ups.items()}
    save_file({key: value.contiguous() for key, value in learnt.items()}, wire.recv())
    wire.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def written(folder: Path, count: int, batch: int, small: bool, px: int) -> list[str]:
    """Each step's sample as a file: pixels and ids, and what they are encoded as."""
    device = torch.device("cpu")
    encoders, paths = arms.Encoders.new(small, device), []
    for i, sample in enumerate(arms.samples(count, batch, px, arms.NARROW if small else arms.SD15, device, pixels=True)):
        paths.append(str(folder / f"{i}.safetensors"))
        save_file({key: value.contiguous() for key, value in encoders(sample).items()}, paths[-1])
    return paths


def measured(batch: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each arm did at this batch size: losses, seconds, memory, what it learnt."""
    fork = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        paths = written(folder, max(options.parity if batch == 1 else 0, WARM + options.rounds), batch, options.small, options.px)
        wires, processes, found = {}, [], {name: {"losses": [], "wall": [], "cpu": []} for name in ARMS}
        for name in ARMS:
            wires[name], other = fork.Pipe()
            processes.append(fork.Process(target=work, args=(name, options.small, options.threads, other), daemon=True))
            processes[-1].start()
        for wire in wires.values():
            wire.recv()
        for i, path in enumerate(paths):
            for name, held in ARMS.items():
                if held or i < WARM + options.rounds:
                    wires[name].send(path)
                    for key, value in zip(("losses", "wall", "cpu"), wires[name].recv(), strict=True):
                        found[name][key].append(value)
        for i, name in enumerate(ARMS):
            wires[name].send("")
            wires[name].send(str(folder / f"learnt-{i}.safetensors"))
            found[name]["gib"] = wires[name].recv()
            found[name]["learnt"] = load_file(folder / f"learnt-{i}.safetensors")
        for process in processes:
            process.join()
    return found


def judged(found: dict[str, dict[str, Any]]) -> bool:
    """Put each arm's distance from the autocast arm beside its figures; whether those that are held to it are near it."""
    sound, peer = True, found[AUTOCAST]
    for name, held in ARMS.items():
        one = found[name]
        count = min(len(one["losses"]), len(peer["losses"]))
        one["apart"] = arms.apart(one["losses"][:count], peer["losses"][:count])
        one["cosine"] = arms.cosine(one["learnt"], peer["learnt"]) if held else None
        sound &= not held or (one["apart"] <= 1e-3 and one["cosine"] > 0.99)
    return sound


def spread(values: Sequence[float]) -> str:
    own = values[WARM:]
    return f"{statistics.median(own):.3f} ({min(own):.3f} to {max(own):.3f})"


def table(results: dict[int, dict[str, dict[str, Any]]], scripted: str) -> str:
    lines = [
        "| arm | batch | seconds a step | CPU seconds | peak memory, GiB | losses apart | cosine of ΔW |",
        "|---|---|---|---|---|---|---|",
    ]
    for batch, found in results.items():
        for name, one in found.items():
            cosine = "" if one["cosine"] is None else f"{one['cosine']:.4f}"
            figures = f"{spread(one['wall'])} | {spread(one['cpu'])} | {one['gib']:.2f} | {one['apart']:.1e} | {cosine}"
            lines.append(f"| {name} | {batch} | {figures} |")
    return "\n".join([*lines, *([scripted] if scripted else [])])


def drawn(results: dict[int, dict[str, dict[str, Any]]], path: Path) -> None:
    """Seconds a sample of each arm, by batch size."""
    curves = [
        Curve(name, [(batch, statistics.median(found[name]["wall"][WARM:]) / batch) for batch, found in results.items()]) for name in ARMS
    ]
    plot("The training step on a CPU, random weights", "batch size", "seconds a sample, median", curves).save(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a network of the same structure, a fortieth as wide")
    parser.add_argument("--batches", default="1,4")
    for name, value in (("px", 256), ("rounds", 5), ("parity", 20), ("threads", torch.get_num_threads())):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--script", type=Path, help="diffusers' train_text_to_image_lora.py, of a checkout")
    parser.add_argument("--write", action="store_true", help="put the figures into docs/measured.md")
    parser.add_argument("--out", type=Path, help="write all figures as JSON, and the plot beside")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    torch.set_num_threads(options.threads)
    results = {batch: measured(batch, options) for batch in map(int, options.batches.split(","))}
    verdicts = [judged(found) for found in results.values()]
    scripted = script.row(options.script, options.small, options.px) if options.script else ""
    shape = "a network of its structure, a fortieth as wide" if options.small else "Stable Diffusion 1.5's UNet"
    head = f"{rows.conditions('peft')} {shape}, {options.px} px, rank {arms.RANK}, 192 layers; {time.monotonic() - began:.0f} s in all."
    text = f"{head}\n\n{table(results, scripted)}"
    print(text)
    for found in results.values():
        for one in found.values():
            one.pop("learnt")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
        drawn(results, options.out.with_suffix(".png"))
    if not all(verdicts):
        print("no result: an arm did not compute the same", file=sys.stderr)
    elif options.write:
        drawn(results, rows.PAGE.with_name("speed.png"))
        rows.put("speed", f"{text}\n\n![Seconds a sample of each arm](speed.png)")
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
