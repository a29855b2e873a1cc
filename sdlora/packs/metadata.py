"""What a pack says about itself: the fields that programs read (`ss_*`, `modelspec.*`, `sshs_*`), typed as they read them, and ours.

How much of that tells about the pictures is settled by `pack.privacy`. How long a field may be is settled here, and much shorter than what
is read of others: a header is read by whoever lists packs, and lies in front of every pack.
"""

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora import lookup
from sdlora.config import Run
from sdlora.family import Family
from sdlora.optimizer import Optimizing
from sdlora.packs import strict
from sdlora.packs.privacy import Secrets, scrubbed

CLOCK = ("modelspec.date", "ss_training_started_at", "ss_training_finished_at")
"""The only fields that two equal runs may differ in."""
ELSEWHERE = ("kind", "rank", "alpha")
"""Settings of an adapter that have fields of their own."""
MAX_FIELD = 2**18
"""Bytes of a field of a header that is made here. A tag of 12 letters takes 22 with its count, so that some 12,000 are named: all of most
sets, where programs show the first dozens. With all else that a pack says its header stays below 1 MB."""
GIVEN = {
    "ss_output_name": "name",
    "modelspec.title": "pack.title",
    "modelspec.author": "pack.author",
    "modelspec.description": "pack.description",
    "modelspec.license": "pack.license",
    "modelspec.tags": "pack.tags",
    "modelspec.trigger_phrase": "trigger",
    "modelspec.usage_hint": "trigger",
    "trained_words": "trigger",
    "ss_dataset_dirs": "pack.privacy",
    "ss_network_args": "adapter",
}
"""Fields that the user has a say in, and the setting of each."""


@dataclass(frozen=True)
class Facts:
    """What only the finished run knows."""

    pictures: int
    steps: int
    started_at: float  # seconds since 1970
    finished_at: float
    buckets: Mapping[tuple[int, int], int]  # (width, height) in px: pictures
    thumbnail: Image.Image | None = None
    hidden: Secrets = field(default_factory=Secrets)
    warnings: Sequence[str] = ()  # what programs do otherwise than was trained, where the pack was to be written all the same
    regularisation: int = 0  # of the pictures
    scale: float | None = None  # at which it was judged best


def describe(run: Run, family: Family, facts: Facts, sha256: str) -> dict[str, str]:
    """The header of a pack for a resolved run; every value is a string, as the format wants it."""
    return dict(sorted({**of_base(family), **of_run(run, family.base.name, facts, sha256)}.items()))


def of_base(family: Family) -> dict[str, str]:
    """What a pack says of its base."""
    base, weights = family.base, family.base.fingerprint("unet")
    fields = {**names_of_base(family), "sdlora.base_unet_sha256": weights}
    if base.vae:
        fields["sdlora.vae_sha256"] = base.fingerprint("vae")
    if base.source.path.is_file():
        fields["ss_new_sd_model_hash"] = weights
    return fields


def names_of_base(family: Family) -> dict[str, str]:
    """The same without what its weights must be read for."""
    base = family.base
    fields = {
        **family.architecture(),
        "ss_sd_model_name": base.name,
        "sdlora.base": base.name,
        "sdlora.prediction": base.prediction,
        "sdlora.zero_terminal_snr": str(float(family.alphas_cumprod[-1]) < 1e-6),
    }
    if base.revision:
        fields["sdlora.base_revision"] = base.revision
    if base.vae:
        fields |= {"ss_vae_name": base.vae, "sdlora.vae": base.vae}
    return fields


def of_run(run: Run, base: str, facts: Facts, sha256: str = "") -> dict[str, str]:
    """All of the header that does not need the base's weights."""
    fields = {
        **_model_spec(run, facts, sha256),
        **_network(run),
        **_training(run, facts),
        **_pictures(run, facts),
        "sshs_model_hash": sha256,
        "ss_output_name": run.name,
        "sdlora.kind": run.kind,
        "sdlora.adapter": run.adapter.model_dump()["kind"],
        "sdlora.recommended_scale": _scale(run, facts),
        "sdlora.privacy": run.pack.privacy,
        "sdlora.config": as_json(public(run, base, facts.hidden)),
    }
    if facts.warnings:
        fields["sdlora.warnings"] = as_json(list(facts.warnings))
    return {key: str(value) for key, value in fields.items()}


