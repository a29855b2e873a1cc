"""Models from the hub, downloaded once and kept by huggingface_hub; the one place that uses the network."""

import re
from collections.abc import Sequence
from pathlib import Path


class UnreachableError(Exception):
    """A model could not be had; the message is one line that says why."""


def is_id(name: str) -> bool:
    """Whether a model could be called so there: owner/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def download(name: str, files: Sequence[str]) -> Path:
    """The folder that holds those files of a model, which may be patterns. Raises `UnreachableError`."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the hub's client raises whatever its layers raise; the user needs one sentence
        raise UnreachableError(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__) from error
