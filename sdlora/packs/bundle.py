"""A pack as a unit to hand on: the file, a preview, what web UIs and the hub want beside it, and checksums; as a folder or a ZIP.

Whatever is opened is somebody else's: names, sizes and kinds of files are looked at before anything is written, and pickles and code are
never taken.
"""

import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from PIL import Image

from sdlora import hub, safeio
from sdlora.data import unzip
from sdlora.errors import UserError
from sdlora.packs import card, file, metadata, words
from sdlora.packs.privacy import Secrets, leaks

SUMS = "SHA256SUMS"
TAKEN = (".safetensors", ".png", ".jpg", ".jpeg", ".webp", ".json", ".md", ".txt")
BARE = (SUMS, "LICENSE", ".gitattributes")
"""Files that may have no ending, or none of those."""
WANTED = [*(f"*{suffix}" for suffix in TAKEN), *BARE]
"""Patterns of what is downloaded of a repository."""
LIMITS = unzip.Limits(files=1000, file_bytes=file.MAX_BYTES, total_bytes=2 * file.MAX_BYTES, ratio=100)
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest time that a ZIP can hold: the same pack makes the same bytes."""


@dataclass(frozen=True)
class Gallery:
    """Pictures that go with a pack: what each shows, by name; and the one that stands for it."""

    preview: Image.Image | None
    pictures: Mapping[str, tuple[Image.Image, str]]
    hidden: Secrets = field(default_factory=Secrets)


def files(path: Path, gallery: Gallery) -> dict[str, bytes]:
    """All files of the bundle of a pack, by name. Raises `UserError` if one of them tells more than the pack's privacy lets it."""
    pack = file.load(path)
    name = pack.name
    preview = gallery.preview or _thumbnail(pack)
    shown = [(own, prompt) for own, (_, prompt) in gallery.pictures.items()]
    if not shown and preview:
        shown = [(f"{name}.preview.png", pack.trigger)]
    texts = {f"{name}.json": card.sidecar(pack), "README.md": card.model_card(pack, shown)}
    found = leaks({**texts, "pictures": "\n".join(gallery.pictures)}, gallery.hidden, pack.metadata.get("sdlora.privacy", "public"))
    if found:
        raise UserError("E-PACK-09", f"the bundle would tell {'; '.join(found[:5])}", path, "give it another title, trigger or prompt")
    made = {f"{name}.safetensors": path.read_bytes(), **{own: text.encode() for own, text in texts.items()}}
    beside = path.with_name(f"{name}{words.BESIDE}")
    made |= {beside.name: beside.read_bytes()} if beside.is_file() else {}
    made |= {own: _png(picture) for own, (picture, _) in gallery.pictures.items()}
    made |= {f"{name}.preview.png": _png(preview)} if preview else {}
    return dict(sorted(made.items())) | {SUMS: sums(made)}


def sums(made: Mapping[str, bytes]) -> bytes:
    """As `sha256sum` writes and checks them."""
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(made.items())).encode()


def write(out: Path, made: Mapping[str, bytes]) -> None:
    """Put a bundle at `out`: a ZIP if it is called so, else a new folder."""
    if out.suffix.lower() == ".zip":
        safeio.write(out, zipped(made))
        return
    if out.exists():
        raise UserError(
            "E-PACK-11", "there is something here already, and nothing is written over it", out, "name another folder with --out"
        )
    safeio.write_tree(out, made.items())


