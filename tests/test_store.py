"""The cache that all runs share: an entry is right or it is none, and what was not touched is neither looked at nor encoded again."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sdlora import api, cli, family, learners, safeio
from sdlora.data import cache, hints, ledger, scan, store
from sdlora.data.store import Store, place
from sdlora.data.variants import Variant
from sdlora.errors import BAD_INPUT, UserError
from sdlora.family import Family

# ---------------------------------------------------------------- entries


def test_what_is_put_is_got_and_nothing_else(tmp_path: Path) -> None:
    kept = Store(tmp_path)
    assert kept.get("a.x") is None
    kept.put("a.x", b"content")
    assert kept.get("a.x") == Store(tmp_path).get("a.x") == b"content"
    assert kept.get("b.x") is None
    kept.drop("a.x")
    assert kept.get("a.x") is None
    nothing = Store()
    nothing.put("a.x", b"content")
    assert nothing.get("a.x") is None


def test_no_flipped_bit_is_read(tmp_path: Path) -> None:
    kept = Store(tmp_path)
    kept.put("a.x", b"content")
    whole = (tmp_path / "a.x").read_bytes()
    for bit in range(0, 8 * len(whole), 3):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a.x").write_bytes(flipped)
        assert kept.get("a.x") is None, bit
    (tmp_path / "a.x").write_bytes(whole)
    (tmp_path / "b.x").write_bytes(whole)
    assert kept.get("b.x") is None, "another's content"
    assert kept.get("a.x") == b"content", "the control"


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    kept = Store(tmp_path, limit_bytes=10 * (100 + store.CHECKSUM_BYTES))
    for i in range(10):
        kept.put(f"{i}.x", bytes(100))
        os.utime(tmp_path / f"{i}.x", (1000 + i, 1000 + i))
    assert len(list(tmp_path.iterdir())) == 10, "the control: at the limit nothing goes"
    assert kept.get("0.x"), "which uses it"
    (tmp_path / "zip-folder").mkdir()
    for i, age in enumerate((10.0, 2 * store.ABANDONED_S)):
        left = tmp_path / f"{safeio.TEMPORARY}{i}"
        left.write_bytes(b"")
        os.utime(left, (time.time() - age,) * 2)
    kept.put("10.x", bytes(100))
    left_over = {path.name for path in tmp_path.iterdir()}
    assert left_over == {"0.x", *(f"{i}.x" for i in range(3, 11)), "zip-folder", f"{safeio.TEMPORARY}0"}
    assert (tmp_path / "0.x").stat().st_mtime == 1000, "what is used is not written to"


def hammer(folder: str, number: int) -> None:
    """Put, get and remove, with other processes that do the same; dies if it ever reads what nobody wrote."""
    kept = Store(Path(folder), limit_bytes=20_000)
    for i in range(150):
        name, content = f"{i * (number + 1) % 40}.x", bytes([i * (number + 1) % 40]) * 1000
        kept.put(name, content)
        got = kept.get(name)
        assert got is None or got == content
    assert not kept.note, kept.note


def test_processes_share_a_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=hammer, args=(str(tmp_path), number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(small.PATIENCE_S)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert not list(tmp_path.glob(f"{safeio.TEMPORARY}*"))
    sizes = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 10_000 < sizes <= 3 * 20_000, "each keeps the limit by its own count"


# ---------------------------------------------------------------- its place


@pytest.mark.parametrize(
    ("environment", "platform", "wanted"),
    [
        ({}, "linux", "~/.cache/sdlora"),
        ({"XDG_CACHE_HOME": "/x"}, "linux", "/x/sdlora"),
        ({"XDG_CACHE_HOME": "relative"}, "linux", "~/.cache/sdlora"),
        ({"XDG_CACHE_HOME": "/x", "SDLORA_CACHE": "/mine"}, "linux", "/mine"),
        ({"LOCALAPPDATA": "/local", "XDG_CACHE_HOME": "/x"}, "win32", "/local/sdlora"),
        ({}, "win32", "~/AppData/Local/sdlora"),
    ],
)
def test_the_place_is_the_users_own(environment: dict[str, str], platform: str, wanted: str) -> None:
    assert place(environment, platform) == Path(wanted).expanduser()


def test_only_its_user_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path / "new" / "cache"))
    assert store.usual().folder == tmp_path / "new" / "cache"
    assert (tmp_path / "new" / "cache").stat().st_mode & 0o777 == 0o700


def test_a_place_that_cannot_be_written_is_said(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path / "file" / "cache"))
    told = [event.text for event in api.train(small.settled(squares, base, train__steps=1), tmp_path / "run") if event.kind == "warning"]
    assert any("the cache folder cannot be used" in text and str(tmp_path / "run" / "cache") in text for text in told)
    assert len(list((tmp_path / "run" / "cache").glob("*.latents"))) == 5
    told = CliRunner().invoke(cli.app, ["check", str(squares), "--set", f"base={base}"])
    assert told.exit_code == 0
    assert "nothing that is computed is kept" in told.output


def test_a_home_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SDLORA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    kept = store.usual(tmp_path)
    assert kept.folder == tmp_path
    assert "home" in kept.note


def test_a_disk_that_refuses_ends_the_keeping_and_nothing_else(tmp_path: Path) -> None:
    kept = Store(tmp_path / "file" / "cache")
    (tmp_path / "file").write_text("")
    kept.put("a.x", b"content")
    assert "nothing more is kept" in kept.note
    assert kept.get("a.x") is None


@pytest.mark.parametrize("given", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_none_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDLORA_CACHE_GB", given)
    with pytest.raises(UserError, match="E-CONF-09"):
        store.usual()
    monkeypatch.setenv("SDLORA_CACHE_GB", "0")
    assert store.usual().folder is None
    monkeypatch.setenv("SDLORA_CACHE_GB", "0.5")
    assert store.usual().limit_bytes == 5e8


# ---------------------------------------------------------------- looks


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that is decoded to be looked at. Files count as settled at once, as tests cannot wait for it."""
    seen: list[Path] = []
    real = hints.decode

    def decode(path: Path) -> Any:
        seen.append(path)
        return real(path)

    monkeypatch.setattr(hints, "decode", decode)
    monkeypatch.setattr(hints, "SETTLED_NS", -1)
    return seen


