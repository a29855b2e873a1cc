"""The real `sdlora train`, killed at any time and at every operation on its disk, ends as the run that nobody touched."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small
from faults import Crash, Crashing, Watched
from test_resume import differences, pack

from sdlora import api, safeio

SETTINGS = {
    "train.steps": 6, "train.batch_size": 1, "train.save_every": 1, "train.warmup_steps": 1, "train.log_every": 1,
    "train.precision": '"fp32"', "adapter.rank": 2, "data.resolution_px": 32, "data.prior_share": 0.0, "preview.scales": "[]",
    "preview.every": 0,
}  # fmt: skip

Go = Callable[[Path, float | None], dict[str, Any]]
"""Train into a folder, killed after some seconds (None: never): the exit code and the seconds that it took."""


@pytest.fixture(scope="module")
def go(squares: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Go]:
    log = tmp_path_factory.mktemp("logs") / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("forkserver.py")), str(base)]
    options = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as server:
        assert server.stdin
        assert server.stdout
        server.stdout.readline()

        def train(out: Path, seconds: float | None) -> dict[str, Any]:
            arguments = ["train", str(squares), "--name", "mira", "--base", str(base), *options, "--out", str(out)]
            print(json.dumps({"arguments": arguments, "log": str(log), "seconds": seconds}), file=server.stdin, flush=True)
            ended: dict[str, Any] = json.loads(server.stdout.readline())
            assert ended["code"] in (0, -9), log.read_text()
            return ended

        yield train
        server.stdin.close()


@pytest.mark.slow
@pytest.mark.parametrize("kills", [50, pytest.param(1000, marks=pytest.mark.large)])
def test_killed_at_any_time_it_ends_the_same(kills: int, go: Go, tmp_path: Path) -> None:
    go(tmp_path / "first", None)
    whole = tmp_path / "whole"
    longest = go(whole, None)["seconds"]  # of the last run that nobody killed: a busy machine may become an idle one
    chance, done, jobs, ended_otherwise = random.Random(kills), 0, 0, 0
    while done < kills:
        out, wanted = tmp_path / "run", min(done + chance.randint(3, 6), kills)
        while done < wanted:  # also while it recovers, and while it goes over a finished run
            ended = go(out, chance.uniform(0, longest))
            done += ended["code"] == -9
            longest = longest if ended["code"] else ended["seconds"]
        ended = go(out, None)
        assert ended["code"] == 0
        different = differences(pack(out), pack(whole))
        ended_otherwise += bool(different) or bool(list(out.rglob(f"{safeio.TEMPORARY}*")))
        jobs += 1
        if jobs % 10 == 0 or done == kills:
            print(f"kills: {done} in {jobs} runs, {ended_otherwise} ended otherwise", flush=True)
        shutil.rmtree(out)
    assert ended_otherwise == 0


@pytest.mark.slow
@pytest.mark.parametrize("every", [17, pytest.param(1, marks=pytest.mark.large)])
def test_crashed_at_any_operation_it_ends_the_same(every: int, squares: Path, base: Path, tmp_path: Path) -> None:
    run = small.settled(squares, base)

    def trained(out: Path, disk: Watched) -> bool:
        try:
            with safeio.using(disk):  # type: ignore[arg-type]
                return bool(list(api.train(run, out)))
        except Crash:
            return False

    assert trained(tmp_path / "whole", Watched())
    assert trained(tmp_path / "again", counted := Watched())  # its pictures are in the cache, as those of all that follow
    whole, at, points = pack(tmp_path / "whole"), 1, 0
    while not trained(tmp_path / "run", Crashing(at)):
        assert trained(tmp_path / "run", Watched()), at
        assert differences(pack(tmp_path / "run"), whole) == [], at
        shutil.rmtree(tmp_path / "run")
        at, points = at + every, points + 1
    print(f"crash at every operation of the real job: {points} points, 0 ended otherwise")
    assert points == len(range(1, len(counted.calls), every)) >= 100 / every
