"""The studio's page in a real browser: the scale is moved, and the picture follows."""

import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from small import PATIENCE_S, any_port, draw_folder, lacks
from test_door import temporary_behind
from test_webui import train

from sdlora.family import EMBEDDED
from webui import app

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
WAIT_MS = 1000 * PATIENCE_S
STATUS = re.compile(r"base ([0-9a-f]{12}) \| scale (\S+): ([0-9a-f]{12})")

pytestmark = pytest.mark.slow
expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page's address, with two packs on its shelf."""
    root = tmp_path_factory.mktemp("root")
    train(root, "tavi")
    train(root, "mira", steps=3)
    (root / "broken.safetensors").write_bytes(b"no pack at all")
    os.utime(root / "broken.safetensors", (0, 0))
    with temporary_behind(root.parent / "linked"):
        served = app.launch(root, any_port())
    yield served.url
    served.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        lacks(f"no Chromium at {CHROMIUM}: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(url: str, browser: Browser) -> Iterator[Page]:
    """A page that must not call another host, nor complain on the console."""
    abroad, complaints = [], []

    def only_home(route: Route) -> None:
        if route.request.url.startswith((url, "data:", "blob:")):
            route.continue_()
        else:
            abroad.append(route.request.url)
            route.abort()

    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    context.set_default_timeout(WAIT_MS)
    context.route("**/*", only_home)
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    page.locator("#begin").wait_for()
    yield page
    context.close()
    assert abroad == []
    assert [text for text in complaints if "ERR_ABORTED" not in text] == []


@pytest.fixture
def page(url: str, browser: Browser) -> Iterator[Page]:
    """The studio with the newest pack chosen."""
    with opened(url, browser) as page:
        go(page, "Studio")
        expect(page.locator("#prompt textarea")).to_have_value("mira")
        page.locator("#steps input[type=range]").fill("3")
        yield page


def go(page: Page, screen: str) -> None:
    page.get_by_role("tab", name=screen).click()


def shown(page: Page, scale: str) -> tuple[str, str]:
    """Hashes of base and adapter, once the status tells of the scale."""
    expect(page.locator("#status")).to_contain_text(f"scale {scale}:")
    found = STATUS.search(page.locator("#status").inner_text())
    assert found
    assert found[2] == scale
    return found[1], found[3]


def choose(page: Page, pack: str) -> None:
    page.locator("#pack input").click()
    page.get_by_role("option", name=pack).click()


def loaded(page: Page, images: str) -> list[list[Any]]:
    """Address and width in px of pictures that have arrived."""
    page.wait_for_function("at => [...document.querySelectorAll(at)].every(image => image.complete && image.naturalWidth)", arg=images)
    return page.locator(images).evaluate_all("images => images.map(image => [image.src, image.naturalWidth])")


def test_moving_the_scale_draws_the_adapter_again(page: Page) -> None:
    page.locator("#generate").click()
    base, full = shown(page, "1")
    slider = page.locator("#scale input[type=range]")
    slider.fill("0.5")
    same, half = shown(page, "0.5")
    assert same == base
    assert len({base, full, half}) == 3
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert shown(page, "0.55")[1] not in (base, full, half)
    slider.fill("1")
    assert shown(page, "1") == (base, full)
    (left, width), (right, _) = loaded(page, "#compare img")
    assert width == 64
    assert "base" in left
    assert "mira-scale1" in right


def test_scale_0_is_the_base_bit_for_bit(page: Page) -> None:
    page.locator("#generate").click()
    shown(page, "1")
    expect(page.locator("#status")).not_to_contain_text("bit for bit")
    page.locator("#scale input[type=range]").fill("0")
    base, adapter = shown(page, "0")
    assert adapter == base
    expect(page.locator("#status")).to_contain_text("identical to the base, bit for bit")


def test_another_pack_brings_its_trigger_and_picture(page: Page) -> None:
    page.locator("#prompt textarea").fill("mira, blue background")
    page.locator("#generate").click()
    _, before = shown(page, "1")
    choose(page, "tavi")
    expect(page.locator("#prompt textarea")).to_have_value("tavi, blue background")
    expect(page.locator("#cli textarea")).to_have_value(re.compile(r"tavi/tavi\.safetensors:1 --prompt 'tavi, blue background'"))
    expect(page.locator("#status")).not_to_contain_text(before)
    shown(page, "1")
    choose(page, "none")
    expect(page.locator("#scale input[type=range]")).to_be_disabled()
    expect(page.locator("#make-strip")).to_be_disabled()


def test_the_strip_shows_every_scale_and_sets_it(page: Page) -> None:
    page.locator("#make-strip").click()
    captions = page.locator("#strip .caption-label")
    expect(captions).to_have_text([f"scale {scale}" for scale in ("0", "0.25", "0.5", "0.75", "1", "1.25")])
    assert len({address for address, _ in loaded(page, "#strip img")}) == 6
    page.locator("#strip .thumbnail-item").nth(1).click()
    shown(page, "0.25")
    assert page.locator("#scale input[type=range]").input_value() == "0.25"


def test_a_strip_that_was_drawn_follows_the_slider_at_once(page: Page) -> None:
    page.locator("#generate").click()
    shown(page, "1")
    page.locator("#make-strip").click()
    page.locator("#strip-kept [data-strip]").wait_for(state="attached")
    before, address = page.evaluate(
        """() => { const slider = document.querySelector('#scale input[type=range]');
        const shown = () => document.querySelectorAll('#compare img')[1].src, before = shown();
        slider.value = 0.3; slider.dispatchEvent(new Event('input', {bubbles: true})); return [before, shown()]; }"""
    )
    assert "/shown/" in address, "in the very turn of the slider: nothing is asked of the server"
    assert "/shown/" not in before, "the control"
    shown(page, "0.3")  # and the exact one follows


def test_snaps_chips_and_dropped_pictures_set_the_controls(page: Page, tmp_path: Path) -> None:
    page.locator("#snap-0-5").click()
    expect(page.locator("#scale input[type=range]")).to_have_value("0.5")
    page.locator("#prompt textarea").fill("green background")
    page.locator("#chip").click()
    expect(page.locator("#prompt textarea")).to_have_value("mira, green background")
    page.locator("#seed input").fill("7")
    page.locator("#generate").click()
    shown(page, "0.5")
    with page.expect_download() as download:
        page.locator("#download").click()
    download.value.save_as(tmp_path / "picture.png")
    for place, value in (("#prompt textarea", "other"), ("#seed input", "1")):
        page.locator(place).fill(value)
    page.locator("#restore input[type=file]").set_input_files(tmp_path / "picture.png")
    expect(page.locator("#prompt textarea")).to_have_value("mira, green background")
    expect(page.locator("#seed input")).to_have_value("7")


def test_two_packs_are_drawn_each_at_its_own_scale(page: Page) -> None:
    page.locator("#generate").click()
    _, alone = shown(page, "1")
    page.locator("#more").get_by_text("Further packs").click()
    page.locator("#pack-2 input").click()
    page.get_by_role("option", name="tavi").click()
    expect(page.locator("#cli textarea")).to_have_value(re.compile(r"mira\.safetensors:1 \S*tavi\.safetensors:1 "))
    expect(page.locator("#status")).not_to_contain_text(alone)
    shown(page, "1")


def test_the_download_is_the_png_with_its_recipe(page: Page, tmp_path: Path) -> None:
    page.locator("#generate").click()
    shown(page, "1")
    with page.expect_download() as download:
        page.locator("#download").click()
    download.value.save_as(tmp_path / "picture.png")
    assert download.value.suggested_filename.startswith("mira-scale1-seed0")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.format == "PNG"
        recipe = json.loads(picture.text["sdlora"])  # type: ignore[attr-defined]
    assert (recipe["steps"], recipe["scales"]) == (3, [["mira", 1.0]])


def test_what_was_learnt_is_measured_where_it_is_asked(page: Page) -> None:
    page.locator("#measure").click()
    expect(page.locator("#learnt")).to_contain_text("likeness to your pictures")
    choose(page, "none: the base alone")
    expect(page.locator("#learnt")).not_to_contain_text("likeness")
    expect(page.locator("#measure")).to_be_disabled()


def test_the_text_encoder_has_a_scale_of_its_own(page: Page) -> None:
    page.locator("#generate").click()
    base, full = shown(page, "1")
    page.locator("#more").get_by_text("Text encoder, further packs").click()
    page.locator("#apart input").check()
    expect(page.locator("#status")).to_contain_text(f"base {base} | scale 1 (text encoder 1): {full}")
    page.locator("#text-scale input[type=range]").fill("0")
    expect(page.locator("#status")).to_contain_text("scale 1 (text encoder 0):")
    found = re.search(r"base ([0-9a-f]{12}) \| scale 1 \(text encoder 0\): ([0-9a-f]{12})", page.locator("#status").inner_text())
    assert found
    assert found[1] == base
    assert found[2] not in (base, full)
    expect(page.locator("#cli textarea")).to_have_value(re.compile(r"safetensors:1:0 "))


def test_a_bad_pack_is_a_message_and_not_a_traceback(page: Page) -> None:
    choose(page, "broken")
    toast = page.get_by_test_id("toast-body")
    expect(toast).to_contain_text("E-PACK-03 · not a pack")
    expect(toast).not_to_contain_text("Traceback")


def test_a_narrow_screen_needs_no_sideways_scrolling(page: Page) -> None:
    page.set_viewport_size({"width": 420, "height": 900})
    page.locator("#generate").click()
    shown(page, "1")
    loaded(page, "#compare img")
    assert page.evaluate("document.documentElement.scrollWidth") <= 420


QUICK = """
[train]
batch_size = 2
lr = 0.05
text_encoder_lr = 0.05
warmup_steps = 0
log_every = 1
[preview]
scales = []
steps = 3
every = 10
"""


def test_from_pictures_to_a_pack_by_keyboard_and_through_a_reload(browser: Browser, tmp_path: Path) -> None:
    draw_folder(tmp_path / "mine", square=True)
    served = app.launch(tmp_path / "root", any_port())
    with opened(served.url, browser) as page:
        page.locator("#new-name input, #new-name textarea").focus()
        page.keyboard.type("nori")
        page.keyboard.press("Enter")
        folder = page.locator("input[webkitdirectory]")
        folder.wait_for(state="attached")
        folder.set_input_files(tmp_path / "mine")
        expect(page.locator("#pictures")).to_contain_text("5 are used")
        page.locator("#pictures article button").first.focus()
        page.keyboard.press("Enter")
        expect(page.locator("#pictures")).to_contain_text("left aside")
        page.get_by_role("tab", name="Captions").focus()
        page.keyboard.press("Enter")
        cell = page.locator("#captions [data-row='0'][data-col='1']")
        cell.dblclick()
        expect(cell.locator("textarea, input")).to_be_focused()
        page.keyboard.press("Control+A")
        page.keyboard.type("nori with a hat")
        page.keyboard.press("Enter")
        expect(page.locator("#tags")).to_contain_text("nori with a hat")
        settings = tmp_path / "root" / "projects" / "nori" / "settings.toml"
        settings.write_text(f'name = "nori"\n{QUICK}')  # every screen is a view of files
        go(page, "Goal")
        page.locator("#tune").get_by_text("Tune").click()
        expect(page.locator("#set-preview-every textarea, #set-preview-every input")).to_have_value("10")
        page.locator("#set-train-steps textarea, #set-train-steps input").fill("40")
        page.locator("#start").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#watch")).to_contain_text("training now")
        page.reload()
        go(page, "Watch")
        expect(page.locator("#watch")).to_contain_text("step 40 of 40")
        expect(page.locator("#watch")).to_contain_text("finished")
        expect(page.locator("#watch .previews img")).to_have_count(5)
        page.locator("#watch .see").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#prompt textarea")).to_have_value("nori")
        base, full = shown(page, "1")  # drawn at once
        page.locator("#scale input[type=range]").fill("0")
        assert shown(page, "0") == (base, base)
        assert full != base
        go(page, "Choose")
        page.locator("#choose-scales textarea, #choose-scales input").fill("0.5, 1")
        for place in ("most", "prompts"):
            page.locator(f"#choose-{place} input").fill("1")
        page.locator("#judge").focus()
        page.keyboard.press("Enter")
        take = page.locator("#choose [data-send='40:0.5']")
        take.wait_for()
        expect(page.locator("#choose .choices").first).to_be_visible()
        loaded(page, "#choose .choices img")
        take.focus()
        page.keyboard.press("Enter")
        expect(page.locator("#choose-cli textarea")).to_have_value(re.compile("run keep .*--step 40 --scale 0.5"))
        go(page, "Share")
        expect(page.locator("#readers")).to_contain_text("diffusers")
        page.locator("#public summary").click()
        expect(page.locator("#public")).to_contain_text("modelspec.trigger_phrase")
        page.locator("#make-bundle").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#bundle")).to_contain_text("nori-40.zip")
        with page.expect_download() as coming:
            page.locator("#bundle").click()
        coming.value.save_as(tmp_path / "nori.zip")
    served.close()
    with zipfile.ZipFile(tmp_path / "nori.zip") as archive:
        archive.extractall(tmp_path / "bundle")
    pipeline = DiffusionPipeline.from_pretrained(str(EMBEDDED), local_files_only=True)
    pipeline.load_lora_weights(str(tmp_path / "bundle"), weight_name="nori-40.safetensors")
    assert pipeline.get_active_adapters()
    assert "nori with a hat" in [path.read_text().strip() for path in (tmp_path / "root" / "projects" / "nori" / "pictures").rglob("*.txt")]
