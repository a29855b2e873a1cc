"""From a folder to latents: pictures are read as they are meant, none is lost in silence, and nothing is encoded twice."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from sdlora import api, family
from sdlora.data import buckets, cache, captions, pixels, scan, texts, walk
from sdlora.data.store import CHECKSUM_BYTES, Store
from sdlora.data.variants import Variant
from sdlora.errors import BAD_INPUT, UserError
from sdlora.family import Family

# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_the_camera_noted(orientation: int, tmp_path: Path) -> None:
    """Each of EXIF's eight orientations stores the same upright picture: red in its upper left corner, blue in its lower left."""
    upright = Image.new("RGB", (40, 24), "white")
    ImageDraw.Draw(upright).rectangle((0, 0, 9, 9), fill="red")
    ImageDraw.Draw(upright).rectangle((0, 14, 9, 23), fill="blue")
    t = Image.Transpose
    stored = {1: [], 2: [t.FLIP_LEFT_RIGHT], 3: [t.ROTATE_180], 4: [t.FLIP_TOP_BOTTOM], 5: [t.TRANSPOSE], 6: [t.ROTATE_90],
              7: [t.TRANSVERSE], 8: [t.ROTATE_270]}[orientation]  # fmt: skip
    picture = upright
    for step in stored:
        picture = picture.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    read = pixels.read_picture(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read), np.asarray(upright))
    assert (scan.scan(tmp_path, False).used[0].width, scan.scan(tmp_path, False).used[0].height) == (40, 24)


@pytest.mark.parametrize(("ground", "wanted"), [("white", (255, 127, 127)), ("#0000ff", (128, 0, 127)), ("black", (128, 0, 0))])
def test_what_is_transparent_lies_on_the_ground(ground: str, wanted: tuple[int, int, int], tmp_path: Path) -> None:
    Image.new("RGBA", (16, 16), (255, 0, 0, 128)).save(tmp_path / "half.png")
    pixel = pixels.read_picture(tmp_path / "half.png", ground).getpixel((1, 1))
    assert isinstance(pixel, tuple)
    assert max(abs(a - b) for a, b in zip(pixel, wanted, strict=True)) <= 1
    clear = Image.new("P", (16, 16), 0)
    clear.putpalette([0, 255, 0, 9, 9, 9])
    clear.save(tmp_path / "palette.png", transparency=0)
    laid = Image.new("RGB", (1, 1), ground).getpixel((0, 0))
    assert pixels.read_picture(tmp_path / "palette.png", ground).getpixel((1, 1)) == laid
    Image.new("LA", (16, 16), (7, 0)).save(tmp_path / "grey.png")
    assert pixels.read_picture(tmp_path / "grey.png", ground).getpixel((1, 1)) == laid


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_to_eight(suffix: str, tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    read = np.asarray(pixels.read_picture(tmp_path / f"a.{suffix}"))
    assert read.shape == (16, 16, 3)
    assert np.abs(read[..., 0].astype(float) - values / 257).max() <= 1


def test_every_mode_comes_out_as_rgb(tmp_path: Path) -> None:
    for mode in ("1", "L", "P", "RGB", "CMYK"):
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (24, 18)).save(path)
        read = pixels.read_picture(path)
        assert (read.mode, read.size) == ("RGB", (24, 18))


@pytest.mark.parametrize("suffix", sorted(walk.SUFFIXES))
def test_every_suffix_is_read(suffix: str, tmp_path: Path) -> None:
    Image.new("RGB", (24, 18), (200, 40, 40)).save(tmp_path / f"a{suffix}")
    (item,) = scan.scan(tmp_path, skip_unreadable=False).used
    assert (item.width, item.height) == (24, 18)


def test_a_picture_of_several_frames_is_its_first(tmp_path: Path) -> None:
    """As phones write them: MPO, a JPEG with a second one behind it."""
    frames = [Image.new("RGB", (24, 18), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:])
    pixel = pixels.read_picture(tmp_path / "a.jpg").getpixel((8, 6))
    assert isinstance(pixel, tuple)
    assert pixel[0] > 200 > 50 > pixel[2]


