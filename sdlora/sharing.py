"""Packs between their making and others' hands: looked at, judged, described anew, bundled, sent to the hub, and taken from elsewhere."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdlora import family, hub, safeio, settings
from sdlora.errors import UserError, escape_surrogates
from sdlora.packs import bundle, card, file, header, metadata, outline, precision, privacy, readers, strict
from sdlora.packs.bundle import Gallery
from sdlora.packs.pipelines import Pack
from sdlora.packs.privacy import Secrets
from sdlora.packs.readers import Reading
from sdlora.studio import Studio

BROKEN_NAMES = ("checkpoint", "optimizer", "scheduler")
"""Words in a file's name for which diffusers passes it over when it looks for the pack of a repository."""


def opened(path: Path) -> Pack:
    """A pack from its file, or the only one of a bundle."""
    if path.is_file() and path.suffix.lower() != ".zip":
        return Pack.open(path)
    if not path.exists():
        return Pack.open(path)
    found = bundle.read(str(path))
    names = bundle.packs(found)
    if len(names) > 1:
        raise UserError("E-PACK-12", f"several packs lie in it: {', '.join(names)}", path, "name one of them")
    with safeio.scratch_folder() as place:
        safeio.write(Path(place) / Path(names[0]).name, found[names[0]], durable=False)
        return Pack.open(Path(place) / Path(names[0]).name)


def check(path: Path, base: str = "") -> list[Reading]:
    """What each program makes of a pack. Its layers are looked up in `base`, else in the true model that it is for."""
    pack = opened(path)
    named = base or (pack.base if pack.base == "tiny" else "")
    if not named and pack.metadata.get("ss_base_model_version", "").startswith("sdlora"):
        what = f"this pack is for {pack.base}, which is none of the models whose layers are known"
        raise UserError("E-PACK-14", what, path, "name that base with --base")
    layers = outline.of(family.load(family.find(named), torch.device("cpu"), torch.float32).layers()) if named else None
    return readers.check(pack.tensors, pack.metadata, layers)


def edit(path: Path, changes: Mapping[str, str], thumbnail: Path | None = None, out: Path | None = None) -> Path:
    """Change fields of a pack's header; the tensors' bytes stay as they are. Written in place unless `out` is given."""
    fields = dict(changes)
    if thumbnail:
        try:
            with Image.open(thumbnail) as picture:
                url = metadata.data_url(picture)
        except OSError as error:
            raise UserError("E-PACK-10", f"this picture cannot be read: {error}", thumbnail, "name a PNG or JPEG") from None
        fields |= {"modelspec.thumbnail": url, "ssmd_cover_images": json.dumps([url.partition(",")[2]])}
    raw = header.edited(header.read(path), fields)
    safeio.write(out or path, header.assembled(raw))
    return out or path


def changes(assignments: list[str], trigger: str | None = None, scale: float | None = None) -> dict[str, str]:
    """Fields of a header from `key=value` lines, and those that go with a trigger and a scale."""
    found = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            what = f'"{assignment}" is not of the form KEY=VALUE'
            raise UserError("E-PACK-10", what, "--set", "write for example --set modelspec.title=Mira")
        if escape_surrogates(assignment) != assignment:
            raise UserError(
                "E-PACK-10", f'"{assignment}" is no text, as it is no UTF-8', "--set", "type it anew, in a terminal that sends UTF-8"
            )
        found[key] = value
    if trigger is not None:
        found |= {"modelspec.trigger_phrase": trigger, "trained_words": trigger}
    if scale is not None:
        found["sdlora.recommended_scale"] = str(scale)
    return found


def bundled(source: Path) -> dict[str, bytes]:
    """The files of a bundle of a run's pack, or of a pack; the pictures of the run that it lies in go along."""
    path = source
    if source.is_dir():
        found = [source / name for name in bundle.packs({one.name: b"" for one in sorted(source.glob("*.safetensors"))})]
        if len(found) != 1:
            raise UserError("E-RUN-04", f"{len(found)} packs lie in this folder", source, "name the .safetensors file")
        path = found[0]
    return bundle.files(path, _gallery(path))


FACTS = {"ss_num_train_images": "1", "ss_steps": "1", "ss_network_dim": "1", "modelspec.author": "a", "modelspec.license": "a"}
"""Of a pack whose card says all that cards may say."""


def _gallery(path: Path) -> Gallery:
    """The strip of the run that a pack lies in, and what the run knows that must not be told."""
    run, pack = path.parent, file.load(path)
    if not (run / "config.toml").is_file():
        return Gallery(None, {})
    shown, hidden = {}, _secrets(run, pack)
    labels = settings.read(run / "config.toml").get("preview", {}).get("prompts", [])
    if (run / "strip.png").is_file() and privacy.scrubbed(labels, hidden) == labels:  # they stand in the picture
        with Image.open(run / "strip.png") as strip:
            shown[f"{pack.name}-strip.png"] = (strip.copy(), pack.trigger)
    return Gallery(None, shown, hidden)


