"""Figures put into docs/measured.md: a bench writes what stands between its own two marks, and nothing else."""

import platform
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch

PAGE = Path(__file__).parent.parent / "docs" / "measured.md"


def put(name: str, text: str, page: Path = PAGE) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- end of name -->`; a page without them is an error."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} has no place for {name}: put {begin.strip()} and {end} where it is to stand")
    page.write_text(f"{before}{begin}{text.strip()}\n{end}{after}", encoding="utf-8")


def conditions(*packages: str) -> str:
    """When, where and with what something was measured, in a line."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    where = gpu or f"{processor()}, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", *packages))
    return f"{datetime.now():%Y-%m-%d}, {where}, Python {platform.python_version()}, {versions}."


def processor() -> str:
    """What the processor calls itself, where that is known."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
