"""The training step beside PEFT's, on Stable Diffusion 1.5's UNet with random weights: time, memory, kernels, bytes; and the same result.

    python bench/speed.py [--small] [--px 256] [--batch 1] [--rounds 5] [--steps 1] [--parity 20]

Arms: ours (bf16 base, factors fp32); PEFT under autocast, as diffusers' scripts train (bf16 base, factors fp32); PEFT in fp32 throughout.
All start from the same factors and see the same latents, noise and texts; AdamW at 1e-4 (fused), gradients clipped at 1. Rounds are
interleaved; what is told is CPU time, which others on the machine disturb less, and on a GPU the time until it is done. If losses of ours
differ by over 1e-3 of the autocast arm's, or its ΔW has a cosine with that arm's of 0.99 or less, it is no result: the command fails.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
import torch.nn.functional as F
from counting import Counted, counted, table
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sdlora import lookup
from sdlora.adapter import Bank, Route
from sdlora.fused import spare_divisions
from sdlora.randomness import normal, stream

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
NARROW: dict[str, Any] = {"sample_size": 64, "block_out_channels": (8, 16, 24, 24), "cross_attention_dim": 16, "attention_head_dim": 2,
                          "norm_num_groups": 8}  # fmt: skip
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
RANK = 16
Named = dict[str, nn.Parameter]


@dataclass
class Arm:
    """One way to train: `predict(x, t, text)`, and its factors by the name of the layer."""

    predict: Callable[[Tensor, Tensor, Tensor], Tensor]
    downs: Named
    ups: Named
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trained = [*self.downs.values(), *self.ups.values()]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=1e-2, fused=True)

    def difference(self) -> Tensor:
        """ΔW of all layers in a row; none is there at the start."""
        return torch.cat([(up @ self.downs[name]).detach().flatten() for name, up in self.ups.items()])

    def gradients(self, sample: Sequence[Tensor]) -> Tensor:
        x, t, text, target = sample
        loss = F.mse_loss(self.predict(x, t, text).float(), target)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self, sample: Sequence[Tensor]) -> Tensor:
        loss = self.gradients(sample)
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def network(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**config).to(device, dtype).requires_grad_(False).eval()


def names_in(unet: nn.Module) -> list[str]:
    return [name for name, layer in unet.named_modules() if isinstance(layer, nn.Linear) and name.endswith(ADAPTED)]


def ours(config: dict[str, Any], device: torch.device) -> Arm:
    unet = network(config, device, torch.bfloat16)
    spare_divisions(unet)
    names, kind, bank = names_in(unet), lookup.find("adapters", "lora"), Bank({"unet": unet})
    pieces = {f"unet.{name}": (kind, kind.Config(rank=RANK, alpha=float(RANK))) for name in names}
    bank.add("a", pieces, lambda dotted: stream(0, dotted))

    def predict(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        bank.route = Route(torch.ones(1, device=device))
        said: Tensor = unet(x.bfloat16(), t, text.bfloat16()).sample
        return said

    found = bank.parameters("a")
    return Arm(predict, {name: found[f"unet.{name}.down"] for name in names}, {name: found[f"unet.{name}.up"] for name in names})


def pefts(config: dict[str, Any], device: torch.device, dtype: torch.dtype, start: dict[str, Tensor]) -> Arm:
    unet = network(config, device, dtype)
    names = names_in(unet)
    unet.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    half = dtype != torch.float32

    def predict(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            said: Tensor = unet(x.to(dtype), t, text.to(dtype)).sample
        return said

    found = dict(unet.named_parameters())
    downs, ups = ({name: found[f"{name}.lora_{side}.default.weight"] for name in names} for side in "AB")
    with torch.no_grad():
        for name, value in start.items():
            downs[name].copy_(value)
    return Arm(predict, downs, ups)


def samples(count: int, batch: int, px: int, width: int, device: torch.device) -> list[list[Tensor]]:
    """(x, t, text, target) of each step."""
    found = []
    for i in range(count):
        x, target = (normal((batch, 4, px // 8, px // 8), i, what).to(device) for what in ("x", "target"))
        t = torch.from_numpy(stream(i, "t").integers(0, 1000, batch)).to(device)
        found.append([x, t, normal((batch, 77, width), i, "text").to(device), target])
    return found


def timed(arm: Arm, given: Sequence[Sequence[Tensor]], device: torch.device) -> None:
    """Train on these samples, in seconds for each."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    losses = [arm.step(one) for one in given]
    if device.type == "cuda":
        torch.cuda.synchronize()
    arm.seconds.append((clock() - began) / len(given))
    arm.losses += torch.stack(losses).tolist()


def apart(arm: Arm, other: Arm, first: int) -> tuple[float, float]:
    """The largest relative difference of the first losses, and the cosine of what was learnt."""
    losses = max(abs(a - b) / b for a, b in zip(arm.losses[:first], other.losses[:first], strict=True))
    return losses, float(F.cosine_similarity(arm.difference(), other.difference(), 0))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a network of the same structure, a fortieth as wide")
    for name, value in (("px", 256), ("batch", 1), ("rounds", 5), ("steps", 1), ("parity", 20)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(arguments)
    config, device = NARROW if options.small else SD15, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first = ours(config, device)
    start = {name: down.detach().clone() for name, down in first.downs.items()}
    arms = {"ours": first}
    for name, dtype in (("PEFT, autocast", torch.bfloat16), ("PEFT, fp32", torch.float32)):
        arms[name] = pefts(config, device, dtype, start)
    rounds = -(-max(options.parity, options.rounds * options.steps) // options.steps)
    given = samples(rounds * options.steps, options.batch, options.px, config["cross_attention_dim"], device)
    for i in range(rounds):
        for arm in arms.values():
            timed(arm, given[i * options.steps : (i + 1) * options.steps], device)
    what = "seconds, on the device" if device.type == "cuda" else "CPU seconds"
    print(f"| arm | {what} a step, median (least to most) | loss apart | cosine of ΔW |\n|---|---|---|---|")
    sound = True
    for name, arm in arms.items():
        loss, cosine = apart(arm, arms["PEFT, autocast"], options.parity)
        sound &= name == "PEFT, fp32" or (loss <= 1e-3 and cosine > 0.99)
        own = arm.seconds[1:] or arm.seconds  # the first round warms up
        print(f"| {name} | {statistics.median(own):.3f} ({min(own):.3f} to {max(own):.3f}) | {loss:.1e} | {cosine:.4f} |")
    counts: dict[str, Counted] = {name: counted(lambda arm=arm: arm.gradients(given[0])) for name, arm in arms.items()}
    print("\n".join(["", *table(counts)]))
    print("" if sound else "\nno result: an arm did not compute the same", file=sys.stdout if sound else sys.stderr)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
