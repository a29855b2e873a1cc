"""The benches run from end to end, and write nothing but rows of their own."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small
import torch
import torch.nn.functional as F

from webui.easel import Easel

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import arms
import gpu
import pages
import rows
import scale
import script
import soak
import speed

PAGE = "# Figures\n\n<!-- one -->\nold\n<!-- end of one -->\n\nbetween\n\n<!-- two -->\nkept\n<!-- end of two -->\n"


def test_a_bench_writes_its_own_rows_alone(tmp_path: Path) -> None:
    page = tmp_path / "measured.md"
    page.write_text(PAGE)
    rows.put("one", "new\n\nrows\n", page)
    assert page.read_text() == PAGE.replace("old", "new\n\nrows")
    with pytest.raises(SystemExit, match="no place for three"):
        rows.put("three", "new", page)


def test_every_bench_has_its_place_on_the_page() -> None:
    said = rows.PAGE.read_text(encoding="utf-8")
    for name in ("speed", "scale", *(f"gpu {section}" for section in gpu.SECTIONS)):
        assert said.count(f"<!-- {name} -->\n") == said.count(f"<!-- end of {name} -->\n") == 1


def test_the_cosine_of_what_was_learnt_is_that_of_the_products() -> None:
    one, other = ({f"{name}.{side}": small.numbers(shape, seed) for name in "ab" for side, shape in {"down": (2, 5), "up": (3, 2)}.items()}
                  for seed in (1, 2))  # fmt: skip
    whole = [torch.cat([(it[f"{name}.up"] @ it[f"{name}.down"]).flatten() for name in "ab"]) for it in (one, other)]
    assert arms.cosine(one, other) == pytest.approx(float(F.cosine_similarity(*whole, 0)), abs=1e-6)
    assert arms.cosine(one, one) == pytest.approx(1.0)


def test_networks_in_both_precisions_have_the_same_weights() -> None:
    half, full = (
        dict(arms.network(arms.NARROW, torch.device("cpu"), dtype).named_parameters()) for dtype in (torch.bfloat16, torch.float32)
    )
    assert all(torch.equal(half[name].float(), full[name]) for name in full)
    assert all(bool(one.isfinite().all()) for one in full.values())


@pytest.mark.slow
def test_the_speed_bench_runs_and_its_gate_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--small", "--px", "256", "--batches", "1", "--rounds", "1", "--parity", "6", "--threads", "1"]
    assert speed.main([*options, "--out", str(tmp_path / "bench.json")]) == 0
    said = capsys.readouterr().out
    assert all(f"| {name} | 1 |" in said for name in speed.ARMS)
    assert (tmp_path / "bench.png").stat().st_size > 1000
    found = {name: {"losses": [1.0, 1.0], "learnt": {"a.down": torch.eye(2), "a.up": torch.eye(2)}} for name in speed.ARMS}
    assert speed.judged(found)
    found["ours, bf16"]["losses"] = [1.0, 1.01]
    assert not speed.judged(found), "the control"


@pytest.mark.slow
def test_the_gpu_bench_runs_on_narrow_networks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: gpu.Room) -> Iterator[str]:
        yield "a row"
        raise RuntimeError("no such kernel")

    page = rows.PAGE.read_text(encoding="utf-8")
    assert gpu.main(["--dry", "--write"]) == 0
    said = capsys.readouterr().out
    assert all(f"# {section}" in said for section in gpu.SECTIONS)
    assert said.count("| nf4 | on |") == len(gpu.TRUE)
    assert "does not fit" not in said
    assert rows.PAGE.read_text(encoding="utf-8") == page, "figures of a dry run are never written"
    monkeypatch.setitem(gpu.SECTIONS, "speed", broken)
    assert gpu.main(["--dry", "--only", "speed"]) == 1
    assert "The rest failed: no such kernel" in capsys.readouterr().out
    assert gpu.main(["--dry", "--minutes", "0", "--only", "cast"]) == 0
    assert "time was up" in capsys.readouterr().out


@pytest.mark.slow
def test_the_scale_bench_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert scale.main(["--pictures", "3", "--ranks", "2", "--drawn", "5", "--processes", "2", "--steps", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:3] for line in lines if line.count("|") == 12][2:] == [[" 3 ", " 16 "], [" 3 ", " 2 "]]
    assert any(line.startswith("| 2 | 1 | ") and line.endswith(" | 2.13 |") for line in lines)
    assert lines[-1].startswith("| 5 | ")


@pytest.mark.slow
def test_diffusers_script_is_given_a_base_it_can_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the script opens what it is given, as the script does; by the clock of this test a start is 5 s and a step 0.1 s."""
    file = tmp_path / "train.py"
    file.write_text("""
import sys
from pathlib import Path
told = dict(zip(*[iter(sys.argv[1:])] * 2))
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
base = told["--pretrained_model_name_or_path"]
tokens = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")("picture 1", padding="max_length", truncation=True, return_tensors="pt")
states = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")(tokens.input_ids)[0]
assert states.shape[-1] == UNet2DConditionModel.load_config(base, subfolder="unet")["cross_attention_dim"]
DDPMScheduler.from_pretrained(base, subfolder="scheduler")
assert len(list(Path(told["--train_data_dir"]).glob("*.png"))) == 8
""")
    passed = [0.0]

    def run(command: list[str], **how: Any) -> Any:
        passed[0] += 5 + 0.1 * int(command[command.index("--max_train_steps") + 1])
        return subprocess.run(command, **how)

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: passed[0]))
    monkeypatch.setattr(script, "TRIES", 1)
    assert script.seconds(file, True, 64) == [pytest.approx(0.1)]


@pytest.mark.slow
def test_a_soak_weighs_a_server_that_draws(tmp_path: Path) -> None:
    soak.make_pack(tmp_path)
    found = soak.soaked(tmp_path, 12, 3600.0, 1)
    assert found["generations"] == 12
    assert min(found["RSS MB"]) > 100
    assert min(found["open files"]) > 3
    assert min(found["threads"]) > 1


def test_drift_is_told_from_warming_up() -> None:
    assert soak.drift([50, 90, *[100] * 18]) == pytest.approx(0)
    assert soak.drift([100] * 10 + [106] * 10) == pytest.approx(0.06)


@pytest.mark.slow
def test_open_pages_are_answered_while_pictures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first picture is not drawn before thirty answers have come. How soon they come is for the bench to say."""
    pages.make_run(tmp_path)
    answered, waited, draw = threading.Event(), list[bool](), Easel.pair

    def late(easel: Easel, wish: Any) -> Any:
        waited.append(answered.wait(small.PATIENCE_S))  # no page waits for that of another
        return draw(easel, wish)

    def enough(drawn: int, asked: int) -> bool:
        if asked >= 30:
            answered.set()
        return drawn >= 1 and answered.is_set()

    monkeypatch.setattr(Easel, "pair", late)
    monkeypatch.setattr(pages, "EVERY_S", 0.05)
    drawn, took = pages.measure(tmp_path, 10, enough)
    assert waited
    assert all(waited), "the pages waited for a picture"
    assert drawn >= 1
    assert len(took) >= 30
