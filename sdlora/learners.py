"""What a run trains: which layers, from which pictures, by which optimizer; and what of it makes no sense."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from sdlora import lookup
from sdlora.adapter import Bank, Piece, choose_sites
from sdlora.config import Run
from sdlora.data import cache, captions, masks
from sdlora.data.batches import Prepared
from sdlora.data.ledger import Dataset
from sdlora.data.store import Store
from sdlora.data.variants import frame
from sdlora.errors import UserError
from sdlora.family import Base, Family
from sdlora.objective import Noising
from sdlora.optimizer import Optimizing, faster, groups, library
from sdlora.randomness import stream
from sdlora.train import Goal, Learner

T = TypeVar("T")
Latents = Sequence[Sequence[tuple[Tensor, Tensor]]]
"""Mean and standard deviation (C, h, w) of each picture's variants."""
HIGH_RATE = 0.1


@dataclass(frozen=True)
class Job:
    """A run whose input is known to be good: nothing has been written yet."""

    settled: Run
    base: Base
    out: Path
    began: float  # seconds since 1970
    dataset: Dataset
    pieces: dict[str, Piece]  # what is put on which layers
    kept: Store = field(default_factory=Store)  # what earlier runs computed


def check_objective(settled: Run, loaded: Family) -> None:
    """Whether the network is asked for what it says: an adapter cannot turn the one into the other."""
    kind = noising(settled).kind
    if kind != loaded.prediction:
        what = f"the base predicts {loaded.prediction} and the objective is {kind}: its pictures would be noise"
        todo = f"set objective.kind={loaded.prediction}" if loaded.prediction in lookup.names("objectives") else "choose another base"
        raise UserError("E-OBJ-01", what, loaded.base.name, todo)


def check_optimizer(settled: Run) -> None:
    """Whether the optimizer is there, and can do what it is to do."""
    own, rates = optimizing(settled), (given(settled.train.lr), given(settled.train.text_encoder_lr))
    library(own)
    ratio, adapter = settled.train.lora_plus_ratio, settled.adapter.model_dump()["kind"]
    if own.finds_its_rate and rates[1] not in (rates[0], 0):
        what = f"{own.kind} finds one rate for all, and train.lr = {rates[0]:g} is not train.text_encoder_lr = {rates[1]:g}"
        raise UserError("E-OPT-02", what, "train.text_encoder_lr", "set both alike, or this one to 0")
    if ratio != 1 and (own.finds_its_rate or not lookup.find("adapters", adapter).Adapter.fast):
        who = f"{own.kind} finds one rate for all" if own.finds_its_rate else f"{adapter} has no factor that starts at zero"
        raise UserError("E-OPT-03", f"{who}, so that none can learn {ratio:g} times as fast", "train.lora_plus_ratio", "set it to 1")


def pieces(settled: Run, loaded: Family) -> dict[str, Piece]:
    """What the run puts on which layers, by their full names."""
    kind = lookup.find("adapters", settled.adapter.model_dump()["kind"])
    fitting = {name: layer for name, layer in loaded.layers().items() if kind.fits(layer)}
    names = choose_sites(fitting, settled.adapter.model_dump()["targets"], loaded.presets)
    if settled.train.text_encoder_lr == 0:  # an adapter that never moves need not be there
        names = [name for name in names if not name.startswith("text_encoder")]
    return dict.fromkeys(names, (kind, settled.adapter))


def new_learner(job: Job, loaded: Family, bank: Bank, accelerator: Accelerator, latents: Latents) -> Learner:
    """Put a fresh adapter on the bank, with its data and optimizer."""
    settled, train = job.settled, job.settled.train
    data = prepared(job, loaded, latents)
    bank.add(settled.name, job.pieces, lambda dotted: stream(settled.seed, f"init/{dotted}"))
    rates, fast = {"unet.": given(train.lr), "text_encoder": given(train.text_encoder_lr)}, bank.fast(settled.name)
    halves = [faster(bank.parameters(settled.name, part), lr, fast, train.lora_plus_ratio) for part, lr in rates.items()]
    params = bank.parameters(settled.name)
    ema = {dotted: parameter.detach().clone() for dotted, parameter in params.items()} if train.ema else {}
    own = optimizing(settled)
    optimizer = lookup.find("optimizers", own.kind).new(groups([*itertools.chain.from_iterable(halves)]), own)
    scaler = accelerator.scaler and torch.amp.GradScaler(loaded.device.type)  # its own: who overflows slows no other down
    goal = Goal(lookup.find("objectives", noising(settled).kind).noise, noising(settled))
    return Learner(settled.name, data, params, AcceleratedOptimizer(optimizer, scaler=scaler), goal, train, ema)


