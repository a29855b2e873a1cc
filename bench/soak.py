"""Whether the page keeps what it takes: memory, open files and threads of a server that draws one picture after another.

python bench/soak.py [--generations 500] [--minutes 30] [--steps 4]

Each generation is a new seed and scale, so that nothing comes out of a cache; it ends with whichever limit comes first. Drift is the mean
of the last tenth over that of the second tenth: the first one is warming up.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from gradio_client import Client

from sdlora import api
from webui import app

CHARACTER = Path(__file__).resolve().parent.parent / "datasets" / "tavi"
MOST_DRIFT = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--steps", type=int, default=4, help="of drawing a picture")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        make_pack(Path(root))
        found = soaked(Path(root), said.generations, said.minutes * 60, said.steps)
    print(json.dumps(found, indent=1))
    sys.exit(int(found["drift"] > MOST_DRIFT))


def make_pack(root: Path) -> None:
    """A run of two steps on the bundled character, and its pack."""
    table = {"name": "mira", "data": {"folder": str(CHARACTER)}, "train": {"steps": 2}, "preview": {"scales": [], "every": 0}}
    for _ in api.train(api.settle(table), root / "mira"):
        pass


def soaked(root: Path, generations: int, seconds: float, steps: int) -> dict[str, Any]:
    """Figures of a server that was asked for so many pictures."""
    port = app.free_port(0)
    words = [sys.executable, "-m", "sdlora.cli", "ui", "--data-root", str(root), "--port", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        server.stdout.readline()  # it is there
        page = Client(f"http://{app.HOST}:{port}", verbose=False)
        (pack,) = page.predict(api_name="/packs")
        began, found = time.monotonic(), list[tuple[int, int, int]]()
        while len(found) < generations and time.monotonic() - began < seconds:
            page.predict(pack, "mira in the sea", len(found) % 40 / 20, len(found), steps, 3.0, "", api_name="/draw")
            found.append(weighed(server.pid))
        took = time.monotonic() - began
    finally:
        server.terminate()
        server.wait(120)
    sizes, threads, files = zip(*found, strict=True)
    return {
        "generations": len(sizes), "seconds": round(took, 1), "drift": round(drift(sizes), 4),
        "RSS MB": [size // 2**20 for size in spread(sizes)], "open files": spread(files), "threads": spread(threads),
    }  # fmt: skip


def weighed(pid: int) -> tuple[int, int, int]:
    """Bytes resident, threads and open files of a process (Linux)."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(lines["VmRSS"].split()[0]) * 1024, int(lines["Threads"]), len(os.listdir(f"/proc/{pid}/fd"))


def drift(sizes: Sequence[int]) -> float:
    tenth = max(1, len(sizes) // 10)
    return mean(sizes[-tenth:]) / mean(sizes[tenth : 2 * tenth] or sizes[:1]) - 1


def spread(values: Sequence[int]) -> list[int]:
    """The first, those at every tenth, and the last."""
    return [values[round(i * (len(values) - 1) / 10)] for i in range(11)]


if __name__ == "__main__":
    main()
