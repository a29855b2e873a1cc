"""What is generated from the code is up to date, and what the README tells a user to type exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdlora.cli import app

ROOT = Path(__file__).parent.parent


def test_settings_documentation_is_up_to_date() -> None:
    check = subprocess.run([sys.executable, str(ROOT / "tools" / "make_docs.py"), "--check"], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr


def test_a_stale_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import make_docs

    fresh = make_docs.documents()
    monkeypatch.setattr(make_docs, "DOCS", tmp_path)
    (tmp_path / "settings.md").write_text(fresh["settings.md"] + "x")
    assert make_docs.stale(fresh) == ["settings.md", "settings.schema.json"]


def test_every_verb_and_option_in_the_readme_exists() -> None:
    verbs = {command.name or command.callback.__name__: command for command in app.registered_commands if command.callback}
    lines = re.findall(r"^sdlora (\w+)(.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert lines
    for verb, rest in lines:
        assert verb in verbs
        told = CliRunner().invoke(app, [verb, "--help"]).output
        for option in re.findall(r"(--[a-z-]+)", rest.partition("#")[0]):
            assert option in told, f"{verb} has no {option}"


def test_links_in_the_documents_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