def prepared(job: Job, loaded: Family, latents: Latents) -> Prepared:
    """The pictures and captions of a run as its training draws from them."""
    settled, items, numbers = job.settled, job.dataset.account.used, itertools.count()
    said, kept = [*itertools.chain.from_iterable(job.dataset.captions)], given(settled.data.prior_prompts)
    text = loaded.tokens([*said, *kept, ""])
    varying = captions.vary(items, settled.data)
    if not varying and not any(name.startswith("text_encoder") for name in job.pieces):
        text = cache.states(text, loaded, job.kept)

    def final(picture: int, number: int) -> Tensor:
        return loaded.tokens([captions.final(items[picture], settled, number)])[0].cpu()

    return Prepared(
        settled.seed,
        latents,
        text.cpu(),
        given(settled.data.caption_dropout),
        pool=job.dataset.pool,
        rows=[[next(numbers) for _ in said] for said in job.dataset.captions],
        frames=[[frame(item, one) for one in ways] for item, ways in zip(items, job.dataset.variants, strict=True)],
        weights=loss_weights(job, loaded),
        prior=range(len(said), len(text)),
        prior_share=given(settled.data.prior_share),
        final=final if varying else None,
        noising=noising(settled),
    )


def loss_weights(job: Job, loaded: Family) -> list[list[Tensor]]:
    """Factors on the squared error of each picture's variants, from its own weight and its mask, which is cropped and turned with it."""
    found = []
    for item, variants in zip(job.dataset.account.used, job.dataset.variants, strict=True):
        if not item.mask:
            found.append([item.weight * torch.ones(1, 1, 1)] * len(variants))
            continue
        mask, factor, floor = masks.read(item.mask, item.path), loaded.latent_factor, job.settled.data.mask_floor
        kept = [item.weight * masks.weights(mask, one.size, one.crop, factor, floor) for one in variants]
        found.append([weight.flip(2) if one.flip else weight for one, weight in zip(variants, kept, strict=True)])
    return found


def noising(settled: Run) -> Noising:
    """The objective's settings."""
    assert isinstance(settled.objective, Noising)
    return settled.objective


def optimizing(settled: Run) -> Optimizing:
    """The optimizer's settings."""
    assert isinstance(settled.optimizer, Optimizing)
    return settled.optimizer


def given(value: T | None) -> T:
    """A setting that a resolved run always has."""
    assert value is not None
    return value


def doubts(settled: Run, loaded: Family, pieces: Mapping[str, Piece]) -> list[str]:
    """What can be trained, but hardly was meant. Raises `UserError` where the adapter is beyond all sense."""
    layers = loaded.layers()
    found, large = [], []
    for dotted, (kind, config) in pieces.items():
        layer: Any = layers[dotted]
        own = sum(p.numel() for p in kind.Adapter(layer, config, stream(0, "size")).parameters())
        large += [(dotted, own / layer.weight.numel())] if own > layer.weight.numel() else []
    if len(large) == len(pieces) and min(share for _, share in large) > 2:  # a rank as large as a layer's smaller side gives 2 at most
        what = f"on each of its layers the adapter holds over twice as many numbers as the layer itself ({large[0][0]})"
        raise UserError("E-ADAPT-04", what, "adapter.rank", "lower it: nothing more can be learnt beyond the side of a layer")
    if large:
        what = f"on {len(large)} of {len(pieces)} layers the adapter holds more numbers than the layer itself"
        found.append(f"{what}; a lower adapter.rank can learn as much")
    if given(settled.train.lr) >= HIGH_RATE and not optimizing(settled).finds_its_rate:
        found.append(f"train.lr = {settled.train.lr:g} is very high: 1e-4 is usual on Stable Diffusion, 2e-3 on the embedded base")
    if noising(settled).model_dump().get("zero_terminal_snr") and float(loaded.alphas_cumprod[-1]) > 1e-6:
        what = "objective.zero_terminal_snr: pictures are drawn by the base's own schedule, which does not end at noise alone"
        found.append(f'{what}; set "rescale_betas_zero_snr": true and "timestep_spacing": "trailing" in its scheduler_config.json')
    return found


def adapted(bank: Bank, name: str, loaded: Family) -> str:
    """What is trained, in a sentence."""
    ours = sum(p.numel() for p in bank.parameters(name).values())
    whole = sum(p.numel() for module in loaded.components.values() for p in module.parameters() if not p.requires_grad)
    frozen = next(p for module in loaded.components.values() for p in module.parameters() if not p.requires_grad)
    where = f"on {loaded.device.type} in {str(frozen.dtype).removeprefix('torch.')}"
    return f"{len(list(bank.deltas(name)))} layers adapted, {ours:,} parameters trained, {ours / whole:.2%} of {whole:,}, {where}"
