"""The folders as one run uses them, and the ledger: what becomes of every picture, and what is to be said about it."""

import dataclasses
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.config import Run
from sdlora.data import batches, buckets, captions, doctor, reasons, scan
from sdlora.data.store import Store
from sdlora.errors import UserError
from sdlora.family import Family


@dataclass(frozen=True)
class Dataset:
    account: scan.Account
    captions: list[list[str]]  # of each picture, with the trigger in them
    sizes: list[buckets.Size]

    @property
    def pool(self) -> list[int]:
        """The pictures of one epoch, by their place among the used ones: each stands in it as often as the epoch shows it."""
        return [i for i, item in enumerate(self.account.used) for _ in range(item.repeats)]


def read_dataset(run: Run, unpacked: Path, store: Store | None = None) -> Dataset:
    """Scan the folders and settle every caption; sizes follow once the base is loaded. ZIPs are unpacked below `unpacked`."""
    if not run.data.sources:
        raise UserError("E-DATA-01", "no folder of pictures is named", "data.folder", "sdlora train DIR")
    account = scan.scan_all(run.data.sources, run.data.skip_unreadable, unpacked, store)
    return Dataset(account, [captions.templates(item, run) for item in account.used], [])


def fit_dataset(dataset: Dataset, run: Run, family: Family) -> Dataset:
    """The dataset with the size that each picture takes on this base."""
    assert run.data.resolution_px is not None
    available = buckets.sizes(run.data.resolution_px, family.step_px)
    return dataclasses.replace(dataset, sizes=[buckets.choose(item.width, item.height, available) for item in dataset.account.used])


def findings(dataset: Dataset, run: Run, family: Family) -> list[doctor.Finding]:
    """What the doctor says of the pictures that are used, their captions and the trigger; warnings first."""
    assert run.data.resolution_px is not None
    account = dataset.account
    names = [account.name(item.path) for item in account.used]
    own = [bool(item.captions) for item in account.used]  # what is made up for the others is alike on purpose
    said = {name: [captions.longest(one) for one in texts] for name, texts, has in zip(names, dataset.captions, own, strict=True) if has}
    found = [
        *doctor.examine({name: item.look for name, item in zip(names, account.used, strict=True)}, run.data.resolution_px),
        *doctor.of_captions(said, family.spans, family.most_tokens),
        *doctor.of_trigger(run.trigger, lambda word: len(family.spans(word))),
    ]
    return sorted(found, key=lambda one: one.severity == "note")


def ledger(dataset: Dataset, run: Run, family: Family, found: Sequence[doctor.Finding]) -> dict[str, Any]:
    """What becomes of every picture and of every other file that concerns pictures, as `ledger.json` holds it."""
    account, train = dataset.account, run.train
    warned: dict[str, list[str]] = {}
    for code, file in dict.fromkeys((one.code, file) for one in found if one.severity == "warn" for file in one.files):
        warned.setdefault(file, []).append(code)
    assert train.steps is not None
    assert train.batch_size is not None
    assert run.data.prior_share is not None
    samples = train.steps * train.batch_size * train.accumulation
    shown = batches.shown(dataset.pool, run.seed, run.data.prior_share, samples)
    used = []
    for i, (item, texts, size) in enumerate(zip(account.used, dataset.captions, dataset.sizes, strict=True)):
        file = account.name(item.path)
        enlarged = buckets.enlargement(item.width, item.height, size) > 1
        codes = [*item.notes, *["upscaled"] * enlarged, *warned.get(file, [])]
        used.append(
            {
                "file": file,
                "fate": "warned" if file in warned else reasons.fate(codes),
                "why": codes,
                "size_px": [item.width, item.height],
                "bucket_px": list(size),
                "crop_px": [round(edge, 1) for edge in buckets.crop_box(item.width, item.height, size)],
                "captions": texts,
                "tokens": [len(family.spans(captions.longest(one))) for one in texts],
                "mask": account.name(item.mask) if item.mask else None,
                "repeats": item.repeats,
                "weight": item.weight,
                "regularisation": item.regularisation,
                "shown": shown[i],
            }
        )
    left_out = [{"file": account.name(out.path), "fate": "left_out", "why": [*out.why], "detail": out.detail} for out in account.left_out]
    fates = Counter(row["fate"] for row in used)
    return {
        "pictures": [*left_out, *sorted(used, key=lambda row: ("warned", "fixed", "used").index(row["fate"]))],
        "findings": [dataclasses.asdict(one) for one in found],
        "other_files": [{"file": account.name(out.path), "why": [*out.why]} for out in account.strays],
        "totals": {
            "found": len(used) + len(left_out),
            "used": len(used),
            "of_these_fixed": fates["fixed"],
            "of_these_warned": fates["warned"],
            "left_out": len(left_out),
            "steps": train.steps,
            "samples": samples,
            "samples_of_pictures": sum(shown.values()),
            "samples_an_epoch": len(dataset.pool),
            "epochs": round(sum(shown.values()) / len(dataset.pool), 2),
            "buckets_px": {f"{w}x{h}": count for (w, h), count in Counter(dataset.sizes).most_common()},
            "disk_bytes": disk_bytes(dataset, family),
        },
    }


def said(finding: doctor.Finding) -> str:
    """A finding in one line."""
    named = ", ".join(finding.files[:3]) + (f" and {len(finding.files) - 3} more" if len(finding.files) > 3 else "")
    return f"{finding.code}{f' ({named})' if named else ''}: {textwrap.shorten(finding.detail, 200, placeholder=' ...')}"


def disk_bytes(dataset: Dataset, family: Family) -> int:
    """What the cached latents take: mean and standard deviation of each picture, fp32."""
    return sum(8 * family.latent_channels * math.prod(side // family.latent_factor for side in size) for size in dataset.sizes)
