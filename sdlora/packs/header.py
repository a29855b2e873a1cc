"""The header of a pack without its tensors: its bytes, the hashes by which programs know a file, and changes that touch no tensor."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from sdlora.errors import UserError
from sdlora.packs import file, strict

WINDOW = slice(0x100000, 0x110000)
"""The bytes of a file that the oldest hash is of; a small file has none there."""
OWN = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash", "sdlora.adapter")
"""Fields that follow from the tensors."""


@dataclass(frozen=True)
class Raw:
    """A pack's file in its parts."""

    entries: dict[str, Any]  # dtype, shape and place of each tensor
    metadata: dict[str, str]
    data: bytes


def read(path: Path) -> Raw:
    """A file in its parts. Raises `UserError` for what is no pack."""
    content = file.contents(path)
    pack, entries = file.judge(content, path)
    described = {key: {"dtype": one.dtype, "shape": one.shape, "data_offsets": (one.begin, one.end)} for key, one in entries.items()}
    return Raw(described, pack.metadata, content[8 + int.from_bytes(content[:8], "little") :])


def assembled(raw: Raw) -> bytes:
    """The file again: eight bytes of length, the header filled up to a multiple of eight, and the tensors' bytes as they were."""
    text = _text(raw)
    return len(text).to_bytes(8, "little") + text + raw.data


def _text(raw: Raw) -> bytes:
    text = json.dumps({"__metadata__": raw.metadata, **raw.entries}, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def edited(raw: Raw, changes: Mapping[str, str]) -> Raw:
    """The parts with some fields of the header changed, or taken out where the new value is empty. Raises `UserError`."""
    for key in changes:
        if key in OWN:
            raise UserError("E-PACK-10", f"{key} follows from the tensors and cannot be set", key, "leave it out")
        if not re.fullmatch(r"[a-z]\w*(\.\w+)?", key):
            what = f'"{key}" is no name of a field'
            raise UserError("E-PACK-10", what, "--set", "write for example --set modelspec.title=Mira")
    metadata = {key: value for key, value in {**raw.metadata, **changes}.items() if value or key not in changes}
    try:
        strict.check_metadata(metadata)
    except strict.FormatError as error:
        raise UserError("E-PACK-10", f"so written the pack could not be read again: {error}", "--set", "choose another text") from None
    if "sshs_legacy_hash" in metadata:
        metadata["sshs_legacy_hash"] = legacy_hash(safetensors.torch.load(assembled(raw)), metadata)
    changed = Raw(raw.entries, metadata, raw.data)
    if len(_text(changed)) > strict.MAX_HEADER:
        raise UserError("E-PACK-10", "this header would be longer than programs read", "--set", "choose a smaller picture or text")
    return changed


def hashes(content: bytes, metadata: Mapping[str, str]) -> dict[str, str]:
    """The names by which programs and sites know a file.

    AutoV1: of a window of the file; SHA-256 and its beginning, AutoV2: of all; AutoV3: of the tensors' bytes alone, as `sshs_model_hash`
    and `modelspec.hash_sha256` are, so that a change of the header leaves it. The last two are what the header says.
    """
    whole, data = hashlib.sha256(content).hexdigest(), file.data_hash(content)
    said = {f"{key} (said)": metadata[key] for key in OWN[:3] if key in metadata}
    own = {
        "AutoV1": hashlib.sha256(content[WINDOW]).hexdigest()[:8],
        "SHA256": whole,
        "AutoV2": whole[:10],
        "AutoV3": data[:12],
        "data": data,
    }
    return own | said


def legacy_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """kohya's old hash: of the same window of a file that has the tensors and the `ss_*` fields alone."""
    fields = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    whole = safetensors.torch.save({key: tensors[key].contiguous() for key in sorted(tensors)}, fields)
    return hashlib.sha256(whole[WINDOW]).hexdigest()[:8]