def test_what_is_no_picture_of_a_known_kind_is_unreadable(tmp_path: Path) -> None:
    Image.new("RGB", (24, 18)).save(tmp_path / "a.png", "PCX")
    (tmp_path / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0 runs a program")
    for name in ("a.png", "b.png"):
        with pytest.raises(pixels.UnreadableError, match="not a picture"):
            pixels.read_picture(tmp_path / name)


# ---------------------------------------------------------------- accounting


def break_folder(folder: Path) -> list[str]:
    """Put things that are no pictures into a folder; their names."""
    whole = (folder / "0.png").read_bytes()
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "page.jpg").write_text("<!DOCTYPE html><html><body>not found</body></html>")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    return ["cut.png", "empty.png", "folder.png", "page.jpg", "pipe.png"]


def test_all_that_cannot_be_read_is_named_at_once(tmp_path: Path) -> None:
    folder = small.draw_folder(tmp_path / "pictures")
    bad = break_folder(folder)
    with pytest.raises(UserError, match="E-DATA-03") as caught:
        scan.scan(folder, skip_unreadable=False)
    assert caught.value.exit_code == BAD_INPUT
    assert all(name in str(caught.value) for name in bad)
    assert "5 of 10" in str(caught.value)
    assert "skip_unreadable" in str(caught.value)


def test_what_is_left_out_is_accounted_for(base: Path, tmp_path: Path) -> None:
    folder = small.draw_folder(tmp_path / "pictures")
    bad = break_folder(folder)
    account = scan.scan(folder, skip_unreadable=True)
    assert sorted(out.path.name for out in account.left_out) == sorted(bad)
    assert sorted(item.path.name for item in account.used) == ["0.png", "1.png", "2.png", "3.jpg", "4.png"]
    assert account.line().startswith("10 pictures found, 5 used (3 with a caption of their own), 5 left out (")
    out = tmp_path / "run"
    notes = [event.text for event in api.train(small.settled(folder, base, data__skip_unreadable=True, train__steps=1), out)]
    assert account.line() in notes
    ledger = json.loads((out / "ledger.json").read_text())
    assert {key: ledger["totals"][key] for key in ("found", "used", "left_out")} == {"found": 10, "used": 5, "left_out": 5}
    fates = {row["file"]: row for row in ledger["pictures"]}
    assert sorted(name for name, row in fates.items() if row["fate"] == "left_out") == sorted(bad)
    assert all(row["why"] for row in fates.values() if row["fate"] == "left_out")


