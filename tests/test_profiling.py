"""Laws of looking at time: a profile names where it went and changes nothing; a run says how long it took to its first step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import small
from safetensors.torch import load_file

from sdlora import api, profiling


@pytest.mark.slow
def test_a_profile_says_where_the_time_went_and_changes_nothing(base: Path, tmp_path: Path) -> None:
    folder, found = small.draw_folder(tmp_path / "pictures", square=True), []
    for profile in (True, False):
        run = small.settled(folder, base, train__profile=profile, train__save_every=1, data__prior_share=0.5)
        found.append(list(api.train(run, tmp_path / str(profile))))
    one, other = (load_file(tmp_path / name / "mira.safetensors") for name in ("True", "False"))
    assert {key: value.tolist() for key, value in one.items()} == {key: value.tolist() for key, value in other.items()}
    (told,) = (event for event in found[0] if "profile_ms" in event.data)
    assert not any("profile_ms" in event.data for event in found[1])
    parts = told.data["profile_ms"]
    assert list(parts) == ["base", "adapter", "optimizer", "data", "host"]
    assert all(value >= 0 for value in parts.values())
    assert min(parts[name] for name in ("base", "optimizer", "data")) > 0
    assert told.step == profiling.WARM + profiling.LOOKED
    place = tmp_path / "True" / "profile"
    page = (place / "summary.md").read_text()
    assert all(f"| {name} | {value:.2f} |" in page for name, value in parts.items())
    named = {event.get("name") for event in json.loads((place / "trace.json").read_text())["traceEvents"]}
    assert {"data", "optimizer", "aten::mm"} <= named
    assert not (tmp_path / "False" / "profile").exists()


def test_a_run_too_short_to_be_looked_at_is_only_trained(base: Path, tmp_path: Path) -> None:
    run = small.settled(small.draw_folder(tmp_path / "pictures", square=True), base, train__profile=True, train__steps=3)
    assert list(api.train(run, tmp_path / "run"))[-1].kind == "done"
    assert not (tmp_path / "run" / "profile").exists()


def test_the_way_to_the_first_step_is_told_in_parts(base: Path, tmp_path: Path) -> None:
    run = small.settled(small.draw_folder(tmp_path / "pictures", square=True), base, train__steps=1)
    (told,) = (event.data["startup_s"] for event in api.train(run, tmp_path / "run") if "startup_s" in event.data)
    assert list(told) == ["process", "pictures", "base", "plan", "latents", "adapter", "first look", "step"]
    assert all(seconds >= 0 for seconds in told.values())


def test_help_and_misspelt_settings_import_nothing_heavy() -> None:
    heavy = ("torch", "diffusers", "transformers", "accelerate", "gradio")
    code = f"""import sys
from sdlora.cli import app
try:
    app(sys.argv[1:])
finally:
    print("heavy:", [name for name in {heavy} if name in sys.modules])"""
    for words in (["--help"], ["train", "--help"], ["pack", "--help"], ["no-such-verb"]):
        said = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False).stdout
        assert said.splitlines()[-1] == "heavy: []", words
    refused = ["train", "nowhere", "--set", "train.stepps=3"]
    said = subprocess.run([sys.executable, "-c", code, *refused], capture_output=True, text=True, check=False)
    assert "train.stepps: no such setting" in said.stdout + said.stderr
    assert said.stdout.splitlines()[-1] == "heavy: []", "a misspelt setting is refused at once"
    noticed = subprocess.run([sys.executable, "-c", f"import accelerate\n{code}", "--help"], capture_output=True, text=True, check=False)
    assert noticed.stdout.splitlines()[-1] != "heavy: []", "the control"
