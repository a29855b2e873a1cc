"""A pack on disk: one `.safetensors` file in kohya layout, fp16 factors and what a kind wants exact in fp32, its metadata in the header."""

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sdlora import lookup, safeio
from sdlora.adapter import Bank
from sdlora.errors import UserError
from sdlora.family import Base, Family
from sdlora.family import Reading as TextReading
from sdlora.packs import foreign, keys, layouts, precision, reading, strict, words, writing
from sdlora.packs.reading import Fitted, Report

MAX_BYTES = 4 * 2**30
HASHES = ("sshs_model_hash", "modelspec.hash_sha256")
"""Fields that hold the SHA-256 of the tensors' data."""


@dataclass(frozen=True)
class Pack:
    """A pack that was read: nothing in it has been judged against a base yet."""

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str = ""  # of the tensors' data in the file

    @property
    def base(self) -> str:
        return self.metadata.get("sdlora.base", "")[: strict.MAX_WORDS]

    @property
    def trigger(self) -> str:
        return self.metadata.get("modelspec.trigger_phrase", "")[: strict.MAX_WORDS]

    @property
    def reading(self) -> TextReading | None:
        """How texts were read in its training; None where it does not say."""
        try:
            text = json.loads(self.metadata.get("sdlora.config", "{}"))["text"]
            said = TextReading(int(text["clip_skip"]), int(text["chunks"]))
        except (ValueError, LookupError, TypeError, RecursionError):
            return None
        return said if 1 <= said.clip_skip <= 32 and 1 <= said.chunks <= 4 else None

    @property
    def recommended_scale(self) -> float:
        """1 where a pack of another program says none, or nothing that is a number."""
        try:
            scale = float(self.metadata.get("sdlora.recommended_scale", 1.0))
        except ValueError:
            return 1.0
        return scale if -4 <= scale <= 4 else 1.0

    @property
    def kind(self) -> ModuleType:
        """The adapter kind that the header names, or else that of the fewest leaves that has all those found."""
        if "sdlora.adapter" in self.metadata:
            return lookup.find("adapters", self.metadata["sdlora.adapter"][: strict.MAX_WORDS])
        return reading.kind_of({leaf for leaves in keys.by_module(self.tensors).values() for leaf in leaves})

    @property
    def is_stale(self) -> bool:
        """Whether its header gives the hash of other tensors."""
        said = {self.metadata[name].removeprefix("0x").lower() for name in HASHES if self.metadata.get(name)}
        return bool(said and self.sha256) and self.sha256 not in said

    @property
    def embeddings(self) -> dict[str, Tensor]:
        """Textual inversions inside the pack, by name: rows (n, width), or one for each text encoder under `name.clip_l`, `name.clip_g`."""
        inside = {key.removeprefix(layouts.BUNDLED): tensor for key, tensor in self.tensors.items() if key.startswith(layouts.BUNDLED)}
        return {name.replace("string_to_param.*", "").strip("."): tensor for name, tensor in inside.items()}


def exact_tensors(bank: Bank, name: str, family: Family) -> dict[str, Tensor]:
    """One adapter's tensors under their pack keys, float32, on the CPU."""
    found = {}
    for dotted, _, delta in bank.deltas(name):
        for leaf, tensor in delta.tensors().items():
            found[f"{keys.module_name(dotted, family.prefixes)}.{leaf}"] = tensor.detach().float().cpu()
    return found


