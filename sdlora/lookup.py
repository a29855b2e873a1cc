"""A name in a config is a file in a folder: `adapter.kind = "lora"` is `sdlora/adapters/lora.py`."""

import difflib
import pkgutil
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

from sdlora.errors import UserError


def names(group: str) -> list[str]:
    """Every choice in a group, without importing one of them."""
    return sorted(module.name for module in pkgutil.iter_modules(import_module(f"sdlora.{group}").__path__))


def find(group: str, name: object) -> ModuleType:
    """The module of one choice. Raises `UserError` with the nearest right name."""
    known = names(group)
    if name not in known:
        raise UserError("E-CONF-02", f'no {group} called "{name}"{nearest(str(name), known)}', todo=f"choose one of: {', '.join(known)}")
    return import_module(f"sdlora.{group}.{name}")


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean x?`, or nothing when no known word is near."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""