def test_other_files_are_no_pictures(tmp_path: Path) -> None:
    folder = small.draw_folder(tmp_path / "pictures")
    for name in ("notes.txt", "a.json", ".hidden.png", "Thumbs.db"):
        (folder / name).write_text("x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "a.png").write_text("x")
    shutil.copy(folder / "0.png", folder / "LOUD.PNG")
    account = scan.scan(folder, skip_unreadable=False)
    assert len(account.used) == 6
    assert account.left_out == []
    assert [(out.path.name, out.why) for out in account.strays] == [("notes.txt", ("orphan-caption",))]


@pytest.mark.parametrize(("what", "code"), [("missing", "E-DATA-01"), ("file", "E-DATA-01"), ("empty", "E-DATA-02")])
def test_a_folder_without_pictures_is_an_error(what: str, code: str, tmp_path: Path) -> None:
    folder = tmp_path / what
    if what == "file":
        folder.write_text("x")
    elif what != "missing":
        folder.mkdir()
    with pytest.raises(UserError, match=code) as caught:
        scan.scan(folder, skip_unreadable=True)
    assert caught.value.exit_code == BAD_INPUT
    assert str(folder) in str(caught.value)


# ---------------------------------------------------------------- captions


@pytest.mark.parametrize(
    ("caption", "kind", "wanted"),
    [
        ("", "character", "mira"),
        ("", "style", "mira style"),
        ("on a hill", "character", "mira, on a hill"),
        ("on a hill", "style", "on a hill, mira style"),
        ("Mira on a hill", "character", "Mira on a hill"),
        ("a hill by MIRA", "style", "a hill by MIRA"),
        ("[trigger] and a dog", "character", "mira and a dog"),
        ("a dog and [trigger]", "style", "a dog and mira"),
        ("admiral on a ship", "character", "mira, admiral on a ship"),
        ("miracles", "style", "miracles, mira style"),
    ],
)
def test_the_trigger_is_in_every_caption(caption: str, kind: str, wanted: str) -> None:
    assert captions.resolve(caption, kind, "mira") == wanted


def test_a_caption_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffa cat\r\n  on a   mat\n\n".encode())
    assert texts.caption_file(tmp_path / "a.txt").captions == ("a cat", "on a mat")


def test_a_caption_that_is_cut_is_said(base: Path, tmp_path: Path) -> None:
    folder = small.draw_folder(tmp_path / "pictures", 1)
    (folder / "0.txt").write_text("mira " + "very " * 40 + "tired")
    events = list(api.train(small.settled(folder, base, train__steps=1), tmp_path / "run"))
    assert [event.text for event in events if event.kind == "warning" and "caption-too-long" in event.text]


# ---------------------------------------------------------------- buckets

RESOLUTIONS = [(32, 8), (64, 16), (512, 64), (768, 64), (1024, 64)]


@pytest.mark.parametrize(("resolution", "step"), RESOLUTIONS)
def test_sizes_keep_their_bounds(resolution: int, step: int) -> None:
    found = buckets.sizes(resolution, step)
    assert (resolution, resolution) in found
    assert len(set(found)) == len(found)
    for width, height in found:
        assert width % step == height % step == 0
        assert 0.7 * resolution**2 <= width * height <= resolution**2
        assert max(width / height, height / width) <= 2
        assert (height, width) in found


@pytest.mark.parametrize(("resolution", "step"), [(16, 64), (20, 8), (100, 64)])
def test_there_is_always_a_size(resolution: int, step: int) -> None:
    found = buckets.sizes(resolution, step)
    assert found
    assert all(width % step == height % step == 0 for width, height in found)


@pytest.mark.parametrize(("resolution", "step"), RESOLUTIONS)
def test_no_picture_is_lost_and_little_is_cut(resolution: int, step: int) -> None:
    available = buckets.sizes(resolution, step)
    ratios = [width / height for width, height in available]
    sides = [1, 7, 31, 64, 100, 511, 512, 513, 1000, 3000, 8000]
    for width in sides:
        for height in sides:
            size = buckets.choose(width, height, available)
            assert size in available
            left, upper, right, lower = buckets.crop_box(width, height, size)
            assert -1e-6 <= left < right <= width + 1e-6
            assert -1e-6 <= upper < lower <= height + 1e-6
            assert (right - left) / (lower - upper) == pytest.approx(size[0] / size[1])
            assert left == pytest.approx(width - right, abs=1e-6), "centred"
            assert upper == pytest.approx(height - lower, abs=1e-6)
            kept = (right - left) * (lower - upper) / (width * height)
            best = max(min(r / (width / height), width / height / r) for r in ratios)
            assert kept == pytest.approx(best), "no other size keeps more"


def test_fitting_crops_and_scales() -> None:
    picture = Image.new("RGB", (60, 30), "black")
    ImageDraw.Draw(picture).rectangle((15, 0, 44, 29), fill=(255, 127, 0))
    fitted = buckets.fit(picture, (16, 16))
    assert fitted.shape == (3, 16, 16)
    assert fitted.dtype == torch.float32
    assert (fitted[:, 8, 8] - torch.tensor([1.0, 127 / 127.5 - 1, -1.0])).abs().max() < 1e-6
    assert fitted[0].mean() > 0.95, "the black sides are cut off"
    assert buckets.fit(picture, (32, 16)).shape == (3, 16, 32)


# ---------------------------------------------------------------- cache


def latents(folder: Path, loaded: Family, where: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    items = scan.scan(folder, False).used
    available = buckets.sizes(32, loaded.step_px)
    shown = [[Variant(buckets.choose(item.width, item.height, available))] for item in items]
    return [some[0] for some in cache.latents(items, shown, "white", loaded, Store(where))]


def entries(where: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in where.iterdir()}


def test_only_what_changed_is_encoded_again(loaded: Family, base: Path, tmp_path: Path) -> None:
    folder, where = small.draw_folder(tmp_path / "pictures"), tmp_path / "cache"
    first = latents(folder, loaded, where)
    made = entries(where)
    assert len(made) == 5
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    (folder / "0.txt").write_text("another caption")
    (folder / "1.png").rename(folder / "9.png")
    again = latents(folder, loaded, where)
    assert entries(where) == made, "neither a touch nor a new name is a new picture"
    assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))
    picture = Image.open(folder / "0.png").convert("RGB")
    picture.putpixel((24, 24), (1, 2, 3))
    picture.save(folder / "0.png")
    edited = latents(folder, loaded, where)
    assert len(entries(where)) == 6, "one pixel, one picture"
    assert made.items() <= entries(where).items()
    assert not torch.equal(edited[0][0], first[0][0])
    other = small.copy_base(base, tmp_path / "other")
    path = other / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["quant_conv.bias"] += 0.5
    save_file(weights, path, {"format": "pt"})
    swapped = latents(folder, family.load(family.find(str(other)), torch.device("cpu"), torch.float32), where)
    assert len(entries(where)) == 11, "another autoencoder, all pictures"
    assert not torch.equal(swapped[1][0], edited[1][0])


