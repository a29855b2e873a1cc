"""What a run trains: which layers, from which pictures, by which optimizer; and what of it makes no sense."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from sdlora import devices, estimate, family, lookup, probe
from sdlora.adapter import Bank, Block, Delta, Piece, Targeted
from sdlora.config import Run, parse
from sdlora.data import cache, captions, masks
from sdlora.data.batches import Prepared
from sdlora.data.ledger import Dataset
from sdlora.data.scan import Item
from sdlora.data.store import Store
from sdlora.data.variants import frame
from sdlora.errors import UserError
from sdlora.estimate import Measured
from sdlora.family import Base, Family, Reading
from sdlora.layers import choose_sites
from sdlora.objective import Noising
from sdlora.optimizer import Optimizing, faster, groups, library
from sdlora.quantise import numbers
from sdlora.randomness import stream
from sdlora.train import Goal, Learner

T = TypeVar("T")
Latents = Sequence[Sequence[tuple[Tensor, Tensor]]]
"""Mean and standard deviation (C, h, w) of each picture's variants."""
HIGH_RATE = 0.1
SPOKEN = ("epsilon", "velocity")
"""What networks of the known families predict; a probe tells them apart."""
PROBED = 4
"""Pictures that it looks at."""


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
    memory: dict[str, int] = field(default_factory=dict)  # bytes that its training was counted to hold


def base_of(settled: Run) -> Base:
    """The base that a run names, found and read as its settings say."""
    half = devices.chosen(settled.train.precision or "auto")[1] != torch.float32
    return family.find(settled.base, settled.vae, Reading(**settled.text.model_dump()), half)


def check_objective(settled: Run, loaded: Family, dataset: Dataset, kept: Store) -> tuple[Run, list[str]]:
    """The run whose objective is what the network says, as which the base is taken from here on; and what of that is worth a warning.

    An adapter cannot turn a network that says the one into one that says the other. The network is asked only where the base's files
    do not say, or say otherwise than the settings; `UserError` where it contradicts the settings.
    """
    kind, base = noising(settled).kind, loaded.base
    if base.said and kind == base.prediction:
        return settled, []
    what = f"the base predicts {base.prediction} and the objective is {kind}: its pictures would be noise"
    todo = f"set objective.kind={base.prediction}" if base.prediction in lookup.names("objectives") else "choose another base"
    if kind not in SPOKEN or base.prediction not in SPOKEN or (base.said and settled.probe == "off"):
        raise UserError("E-OBJ-01", what, base.name, todo)
    if settled.probe == "off":
        loaded.take_for(replace(base, prediction=kind))
        return settled, [f"no file of the base says what it predicts: it is taken for {kind}, unasked"]
    found = probe.measure(loaded, _probed(settled, loaded, dataset, kept))
    said = found.prediction
    if said is None and not base.said:
        loaded.take_for(replace(base, prediction=kind))
        what = f"no file of the base says what it predicts, and a probe cannot tell ({found.figures()}): it is taken for {kind}"
        return settled, [f"{what}; if pictures come out as noise, set objective.kind"]
    if base.said and said != kind:
        raise UserError("E-OBJ-01", f"{what} ({found.figures()})", base.name, todo)
    if said != kind and settled.probe == "refuse":
        what = f"the base was measured to predict {said} and the objective is {kind}: its pictures would be noise ({found.figures()})"
        raise UserError("E-OBJ-01", what, base.name, f"set objective.kind={said}")
    loaded.take_for(replace(base, prediction=said or kind, zero_snr=base.zero_snr if found.zero_snr is None else found.zero_snr))
    end = {True: ", by a schedule that ends at noise alone", False: "", None: ""}[found.zero_snr]
    who = f"the base's files say {base.prediction}, but it" if base.said else "no file of the base says what it predicts; it"
    return _with_objective(settled, loaded.prediction), [f"{who} was measured to predict {said}{end} ({found.figures()})"]


