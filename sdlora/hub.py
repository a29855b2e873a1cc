"""Models from the hub, downloaded once and kept by huggingface_hub, and packs sent there; the one place that uses the network."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path


class UnreachableError(Exception):
    """A model could not be had; the message is one line that says why."""


def is_id(name: str) -> bool:
    """Whether a model could be called so there: owner/name, or owner/name@revision."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) is not None


def kept(name: str, file: str) -> Path | None:
    """A model's file, if it was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file)
    return Path(found) if isinstance(found, str) else None


def listed(name: str) -> list[str]:
    """The files of a model; those that were downloaded before, where the hub cannot be asked. Raises `UnreachableError`."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    place, _, revision = name.partition("@")
    try:
        return [*HfApi().list_repo_files(place, revision=revision or None)]
    except RevisionNotFoundError as error:
        raise UnreachableError(f'it has no revision "{revision}"') from error
    except Exception as error:  # the hub's client raises whatever its layers raise; the user needs one sentence
        try:
            folder = Path(snapshot_download(place, revision=revision or None, local_files_only=True))
        except Exception:  # the first reason is the one that helps
            raise UnreachableError(_reason(error)) from error
        return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def sizes(name: str) -> dict[str, int]:
    """Bytes of each file of a model; nothing where the hub cannot be asked, and so nothing can be downloaded."""
    from huggingface_hub import HfApi

    place, _, revision = name.partition("@")
    try:
        found = HfApi().model_info(place, revision=revision or None, files_metadata=True).siblings or []
    except Exception:  # the download will say why
        return {}
    return {one.rfilename: one.size or 0 for one in found}


def download(name: str, files: Sequence[str]) -> Path:
    """The folder that holds those files of a model, which may be patterns; it is called by the revision. Raises `UnreachableError`."""
    from huggingface_hub import snapshot_download

    place, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(place, revision=revision or None, allow_patterns=list(files)))
    except Exception as error:  # as above
        raise UnreachableError(_reason(error)) from error


def upload(name: str, files: Mapping[str, bytes], private: bool, message: str) -> str:
    """Put files into a repository of models as one commit, making it if there is none; gives the commit's address.

    The token is that of the environment, `HF_TOKEN`, and no other. Raises `UnreachableError`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    token = os.environ.get("HF_TOKEN")
    if not token:
        raise UnreachableError("HF_TOKEN is not set: it holds the token that may write there")
    try:
        api = HfApi(token=token)
        api.create_repo(name, repo_type="model", private=private, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in files.items()]
        return str(api.create_commit(name, operations, commit_message=message, repo_type="model").commit_url)
    except Exception as error:  # as above
        raise UnreachableError(_reason(error)) from error


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
