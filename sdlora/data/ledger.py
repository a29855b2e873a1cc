"""The folders as one run uses them, and the ledger: what becomes of every picture, and what is to be said about it."""

import dataclasses
import hashlib
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.config import Folder, Run
from sdlora.data import batches, buckets, captions, doctor, reasons, scan, variants
from sdlora.data.store import Store
from sdlora.data.variants import Variant
from sdlora.errors import UserError
from sdlora.family import Family

MOST_TOLD = 10
"""Findings of a kind that are told one by one."""


@dataclass(frozen=True)
class Dataset:
    account: scan.Account
    captions: list[list[str]]  # of each picture, with the trigger in them
    variants: list[tuple[Variant, ...]]  # of each picture

    @property
    def sizes(self) -> list[buckets.Size]:
        """The first size of each picture."""
        return [shown[0].size for shown in self.variants]

    @property
    def buckets(self) -> Counter[buckets.Size]:
        """How many pictures are trained at each size."""
        trained = [shown for item, shown in zip(self.account.used, self.variants, strict=True) if not item.held_out]
        return Counter(size for shown in trained for size in dict.fromkeys(one.size for one in shown))

    @property
    def pool(self) -> list[int]:
        """The pictures of one epoch, by their place among the used ones: each stands in it as often as the epoch shows it."""
        return [i for i, item in enumerate(self.account.used) for _ in range(item.repeats) if not item.held_out]

    @property
    def digest(self) -> str:
        """A hash of all that training draws from: pixels, captions, repeats, ways of showing, and what is held out."""
        items = [(item.look.digest, item.repeats, item.weight, item.held_out, item.mask and item.mask.name) for item in self.account.used]
        return hashlib.sha256(repr((items, self.captions, self.variants)).encode()).hexdigest()

    @property
    def held(self) -> list[int]:
        """The pictures that are never trained on, but measured by."""
        return [i for i, item in enumerate(self.account.used) if item.held_out]


def read_dataset(run: Run, unpacked: Path, store: Store | None = None, drawn: Path | None = None) -> Dataset:
    """Scan the folders and settle every caption; sizes follow once the base is loaded. ZIPs are unpacked below `unpacked`; `drawn`
    holds regularisation pictures that the user did not give."""
    if not run.data.sources:
        raise UserError("E-DATA-01", "no folder of pictures is named", "data.folder", "sdlora train DIR")
    drawn_too = [Folder(folder=str(drawn), kind="regularisation")] if drawn else []
    account = scan.scan_all([*run.data.sources, *drawn_too], run.data.skip_unreadable, unpacked, store, run.data.alpha_mask)
    account = hold_out(account, run.validation.share, run.seed)
    return Dataset(account, [captions.templates(item, run) for item in account.used], [])


def hold_out(account: scan.Account, share: float, seed: int) -> scan.Account:
    """The account with a share of the pictures held out: at least one, and never the last. Another picture in the folder changes few."""
    free = [i for i, item in enumerate(account.used) if not item.regularisation and not item.held_out]
    count = min(max(1, round(share * len(free))), len(free) - 1) if share else 0
    rank = {i: hashlib.sha256(f"{seed}/held-out/{account.used[i].look.digest}".encode()).digest() for i in free}
    chosen = set(sorted(free, key=lambda i: rank[i])[:count])
    used = [dataclasses.replace(item, held_out=True) if i in chosen else item for i, item in enumerate(account.used)]
    return dataclasses.replace(account, used=used)


def fit_dataset(dataset: Dataset, run: Run, family: Family) -> Dataset:
    """The dataset with the ways in which each picture is shown on this base."""
    available = _available(run, family)
    ways = [variants.variants(item, run, available) for item in dataset.account.used]
    ways = [some[:1] if item.held_out else some for item, some in zip(dataset.account.used, ways, strict=True)]  # measured as they are
    return dataclasses.replace(dataset, variants=ways)


