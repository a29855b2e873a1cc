"""What all screens share: the projects on the disk, the bases in memory, and how an error is shown."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

import gradio as gr

from sdlora.api import UserError
from webui.easel import Easel
from webui.links import Links
from webui.live import Live
from webui.projects import Projects

Values: TypeAlias = dict[Any, Any]
"""Values by component: what gradio hands to an event whose inputs are a set, and takes back from it."""

HIDDEN: dict[str, Any] = {"visible": "hidden", "show_label": False, "container": False}
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
"""Events of the page alone; what programs may call has names and types in `calls`."""


@dataclass(frozen=True)
class House:
    projects: Projects
    links: Links
    live: Live
    easel: Easel


@contextmanager
def toasts() -> Iterator[None]:
    """User errors as a message on the page; it is rendered as HTML, and an error may quote a file."""
    try:
        yield
    except UserError as error:
        raise gr.Error(escape(str(error)), duration=15, print_exception=False) from None


def brought(path: object, uploads: Path) -> Path:
    """A file that was uploaded. Raises `UserError` for any other that a request may name."""
    place = Path(os.path.realpath(str(path)))
    if not place.is_relative_to(os.path.realpath(uploads)):
        raise UserError("E-UI-06", "this is no file that was uploaded", place.name, "upload it")
    return place


def part(address: str) -> str:
    """A part of the page that follows files; the page's own script fills it and keeps it new."""
    return f'<div data-live="{escape(address)}"></div>'


def command_line(label: str = "The same on the command line", **more: Any) -> Any:
    return gr.Textbox(label=label, elem_classes="command", interactive=False, buttons=["copy"], lines=1, max_lines=6, **more)