def zipped(made: Mapping[str, bytes]) -> bytes:
    """A ZIP that depends on the files alone: stored as they are, in order, all of one time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sorted(made.items()):
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            archive.writestr(entry, content)
    return buffer.getvalue()


def read(source: str) -> dict[str, bytes]:
    """All files of a bundle, of a single pack, or of a repository of the hub (`owner/name` or `owner/name@revision`).

    Raises `UserError` for what must not be taken: other kinds of files, links, names that lead elsewhere, too much, sums that are wrong.
    """
    path = Path(source)
    if not path.exists() and hub.is_id(source):
        try:
            _small_enough(source)
            path = hub.download(source, WANTED)
        except hub.UnreachableError as error:
            what = f'"{source}" is no file here and could not be had from the hub: {error}'
            raise UserError("E-PACK-02", what, source, "check the name and the connection") from error
        found = _folder(path, links=True)
    elif path.is_dir():
        found = _folder(path, links=False)
    elif unzip.is_archive(path):
        found = _archive(path)
    else:
        file.load(path)
        return {path.name: path.read_bytes()}
    _check(found, source)
    return found


def _small_enough(source: str) -> None:
    """Refuse a repository before anything of it is downloaded, if what would be is too much."""
    sizes = {name: size for name, size in hub.sizes(source).items() if any(fnmatch(name, wanted) for wanted in WANTED)}
    wrong = [f"it holds {len(sizes)} files"] if len(sizes) > LIMITS.files else []
    wrong += [f"{sum(sizes.values()) / 1e9:.1f} GB would be downloaded"] if sum(sizes.values()) > LIMITS.total_bytes else []
    wrong += [f"{name} has {size / 1e9:.1f} GB" for name, size in sizes.items() if size > LIMITS.file_bytes]
    _refuse(wrong, source)


def packs(found: Mapping[str, bytes]) -> list[str]:
    """Names of the packs among files; embeddings beside one are none."""
    names = [name for name in found if name.endswith(".safetensors")]
    return [name for name in names if not (name.endswith(words.BESIDE) and f"{name.removesuffix(words.BESIDE)}.safetensors" in names)]


def _check(found: Mapping[str, bytes], source: str) -> None:
    if not packs(found):
        raise UserError("E-PACK-12", "no pack lies in it", source, "name a bundle, a .safetensors file or a repository with one")
    if SUMS not in found:
        return
    wanted = {name: digest for digest, _, name in (line.partition("  ") for line in found[SUMS].decode("utf-8", "replace").splitlines())}
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is not in {SUMS}" for name in found if name not in wanted and name not in BARE]
    wrong += [
        f"{name} is not what its checksum says"
        for name, content in found.items()
        if name in wanted and hashlib.sha256(content).hexdigest() != wanted[name]
    ]
    if wrong:
        raise UserError("E-PACK-13", f"this bundle is damaged or was changed: {'; '.join(wrong[:5])}", source, "get it again")


def _folder(path: Path, links: bool) -> dict[str, bytes]:
    """Files of a folder, by their names inside it. The hub's cache holds links to its own files, any other folder must hold none."""
    found = [one for one in sorted(path.rglob("*")) if not one.is_dir() or one.is_symlink()]
    wrong = [f"{one.name} is a link" for one in found if one.is_symlink() and not (links and one.is_file())]
    wrong += [f"{one.name} is no regular file" for one in found if not one.is_symlink() and not one.is_file()]
    sizes = [one.stat().st_size for one in found if one.is_file()]
    wrong += [f"it holds {len(found)} files"] if len(found) > LIMITS.files else []
    wrong += ["it is too large"] if sum(sizes) > LIMITS.total_bytes or max(sizes, default=0) > LIMITS.file_bytes else []
    names = [one.relative_to(path).as_posix() for one in found]
    _refuse([*wrong, *map(_strange, names)], str(path))
    return {name: one.read_bytes() for name, one in zip(names, found, strict=True)}


def _archive(path: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            wrong = unzip.problems(entries, path.stat().st_size, LIMITS)
            names = [entry.filename for entry in entries if not entry.is_dir()]
            _refuse([*wrong, *map(_strange, names)], str(path))
            return {name: archive.read(name) for name in names}
    except unzip.DAMAGE as error:
        raise UserError("E-PACK-13", f"this ZIP cannot be read: {error}", path, "get it again") from None


def _strange(name: str) -> str:
    """Why a file is not taken, by its name; empty if it is."""
    suffix = PurePosixPath(name).suffix.lower()
    if PurePosixPath(name).name in BARE or suffix in TAKEN:
        return ""
    return f"{name} is no file of a pack: pickles can run code, and programs are code"


def _refuse(wrong: list[str], source: str) -> None:
    said = [one for one in wrong if one]
    if said:
        raise UserError("E-PACK-12", f"nothing of it is taken: {'; '.join(said[:5])}", source, "take those out, if you trust the rest")


def _thumbnail(pack: file.Pack) -> Image.Image | None:
    url = pack.metadata.get("modelspec.thumbnail", "")
    return metadata.picture_of(url) if url else None


def _png(picture: Image.Image) -> bytes:
    """The pixels alone: nothing of what a picture's file says beside them goes along."""
    buffer = io.BytesIO()
    plain = Image.new("RGB", picture.size)
    plain.paste(picture.convert("RGB"))
    plain.save(buffer, "PNG")
    return buffer.getvalue()
