"""Jobs per hour: one `sdlora train` after another, and the same jobs as a fleet on a local Ray of 1, 2, ... CPUs.

    python bench/fleet.py --jobs 6 --workers 1,2 --steps 20

Every job has one thread. A fleet's time is from its command to its end, Ray's own start and end included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DATA = Path(__file__).parent.parent / "datasets" / "tavi"


def settings(folder: Path, number: int, steps: int) -> Path:
    path = folder / f"job-{number}.toml"
    path.write_text(
        f'name = "job-{number}"\nbase = "tiny"\nseed = {number}\ndata.folder = "{DATA}"\nadapter.rank = 4\n'
        f"train.steps = {steps}\ntrain.batch_size = 1\npreview.every = 0\npreview.scales = []\n"
    )
    return path


def run(arguments: list[str], environment: dict[str, str]) -> float:
    """Seconds that a command took."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "sdlora.cli", *arguments], env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "SDLORA_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        configs = [settings(folder, number, asked.steps) for number in range(asked.jobs)]
        run(["train", "--config", str(configs[0]), "--out", str(folder / "warm")], environment)  # pictures are encoded once, for all

        def told(how: str, seconds: float, first: float = 0.0) -> None:
            rate, load = 3600 * asked.jobs / seconds, os.getloadavg()[0]
            print(
                json.dumps({"how": how, "seconds": round(seconds, 1), "jobs_per_hour": round(rate), "first_job_s": first, "load": load}),
                flush=True,
            )

        told(
            "one after another",
            sum(run(["train", "--config", str(c), "--out", str(folder / "alone" / c.stem)], environment) for c in configs),
        )
        for workers in asked.workers.split(","):
            out, began = folder / f"fleet-{workers}", time.time()
            seconds = run(["fleet", *map(str, configs), "--in", str(out), "--workers", workers], environment)
            events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
            told(f"a fleet of {workers}", seconds, round(events[0]["time"] - began, 1))


if __name__ == "__main__":
    main()