def _with_objective(settled: Run, kind: str) -> Run:
    """The run with an objective of another kind, which keeps the settings that both have."""
    fields, table = lookup.find("objectives", kind).Config.model_fields, settled.model_dump()
    objective = {name: value for name, value in table["objective"].items() if name in fields}
    return parse({**table, "objective": {**objective, "kind": kind}})


def _probed(settled: Run, loaded: Family, dataset: Dataset, kept: Store) -> list[probe.Sample]:
    """A few of the run's pictures, as it would train on them."""
    items, ways = dataset.account.used[:PROBED], [some[:1] for some in dataset.variants[:PROBED]]
    latents = cache.latents(items, ways, settled.data.ground, loaded, kept)
    tokens = loaded.tokens([captions.final(item, settled, 0) for item in items])
    rows = zip(items, ways, latents, tokens, strict=True)
    return [probe.Sample(encoded[0][0], row, frame(item, way[0]), item.look.digest) for item, way, encoded, row in rows]


def check_optimizer(settled: Run) -> None:
    """Whether the optimizer is there, and can do what it is to do."""
    own, rates = optimizing(settled), (given(settled.train.lr), given(settled.train.text_encoder_lr))
    library(own)
    own.check()
    if own.finds_its_rate and settled.train.words_lr not in (rates[0], 0):
        what = f"{own.kind} finds one rate for all, and train.lr = {rates[0]:g} is not train.words_lr = {settled.train.words_lr:g}"
        raise UserError("E-OPT-02", what, "train.words_lr", "set both alike, or this one to 0")
    ratio, adapter = settled.train.lora_plus_ratio, targeted(settled).kind
    if own.finds_its_rate and rates[1] not in (rates[0], 0):
        what = f"{own.kind} finds one rate for all, and train.lr = {rates[0]:g} is not train.text_encoder_lr = {rates[1]:g}"
        raise UserError("E-OPT-02", what, "train.text_encoder_lr", "set both alike, or this one to 0")
    factors = {block.lr_factor for block in targeted(settled).blocks} - {None, 0.0, 1.0}
    if own.finds_its_rate and factors:
        raise UserError("E-OPT-02", f"{own.kind} finds one rate for all", "adapter.blocks: lr_factor", "leave it out, or set it to 0")
    if ratio != 1 and (own.finds_its_rate or not lookup.find("adapters", adapter).Adapter.fast):
        who = f"{own.kind} finds one rate for all" if own.finds_its_rate else f"{adapter} has no factor that starts at zero"
        raise UserError("E-OPT-03", f"{who}, so that none can learn {ratio:g} times as fast", "train.lora_plus_ratio", "set it to 1")


def pieces(settled: Run, loaded: Family) -> dict[str, Piece]:
    """What the run puts on which layers, by their full names."""
    own = targeted(settled)
    kind, rates = lookup.find("adapters", own.kind), peak_rates(settled, loaded)
    words = loaded.spelling(settled.trigger)
    moving = {name: said for name, said in blocks(settled, loaded).items() if rates[name] > 0}  # what never moves need not be there
    found: dict[str, Piece] = {name: (kind, own.at(said).spelt(words.get(name, ()))) for name, said in moving.items()}
    if given(settled.train.words_lr) > 0:  # pivotal tuning: the trigger's embeddings beside the rest
        inversion = lookup.find("adapters", "prompt")
        found |= {name: (inversion, inversion.Config().spelt(ids)) for name, ids in words.items() if name not in found}
        if any(len(ids) > loaded.most_tokens for ids in words.values()):
            what = f'the trigger "{settled.trigger}" has more tokens than are read at once'
            raise UserError("E-ADAPT-06", what, "trigger", "choose a shorter one, or set train.words_lr to 0")
    if not found:
        raise UserError("E-ADAPT-05", "every rate of the layers to be adapted is 0: nothing would be learnt", "train.lr", "raise one")
    return found


