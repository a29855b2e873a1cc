"""A pack of any layout and kind, fitted to a base: what goes on which layer, and what cannot be applied, by name and with the reason."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from sdlora import lookup
from sdlora.errors import UserError
from sdlora.family import Family
from sdlora.packs import convert, foreign, inversions, layouts, openclip, peft
from sdlora.packs.convert import SCALE, Leaves
from sdlora.packs.words import IDS

LARGEST, STRONGEST, SMALLEST = 65504.0, 1e4, 1e-30
"""Of a weight (fp16's), of alpha / rank; what is below is zero to every program."""
FREE = ("alpha", "on_input", SCALE)
"""Leaves that may be zero, or say nothing of whether a layer changes."""


@dataclass(frozen=True)
class Fitted:
    """What goes on one layer."""

    kind: ModuleType
    leaves: Leaves


@dataclass
class Report:
    """What of a pack acts on a base, and what doesn't."""

    layouts: dict[str, int] = field(default_factory=dict)  # keys in each
    applied: dict[str, str] = field(default_factory=dict)  # full layer name: kind
    unknown: list[str] = field(default_factory=list)  # keys of no layer of this base
    ignored: dict[str, str] = field(default_factory=dict)  # key, or layer: why it is not applied
    notes: list[str] = field(default_factory=list)  # what is applied, and may surprise
    code: str = "E-PACK-06"

    @property
    def complete(self) -> bool:
        """Whether all that the pack holds acts."""
        return not self.unknown and not self.ignored

    def count(self) -> str:
        """How many layers are changed, how many keys and layers are not applied, and which."""
        left = len(self.unknown) + len(self.ignored)
        return f"{len(self.applied)} layers are changed, {left} of its keys and layers cannot be applied: {'; '.join(self.lines())}"

    def lines(self, most: int = 5) -> list[str]:
        """What does not act, for people; of many alike the first."""
        found = [f"{key}: {why}" for key, why in self.ignored.items()][:most]
        found += [f"{key}: no layer of this base" for key in self.unknown[:most]]
        left = len(self.unknown) + len(self.ignored) - len(found)
        return found + ([f"and {left} more"] if left else [])


def fit(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], family: Family, word: str = "") -> tuple[dict[str, Fitted], Report]:
    """What goes on which layers, by full name; nothing is changed. `word` is what the embeddings of a file that names none are of.

    Raises `UserError` for numbers that no sound pack holds.
    """
    check_numbers(tensors)
    layers = family.layers()
    taken = inversions.take(openclip.taken_apart(tensors, layers), word, family)
    tensors = taken.tensors
    found = layouts.sort(tensors, layouts.spellings(layers, family.prefixes) | _openclip(layers))
    report = Report(found.layouts, unknown=found.unknown, ignored=taken.ignored, notes=taken.notes)
    report.ignored |= dict.fromkeys(found.twice, "the same is given under another name as well")
    said, fitted = peft.Alphas.read(metadata), {}
    for layer, named in found.layers.items():
        leaves = {leaf: tensors[key] for leaf, key in named.items()}
        try:
            said.fill(layer, leaves)
            fitted[layer] = _layer(leaves, layers[layer], metadata.get("sdlora.adapter", ""))
        except (ValueError, KeyError, RuntimeError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            report.ignored[next(iter(named.values()))] = what
            report.code = "E-PACK-07" if isinstance(error, StrangeError) else report.code
            continue
        report.applied[layer] = fitted[layer].kind.__name__.rpartition(".")[2]
    if found.unknown:
        report.code = "E-PACK-04"
    _remark(fitted, report)
    return fitted, report


def check_numbers(tensors: Mapping[str, Tensor]) -> None:
    """Raise `UserError` for a number that is not finite, or larger than any that was trained, and for factors of whole numbers."""
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() and tensor.numel() > 1 and key.rpartition(".")[2] != IDS:
            what = f"it holds whole numbers ({tensor.dtype}) where weights belong"
            raise UserError("E-PACK-05", what, key, "write it again in fp16, bf16 or fp32")
        low, high = (float(value) for value in tensor.float().aminmax())
        if not max(-low, high) <= LARGEST:  # NaN is not, either
            what = "this pack holds numbers that are not finite, or so large that half precision cannot hold them"
            raise UserError("E-PACK-05", what, key, "train it again at a lower rate")


def _openclip(layers: Iterable[str]) -> dict[str, tuple[str, str]]:
    return {name: (layer, "original") for name, layer in openclip.spellings(layers, fused=False)}


class StrangeError(ValueError):
    """Leaves that no kind of adapter has."""


def kind_of(leaves: Iterable[str], named: str = "") -> ModuleType:
    """The kind that is named, if it has such leaves, or else that of the fewest leaves which has them all. Raises `StrangeError`."""
    return _kind_of(frozenset(leaves), named)


@lru_cache(maxsize=256)
def _kind_of(wanted: frozenset[str], named: str) -> ModuleType:
    if named and wanted <= lookup.find("adapters", named).Adapter.leaves:
        return lookup.find("adapters", named)
    kinds = [lookup.find("adapters", name) for name in lookup.names("adapters")]
    able = [kind for kind in kinds if wanted <= kind.Adapter.leaves and not kind.Adapter.shared]  # what layers share no leaf can tell
    if not able:
        strange = sorted(wanted.difference(*(kind.Adapter.leaves for kind in kinds))) or sorted(wanted)
        raise StrangeError(f"no kind of adapter keeps its weights so: {', '.join(strange[:3])}")
    return min(able, key=lambda kind: len(kind.Adapter.leaves))


def ranks(leaves: Mapping[str, Tensor]) -> int:
    """The rank of a layer's factors; 0 where it has none."""
    for name in (layouts.DOWN, "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if name in leaves and leaves[name].ndim:
            return len(leaves[name])
    if foreign.GLORA[0] in leaves and leaves[foreign.GLORA[0]].ndim:
        return min(leaves[foreign.GLORA[0]].shape[:2])
    return 0


def _layer(leaves: Leaves, layer: nn.Module, named: str) -> Fitted:
    """Convert, choose the kind, and try whether it takes the leaves. Raises `ValueError`, `KeyError` or `RuntimeError`."""
    if not isinstance(getattr(layer, "weight", None), nn.Parameter):
        return _whole(leaves, layer, named)
    leaves = convert.canonical(leaves, layer.get_parameter("weight"))
    rank = ranks(leaves)
    if rank > convert.MAX_RANK:
        raise ValueError(f"has the rank {rank}; {convert.MAX_RANK} is the most")
    if rank and "alpha" in leaves and abs(float(leaves["alpha"])) > STRONGEST * rank:
        raise ValueError(f"its alpha {float(leaves['alpha']):g} is beyond all sense at rank {rank}")
    if not convert.needs_folding(leaves):
        return _whole(leaves, layer, named)
    apart = convert.apart(leaves)
    main = {name: tensor for name, tensor in leaves.items() if name not in apart}
    difference = None
    if set(main) - {"alpha"}:
        inner = _whole(main, layer, named)
        delta = inner.kind.Adapter(layer, inner.kind.Config.blank(), unused())
        delta.load(main)
        difference = delta.difference(layer)
    rest = {name: tensor for name, tensor in leaves.items() if name in apart}
    return _whole(convert.fold(rest, layer, difference), layer, "")


def _whole(leaves: Leaves, layer: nn.Module, named: str) -> Fitted:
    kind = kind_of(leaves, named)
    if not kind.fits(layer):
        raise ValueError(f"{kind.__name__.rpartition('.')[2]} cannot sit on {type(layer).__name__}")
    kind.Adapter(layer, kind.Config.blank(), unused()).load(leaves)
    return Fitted(kind, leaves)


def _remark(fitted: Mapping[str, Fitted], report: Report) -> None:
    """Note what may surprise."""
    zero = [layer for layer, one in fitted.items() if "alpha" in one.leaves and not one.leaves["alpha"].any() and ranks(one.leaves)]
    if zero:
        report.notes.append(
            f"{len(zero)} layers have the alpha 0 and do nothing, as in most programs; kohya's takes it for the rank: {zero[0]}"
        )
    several = Counter(report.applied.values())
    if len(several) > 1:
        report.notes.append("several kinds: " + ", ".join(f"{kind} on {count} layers" for kind, count in several.items()))


def idle(fitted: Mapping[str, Fitted]) -> bool:
    """Whether nothing moves the base: on every layer one of the factors is zero."""
    return all(_idle(one.leaves) for one in fitted.values())


def _idle(leaves: Leaves) -> bool:
    if "alpha" in leaves and not leaves["alpha"].any() and ranks(leaves):
        return True
    sizes = {name: float(tensor.abs().max()) for name, tensor in leaves.items() if name not in FREE}
    if SCALE in leaves:
        return False
    changes = [size for name, size in sizes.items() if name.startswith("diff")]
    return max(changes) < SMALLEST if changes else any(size < SMALLEST for size in sizes.values())


def unused(_: str = "") -> Any:
    """A stream for weights that are replaced at once."""
    return np.random.Generator(np.random.Philox(key=0))
