"""Which pictures the folders of a run hold, whether each can be read, and what is said about it; every one is accounted for."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sdlora.config import Folder
from sdlora.data import hints, masks
from sdlora.data.layouts import Picture, understand
from sdlora.data.looks import Look
from sdlora.data.pixels import UnreadableError
from sdlora.data.store import Store
from sdlora.data.unzip import is_archive, unzip
from sdlora.data.walk import SUFFIXES, Found, shown, walk
from sdlora.errors import UserError

LISTED = 20  # problems that one error names
DECODERS = 4  # pictures decoded at once; the largest allowed takes 800 MB


@dataclass(frozen=True)
class Item:
    """A picture that is used; the notes are codes of `sdlora.data.reasons`."""

    path: Path
    width: int  # px, after the orientation that the camera noted is applied
    height: int
    look: Look
    captions: tuple[str, ...]  # as they are written, one of which is said in each sample; none where nothing says one
    mask: Path | None = None  # a picture of the same shape whose black parts do not count; its own path where its transparency says so
    repeats: int = 1  # times that an epoch shows it
    weight: float = 1.0  # of its loss
    regularisation: bool = False
    notes: tuple[str, ...] = ()
    held_out: bool = False  # never trained on, but measured by


@dataclass(frozen=True)
class LeftOut:
    path: Path
    why: tuple[str, ...]  # codes of `sdlora.data.reasons`
    detail: str = ""


@dataclass(frozen=True)
class Account:
    """What was found: every picture is either used or left out for a reason, and every other file that concerns pictures is named."""

    used: Sequence[Item]
    left_out: Sequence[LeftOut]
    strays: Sequence[LeftOut] = ()  # captions and masks of no picture, and formats that are not read
    roots: Sequence[Path] = ()  # the folders that were read

    def name(self, path: Path) -> str:
        """A file's name as reports show it: relative to its folder, with that folder's name where there are several."""
        inside = [root for root in self.roots if path.is_relative_to(root)]
        root = max(inside, key=lambda root: len(root.parts), default=path.parent)
        if sum(other.name == root.name for other in self.roots) > 1:
            return shown(path)
        return shown(path.relative_to(root.parent if len(self.roots) > 1 else root).as_posix())

    def line(self) -> str:
        found = len(self.used) + len(self.left_out)
        own = sum(bool(item.captions) and "caption-from-folder" not in item.notes for item in self.used)
        counts = {
            "with a caption of the folder's name": sum("caption-from-folder" in item.notes for item in self.used),
            "with a mask": sum(item.mask is not None for item in self.used),
            "for regularisation": sum(item.regularisation for item in self.used),
            "held out to measure by": sum(item.held_out for item in self.used),
        }
        also = "".join(f", {count} {what}" for what, count in counts.items() if count)
        trained = [item.repeats for item in self.used if not item.held_out]
        samples = sum(trained)
        if samples > len(trained):
            also += f", {samples} samples an epoch"
        line = f"{found} pictures found, {len(self.used)} used ({own} with a caption of their own{also})"
        if self.left_out:
            line += f", {len(self.left_out)} left out ({self._reasons(self.left_out)})"
        return line + (f"; {len(self.strays)} other files ({self._reasons(self.strays)})" if self.strays else "")

    def _reasons(self, files: Sequence[LeftOut], most: int = 5) -> str:
        reasons = "; ".join(f"{self.name(out.path)}: {out.detail or ', '.join(out.why)}" for out in files[:most])
        return reasons + ("; ..." if len(files) > most else "")


def scan(folder: Path, skip_unreadable: bool) -> Account:
    """`scan_all` for one folder of pictures."""
    return scan_all([Folder(folder=str(folder))], skip_unreadable, folder.parent)


def scan_all(
    folders: Sequence[Folder], skip_unreadable: bool, unpacked: Path, store: Store | None = None, alpha_mask: bool = False
) -> Account:
    """Read the layout of each folder and decode every picture that the store does not know; ZIPs are unpacked below `unpacked`. With
    `alpha_mask` the transparency of a picture that has no mask is its mask.

    Raises one `UserError` that lists all that is wrong, unless it is unreadable pictures and those are to be skipped.
    """
    paths = [Path(folder.folder) for folder in folders]
    roots = [unzip(path, unpacked) if is_archive(path) else path for path in paths]
    _refuse_twins(roots)
    kept = store or Store()
    layouts = [understand(root, _found(root, roots)) for root in roots]
    pictures = [(picture, folder) for folder, layout in zip(folders, layouts, strict=True) for picture in layout.pictures]
    with ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1)) as pool:  # decoders and filters let other threads run
        decoded = list(pool.map(lambda pair: _decode(pair[0], pair[1], alpha_mask, kept), pictures))
    used = [one for one in decoded if isinstance(one, Item)]
    left_out = [LeftOut(one.path, one.notes) for layout in layouts for one in layout.lost]
    left_out += [one for one in decoded if isinstance(one, LeftOut)]
    strays = [LeftOut(one.path, one.notes) for layout in layouts for one in layout.strays]
    account = Account(used, left_out, strays, roots)
    problems = [problem for layout in layouts for problem in [*layout.problems, *layout.unlisted]]
    _refuse(account, problems, skip_unreadable, ", ".join(map(str, paths)))
    return account


def _found(root: Path, roots: Sequence[Path]) -> list[Found]:
    """The files below one root; what lies in another root that is inside it belongs to that one."""
    top = root.resolve()
    inner = [root / other.resolve().relative_to(top) for other in roots if other is not root and other.resolve().is_relative_to(top)]
    return [one for one in walk(root) if not any(one.path.is_relative_to(other) for other in inner)]


def _refuse_twins(roots: Sequence[Path]) -> None:
    real = [root.resolve() for root in roots]
    for root in roots:
        if real.count(root.resolve()) > 1:
            what = "this folder is named twice, so that its pictures would count twice"
            raise UserError("E-DATA-06", what, root, "name it once in data.folder and data.folders, with repeats if need be")


def _decode(picture: Picture, folder: Folder, alpha_mask: bool, store: Store) -> Item | LeftOut:
    try:
        seen = hints.see(picture.path, store)
        if picture.mask:
            mask = hints.see(picture.mask, store).look
            masks.check(picture.mask.name, (mask.width, mask.height), (seen.look.width, seen.look.height))
    except UnreadableError as error:
        return LeftOut(picture.path, (error.code,), str(error))
    own = alpha_mask and not picture.mask and seen.transparent
    return Item(
        picture.path,
        seen.look.width,
        seen.look.height,
        seen.look,
        picture.captions,
        picture.path if own else picture.mask,
        picture.repeats * folder.repeats,
        folder.weight,
        folder.kind == "regularisation",
        tuple(dict.fromkeys([*picture.notes, *seen.notes, *["alpha-as-mask"] * own])),
        folder.kind == "validation",
    )


def _refuse(account: Account, problems: Sequence[str], skip_unreadable: bool, where: str) -> None:
    """Raise what stands in the way of a run, all of it at once."""
    bad = [] if skip_unreadable else [f"{account.name(out.path)}: {out.detail or ', '.join(out.why)}" for out in account.left_out]
    found = len(account.used) + len(account.left_out)
    wrong = [f"{len(bad)} of {found} pictures cannot be used: {listed(bad)}"] if bad else []
    if problems:
        wrong.append(f"{len(problems)} faults in captions: {listed(problems)}")
    if wrong:
        todo = "mend or remove them" + (", or leave such pictures out with --set data.skip_unreadable=true" if bad else "")
        raise UserError("E-DATA-04" if problems else "E-DATA-03", "; ".join(wrong), where, todo)
    if not account.used:
        unread = [account.name(out.path) for out in account.strays if "format-not-read" in out.why]
        what = "no usable picture in this folder" + (f"; formats that are not read: {listed(unread)}" if unread else "")
        raise UserError("E-DATA-02", what, where, f"pictures end in {', '.join(sorted(SUFFIXES))}")
    if all(item.regularisation or item.held_out for item in account.used):
        what = "all pictures are for regularisation or validation, none shows what is learnt"
        raise UserError("E-DATA-02", what, where, "name a folder of those too")


def listed(lines: Sequence[str]) -> str:
    """Problems in one line, the first of them where there are many."""
    return "; ".join(lines[:LISTED]) + (f"; and {len(lines) - LISTED} more" if len(lines) > LISTED else "")
