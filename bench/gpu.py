"""Everything that only a GPU shows, in one command without a network: speed, memory, attention, weights of fewer bits, the cast.

    make bench-gpu WHEELS=FOLDER        (or: python bench/gpu.py [--minutes 7.5] [--write] [--dry])

It takes torch, diffusers, transformers, accelerate, peft, pydantic and, for what they do, bitsandbytes and xformers; the package
itself need not be installed. True networks with random weights made on the device, bf16, LoRA of rank 16 on all linear layers; UNet
alone, with AdamW and clipping. Arms that are compared take turns. What no time is left for is said to be so. `--dry`: the same on
narrow networks, on whatever device there is, to see that all of it runs; its figures mean nothing and are never written.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from types import SimpleNamespace
from typing import Any

import arms
import rows
import torch
from torch import Tensor, nn

from sdlora import lookup, quantise
from sdlora.adapter import Bank
from sdlora.devices import wait
from sdlora.errors import UserError
from sdlora.family import RECOMPUTED, Family
from sdlora.fused import spare
from sdlora.graphs import Graphs
from sdlora.randomness import stream
from sdlora.routing import Route

SD2 = {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
TRUE = {"1.5, 512 px": (arms.SD15, 512), "2.1, 768 px": (SD2, 768), "XL, 1024 px": (arms.SDXL, 1024)}
NARROW = {"1.5, 512 px": (arms.NARROW, 64), "2.1, 768 px": (arms.NARROW, 64), "XL, 1024 px": (arms.NARROW_XL, 64)}
GIB = 2**30
Step = Callable[[], object]


class TimeIsUpError(Exception):
    """The rest is not measured."""


@dataclass
class Room:
    """Where and how long it is measured."""

    device: torch.device
    models: Mapping[str, tuple[dict[str, Any], int]]
    until: float  # time.monotonic() at which nothing new is begun
    steps: int = 9
    rounds: int = 3
    warm: int = 2
    peak: dict[str, float] = field(default_factory=dict)

    def network(self, model: str) -> Any:
        if time.monotonic() > self.until:
            raise TimeIsUpError
        return arms.network(self.models[model][0], self.device, torch.bfloat16)

    def sample(self, model: str, batch: int) -> arms.Sample:
        config, px = self.models[model]
        return next(arms.samples(1, batch, px, config, self.device))

    def measure(self, steps: Mapping[str, Step]) -> dict[str, list[float]]:
        """Seconds of each, taken in turns, warm-up steps left out; whoever does not fit into memory has none. `peak`: GiB of each."""
        found: dict[str, list[float]] = {name: [] for name in steps}
        failed = set[str]()
        for _, (name, step) in product(range(self.rounds), steps.items()):
            if name in failed:
                continue
            self.clear()
            try:
                for _ in range(self.warm):
                    step()
                for _ in range(self.steps // self.rounds):
                    wait(self.device)
                    began = time.perf_counter()
                    step()
                    wait(self.device)
                    found[name].append(time.perf_counter() - began)
            except torch.OutOfMemoryError:
                failed.add(name)
                found[name].clear()
            self.peak[name] = max(self.peak.get(name, 0.0), self.held())
        return found

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def held(self) -> float:
        """The most GiB that tensors took since `clear`."""
        return torch.cuda.max_memory_allocated() / GIB if self.device.type == "cuda" else 0.0


def said(seconds: Sequence[float], batch: int) -> str:
    """Milliseconds a step with their spread, and samples a second, as two cells."""
    if not seconds:
        return "does not fit | "
    middle = statistics.median(seconds)
    return f"{1e3 * middle:.1f} ({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f}) | {batch / middle:.2f}"


def stepping(arm: arms.Arm, sample: arms.Sample) -> Step:
    return lambda: arm.step(sample)


def speed(room: Room) -> Iterator[str]:
    """Ours beside PEFT's under autocast. The other arm's weights are taken off the peak; its factors and their moments are in it."""
    yield "| network | batch | arm | ms a step (least to most) | samples a second | peak, GiB |\n|---|---|---|---|---|---|"
    for model in ("1.5, 512 px", "XL, 1024 px"):
        own = arms.ours(room.network(model))
        for batch in (1, 4, 8):
            sample = room.sample(model, batch)  # one arm's weights lie beside the other's: 5 GiB of XL
            peer = arms.pefts(room.network(model), {})
            room.peak.clear()
            found = room.measure({"ours": stepping(own, sample), "PEFT, autocast": stepping(peer, sample)})
            beside = sum(p.numel() * p.element_size() for p in own.unet.parameters()) / GIB
            for name, seconds in found.items():
                yield f"| {model} | {batch} | {name} | {said(seconds, batch)} | {max(0.0, room.peak[name] - beside):.2f} |"
            del peer


def memory(room: Room) -> Iterator[str]:
    """Each family under each plan, batch 1: peak of a step, its seconds."""
    yield "| network | weights | checkpointing | peak, GiB | ms a step (least to most) | samples a second |\n|---|---|---|---|---|---|"
    for model, weights, recomputed in product(room.models, ("full", *quantise.WAYS), (True, False)):
        unet = room.network(model)
        if weights != "full":
            try:
                quantise.pack(unet, weights, room.device)
            except UserError as error:
                yield f"| {model} | {weights} | {'on' if recomputed else 'off'} | not measured: {error.code} | | |"
                continue
        arm = adapted(unet, 1)
        Family.blocks(SimpleNamespace(components={"unet": unet}), RECOMPUTED if recomputed else None)  # type: ignore[arg-type]
        room.peak.clear()
        seconds = room.measure({"it": stepping(arm, room.sample(model, 1))})["it"]
        yield f"| {model} | {weights} | {'on' if recomputed else 'off'} | {room.peak['it']:.2f} | {said(seconds, 1)} |"


def attention(room: Room) -> Iterator[str]:
    """xformers' kernels against torch's."""
    yield "| network, batch 4 | attention | ms a step (least to most) | samples a second |\n|---|---|---|---|"
    for model in ("1.5, 512 px", "XL, 1024 px"):
        for by in ("sdpa", "xformers"):
            unet = room.network(model)
            if by == "xformers":
                try:
                    unet.enable_xformers_memory_efficient_attention()
                except (ImportError, ModuleNotFoundError, ValueError, RuntimeError, NotImplementedError) as error:
                    yield f"| {model} | xformers | does not run here: {type(error).__name__} | |"
                    continue
            yield f"| {model} | {by} | {said(room.measure({by: stepping(arms.ours(unet), room.sample(model, 4))})[by], 4)} |"


def cast(room: Room) -> Iterator[str]:
    """K adapters in one step, a sample each, over K steps of one adapter, a sample each."""
    yield "| network | K | arm | ms for a sample of each | samples a second |\n|---|---|---|---|---|"
    for model, members in product(("1.5, 512 px", "XL, 1024 px"), (4, 8)):
        together, alone = adapted(room.network(model), members), adapted(room.network(model), 1)
        all_of_them, one = room.sample(model, members), room.sample(model, 1)

        def singly(alone: arms.Arm = alone, one: arms.Sample = one, members: int = members) -> None:
            for _ in range(members):
                alone.step(one)

        for name, seconds in room.measure({"one cast": stepping(together, all_of_them), "as many runs": singly}).items():
            yield f"| {model} | {members} | {name} | {said(seconds, members)} |"


def graphs(room: Room) -> Iterator[str]:
    """A step's pass repeated as a CUDA graph (`train.cuda_graphs`), beside the same step as it is."""
    yield "| network | batch | step | ms a step (least to most) | samples a second |\n|---|---|---|---|---|"
    for model, batch in product(("1.5, 512 px", "XL, 1024 px"), (1, 4)):
        arm, sample = arms.ours(room.network(model)), room.sample(model, batch)
        found = room.measure({"plain": stepping(arm, sample), "a graph": repeated(arm, sample)})
        for name, seconds in found.items():
            yield f"| {model} | {batch} | {name} | {said(seconds, batch)} |"


