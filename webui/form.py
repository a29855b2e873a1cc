"""Controls for settings, made from the settings themselves: what is new there is here without a line more."""

import re
import textwrap
from collections.abc import Mapping
from typing import Any

import gradio as gr

from sdlora import api
from sdlora.api import Setting

APART = ("name", "kind", "base", "trigger", "data.folder")
"""Settings that have a place of their own on the page."""
TUNE = (
    "train.steps", "train.lr", "train.text_encoder_lr", "train.batch_size", "adapter.kind", "adapter.rank", "data.resolution_px",
    "data.flip", "train.schedule", "validation.share", "preview.prompts", "preview.every",
)  # fmt: skip
"""Those of the middle depth, in the order in which they are read."""
TABLES = {"": "The run", "data": "Pictures and captions", "adapter": "Adapter", "objective": "Objective", "optimizer": "Optimizer",
          "train": "Training", "validation": "Validation", "preview": "Previews", "text": "How texts are read",
          "pack": "The pack"}  # fmt: skip
UNITS = {"_px": "in pixels", "_share": "as a share of 1", "_steps": "in steps", "_every": "in steps"}
WORDS = {"lr": "learning rate", "px": "", "kind": "kind", "ema": "moving average of the weights"}
NAMES = {
    "preview.every": "Steps between previews",
    "preview.prompts": "Prompts of the previews",
    "validation.share": "Share held out to measure",
}
AS_USUAL = "as usual"
MOST_SHOWN = 90


class Form:
    """A control for every setting; an empty one leaves its setting at what is usual."""

    def __init__(self) -> None:
        self.settings = {key_of(one): one for one in api.described() if one.name not in APART}
        self.controls: dict[str, Any] = {}

    def tune(self) -> None:
        """The middle depth."""
        names = [key for name in TUNE for key, one in self.settings.items() if one.name == name and one.owner in ("", "lora")]
        for start in range(0, len(names), 2):
            with gr.Row(elem_classes="split"):
                for key in names[start : start + 2]:
                    self._control(key)

    def everything(self) -> None:
        """All others, by table; an adapter's own settings say whose they are."""
        for table, title in TABLES.items():
            keys = [key for key, one in self.settings.items() if table_of(one) == table and key not in self.controls]
            if keys:
                with gr.Accordion(title, open=False):
                    for key in keys:
                        self._control(key)

    def table(self, values: Mapping[Any, Any]) -> dict[str, Any]:
        """The settings that were filled in, as a TOML file has them; those of kinds that are not chosen are left out."""
        said = {key: text(values[control]) for key, control in self.controls.items() if control in values}
        chosen = {name: said.get(f"{name}.kind", "") for name in ("adapter", "objective", "optimizer")}
        found: dict[str, Any] = {}
        for key, value in said.items():
            one = self.settings[key]
            kind = chosen.get(table_of(one), "") or self._usual_kind(table_of(one))
            if value and one.owner in ("", kind):
                api.override(found, f"{one.name}={_quoted(value) if one.choices else value}")
        return found

    def filled(self, table: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[Any, Any]:
        """Updates that show a project's settings, and what is usual where they say nothing."""
        shown: dict[Any, Any] = {}
        for key, control in self.controls.items():
            one = self.settings[key]
            value = _at(table, one.name)
            default = _at(usual, one.name) if one.owner in ("", _at(usual, f"{table_of(one)}.kind")) else one.usual
            now = "" if value is None else written(value)
            hint = (
                f"{AS_USUAL}: {textwrap.shorten(written(default), MOST_SHOWN, placeholder=' ...')}"
                if default not in (None, "", [])
                else AS_USUAL
            )
            if one.choices or one.is_switch:
                options = one.choices or ("true", "false")
                shown[control] = gr.Dropdown([(hint, ""), *((option, option) for option in options)], value=now)
            else:
                shown[control] = gr.Textbox(value=now, placeholder=hint)
        return shown

    def _control(self, key: str) -> None:
        one = self.settings[key]
        label = called(one)
        unit = next((f", {unit}" for ending, unit in UNITS.items() if one.name.endswith(ending)), "")
        info = f"{one.reason} ({one.name}{unit})"
        if one.choices or one.is_switch:
            options = one.choices or ("true", "false")
            made: Any = gr.Dropdown([(AS_USUAL, ""), *((option, option) for option in options)], value="", label=label, info=info)
        else:
            made = gr.Textbox(label=label, info=info, placeholder=AS_USUAL, max_length=2000)
        made.elem_id = "set-" + re.sub(r"[^a-z0-9]+", "-", key)
        self.controls[key] = made

    def _usual_kind(self, table: str) -> str:
        return str(self.settings[f"{table}.kind"].usual) if f"{table}.kind" in self.settings else ""


def key_of(one: Setting) -> str:
    return f"{one.name}@{one.owner}" if one.owner else one.name


def called(one: Setting) -> str:
    """A setting's name in plain words."""
    words = [WORDS.get(word, word) for word in one.name.rpartition(".")[2].split("_")]
    if words == ["kind"]:
        words = [f"kind of {table_of(one)}"]
    said = NAMES.get(one.name, " ".join(word for word in words if word).capitalize())
    return f"{said} ({one.owner})" if one.owner else said


def table_of(one: Setting) -> str:
    return one.name.rpartition(".")[0]


def text(value: object) -> str:
    return str(value).strip() if value is not None else ""


def written(value: object) -> str:
    """A value as one would type it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(_quoted(one) if isinstance(one, str) else written(one) for one in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _at(table: Mapping[str, Any], name: str) -> Any:
    found: Any = table
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
