"""Which pictures a folder holds, whether each can be read, and what is said about it; every one is accounted for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdlora.data.pixels import UnreadableError, read_picture
from sdlora.data.walk import SUFFIXES, shown, walk
from sdlora.errors import UserError


@dataclass(frozen=True)
class Item:
    path: Path
    width: int  # px, after the orientation that the camera noted is applied
    height: int
    caption: str | None  # of the `.txt` beside the picture; None without one


@dataclass(frozen=True)
class LeftOut:
    path: Path
    why: str


@dataclass(frozen=True)
class Account:
    """What was found in a folder: every picture is either used or left out for a reason."""

    used: Sequence[Item]
    left_out: Sequence[LeftOut]

    def line(self) -> str:
        found = len(self.used) + len(self.left_out)
        captions = sum(item.caption is not None for item in self.used)
        line = f"{found} pictures found, {len(self.used)} used ({captions} with a caption of their own)"
        if self.left_out:
            reasons = "; ".join(f"{shown(out.path.name)}: {out.why}" for out in self.left_out[:5])
            line += f", {len(self.left_out)} left out ({reasons}{'; ...' if len(self.left_out) > 5 else ''})"
        return line


def scan(folder: Path, skip_unreadable: bool) -> Account:
    """Decode every picture of a folder once. Raises one `UserError` that lists all unreadable ones, unless they are to be skipped."""
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise UserError("E-DATA-01", f"{what}; pictures are needed to train on", folder, "name the folder that holds them")
    used, bad, elsewhere = [], [], []
    for path in (one.path for one in walk(folder) if one.path.suffix.lower() in SUFFIXES):
        if path.parent != folder:
            elsewhere.append(LeftOut(path, "in a subfolder"))
            continue
        try:
            picture = read_picture(path)
            used.append(Item(path, picture.width, picture.height, read_caption(path.with_suffix(".txt"))))
        except UnreadableError as error:
            bad.append(LeftOut(path, str(error)))
    if bad and not skip_unreadable:
        listed = "; ".join(f"{shown(out.path.name)}: {out.why}" for out in bad)
        what = f"{len(bad)} of {len(bad) + len(used)} pictures cannot be used: {listed}"
        raise UserError("E-DATA-03", what, folder, "mend or remove them, or leave them out with --set data.skip_unreadable=true")
    if not used:
        kinds = ", ".join(sorted(SUFFIXES))
        inside = f"; {len(elsewhere)} lie in subfolders: name one of those" if elsewhere else ""
        raise UserError("E-DATA-02", f"no usable picture in this folder{inside}", folder, f"pictures end in {kinds}")
    return Account(used, [*bad, *elsewhere])


def read_caption(path: Path) -> str | None:
    """The text beside a picture on one line, or None. Raises `UnreadableError` when it is no UTF-8."""
    if not path.is_file():
        return None
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise UnreadableError(f"its caption {path.name} is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise UnreadableError(f"its caption {path.name} cannot be read: {error.strerror}") from None
