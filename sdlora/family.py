"""The contract of a model family, and how a base is found by name, folder or hub id."""

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from sdlora import hub, lookup, quantise, vae
from sdlora.adapter import frozen_layers
from sdlora.errors import UserError
from sdlora.ldm import SingleFile
from sdlora.source import CONVERT, INDEX, PICKLES, WHOLE, Folder, Source, needed, only_pickled

EMBEDDED = Path(__file__).parent / "base"
LAYOUTS = "name such a folder, a .safetensors checkpoint, a hub id, or tiny"
RECOMPUTED = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # nothing frozen draws random numbers
"""A block of which only the inputs are kept for the backward pass, which computes it again."""
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Reading:
    """How texts are read."""

    clip_skip: int = 1  # which of the text encoder's layers, from its end: 1 is the one that the base was trained on
    chunks: int = 1  # pieces of as many tokens as the text encoder reads at once, of which a text may consist


@dataclass(frozen=True)
class Base:
    """A base model that was found and recognised; no weights are read yet."""

    name: str  # "tiny", the folder's name or the hub id, with the revision if one was named
    source: Source
    family: str
    row: str  # row of the table of defaults
    size_px: int  # side of the square it was trained on
    prediction: str  # what the network says, by the name of its objective: epsilon, velocity
    said: bool = True  # whether its files say so; else it is what is usual, or what a probe found
    zero_snr: bool = False  # whether a probe found that its schedule ends at noise alone, which its files do not say
    revision: str = ""  # the hub's commit
    vae: str = ""  # name of the autoencoder in place of its own
    text: Reading = Reading()

    def fingerprint(self, component: str) -> str:
        """SHA-256 of a component's weight files, so that caches and packs know which weights they belong to."""
        return self.source.fingerprint(component)