def _scale(run: Run, facts: Facts) -> float:
    """What the user says, or else what was measured."""
    said = run.pack.recommended_scale
    return said if facts.scale is None or said != 1 else facts.scale


def _model_spec(run: Run, facts: Facts, sha256: str) -> dict[str, Any]:
    """ModelSpec 1.0.1, whose optional fields are left out where there is nothing to say."""
    side, objective, pack = run.data.resolution_px, run.objective.model_dump(), run.pack
    fields = {
        "sai_model_spec": "1.0.1",
        "implementation": "diffusers",
        "title": pack.title or run.name,
        "resolution": f"{side}x{side}",
        "description": pack.description,
        "author": pack.author,
        "license": pack.license,
        "tags": ", ".join(pack.tags),
        "trigger_phrase": run.trigger,
        "usage_hint": f"Say {run.trigger} in the prompt, at scale {_scale(run, facts):g}.",
        "prediction_type": "v" if objective["kind"] == "velocity" else objective["kind"],
        "date": datetime.fromtimestamp(facts.finished_at, UTC).isoformat(timespec="seconds"),
        "hash_sha256": f"0x{sha256}",
        "thumbnail": data_url(facts.thumbnail) if facts.thumbnail and pack.thumbnail else "",
    }
    said = {f"modelspec.{key}": value for key, value in fields.items() if value}
    if "modelspec.thumbnail" in said:  # one program shows only what another extension of its own once wrote
        said["ssmd_cover_images"] = json.dumps([said["modelspec.thumbnail"].partition(",")[2]])
    return {**said, "trained_words": run.trigger}


def _network(run: Run) -> dict[str, Any]:
    adapter = run.adapter.model_dump()
    return {
        "ss_network_module": lookup.find("adapters", adapter["kind"]).Adapter.network,
        "ss_network_dim": adapter.get("rank"),
        "ss_network_alpha": adapter.get("alpha"),
        "ss_network_args": as_json({"algo": adapter["kind"], **{key: adapter[key] for key in adapter if key not in ELSEWHERE}}),
    }


