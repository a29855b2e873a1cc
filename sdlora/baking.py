"""Packs baked into a copy of their base, which then draws as the base with the packs on it, and costs nothing more."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sdlora import family, safeio
from sdlora.apart import Chosen
from sdlora.errors import UserError
from sdlora.family import Base, Family
from sdlora.packs import deltas
from sdlora.packs.deltas import Change
from sdlora.source import INDEX, PARTS, Folder, Place, Source, header

PIECE = 1 << 24
"""Bytes that are copied at once."""


@dataclass
class Baked:
    """What baking changed, and what the number format of the files cost of it (norms of the weights' changes)."""

    layers: dict[str, int]  # by component
    lost: float = 0.0
    asked: float = 0.0
    worst: tuple[float, str] = (0.0, "")

    @property
    def error(self) -> float:
        """Of the change, relative."""
        return (self.lost / self.asked) ** 0.5 if self.asked else 0.0

    def line(self) -> str:
        parts = ", ".join(f"{count} layers of the {part}" for part, count in self.layers.items())
        worst = f", at worst {self.worst[0]:.2g} ({self.worst[1]})" if self.worst[1] else ""
        return f"{parts} changed; rounding to the files' number format: {self.error:.2g} of the change{worst}"


def bake(base: Base, packs: Chosen, out: Path) -> Baked:
    """Write a copy of a base, in its own layout and number formats, to whose weights the packs' changes at their scales are added.

    Every weight is W + Σ scale · ΔW in float32, rounded once. The copy is read back before this returns. Raises `UserError`.
    """
    source = base.source
    if out.exists() or out.resolve().is_relative_to(source.path.resolve()):
        raise UserError("E-SHOP-11", "there is something at this path; a base is never written over", out, "name another with --out")
    if source.path.is_file() != (out.suffix == ".safetensors"):
        kind = "one file, so is its copy: end --out in .safetensors" if source.path.is_file() else "a folder, so is its copy"
        raise UserError("E-SHOP-12", "this name does not suit what is written", out, f"the base is {kind}")
    loaded = family.load(base, torch.device("cpu"), torch.float32)
    changed = combined(packs, loaded)
    baked, made = Baked({}), Weights(loaded, changed)
    for dotted in changed:
        part = dotted.partition(".")[0]
        baked.layers[part] = baked.layers.get(part, 0) + 1
    said = {"sdlora.baked": "; ".join(f"{pack.name}:{scale:g} sha256 {pack.sha256}" for pack, scale in packs)}
    files = [source.path] if source.path.is_file() else list(copied(source))
    safeio.check_room(out, sum(file.stat().st_size for file in files))
    if source.path.is_file():
        safeio.write(out, patched(source.path, made, said))
    else:
        names = [file.relative_to(source.path).as_posix() for file in files]
        weights = {place.file for places in made.places.values() for place, _ in places}
        patch = partial(patched, made=made, said=said)
        safeio.write_tree(out, ((name, content(source.path / name, names, weights, patch)) for name in names))
    for file in files:
        if file.suffix == ".safetensors":
            _check(file, out / file.relative_to(source.path) if source.path.is_dir() else out, made, baked)
    return baked


def combined(packs: Chosen, loaded: Family) -> dict[str, Change]:
    """By layer, what the packs add together."""
    found: dict[str, list[tuple[Change, float]]] = {}
    for pack, scale in packs:
        for dotted, change in deltas.beside(pack, loaded).items():
            found.setdefault(dotted, []).append((change, scale))
    return {dotted: deltas.total(parts) for dotted, parts in found.items()}


class Weights:
    """The changed weights of a base, and where its files keep them."""

    def __init__(self, loaded: Family, changed: Mapping[str, Change]) -> None:
        self.layers, self.changed = loaded.layers(), changed
        self.places: dict[tuple[Path, str], list[tuple[Place, str]]] = {}
        held = {part: loaded.base.source.places(part) for part in loaded.components}
        for dotted in changed:
            part, _, rest = dotted.partition(".")
            place = held[part].get(f"{rest}.weight") or held[part].get(f"{rest.removeprefix('text_model.')}.weight")
            if place is None:
                what = f"the base's files hold no weight of {dotted}"
                raise UserError("E-SHOP-13", what, loaded.base.source.path, "get the base again from where it was published")
            self.places.setdefault((place.file, place.tensor), []).append((place, dotted))

    def of(self, dotted: str) -> Tensor:
        """W + ΔW, float32, in the shape of the layer's weight."""
        weight = self.layers[dotted].get_parameter("weight").detach()
        return weight.float() + self.changed[dotted].matrix().reshape(weight.shape).float()

    def put(self, file: Path, name: str, held: Tensor) -> Tensor:
        """A tensor as the copy holds it."""
        new = held.clone()
        for place, dotted in self.places.get((file, name), ()):
            place.put(new, self.of(dotted))
        return new


def copied(source: Source) -> Iterator[Path]:
    """The files of a base in diffusers layout that its copy needs: of what is baked no other version, which would be the old one."""
    assert isinstance(source, Folder)
    folder = source.path
    chosen = {place.file for part in PARTS if (folder / part).is_dir() for place in source.places(part).values()}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(name.startswith(".") for name in inside.parts)
        weights = inside.suffix in (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".onnx", ".msgpack", ".h5")
        others = weights and (len(inside.parts) == 1 or inside.parts[0] in PARTS) and path not in chosen
        listed = source.chosen is None or inside.as_posix() in source.chosen
        if path.is_file() and not hidden and not others and listed:
            yield path


def content(file: Path, names: Sequence[str], weights: set[Path], patch: "partial[Iterator[bytes]]") -> bytes | Iterator[bytes]:
    """A file of the copy; the index names no part that is not there."""
    if file in weights:
        return patch(file)
    if file.name == INDEX:
        table = json.loads(file.read_text(encoding="utf-8"))
        there = {name.partition("/")[0] for name in names}
        gone = [part for part, kind in table.items() if isinstance(kind, list) and len(kind) == 2 and part not in there]
        return json.dumps({**table, **{part: [None, None] for part in gone}}, indent=2).encode()
    return pieces(file, 0, file.stat().st_size)


def patched(file: Path, made: Weights, said: Mapping[str, str]) -> Iterator[bytes]:
    """A safetensors file with some tensors exchanged: all others byte for byte, in the same order and formats."""
    described, metadata = header(file)
    order = sorted(described, key=lambda name: described[name]["data_offsets"][0])
    head = json.dumps({"__metadata__": {**metadata, **said}, **{name: described[name] for name in order}}, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    yield len(head).to_bytes(8, "little") + head
    with file.open("rb") as opened, safe_open(file, "pt") as tensors:
        start = 8 + int.from_bytes(opened.read(8), "little")
        for name in order:
            if (file, name) in made.places:
                yield raw(made.put(file, name, tensors.get_tensor(name)))
            else:
                yield from pieces(file, *(start + at for at in described[name]["data_offsets"]))


def raw(tensor: Tensor) -> bytes:
    """A tensor's bytes, as safetensors has them."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def pieces(file: Path, start: int, end: int) -> Iterator[bytes]:
    with file.open("rb") as opened:
        opened.seek(start)
        while start < end:
            piece = opened.read(min(PIECE, end - start))
            start += len(piece)
            yield piece


def _check(old: Path, new: Path, made: Weights, baked: Baked) -> None:
    """Raise `UserError` unless the copy holds what was meant, and note what rounding cost."""
    with safe_open(old, "pt") as before, safe_open(new, "pt") as after:
        names = list(before.keys())
        for name in names:
            held, got = before.get_tensor(name), after.get_tensor(name)
            if raw(made.put(old, name, held)) != raw(got):
                raise UserError("E-SHOP-14", f"{name} did not come back as it was written", new, "the disk or memory is damaged: try again")
            for place, dotted in made.places.get((old, name), ()):
                change, wanted = made.changed[dotted].matrix().float(), made.of(dotted)
                lost = float((place.get(got, wanted.shape).float() - wanted).square().sum())
                asked = float(change.square().sum())
                baked.lost, baked.asked = baked.lost + lost, baked.asked + asked
                baked.worst = max(baked.worst, ((lost / asked) ** 0.5 if asked else 0.0, dotted))
