"""A base model's files in diffusers layout: configs, weights and tokenizers by component, and what is wrong with them."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch import dtype as DType
from transformers import CLIPTokenizer

from sdlora.errors import UserError

WHOLE = "check that its download is complete"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
CONVERT = (
    "load it where you trust it and save it again as safetensors, for example with diffusers: "
    "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
)
VARIANT = "fp16"
"""Some folders hold no other weights."""
INDEX = "model_index.json"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
WEIGHTS = re.compile(r"[A-Za-z_]+(\.fp16)?(-\d+-of-\d+)?\.safetensors")
"""Names of weight files, in full precision or half of it; whatever else lies beside them (`non_ema`, other formats) is not needed."""


@dataclass(frozen=True)
class Place:
    """Where a base's files keep a weight: a tensor, or some of its rows, or a tensor with its axes exchanged."""

    file: Path
    tensor: str
    rows: tuple[int, int] | None = None
    turned: bool = False

    def put(self, held: Tensor, weight: Tensor) -> None:
        """Write a weight, as the network has it, into the tensor that the file holds, in that one's number format."""
        target = self._part(held)
        target.copy_((weight.t() if self.turned else weight).reshape(target.shape))

    def get(self, held: Tensor, shape: Sequence[int]) -> Tensor:
        """The weight in its shape in the network, of the tensor that the file holds."""
        part = self._part(held)
        return (part.t() if self.turned else part).reshape(*shape)

    def _part(self, held: Tensor) -> Tensor:
        return held if self.rows is None else held[self.rows[0] : self.rows[1]]


class Source(ABC):
    """Where a base lies. `part` is a component as diffusers calls it: `unet`, `vae`, `text_encoder`, `scheduler` ..."""

    path: Path

    @abstractmethod
    def config(self, part: str) -> dict[str, Any]:
        """Settings of a component; of the whole where `part` is "". Raises `UserError` if they cannot be read."""

    @abstractmethod
    def fingerprint(self, part: str) -> str:
        """SHA-256 of the files that hold a component's weights, so that caches and packs know which weights they belong to."""

    @abstractmethod
    def precision(self, part: str) -> list[str]:
        """Names of the number formats of a component's weights, as safetensors has them: F16, BF16, F32."""

    @abstractmethod
    def model(self, kind: Any, part: str, dtype: DType) -> Any:
        """A component with all its weights, on the CPU. Raises `UserError` if anything is missing."""

    @abstractmethod
    def tokenizer(self, part: str) -> CLIPTokenizer:
        """A tokenizer, `tokenizer` or `tokenizer_2`."""

    @abstractmethod
    def places(self, part: str) -> dict[str, Place]:
        """Where each tensor of a component lies, by its name in the network; `text_model.` may be missing before it."""

    @abstractmethod
    def says_prediction(self) -> bool:
        """Whether anything in the files says what the network predicts; else `config("scheduler")` has what is usual."""


