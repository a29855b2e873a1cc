"""A pack on disk: one `.safetensors` file in kohya layout, fp16 factors and what a kind wants exact in fp32, its metadata in the header."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sdlora import lookup, safeio
from sdlora.adapter import Bank
from sdlora.errors import NUMBERS, UserError
from sdlora.family import Base, Family, Reading
from sdlora.lowrank import DOWN, UP
from sdlora.packs import keys

MAX_BYTES = 4 * 2**30
FP16_MAX = float(torch.finfo(torch.float16).max)


@dataclass(frozen=True)
class Pack:
    """A pack that was read: nothing in it has been judged against a base yet."""

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def base(self) -> str:
        return self.metadata.get("sdlora.base", "")

    @property
    def trigger(self) -> str:
        return self.metadata.get("modelspec.trigger_phrase", "")

    @property
    def reading(self) -> Reading | None:
        """How texts were read in its training; None where it does not say."""
        try:
            text = json.loads(self.metadata.get("sdlora.config", "{}"))["text"]
            said = Reading(int(text["clip_skip"]), int(text["chunks"]))
        except (ValueError, LookupError, TypeError):
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
            return lookup.find("adapters", self.metadata["sdlora.adapter"])
        found = {leaf for leaves in keys.by_module(self.tensors).values() for leaf in leaves}
        kinds = [lookup.find("adapters", name) for name in lookup.names("adapters")]
        able = [kind for kind in kinds if found <= kind.Adapter.leaves]
        if not able:
            strange = sorted(found.difference(*(kind.Adapter.leaves for kind in kinds))) or sorted(found)
            what = f"no kind of adapter keeps its weights so: this pack holds {', '.join(strange[:3])}"
            raise UserError("E-PACK-07", what, self.name, f"kinds that are known: {', '.join(lookup.names('adapters'))}")
        return min(able, key=lambda kind: len(kind.Adapter.leaves))


def tensors_of(bank: Bank, name: str, family: Family, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """One adapter's tensors under their pack keys, on the CPU. Raises `UserError` if a value does not fit the dtype."""
    found = {}
    for dotted, _, delta in bank.deltas(name):
        for leaf, tensor in delta.tensors().items():
            key = f"{keys.module_name(dotted, family.prefixes)}.{leaf}"
            values, own = tensor.detach().float().cpu(), torch.float32 if leaf in delta.exact else dtype
            if not values.isfinite().all() or (own == torch.float16 and values.abs().max() > FP16_MAX):
                raise UserError(
                    "E-NUM-02", "a weight is not finite or too large for fp16; no pack is written", key, "lower train.lr", NUMBERS
                )
            found[key] = values.to(own)
    return levelled(found)


def levelled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same adapter with one alpha in all factors, the most frequent: diffusers, for one, takes one for all where they differ."""
    modules = {module: one for module, one in keys.by_module(tensors).items() if {DOWN, UP, "alpha"} <= set(one)}
    if not modules:
        return tensors
    common, _ = Counter(float(one["alpha"]) for one in modules.values()).most_common(1)[0]
    changed = dict(tensors)
    for module, one in modules.items():
        if float(one["alpha"]) != common:
            changed[f"{module}.{UP}"] = (one[UP].float() * float(one["alpha"]) / common).to(one[UP].dtype)
            changed[f"{module}.alpha"] = torch.tensor(common)
    return changed


def save(path: Path, tensors: Mapping[str, Tensor], describe: Callable[[str], dict[str, str]]) -> None:
    """Write a pack; `describe(SHA-256 of the tensor data)` gives its metadata. It is read back and compared before this returns."""
    ordered = {key: tensors[key].contiguous() for key in sorted(tensors)}
    metadata = describe(data_hash(safetensors.torch.save(ordered)))
    safeio.write(path, safetensors.torch.save(ordered, metadata))
    again = load(path)
    if again.metadata != metadata or any(not torch.equal(again.tensors[key], tensor) for key, tensor in ordered.items()):
        raise UserError("E-DISK-03", "the pack does not read back as it was written", path, "the disk may be failing: write it elsewhere")


def data_hash(content: bytes) -> str:
    """SHA-256 of a safetensors file's data section, which a change of its metadata leaves alone."""
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def load(path: Path) -> Pack:
    """Read a pack. The whole file is read once: a memory map would change under us when the file does."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError("E-PACK-01", "not a pack: larger than 4 GiB", path, "name the .safetensors file of a LoRA")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            "E-PACK-02", f"no pack can be read here: {error.strerror}", path, "name the .safetensors file that a run wrote"
        ) from None
    if content[8:10] != b'{"':
        raise UserError(
            "E-PACK-03", "not a pack: no safetensors file", path, "pickled files (.ckpt, .pt) can run code and are never opened"
        )
    try:
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise UserError("E-PACK-03", f"not a pack: {error}", path, "it may be cut short: fetch it again") from None
    metadata: dict[str, str] = header.get("__metadata__", {})
    return Pack(path.stem, tensors, metadata)


def attach(pack: Pack, name: str, bank: Bank, family: Family) -> None:
    """Put a pack's adapter on the bank under a name, at strength 0. Raises `UserError` before anything is changed if it doesn't fit."""
    kind = pack.kind
    known = keys.layer_names((name for name, layer in family.layers().items() if kind.fits(layer)), family.prefixes)
    modules = keys.by_module(pack.tensors)
    foreign = [module for module in modules if module not in known]
    if foreign or not modules:
        made_for = f"it was made for {pack.base}, " if pack.base and pack.base != family.base.name else ""
        what = f"this pack does not fit the base {family.base.name}: {made_for}{len(foreign)} of its {len(modules)} layers are unknown here"
        raise UserError("E-PACK-04", what, foreign[0] if foreign else pack.name, "generate with the base it was made for (--base)")
    names = {known[module]: leaves for module, leaves in modules.items()}
    bad = [key for key, tensor in pack.tensors.items() if not tensor.float().isfinite().all()]
    if bad:
        raise UserError("E-PACK-05", "this pack holds numbers that are not finite", bad[0], "train it again at a lower rate")
    bank.add(name, dict.fromkeys(names, (kind, kind.Config.blank())), _zeros)
    try:
        for dotted, _, delta in bank.deltas(name):
            delta.load(names[dotted])
    except (ValueError, KeyError) as error:
        bank.remove(name)
        raise UserError(
            "E-PACK-06", f"this pack does not fit the base {family.base.name}: {error}", pack.name, "generate with its own base"
        ) from None


def _zeros(_: str) -> Any:
    """A stream for weights that are replaced at once."""
    return np.random.Generator(np.random.Philox(key=0))


def as_trained(pack: Pack, base: Base) -> Base:
    """The base as it was when a pack was trained on it: how texts are read, and what it predicts where its own files do not say so."""
    as_read = replace(base, text=pack.reading or base.text)
    prediction = pack.metadata.get("sdlora.prediction")
    if prediction not in ("epsilon", "velocity") or (base.said and pack.base != base.name):
        return as_read
    return replace(as_read, prediction=prediction, zero_snr=pack.metadata.get("sdlora.zero_terminal_snr") == "True")
