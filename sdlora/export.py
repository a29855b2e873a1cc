"""What is asked of a pack before it is written: that no program silently misreads it, and that it tells no more than it may."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from sdlora import lookup
from sdlora.config import Run, flat
from sdlora.data.ledger import Dataset
from sdlora.errors import UserError
from sdlora.events import Event
from sdlora.family import Family
from sdlora.packs import file, header, metadata, outline, precision, privacy, readers, strict, words, writing
from sdlora.packs.metadata import Facts
from sdlora.packs.privacy import Secrets
from sdlora.packs.readers import Reading


def foresee(settled: Run, loaded: Family, tensors: Mapping[str, Tensor], dataset: Dataset) -> None:
    """Raise before anything is trained what would be raised when the pack is written, or read; `tensors` are those of the start."""
    hidden = privacy.secrets(dataset, settled)
    for layout in settled.pack.layouts:
        laid_out = writing.laid_out(layout, tensors, loaded)
        wrong = readers.misread(read(settled, loaded, laid_out))
        facts = Facts(0, 0, time.time(), time.time(), dataset.buckets, hidden=hidden, warnings=wrong)
        fields = {**metadata.names_of_base(loaded), **metadata.of_run(settled, loaded.base.name, facts)}
        prove(fields, hidden, settled)
        check_fields(fields, settled)
        check_tensors(laid_out, settled)


def describing(
    settled: Run, loaded: Family, tensors: Mapping[str, Tensor], facts: Facts
) -> tuple[Callable[[str], dict[str, str]], list[Event]]:
    """What gives the header of a pack for the hash of its tensors, and what is to be said of who opens it. Raises `UserError`."""
    readings, tensors = read(settled, loaded, tensors), words.held(tensors)[0]
    wrong = readers.misread(readings)
    facts = dataclasses.replace(facts, warnings=wrong)

    def describe(sha256: str) -> dict[str, str]:
        fields = metadata.describe(settled, loaded, facts, sha256)
        fields["sshs_legacy_hash"] = header.legacy_hash(tensors, fields)
        prove(fields, facts.hidden, settled)
        return fields

    left_out = metadata.tags_left_out(settled, facts.hidden)
    notes = [Event("note", one) for one in (line(readings), left_out) if one]
    return describe, [*notes, *(Event("warning", f"written as pack.force is set: {one}") for one in wrong)]


def read(settled: Run, loaded: Family, tensors: Mapping[str, Tensor]) -> list[Reading]:
    """What programs make of these tensors. Raises `UserError` where one would misread them and not say so, unless that is wanted."""
    rest = words.apart(tensors)[0]
    if not rest:
        return []
    readings = readers.check(rest, loaded.architecture(), outline.of(loaded.layers()))
    wrong = readers.misread(readings)
    if wrong and not settled.pack.force:
        fixes = "; ".join(dict.fromkeys(one.fix for one in readings if one.fix))
        what = f"the pack would be opened and silently applied otherwise than it is trained: {'; '.join(wrong)}"
        raise UserError("E-PACK-08", what, settled.name, f"{fixes}; or set pack.force=true")
    return readings


def prove(fields: Mapping[str, str], hidden: Secrets, settled: Run) -> None:
    """Raise `UserError` if a header tells more than its level of privacy lets it."""
    found = privacy.leaks(fields, hidden, settled.pack.privacy)
    if found:
        what = f"the header would tell what pack.privacy = {settled.pack.privacy} keeps back: {'; '.join(found[:5])}"
        raise UserError("E-PACK-09", what, settled.name, "word that setting otherwise, or set pack.privacy to shared or full")


def check_fields(fields: Mapping[str, str], settled: Run) -> None:
    """Raise `UserError` if a header would be longer than a pack's may be, or hold what no program can read."""
    for key in metadata.too_long(fields):
        what = f"the header's {key} would take {strict.size_of(fields[key]):,} bytes, where a pack has room for {metadata.MAX_FIELD:,}"
        raise UserError("E-PACK-38", what, _setting(key, settled), "make it shorter")
    for key, value in fields.items():
        try:
            strict.check_text(value, f"the header's {key}")
        except strict.FormatError as error:
            raise UserError("E-PACK-38", f"no program could read the pack: {error}", _setting(key, settled), "word it otherwise") from None


def check_tensors(tensors: Mapping[str, Tensor], settled: Run) -> None:
    """Raise `UserError` if a pack with these tensors would not be read."""
    exact = lookup.find("adapters", settled.adapter.model_dump()["kind"]).Adapter.exact
    width = precision.DTYPES[settled.pack.dtype].itemsize
    size = sum(tensor.numel() * (4 if key.partition(".")[2] in exact else width) for key, tensor in tensors.items())
    if size > file.MAX_BYTES - strict.MAX_HEADER or len(tensors) > strict.MAX_TENSORS:
        what = f"the pack would hold {len(tensors):,} tensors of {size / 2**30:.1f} GiB together, more than is read of one"
        raise UserError("E-PACK-38", what, "adapter", "adapt fewer layers, at a smaller rank, or set pack.dtype=fp16")


def _setting(key: str, settled: Run) -> str:
    """The setting that a field of the header is made of."""
    if key == "sdlora.config":
        return max(flat(settled), key=lambda pair: len(str(pair[1])))[0]
    return metadata.GIVEN.get(key, key)


def line(readings: Sequence[Reading]) -> str:
    """Who opens a pack, in one line."""
    said = [] if readings else ["it opens here alone; other programs open the embeddings beside it"]
    for verdict, saying in {"opens": "it opens in", "partly": "partly in", "not": "not in", "not applicable": "not for"}.items():
        names = [one.reader for one in readings if one.verdict == verdict]
        said += [f"{saying} {', '.join(names)}"] if names else []
    return f"the pack: {'; '.join(said)}"