class Folder(Source):
    """A folder in diffusers layout; of its files only `chosen` count, by their paths inside it, where such are named."""

    def __init__(self, path: Path, chosen: Collection[str] | None = None) -> None:
        self.path, self.chosen = path, chosen
        code = next(iter([*path.glob("*.py"), *path.glob("*/*.py")]), None)
        if code:
            what = "this model brings code of its own, which is never run here"
            raise UserError("E-BASE-09", what, code, "take the file away if you do not need it, or use another model")

    def config(self, part: str) -> dict[str, Any]:
        names = {"": INDEX, "scheduler": "scheduler_config.json"}
        return read_json(self.path / part / names.get(part, "config.json"))

    def fingerprint(self, part: str) -> str:
        digest = hashlib.sha256()
        for path in self._files(part):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def model(self, kind: Any, part: str, dtype: DType) -> Any:
        folder = self._at(part)
        self._check_class(kind.__name__, part)
        files = self._files(part)
        if not files:
            pickled = next((path for path in sorted(folder.glob("*")) if path.suffix in PICKLES), None)
            if pickled:
                raise UserError("E-BASE-08", "only pickled weights, which can run code and are never opened", pickled, CONVERT)
            raise UserError("E-BASE-07", f"the weights of its {part} are missing", folder, WHOLE)
        check_precision(part, folder, self.precision(part))
        named = "dtype" if issubclass(kind, nn.Module) and kind.__module__.startswith("transformers") else "torch_dtype"
        options = {
            named: dtype,
            "use_safetensors": True,
            "local_files_only": True,
            "variant": VARIANT if f".{VARIANT}" in files[0].name else None,
        }
        model, told = kind.from_pretrained(str(folder), output_loading_info=True, **options)
        check_complete(part, folder, told["missing_keys"])
        return model

    def tokenizer(self, part: str) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(str(self.path), subfolder=part, local_files_only=True)

    def precision(self, part: str) -> list[str]:
        return precisions(one for path in self._files(part) for one in header(path)[0].values())

    def places(self, part: str) -> dict[str, Place]:
        return {name: Place(path, name) for path in self._files(part) for name in header(path)[0]}

    def says_prediction(self) -> bool:
        return "prediction_type" in self.config("scheduler")

    def _at(self, part: str) -> Path:
        """Where a component lies."""
        return self.path / part

    def _files(self, part: str) -> list[Path]:
        """The files that hold a component's weights: of several versions the plain one."""
        found = [path for path in sorted(self._at(part).glob("*.safetensors")) if "non_ema" not in path.name]
        if self.chosen is not None:
            found = [path for path in found if path.relative_to(self.path).as_posix() in self.chosen]
        return [path for path in found if f".{VARIANT}" not in path.name] or found

    def _check_class(self, wanted: str, part: str) -> None:
        config = self.config(part)
        said = [config.get("_class_name"), *(config.get("architectures") or []), (self.config("").get(part) or [None, None])[-1]]
        other = next((name for name in said if name not in (None, wanted)), None)
        if other is not None:
            what = f"its {part} is called {other}, where this family has {wanted}"
            raise UserError("E-BASE-10", what, self.path / part / "config.json", "get the model again from where it was published")


def needed(files: Sequence[str], half: bool, parts: Sequence[str] = PARTS) -> list[str]:
    """What is needed of the files of a model in diffusers layout: of each component's weights one version, in half precision if asked."""
    found = [name for name in files if name == INDEX]
    for part in parts:
        inside = [name for name in files if name.rpartition("/")[0] == part]
        weights = {name: match for name in inside if (match := WEIGHTS.fullmatch(name.rpartition("/")[2]))}
        versions = [[name for name, match in weights.items() if bool(match[1]) == version] for version in (half, not half)]
        found += [name for name in inside if name.endswith((".json", ".txt")) and name not in found]
        found += versions[0] or versions[1]
    return found


def only_pickled(files: Sequence[str], parts: Sequence[str] = PARTS) -> Iterator[str]:
    """Of the components that have weights, but none that can be opened: a file of each."""
    for part in parts:
        inside = [name for name in files if name.rpartition("/")[0] == part]
        if not any(name.endswith(".safetensors") for name in inside):
            yield from [name for name in inside if name.endswith(PICKLES)][:1]


def check_complete(part: str, where: Path, missing: Any) -> None:
    """Raise `UserError` if weights that a component needs are missing."""
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError("E-BASE-07", f"weights of its {part} are missing: {min(missing)}{more}", where, WHOLE)


def precisions(tensors: Iterable[dict[str, Any]]) -> list[str]:
    """The formats of broken numbers among tensors that are given as their headers."""
    return sorted({one["dtype"] for one in tensors if one["dtype"].startswith(("F", "BF"))})


def check_precision(part: str, where: Path, found: Sequence[str]) -> None:
    """Raise `UserError` if a component's weights are of several precisions."""
    if len(found) > 1:
        what = f"the weights of its {part} are partly {' and partly '.join(found)}: they come from different files"
        raise UserError("E-BASE-11", what, where, "get all of it again from one place")


def header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """dtype, shape and place of each tensor in a safetensors file, by name, and its metadata.

    Raises `UserError` for what is no such file, or is cut short.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            found: dict[str, dict[str, Any]] = json.loads(file.read(length)) if length < size else {}
    except (OSError, ValueError) as error:
        raise UserError("E-BASE-05", f"these weights cannot be read: {error}", path, WHOLE) from None
    said: dict[str, str] = found.pop("__metadata__", {})
    end = max((one["data_offsets"][1] for one in found.values()), default=0)
    if not found or 8 + length + end > size:
        raise UserError("E-BASE-05", "these weights are cut short, or no safetensors file", path, WHOLE)
    return found, said


def read_json(path: Path) -> dict[str, Any]:
    """A config file of a base."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("E-BASE-05", f"this model's config cannot be read: {error}", path, WHOLE) from None
    if not isinstance(value, dict):
        raise UserError("E-BASE-05", "this model's config is no JSON object", path, WHOLE)
    return value