@pytest.mark.parametrize("damage", ["empty", "cut", "a bit of the checksum", "a bit of the content", "another's entry", "no checksum"])
def test_a_damaged_entry_is_made_again(damage: str, loaded: Family, pictures: Path, tmp_path: Path) -> None:
    first = latents(pictures, loaded, tmp_path)
    made = {name: content for name, (_, content) in entries(tmp_path).items()}
    name = min(made)
    content = made[name]
    damaged = {
        "empty": b"",
        "cut": content[:-5],
        "a bit of the checksum": bytes([content[0] ^ 64]) + content[1:],
        "a bit of the content": content[:-1] + bytes([content[-1] ^ 1]),
        "another's entry": made[max(made)],
        "no checksum": content[CHECKSUM_BYTES:],
    }[damage]
    (tmp_path / name).write_bytes(damaged)
    again = latents(pictures, loaded, tmp_path)
    assert all(torch.equal(a, b) for pair, other in zip(first, again, strict=True) for a, b in zip(pair, other, strict=True))
    assert {name: content for name, (_, content) in entries(tmp_path).items()} == made


def test_a_cached_latent_is_the_encoders_word(loaded: Family, pictures: Path, tmp_path: Path) -> None:
    fresh = latents(pictures, loaded, tmp_path)
    cached = latents(pictures, loaded, tmp_path)
    items = scan.scan(pictures, False).used
    available = buckets.sizes(32, loaded.step_px)
    for item, *found in zip(items, fresh, cached, strict=True):
        size = buckets.choose(item.width, item.height, available)
        mean, std = loaded.encode(buckets.fit(pixels.read_picture(item.path, "white"), size)[None])
        for pair in found:
            assert torch.equal(pair[0], mean[0])
            assert torch.equal(pair[1], std[0])
        assert mean.shape == (1, 4, size[1] // 4, size[0] // 4)


def test_the_ground_is_part_of_the_picture(loaded: Family, pictures: Path, tmp_path: Path) -> None:
    latents(pictures, loaded, tmp_path)
    items = scan.scan(pictures, False).used
    cache.latents(items, [[Variant((32, 32))]] * 5, "black", loaded, Store(tmp_path / "black"))
    cache.latents(items, [[Variant((32, 32))]] * 5, "white", loaded, Store(tmp_path / "white"))
    differ = set(os.listdir(tmp_path / "black")) - set(os.listdir(tmp_path / "white"))
    assert len(differ) == 1, "only one picture is transparent"
