"""What a file means is what comes out: depth, colour, transparency, the way up; and a picture is scaled as light would be."""

import io
import random
import struct
from pathlib import Path

import corpus
import numpy as np
import pytest
import torch
from corpus import HEIGHT, IEND, WIDTH
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageDraw, ImageFile

import sdlora.data
from sdlora.data import buckets, pixels
from sdlora.data.pixels import Decoded, UnreadableError, decode


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def away(decoded: Decoded, meant: Image.Image) -> float:
    return float(np.abs(np.asarray(decoded.picture, float) - np.asarray(meant, float)).mean())


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# ---------------------------------------------------------------- depth and transparency


def one_value_transparent(depth: int) -> bytes:
    """Greys of which one is transparent, in a PNG of that depth; the left half of the rows holds it."""
    packed = {2: (np.uint8, 0x55, 0xAA, 1), 4: (np.uint8, 0x33, 0x88, 3), 8: (np.uint8, 51, 136, 51), 16: (">u2", 0x3333, 0x8888, 0x3333)}
    kind, left, right, key = packed[depth]
    rows = np.full((HEIGHT, WIDTH * min(depth, 8) // 8), right, kind)
    rows[:, : rows.shape[1] // 2] = left
    return corpus.png(rows, depth, 0, corpus.chunk(b"tRNS", struct.pack(">H", key)))


@pytest.mark.parametrize("depth", [2, 4, 8, 16])
def test_the_transparent_grey_is_the_one_that_the_file_names(depth: int, tmp_path: Path) -> None:
    """In the file's own depth: Pillow compares the number with pixels that it has scaled to 8 bits already."""
    path = put(tmp_path / "a.png", one_value_transparent(depth))
    read = np.asarray(decode(path, "red").picture)
    assert (read[:, : WIDTH // 2] == (255, 0, 0)).all()
    assert (read[:, WIDTH // 2 :] == read[0, -1, 0]).all()
    if depth in (2, 4):
        with Image.open(path) as opened:
            assert np.asarray(opened.convert("RGBA"))[..., 3].min() == 255, "the control: Pillow finds nothing transparent"


def test_the_transparent_colour_of_sixteen_bits_is_found(tmp_path: Path) -> None:
    rows = np.full((HEIGHT, WIDTH, 3), 0x8877, ">u2")
    rows[:, : WIDTH // 2] = 0x1234
    path = put(tmp_path / "a.png", corpus.png(rows, 16, 2, corpus.chunk(b"tRNS", struct.pack(">3H", 0x1234, 0x1234, 0x1234))))
    decoded = decode(path)
    assert decoded.notes == ("16-bit", "alpha-on-ground")
    assert (np.asarray(decoded.picture)[:, : WIDTH // 2] == 255).all()
    assert (np.asarray(decoded.picture)[:, WIDTH // 2 :] == 0x88).all()


@pytest.mark.parametrize("channels", [2, 4])
def test_sixteen_bits_with_transparency(channels: int, tmp_path: Path) -> None:
    mode, kind = {2: ("LA", 4), 4: ("RGBA", 6)}[channels]
    values = corpus.deep(Image.merge(mode, [corpus.colour().convert("L")] * channels)).astype(">u2")
    values[..., -1] = 0xFFFF
    decoded = decode(put(tmp_path / "a.png", corpus.png(values, 16, kind)))
    assert decoded.notes == ("16-bit",), "nothing shows through"
    assert away(decoded, corpus.grey()) <= 1


def test_white_may_be_zero(tmp_path: Path) -> None:
    levels = corpus.deep(corpus.colour().convert("L"))
    content = corpus.saved(Image.fromarray(65535 - levels), "TIFF", tiffinfo={262: 0})
    assert away(decode(put(tmp_path / "a.tif", content)), corpus.grey()) <= 1


@pytest.mark.parametrize("brightest", [1.0, 1.7, 200.0, 255.0, 4095.0, 40000.0, 65535.0, 1e7])
def test_floats_of_any_range_are_neither_black_nor_white(brightest: float, tmp_path: Path) -> None:
    values = np.linspace(0, brightest, WIDTH, dtype=np.float32)[None].repeat(HEIGHT, 0)
    decoded = decode(put(tmp_path / "a.tif", corpus.saved(Image.fromarray(values), "TIFF")))
    assert decoded.notes == ("float",)
    read = np.asarray(decoded.picture)[0, :, 0].astype(float)
    assert read[0] == 0
    assert read[-1] >= 150
    white = brightest / read[-1] * 255
    assert np.abs(read - values[0] / white * 255).max() <= 1, "in proportion"


@pytest.mark.parametrize("values", [0.0, float("nan"), float("-inf"), -3.0])
def test_floats_without_any_light_are_black(values: float, tmp_path: Path) -> None:
    picture = Image.fromarray(np.full((HEIGHT, WIDTH), values, np.float32))
    assert decode(put(tmp_path / "a.tif", corpus.saved(picture, "TIFF"))).picture.getextrema() == ((0, 0),) * 3


# ---------------------------------------------------------------- colour


def profile(picture: Image.Image, content: bytes, path: Path) -> Decoded:
    return decode(put(path, corpus.saved(picture, "PNG", icc_profile=content)))


def test_an_srgb_profile_changes_nothing(tmp_path: Path) -> None:
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for picture in (noise(HEIGHT, WIDTH), noise(HEIGHT, WIDTH).convert("RGBA")):
        decoded = profile(picture, content, tmp_path / "a.png")
        assert decoded.notes == ()
        assert away(decoded, picture.convert("RGB")) == 0


def test_a_wide_profile_is_converted_in_every_mode(tmp_path: Path) -> None:
    wide = corpus.wide()
    for picture, near in ((wide, 1.0), (wide.convert("RGBA"), 1.0), (wide.quantize(256), 8.0)):
        decoded = profile(picture, corpus.wide_profile(), tmp_path / "a.png")
        assert "icc-to-srgb" in decoded.notes
        assert away(decoded, corpus.colour()) <= near
    clear = wide.copy()
    clear.putalpha(0)
    assert profile(clear, corpus.wide_profile(), tmp_path / "a.png").picture.getextrema() == ((255, 255),) * 3, "the ground is sRGB"


def test_a_profile_of_another_colour_model_is_broken(tmp_path: Path) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for content in (lab, b"", corpus.wide_profile()[:200]):
        decoded = profile(corpus.colour(), content, tmp_path / "a.png")
        assert decoded.notes == (("icc-broken",) if content else ())
        assert away(decoded, corpus.colour()) == 0


def test_lab_is_converted(tmp_path: Path) -> None:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(corpus.colour(), to_lab)
    assert lab is not None
    decoded = decode(put(tmp_path / "a.tif", corpus.saved(lab, "TIFF")))
    assert decoded.notes == ("other-colours",)
    assert away(decoded, corpus.colour()) <= 2


# ---------------------------------------------------------------- the way up


def test_orientation_is_found_wherever_it_is_written(tmp_path: Path) -> None:
    stored, exif = corpus.saved(corpus.turned(6), "PNG"), corpus.exif(6)[6:]
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    text = f"\nexif\n{len(exif):8}\n{exif.hex()}\n".encode()
    little = b"II*\0\x08\0\0\0" + struct.pack("<HHHIHHI", 1, 274, 3, 1, 6, 0, 0)
    written = {
        "behind the pixels": stored.replace(IEND, corpus.chunk(b"eXIf", exif) + IEND),
        "in the other byte order": stored[:33] + corpus.chunk(b"eXIf", little) + stored[33:],
        "as text": stored[:33] + corpus.chunk(b"zTXt", b"Raw profile type exif\0\0" + corpus.zlib.compress(text)) + stored[33:],
        "in XMP": stored[:33] + corpus.chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp) + stored[33:],
    }
    for where, content in written.items():
        decoded = decode(put(tmp_path / "a.png", content))
        assert decoded.notes == ("exif-turned",), where
        assert away(decoded, corpus.colour()) == 0, where


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"MM\0*", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff", b"nonsense" * 9])
def test_broken_exif_breaks_nothing(exif: bytes, tmp_path: Path) -> None:
    content = corpus.saved(corpus.colour(), "PNG")
    decoded = decode(put(tmp_path / "a.png", content[:33] + corpus.chunk(b"eXIf", exif) + content[33:]))
    assert decoded.notes in ((), ("metadata-broken",))
    assert away(decoded, corpus.colour()) == 0


def test_a_thumbnails_end_is_not_the_pictures(tmp_path: Path) -> None:
    """A JPEG may hold a smaller one in its metadata; its end mark says nothing of the whole."""
    inside = corpus.saved(Image.new("RGB", (16, 16)), "JPEG")
    content = corpus.saved(corpus.colour(), "JPEG", exif=corpus.exif(1) + inside)
    assert inside in content
    assert decode(put(tmp_path / "a.jpg", content)).notes == ()
    assert decode(put(tmp_path / "a.jpg", content[:-2])).notes == ("no-end-marker",)


# ---------------------------------------------------------------- what is refused


def test_the_bounds_are_where_they_are_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    side = pixels.MIN_SIDE_PX
    for width, height, fine in ((side, side, True), (side - 1, 99, False), (99, side - 1, False)):
        path = put(tmp_path / "a.png", corpus.saved(Image.new("RGB", (width, height)), "PNG"))
        if fine:
            assert decode(path).picture.size == (width, height)
        else:
            with pytest.raises(UnreadableError, match=f"at least {side} px"):
                decode(path)
    monkeypatch.setattr(pixels, "MAX_PIXELS", 400)
    decode(put(tmp_path / "a.png", corpus.saved(Image.new("RGB", (20, 20)), "PNG")))
    with pytest.raises(UnreadableError, match="megapixels") as caught:
        decode(put(tmp_path / "a.png", corpus.saved(Image.new("RGB", (20, 21)), "PNG")))
    assert caught.value.code == "too-large"


def test_a_file_larger_than_any_picture_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(20 * 10**9)  # a hole: it takes no space
    with pytest.raises(UnreadableError, match="20000 MB") as caught:
        decode(tmp_path / "a.png")
    assert caught.value.code == "too-large"


@pytest.mark.filterwarnings("ignore")
def test_damage_of_any_kind_is_an_unreadable_picture(tmp_path: Path) -> None:
    """Whatever bytes change, one exception comes, or a picture."""
    chance = random.Random(7)
    files = [content for case in corpus.images() if case.number > 17 and case.number < 43 for content in case.files().values()]
    read = 0
    for number in range(400):
        content = bytearray(files[number % len(files)])
        for _ in range(chance.choice([1, 2, 8])):
            place = chance.randrange(min(len(content), chance.choice([64, 300, 10**6])))
            content[place] = chance.randrange(256)
        try:
            decoded = decode(put(tmp_path / "a.png", bytes(content)))
        except UnreadableError:
            continue
        assert decoded.picture.mode == "RGB"
        read += 1
    assert 20 < read < 380, "both happen"


def test_pillow_is_used_within_bounds() -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "a picture that is cut off would be read as half grey"
    folder = Path(sdlora.data.__file__).parent
    assert not [path.name for path in folder.glob("*.py") if ".seek(" in path.read_text("utf-8")], "further frames are not safe to read"


# ---------------------------------------------------------------- gamma and primaries of PNG

ADOBE_RGB = (31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)
SRGB = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)


def with_gamma(content: bytes, gamma: int, primaries: tuple[int, ...] = (), *before: bytes) -> bytes:
    chunks = [*before, corpus.chunk(b"gAMA", struct.pack(">I", gamma))]
    chunks += [corpus.chunk(b"cHRM", struct.pack(">8I", *primaries))] if primaries else []
    return content[:33] + b"".join(chunks) + content[33:]


def encoded(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clip(0.0031308) ** (1 / 2.4) - 0.055) * 255


def test_a_png_that_says_its_gamma_is_converted(tmp_path: Path) -> None:
    levels = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2)
    content = corpus.saved(Image.fromarray(levels), "PNG")
    decoded = decode(put(tmp_path / "a.png", with_gamma(content, 100000)))
    assert decoded.notes == ("png-gamma-to-srgb",)
    assert np.abs(np.asarray(decoded.picture) - encoded(levels / 255)).max() <= 1
    for usual in (
        with_gamma(content, 45455),
        with_gamma(content, 45455, SRGB),
        with_gamma(content, 100000, (), corpus.chunk(b"sRGB", b"\0")),
    ):
        decoded = decode(put(tmp_path / "a.png", usual))
        assert decoded.notes == ()
        assert np.array_equal(np.asarray(decoded.picture), levels), "the control: sRGB stays as it is"
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profiled = corpus.saved(Image.fromarray(levels), "PNG", icc_profile=icc)
    assert decode(put(tmp_path / "a.png", with_gamma(profiled, 100000))).notes == (), "a profile comes first"


def test_a_png_that_says_its_primaries_is_converted(tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(60, 200, (32, 32, 3), dtype=np.uint8)
    decoded = decode(put(tmp_path / "a.png", with_gamma(corpus.saved(Image.fromarray(levels), "PNG"), 45455, ADOBE_RGB)))
    assert decoded.notes == ("png-gamma-to-srgb",)
    to_xyz = np.array([[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]])  # Adobe RGB (1998)
    from_xyz = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])  # IEC 61966-2-1
    wanted = encoded(((levels / 255.0) ** 2.2 @ to_xyz.T @ from_xyz.T).clip(0, 1))
    assert np.abs(np.asarray(decoded.picture) - wanted).max() <= 2
    assert np.abs(levels - wanted).max() > 10, "the control"


@pytest.mark.parametrize(("gamma", "primaries"), [(1, SRGB), (2**31 - 1, SRGB), (100000, (0,) * 8), (100000, (30000,) * 8)])
def test_a_gamma_or_primaries_that_cannot_be_are_told(gamma: int, primaries: tuple[int, ...], tmp_path: Path) -> None:
    decoded = decode(put(tmp_path / "a.png", with_gamma(corpus.saved(noise(20, 20), "PNG"), gamma, primaries)))
    assert decoded.notes == ("png-gamma-broken",)
    assert away(decoded, noise(20, 20)) == 0


# ---------------------------------------------------------------- scaling


def light(levels: NDArray[np.generic]) -> NDArray[np.float64]:
    level = np.asarray(levels, float) / 255
    return np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)


def test_what_needs_no_scaling_keeps_its_very_pixels() -> None:
    picture = noise(48, 64)
    as_it_is = torch.from_numpy(np.asarray(picture, np.float32) / 127.5 - 1).permute(2, 0, 1)
    assert torch.equal(buckets.fit(picture, (64, 48)), as_it_is)
    for size in ((33, 48), (64, 17)):  # cut at the sides alone, by an odd number too
        left, upper = (64 - size[0]) // 2, (48 - size[1]) // 2
        assert torch.equal(buckets.fit(picture, size), as_it_is[:, upper : upper + size[1], left : left + size[0]])


def test_light_is_kept() -> None:
    """A fine pattern seen from afar is as bright as its light is on average, not as its numbers are."""
    board = np.zeros((64, 64, 3), np.uint8)
    board[::2, ::2] = board[1::2, 1::2] = 255
    assert abs(np.asarray(buckets.scaled(Image.fromarray(board), (16, 16)), float) - 188).max() <= 2
    assert np.asarray(Image.fromarray(board).resize((16, 16), Image.Resampling.LANCZOS)).max() < 130, "the control"
    picture = noise(256, 192)
    assert light(np.asarray(buckets.scaled(picture, (48, 64)))).mean() == pytest.approx(light(np.asarray(picture)).mean(), rel=0.005)
    for level in range(256):
        flat = Image.new("RGB", (40, 40), (level, 0, 255))
        assert buckets.scaled(flat, (16, 16)).getextrema() == ((level, level), (0, 0), (255, 255))


def test_what_is_bright_gets_no_rim() -> None:
    bar = Image.new("RGB", (448, 64), (63, 63, 63))
    ImageDraw.Draw(bar).rectangle((203, 0, 239, 63), fill="white")
    assert buckets.scaled(bar, (63, 9)).getextrema() == ((63, 255),) * 3
    row = Image.fromarray(light(np.asarray(bar))[..., 0].astype(np.float32)).resize((63, 9), Image.Resampling.LANCZOS)
    assert np.asarray(row).min() < 0, "the control: the filter alone would draw a black one"


def test_fine_detail_makes_no_patterns_and_coarse_detail_stays() -> None:
    """Waves across, in shares of the finest that the result can hold."""

    def height(share: float) -> float:
        wave = 120 + 40 * np.sin(np.pi * share * np.arange(2048) / 8)
        picture = Image.fromarray(np.tile(wave[None, :, None], (64, 1, 3)).astype(np.uint8))
        return float(np.asarray(buckets.scaled(picture, (256, 8)), float)[4, 20:-20].std() * 2**0.5 / 40)

    assert height(0.25) > 0.95
    assert height(0.5) > 0.9
    assert height(1.4) < 0.1
    assert height(1.7) < 0.1


@pytest.mark.parametrize(("width", "height", "size", "times"), [
    (64, 64, (64, 64), 1.0), (128, 64, (64, 64), 1.0), (128, 128, (64, 64), 0.5), (32, 64, (64, 64), 2.0), (63, 640, (64, 64), 64 / 63),
])  # fmt: skip
def test_enlarging_is_told(width: int, height: int, size: buckets.Size, times: float) -> None:
    assert buckets.enlargement(width, height, size) == pytest.approx(times)
    assert buckets.scaled(noise(height, width), size).size == size


def test_a_saved_result_is_the_result() -> None:
    """Eight bits, so that what is shown of a picture and what is trained on are the same."""
    picture = noise(100, 130)
    again = Image.open(io.BytesIO(corpus.saved(buckets.scaled(picture, (64, 48)), "PNG")))
    assert torch.equal(buckets.fit(again, (64, 48)), buckets.fit(picture, (64, 48)))
