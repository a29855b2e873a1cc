"""How long a new user waits: from `sdlora ui` in an empty folder to the first move of the scale, and how fast the scale follows.

python bench/journey.py [--moves 20]

A Chromium at /usr/bin/chromium clicks what a user would. Latencies are those that the page has, from the slider's event to the picture.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from playwright.sync_api import Page, expect, sync_playwright

from sdlora import api
from webui import app

CHROMIUM = "/usr/bin/chromium"
WAIT_MS = 600_000
NEXT_PICTURE = """([scale, exact]) => new Promise(done => {
  const slider = document.querySelector("#scale input[type=range]"), began = performance.now();
  const before = [...document.querySelectorAll("#compare img")].map(one => one.src).join();
  const look = () => {
    const images = [...document.querySelectorAll("#compare img")];
    const said = document.querySelector("#status").innerText;
    const there = exact ? said.includes(`scale ${scale}:`) : images.map(one => one.src).join() !== before;
    if (there && images.every(one => one.complete && one.naturalWidth)) done(performance.now() - began); else requestAnimationFrame(look);
  };
  slider.value = scale;
  slider.dispatchEvent(new Event("input", { bubbles: true }));
  slider.dispatchEvent(new Event("change", { bubbles: true }));
  look();
})"""
"""Moves the slider; the milliseconds until another picture is shown (`exact`: until that of this very scale is)."""

PROMPT_IS = "word => document.querySelector('#prompt textarea').value === word && performance.now() - window.began"
"""The milliseconds since the mouse went down, once the prompt says this trigger."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, default=20)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        print(json.dumps(went(Path(root), said.moves), indent=1))


def went(root: Path, moves: int) -> dict[str, Any]:
    """The journey on the bundled character, in figures."""
    port, began = app.free_port(0), time.monotonic()
    server = subprocess.Popen(
        [sys.executable, "-m", "sdlora.cli", "ui", "--data-root", str(root), "--port", str(port)], stdout=subprocess.PIPE
    )
    found: dict[str, Any] = {}

    def lap(name: str) -> None:
        found[f"s until {name}"] = round(time.monotonic() - began, 1)

    try:
        assert server.stdout is not None
        server.stdout.readline()
        lap("it serves")
        with sync_playwright() as playwright:
            page = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]).new_page()
            page.set_default_timeout(WAIT_MS)
            expect.set_options(timeout=WAIT_MS)
            page.goto(f"http://{app.HOST}:{port}")
            clicks = ["#sample", "#start", "#watch .see"]
            page.locator(clicks[0]).wait_for()
            lap("the page is there")
            for click, until in zip(clicks, ("the sample is ready", "it trained", "base and pack are drawn"), strict=True):
                page.locator(click).click()
                page.locator("#start" if click == "#sample" else "#watch .see" if click == "#start" else "#compare img").first.wait_for()
                lap(until)
            expect(page.locator("#status")).to_contain_text("scale 1:")
            page.evaluate(NEXT_PICTURE, [0.5, True])
            lap("the scale was moved")
            found |= {"commands": 2, "fields": 0, "clicks": len(clicks)} | followed(page, moves) | changed(page, root)
    finally:
        server.terminate()
        server.wait(20)
    return found


def followed(page: Page, moves: int) -> dict[str, Any]:
    """How fast the scale follows, and another pack."""
    scales = [round(-1 + 0.05 * i, 2) for i in range(moves)]
    drawn = [page.evaluate(NEXT_PICTURE, [scale, True]) for scale in scales]
    again = [page.evaluate(NEXT_PICTURE, [scale, True]) for scale in reversed(scales[:-1])]
    page.locator("#make-strip").click()
    page.locator("#strip img").nth(5).wait_for()
    page.evaluate(NEXT_PICTURE, [1, True])
    at_once = [page.evaluate(NEXT_PICTURE, [(0.05, 1.2)[i % 2], False]) for i in range(moves)]
    page.wait_for_timeout(3000)
    return {name: spread(took) for name, took in (("ms to a scale not drawn before", drawn), ("ms to one drawn before", again),
                                                  ("ms to the nearest of a strip", at_once))}  # fmt: skip


def changed(page: Page, root: Path) -> dict[str, Any]:
    """How long it takes to take one pack off the base and put another on, without a picture."""
    (pack,), took = root.glob("*/*.safetensors"), list[float]()
    other = pack.with_name("nori.safetensors")
    other.write_bytes(pack.read_bytes())
    api.edit_pack(other, api.header_changes([], "nori", None))
    page.reload()
    page.get_by_role("tab", name="Studio").click()
    page.evaluate("document.addEventListener('mousedown', () => { window.began = performance.now(); }, true)")
    for trigger in ("nori", "tavi") * 5:
        page.wait_for_function(
            "word => document.querySelector('#pack input').value && document.querySelector('#prompt textarea').value", arg=""
        )
        page.locator("#pack input").click()
        option = page.get_by_role("option", name=f"{trigger}.safetensors")
        option.wait_for()
        option.click()
        took.append(page.wait_for_function(PROMPT_IS, arg=trigger, polling=5).json_value())
    return {"ms to another pack": spread(took[2:])}  # the first of each reads its file


def spread(took: list[float]) -> dict[str, float]:
    return {"median": round(median(took), 1), "longest": round(max(took), 1)}


if __name__ == "__main__":
    main()
