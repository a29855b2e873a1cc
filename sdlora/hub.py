"""Models from the hub, downloaded once and kept by huggingface_hub; the one place that uses the network."""

import re
from collections.abc import Sequence
from pathlib import Path


class UnreachableError(Exception):
    """A model could not be had; the message is one line that says why."""


def is_id(name: str) -> bool:
    """Whether a model could be called so there: owner/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def kept(name: str, file: str) -> Path | None:
    """A model's file, if it was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file)
    return Path(found) if isinstance(found, str) else None


def download(name: str, files: Sequence[str]) -> Path:
    """The folder that holds those files of a model, which may be patterns. Raises `UnreachableError`."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the hub's client raises whatever its layers raise; the user needs one sentence
        raise UnreachableError(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__) from error