def _training(run: Run, facts: Facts) -> dict[str, Any]:
    train, objective, data = run.train, run.objective.model_dump(), run.data
    assert isinstance(run.optimizer, Optimizing)
    at_once = (train.batch_size or 1) * train.accumulation
    batches = max(1, -(-facts.pictures // at_once))
    return {
        "ss_clip_skip": run.text.clip_skip if run.text.clip_skip > 1 else None,
        "ss_seed": run.seed,
        "ss_steps": facts.steps,
        "ss_max_train_steps": train.steps,
        "ss_epoch": -(-facts.steps // batches),
        "ss_num_epochs": -(-(train.steps or 0) // batches),
        "ss_num_batches_per_epoch": batches,
        "ss_batch_size_per_device": train.batch_size,
        "ss_total_batch_size": at_once,
        "ss_gradient_accumulation_steps": train.accumulation,
        "ss_learning_rate": train.lr,
        "ss_unet_lr": train.lr,
        "ss_text_encoder_lr": train.text_encoder_lr,
        "ss_lr_scheduler": train.schedule,
        "ss_lr_warmup_steps": train.warmup_steps,
        "ss_max_grad_norm": train.clip_norm,
        "ss_optimizer": run.optimizer.known_as,
        "ss_mixed_precision": train.precision,
        "ss_min_snr_gamma": objective.get("min_snr_gamma"),
        "ss_noise_offset": objective.get("noise_offset"),
        "ss_caption_dropout_rate": data.caption_dropout,
        "ss_shuffle_caption": data.shuffle_tags,
        "ss_keep_tokens": data.keep_tokens,
        "ss_flip_aug": data.flip,
        "ss_training_started_at": facts.started_at,
        "ss_training_finished_at": facts.finished_at,
    }


def _pictures(run: Run, facts: Facts) -> dict[str, Any]:
    """What is said of the pictures. Readers want objects in these fields, and whole numbers: `{folder: {tag: count}}`."""
    side, hidden = run.data.resolution_px, facts.hidden
    folders = hidden.pictures or {run.name: facts.pictures}
    if run.pack.privacy != "full":
        folders = {run.name: sum(folders.values())}
    fields = {
        "ss_resolution": f"({side}, {side})",
        "ss_num_train_images": facts.pictures - facts.regularisation,
        "ss_num_reg_images": facts.regularisation,
        "ss_enable_bucket": True,
        "ss_bucket_info": as_json({"buckets": _buckets(facts.buckets)}),
        "ss_dataset_dirs": as_json({folder: {"n_repeats": 1, "img_count": count} for folder, count in sorted(folders.items())}),
    }
    if tags := named_tags(run, hidden):
        fields["ss_tag_frequency"] = as_json(tags)
    return fields


def named_tags(run: Run, hidden: Secrets) -> dict[str, dict[str, int]]:
    """Tags with their frequency, by the folder that is named, as far as the pack's privacy and the length of a field let them be told."""
    return {} if run.pack.privacy == "public" else most_frequent(_all_tags(run, hidden), MAX_FIELD)


def tags_left_out(run: Run, hidden: Secrets) -> str:
    """How many of the tags a pack names, in a line; "" where it names all of those that it may."""
    counted = [sum(map(len, tags.values())) for tags in (named_tags(run, hidden), _all_tags(run, hidden))]
    if run.pack.privacy == "public" or counted[0] == counted[1]:
        return ""
    room = f"ss_tag_frequency has room for {MAX_FIELD >> 10} KiB"
    return f"the pack names {counted[0]:,} of {counted[1]:,} tags of the captions, the most frequent: {room}"


def _all_tags(run: Run, hidden: Secrets) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for folder, tags in hidden.tags.items():
        found.setdefault(folder if run.pack.privacy == "full" else run.name, Counter()).update(tags)
    return found


def most_frequent(tags: Mapping[str, Mapping[str, int]], room: int) -> dict[str, dict[str, int]]:
    """The most frequent of them that a field of so many bytes has room for; one that is too long for what is left is passed over."""
    every = sorted((-count, folder, tag) for folder, inside in tags.items() for tag, count in inside.items())
    found: dict[str, dict[str, int]] = {}
    left = room - len("{}")
    for less, folder, tag in every:
        if len(tag) > left:  # it takes at least a byte a character
            continue
        cost = strict.size_of(as_json(tag)) + len(f": {-less}, ")
        cost += 0 if folder in found else strict.size_of(as_json(folder)) + len(": {}, ")
        if cost <= left:
            left -= cost
            found.setdefault(folder, {})[tag] = -less
    return {folder: dict(sorted(inside.items())) for folder, inside in sorted(found.items())}


def too_long(fields: Mapping[str, str]) -> list[str]:
    """The fields that are longer than they may be in a pack that is made here."""
    return [key for key, value in fields.items() if strict.size_of(value) > MAX_FIELD]


def as_json(value: Any) -> str:
    """JSON in which no HTML can begin, as pages show it: programs that read it find what was meant."""
    return json.dumps(value).replace("<", "\\u003c")


def public(run: Run, base: str, hidden: Secrets | None = None) -> dict[str, Any]:
    """The settings without what would tell where the user keeps things, as far as they let it be told."""
    table = run.model_dump()
    if run.pack.privacy == "full":
        return table
    table |= {"base": base, "vae": Path(run.vae).name if Path(run.vae).exists() else run.vae}
    del table["data"]["folder"]
    for folder in table["data"]["folders"]:
        del folder["folder"]
    if hidden:
        table = scrubbed(table, Secrets(hidden.files, hidden.captions if run.pack.privacy == "public" else frozenset()))
    return table


def data_url(picture: Image.Image) -> str:
    """A JPEG of at most 256 px, as browsers and pack managers take it."""
    small = picture.convert("RGB")
    small.thumbnail((256, 256))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture_of(url: str) -> Image.Image:
    """The picture in a data URL."""
    return Image.open(io.BytesIO(base64.b64decode(re.sub(r"^data:image/\w+;base64,", "", url))))


def _buckets(counts: Mapping[tuple[int, int], int]) -> dict[str, Any]:
    return {str(i): {"resolution": list(size), "count": count} for i, (size, count) in enumerate(sorted(counts.items()))}
