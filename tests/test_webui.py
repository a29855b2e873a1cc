"""The studio's page without a browser: what it lists, keeps, says and refuses."""

import hashlib
import os
import shlex
import shutil
import socket
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from sdlora import api, learnt
from sdlora.api import Pack, UserError
from sdlora.packs import file
from webui import app
from webui.easel import NONE, STRIP, Easel, Subject, Wish, base_of, command, sizes
from webui.links import Links
from webui.recent import Recent
from webui.shelf import Found, Shelf
from webui.studio import Page, called, recipe_of

WISH = Wish(pack=NONE, prompt="mira", negative="", seed=0, steps=2, guidance=4, size="64x64", scale=1)


def train(folder: Path, name: str, steps: int = 2) -> Path:
    """A pack that is hardly trained but, at so high a rate, plainly visible; in a run folder of its own."""
    pictures = folder / f"{name}-pictures"
    pictures.mkdir(parents=True)
    for number, colour in enumerate(("tomato", "teal")):
        picture = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(picture).ellipse((12, 12, 52, 40 + 8 * number), colour)
        picture.save(pictures / f"{number}.png")
    table: dict[str, Any] = {
        "name": name,
        "base": "tiny",
        "data": {"folder": str(pictures)},
        "adapter": {"rank": 4},
        "train": {"steps": steps, "batch_size": 2, "lr": 0.05, "text_encoder_lr": 0.05, "warmup_steps": 0},
        "preview": {"scales": [], "every": 0},
    }
    (done,) = (event for event in api.train(api.settle(table), folder / name) if event.kind == "done")
    return Path(done.text)


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two packs of the same name in two folders, and one file that is no pack."""
    root = tmp_path_factory.mktemp("packs")
    train(root / "one", "mira")
    train(root / "two", "mira", steps=3)
    (root / "<b>broken.safetensors").write_bytes(b"no pack at all")
    os.utime(root / "<b>broken.safetensors", (0, 0))
    return root


@pytest.fixture(scope="module")
def easel(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Easel:
    return Easel(Shelf(data_root), tmp_path_factory.mktemp("pictures"))


def touch(path: Path, seconds: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    os.utime(path, (seconds, seconds))


def test_packs_are_listed_by_their_place_below_the_root_newest_first(tmp_path: Path) -> None:
    for place, seconds in {"old.safetensors": 1, "runs/mira/mira.safetensors": 3, "runs/b/b.safetensors": 2}.items():
        touch(tmp_path / place, seconds)
    for place in ("runs/b/cache/c.safetensors", "runs/b/checkpoints/7/c.safetensors", ".hidden/c.safetensors", "runs/b/notes.txt"):
        touch(tmp_path / place, 9)
    for part in ("config.json", "model.safetensors"):  # a component of a base model
        touch(tmp_path / "sd15" / "unet" / part, 9)
    assert [found.id for found in Shelf(tmp_path).packs()] == ["runs/mira/mira.safetensors", "runs/b/b.safetensors", "old.safetensors"]


def test_only_what_is_listed_is_found(tmp_path: Path) -> None:
    touch(tmp_path / "outside.safetensors", 1)
    touch(tmp_path / "root" / "inside.safetensors", 1)
    shelf = Shelf(tmp_path / "root")
    assert shelf.find("inside.safetensors").path.is_file()
    for place in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), ""):
        with pytest.raises(UserError, match="E-UI-01"):
            shelf.find(place)
    assert Shelf(tmp_path / "missing").packs() == []


def test_what_is_kept_is_bounded_and_what_was_used_last_stays() -> None:
    dropped: list[int] = []
    recent: Recent[int] = Recent(2, dropped.append)
    for number in (1, 2):
        recent.put(number, number)
    recent.get(1)
    recent.put(3, 3)
    assert (list(recent.kept), dropped, recent.get(2)) == ([1, 3], [2], None)


@pytest.mark.parametrize(("native_px", "step_px"), [(64, 16), (512, 64), (768, 64), (1024, 32)])
def test_sizes_suit_the_base(native_px: int, step_px: int) -> None:
    found = [tuple(map(int, size.split("x"))) for size in sizes(native_px, step_px).values()]
    assert found[0] == (native_px, native_px)
    assert len(set(found)) == 3
    assert all(side % step_px == 0 for size in found for side in size)
    assert all(0.8 < width * height / native_px**2 < 1.25 for width, height in found)


def test_the_command_line_says_all_and_is_quoted() -> None:
    found = Found("a b/mira.safetensors", Path("runs/a b/mira.safetensors"), (0, 0))
    pack = Pack("mira", {}, {"sdlora.base": "tiny"})
    wish = Wish(found.id, 'mira\'s "hat"; rm -rf $HOME', "-blurry", 7, 12, 4.5, "48x80", -0.35)
    words = shlex.split(command(wish, Subject("tiny", found, pack)))
    assert words[:2] == ["sdlora", "generate"]
    assert api.parse_pack(words[2]) == (found.path, -0.35, None)
    said = dict(zip(words[3::2], words[4::2], strict=True))
    assert said == {
        "--prompt": wish.prompt, "--negative": "-blurry", "--seed": "7", "--steps": "12", "--guidance": "4.5", "--size": "48x80",
        "--out": "picture.png",
    }  # fmt: skip
    assert "--base some/model" in command(WISH, Subject("some/model"))
    assert "--base" not in command(WISH, Subject("tiny"))


def test_a_base_in_a_folder_is_found_by_the_run_that_trained_on_it(tmp_path: Path) -> None:
    (tmp_path / "models" / "sd15").mkdir(parents=True)
    found = Found("run/m.safetensors", tmp_path / "run" / "m.safetensors", (0, 0))
    touch(tmp_path / "run" / "config.toml", 1)
    (tmp_path / "run" / "config.toml").write_text(f"base = '{tmp_path}/models/sd15'")
    assert base_of(found, Pack("m", {}, {"sdlora.base": "sd15"})) == f"{tmp_path}/models/sd15"
    assert base_of(found, Pack("m", {}, {"sdlora.base": "another"})) == "another"
    assert base_of(found, Pack("m", {}, {})) == "tiny"


@pytest.mark.parametrize(
    ("prompt", "before", "trigger", "after"),
    [("", "", "mira", "mira"), ("tavi", "tavi", "mira", "mira"), ("tavi in the sea", "tavi", "mira", "mira in the sea"),
     ("a house", "tavi", "mira", "a house"), ("tavi", "tavi", "", "tavi"),
     ("a cat", "a", "mira", "mira cat")],
)  # fmt: skip
def test_the_trigger_follows_the_pack_and_the_users_words_stay(prompt: str, before: str, trigger: str, after: str) -> None:
    assert called(prompt, before, trigger) == after


def test_a_port_is_had_or_named() -> None:
    with socket.socket() as taken:
        taken.bind((app.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"E-UI-04 .* port {port} ") as refused:
            app.free_port(port)
    assert refused.value.exit_code == 2
    assert app.free_port(0) in app.PORTS
    with pytest.raises(UserError, match="70000"):
        app.free_port(70000)


def test_the_page_is_built_without_any_pack_and_calls_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "intranet")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    demo = app.build(app.new_house(tmp_path / "missing", tmp_path))
    assert isinstance(demo, gr.Blocks)
    assert not demo.analytics_enabled
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert os.environ["NO_PROXY"] == f"intranet,{app.HOST},localhost"


def test_a_bad_pack_is_an_error_in_the_users_words(easel: Easel) -> None:
    with gr.Blocks() as demo:
        page = Page(easel, demo.load, Links())
    values = {page.chosen: None, page.drawn: False}
    values |= {control: getattr(WISH, name) for name, control in page.controls.items()}
    values[page.controls["pack"]] = "<b>broken.safetensors"
    with pytest.raises(gr.Error) as shown:
        page.choose(values)
    assert "E-PACK-03 · not a pack" in shown.value.message
    assert "&lt;b&gt;broken.safetensors" in shown.value.message  # the page renders it as HTML
    with pytest.raises(UserError, match="E-UI-03"):
        easel.pair(Wish(**{**vars(WISH), "seed": None}))


def test_scale_0_is_the_base_bit_for_bit_and_other_scales_are_not(easel: Easel) -> None:
    for pack in ("one/mira/mira.safetensors", "two/mira/mira.safetensors"):
        pairs = [easel.pair(Wish(**{**vars(WISH), "pack": pack, "scale": scale})) for scale in (0.0, 0.5, 1.0)]
        assert pairs[0].adapter.path != pairs[0].base.path  # it was drawn, not copied
        assert pairs[0].adapter.sha256 == pairs[0].base.sha256
        assert len({pair.adapter.sha256 for pair in pairs}) == 3


def test_what_was_looked_at_before_does_not_touch_the_picture_nor_reload_the_base(easel: Easel) -> None:
    wishes = [Wish(**{**vars(WISH), "pack": f"{place}/mira/mira.safetensors", "scale": 0.8, "seed": 3}) for place in ("one", "two")]
    shown = [easel.pair(wish) for wish in (*wishes, *wishes)]
    assert shown[:2] == shown[2:]  # the very same files: nothing was drawn twice
    assert shown[0].adapter.sha256 != shown[1].adapter.sha256
    for wish, pair in zip(wishes, shown, strict=False):
        words = shlex.split(pair.command)
        path, scale, _ = api.parse_pack(words[2])
        studio = api.open_studio([api.open_pack(path)])
        recipe = studio.recipe(wish.prompt, wish.size, wish.guidance, seed=wish.seed, steps=wish.steps, scales=(("mira", scale),))
        assert hashlib.sha256(studio.render([recipe])[0].tobytes()).hexdigest() == pair.adapter.sha256
    assert len(easel._studios) == 1


def test_a_strip_is_every_scale_and_needs_a_pack(easel: Easel) -> None:
    strip = easel.strip(Wish(**{**vars(WISH), "pack": "one/mira/mira.safetensors"}))
    assert len({picture.sha256 for picture in strip}) == len(STRIP)
    with Image.open(strip[0].path) as picture:
        assert '"mira", 0' in picture.text["sdlora"]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="E-UI-02"):
        easel.strip(WISH)


def test_a_pack_that_changed_on_the_disk_is_read_again(easel: Easel, data_root: Path) -> None:
    place = data_root / "changing" / "mira.safetensors"
    place.parent.mkdir()
    seen = []
    for source in ("one", "two"):
        place.write_bytes((data_root / source / "mira" / "mira.safetensors").read_bytes())
        os.utime(place, (len(seen) + 1, len(seen) + 1))
        seen.append(easel.pair(Wish(**{**vars(WISH), "pack": "changing/mira.safetensors"})).adapter.sha256)
    assert seen[0] != seen[1]


def test_the_studio_makes_room_for_a_run_and_rests_until_it_ends(data_root: Path, tmp_path: Path) -> None:
    running = [""]
    easel = Easel(Shelf(data_root), tmp_path, lambda: running[0])
    before = easel.pair(WISH)
    easel.make_room()
    assert easel._studios  # nobody needs the room
    running[0] = "mira"
    easel.make_room()
    assert not easel._studios
    with pytest.raises(UserError, match="E-UI-05"):
        easel.pair(WISH)
    running[0] = ""
    assert easel.pair(WISH).base.sha256 == before.base.sha256


def test_packs_are_drawn_together_each_at_its_own_scale(easel: Easel) -> None:
    one, two = "one/mira/mira.safetensors", "two/mira/mira.safetensors"
    both = easel.pair(Wish(**{**vars(WISH), "pack": one, "scale": 0.8, "more": ((two, 0.5),)}))
    words = shlex.split(both.command)
    packs = [api.parse_pack(word) for word in words[2:4]]
    studio = api.open_studio([api.open_pack(one.path) for one in packs])
    scales = tuple((name, one.scale) for name, one in zip(studio.packs, packs, strict=True))
    recipe = studio.recipe(WISH.prompt, WISH.size, WISH.guidance, seed=WISH.seed, steps=WISH.steps, scales=scales)
    assert hashlib.sha256(studio.render([recipe])[0].tobytes()).hexdigest() == both.adapter.sha256
    assert both.apart > 0
    assert easel.pair(Wish(**{**vars(WISH), "pack": one, "scale": 0.0})).apart == 0


def test_the_text_encoder_may_have_a_scale_of_its_own(easel: Easel) -> None:
    wish = Wish(**{**vars(WISH), "pack": "one/mira/mira.safetensors", "scale": 0.8, "text_scale": 0.3})
    drawn = easel.pair(wish)
    assert drawn.adapter.sha256 != easel.pair(Wish(**{**vars(wish), "text_scale": None})).adapter.sha256
    named = api.parse_pack(shlex.split(drawn.command)[2])
    assert named[1:] == (0.8, 0.3)
    studio = api.open_studio([api.open_pack(named.path)])
    own = {"scales": (("mira", named.scale),), "text_scales": (("mira", named.text_scale),)}
    recipe = studio.recipe(WISH.prompt, WISH.size, WISH.guidance, seed=WISH.seed, steps=WISH.steps, **own)
    assert hashlib.sha256(studio.render([recipe])[0].tobytes()).hexdigest() == drawn.adapter.sha256
    with Image.open(drawn.adapter.path) as picture:
        assert "<lora:mira:0.3:0.8>" in picture.text["parameters"]  # type: ignore[attr-defined]
    for odd in ({"scale": float("nan")}, {"text_scale": 9.0}, {"more": (("two/mira/mira.safetensors", -9.0),)}):
        with pytest.raises(UserError, match="E-GEN-06"):
            easel.pair(Wish(**{**vars(wish), **odd}))


def test_a_picture_brings_all_its_packs_and_scales_back(easel: Easel, data_root: Path) -> None:
    train(data_root / "three", "nori")
    with gr.Blocks() as demo:
        page = Page(easel, demo.load, Links())
    one, two = "one/mira/mira.safetensors", "three/nori/nori.safetensors"
    drawn = easel.pair(Wish(**{**vars(WISH), "pack": one, "scale": 0.8, "text_scale": 0.3, "more": ((two, 0.5),)}))
    copy = easel.folder / "dropped.png"
    copy.write_bytes(drawn.adapter.path.read_bytes())
    told = page.take_recipe({page.restore: str(copy), page.controls["pack"]: one})
    assert told[page.controls["pack"]] == one
    assert (told[page.controls["scale"]], told[page.apart], told[page.text]) == (0.8, True, 0.3)
    assert [(told[pack], told[scale]) for pack, scale in page.more] == [(two, 0.5), (NONE, 0.0)]
    values = told | {page.controls["size"]: "64x64", page.controls["steps"]: WISH.steps}
    assert easel.pair(page._wish(values)) == drawn, "the very same picture"


def test_what_a_pack_has_learnt_is_measured_and_nothing_is_an_error(easel: Easel, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learnt, "ASKING", api.Asking(scales=(1.0,), prompts=2, seeds=1, steps=2))
    found = easel.learnt(Wish(**{**vars(WISH), "pack": "one/mira/mira.safetensors"}))
    assert found.pack.effect > 0.01 > found.base.effect
    assert f"likeness to your pictures {found.pack.likeness:.2f}" in found.words
    nothing = api.open_pack(data_root / "one" / "mira" / "mira.safetensors")
    still = {key: value * 1e-3 if "up" in key else value for key, value in nothing.tensors.items()}
    run = data_root / "still"
    shutil.copytree(data_root / "one" / "mira", run)
    (run / "mira.safetensors").unlink()
    file.save(run / "still.safetensors", still, lambda sha: {**nothing.metadata, "sshs_model_hash": sha})
    with pytest.raises(UserError, match=r"E-BEST-03 .* no effect"):
        easel.learnt(Wish(**{**vars(WISH), "pack": "still/still.safetensors"}))
    shutil.rmtree(run)
    (data_root / "alone.safetensors").write_bytes((data_root / "one" / "mira" / "mira.safetensors").read_bytes())
    with pytest.raises(UserError, match="E-BEST-02"):
        easel.learnt(Wish(**{**vars(WISH), "pack": "alone.safetensors"}))
    with pytest.raises(UserError, match="E-UI-02"):
        easel.learnt(WISH)
    (data_root / "alone.safetensors").unlink()


def test_a_recipe_is_read_only_where_it_is_sound(tmp_path: Path, easel: Easel) -> None:
    drawn = easel.pair(WISH).base.path
    assert recipe_of(drawn)["prompt"] == "mira"
    for text in ("", "[]", "{}", '{"prompt": 1}', "[" * 100_000):
        info = PngInfo()
        info.add_itxt("sdlora", text)
        Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
        with pytest.raises(UserError, match="E-UI-15"):
            recipe_of(tmp_path / "x.png")