class Family(ABC):
    """A loaded base. Pixels are (B, 3, H, W) in -1..1, latents (B, C, H/f, W/f) already scaled as the network wants them."""

    presets: ClassVar[Mapping[str, Sequence[str]]]
    """Names of `adapter.targets` and the layer patterns they stand for."""
    prefixes: ClassVar[Mapping[str, str]]
    """What the beginnings of layer names become in the keys of a kohya pack; of those that fit a layer the longest counts."""
    base: Base
    components: dict[str, nn.Module]
    """What adapters may sit on, frozen; layer names inside a component are those that packs use."""
    aside: Mapping[str, nn.Module] = MappingProxyType({})
    """Parts that lie on the CPU to make room, by name."""
    device: torch.device
    alphas_cumprod: Tensor
    prediction: str
    """What the network says: the name of the objective that it was trained with."""
    most_tokens: int
    """Of a caption, which the network reads."""
    latent_channels: int
    latent_factor: int
    """Pixels per latent, along one side."""
    step_px: int
    """Picture sides must be multiples of it."""

    @abstractmethod
    def encode(self, pixels: Tensor, tiled: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents' posterior: (B, 3, H, W) -> 2 x (B, C, H/f, W/f), float32. `tiled` takes less memory
        and gives other values near the seams of the tiles."""

    @abstractmethod
    def decode(self, latents: Tensor, tiled: bool = False) -> Tensor:
        """(B, C, h, w) -> pixels (B, 3, h·f, w·f), float32; `tiled` as in `encode`."""

    @abstractmethod
    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Token ids (B, L), padded and, where a caption is longer than the model reads, cut."""

    @abstractmethod
    def spans(self, caption: str) -> list[tuple[int, int]]:
        """Where in a caption each of its tokens begins and ends, without those that are added and before any cut."""

    def too_long(self, captions: Sequence[str]) -> list[str]:
        """The captions that `tokens` would cut."""
        return [caption for caption in captions if len(self.spans(caption)) > self.most_tokens]

    @abstractmethod
    def spelling(self, word: str) -> dict[str, list[int]]:
        """Token ids of a word by the full name of the layer that embeds them."""

    @abstractmethod
    def states(self, tokens: Tensor) -> Tensor:
        """All that the network is told of the texts: (B, L) -> (B, S, D), in whose rows only `predict` looks."""

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, states: Tensor, frame: Tensor | None = None) -> Tensor:
        """The network's word on noised latents x (B, C, h, w) at timesteps t (B,).

        `frame` (B, 6) says in px of what pictures they are cut: height and width before any scaling, top and left of the cut and its
        height and width after it. None: each is a whole picture of its own size.
        """

    @abstractmethod
    def new_scheduler(self) -> Any:
        """A fresh diffusers scheduler for generation, configured as the base asks."""

    @abstractmethod
    def architecture(self) -> dict[str, str]:
        """Metadata fields that tell other programs what a pack for this base is; never another model's."""

    def take_for(self, base: Base) -> None:
        """Take the weights for another word on them: what they predict, how texts are read."""
        self.base, self.prediction = base, base.prediction
        self.alphas_cumprod = self.new_scheduler().alphas_cumprod.to(self.device)

    def place(self, device: torch.device, weights: str = "full") -> None:
        """Move a base that was loaded onto the CPU to where it computes, its large layers packed as `weights` says on the way."""
        if weights != "full":
            for component in self.components.values():
                quantise.pack(component, weights, device)
        for module in self.parts().values():
            module.to(device)
        self.device = device
        self.take_for(self.base)

    def lay_aside(self, parts: Iterable[str]) -> None:
        """Keep parts on the CPU until they are asked for something, and after it."""
        self.aside = {name: self.parts()[name] for name in parts}
        for module in self.aside.values():
            module.to("cpu")

    @contextlib.contextmanager
    def at_hand(self, *parts: str) -> Iterator[None]:
        """Parts are where the base computes for a while, if they were laid aside."""
        fetched = [self.aside[name] for name in parts if name in self.aside]
        for module in fetched:
            module.to(self.device)
        try:
            yield
        finally:
            for module in fetched:
                module.to("cpu")

    def attend(self, by: str) -> None:  # noqa: B027
        """Compute the network's attention by `xformers`; by `sdpa` is how it is loaded."""

    def blocks(self, way: Callable[..., Any] | None) -> None:
        """Compute the blocks of all components by `way(block, *inputs)` where gradients are asked for; None: as they are.

        transformers asks a layer whether it is in training; only the layer itself is told so, not what drops out numbers inside.
        """
        for block in (inner for component in self.components.values() for inner in component.modules()):
            if hasattr(block, "gradient_checkpointing"):
                block.gradient_checkpointing, block._gradient_checkpointing_func = way is not None, way  # type: ignore[assignment]
                block.training = way is not None and isinstance(block, GradientCheckpointingLayer)

    def parts(self) -> dict[str, nn.Module]:
        """All that was loaded of the base."""
        held = {name: module for name, module in vars(self).items() if isinstance(module, nn.Module)}
        return {**held, **self.components}

    def layers(self) -> dict[str, nn.Module]:
        """Every frozen layer by its full name, component first, whether or not adapters sit on it."""
        return frozen_layers(self.components)


def find(name: str, other_vae: str = "", text: Reading | None = None, half: bool = False) -> Base:
    """The base called `tiny`, in a diffusers folder, in one file, or on the hub (downloaded once, kept by huggingface_hub).

    Of what the hub has in several precisions only one is downloaded: `half` of the usual, or else the full one.
    """
    path = EMBEDDED if name == "tiny" else Path(name)
    here = path.exists()
    source = _opened(path) if here else _download(name, half)
    shown, revision = (name, "") if name == "tiny" else (path.resolve().name, "") if here else (name, source.path.name)
    found = _recognised(source, shown)
    if other_vae:
        exchanged = vae.exchanged(source, other_vae)
        found = replace(found, source=exchanged, vae=Path(other_vae).resolve().name if Path(other_vae).exists() else other_vae)
    return replace(found, revision=revision, text=text or Reading())


def _recognised(source: Source, shown: str) -> Base:
    for family in lookup.names("families"):
        try:
            found = lookup.find("families", family).recognise(source)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise UserError("E-BASE-05", f"this model's config makes no sense: {error}", source.path, WHOLE) from None
        if found:
            return Base(shown, source, family, **found)
    known = ", ".join(lookup.names("families"))
    what = f"a model of no family that is known here ({known})"
    raise UserError("E-BASE-03", what, source.path, "see the README for the bases that work")


