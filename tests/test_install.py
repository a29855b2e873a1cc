"""A wheel built from the checkout works in an environment of its own, outside the checkout."""

import ast
import os
import subprocess
import sys
import sysconfig
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from time import monotonic, sleep

import pytest
import small

ROOT = Path(__file__).parent.parent
ALONE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
"""The environment without what would lead to a checkout."""
NAMES = {"PIL": "pillow", "tomli_w": "tomli-w"}  # imported under another name than installed


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sdlora` in a fresh environment: the wheel is installed there, its dependencies are seen but not the checkout."""
    folder = tmp_path_factory.mktemp("install")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, env=ALONE)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True, env=ALONE)
    binaries = folder / "env" / "bin"
    subprocess.run([binaries / "python", "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True, capture_output=True, env=ALONE)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    # A path line brings in the dependencies; it does not run the .pth files there, so the editable checkout stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return binaries / "sdlora"


def run(program: Path, *arguments: str, cwd: Path) -> str:
    done = subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True, check=False, env=ALONE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_installed_code_is_the_wheels(program: Path, tmp_path: Path) -> None:
    python = program.with_name("python")
    say = "import sdlora, webui; print(sdlora.__file__, webui.__file__)"
    told = subprocess.check_output([python, "-c", say], cwd=tmp_path, text=True, env=ALONE)
    assert told.count(str(program.parent.parent)) == 2, told
    say = "from webui.projects import SAMPLE; print(SAMPLE, len([*SAMPLE.glob('*.png')]))"
    sample, count = subprocess.check_output([python, "-c", say], cwd=tmp_path, text=True, stderr=subprocess.DEVNULL, env=ALONE).split()
    assert sample.startswith(str(program.parent.parent)), "the bundled character comes with the wheel"
    assert int(count) == len([*(ROOT / "datasets" / "tavi").glob("*.png")])


@pytest.mark.slow
def test_it_trains_and_previews_on_the_sample(program: Path, tmp_path: Path) -> None:
    settings = ["--set", "train.steps=2", "--set", "train.batch_size=2", "--set", "preview.scales=[0.0, 1.0]", "--set", "preview.steps=2"]
    run(program, "train", str(ROOT / "datasets" / "tavi"), *settings, "--out", "run", cwd=tmp_path)
    pack = tmp_path / "run" / "tavi.safetensors"
    assert pack.is_file()
    assert (tmp_path / "run" / "strip.png").is_file()
    run(program, "generate", str(pack), "--prompt", "tavi", "--steps", "2", "--out", "picture.png", cwd=tmp_path)
    assert (tmp_path / "picture.png").is_file()


@pytest.mark.slow
def test_the_studio_opens(program: Path, tmp_path: Path) -> None:
    port = str(small.any_port())
    process = subprocess.Popen([program, "ui", "--port", port], cwd=tmp_path, env={**ALONE, "GRADIO_ANALYTICS_ENABLED": "False"})
    try:
        page = answer(f"http://127.0.0.1:{port}/", process)
    finally:
        process.terminate()
        process.wait(small.PATIENCE_S)
    assert "gradio" in page.lower()


def answer(url: str, process: "subprocess.Popen[bytes]", seconds: float = small.PATIENCE_S) -> str:
    """What a page says once its server is up."""
    end = monotonic() + seconds
    while monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url) as page:
                return str(page.read().decode())
        except (urllib.error.URLError, ConnectionError):
            sleep(0.3)
    raise AssertionError(f"no answer from {url}; exit code {process.poll()}")


def undeclared(sources: dict[str, str], declared: set[str]) -> set[str]:
    """Packages that sources import at their top level without their being declared or in the standard library."""
    nodes = [node for source in sources.values() for node in ast.parse(source).body]
    imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    found = {name.partition(".")[0] for name in imported}
    found -= {"sdlora", "webui", *sys.stdlib_module_names}
    return {name for name in found if NAMES.get(name, name) not in declared}


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]  # for users, not us
    declared = {"".join(c for c in line.split(">")[0] if c not in "<=!~ ") for line in [*project["dependencies"], *extras]}
    sources = {str(path): path.read_text() for folder in ("sdlora", "webui") for path in (ROOT / folder).rglob("*.py")}
    assert undeclared(sources, declared) == set()
    assert undeclared({"made up": "import requests\nfrom torch import nn"}, declared) == {"requests"}


def test_constraints_name_every_dependency_and_no_address() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    known = {name.lower().replace("_", "-") for name in pinned}
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {line.split(">")[0].lower() for line in wanted} <= known
    assert not any("/" in line or "+" in line for line in pinned.values())
