"""Where the time of a training step goes: a torch profiler's trace, and a page that sums it up."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sdlora import safeio
from sdlora.adapter import Bank
from sdlora.devices import wait
from sdlora.events import Event, warn_on_failure
from sdlora.train import Setup, Trained, at_most, drawn, due, sample_losses, steps

WARM, LOOKED = 2, 3
"""Steps that are let pass first, and steps that are looked at."""
MARKED = ("data", "optimizer")
"""What the loop itself marks; all other operators are the network's."""
MEANING = """base: the frozen network alone, forward and the gradient of its input; adapter: what forward and backward take beside it;
optimizer: clipping, step, averages; data: drawing samples; host: no operator was at work, but Python, or a launch, or a wait.
The profiler itself slows the host down. `trace.json` opens in Perfetto and other browsers of traces."""


def watched(setup: Setup, out: Path) -> Iterator[tuple[Trained, list[Event]]]:
    """`train.steps`, and with the last step that was looked at, what was seen; only time is taken, no number changes."""
    taken, spent = steps(setup), Counter[str]()
    for count in range(WARM + LOOKED):
        if count < WARM:
            trained = next(taken, None)
        else:
            trained, seen, found = looked_at(setup, lambda: next(taken, None))
            spent += seen
        if trained is None:
            return
        told = written(setup, out, spent, found, trained.step) if count == WARM + LOOKED - 1 else ()
        yield trained, [*warn_on_failure(told, "no profile is written", trained.step)]
    yield from ((trained, list[Event]()) for trained in taken)


def looked_at(setup: Setup, what: Any) -> tuple[Any, Counter[str], profile]:
    """What a function returns; microseconds of it by part: "wall", what is marked, and "network"; and the profile."""
    device = setup.family.device
    also = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    wait(device)
    with profile(activities=[ProfilerActivity.CPU, *also]) as found:
        began = time.perf_counter()
        result = what()
        wait(device)
        wall = round(1e6 * (time.perf_counter() - began))
    spent = Counter({"wall": wall})
    for event in found.events():
        part = part_of(event)
        if event.name == "data":
            spent["data"] += round(event.cpu_time_total)
        elif event.name not in MARKED and part != "data" and event.name.startswith("aten::" if not also else ""):
            spent[part] += round(event.self_device_time_total if also else event.self_cpu_time_total)
    return result, spent, found


def part_of(event: Any) -> str:
    """The mark that an operator stands under, or the network."""
    while event is not None:
        if event.name in MARKED:
            return str(event.name)
        event = event.cpu_parent
    return "network"


def base_alone(setup: Setup) -> int:
    """Microseconds of a step's passes through the base without adapters, forward and the gradient of its input."""
    slots = due(setup.learners) or [0]
    samples = drawn(setup, setup.learners, slots, setup.fitting(at_most([setup.learners[slot] for slot in slots])))

    def through() -> None:
        for batch in samples:
            latents = batch.latents.to(setup.family.device).requires_grad_()
            losses = sample_losses(setup.family, Bank({}), replace(batch, latents=latents), setup.goals)  # its route reaches no layer
            torch.autograd.grad(losses.sum(), latents)

    setup.bank.route = None
    through()
    return looked_at(setup, through)[1]["network"]


def shares(spent: Counter[str], base: int) -> dict[str, float]:
    """Milliseconds a step of each part."""
    base = min(base, spent["network"] // LOOKED) * LOOKED
    own = {"base": base, "adapter": spent["network"] - base, "optimizer": spent["optimizer"], "data": spent["data"]}
    own["host"] = max(0, spent["wall"] - sum(own.values()))
    return {name: round(value / LOOKED / 1000, 3) for name, value in own.items()}


def written(setup: Setup, out: Path, spent: Counter[str], found: profile, step: int) -> Iterator[Event]:
    """Leave the trace of the last step and a page in the run folder, and say so."""
    parts, where, device = shares(spent, base_alone(setup)), out / "profile", setup.family.device
    with safeio.scratch_folder() as aside:  # the profiler writes files itself
        trace = Path(aside) / "trace.json"
        found.export_chrome_trace(str(trace))
        safeio.write(where / "trace.json", trace.read_bytes(), durable=False)
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    head = f"# Steps {step - LOOKED + 1} to {step}, on {on}\n\n{spent['wall'] / LOOKED / 1000:.1f} ms a step.\n\n"
    whole = sum(parts.values())
    rows = "".join(f"| {name} | {value:.2f} | {value / whole:.1%} |\n" for name, value in parts.items())
    safeio.write(where / "summary.md", f"{head}| part | ms a step | share |\n|---|---|---|\n{rows}\n{MEANING}\n", durable=False)
    told = ", ".join(f"{name} {value / whole:.0%}" for name, value in parts.items())
    yield Event("note", f"profile of {LOOKED} steps: {told}; see {where / 'summary.md'}", step=step, data={"profile_ms": parts})
