"""What a run will take, told beforehand: memory from two small forwards, time from what an earlier run of this kind took here."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdlora import devices
from sdlora.adapter import Bank, Piece
from sdlora.config import Run
from sdlora.data.buckets import Size
from sdlora.data.store import Store
from sdlora.family import Family
from sdlora.randomness import stream

TRAINED_BYTES = 16
"""Of each number trained: itself, its gradient and AdamW's two moments, all float32."""


def totals(run: Run, family: Family, pieces: Mapping[str, Piece], sizes: Sequence[Size], store: Store) -> dict[str, Any]:
    """The estimates as the ledger's totals have them; `pieces` are what the run adapts. Unknown seconds are None."""
    assert run.train.steps is not None
    pace = known_pace(pace_name(run, family), store)
    return {"memory_bytes": memory(run, family, pieces, sizes), "seconds": None if pace is None else round(pace * run.train.steps, 1)}


def memory(run: Run, family: Family, pieces: Mapping[str, Piece], sizes: Sequence[Size]) -> dict[str, int]:
    """Bytes of the tensors that training holds on its device at the end of a forward; libraries and what kernels borrow come on top.

    What is kept for the backward pass grows with a picture's area alone, as no attention matrix is kept. Two small forwards of one
    sample, through an adapter that is put on for them, so tell it for any size.
    """
    assert run.train.batch_size is not None
    dtype = devices.chosen(run.train.precision or "auto")[1]
    bank = Bank(family.components)
    frozen = {id(p): p for module in family.parts().values() for p in module.parameters()}
    inner = {id(p): p for module in family.components.values() for p in module.parameters()}
    bank.add(run.name, pieces, lambda dotted: stream(run.seed, f"init/{dotted}"))
    try:
        trained = sum(p.numel() for p in bank.parameters(run.name).values())
        bank.use({run.name: 1.0})
        one, two = (_kept(family, (count * family.step_px, family.step_px)) for count in (1, 2))
    finally:
        bank.eject()
    area = max(width * height for width, height in sizes) / family.step_px**2
    share = dtype.itemsize / next(iter(inner.values())).dtype.itemsize  # of the precision that the base was loaded in
    parts = {
        "base": sum(p.numel() * (dtype.itemsize if i in inner else p.element_size()) for i, p in (frozen | inner).items()),
        "adapter": TRAINED_BYTES * trained,
        "activations": round(share * run.train.batch_size * (one + (area - 1) * (two - one))),
    }
    return {**parts, "total": sum(parts.values())}


def side_by_side(parts: Sequence[Mapping[str, int]], samples: int, free: int | None) -> tuple[int, int]:
    """Of runs over one loaded base, whose `memory` is given: bytes of them all, and the samples that go through it at once so that these
    fit into `free` bytes beside the base; 0: all `samples`. What kernels borrow for a moment (0.4 of the whole) is left free."""
    activations, adapters = sum(one["activations"] for one in parts), sum(one["adapter"] for one in parts)
    total = parts[0]["base"] + adapters + activations
    if free is None or adapters + activations <= 0.7 * free:
        return total, 0
    return total, max(1, int(samples * max(0.0, 0.7 * free - adapters) / activations))


def _kept(family: Family, size: Size) -> int:
    """Bytes that a forward of one sample keeps for the backward pass, beside weights."""
    weights = {p.untyped_storage().data_ptr() for module in family.components.values() for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.zeros(1, family.latent_channels, size[1] // family.latent_factor, size[0] // family.latent_factor, device=family.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        family.predict(x, torch.zeros(1, dtype=torch.long, device=family.device), family.states(family.tokens([""])))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def known_pace(name: str, store: Store) -> float | None:
    """Seconds a step of the latest run of this kind on this machine, or None."""
    content = store.get(name)
    return None if content is None else float(json.loads(content))


def keep_pace(name: str, store: Store, seen: Sequence[tuple[int, float]]) -> None:
    """Remember how long a step took, checkpoints and all, from (step, seconds) pairs at which the device was waited for."""
    if len(seen) > 1:
        (first, start), (last, end) = seen[0], seen[-1]
        store.put(name, json.dumps((end - start) / (last - first)).encode())


def pace_name(run: Run, family: Family) -> str:
    """Name of the entry that holds the seconds of a step: from all that they depend on and that is known before."""
    device, dtype = devices.chosen(run.train.precision or "auto")
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.node()} {torch.get_num_threads()}"
    layout = [family.base.source.config(part) for part in family.components]
    kind: list[Any] = [
        run.adapter.model_dump(),
        run.train.batch_size,
        run.train.accumulation,
        run.train.text_encoder_lr == 0,
        run.train.words_lr == 0,
    ]
    kind += [run.data.resolution_px, run.data.prior_share]
    said = json.dumps([layout, kind, machine, device.type, str(dtype)])
    return f"{hashlib.blake2b(said.encode(), digest_size=20).hexdigest()}.pace"
