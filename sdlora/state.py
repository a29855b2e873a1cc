"""Checkpoints: everything that a step depends on beside the settings, as a folder of safetensors and JSON with checksums."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from sdlora import safeio
from sdlora.errors import UserError
from sdlora.train import Learner


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"ckpt-{step:06d}"


def save(run: Path, step: int, learners: Sequence[Learner], keep: int) -> Path:
    """Write the checkpoint of a step; older ones than the newest `keep` go once it reads back well."""
    weights, slots = {}, {}
    for learner in learners:
        for name, parameter in learner.params.items():
            weights[f"{learner.name}/{name}"] = parameter.detach().cpu().contiguous()
            for slot, value in learner.optimizer.state.get(parameter, {}).items():
                slots[f"{learner.name}/{name}/{slot}"] = torch.as_tensor(value).detach().cpu().contiguous()
    state = {
        "format": 1,
        "step": step,
        "learners": [learner.name for learner in learners],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    path = folder(run, step)
    if path.exists():  # written by an interrupted run that went on from an earlier one
        shutil.rmtree(path)
    files = {"adapter.safetensors": safetensors.torch.save(weights), "optimizer.safetensors": safetensors.torch.save(slots)}
    safeio.write_folder(path, {**files, "state.json": json.dumps(state, indent=1).encode()})
    if safeio.read_folder(path) is None:
        raise UserError(
            "E-CKPT-01", "the checkpoint does not read back as it was written", path, "the disk may be failing: go on elsewhere"
        )
    for old in steps(run)[:-keep]:
        shutil.rmtree(folder(run, old))
    return path


def steps(run: Path) -> list[int]:
    """Steps that have a checkpoint, in order; whether it is sound is not judged."""
    names = (path.name.removeprefix("ckpt-") for path in (run / "checkpoints").glob("ckpt-*"))
    return sorted(int(name) for name in names if name.isdigit())


def restore(run: Path, learners: Sequence[Learner]) -> tuple[int, list[Path]]:
    """Load the newest sound checkpoint into the learners. Returns its step (0: none) and the damaged ones that were passed over."""
    damaged = []
    for step in reversed(steps(run)):
        files = safeio.read_folder(folder(run, step))
        if files is None:
            damaged.append(folder(run, step))
            continue
        weights = safetensors.torch.load(files["adapter.safetensors"])
        slots = safetensors.torch.load(files["optimizer.safetensors"])
        for learner in learners:
            _fill(learner, weights, slots, folder(run, step))
        return step, damaged
    return 0, damaged


def _fill(learner: Learner, weights: dict[str, Tensor], slots: dict[str, Tensor], path: Path) -> None:
    for name, parameter in learner.params.items():
        key = f"{learner.name}/{name}"
        if key not in weights or weights[key].shape != parameter.shape:
            raise UserError(
                "E-CKPT-02", f"this checkpoint is of another adapter: {name} is not as it was", path, "train into another folder with --out"
            )
        with torch.no_grad():
            parameter.copy_(weights[key])
        own = {slot.rpartition("/")[2]: value for slot, value in slots.items() if slot.rpartition("/")[0] == key}
        if own:
            learner.optimizer.state[parameter] = {slot: value.to(parameter.device) for slot, value in own.items()}