def test_a_look_comes_back_as_it_was(pictures: Path, tmp_path: Path, counted: list[Path]) -> None:
    kept = Store(tmp_path)
    fresh = [hints.see(path, kept) for path in sorted(pictures.glob("*.[pj]*g"))]
    assert len(counted) == 5
    again = [hints.see(path, kept) for path in sorted(pictures.glob("*.[pj]*g"))]
    assert len(counted) == 5, "from the cache"
    assert again == fresh
    assert any(one.notes for one in fresh)


def leave(path: Path) -> None:
    """Nothing is done."""


def retouch(path: Path) -> None:
    os.utime(path, (1, 1))


def move(path: Path) -> None:
    path.rename(path.with_name("other.png"))


def copy_over(path: Path) -> None:
    status, content = path.stat(), path.read_bytes()
    path.with_name("new").write_bytes(content)
    os.replace(path.with_name("new"), path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rewrite(path: Path) -> None:
    """As long as before, and at the same time as far as `mtime` says."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-13] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [retouch, move, copy_over, rewrite])
def test_whatever_was_done_to_a_file_it_is_looked_at_again(change: Callable[[Path], None], tmp_path: Path, counted: list[Path]) -> None:
    folder = small.draw_folder(tmp_path / "set", 2)
    kept = Store(tmp_path / "cache")
    scan.scan_all([scan.Folder(folder=str(folder))], True, tmp_path, kept)
    (clock := tmp_path / "clock").touch()
    while clock.stat().st_ctime_ns <= (folder / "0.png").stat().st_ctime_ns:  # until the file system's clock has moved on
        time.sleep(0.001)
        clock.touch()
    counted.clear()
    change(folder / "0.png")
    scan.scan_all([scan.Folder(folder=str(folder))], True, tmp_path, kept)
    assert len(counted) == 1, "and the other one, which is the control, is not"


def test_a_file_that_just_changed_is_not_trusted(tmp_path: Path, counted: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small.draw_folder(tmp_path / "set", 1)
    monkeypatch.setattr(hints, "SETTLED_NS", 10**12)
    kept = Store(tmp_path / "cache")
    for _ in range(2):
        hints.see(folder / "0.png", kept)
    assert len(counted) == 2


def test_check_looks_once(squares: Path, base: Path, counted: list[Path]) -> None:
    told = [CliRunner().invoke(cli.app, ["check", str(squares), "--json", "--set", f"base={base}"]).output for _ in range(2)]
    assert len(counted) == 5
    assert told[0] == told[1]
    assert "cache folder" not in told[0], "the control of what is said of a bad one"
    assert json.loads(told[0])["totals"]["used"] == 5


# ---------------------------------------------------------------- what is encoded


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A letter for every picture (p) and row of text (t) that is encoded."""
    made: list[str] = []
    kind: Any = family.lookup.find("families", "sd1").SD1
    real_encode, real_states = kind.encode, kind.states

    def encode(self: Family, pixels: torch.Tensor) -> Any:
        made.extend("p" * len(pixels))
        return real_encode(self, pixels)

    def states(self: Family, tokens: torch.Tensor) -> Any:
        made.extend("t" * len(tokens))
        return real_states(self, tokens)

    monkeypatch.setattr(kind, "encode", encode)
    monkeypatch.setattr(kind, "states", states)
    return made


def prepare(folder: Path, base: Path, out: Path, made: list[str], **changes: Any) -> tuple[str, list[torch.Tensor]]:
    """What is encoded until a run without an adapter in its text encoder is ready, and the latents and states."""
    made.clear()
    run = small.settled(folder, base, **{"train__text_encoder_lr": 0, "data__prior_prompts": [], **changes})
    loaded = family.load(family.find(str(base)), torch.device("cpu"), torch.float32)
    kept = store.usual(out)
    dataset = ledger.fit_dataset(ledger.read_dataset(run, out, kept), run, loaded)
    latents = cache.latents(dataset.account.used, dataset.variants, "white", loaded, kept)
    one = learners.Job(run, loaded.base, out, 0.0, dataset, learners.pieces(run, loaded), kept)
    text = learners.prepared(one, loaded, latents).text
    return "".join(made), [*(part for some in latents for pair in some for part in pair), text]


def edit_weights(base: Path, folder: Path, part: str, file: str, weight: str) -> Path:
    other = small.copy_base(base, folder)
    path = other / part / file
    weights = load_file(path)
    weights[weight] += 0.5
    save_file(weights, path, {"format": "pt"})
    return other


def test_each_thing_is_encoded_once_for_all_runs(base: Path, tmp_path: Path, encoded: list[str]) -> None:
    folder = small.draw_folder(tmp_path / "set")
    made, fresh = prepare(folder, base, tmp_path / "first", encoded)
    assert made == "p" * 5 + "t" * 5, "three captions, the trigger alone, and no words"
    made, again = prepare(folder, base, tmp_path / "second", encoded)
    assert made == "", "another run"
    assert all(torch.equal(a, b) for a, b in zip(fresh, again, strict=True))
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert prepare(folder, base, tmp_path / "second", encoded)[0] == "", "a touch is no change"
    (folder / "0.txt").write_text("another ball")
    made, other = prepare(folder, base, tmp_path / "second", encoded)
    assert made == "t", "one caption, one row"
    assert not torch.equal(other[-1][0], fresh[-1][0])
    assert torch.equal(other[-1][1:], fresh[-1][1:]), "the others to the last bit"
    picture = Image.open(folder / "0.png").convert("RGB")
    picture.putpixel((24, 24), (1, 2, 3))
    picture.save(folder / "0.png")
    assert prepare(folder, base, tmp_path / "second", encoded)[0] == "p", "one pixel, one picture"
    vae = edit_weights(base, tmp_path / "vae", "vae", "diffusion_pytorch_model.safetensors", "quant_conv.bias")
    assert prepare(folder, vae, tmp_path / "second", encoded)[0] == "p" * 5, "another autoencoder, all pictures"
    weight = next(name for name in load_file(base / "text_encoder" / "model.safetensors") if name.endswith("final_layer_norm.bias"))
    text = edit_weights(base, tmp_path / "text", "text_encoder", "model.safetensors", weight)
    assert prepare(folder, text, tmp_path / "second", encoded)[0] == "t" * 5, "another text encoder, all captions"


def test_an_adapted_text_encoder_has_no_cached_states(base: Path, tmp_path: Path, encoded: list[str], squares: Path) -> None:
    assert prepare(squares, base, tmp_path, encoded, train__text_encoder_lr=1e-3)[0] == "p" * 5
    assert prepare(squares, base, tmp_path, encoded)[0] == "t" * 5, "the control"


def test_caches_on_is_caches_off(base: Path, tmp_path: Path, squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packs = []
    for gigabytes in ("0", "1", "1"):
        monkeypatch.setenv("SDLORA_CACHE_GB", gigabytes)
        out = tmp_path / f"run{len(packs)}"
        list(api.train(small.settled(squares, base, train__steps=2, train__text_encoder_lr=0), out))
        packs.append(load_file(out / "mira.safetensors"))
        kept = list(store.usual(out).folder.iterdir()) if gigabytes != "0" else []  # type: ignore[union-attr]
        assert bool(kept) == (gigabytes != "0")
    for other in packs[1:]:
        assert other.keys() == packs[0].keys()
        assert all(torch.equal(other[name], packs[0][name]) for name in other)


# ---------------------------------------------------------------- changed in between


def encode_after(change: Callable[[Path], Any], folder: Path, loaded: Family, kept: Store, ground: str) -> None:
    items = scan.scan_all([scan.Folder(folder=str(folder))], False, folder.parent, kept).used
    change(folder / "2.png")
    cache.latents(items, [[Variant((32, 32))]] * len(items), ground, loaded, kept)


CHANGES: dict[str, Callable[[Path], Any]] = {
    "rewritten": lambda path: Image.new("RGB", (48, 48), "red").save(path),
    "another size": lambda path: Image.new("RGB", (30, 48), "red").save(path),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ground", ["white", "black"])
def test_a_picture_that_changes_in_between_is_named(change: str, ground: str, loaded: Family, tmp_path: Path) -> None:
    folder = small.draw_folder(tmp_path / "set", 3)
    with pytest.raises(UserError, match="E-DATA-10") as caught:
        encode_after(CHANGES[change], folder, loaded, Store(tmp_path / "cache"), ground)
    assert caught.value.exit_code == BAD_INPUT
    assert str(folder / "2.png") in str(caught.value)
    if change == "rewritten":
        encode_after(leave, folder, loaded, Store(tmp_path / "cache"), ground)  # the next run takes it as it is


@pytest.mark.parametrize("ground", ["white", "black"])
def test_a_picture_that_is_only_touched_in_between_is_the_same(ground: str, loaded: Family, tmp_path: Path) -> None:
    encode_after(retouch, small.draw_folder(tmp_path / "set", 3), loaded, Store(tmp_path / "cache"), ground)


def test_a_hint_that_misled_is_forgotten(loaded: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that does not say that a file changed: one run fails, the next one looks again."""
    folder = small.draw_folder(tmp_path / "set", 3)
    monkeypatch.setattr(hints, "_name", lambda path: f"{path.name}.look")
    kept = Store(tmp_path / "cache")
    encode_after(leave, folder, loaded, kept, "white")
    Image.new("RGB", (48, 48), "red").save(folder / "1.png")
    with pytest.raises(UserError, match=r"E-DATA-10.*1\.png"):
        encode_after(leave, folder, loaded, kept, "white")
    encode_after(leave, folder, loaded, kept, "white")