def _opened(path: Path) -> Source:
    if path.suffix in PICKLES and path.is_file():
        raise UserError("E-BASE-08", "a pickled checkpoint, which can run code and is never opened", path, CONVERT)
    if path.is_file():
        return SingleFile(path)
    if not (path / INDEX).is_file():
        what = "not a model in diffusers layout: it has no model_index.json"
        raise UserError("E-BASE-02", what, path, LAYOUTS)
    return Folder(path)


def load(base: Base, device: torch.device, dtype: torch.dtype) -> Family:
    """The base's weights on a device, frozen, the network and text encoder in `dtype`."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    try:
        family: Family = lookup.find("families", base.family).load(base, device, dtype)
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, ArithmeticError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError("E-BASE-04", f"this model cannot be loaded: {reason}", base.source.path, WHOLE) from error
    for component in family.components.values():
        component.requires_grad_(False).eval()
    _check_finite(family)
    return family


def inspect(base: Base) -> dict[str, Any]:
    """What a base is, from its files: all weights are read, so that nothing missing or broken in them goes unnoticed."""
    found: dict[str, Any] = {"name": base.name, "family": base.family, "size_px": base.size_px, "prediction": base.prediction}
    found |= {"prediction_is_read": base.said} | ({"revision": base.revision} if base.revision else {})
    try:
        formats = base.source.precision("unet")
        loaded = load(base, torch.device("cpu"), DTYPES.get(formats[0], torch.float32) if formats else torch.float32)
    except UserError as error:
        return {**found, "complete": False, "problem": str(error)}
    parts = {}
    for part in (*loaded.components, "vae"):
        precision = ", ".join(base.source.precision(part))
        parameters = sum(p.numel() for p in loaded.parts()[part].parameters())
        parts[part] = {"parameters": parameters, "precision": precision, "sha256": base.fingerprint(part)}
    return {**found, "complete": True, "components": parts}


def mark_words(encoder: nn.Module, tokenizer: Any) -> None:
    """Let the embedding of a text encoder's tokens know, as `ends` (tokens,), after which of them a word may begin."""
    special = set(tokenizer.all_special_ids)
    said = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    ends = torch.tensor([token.endswith("</w>") or i in special for i, token in enumerate(said)])
    embedding = encoder.get_input_embeddings()  # type: ignore[operator]
    embedding.register_buffer("ends", ends.to(embedding.weight.device), persistent=False)


def whole_frames(x: Tensor, factor: int) -> Tensor:
    """`frame` of latents (B, C, h, w) that are whole pictures."""
    height, width = (side * factor for side in x.shape[2:])
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=x.device).expand(len(x), -1)


def _check_finite(family: Family) -> None:
    named = [(f"{part}.{name}", p) for part, module in family.parts().items() for name, p in module.named_parameters()]
    finite = torch.stack([parameter.isfinite().all() for _, parameter in named]).tolist()
    broken = [name for (name, _), good in zip(named, finite, strict=True) if not good]
    if broken:
        what = f"{len(broken)} of its {len(named)} tensors hold numbers that are not finite, or not in this precision: {broken[0]}"
        raise UserError("E-BASE-13", what, family.base.source.path, "get the model again; or set train.precision to fp32")


def _download(name: str, half: bool) -> Folder:
    if not hub.is_id(name):
        raise UserError(
            "E-BASE-01",
            f'no base called "{name}": no such folder or file, and no hub id (owner/name)',
            "base",
            "use tiny, a diffusers folder, a .safetensors checkpoint, or a hub id",
        )
    try:
        files = hub.listed(name)
        pickled = next(only_pickled(files), None)
        if pickled:
            raise UserError("E-BASE-08", "only pickled weights, which can run code and are never opened", f"{name}/{pickled}", CONVERT)
        chosen = needed(files, half)
        path = hub.download(name, chosen)
    except hub.UnreachableError as error:
        raise UserError(
            "E-BASE-06",
            f'"{name}" is no folder here and could not be had from the hub: {error}',
            "base",
            "check the name and the connection, or name a folder",
        ) from error
    if INDEX not in files:
        raise UserError("E-BASE-02", "not a model in diffusers layout: it has no model_index.json", name, LAYOUTS)
    return Folder(path, chosen)
