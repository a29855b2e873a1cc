"""What is generated from the code is up to date, and what the README tells a user to type exists."""

import re
import shutil
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from typer import Typer
from typer.testing import CliRunner

from sdlora.cli import app

ROOT = Path(__file__).parent.parent


def test_settings_documentation_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import make_docs

    assert make_docs.stale(make_docs.documents()) == []


def test_a_stale_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import make_docs

    fresh = make_docs.documents()
    monkeypatch.setattr(make_docs, "DOCS", tmp_path)
    (tmp_path / "settings.md").write_text(fresh["settings.md"] + "x")
    assert make_docs.stale(fresh) == ["settings.md", "settings.schema.json"]


def test_every_verb_and_option_in_the_readme_exists() -> None:
    verbs = [[name] for name in names(app)]
    verbs += [[group.name or "", name] for group in app.registered_groups if group.typer_instance for name in names(group.typer_instance)]
    lines = re.findall(r"^sdlora (\w+)(?: (\w+))?(.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert any([verb, inner] in verbs for verb, inner, _ in lines)
    for verb, inner, rest in lines:
        words = [verb, inner] if [verb, inner] in verbs else [verb]
        assert words in verbs
        told = CliRunner().invoke(app, [*words, "--help"]).output
        for option in re.findall(r"(--[a-z-]+)", rest.partition("#")[0]):
            assert option in told, f"{verb} has no {option}"


def names(app: Typer) -> list[str]:
    return [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]


def test_links_in_the_documents_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_python_examples_run(base: Path, pictures: Path, pack_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = StableDiffusionPipeline.from_pretrained
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", lambda _: read(base, use_safetensors=True))
    monkeypatch.chdir(tmp_path)
    for name in ("mira", "inkwash"):
        shutil.copy(pack_path, f"{name}.safetensors")
    shutil.copytree(base, "my-base")
    shutil.copytree(pictures, "my-pictures")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert len(blocks) >= 5
    exec(compile("\n".join(blocks), "python.md", "exec"), {})
    assert {"mira-bf16.safetensors", "mira.zip", "taken", "mira.png"} <= {path.name for path in tmp_path.iterdir()}