def _available(run: Run, family: Family) -> list[list[buckets.Size]]:
    """The sizes of each resolution."""
    assert run.data.resolution_px is not None
    least = min(run.data.resolution_px, *run.data.further_resolutions_px, run.data.resolution_px)
    if least < family.step_px:
        what = f"{least} px is less than the smallest picture of this base, whose sides are multiples of {family.step_px} px"
        raise UserError("E-CONF-06", what, "data.resolution_px", f"the base was made for {family.base.size_px} px")
    return [buckets.sizes(side, family.step_px) for side in (run.data.resolution_px, *run.data.further_resolutions_px)]


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
    shown = batches.shown(dataset.pool, [*map(len, dataset.variants)], run.seed, run.data.prior_share, samples)
    available = _available(run, family)
    used = []
    for i, (item, texts, ways) in enumerate(zip(account.used, dataset.captions, dataset.variants, strict=True)):
        file = account.name(item.path)
        enlarged = buckets.enlargement(item.width, item.height, ways[0].size) > 1
        fewer = {one.size for one in ways} != {buckets.choose(item.width, item.height, some) for some in available}
        codes = [*item.notes, *["upscaled"] * enlarged, *["fewer-resolutions"] * fewer, *warned.get(file, [])]
        used.append(
            {
                "file": file,
                "fate": "warned" if file in warned else reasons.fate(codes),
                "why": codes,
                "size_px": [item.width, item.height],
                "captions": texts,
                "tokens": [len(family.spans(captions.longest(one))) for one in texts],
                "mask": account.name(item.mask) if item.mask else None,
                "repeats": item.repeats,
                "weight": item.weight,
                "regularisation": item.regularisation,
                "held_out": item.held_out,
                **_ways(item, ways, [shown[i, number] for number in range(len(ways))]),
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
            "held_out": len(dataset.held),
            "left_out": len(left_out),
            "steps": train.steps,
            "samples": samples,
            "samples_of_pictures": sum(shown.values()),
            "samples_an_epoch": len(dataset.pool),
            "epochs": round(sum(shown.values()) / len(dataset.pool), 2),
            "buckets_px": {f"{w}x{h}": count for (w, h), count in dataset.buckets.most_common()},
            "disk_bytes": disk_bytes(dataset, family),
        },
    }


def _ways(item: scan.Item, ways: Sequence[Variant], times: Sequence[int]) -> dict[str, Any]:
    """In which ways a picture is shown, and how often so; the first of them is also the picture's own size and crop."""
    shown: list[dict[str, Any]] = [
        {
            "bucket_px": list(one.size),
            "crop_px": [round(edge, 1) for edge in buckets.taken(item.width, item.height, one.size, one.crop)],
            "colour": [round(factor, 3) for factor in one.colour],
            "mirrored": one.flip,
            "shown": count,
        }
        for one, count in zip(ways, times, strict=True)
    ]
    per_size: Counter[str] = Counter()
    for one, count in zip(ways, times, strict=True):
        per_size["{}x{}".format(*one.size)] += count
    first = {key: shown[0][key] for key in ("bucket_px", "crop_px")}
    return {**first, "shown": sum(times), "shown_at": dict(per_size), "shown_as": shown}


def warnings(findings: Sequence[doctor.Finding]) -> list[str]:
    """What is worth a warning, a line each: of a kind the first few, and how many more the ledger holds."""
    of_kind: dict[str, list[doctor.Finding]] = {}
    for one in findings:
        if one.severity == "warn":
            of_kind.setdefault(one.code, []).append(one)
    told = [said(one) for some in of_kind.values() for one in some[:MOST_TOLD]]
    more = {code: len(some) - MOST_TOLD for code, some in of_kind.items() if len(some) > MOST_TOLD}
    return told + [f"{code}: {count:,} more like these; ledger.json names them all" for code, count in more.items()]


def said(finding: doctor.Finding) -> str:
    """A finding in one line."""
    named = ", ".join(finding.files[:3]) + (f" and {len(finding.files) - 3} more" if len(finding.files) > 3 else "")
    return f"{finding.code}{f' ({named})' if named else ''}: {textwrap.shorten(finding.detail, 200, placeholder=' ...')}"


def disk_bytes(dataset: Dataset, family: Family) -> int:
    """What the cached latents take: mean and standard deviation of each variant of each picture, fp32."""
    sizes = [one.size for shown in dataset.variants for one in shown]
    return sum(8 * family.latent_channels * math.prod(side // family.latent_factor for side in size) for size in sizes)