def blocks(settled: Run, loaded: Family) -> dict[str, list[Block]]:
    """The layers that the targets mean, and the tables `adapter.blocks` that match each, in their order."""
    own = targeted(settled)
    fitting = [name for name, layer in loaded.layers().items() if lookup.find("adapters", own.kind).fits(layer)]
    found: dict[str, list[Block]] = {name: [] for name in choose_sites(fitting, given(own.targets), loaded.presets)}
    for i, block in enumerate(own.blocks):
        for name in choose_sites(list(found), [block.match], loaded.presets, f"adapter.blocks.{i}.match"):
            found[name].append(block)
    return found


def peak_rates(settled: Run, loaded: Family) -> dict[str, float]:
    """The learning rate of each layer that the targets mean, before its schedule."""
    train, words = settled.train, dict.fromkeys(loaded.spelling(settled.trigger), given(settled.train.words_lr))
    rates = {name: rate for name, rate in words.items() if rate > 0}
    for name, said in blocks(settled, loaded).items():
        factor = next((block.lr_factor for block in reversed(said) if block.lr_factor is not None), 1.0)
        rates[name] = factor * words.get(name, given(train.text_encoder_lr if is_text(name) else train.lr))
    return rates


def is_text(name: str) -> bool:
    """Whether a layer is one of a text encoder's."""
    return name.startswith("text_encoder")


def memory(settled: Run, loaded: Family, put: Mapping[str, Piece], dataset: Dataset) -> Measured:
    """What the run would hold on its device."""
    device = devices.chosen(settled.train.precision or "auto")[0]
    away = idle(loaded, speaks(put, dataset.account.used, settled)) if device.type == "cuda" else []
    return estimate.memory(settled, loaded, put, list(dataset.buckets), away)


def speaks(put: Iterable[str], items: Sequence[Item], settled: Run) -> bool:
    """Whether training asks the text encoders in each step: if they are adapted, or captions differ from sample to sample."""
    return captions.vary(items, settled.data) or any(is_text(name) for name in put)


def idle(loaded: Family, speaking: bool) -> list[str]:
    """The parts of a base that training does not ask once latents, and texts unless they are `speaking`, are computed."""
    return [name for name in loaded.parts() if name == "vae" or (is_text(name) and not speaking)]


def new_learner(job: Job, loaded: Family, bank: Bank, accelerator: Accelerator, latents: Latents) -> Learner:
    """Put a fresh adapter on the bank, with its data and optimizer."""
    settled, train = job.settled, job.settled.train
    data = prepared(job, loaded, latents)
    bank.add(settled.name, job.pieces, lambda dotted: stream(settled.seed, f"init/{dotted}"))
    params = bank.parameters(settled.name)
    ema = {dotted: parameter.detach().clone() for dotted, parameter in params.items()} if train.ema else {}
    own = optimizing(settled)
    optimizer = lookup.find("optimizers", own.kind).new(rate_groups(settled, loaded, bank), own)
    scaler = accelerator.scaler and torch.amp.GradScaler(loaded.device.type)  # its own: who overflows slows no other down
    goal = Goal(lookup.find("objectives", noising(settled).kind).noise, noising(settled))
    return Learner(settled.name, data, params, AcceleratedOptimizer(optimizer, scaler=scaler), goal, train, ema)


def rate_groups(settled: Run, loaded: Family, bank: Bank) -> list[dict[str, Any]]:
    """The optimizer's groups: layers of one rate together, those of the text encoders by themselves, since they may end earlier."""
    train, fast, trained = settled.train, bank.fast(settled.name), bank.parameters(settled.name)
    rates, found = peak_rates(settled, loaded), []
    for text in (False, True):
        alike: dict[float, dict[str, nn.Parameter]] = {}
        for dotted, _, delta in bank.deltas(settled.name):
            if is_text(dotted) == text:
                own = {name: trained[name] for leaf, _ in delta.named_parameters() if (name := f"{dotted}.{leaf}") in trained}
                alike.setdefault(rates[dotted], {}).update(own)  # what layers share is known by the first of them
        parts = [part for lr, params in alike.items() for part in faster(params, lr, fast, train.lora_plus_ratio)]
        found += groups(parts, train.text_encoder_steps if text else 0)
    return found