def _secrets(run: Path, pack: file.Pack) -> Secrets:
    """Names and captions of the pictures, as the run's ledger has them."""
    table = settings.read(run / "config.toml")
    published = " ".join([*pack.metadata.get("modelspec.tags", "").split(","), pack.metadata.get("modelspec.description", "")]).lower()
    try:
        ledger = json.loads((run / "ledger.json").read_text("utf-8"))
    except (OSError, ValueError):
        return Secrets()
    names = {row["file"] for row in ledger.get("pictures", [])}
    folder = Path(table.get("data", {}).get("folder", "")).name
    said = {caption for row in ledger.get("pictures", []) for caption in row.get("captions", [])}
    usual = card.model_card(file.Pack("pack", {}, FACTS), [("picture.png", "")])  # of whose words none is a secret
    known = f"{published} {pack.trigger} {pack.name} {pack.metadata.get('modelspec.title', '')} {usual}".lower()
    kept = [word for word in {*names, folder} if len(word) > 5 and word.lower() not in known]
    return Secrets(frozenset(kept), frozenset(word for word in said if len(word) > 5 and word.lower() not in known))


@dataclass(frozen=True)
class Push:
    """What would be sent to the hub."""

    repository: str
    files: dict[str, bytes]
    private: bool

    def lines(self) -> list[str]:
        """Each file with its size, and what of it becomes public."""
        seen = "visible to you alone" if self.private else "visible to everybody"
        lines = [f"repository {self.repository}, {seen}"]
        lines += [f"{name}  {len(content):,} bytes" for name, content in self.files.items()]
        for name in bundle.packs(self.files):
            said = strict.parse(self.files[name], name)[1]
            lines.append(f"{name} tells: {', '.join(f'{key} = {said[key][:60]}' for key in sorted(said) if key in TOLD)}")
            level = said.get("sdlora.privacy", "not said: another program wrote it")
            lines.append(f"its privacy is {level}; all of its {len(said)} fields: sdlora pack inspect")
        return lines

    def send(self) -> str:
        """Send it; gives the address."""
        name = next((name for name in bundle.packs(self.files) if any(word in name for word in BROKEN_NAMES)), "")
        if name:
            what = f"{name}: diffusers passes over packs with {', '.join(BROKEN_NAMES)} in their names"
            raise UserError("E-PACK-16", what, self.repository, "rename it")
        try:
            return hub.upload(self.repository, self.files, self.private, f"Pack {', '.join(bundle.packs(self.files))}")
        except hub.UnreachableError as error:
            raise UserError("E-PACK-17", f"it could not be sent: {error}", self.repository, "set HF_TOKEN, and check the name") from error


TOLD = ("modelspec.author", "modelspec.title", "modelspec.trigger_phrase", "modelspec.description", "ss_tag_frequency", "sdlora.base")
"""Fields that say most about who made a pack of what."""


def push(source: Path, repository: str, private: bool = True) -> Push:
    """What would be sent for a pack, a run or a bundle. Raises `UserError` if it is none, or no repository can be called so."""
    if not hub.is_id(repository):
        raise UserError("E-PACK-16", f'"{repository}" is no name of a repository', repository, "write owner/name")
    ready = source.suffix.lower() == ".zip" or (source.is_dir() and (source / bundle.SUMS).is_file())
    return Push(repository, bundle.read(str(source)) if ready else bundled(source), private)


def take(source: str, out: Path) -> list[dict[str, Any]]:
    """Take a bundle, a file or a repository of the hub into a new folder; says what its packs are."""
    found = bundle.read(source)
    with safeio.scratch_folder() as place:  # looked at before it has its name
        for name in bundle.packs(found):
            safeio.write(Path(place) / name, found[name], durable=False)
        told = [card.about(Path(place) / name) for name in bundle.packs(found)]
    if out.suffix.lower() == ".zip":
        raise UserError("E-PACK-11", "a bundle is opened into a folder", out, "name a folder with --out")
    bundle.write(out, found)
    return told


def convert(path: Path, layout: str, out: Path, dtype: str = "fp16", base: str = "") -> list[str]:
    """Write a pack of any layout and kind in another, for the base it was made for or the named one; returns what is to be known of it."""
    pack = file.load(path)
    if dtype not in precision.DTYPES:
        raise UserError("E-PACK-34", f'there is no precision "{dtype}"', "--dtype", f"choose one of: {', '.join(precision.DTYPES)}")
    studio = Studio.open(family.find(base or pack.base or "tiny"), torch.float32)
    tensors = file.converted(pack, studio.bank, studio.family, layout, precision.DTYPES[dtype])
    left_out = (*file.HASHES, "lora_adapter_metadata", "sshs_legacy_hash")  # of other tensors, or of scales that are in these now
    header = {key: value for key, value in pack.metadata.items() if key not in left_out} | studio.family.architecture()
    file.save(out, tensors, lambda sha256: header | {"sshs_model_hash": sha256, "modelspec.hash_sha256": f"0x{sha256}"})
    return [f"{len(tensors)} tensors in {layout} layout, {dtype}: {out}"]
