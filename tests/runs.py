"""Run folders written by hand: what a report and a list are made of, without a training."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

SETTINGS: dict[str, Any] = {"name": "mira", "kind": "character", "base": "tiny", "trigger": "mira", "train.steps": 40}
BEGAN = 1_790_000_000.0


def log(*, ended: bool = True, steps: int = 40) -> list[dict[str, Any]]:
    """The events of a run as a whole."""
    found: list[dict[str, Any]] = [
        {"time": BEGAN, "kind": "note", "text": "5 pictures found, 5 used", "step": 0},
        {"time": BEGAN + 1, "kind": "warning", "text": "the sky is falling", "step": 0},
        {"time": BEGAN + 2, "kind": "note", "text": "3 layers adapted", "step": 0},
    ]
    for step in range(1, steps + 1):
        rate = {"lr": 1e-4 * (1 - step / 80)}
        found.append(
            {"time": BEGAN + 2 + (step + 9) // 10 * 5, "kind": "step", "step": step, "loss": 0.1 + 0.001 * (step % 7), "data": rate}
        )
    found.append({"time": BEGAN + 22, "kind": "validation", "step": steps, "data": {"loss": 0.105}})
    found.append({"time": BEGAN + 23, "kind": "checkpoint", "text": "ckpt-000040", "step": steps})
    if ended:
        learnt = {"pictures": 5, "distance_base": 40.0, "distance_adapter": 20.0}
        found.append({"time": BEGAN + 30, "kind": "note", "text": "learnt: much", "step": 0, "data": learnt})
        found.append(
            {"time": BEGAN + 32, "kind": "done", "text": "/a/mira.safetensors", "step": steps, "data": {"seconds": 34.0, **learnt}}
        )
    return found


def lines(events: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(event) + "\n" for event in events)


def ledger() -> dict[str, Any]:
    totals = {"found": 6, "used": 5, "of_these_fixed": 1, "of_these_warned": 1, "left_out": 1, "samples_of_pictures": 80, "epochs": 16.0}
    return {
        "pictures": [
            {"file": "bad.png", "fate": "left_out", "why": ["empty-file"], "detail": ""},
            {"file": "a.png", "fate": "warned", "why": ["blurred"], "captions": ["mira"]},
        ],
        "findings": [
            {"code": "same-framing", "files": [], "detail": "5 of 5 pictures", "severity": "note"},
            {"code": "blurred", "files": ["a.png"], "detail": "steepness 0.3", "severity": "warn"},
        ],
        "other_files": [],
        "totals": {**totals, "buckets_px": {"64x64": 5}},
    }


def write(folder: Path, events: list[dict[str, Any]] | None = None, **settings: Any) -> Path:
    """A run folder with everything in it; `settings` are laid over the usual ones."""
    folder.mkdir(parents=True)
    table = SETTINGS | settings
    (folder / "config.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items()), "utf-8")
    (folder / "events.jsonl").write_text(lines(log() if events is None else events), "utf-8")
    (folder / "ledger.json").write_text(json.dumps(ledger()), "utf-8")
    Image.new("RGB", (70, 30), "green").save(folder / "strip.png")
    return folder