def prepared(job: Job, loaded: Family, latents: Latents) -> Prepared:
    """The pictures and captions of a run as its training draws from them."""
    settled, items, numbers = job.settled, job.dataset.account.used, itertools.count()
    said, kept = [*itertools.chain.from_iterable(job.dataset.captions)], given(settled.data.prior_prompts)
    text = loaded.tokens([*said, *kept, ""])
    varying = captions.vary(items, settled.data)
    if not speaks(job.pieces, items, settled):
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


def targeted(settled: Run) -> Targeted:
    """The adapter's settings."""
    assert isinstance(settled.adapter, Targeted)
    return settled.adapter


def given(value: T | None) -> T:
    """A setting that a resolved run always has."""
    assert value is not None
    return value


def doubts(settled: Run, loaded: Family, pieces: Mapping[str, Piece]) -> list[str]:
    """What can be trained, but hardly was meant. Raises `UserError` where the adapter is beyond all sense."""
    layers = loaded.layers()
    found, large = [], []
    for dotted, (kind, config) in pieces.items():
        own = sum(p.numel() for p in kind.Adapter(layers[dotted], config, stream(0, "size")).parameters())
        whole = numbers(layers[dotted], recurse=kind.Adapter.merges is False)
        large += [(dotted, own / whole)] if own > whole and not kind.Adapter.shared else []
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


def adapted(bank: Bank, settled: Run, loaded: Family) -> tuple[str, list[dict[str, Any]]]:
    """What is trained: a sentence, and by part of the base its layers, ranks, parameters, their share of that part, learning rates."""
    params, base = bank.parameters(settled.name), _numbers(loaded)
    ours, whole = sum(p.numel() for p in params.values()), sum(count for _, count in base)
    frozen = next(p for module in loaded.components.values() for p in module.parameters() if not p.requires_grad)
    where = f"on {loaded.device.type} in {str(frozen.dtype).removeprefix('torch.')}"
    deltas, rates = [*bank.deltas(settled.name)], peak_rates(settled, loaded)
    rows, by_part = [], dict[str, list[tuple[str, Delta]]]()
    for dotted, _, delta in deltas:
        by_part.setdefault(part_of(dotted), []).append((dotted, delta))
    for part, put in by_part.items():
        named = [f"{dotted}.{leaf}" for dotted, delta in put for leaf, _ in delta.named_parameters()]
        trained = sum(params[name].numel() for name in named if name in params)  # what layers share is known by the first of them
        share = trained / sum(count for name, count in base if part_of(name) == part)
        ranks = sorted({int(size) for _, delta in put if isinstance(size := getattr(delta, "rank", None), int)})
        lrs = sorted({rates[dotted] for dotted, _ in put})
        rows.append({"part": part, "layers": len(put), "ranks": ranks, "parameters": trained, "share": share, "lr": lrs})
    return f"{len(deltas)} layers adapted, {ours:,} parameters trained, {ours / whole:.2%} of {whole:,}, {where}", rows


def adapted_line(row: Mapping[str, Any]) -> str:
    """A row of that table, in a line."""
    rank = f"rank {', '.join(map(str, row['ranks']))}, " if row["ranks"] else ""
    lr = ", ".join(f"{one:g}" for one in row["lr"])
    return f"{row['part']}: {row['layers']} layers, {rank}{row['parameters']:,} parameters ({row['share']:.2%} of it), learning rate {lr}"


def part_of(dotted: str) -> str:
    """The part of a base that a layer is in: a text encoder, or the network's way down, middle, way up, or what is around them."""
    component, _, path = dotted.partition(".")
    block = path.partition("_")[0]
    return component if is_text(dotted) else f"{component} {block if block in ('down', 'mid', 'up') else 'around'}"


def _numbers(loaded: Family) -> list[tuple[str, int]]:
    """How many numbers each module of the base holds itself, whatever adapters sit on it."""
    named = [(f"{part}.{name}", inner) for part, module in loaded.components.items() for name, inner in module.named_modules()]
    return [(name, numbers(inner, recurse=False)) for name, inner in named if ".deltas." not in name]
