"""The ledger tells beforehand what a run does with every picture, and `sdlora check` shows it."""

import json
from collections import Counter
from pathlib import Path

import pytest
import small
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from sdlora import cli, learners
from sdlora.config import Run
from sdlora.data import ledger
from sdlora.data.batches import Prepared, micro_batch
from sdlora.data.doctor import Finding
from sdlora.family import Family


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures: three sound ones, a copy, one on a narrow strip, one that does not decode; and a caption of none."""
    made = small.draw_folder(tmp_path / "set", 3, square=True)
    first = sorted(made.glob("*.png"))[0]
    (made / "zz copy.png").write_bytes(first.read_bytes())
    strip = Image.new("RGB", (200, 40), "navy")
    ImageDraw.Draw(strip).ellipse((20, 5, 60, 35), "gold")
    strip.save(made / "<b>strip.png")
    (made / "<b>strip.txt").write_text("a <i>ball")
    (made / "broken.png").write_bytes(first.read_bytes()[:200])
    (made / "nobody.txt").write_text("a cat")
    return made


def rows(run: Run, loaded: Family, where: Path) -> tuple[dict[str, dict[str, object]], dict[str, object], ledger.Dataset]:
    dataset = ledger.fit_dataset(ledger.read_dataset(run, where), run, loaded)
    table = ledger.ledger(dataset, run, loaded, ledger.findings(dataset, run, loaded))
    return {row["file"]: row for row in table["pictures"]}, table, dataset


def test_every_picture_has_its_fate_and_reasons(folder: Path, base: Path, loaded: Family, tmp_path: Path) -> None:
    found, table, _ = rows(small.settled(folder, base, data__skip_unreadable=True), loaded, tmp_path)
    assert set(found) == {path.name for path in folder.iterdir() if path.suffix != ".txt"}
    assert found["broken.png"]["fate"] == "left_out"
    assert found["broken.png"]["why"] == ["damaged"]
    assert found["<b>strip.png"]["fate"] == "warned"
    assert "extreme-aspect" in found["<b>strip.png"]["why"]  # type: ignore[operator]
    copies = [name for name, row in found.items() if "duplicate" in row["why"]]  # type: ignore[operator]
    assert copies == ["0.png", "zz copy.png"], "both, and nothing else"
    assert [row["fate"] for row in table["pictures"]] == sorted(  # type: ignore[attr-defined, index, call-overload]
        (str(row["fate"]) for row in found.values()), key=("left_out", "warned", "fixed", "used").index
    ), "the worst first"
    assert table["other_files"] == [{"file": "nobody.txt", "why": ["orphan-caption"]}]


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_what_is_shown_is_what_the_ledger_says(share: float, folder: Path, base: Path, loaded: Family, tmp_path: Path) -> None:
    changes = {"train__steps": 13, "train__batch_size": 3, "data__prior_share": share, "data__prior_prompts": ["a dog"]}
    folders = [{"folder": str(folder), "repeats": 2}, {"folder": str(small.draw_folder(tmp_path / "more", 2))}]
    run = small.settled(Path(), base, data__folder="", data__folders=folders, data__skip_unreadable=True, **changes)
    found, table, dataset = rows(run, loaded, tmp_path)
    latents = [[(small.torch.full((1, 2, 2), float(i)), small.torch.zeros(1, 2, 2))] for i in range(len(dataset.sizes))]
    data: Prepared = learners.prepared(learners.Job(run, loaded.base, tmp_path, 0.0, dataset, ["text_encoder.x"]), loaded, latents)
    seen: Counter[int] = Counter()
    for batch in micro_batch([data], range(13 * 3)):
        seen.update(batch.latents[~batch.prior][:, 0, 0, 0].int().tolist())
    names = [dataset.account.name(item.path) for item in dataset.account.used]
    assert {name: seen[i] for i, name in enumerate(names)} == {name: found[name]["shown"] for name in names}
    total = table["totals"]["samples_of_pictures"]  # type: ignore[index, call-overload]
    assert total == sum(seen.values())
    assert (total == 39) == (share == 0), "the control: prior samples show no picture of their own"


def test_check_prints_a_report_json_and_a_page(folder: Path, base: Path, tmp_path: Path) -> None:
    before = sorted((path, path.read_bytes()) for path in folder.iterdir())
    command = ["check", str(folder), "--set", f"base={base}"]
    told = CliRunner().invoke(cli.app, command)
    assert told.exit_code == 0, told.output
    lines = told.output.strip().splitlines()
    assert lines[0].startswith("broken.png: left out")
    assert lines[-1].startswith("6 pictures found, 5 used")
    page = tmp_path / "page.html"
    told = CliRunner().invoke(cli.app, [*command, "--json", "--html", str(page)])
    table = json.loads(told.output)
    assert {row["fate"] for row in table["pictures"]} <= {"used", "fixed", "warned", "left_out"}
    html = page.read_text("utf-8")
    assert html.count("<img ") == 5
    assert "&lt;b&gt;strip.png" in html
    assert "a &lt;i&gt;ball" in html
    assert "<b>strip" not in html.replace("<b>&lt;b&gt;", "")
    assert before == sorted((path, path.read_bytes()) for path in folder.iterdir()), "the folder is left as it was"


def test_check_takes_a_settings_file_and_refuses_what_is_misspelt(folder: Path, base: Path, tmp_path: Path) -> None:
    good = tmp_path / "run.toml"
    good.write_text(
        f'base = "{base.as_posix()}"\n[data]\nfolder = "{folder.as_posix()}"\nresolution_px = 32\n[train]\nsteps = 2\nbatch_size = 5\n'
    )
    told = CliRunner().invoke(cli.app, ["check", str(good), "--json"])
    assert json.loads(told.output)["totals"]["samples"] == 10
    told = CliRunner().invoke(cli.app, ["check", str(good), "--set", "train.stepz=3"])
    assert told.exit_code == 2
    assert "did you mean steps" in told.output
    assert CliRunner().invoke(cli.app, ["check", str(tmp_path / "nowhere")]).exit_code == 2


def test_many_findings_of_a_kind_are_told_in_few_lines() -> None:
    blurred = [Finding("blurred", (f"{i}.png",), "no edge", "warn") for i in range(ledger.MOST_TOLD + 3)]
    found = [*blurred, Finding("small", ("a.png",), "64 px", "warn"), Finding("few", (), "three", "note")]
    told = ledger.warnings(found)
    assert len(told) == ledger.MOST_TOLD + 2
    assert told[-2:] == ["small (a.png): 64 px", "blurred: 3 more like these; ledger.json names them all"]
    assert ledger.warnings(blurred[:-3])[-1].startswith("blurred (9.png)"), "the control: no line more than there is to tell"
