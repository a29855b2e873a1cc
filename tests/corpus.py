"""Bad and odd input, made by code: 44 cases of pictures and 22 of files and folders, each with what must come of it.

`python tests/corpus.py FOLDER` writes all of them, for a look.
"""

import io
import os
import socket
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

WIDTH, HEIGHT = 64, 48
PNG, IEND = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class Case:
    """`meant` is the picture that must come out, within `near` levels of 255 on average; `fate` and `codes` are those of each file."""

    number: int
    what: str
    fate: str  # left_out | warned | fixed | used
    codes: tuple[str, ...]
    files: Callable[[], Mapping[str, bytes]]
    meant: Callable[[], Image.Image] | None = None
    near: float = 1.0


@dataclass(frozen=True)
class FolderCase:
    """`build` fills an existing folder; `wanted` gives the codes of all that `walk` finds there, or is a `UserError`'s code."""

    number: int
    what: str
    build: Callable[[Path], None]
    wanted: Mapping[str, tuple[str, ...]] | str = field(default_factory=dict)


# ---------------------------------------------------------------- pictures


def colour() -> Image.Image:
    """Smooth, so that it survives JPEG, and different at each corner, so that it has one right way up."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / [[[HEIGHT - 1]], [[WIDTH - 1]]]
    return Image.fromarray((np.stack([60 + 150 * x, 60 + 150 * y, 200 - 120 * x * y], -1)).astype(np.uint8))


def grey() -> Image.Image:
    return colour().convert("L").convert("RGB")


def white() -> Image.Image:
    return Image.new("RGB", (WIDTH, HEIGHT), "white")


def half() -> Image.Image:
    """The left half of the picture on white."""
    picture = white()
    picture.paste(colour().crop((0, 0, WIDTH // 2, HEIGHT)))
    return picture


def two_colours() -> Image.Image:
    return colour().convert("L").point(lambda level: 255 * (level > 127)).convert("RGB")


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 97, "subsampling": 0} if kind in ("JPEG", "MPO") else {}) | options)  # type: ignore[arg-type]
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def header(width: int, height: int, depth: int = 8, kind: int = 2) -> bytes:
    return PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))


def png(rows: NDArray[np.generic], depth: int, kind: int, *extra: bytes) -> bytes:
    """A PNG of any depth: `rows` hold a row's bytes each."""
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    return header(WIDTH, HEIGHT, depth, kind) + b"".join(extra) + chunk(b"IDAT", zlib.compress(lines)) + IEND


