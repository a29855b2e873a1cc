"""Packs made of files of packs, and of bases: the workshop's way in, which reads, names and draws."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from sdlora import baking, extraction, family, plots, safeio
from sdlora.apart import Apart, apart
from sdlora.baking import Baked
from sdlora.errors import UserError
from sdlora.extraction import Extracted
from sdlora.family import Family
from sdlora.layers import is_linear, weight_of
from sdlora.packs import deltas, file, keys, spectrum, workshop
from sdlora.packs.deltas import Change
from sdlora.packs.file import Pack
from sdlora.packs.spectrum import Spectrum
from sdlora.packs.workshop import Budget, Cost, Difference

Made = tuple[Cost, Apart | None]
"""What a new pack cost: of its weights, and, where a base is at hand, of its pictures."""


def merge_packs(packs: Sequence[str], out: Path, how: str = "concat", rank: int | None = None, base: str = "") -> Made:
    """Write the sum of packs, each `file` or `file:scale`, as one; `how` is concat, svd (to a rank) or sum.

    With a base packs of any layout and kind that is a change of weights are taken, and pictures compared.
    """
    if how not in ("concat", "svd", "sum") or (rank is not None and how != "svd"):
        raise UserError("E-SHOP-10", f"{how} is no such way, or has no rank", "--how", "concat, sum, or svd with --rank")
    chosen = [(file.load(path), scale) for path, scale in map(workshop.scaled, packs)]
    loaded = _loaded(base)
    changes = [_changes(pack, loaded) for pack, _ in chosen]
    cost = workshop.merge(chosen, changes, out, how, None if rank is None else Budget(rank))  # type: ignore[arg-type]
    return cost, _apart(base, chosen, [(file.load(out), 1.0)])


def resize_pack(
    pack: Path, out: Path, rank: int | None = None, energy: float | None = None, error: float | None = None, base: str = ""
) -> Made:
    """Write a pack at the least ranks that keep to one of the three bounds; with a base as `merge_packs`."""
    budget, first = Budget(rank, energy, error), file.load(pack)
    cost = workshop.resize(first, _changes(first, _loaded(base)), out, budget)
    return cost, _apart(base, [(first, 1.0)], [(file.load(out), 1.0)])


def compare_packs(a: Path, b: Path, base: str = "") -> tuple[list[Difference], Apart | None]:
    """What two packs add, module by module, the most different first; with a base also how different their pictures are."""
    packs, loaded = [file.load(path) for path in (a, b)], _loaded(base)
    named = [(str(path), _changes(pack, loaded)) for path, pack in zip((a, b), packs, strict=True)]
    return workshop.compared(*named), _apart(base, [(packs[0], 1.0)], [(packs[1], 1.0)])


def bake_packs(packs: Sequence[str], base: str, out: Path, pictures: bool = True) -> tuple[Baked, Apart | None]:
    """Write a copy of a base with packs, each `file` or `file:scale`, in its weights."""
    chosen, found = [(file.load(path), scale) for path, scale in map(workshop.scaled, packs)], family.find(base)
    baked = baking.bake(found, chosen, out)
    return baked, apart(found, (found, chosen), (family.find(str(out)), ())) if pictures else None


def extract_pack(base: str, tuned: str, out: Path, budget: Budget, pictures: bool = True) -> tuple[Extracted, Apart | None]:
    """Write what one base has over another as a pack."""
    first, second = family.find(base), family.find(tuned)
    extracted = extraction.extract(first, second, out, budget)
    return extracted, apart(first, (second, ()), (first, [(file.load(out), 1.0)])) if pictures else None


def pack_spectrum(pack: Path, out: Path | None = None, base: str = "") -> tuple[list[Spectrum], int]:
    """Singular values of what a pack adds, by module, and the rank that they advise; with a base the intruder dimensions too; with `out`
    all of it as a picture."""
    read, loaded = file.load(pack), _loaded(base)
    weights = _weights(loaded) if loaded else {}
    found = [spectrum.spectrum(module, change, weights.get(module)) for module, change in _changes(read, loaded).items()]
    if out:
        safeio.write(out, spectra(pack.stem, found))
    return found, spectrum.advised(found)


def spectra(title: str, found: Sequence[Spectrum]) -> bytes:
    """A PNG: the singular values of each layer, and under them its ranks and, where they are known, its intruder dimensions."""
    curves = [plots.Curve("", [(float(i + 1), v / one.values[0]) for i, v in enumerate(one.values)]) for one in found if one.effective]
    numbers: dict[str, Sequence[float]] = {"effective": [one.effective for one in found], "for 95 %": [one.needed for one in found]}
    if any(one.intruders is not None for one in found):
        numbers["intruders"] = [len(one.intruders or ()) for one in found]
    places = [plots.Curve(name, [(float(i + 1), float(v)) for i, v in enumerate(some)]) for name, some in numbers.items()]
    parts = [
        plots.plot(f"{title}: singular values of each layer", "which, by size", "share of the largest", curves),
        plots.plot("ranks, layer by layer", "layer, in the pack's order", "number of directions", places),
    ]
    whole = Image.new("RGB", (parts[0].width, sum(part.height for part in parts)))
    for i, part in enumerate(parts):
        whole.paste(part, (0, i * parts[0].height))
    buffer = io.BytesIO()
    whole.save(buffer, "PNG")
    return buffer.getvalue()


def _loaded(base: str) -> Family | None:
    return family.load(family.find(base), torch.device("cpu"), torch.float32) if base else None


def _changes(pack: Pack, loaded: Family | None) -> dict[str, Change]:
    return deltas.named(deltas.beside(pack, loaded), loaded) if loaded else deltas.of(pack)


def _weights(loaded: Family) -> Mapping[str, torch.Tensor]:
    """By pack module, each layer's weight as a matrix."""
    layers = loaded.layers()
    named = keys.layer_names(layers, loaded.prefixes)
    return {module: weight_of(layers[dotted]).flatten(1) for module, dotted in named.items() if is_linear(layers[dotted])}


def _apart(base: str, asked: Sequence[tuple[Pack, float]], made: Sequence[tuple[Pack, float]]) -> Apart | None:
    found = family.find(base) if base else None
    return apart(found, (found, asked), (found, made)) if found else None
