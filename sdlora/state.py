"""Checkpoints: everything that a step depends on beside the settings, as a folder of safetensors and JSON with checksums."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from sdlora import safeio
from sdlora.errors import NUMBERS, UserError
from sdlora.processes import Processes
from sdlora.train import Learner

EMPTY = safetensors.torch.save({})


@dataclass(frozen=True)
class Score:
    """How the pictures of a step were judged; `judge.Judged` says what each is."""

    step: int
    score: float
    likeness: float
    drift: float
    memorisation: float


@dataclass
class Progress:
    """What a run has come to, beside weights and optimizer."""

    step: int = 0
    at_once: int = 0  # samples that go through the network at once, once memory did not suffice for all; 0: all
    recomputed: bool = False  # under gradient checkpointing
    validations: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)
    dataset: str = ""  # a hash of the pictures and captions that it was trained on
    beside: list[str] = field(default_factory=list)  # who took the last step with it
    scores: list[Score] = field(default_factory=list)
    by: str = "loss"  # or score: what the best one is told by

    def best(self) -> tuple[int, float] | None:
        """The step, and the figure, of the lowest loss, or of the highest score; the first of equal ones."""
        if self.by == "score":
            return max(((one.step, one.score) for one in self.scores), key=lambda one: one[1], default=None)
        return min(self.validations, key=lambda one: one[1], default=None)

    def waited(self) -> int:
        """Validations since then."""
        best, taken = self.best(), [step for step, _ in self.validations] if self.by == "loss" else [one.step for one in self.scores]
        return len(taken) - 1 - taken.index(best[0]) if best else 0


@dataclass(frozen=True)
class Restored:
    """What was found of a run."""

    progress: Progress
    damaged: Sequence[Path] = ()  # checkpoints that were passed over, under the names that they have now
    notes: Sequence[str] = ()  # in what this machine differs from the one that wrote the checkpoint


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"ckpt-{step:06d}"


def machine(device: torch.device) -> dict[str, Any]:
    """What the last bits of a result depend on."""
    capability = torch.backends.cpu.get_cpu_capability()
    processes = dist.get_world_size() if dist.is_initialized() else 1
    found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device.type, "instructions": capability}
    return {**found, "processes": processes}


def size(learners: Sequence[Learner]) -> int:
    """Bytes of a checkpoint, roughly: the weights, two moments of each, and their average where there is one."""
    return sum(4 * (3 + bool(learner.ema)) * p.numel() for learner in learners for p in learner.params.values())


def save(run: Path, progress: Progress, learners: Sequence[Learner], keep: int) -> Path:
    """Write the checkpoint of a step; of the older ones the newest `keep` and the best stay, once it reads back well.

    Raises `UserError` rather than write a number that is not finite, or what does not read back.
    """
    files = _files(progress, learners)
    path = folder(run, progress.step)
    if path.exists():  # written by an interrupted run that went on from an earlier one
        safeio.remove(path)
    safeio.write_folder(path, files)
    if safeio.read_folder(path) is None:
        raise UserError(
            "E-CKPT-01", "the checkpoint does not read back as it was written", path, "the disk may be failing: go on elsewhere"
        )
    best = progress.best()
    older = [step for step in steps(run) if step <= progress.step]
    for old in older[:-keep]:
        if not best or old != best[0]:
            safeio.remove(folder(run, old))
    return path


def _files(progress: Progress, learners: Sequence[Learner]) -> dict[str, bytes]:
    weights: dict[str, Tensor] = {}
    slots: dict[str, Tensor] = {}
    averages: dict[str, Tensor] = {}
    for learner in learners:
        for name, parameter in learner.params.items():
            weights[f"{learner.name}/{name}"] = parameter
            for slot, value in learner.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    slots[f"{learner.name}/{name}/{slot}"] = value
        averages |= {f"{learner.name}/{name}": average for name, average in learner.ema.items()}
    files, numbers = {}, {learner.name: _numbers(learner) for learner in learners}
    odd = [entry for own in numbers.values() for group in own["groups"] for entry, number in group.items() if not math.isfinite(number)]
    for part, tensors in {"adapter": weights, "optimizer": slots, "ema": averages}.items():
        broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()] + odd * (part == "optimizer")
        if broken:
            what = f"{broken[0]} ({part}) holds a number that is not finite; no checkpoint is written, the last good one stays"
            raise UserError("E-NUM-02", what, f"step {progress.step}", "lower train.lr or set train.precision=fp32, and resume", NUMBERS)
        if tensors:
            own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            files[f"{part}.safetensors"] = safetensors.torch.save(own)
    device = next(iter(learners[0].params.values())).device
    quarantine = {learner.name: learner.quarantine for learner in learners}
    state = {"format": 2, **asdict(progress), "quarantine": quarantine, "optimizer": numbers, "machine": machine(device)}
    return {**files, "state.json": json.dumps(state, indent=1).encode()}


def _numbers(learner: Learner) -> dict[str, Any]:
    """What the optimizer remembers in plain numbers: of each parameter, of each group, and of the factor under half precision."""
    slots = {name: learner.optimizer.state.get(parameter, {}) for name, parameter in learner.params.items()}
    plain = {name: {slot: value for slot, value in own.items() if not isinstance(value, Tensor)} for name, own in slots.items()}
    groups = [{entry: group[entry] for entry in group["memory"] if entry in group} for group in learner.optimizer.param_groups]
    scaler = learner.optimizer.scaler
    factor = {"scaler": scaler.state_dict()} if scaler is not None else {}
    return {"parameters": {name: own for name, own in plain.items() if own}, "groups": groups, **factor}


def _remember(learner: Learner, numbers: dict[str, Any]) -> None:
    for name, own in numbers.get("parameters", {}).items():
        learner.optimizer.state[learner.params[name]].update(own)
    for group, own in zip(learner.optimizer.param_groups, numbers.get("groups", []), strict=False):
        group.update(own)
    if learner.optimizer.scaler is not None and "scaler" in numbers:
        learner.optimizer.scaler.load_state_dict(numbers["scaler"])


def steps(run: Path) -> list[int]:
    """Steps that have a checkpoint, in order; whether it is sound is not judged."""
    names = (path.name.removeprefix("ckpt-") for path in (run / "checkpoints").glob("ckpt-*"))
    return sorted(int(name) for name in names if name.isdigit())


def restore(run: Path, learners: Sequence[Learner], last: int, only: int = 0) -> Restored:
    """Load the newest sound checkpoint up to step `last` (or the one of step `only`) into the learners; damaged ones are set aside."""
    damaged = []
    for step in [only] if only else [step for step in reversed(steps(run)) if step <= last]:
        files = safeio.read_folder(folder(run, step))
        if files is None:
            damaged.append(set_aside(folder(run, step)))
            continue
        written = _take(files, learners, folder(run, step))
        return Restored(_read(written, learners), damaged, _differences(written, learners))
    return Restored(Progress(), damaged)


def _take(files: Mapping[str, bytes], learners: Sequence[Learner], where: object) -> dict[str, Any]:
    """Put the files of a checkpoint into the learners; its plain numbers and words."""
    tensors = {part: safetensors.torch.load(files.get(f"{part}.safetensors", EMPTY)) for part in ("adapter", "optimizer", "ema")}
    written: dict[str, Any] = json.loads(files["state.json"])
    for learner in learners:
        _fill(learner, tensors, where)
        _remember(learner, written.get("optimizer", {}).get(learner.name, {}))
    return written


def align(processes: Processes, learners: Sequence[Learner], resumed: bool) -> None:
    """Let all processes begin at what process 0 has, which it reads from its disk alone; raise `UserError` where they do not."""
    if processes.count == 1:
        return
    resumed = processes.told(resumed)
    files = _files(Progress(), learners) if resumed and processes.leads else {}
    for name in processes.told([*files]):
        files[name] = processes.handed(files.get(name, b""))
    if resumed and not processes.leads:
        _take(files, learners, "process 0")
    digest = hashlib.sha256()
    for learner in learners:
        for name, parameter in learner.params.items():
            digest.update(name.encode() + parameter.detach().cpu().contiguous().numpy().tobytes())
    processes.alike({"the adapter's first weights": digest.hexdigest()})


def set_aside(path: Path) -> Path:
    """Keep a damaged checkpoint out of the way, but keep it: somebody may want to look at it."""
    aside = path.with_name(f"bad-{path.name}")
    if aside.exists():
        safeio.remove(aside)
    safeio.rename(path, aside)
    return aside


def _read(state: dict[str, Any], learners: Sequence[Learner]) -> Progress:
    for learner in learners:
        known = state.get("quarantine", {}).get(learner.name, {})
        learner.quarantine = {int(picture): since for picture, since in known.items()}
    validations = [(step, loss) for step, loss in state.get("validations", [])]
    scores = [Score(**one) for one in state.get("scores", [])]
    known = {name: state[name] for name in ("step", "at_once", "recomputed", "dataset", "beside") if name in state}
    return Progress(**known, validations=validations, scores=scores)


def _differences(state: dict[str, Any], learners: Sequence[Learner]) -> list[str]:
    now = machine(next(iter(learners[0].params.values())).device)
    before = state.get("machine", {})
    changed = [f"{key} {before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]]
    return [f"not promised to be bit for bit the same as without the stop: {', '.join(changed)}"] if changed else []


def _fill(learner: Learner, tensors: dict[str, dict[str, Tensor]], path: object) -> None:
    weights, slots = tensors["adapter"], tensors["optimizer"]
    for name, parameter in learner.params.items():
        key = f"{learner.name}/{name}"
        if key not in weights or weights[key].shape != parameter.shape:
            raise UserError(
                "E-CKPT-02", f"this checkpoint is of another adapter: {name} is not as it was", path, "train into another folder with --out"
            )
        with torch.no_grad():
            parameter.copy_(weights[key])
            if name in learner.ema:  # an average that begins only now begins at the weights
                learner.ema[name].copy_(tensors["ema"].get(key, weights[key]))
        own = {slot.rpartition("/")[2]: value for slot, value in slots.items() if slot.rpartition("/")[0] == key}
        if own:
            learner.optimizer.state[parameter] = {slot: value.to(parameter.device) for slot, value in own.items()}
