"""Latents and text states are computed once and kept by content: change a picture, a caption or the base, and only what changed is new."""

import hashlib
import json
from collections.abc import Sequence

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from sdlora.data import hints, looks, variants
from sdlora.data.pixels import UnreadableError, read_picture
from sdlora.data.scan import Item
from sdlora.data.store import Store
from sdlora.data.variants import Variant
from sdlora.errors import NUMBERS, UserError
from sdlora.family import Family
from sdlora.quantise import Quantised


def latents(
    items: Sequence[Item], shown: Sequence[Sequence[Variant]], ground: str, family: Family, store: Store
) -> list[list[tuple[Tensor, Tensor]]]:
    """Mean and standard deviation (C, h, w) of the latents of each picture's variants, float32, on the CPU.

    Each is encoded alone: in a batch its last bits would depend on which others were missing. Mirror images are encoded too: an encoder's
    latents of one are not its latents mirrored. Of several processes each encodes its own pictures, for all. Raises `UserError` for a
    picture that is not what the scan saw.
    """
    encoder = _identity(family, ["vae"])
    found: dict[str, Tensor] = {}
    for place in store.processes.dealt(len(items)):
        item = items[place]
        try:
            picture = _as_seen(item, ground)
        except UnreadableError as error:
            for other in items:  # what led to this may hold of all of them
                hints.forget(other.path, store)
            what = f"this picture changed while the run was made ready ({error}), so that nothing said of it holds"
            raise UserError("E-DATA-10", what, item.path, "start again once nothing writes to the folder") from None
        for number, one in enumerate(shown[place]):
            mean, std = _encoded(item, variants.pixels(picture, one), encoder, family, store)
            found |= {f"{place}/{number}/mean": mean, f"{place}/{number}/std": std}
    found = store.processes.joined(found)
    return [
        [(found[f"{place}/{number}/mean"], found[f"{place}/{number}/std"]) for number in range(len(some))]
        for place, some in enumerate(shown)
    ]


def _encoded(item: Item, pixels: Tensor, encoder: str, family: Family, store: Store) -> tuple[Tensor, Tensor]:
    name = f"{key(pixels, encoder)}.latents"
    entry = _kept(store, name)
    if entry is None:
        mean, std = (part[0].cpu().contiguous() for part in family.encode(pixels[None]))
        if not (mean.isfinite().all() and std.isfinite().all()):
            what = "the autoencoder's latents of this picture are not finite, in fp32: its weights may be damaged"
            raise UserError("E-VAE-01", what, item.path, "check the base's download, or take the picture out", NUMBERS)
        entry = {"mean": mean, "std": std}
        store.put(name, safetensors.torch.save(entry))
    return entry["mean"], entry["std"]


@torch.no_grad()
def states(tokens: Tensor, family: Family, store: Store) -> Tensor:
    """What the network is told for each row of tokens, (B, L) -> (B, S, D), on the CPU; only for text encoders that no adapter changes.

    Each row is computed alone, so that its bits are the same whatever else is said, and, of several processes, by one for all.
    """
    encoder = _identity(family, sorted(name for name in family.components if name.startswith("text_encoder")))
    made: dict[str, Tensor] = {}
    names = [f"{key(row, encoder)}.states" for row in tokens.cpu()]
    rows = list(dict(zip(names, tokens, strict=True)).items())
    for place in store.processes.dealt(len(rows)):
        name, row = rows[place]
        entry = _kept(store, name)
        if entry is None:
            entry = {"states": family.states(row[None])[0].cpu().contiguous()}
            store.put(name, safetensors.torch.save(entry))
        made[name] = entry["states"]
    made = store.processes.joined(made)
    return torch.stack([made[name] for name in names])


def key(content: Tensor, encoder: str) -> str:
    """Name of a cache entry: a hash of the very numbers that are encoded, their shape, and the encoder."""
    digest = hashlib.blake2b(content.contiguous().numpy().tobytes(), digest_size=20)
    digest.update(f"{tuple(content.shape)} {encoder}".encode())
    return digest.hexdigest()


def _identity(family: Family, parts: Sequence[str]) -> str:
    """What an encoder's output depends on but its input: weights, settings, arithmetic and device."""
    said = [family.device.type]
    if any(part in family.components for part in parts):
        said.append(f"clip skip {family.base.text.clip_skip}")
    for part in parts:
        said.append(family.base.fingerprint(part))
        said.append(hashlib.sha256(json.dumps(family.base.source.config(part), sort_keys=True).encode()).hexdigest())
        if part in family.components:  # others compute in float32
            said += sorted({str(parameter.dtype) for parameter in family.components[part].parameters()})
            said += sorted({inner.how for inner in family.components[part].modules() if isinstance(inner, Quantised)})
    return " ".join(said)


def _kept(store: Store, name: str) -> dict[str, Tensor] | None:
    content = store.get(name)
    return None if content is None else safetensors.torch.load(content)


def _as_seen(item: Item, ground: str) -> Image.Image:
    """The picture, if it has the pixels that the scan saw, on white. Raises `UnreadableError`."""
    picture = read_picture(item.path, ground)
    if looks.digest(picture) != item.look.digest and looks.digest(read_picture(item.path)) != item.look.digest:
        raise UnreadableError("its pixels are others than before")
    return picture
