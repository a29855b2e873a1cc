"""What a run will take, told beforehand: memory from two small forwards, time from what an earlier run of this kind took here."""

import hashlib
import json
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdlora import devices, quantise
from sdlora.adapter import Bank, Piece
from sdlora.config import Run
from sdlora.data.buckets import Size
from sdlora.data.store import Store
from sdlora.family import Family
from sdlora.randomness import stream
from sdlora.routing import Route

TRAINED_BYTES = 16
"""Of each number trained: itself, its gradient and AdamW's two moments, all float32."""


@dataclass(frozen=True)
class Measured:
    """What a run would hold on its device, in bytes, by the measures that can be taken."""

    weights: Mapping[str, int]  # the base's, as `train.base_weights` has them
    adapter: int  # what is trained
    activations: int  # kept of a sample for the backward pass
    checkpointed: int  # the same under gradient checkpointing: the inputs of all blocks, and all of the largest one
    samples: int  # of a batch

    def parts(self, weights: str = "full", checkpointing: bool = False, samples: int = 0) -> dict[str, int]:
        """The bytes under these measures, and their sum; with so many samples in a forward pass, or a batch of them."""
        activations = (samples or self.samples) * (self.checkpointed if checkpointing else self.activations)
        parts = {"base": self.weights[weights], "adapter": self.adapter, "activations": activations}
        return {**parts, "total": sum(parts.values())}


def seconds(run: Run, family: Family, store: Store) -> float | None:
    """What the steps of a run will take, if that is known."""
    assert run.train.steps is not None
    pace = known_pace(pace_name(run, family), store)
    return None if pace is None else round(pace * run.train.steps, 1)


def memory(run: Run, family: Family, pieces: Mapping[str, Piece], sizes: Sequence[Size], away: Collection[str] = ()) -> Measured:
    """Bytes of the tensors that training holds on its device at the end of a forward; libraries and what kernels borrow come on top.

    What is kept for the backward pass grows with a picture's area alone, as no attention matrix is kept. Two small forwards of one
    sample, through an adapter that is put on for them, so tell it for any size. The base has its full weights, and is of no particular
    device; the parts called `away` do not lie on the run's.
    """
    assert run.train.batch_size is not None
    dtype = devices.chosen(run.train.precision or "auto")[1]
    weights = {how: weight_bytes(family, dtype, how, away) for how in ("full", *quantise.WAYS)}
    loaded = next(iter(family.components["unet"].parameters())).dtype
    bank = Bank(family.components)
    bank.add(run.name, pieces, lambda dotted: stream(run.seed, f"init/{dotted}"))
    try:
        trained = sum(p.numel() for p in bank.parameters(run.name).values())
        bank.route = Route(torch.ones(1, device=family.device))
        one, two = (_kept(family, (count * family.step_px, family.step_px)) for count in (1, 2))
    finally:
        bank.eject()
    area = max(width * height for width, height in sizes) / family.step_px**2
    kept = one.at(area, two)
    share = dtype.itemsize / loaded.itemsize  # of the precision that the base was loaded in
    checkpointed = round(share * (kept.outside + max(kept.inside, default=0)))
    return Measured(weights, TRAINED_BYTES * trained, round(share * kept.plain), checkpointed, run.train.batch_size)


def weight_bytes(family: Family, dtype: torch.dtype, how: str, away: Collection[str] = ()) -> int:
    """Bytes of a base's weights, those of its components in `dtype`, or packed where that is asked and can be."""
    found = 0
    for name, module in family.parts().items():
        if name in away:
            continue
        inner = family.components.get(name)
        size = dtype.itemsize if inner is not None else torch.float32.itemsize
        layers = quantise.chosen(inner) if inner is not None and how != "full" else {}
        packed = [layer.weight.shape for layer in layers.values()]
        whole = sum(p.numel() for p in module.parameters()) - sum(shape.numel() for shape in packed)
        found += size * whole + sum(quantise.packed_bytes(shape, how) for shape in packed)
    return found


@dataclass(frozen=True)
class Kept:
    """Bytes that a forward of one sample keeps for the backward pass, beside weights."""

    plain: float  # all of them
    outside: float  # those that no block keeps, and the inputs of blocks
    inside: tuple[float, ...]  # what each block keeps beside

    def at(self, area: float, two: "Kept") -> "Kept":
        """For so many times the area; `two` is for twice of it."""

        def line(one: float, other: float) -> float:
            return one + (area - 1) * (other - one)

        inside = tuple(line(*both) for both in zip(self.inside, two.inside, strict=True))
        return Kept(line(self.plain, two.plain), line(self.outside, two.outside), inside)


def _kept(family: Family, size: Size) -> Kept:
    weights = {p.untyped_storage()._cdata for module in family.components.values() for p in module.parameters()}
    kept, inputs, inside = dict[int, Tensor](), dict[int, Tensor](), list[set[int]]()

    def keep(tensor: Tensor) -> Tensor:
        bare = tensor.detach()  # a step of differentiation that keeps its own result, and that result, would hold one another for good
        if bare.untyped_storage()._cdata not in weights:
            kept[bare.untyped_storage()._cdata] = bare
        return bare

    def block(function: Any, *given: Any) -> Any:
        before = set(kept)
        inputs.update({one.untyped_storage()._cdata: one.detach() for one in given if isinstance(one, Tensor)})
        said = function(*given)
        inside.append(set(kept) - before - set(inputs))
        return said

    x = torch.zeros(1, family.latent_channels, size[1] // family.latent_factor, size[0] // family.latent_factor, device=family.device)
    try:
        family.blocks(block)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            family.predict(x, torch.zeros(1, dtype=torch.long, device=family.device), family.states(family.tokens([""])))
    finally:
        family.blocks(None)
    outside = {**{key: one for key, one in kept.items() if not any(key in own for own in inside)}, **inputs}
    own = tuple(float(_bytes(kept[key] for key in keys - set(outside))) for keys in inside)
    return Kept(_bytes(kept.values()), _bytes(outside.values()), own)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


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
    kind: list[Any] = [run.adapter.model_dump(), run.train.batch_size, run.train.accumulation, run.train.text_encoder_lr == 0]
    kind += [run.train.words_lr == 0, run.data.resolution_px, run.data.prior_share]
    kind += [run.train.base_weights, run.train.gradient_checkpointing, run.train.attention]
    said = json.dumps([layout, kind, machine, device.type, str(dtype)])
    return f"{hashlib.blake2b(said.encode(), digest_size=20).hexdigest()}.pace"
