"""What a pack says about itself: the fields that programs read (`ss_*`, `modelspec.*`), and ours. No path, file name or caption."""

import base64
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from PIL import Image

from sdlora import lookup
from sdlora.config import Run
from sdlora.family import Base, Family
from sdlora.optimizer import Optimizing

CLOCK = ("modelspec.date", "ss_training_started_at", "ss_training_finished_at")
"""The only fields that two equal runs may differ in."""
ELSEWHERE = ("kind", "rank", "alpha")
"""Settings of an adapter that have fields of their own."""


@dataclass(frozen=True)
class Facts:
    """What only the finished run knows."""

    pictures: int
    steps: int
    started_at: float  # seconds since 1970
    finished_at: float
    buckets: Mapping[tuple[int, int], int]  # (width, height) in px: pictures
    thumbnail: Image.Image | None = None
    recommended_scale: float = 1.0


def describe(run: Run, family: Family, facts: Facts, sha256: str) -> dict[str, str]:
    """The header of a pack for a resolved run; every value is a string, as the format wants it."""
    adapter, objective, train = run.adapter.model_dump(), run.objective.model_dump(), run.train
    side = run.data.resolution_px
    assert isinstance(run.optimizer, Optimizing)
    fields: dict[str, Any] = {
        **family.architecture(),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": run.name,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.trigger_phrase": run.trigger,
        "modelspec.usage_hint": f"Say {run.trigger} in the prompt, at scale {facts.recommended_scale:g}.",
        "modelspec.prediction_type": "v" if objective["kind"] == "velocity" else objective["kind"],
        "modelspec.date": datetime.fromtimestamp(facts.finished_at, UTC).isoformat(timespec="seconds"),
        "modelspec.hash_sha256": f"0x{sha256}",
        "sshs_model_hash": sha256,
        "ss_network_module": lookup.find("adapters", adapter["kind"]).Adapter.network,
        "ss_network_dim": adapter.get("rank"),
        "ss_network_alpha": adapter.get("alpha"),
        "ss_network_args": json.dumps({"algo": adapter["kind"], **{key: adapter[key] for key in adapter if key not in ELSEWHERE}}),
        "ss_output_name": run.name,
        "ss_sd_model_name": family.base.name,
        "ss_resolution": f"({side}, {side})",
        "ss_clip_skip": run.text.clip_skip if run.text.clip_skip > 1 else None,
        "ss_seed": run.seed,
        "ss_num_train_images": facts.pictures,
        "ss_steps": facts.steps,
        "ss_max_train_steps": train.steps,
        "ss_batch_size_per_device": train.batch_size,
        "ss_gradient_accumulation_steps": train.accumulation,
        "ss_unet_lr": train.lr,
        "ss_text_encoder_lr": train.text_encoder_lr,
        "ss_lr_scheduler": train.schedule,
        "ss_lr_warmup_steps": train.warmup_steps,
        "ss_max_grad_norm": train.clip_norm,
        "ss_caption_dropout_rate": run.data.caption_dropout,
        "ss_min_snr_gamma": objective.get("min_snr_gamma"),
        "ss_optimizer": run.optimizer.known_as,
        "ss_mixed_precision": train.precision,
        "ss_bucket_info": json.dumps({"buckets": _buckets(facts.buckets)}),
        "ss_training_started_at": facts.started_at,
        "ss_training_finished_at": facts.finished_at,
        "sdlora.base": family.base.name,
        "sdlora.base_unet_sha256": family.base.fingerprint("unet"),
        "sdlora.prediction": family.base.prediction,
        "sdlora.zero_terminal_snr": float(family.alphas_cumprod[-1]) < 1e-6,
        "sdlora.kind": run.kind,
        "sdlora.adapter": adapter["kind"],
        "sdlora.recommended_scale": facts.recommended_scale,
        "sdlora.config": json.dumps(public(run, family.base)),
    }
    if family.base.revision:
        fields["sdlora.base_revision"] = family.base.revision
    if family.base.vae:
        fields |= {"ss_vae_name": family.base.vae, "sdlora.vae": family.base.vae, "sdlora.vae_sha256": family.base.fingerprint("vae")}
    if facts.thumbnail is not None:
        fields["modelspec.thumbnail"] = data_url(facts.thumbnail)
    return {key: str(value) for key, value in sorted(fields.items())}


def public(run: Run, base: Base) -> dict[str, Any]:
    """The settings without what would tell where the user keeps things."""
    table = run.model_dump()
    table |= {"base": base.name, "vae": base.vae}
    del table["data"]["folder"]
    for folder in table["data"]["folders"]:
        del folder["folder"]
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
