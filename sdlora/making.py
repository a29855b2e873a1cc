"""Packs made of files of packs: the workshop's way in, which reads, names and draws."""

import io
from collections.abc import Sequence
from pathlib import Path

from sdlora import plots, safeio
from sdlora.errors import UserError
from sdlora.packs import deltas, file, spectrum, workshop
from sdlora.packs.spectrum import Spectrum
from sdlora.packs.workshop import Budget, Cost, Difference


def merge_packs(packs: Sequence[str], out: Path, how: str = "concat", rank: int | None = None) -> Cost:
    """Write the sum of packs, each `file` or `file:scale`, as one; `how` is concat, svd (to a rank) or sum."""
    chosen = [workshop.scaled(text) for text in packs]
    if how not in ("concat", "svd", "sum") or (rank is not None and how != "svd"):
        raise UserError("E-SHOP-10", f"{how} is no such way, or has no rank", "--how", "concat, sum, or svd with --rank")
    return workshop.merge([(file.load(path), scale) for path, scale in chosen], out, how, None if rank is None else Budget(rank))  # type: ignore[arg-type]


def resize_pack(pack: Path, out: Path, rank: int | None = None, energy: float | None = None, error: float | None = None) -> Cost:
    """Write a pack at the least ranks that keep to one of the three bounds."""
    return workshop.resize(file.load(pack), out, Budget(rank, energy, error))


def compare_packs(a: Path, b: Path) -> list[Difference]:
    """What two packs add, module by module, the most different first."""
    return workshop.compared((str(a), deltas.of(file.load(a))), (str(b), deltas.of(file.load(b))))


def pack_spectrum(pack: Path, out: Path | None = None) -> tuple[list[Spectrum], int]:
    """Singular values of what a pack adds, by module, and the rank that they advise; with `out`, their curves as a picture."""
    found = [spectrum.spectrum(module, change) for module, change in deltas.of(file.load(pack)).items()]
    if out:
        curves = [plots.Curve("", [(float(i + 1), v / one.values[0]) for i, v in enumerate(one.values)]) for one in found if one.effective]
        buffer = io.BytesIO()
        plots.plot(f"{pack.stem}: singular values of each layer", "which, by size", "share of the largest", curves).save(buffer, "PNG")
        safeio.write(out, buffer.getvalue())
    return found, spectrum.advised(found)