def zeros(count: int) -> bytes:
    """A zlib stream of that many megabytes of zeros; written block by block, as compressing them would take long."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(10**6)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x78\x9c" + block * count + b"\x03\x00" + struct.pack(">HH", count * 10**6 % 65521, 1)


def bomb() -> bytes:
    """169 megapixels in 170 kB: one row more than fits, so that rows and whole megabytes meet."""
    return header(12999, 13000, 8, 0) + chunk(b"IDAT", zeros(169)) + IEND


def turned(orientation: int) -> Image.Image:
    """The picture as a camera stores it that was held that way; turning it back is what is tested, so this is by arrays."""
    upright = np.asarray(colour())
    swapped = upright.transpose(1, 0, 2)
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: swapped, 6: swapped[::-1],
              7: swapped[::-1, ::-1], 8: swapped[:, ::-1]}  # fmt: skip
    return Image.fromarray(np.ascontiguousarray(stored.get(orientation, upright)))


def exif(orientation: int, count: int = 1) -> bytes:
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", count, 274, 3, 1, orientation, 0, 0)


def rotated() -> dict[str, bytes]:
    files = {f"{n}.jpg": saved(turned(n), "JPEG", exif=exif(n)) for n in range(2, 9)}
    files |= {f"{kind}{n}.{kind.lower()}": saved(turned(n), kind, exif=exif(n)) for n in (2, 6) for kind in ("PNG", "WEBP", "AVIF")}
    return files | {f"TIFF{n}.tif": saved(turned(n), "TIFF", tiffinfo={274: n}) for n in range(2, 9)}


def plain_cmyk() -> NDArray[np.uint8]:
    """Inks without black, 0 to 255."""
    return np.concatenate([255 - np.asarray(colour()), np.zeros((HEIGHT, WIDTH, 1), np.uint8)], -1)


def cmyk_jpeg(adobe: bool) -> bytes:
    """Adobe stores the inks inverted and says so in a segment; without the segment they are as they are."""
    inks = Image.fromarray(plain_cmyk(), "CMYK")
    if adobe:
        return saved(inks, "JPEG")
    content = saved(Image.fromarray(255 - plain_cmyk(), "CMYK"), "JPEG")
    start = content.index(b"\xff\xeeA") if b"\xff\xeeA" in content else content.index(b"\xff\xee")
    return content[:start] + content[start + 2 + int.from_bytes(content[start + 2 : start + 4], "big") :]


def deep(picture: Image.Image) -> NDArray[np.uint16]:
    """16 bits whose lower halves are not their upper ones."""
    return (np.asarray(picture).astype(np.uint16) << 8) + 77


def floats() -> dict[str, bytes]:
    fractions = np.asarray(colour().convert("L")).astype(np.float32) / 255
    holed = fractions.copy()
    holed[0, :3] = [np.nan, np.inf, -np.inf]
    made = {"fractions": fractions, "levels": fractions * 255, "deep": fractions * 65535}
    return {f"{name}.tif": saved(Image.fromarray(values), "TIFF") for name, values in made.items()}


def holed() -> bytes:
    values = np.asarray(colour().convert("L")).astype(np.float32) / 255
    values[0, :3] = [np.nan, np.inf, -np.inf]
    return saved(Image.fromarray(values), "TIFF")


def palette(transparent: bool) -> bytes:
    """The picture's own 256 colours; the right half is of one that is transparent, if any is."""
    if not transparent:
        return saved(colour().quantize(256), "PNG")
    opaque = colour().quantize(255)
    colours = bytes(opaque.getpalette() or []).ljust(3 * 255, b"\0")[: 3 * 255]
    indices = np.asarray(opaque).copy()
    indices[:, WIDTH // 2 :] = 255
    picture = Image.fromarray(indices)
    picture.putpalette(colours + b"\0\xff\0")
    return saved(picture, "PNG", transparency=255)


def with_alpha(mode: str, right: int) -> bytes:
    """The picture, with its right half of that opacity and, where nothing shows, a colour that must not appear."""
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[:, WIDTH // 2 :] = right
    picture = colour().convert(mode.removesuffix("A"))
    picture.putalpha(Image.fromarray(alpha))
    return saved(picture, "PNG")


ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
"""From light in red, green and blue to XYZ under D50."""


def wide_profile() -> bytes:
    """Pillow's sRGB profile with the primaries of Adobe RGB (1998) in place of its own."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for place in range(132, 132 + 12 * int.from_bytes(content[128:132], "big"), 12):
        name, offset = bytes(content[place : place + 4]), int.from_bytes(content[place + 4 : place + 8], "big")
        if name in (b"rXYZ", b"gXYZ", b"bXYZ"):
            column = ADOBE_RGB[:, b"rgb".index(name[:1])]
            struct.pack_into(">3i", content, offset + 8, *(round(float(part) * 65536) for part in column))
    return bytes(content)


def wide() -> Image.Image:
    """The numbers that mean the picture under that profile."""
    level = np.asarray(colour()) / 255
    light = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    light = (light @ (np.linalg.inv(ADOBE_RGB) @ SRGB).T).clip(0, 1)
    level = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return Image.fromarray((level * 255 + 0.5).astype(np.uint8))


def animated(kind: str, picture: Image.Image | None = None, **options: object) -> bytes:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), name) for name in ("red", "blue")]
    return saved(picture or colour(), kind, save_all=True, append_images=frames, **options)


def polyglot() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("hidden.txt", "x" * 100)
    return saved(colour(), "JPEG") + file.getvalue()


def garbled() -> bytes:
    """A JPEG whose scan has wrong bits in the middle; nothing in the format can tell."""
    content = bytearray(saved(colour(), "JPEG"))
    content[-len(content) // 4] ^= 0x10
    return bytes(content)


def changed(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]


def one(name: str, make: Callable[[], bytes]) -> Callable[[], dict[str, bytes]]:
    return lambda: {name: make()}


def images() -> list[Case]:
    whole, jpeg = saved(colour(), "PNG"), saved(colour(), "JPEG")
    no, un = "damaged", "not-a-picture"
    pdf = b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF"
    tensors = struct.pack("<Q", 2) + b"{}"
    sides = {"90": (9000, 10000), "179": (17900, 10000), "3600": (60000, 60000)}
    return [
        Case(1, "no bytes", "left_out", ("empty-file",), one("a.png", lambda: b"")),
        Case(2, "one byte", "left_out", (un,), one("a.png", lambda: b"\x89")),
        Case(3, "PNG cut in half", "left_out", (no,), one("a.png", lambda: whole[: len(whole) // 2])),
        Case(4, "PNG without IEND", "warned", ("no-end-marker",), one("a.png", lambda: whole[:-12]), colour),
        Case(5, "PNG cut in its header", "left_out", (no,), one("a.png", lambda: whole[:20])),
        Case(6, "PNG with a wrong bit", "left_out", (no,), one("a.png", lambda: changed(whole, len(whole) // 2))),
        Case(7, "PNG header with a wrong sum", "left_out", (no,), one("a.png", lambda: changed(whole, 30))),
        Case(8, "JPEG cut in half", "left_out", (no,), one("a.jpg", lambda: jpeg[: len(jpeg) // 2])),
        Case(9, "JPEG without EOI", "warned", ("no-end-marker",), one("a.jpg", lambda: jpeg[:-2]), colour, 2),
        Case(10, "JPEG with garbage in its scan", "used", (), one("a.jpg", garbled)),
        Case(11, "web page", "left_out", (un,), one("a.jpg", lambda: b"<!DOCTYPE html><html>404</html>")),
        Case(12, "SVG", "left_out", (un,), one("a.png", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>')),
        Case(13, "PNG named .jpg", "fixed", ("wrong-extension",), one("a.jpg", lambda: whole), colour),
        Case(14, "PDF", "left_out", (un,), one("a.jpg", lambda: pdf)),
        Case(15, "EPS", "left_out", (un,), one("a.png", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n")),
        Case(16, "JPEG that is a ZIP too", "fixed", ("data-behind",), one("a.jpg", polyglot), colour, 2),
        Case(17, "safetensors", "left_out", (un,), one("a.png", lambda: tensors)),
        Case(18, "EXIF orientation 2 to 8", "fixed", ("exif-turned",), rotated, colour, 4),
        Case(19, "EXIF orientation 0 and 99", "fixed", ("exif-orientation-unknown",),
             lambda: {f"{n}.jpg": saved(colour(), "JPEG", exif=exif(n)) for n in (0, 99)}, colour, 2),
        Case(20, "EXIF of 65,535 entries", "warned", ("metadata-broken",),
             one("a.jpg", lambda: saved(colour(), "JPEG", exif=exif(1, 0xFFFF))), colour, 2),
        Case(21, "XMP that is no text", "fixed", ("xmp-broken",),
             one("a.jpg", lambda: saved(colour(), "JPEG", xmp=b"<x:xmpmeta>\xff\xfe\xe9")), colour, 2),
        Case(22, "CMYK", "fixed", ("cmyk",),
             lambda: {"a.tif": saved(Image.fromarray(plain_cmyk(), "CMYK"), "TIFF"), "b.jpg": cmyk_jpeg(False)}, colour, 2),
        Case(23, "CMYK, inverted as Adobe does", "fixed", ("cmyk",), one("a.jpg", lambda: cmyk_jpeg(True)), colour, 2),
        Case(24, "16-bit grey", "fixed", ("16-bit",), lambda: {
            "a.png": saved(Image.fromarray(deep(colour().convert("L"))), "PNG"),
            "b.tif": saved(Image.fromarray(deep(colour().convert("L"))), "TIFF")}, grey),
        Case(25, "16-bit RGB", "fixed", ("16-bit",), one("a.png", lambda: png(deep(colour()).astype(">u2"), 16, 2)), colour),
        Case(26, "floating-point TIFF", "fixed", ("float",), floats, grey),
        Case(26, "floating-point TIFF with holes", "fixed", ("float", "not-finite"), one("a.tif", holed), grey),
        Case(27, "1 bit", "fixed", ("1-bit",), one("a.png", lambda: saved(two_colours().convert("1"), "PNG")), two_colours),
        Case(28, "palette", "fixed", ("palette",), one("a.png", lambda: palette(False)), colour, 8),
        Case(29, "palette, a colour transparent", "fixed", ("palette", "alpha-on-ground"), one("a.png", lambda: palette(True)), half, 8),
        Case(30, "grey with transparency", "fixed", ("grey", "alpha-on-ground"), one("a.png", lambda: with_alpha("LA", 0)),
             lambda: half().convert("L").convert("RGB")),
        Case(31, "fully transparent", "warned", ("alpha-on-ground", "fully-transparent"),
             one("a.png", lambda: saved(Image.new("RGBA", (WIDTH, HEIGHT), (9, 200, 9, 0)), "PNG")), white),
        Case(32, "wide gamut", "fixed", ("icc-to-srgb",), one("a.png", lambda: saved(wide(), "PNG", icc_profile=wide_profile())), colour),
        Case(33, "broken colour profile", "fixed", ("icc-broken",),
             one("a.png", lambda: saved(colour(), "PNG", icc_profile=b"no profile" * 20)), colour),
        Case(34, "animated GIF", "warned", ("animation-first-frame", "palette"), one("a.gif", lambda: animated("GIF")), colour, 12),
        Case(35, "animated WebP", "warned", ("animation-first-frame",), one("a.webp", lambda: animated("WEBP", lossless=True)), colour),
        Case(36, "animated PNG", "warned", ("animation-first-frame",), one("a.png", lambda: animated("PNG")), colour),
        Case(37, "TIFF of three pages", "warned", ("multi-page",), one("a.tif", lambda: animated("TIFF")), colour),
        Case(38, "several pictures in a JPEG", "fixed", ("several-pictures",), one("a.jpg", lambda: animated("MPO")), colour, 2),
        Case(39, "one pixel", "left_out", ("too-small",), one("a.png", lambda: saved(Image.new("RGB", (1, 1)), "PNG"))),
        Case(40, "a line", "left_out", ("too-small",), one("a.png", lambda: saved(Image.new("RGB", (1, 20000)), "PNG"))),
        Case(41, "no width", "left_out", (no,), one("a.png", lambda: header(0, 10) + chunk(b"IDAT", zlib.compress(b"")) + IEND)),
        Case(42, "headers of 90, 179 and 3,600 megapixels", "left_out", ("too-large",), lambda: {
            f"{name}.png": header(*side) + chunk(b"IDAT", zlib.compress(bytes(1000))) + IEND for name, side in sides.items()}),
        Case(43, "170 kB that unpack to 169 megapixels", "left_out", ("too-large",), one("a.png", bomb)),
        Case(44, "64 MB of text", "left_out", ("too-much-text",),
             one("a.png", lambda: whole[:33] + chunk(b"zTXt", b"a\0\0" + zeros(64)) + whole[33:])),
    ]  # fmt: skip


# ---------------------------------------------------------------- files and folders


def draw(*names: str) -> Callable[[Path], None]:
    """A builder that puts that picture there under each name; other files get a word of text."""

    def build(folder: Path) -> None:
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = {".png": "PNG", ".jpg": "JPEG", ".gif": "GIF"}.get(path.suffix.lower())
            path.write_bytes(saved(colour(), kind) if kind else b"a caption")

    return build


def both(*builders: Callable[[Path], object]) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        for builder in builders:
            builder(folder)

    return build


def listen(folder: Path) -> None:
    """A socket in the file system; bound from inside, as its path may have 107 bytes."""
    here = os.getcwd()
    os.chdir(folder)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.png")
    os.chdir(here)


def link(name: str, target: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).symlink_to(folder / target)


LATIN = os.fsdecode(b"caf\xe9.png")
ODD = ["it's.png", '"q".png', "[1].png", "%2e%2e.png", "-rf.png"]


def folders() -> list[FolderCase]:
    ok: tuple[str, ...] = ()
    good = draw("a.png")
    return [
        FolderCase(45, "empty folder", draw(), "E-DATA-02"),
        FolderCase(46, "no such folder", lambda folder: folder.rmdir(), "E-DATA-01"),
        FolderCase(47, "picture without permission", both(good, draw("b.png"), lambda folder: (folder / "b.png").chmod(0)),
                   {"a.png": ok, "b.png": ("no-permission",)}),
        FolderCase(48, "only captions", draw("a.txt", "b.txt"), "E-DATA-02"),
        FolderCase(49, "pipe", both(good, lambda folder: os.mkfifo(folder / "pipe.png")), {"a.png": ok, "pipe.png": ("not-a-file",)}),
        FolderCase(50, "socket and device", both(good, listen, link("null.png", "/dev/null")),
                   {"a.png": ok, "socket.png": ("not-a-file",), "null.png": ("link-outside", "not-a-file")}),
        FolderCase(51, "folder named as a picture", both(good, lambda folder: (folder / "x.png").mkdir()),
                   {"a.png": ok, "x.png": ("not-a-file",)}),
        FolderCase(52, "links that lead to each other", both(good, link("b.png", "c.png"), link("c.png", "b.png")),
                   {"a.png": ok, "b.png": ("link-loop",), "c.png": ("link-loop",)}),
        FolderCase(53, "dead link", both(good, link("b.png", "gone.png")), {"a.png": ok, "b.png": ("dangling-link",)}),
        FolderCase(54, "folder that holds itself", both(draw("a.png", "in/b.png"), link("in/up", ".")),
                   {"a.png": ok, "in/b.png": ok, "in/up": ("folder-seen-before",)}),
        FolderCase(55, "link out of the folder", both(good, lambda folder: draw("b.png")(folder.parent / f"{folder.name} outside"),
                   lambda folder: (folder / "b.png").symlink_to(folder.parent / f"{folder.name} outside" / "b.png")),
                   {"a.png": ok, "b.png": ("link-outside",)}),
        FolderCase(56, "name that is no UTF-8", draw(LATIN), {LATIN: ("odd-name",)}),
        FolderCase(57, "name of two lines", draw("a\nb.png"), {"a\nb.png": ("odd-name",)}),
        FolderCase(58, "names that shells and servers trip over", draw(*ODD), dict.fromkeys(ODD, ok)),
        FolderCase(59, "name of 250 characters", draw("n" * 246 + ".png"), {"n" * 246 + ".png": ok}),
        FolderCase(60, "one name in two Unicode forms", draw("caf\u00e9.png", "cafe\u0301.png"),
                   {"caf\u00e9.png": ("unicode-twin",), "cafe\u0301.png": ("unicode-twin",)}),
        FolderCase(61, "one name in two cases", draw("A.PNG", "a.png"), {"A.PNG": ("case-twin",), "a.png": ("case-twin",)}),
        FolderCase(62, "one name with two endings", draw("a.png", "a.jpg"), {"a.png": ("same-stem",), "a.jpg": ("same-stem",)}),
        FolderCase(63, "what systems leave behind", draw("a.png", ".b.png", "__MACOSX/._a.png", "Thumbs.db", ".cache/c.png"),
                   {"a.png": ok}),
        FolderCase(64, "one picture twice", draw("a.png", "b.png"), {"a.png": ok, "b.png": ok}),
        FolderCase(66, "one picture", good, {"a.png": ok}),
        FolderCase(66, "many pictures", draw(*(f"{i % 7}/{i}.txt" for i in range(500)), "a.png"),
                   {f"{i % 7}/{i}.txt": ok for i in range(500)} | {"a.png": ok}),
    ]  # fmt: skip


def make(root: Path) -> None:
    for case in images():
        place = root / f"{case.number:02} {case.what}"
        place.mkdir(parents=True)
        for name, content in case.files().items():
            (place / name).write_bytes(content)
    for folder_case in folders():
        place = root / f"{folder_case.number:02} {folder_case.what}"
        place.mkdir(parents=True)
        folder_case.build(place)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
