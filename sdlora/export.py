"""What is asked of a pack before it is written: that no program silently misreads it, and that it tells no more than it may."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from sdlora.config import Run
from sdlora.data.ledger import Dataset
from sdlora.errors import UserError
from sdlora.events import Event
from sdlora.family import Family
from sdlora.packs import header, metadata, outline, privacy, readers, writing
from sdlora.packs.metadata import Facts
from sdlora.packs.privacy import Secrets
from sdlora.packs.readers import Reading


def foresee(settled: Run, loaded: Family, tensors: Mapping[str, Tensor], dataset: Dataset) -> None:
    """Raise before anything is trained what would be raised when the pack is written; `tensors` are those of the start."""
    read(settled, loaded, writing.agreed(tensors))
    hidden = privacy.secrets(dataset, settled)
    facts = Facts(0, 0, time.time(), time.time(), dataset.buckets, hidden=hidden)
    prove(metadata.of_run(settled, loaded.base.name, facts), hidden, settled)


def describing(
    settled: Run, loaded: Family, tensors: Mapping[str, Tensor], facts: Facts
) -> tuple[Callable[[str], dict[str, str]], list[Event]]:
    """What gives the header of a pack for the hash of its tensors, and what is to be said of who opens it. Raises `UserError`."""
    readings = read(settled, loaded, tensors)
    wrong = readers.misread(readings)
    facts = dataclasses.replace(facts, warnings=wrong)

    def describe(sha256: str) -> dict[str, str]:
        fields = metadata.describe(settled, loaded, facts, sha256)
        fields["sshs_legacy_hash"] = header.legacy_hash(tensors, fields)
        prove(fields, facts.hidden, settled)
        return fields

    return describe, [Event("note", line(readings)), *(Event("warning", f"written as pack.force is set: {one}") for one in wrong)]


def read(settled: Run, loaded: Family, tensors: Mapping[str, Tensor]) -> list[Reading]:
    """What programs make of these tensors. Raises `UserError` where one would misread them and not say so, unless that is wanted."""
    readings = readers.check(tensors, loaded.architecture(), outline.of(loaded.layers()))
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


def line(readings: Sequence[Reading]) -> str:
    """Who opens a pack, in one line."""
    said = []
    for verdict, words in {"opens": "it opens in", "partly": "partly in", "not": "not in", "not applicable": "not for"}.items():
        names = [one.reader for one in readings if one.verdict == verdict]
        said += [f"{words} {', '.join(names)}"] if names else []
    return f"the pack: {'; '.join(said)}"
