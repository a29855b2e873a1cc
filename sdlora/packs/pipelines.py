"""A pack on a pipeline of diffusers: our own deltas on its layers, at any scale, and off again bit for bit.

Example, for a pipeline that is loaded:

    pack = Pack.open("mira.safetensors")
    applied = pack.apply(pipeline)
    applied.scale = 0.8
    applied.remove()
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from sdlora.adapter import Bank, frozen_layers
from sdlora.errors import UserError
from sdlora.family import Family, mark_words
from sdlora.packs import file, outline

PARTS = ("unet", "text_encoder", "text_encoder_2")
HELD = "_sdlora_host"
"""Attribute by which a pipeline finds the packs that are on it."""


@dataclass(frozen=True)
class Named:
    """What is known of the base of a pipeline that somebody else loaded."""

    name: str


@dataclass
class Host:
    """A pipeline as packs are put on it: as much of a `Family` as that takes."""

    components: dict[str, nn.Module]
    base: Named
    bank: Bank
    tokenizers: dict[str, Any] = field(default_factory=dict)  # by the component that reads their tokens
    strengths: dict[str, float] = field(default_factory=dict)

    def layers(self) -> dict[str, nn.Module]:
        """Every frozen layer by its full name."""
        return frozen_layers(self.components)

    @property
    def prefixes(self) -> dict[str, str]:
        """As a family has them: the original implementation's names where there are two text encoders."""
        if "text_encoder_2" not in self.components:
            return {"unet": "lora_unet", "text_encoder": "lora_te"}
        known = outline.of(self.layers())
        unet = {layer: f"lora_unet_{outline.original(layer, known).replace('.', '_')}" for layer in known if layer.startswith("unet.")}
        return {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", **unet}

    def spelling(self, word: str) -> dict[str, list[int]]:
        """As a family's."""
        read = {part: tokenizer(word, add_special_tokens=False).input_ids for part, tokenizer in self.tokenizers.items()}
        return {f"{part}.text_model.embeddings.token_embedding": [*ids] for part, ids in read.items()}

    def use(self) -> None:
        """Let the packs act at their strengths."""
        self.bank.use(self.strengths)


@dataclass
class Applied:
    """A pack on a pipeline."""

    host: Host
    name: str

    @property
    def scale(self) -> float:
        """How strongly it acts: 0 is the base, 1 what was trained."""
        return self.host.strengths[self.name]

    @scale.setter
    def scale(self, value: float) -> None:
        self.host.strengths[self.name] = value
        self.host.use()

    def remove(self) -> None:
        """Take it off: the layers that carry no other pack are the pipeline's own again."""
        self.host.bank.remove(self.name)
        del self.host.strengths[self.name]
        self.host.use()

    def merge(self) -> None:
        """Add its change at its present scale to the pipeline's weights, for good."""
        self.host.bank.merge(self.name, self.host.strengths.pop(self.name))
        self.host.use()


class Pack(file.Pack):
    """A pack, to be opened, put on pipelines, and saved."""

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read a pack. Raises `UserError` if it is none."""
        read = file.load(Path(path))
        return cls(read.name, read.tensors, read.metadata, read.sha256)

    def save(self, path: str | Path, dtype: torch.dtype | None = None, layout: str = "", pipeline: Any = None) -> None:
        """Write the pack, its weights in `dtype` if one is named; what must be exact, such as alpha, stays as it is. It is read back.

        With a `layout`, kohya or diffusers, in that one: `pipeline` tells which layers its keys name. Raises `UserError`.
        """
        if layout and pipeline is None:
            what = "which layers a pack's keys name, only its base tells"
            raise UserError("E-PACK-36", what, self.name, "give the pipeline, too, or use `sdlora pack convert`")
        tensors = self._laid_out(layout, host_of(pipeline), dtype or torch.float16) if layout else self._as_it_is(dtype)
        file.save(Path(path), tensors, self._described)

    def _as_it_is(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        exact = self.kind.Adapter.exact
        return {key: self._cast(tensor, None if key.partition(".")[2] in exact else dtype) for key, tensor in self.tensors.items()}

    def _laid_out(self, layout: str, host: "Host", dtype: torch.dtype) -> dict[str, Tensor]:
        return file.converted(self, host.bank, cast("Family", host), layout, dtype)

    def apply(self, pipeline: Any, scale: float | None = None) -> Applied:
        """Put it on a pipeline, at its recommended scale unless one is given. Raises `UserError`, nothing changed, if it is unfit."""
        host = host_of(pipeline)
        name = self.name.replace(".", "-")  # modules have no points in their names
        while name in host.strengths:
            name += "+"
        file.attach(self, name, host.bank, cast("Family", host))
        host.strengths[name] = self.recommended_scale if scale is None else scale
        host.use()
        return Applied(host, name)

    def merge(self, pipeline: Any, scale: float | None = None) -> None:
        """Add its change to a pipeline's weights, for good."""
        self.apply(pipeline, scale).merge()

    def _cast(self, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        made = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
        if not made.isfinite().all():
            raise UserError("E-NUM-02", f"a weight is not finite or too large for {dtype}; no pack is written", self.name, "use float32")
        return made

    def _described(self, sha256: str) -> dict[str, str]:
        changed = {"sshs_model_hash": sha256, "modelspec.hash_sha256": f"0x{sha256}"}
        left_out = ("sshs_legacy_hash", "lora_adapter_metadata")  # of these tensors as they were
        return {key: value for key, value in self.metadata.items() if key not in left_out} | changed


def host_of(pipeline: Any) -> Host:
    """What holds a pipeline's packs; made at the first."""
    held = getattr(pipeline, HELD, None)
    if isinstance(held, Host) and held.components["unet"] is pipeline.unet:
        return held
    components: dict[str, nn.Module] = {}
    tokenizers = {}
    for part in PARTS:
        module = getattr(pipeline, part, None)
        if isinstance(module, nn.Module):
            nested = part == "unet" or hasattr(module, "text_model")
            components[part] = module if nested else nn.ModuleDict({"text_model": module})
        tokenizer = getattr(pipeline, part.replace("text_encoder", "tokenizer"), None) if part != "unet" else None
        if tokenizer is not None and part in components:
            mark_words(module, tokenizer)  # type: ignore[arg-type]
            tokenizers[part] = tokenizer
    if "unet" not in components:
        raise UserError("E-PACK-15", "packs go on pipelines that have a UNet", type(pipeline).__name__, "use a StableDiffusionPipeline")
    named = Named(str(getattr(pipeline, "name_or_path", "") or type(pipeline).__name__))
    host = Host(components, named, Bank(components), tokenizers)
    setattr(pipeline, HELD, host)
    return host
