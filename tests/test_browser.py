"""The studio's page in a real browser: the scale is moved, and the picture follows."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from test_webui import train

from webui import app

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
WAIT_MS = 60_000
STATUS = re.compile(r"base ([0-9a-f]{12}) \| scale (\S+): ([0-9a-f]{12})")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page's address, with two packs on its shelf."""
    root = tmp_path_factory.mktemp("root")
    train(root, "tavi")
    train(root, "mira", steps=3)
    (root / "broken.safetensors").write_bytes(b"no pack at all")
    os.utime(root / "broken.safetensors", (0, 0))
    served = app.launch(root, app.free_port(0))
    yield served.url
    served.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        missing = f"no Chromium at {CHROMIUM}: apt-get install chromium"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(url: str, browser: Browser) -> Iterator[Page]:
    """The page with the newest pack chosen; it must not call another host, nor complain on the console."""
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
    page.get_by_role("tab", name="Studio").click()
    expect(page.locator("#prompt textarea")).to_have_value("mira", timeout=WAIT_MS)
    page.locator("#steps input[type=range]").fill("3")
    yield page
    context.close()
    assert abroad == []
    assert [text for text in complaints if "ERR_ABORTED" not in text] == []


def shown(page: Page, scale: str) -> tuple[str, str]:
    """Hashes of base and adapter, once the status tells of the scale."""
    expect(page.locator("#status")).to_contain_text(f"scale {scale}:", timeout=WAIT_MS)
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
    expect(page.locator("#prompt textarea")).to_have_value("tavi, blue background", timeout=WAIT_MS)
    expect(page.locator("#cli textarea")).to_have_value(re.compile(r"tavi/tavi\.safetensors:1 --prompt 'tavi, blue background'"))
    assert shown(page, "1")[1] != before
    choose(page, "none")
    expect(page.locator("#scale input[type=range]")).to_be_disabled()
    expect(page.locator("#make-strip")).to_be_disabled()


def test_the_strip_shows_every_scale_and_sets_it(page: Page) -> None:
    page.locator("#make-strip").click()
    captions = page.locator("#strip .caption-label")
    expect(captions).to_have_text([f"scale {scale}" for scale in ("0", "0.25", "0.5", "0.75", "1", "1.25")], timeout=WAIT_MS)
    assert len({address for address, _ in loaded(page, "#strip img")}) == 6
    page.locator("#strip .thumbnail-item").nth(1).click()
    shown(page, "0.25")
    assert page.locator("#scale input[type=range]").input_value() == "0.25"


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


def test_a_bad_pack_is_a_message_and_not_a_traceback(page: Page) -> None:
    choose(page, "broken")
    toast = page.get_by_test_id("toast-body")
    expect(toast).to_contain_text("E-PACK-03 · not a pack", timeout=WAIT_MS)
    expect(toast).not_to_contain_text("Traceback")


def test_a_narrow_screen_needs_no_sideways_scrolling(page: Page) -> None:
    page.set_viewport_size({"width": 420, "height": 900})
    page.locator("#generate").click()
    shown(page, "1")
    loaded(page, "#compare img")
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