def repeated(arm: arms.Arm, sample: arms.Sample) -> Step:
    """The arm's step, with its pass through the network recorded when it is first taken."""
    kept = Graphs(arm.trained)

    def missed(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss = arm.loss(dict(inputs))
        return loss.expand(len(inputs["latents"])), loss

    def step() -> None:
        kept.begin()
        kept.take("", sample, missed)
        kept.end()
        arm.move()

    return step


def adapted(unet: nn.Module, members: int) -> arms.Arm:
    """A network with so many adapters; of several, each sample of a batch goes through one of its own."""
    spare(unet)
    kind, bank, device = lookup.find("adapters", "lora"), Bank({"unet": unet}), next(unet.parameters()).device
    layers = [name for name, layer in unet.named_modules() if kind.fits(layer) and name.endswith(arms.ADAPTED)]
    config = kind.Config(rank=arms.RANK, alpha=float(arms.RANK))
    for i in range(members):
        bank.add(str(i), {f"unet.{name}": (kind, config) for name in layers}, lambda dotted, i=i: stream(i, dotted))
    slots = range(members) if members > 1 else None

    def predict(x: Tensor, sample: arms.Sample) -> Tensor:
        bank.route = Route(torch.ones(1, device=device), slots)
        return arms.said(unet, x, sample, torch.bfloat16)

    found = {f"{i}.{name}": one for i in range(members) for name, one in bank.parameters(str(i)).items()}
    downs, ups = ({name: one for name, one in found.items() if name.endswith(side)} for side in ("down", "up"))
    return arms.Arm(unet, predict, downs, ups)


SECTIONS = {"speed": speed, "memory": memory, "attention": attention, "cast": cast, "graphs": graphs}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--write", action="store_true", help="put the figures into docs/measured.md")
    parser.add_argument("--dry", action="store_true", help="narrow networks, one step each: only whether it runs")
    parser.add_argument("--only", choices=SECTIONS, action="append")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.dry:
        print("there is no CUDA device; --dry runs the same on narrow networks", file=sys.stderr)
        return 2
    until = time.monotonic() + 60 * options.minutes
    room = Room(device, NARROW, until, steps=1, rounds=1, warm=0) if options.dry else Room(device, TRUE, until)
    failed = False
    for name in options.only or SECTIONS:
        found = [rows.conditions("peft"), ""]
        try:
            found += SECTIONS[name](room)
        except TimeIsUpError:
            found += ["", "The rest was not measured: time was up."]
        except RuntimeError as error:  # the other sections are worth having
            found += ["", f"The rest failed: {str(error).splitlines()[0]}"]
            failed = True
        print("\n".join(["", f"# {name}", *found]), flush=True)
        if options.write and not options.dry:
            rows.put(f"gpu {name}", "\n".join(found))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
