"""The mean of a run's checkpoints as one pack (Izmailov et al. 2018, section 3, over an adapter instead of a network).

What is averaged is ΔW, exactly. The mean of LoRA's factors would not be that: up_1 @ down_1 + up_2 @ down_2 is no product of sums. Side by
side, [up_1 up_2] @ [down_1; down_2], the factors give just that sum, at the price of a rank as many times as large.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from sdlora import devices, family, safeio, settings, state
from sdlora.adapter import Bank
from sdlora.config import parse
from sdlora.errors import UserError
from sdlora.learners import base_of, pieces
from sdlora.lowrank import DOWN, UP
from sdlora.packs import file, keys, words
from sdlora.packs.file import Pack
from sdlora.randomness import stream

LINEAR = ({"diff"}, {"weight", "on_input"}, {words.DIFFERENCE, words.IDS})
"""Leaves of the kinds whose ΔW is linear in what they train."""
FACTORS = {DOWN, UP, "alpha"}


def average(run: Path, chosen: Sequence[int], last: int) -> Pack:
    """A finished run's pack with the mean of the checkpoints of these steps, or else of the `last` ones, in it."""
    settled = parse(settings.read(run / "config.toml"), run)
    pack = file.load(run / f"{settled.name}.safetensors")
    taken = list(chosen) or state.steps(run)[-last:]
    missing = sorted(set(taken) - set(state.steps(run)))
    if missing or len(set(taken)) < 2:
        what = f"there is no checkpoint of step {missing[0]}" if missing else "an average needs two checkpoints at least"
        there = ", ".join(map(str, state.steps(run)))
        raise UserError("E-AVG-01", what, run, f"there are {there}; train.keep_checkpoints and train.save_every say how many are kept")
    loaded = family.load(base_of(settled), torch.device("cpu"), devices.DTYPES["fp32"])
    bank = Bank(loaded.components)
    bank.add(settled.name, pieces(settled, loaded), lambda dotted: stream(settled.seed, f"init/{dotted}"))
    found = []
    for step in taken:
        _fill(bank, settled.name, state.folder(run, step))
        held = file.tensors_of(bank, settled.name, loaded, torch.float32)
        found.append({key: tensor.clone() for key, tensor in held.items()})  # the next checkpoint takes the same place
    tensors = mean(found)
    modules = keys.by_module(tensors)
    ranks = {int(leaves[DOWN].shape[0]) for leaves in modules.values() if DOWN in leaves}
    said = {"ss_network_dim": str(max(ranks)), "ss_network_alpha": str(float(max(ranks)))} if ranks else {}
    steps = ", ".join(map(str, taken))
    return replace(pack, tensors=tensors, metadata={**pack.metadata, **said, "sdlora.average_of_steps": steps, "ss_steps": str(max(taken))})


def save(path: Path, pack: Pack) -> None:
    """Write an averaged pack, in the precision of packs."""
    tensors = {
        key: tensor.half() if key.partition(".")[2] not in ("alpha", words.DIFFERENCE, words.IDS) else tensor
        for key, tensor in pack.tensors.items()
    }
    hashed = ("modelspec.hash_sha256", "sshs_model_hash")
    file.save(path, tensors, lambda sha: {**pack.metadata, hashed[0]: f"0x{sha}", hashed[1]: sha})


def mean(packs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of the pack whose ΔW is the mean of those of the packs. Raises `UserError` for kinds that have none so simple."""
    found: dict[str, Tensor] = {}
    for module, leaves in keys.by_module(packs[0]).items():
        own = [keys.by_module(pack)[module] for pack in packs]
        if set(leaves) == FACTORS:
            ups = [one[UP] * float(one["alpha"]) / len(one[DOWN]) / len(packs) for one in own]
            down = torch.cat([one[DOWN] for one in own])
            made = {DOWN: down, UP: torch.cat(ups, 1), "alpha": torch.tensor(float(len(down)))}
        elif set(leaves) in LINEAR:
            made = {leaf: torch.stack([one[leaf] for one in own]).mean(0) for leaf in leaves}
        else:
            what = f"the mean of such adapters ({', '.join(sorted(leaves))}) is none of their kind"
            raise UserError("E-AVG-02", what, "adapter.kind", "train lora, full or ia3, or set train.ema, which averages while it trains")
        found |= {f"{module}.{leaf}": tensor for leaf, tensor in made.items()}
    return found


def _fill(bank: Bank, name: str, checkpoint: Path) -> None:
    files = safeio.read_folder(checkpoint)
    if files is None:
        raise UserError("E-AVG-03", "this checkpoint is damaged", checkpoint, "name the steps of others with --steps")
    weights = safetensors.torch.load(files["adapter.safetensors"])
    weights |= safetensors.torch.load(files["ema.safetensors"]) if "ema.safetensors" in files else {}
    with torch.no_grad():
        for dotted, parameter in bank.parameters(name).items():
            parameter.copy_(weights[f"{name}/{dotted}"])
