"""The report: it needs no other file and no network, escapes whatever it is told, depends on nothing but the folder, and fails no run."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import runs
from PIL import Image
from typer.testing import CliRunner

from sdlora import charts, record, report
from sdlora.cli import app

HOSTILE = """</title></style><script>alert(1)</script><img src=http://a.example/x onerror="alert(2)">'">&"""
INERT = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section", "h1", "h2", "p", "span", "b", "br"),
    *("small", "dl", "div", "dt", "dd", "figure", "figcaption", "img", "details", "summary", "table", "thead", "tbody", "tr", "th"),
    *("td", "ul", "li", "pre", "i", "svg", "desc", "clippath", "rect", "g", "path", "text", "circle"),
}


class Elements(HTMLParser):
    """Elements and attributes as a browser would see them, and the text between."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.misplaced: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self.misplaced += [tag] if not self.open or self.open.pop() != tag else []

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Elements:
    found = Elements()
    found.feed(page)
    assert (found.open, found.misplaced) == ([], []), "elements are closed in the order in which they were opened"
    return found


def dangers(page: str) -> list[str]:
    """What in a page runs, or reaches for something outside it."""
    parts = Elements()
    parts.feed(page)
    found = [tag for tag in parts.tags if tag not in INERT]
    for name, value in parts.attributes:
        outside = name in ("src", "href", "xlink:href", "srcset", "action", "data") and not value.startswith("data:image/")
        if name.startswith("on") or outside or re.search(r"url\((?!#)", value):
            found.append(f"{name}={value[:40]}")
    style = page.partition("<style>")[2].partition("</style>")[0]
    return [*found, *re.findall(r"url\([^#]|@import", style)]


def test_a_report_holds_what_the_folder_tells(tmp_path: Path) -> None:
    page = report.page(runs.write(tmp_path / "run"))
    text = " ".join(read(page).text.split())
    for said in ["mira", "finished", "0.50 times", "40 of 40", "Loss by step", "validation", "Learning rate", "same-framing", "blurred",
                 "The file is empty.", "the sky is falling", "Training", "3 layers adapted", "21 s", "0.50 s",
                 'kind = "character"']:  # fmt: skip
        assert said in text, said
    assert text.index("blurred") < text.index("same-framing"), "the worst first"
    assert "damaged" not in text
    assert page.count("<svg") == page.count("<desc") == page.count('role="img"') == 2
    assert len(re.findall(r'id="([^"]+)"', page)) == len(set(re.findall(r'id="([^"]+)"', page)))


def test_nothing_in_a_report_reaches_outside_or_runs(tmp_path: Path) -> None:
    page = report.page(runs.write(tmp_path / "run"))
    assert dangers(page) == []
    assert not re.search("https?:", page)
    assert "default-src 'none'" in page
    for bad in ("<script>1</script>", "<img src=a.png>", "<a href='x'>", "<p onclick=x>", "<i style='background:url(x)'>", "<link>"):
        assert dangers(page.replace("</main>", f"{bad}</main>")), "the control"


def test_whatever_a_run_is_told_is_escaped(tmp_path: Path) -> None:
    log: list[dict[str, Any]] = [*runs.log()]
    log[0] |= {"text": HOSTILE}
    log[1] |= {"text": HOSTILE}
    log.insert(4, {"time": runs.BEGAN + 5, "kind": "preview", "step": 1, "data": {"file": HOSTILE}})
    run = runs.write(tmp_path / "run", log, name=HOSTILE, trigger=HOSTILE, base=HOSTILE, kind=HOSTILE)
    table = runs.ledger()
    table["findings"][0] |= {"code": HOSTILE, "detail": HOSTILE, "files": [HOSTILE]}
    table["pictures"][0] |= {"file": HOSTILE, "why": [HOSTILE]}
    table["totals"] |= {"buckets_px": {HOSTILE: 1}, "used": HOSTILE}
    (run / "ledger.json").write_text(json.dumps(table))
    (run / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE, "more": {HOSTILE: [HOSTILE]}}))
    page = report.page(run)
    assert dangers(page) == []
    assert read(page).text.count("<script>alert(1)") >= 12
    assert dangers(page.replace("&lt;", "<").replace("&gt;", ">")), "the control: unescaped, it would run"


def test_the_same_folder_gives_the_same_report_wherever_and_whenever(tmp_path: Path) -> None:
    run = runs.write(tmp_path / "run")
    report.write(run)
    first = (run / "report.html").read_bytes()
    shutil.copytree(run, tmp_path / "elsewhere" / "run")
    report.write(tmp_path / "elsewhere" / "run")
    report.write(run)
    assert (run / "report.html").read_bytes() == (tmp_path / "elsewhere" / "run" / "report.html").read_bytes() == first
    (run / "events.jsonl").write_text(runs.lines(runs.log(steps=39)))
    assert report.page(run).encode() != first, "the control"


def test_places_of_this_machine_are_not_told(tmp_path: Path) -> None:
    run = runs.write(tmp_path / "run", base="/home/ada/bases/sd", **{"data.folder": "/home/ada/pictures"})
    assert "/home/ada" in (run / "config.toml").read_text(), "the control"
    assert "/home" not in report.page(run)
    assert 'folder = "pictures"' in read(report.page(run)).text


@pytest.mark.parametrize("content", ["", "null", "[]", '{"totals": []}', '{"totals": {}, "findings": 3}', '{"findings": [3]}', "[" * 9999])
def test_a_damaged_file_fails_no_report(tmp_path: Path, content: str) -> None:
    run = runs.write(tmp_path / "run")
    for name in ("ledger.json", "environment.json", "strip.png", "events.jsonl", "config.toml"):
        (run / name).write_text(content)
        read(report.page(run))
    empty = tmp_path / "empty"
    empty.mkdir()
    read(report.page(empty))


def test_a_report_of_a_run_that_goes_on_says_so(tmp_path: Path) -> None:
    text = read(report.page(runs.write(tmp_path / "run", runs.log(ended=False, steps=1)))).text
    assert "unfinished" in text
    assert "times" not in text


def test_previews_stand_by_step_the_base_first_and_lie_in_the_folder(tmp_path: Path) -> None:
    steps = [10, 0, 20, 10, *range(30, 400, 10)]
    log = [{"time": runs.BEGAN + i, "kind": "preview", "step": s, "data": {"file": f"previews/{s}.png"}} for i, s in enumerate(steps)]
    run = runs.write(tmp_path / "run", [*log, *runs.log()])
    (run / "previews").mkdir()
    for step in steps:
        Image.new("RGB", (8, 8), (step % 256, 0, 0)).save(run / "previews" / f"{step}.png")
    page = report.page(run)
    order = [int(step) for step in re.findall(r'alt="Preview at step (\d+)', page)]
    assert order == sorted(order)
    assert len(order) <= report.MOST_PREVIEWS
    assert order[-1] == 390
    assert 0 < page.index("Preview at the base") < page.index("Preview at step")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    log[0]["data"]["file"] = "../secret.png"
    (run / "previews" / "20.png").unlink()
    (run / "previews" / "20.png").symlink_to(tmp_path / "secret.png")
    (run / "events.jsonl").write_text(runs.lines([log[0], log[2]]))
    assert "Preview at" not in report.page(run), "a picture outside the run folder is not shown"


def test_the_verb_writes_it_where_it_is_told(tmp_path: Path) -> None:
    run = runs.write(tmp_path / "run")
    told = CliRunner().invoke(app, ["run", "report", str(run), "--out", str(tmp_path / "new" / "r.html")])
    assert told.exit_code == 0, told.output
    assert (tmp_path / "new" / "r.html").read_text("utf-8") == report.page(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(("low", "high"), [(0, 60), (0.021, 0.137), (1e-6, 1e-4), (-3, 4), (999, 1001), (0, 1e6), (0.1, 0.1000001)])
def test_ticks_are_few_round_and_within(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 * high <= value <= high + 1e-9 * high for value in found)
    step = found[1] - found[0]
    assert f"{step:.0e}"[0] in "125"
    assert len(set(charts.labels(found))) == len(found), "labels tell them apart"


@pytest.mark.parametrize("count", [1, 2, 1000, 20_000])
def test_a_drawing_stays_small_and_within_its_frame(count: int) -> None:
    values = {step: 0.1 + (5.0 if step == count // 2 else 0.0) for step in range(count)}
    smooth = dict(zip(values, record.smooth([*values.values()]), strict=True))
    drawn = charts.chart("c", "t", "step", [charts.Series("raw", [*values.items()], "dots"), charts.Series("s", [*smooth.items()], "line")])
    assert len(drawn) < 60_000
    places = re.findall(r"[ML]([\d.-]+) ([\d.-]+)", drawn.partition('class="line"')[2])
    assert all(charts.LEFT <= float(x) <= charts.WIDTH and 0 <= float(y) <= charts.HEIGHT for x, y in places)