def tensors_of(bank: Bank, name: str, family: Family, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The same as they are written: weights in the dtype, what must be exact in float32. Raises `UserError` if a value does not fit."""
    return written(bank, name, family, ["kohya"], dtype)[0]["kohya"]


def written(
    bank: Bank, name: str, family: Family, wanted: Sequence[str], dtype: torch.dtype = torch.float16
) -> tuple[dict[str, dict[str, Tensor]], float]:
    """One adapter's tensors in each of the wanted layouts, as they are written; and the greatest share of numbers that became zero."""
    exact, found, lost = exact_tensors(bank, name, family), {}, 0.0
    precision.check_finite(exact)
    kept = {leaf for _, _, delta in bank.deltas(name) for leaf in delta.exact} | set(layouts.MAGNITUDES)
    for layout in wanted:
        found[layout], zeros = precision.cast(writing.laid_out(layout, exact, family), dtype, kept)
        lost = max(lost, zeros / max(1, sum(tensor.numel() for tensor in found[layout].values())))
    return found, lost


def save(path: Path, tensors: Mapping[str, Tensor], describe: Callable[[str], dict[str, str]]) -> None:
    """Write a pack; `describe(SHA-256 of the tensor data)` gives its metadata. It is read back and compared before this returns.

    Raises `UserError`, having written nothing, for what could not be read again.
    """
    rest, field = words.held(tensors)
    ordered = {key: rest[key].contiguous() for key in sorted(rest)}
    described = describe(data_hash(safetensors.torch.save(ordered)))
    metadata = {key: value for key, value in described.items() if key != words.FIELD} | field
    safeio.write(path, _content(ordered, metadata, path))
    again = read(path)
    if again.metadata != metadata or any(not torch.equal(again.tensors[key], tensor.cpu()) for key, tensor in tensors.items()):
        raise UserError("E-DISK-03", "the pack does not read back as it was written", path, "the disk may be failing: write it elsewhere")


def _content(tensors: Mapping[str, Tensor], metadata: dict[str, str], path: Path) -> bytes:
    """The bytes of a pack's file, which this very program reads. Raises `UserError`."""
    try:
        strict.check_metadata(metadata)  # what is no text, safetensors cannot write
        content: bytes = safetensors.torch.save(dict(tensors), metadata)
        strict.read_header(content)
    except strict.FormatError as error:
        todo = "take that out of its header: sdlora pack edit PACK --set FIELD="
        raise UserError("E-PACK-38", f"so written the pack could not be read again: {error}", path, todo) from None
    if len(content) > MAX_BYTES:
        what = f"the pack would be larger than the {MAX_BYTES >> 30} GiB that are read"
        raise UserError("E-PACK-38", what, path, "choose a smaller rank, or fp16")
    return content


STALE = "its tensors are not those that its header was written for: another program changed them"


def data_hash(content: bytes) -> str:
    """SHA-256 of a safetensors file's data section, which a change of its metadata leaves alone."""
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def load(path: Path) -> Pack:
    """Read a pack. Raises `UserError` for what is none, or is damaged.

    A pack of ours whose tensors are not those of its header is damaged. Other programs leave a header as it was when they change tensors:
    such a pack is taken, and `is_stale`.
    """
    return judge(contents(path), path)[0]


def judge(content: bytes, path: Path) -> tuple[Pack, dict[str, strict.Entry]]:
    """The same of a file's content; with where each of its tensors lies."""
    pack, entries = unpack(content, path)
    reading.check_numbers(pack.tensors)
    if pack.is_stale and "sdlora.base" in pack.metadata:
        said = next(pack.metadata[name] for name in HASHES if pack.metadata.get(name)).removeprefix("0x")
        what = f"its tensors are not those that its header was written for: their SHA-256 is {pack.sha256[:12]}, not {said[:12]}"
        raise UserError("E-PACK-30", what, path, "it was damaged or changed on its way: fetch it again from where it was published")
    return pack, entries


def read(path: Path) -> Pack:
    """A file's tensors and header."""
    return unpack(contents(path), path)[0]


def contents(path: Path) -> bytes:
    """The whole file, read once: a memory map would change under us when the file does."""
    try:
        with path.open("rb") as opened:
            about = os.fstat(opened.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_BYTES:
                what = "larger than 4 GiB" if stat.S_ISREG(about.st_mode) else "no plain file"
                raise UserError("E-PACK-01", f"not a pack: {what}", path, "name the .safetensors file of a LoRA")
            return opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(
            "E-PACK-02", f"no pack can be read here: {error.strerror}", path, "name the .safetensors file that a run wrote"
        ) from None


def unpack(content: bytes, path: Path) -> tuple[Pack, dict[str, strict.Entry]]:
    """A file's tensors and header, and where each of its tensors lies."""
    entries, metadata = strict.parse(content, path)
    try:
        tensors = words.from_header(metadata, path) | safetensors.torch.load(content)
        return Pack(path.stem, tensors, metadata, data_hash(content)), entries
    except (SafetensorError, ValueError) as error:
        raise strict.refused(str(error), path) from None


def attach(pack: Pack, name: str, bank: Bank, family: Family, partial: bool = False) -> Report:
    """Put a pack's adapter on the bank under a name, at strength 0, and say what of it acts.

    Raises `UserError`, having changed nothing, for a pack of which nothing fits; and for one that fits in part, unless `partial` allows it.
    """
    fitted, report = reading.fit(pack.tensors, pack.metadata, family, pack.trigger or pack.name)
    report.notes += [STALE] if pack.is_stale else []
    _judge(pack, fitted, report, family, partial)
    bank.add(name, {layer: (one.kind, one.kind.Config.blank()) for layer, one in fitted.items()}, reading.unused)
    for layer, _, delta in bank.deltas(name):
        delta.load(fitted[layer].leaves)
    return report


def converted(pack: Pack, bank: Bank, family: Family, layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A pack of any layout in another; the bank is left as it was. Raises `UserError` for what the base or the layout can't hold."""
    attach(pack, name := f"{pack.name.replace('.', '-')} ", bank, family)  # modules have no points in their names
    try:
        return written(bank, name, family, [layout], dtype)[0][layout]
    finally:
        bank.remove(name)


def as_trained(pack: Pack, base: Base) -> Base:
    """The base as it was when a pack was trained on it: how texts are read, and what it predicts where its own files do not say so."""
    as_read = replace(base, text=pack.reading or base.text)
    prediction = pack.metadata.get("sdlora.prediction")
    if prediction not in ("epsilon", "velocity") or (base.said and pack.base != base.name):
        return as_read
    return replace(as_read, prediction=prediction, zero_snr=pack.metadata.get("sdlora.zero_terminal_snr") == "True")


def _judge(pack: Pack, fitted: Mapping[str, Fitted], report: Report, family: Family, partial: bool) -> None:
    """Raise `UserError` unless the pack may be put on the base."""
    if fitted and pack.sha256 and reading.idle(fitted):  # what has no file was trained just now, and says itself what it learnt
        raise UserError("E-PACK-31", "nothing in this pack moves the base: on each layer a factor is zero", pack.name, "train it again")
    if fitted and (report.complete or partial):
        return
    made_for = f"it was made for {pack.base}, " if pack.base and pack.base != family.base.name else ""
    count = len(report.unknown) + len(report.ignored)
    what = f"this pack does not fit the base {family.base.name}: {made_for}{count} of its keys and layers cannot be applied"
    todo = "use the base it was made for (--base)" + ("; or draw with what fits of it: sdlora generate --partial" if fitted else "")
    raise UserError(report.code, f"{what}: {'; '.join(report.lines())}", pack.name, todo)


def summary(pack: Pack) -> dict[str, Any]:
    """What a pack is, by its keys and header alone: no base is needed."""
    modules: dict[str, dict[str, Tensor]] = {}
    styles: Counter[str] = Counter()
    for key, tensor in pack.tensors.items():
        module, leaf, style = layouts.guess(key)
        modules.setdefault(module, {})[leaf] = tensor
        styles[style] += 1
    kinds: Counter[str] = Counter()
    for leaves in modules.values():
        try:
            named = foreign.named(leaves) or reading.kind_of(layouts.plain(leaves), pack.metadata.get("sdlora.adapter", "")).__name__
            kinds[named.rpartition(".")[2]] += 1
        except (UserError, reading.StrangeError):
            kinds["unknown"] += 1
    alphas = Counter(float(leaves["alpha"]) for leaves in modules.values() if "alpha" in leaves and leaves["alpha"].numel() == 1)
    return {
        "layouts": dict(styles),
        "kinds": dict(kinds),
        "modules": len(modules),
        "ranks": dict(Counter(rank for rank in map(reading.ranks, modules.values()) if rank)),
        "alphas": dict(alphas),
        "dtypes": dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in pack.tensors.values())),
        "parameters": sum(tensor.numel() for tensor in pack.tensors.values()),
        "embeddings": sorted(pack.embeddings),
        "sha256": pack.sha256,
    }
