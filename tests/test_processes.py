"""One run in several processes: what they compute is what one computes, one of them writes, and none outlives another."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import small
import torch
from test_train import apart, cast, exactly

from sdlora import api, processes
from sdlora.errors import RESOURCES, UserError
from sdlora.train import Setup, assist, steps

# ---------------------------------------------------------------- what each has to do


class Some(processes.Processes):
    """One of several that never speak."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_all_samples_have_one_who_computes_them(count: int) -> None:
    for size in range(12):
        parts = [Some(rank, count).part(range(size)) for rank in range(count)]
        assert [one for part in parts for one in part] == [*range(size)]
        assert max(map(len, parts)) == Some(0, count).most(size)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        dealt = sorted(place for rank in range(count) for place in Some(rank, count).dealt(size))
        assert dealt == [*range(size)]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "two"}, "E-PROC-01.*no number of processes"),
        ({"WORLD_SIZE": "0"}, "E-PROC-01.*no number of processes"),
        ({"WORLD_SIZE": "2"}, "E-PROC-01.*RANK and MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "E-PROC-01.*RANK does not fit"),
        ({"WORLD_SIZE": "2", "RANK": "-1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "E-PROC-01.*RANK does not fit"),
    ],
)
def test_what_a_launcher_says_is_looked_at(environment: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said), processes.together(environment):
        pytest.fail("it would train")


def test_who_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(small.any_port())}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=r"E-PROC-02.*process 0 of 2") as raised, processes.together(seconds=1.0):
        pytest.fail("it would train")
    assert raised.value.exit_code == RESOURCES


def test_one_process_costs_nothing() -> None:
    with processes.together({}) as alone:
        assert alone is processes.ALONE
        assert (alone.leads, alone.count, alone.asked) == (True, 1, 0)
        alone.alike({"anything": "at all"})
        alone.check(None)
        with pytest.raises(UserError, match="E-TEST-01"):
            alone.check(UserError("E-TEST-01", "a", "b", "c"))


def test_a_changed_bit_changes_the_checksum() -> None:
    layer = torch.nn.Linear(3, 2)
    before = processes.checksum(layer)
    with torch.no_grad():
        layer.weight[1, 2] = torch.nextafter(layer.weight[1, 2], torch.tensor(math.inf))
    assert processes.checksum(layer) != before


# ---------------------------------------------------------------- for real, by gloo


class Group:
    """Starts processes, all from one that has imported everything, and ends them."""

    def __init__(self, server: Any, folder: Path) -> None:
        self.server, self.folder = server, folder

    def ask(self, wanted: dict[str, Any]) -> dict[str, Any]:
        print(json.dumps(wanted), file=self.server.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.server.stdout.readline())
        return answer

    def start(self, arguments: Sequence[str], count: int, script: str = "") -> list[int]:
        """The process numbers of so many, each with a cache of its own, as on machines that share no disk but the run's."""
        port, pids = str(small.any_port()), []
        for rank in range(count):
            environment = {"SDLORA_CACHE": str(self.folder / f"cache-{rank}-of-{count}")}
            if count > 1:
                told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                environment |= {key: str(value) for key, value in told.items()}
            wanted = {"arguments": [*arguments], "environment": environment, "script": script}
            pids.append(self.ask({**wanted, "log": str(self.log(rank)), "audit": str(self.folder / f"writes-{rank}")})["pid"])
        return pids

    def log(self, rank: int) -> Path:
        return self.folder / f"log-{rank}"

    def said(self, rank: int) -> str:
        return self.log(rank).read_text(encoding="utf-8")

    def wait(self, pids: Sequence[int], seconds: float = small.PATIENCE_S) -> list[int | None]:
        return [self.ask({"wait": pid, "seconds": seconds})["code"] for pid in pids]

    def whole(self, arguments: Sequence[str], count: int, script: str = "") -> None:
        assert self.wait(self.start(arguments, count, script)) == [0] * count, [self.said(rank) for rank in range(count)]


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("forkserver.py")), str(base)]
    with subprocess.Popen(
        command, text=True, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as started:
        assert started.stdin
        assert started.stdout
        started.stdout.readline()
        yield started
        started.stdin.close()


@pytest.fixture
def group(server: Any, tmp_path: Path) -> Group:
    return Group(server, tmp_path)


def trained_in_doubles(request: Path) -> None:
    """What each process of `test_two_are_one` does: the loop alone, in float64, as the request says."""
    wanted = json.loads(request.read_text())
    runs = [api.settle(run) for run in wanted["runs"]]
    torch.set_default_dtype(torch.float64)
    with processes.together() as company:
        made = cast(runs, Path(os.environ["SDLORA_CACHE"]), torch.float64)
        exactly(made.learners)
        if wanted["case"] == "broken":
            ((mean, std),) = made.learners[1].data.latents[0]
            made.learners[1].data.latents[0][0] = (mean * math.nan, std)  # type: ignore[index]
        setup = Setup(made.loaded, made.bank, made.learners, processes=company)
        if wanted["case"] == "scarce" and not company.leads:
            predict = made.loaded.predict
            made.loaded.predict = lambda x, *rest: predict(x, *rest) if len(x) == 1 else scarce()  # type: ignore[method-assign]
        told = [*(steps(setup) if company.leads else assist(setup))]
        if not company.leads:
            return
        company.told(None)
        found = {f"{one.name}/{name}": value.detach() for one in made.learners for name, value in one.params.items()}
        losses = torch.stack([torch.stack([one.loss[slot] for slot in range(len(runs))]) for one in told])
        finite = torch.stack([torch.stack([one.finite[slot] for slot in range(len(runs))]) for one in told])
        at_once = torch.tensor([one.at_once for one in told])
        safetensors.torch.save_file({**found, "losses": losses, "finite": finite, "at_once": at_once}, wanted["out"])


def scarce() -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def members(base: Path, tmp_path: Path, steps: int) -> list[dict[str, Any]]:
    """Two whose samples do not come out even: 3 and 2 of a step, with priors, dropout and pictures of several shapes."""
    common: dict[str, Any] = {"train__steps": steps, "train__lr": 3e-3, "data__caption_dropout": 0.4}
    drops = {"adapter__dropout": 0.1, "adapter__rank_dropout": 0.2, "adapter__module_dropout": 0.1}
    prior = {"data__prior_share": 0.4, "data__prior_prompts": ["a dog"]}
    targets = ["cross-attention", "unet.conv_*", "text-encoder"]
    first = small.settled(
        small.draw_folder(tmp_path / "a", 4), base, name="mira", train__batch_size=3, adapter__targets=targets, **common, **prior
    )
    second = small.settled(small.draw_folder(tmp_path / "b", 1), base, name="tavi", seed=7, adapter__rank=3, **common, **drops)
    return [run.model_dump(mode="json", exclude_none=True) for run in (first, second)]


@pytest.mark.slow
def test_two_are_one(group: Group, base: Path, tmp_path: Path) -> None:
    def found(count: int, case: str = "") -> dict[str, torch.Tensor]:
        out = tmp_path / f"{count}{case}.safetensors"
        wanted = {"runs": members(base, tmp_path / str(out.stem), 6 if case else 50), "case": case, "out": str(out)}
        (tmp_path / "request").write_text(json.dumps(wanted))
        group.whole([str(tmp_path / "request")], count, __file__)
        return safetensors.torch.load_file(out)

    def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], whose: Sequence[str] = ("mira/",)) -> float:
        kept = [name for name in a if name.startswith(tuple(whose))]
        return apart({name: a[name] for name in kept}, {name: b[name] for name in kept})

    one, two = found(1), found(2)
    assert {value.dtype for name, value in one.items() if "/" in name} == {torch.float64}
    both = far(one, two, ["mira/", "tavi/"])
    print(f"2 processes and 1, float64, 50 steps: {both:.1e} relative")
    assert both <= 1e-9
    torch.testing.assert_close(one["losses"], two["losses"])

    one, two, less = found(1, "broken"), found(2, "broken"), found(2, "scarce")
    assert not one["finite"][:, 1].any()
    assert torch.equal(one["finite"], two["finite"]), "all know of what one has found"
    assert far(one, two) <= 1e-9
    assert far(one, less) <= 1e-9
    assert less["at_once"].all(), "where memory is scarce in one, all take smaller parts"
    assert not two["at_once"].any()
    assert not all(torch.equal(one[name], two[name]) for name in one if name.startswith("mira/")), "the control: they did add up otherwise"


SETTINGS = {
    "train.batch_size": 3, "train.save_every": 2, "train.warmup_steps": 1, "train.log_every": 1, "train.precision": '"fp32"',
    "adapter.rank": 2, "data.resolution_px": 32, "data.prior_share": 0.0, "preview.scales": "[]", "preview.every": 0,
    "train.lr": 1e-2, "train.text_encoder_lr": 5e-3, "train.schedule": '"constant"',
}  # fmt: skip


@pytest.fixture
def command(squares: Path, base: Path) -> Callable[[Path, int], list[str]]:
    def made(out: Path, steps: int) -> list[str]:
        options = [part for key, value in {**SETTINGS, "train.steps": steps}.items() for part in ("--set", f"{key}={value}")]
        return ["train", str(squares), "--name", "mira", "--base", str(base), "--out", str(out), *options]

    return made


def adapter(out: Path, step: int) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "checkpoints" / f"ckpt-{step:06d}" / "adapter.safetensors")


def events(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def reached(out: Path, step: int) -> Callable[[], bool]:
    """Whether a run has told of a step."""
    return lambda: (out / "events.jsonl").exists() and any(event["step"] >= step for event in events(out))


@pytest.mark.slow
def test_a_run_of_two_is_the_run_of_one_and_each_goes_on_as_the_other(
    group: Group, command: Callable[[Path, int], list[str]], tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    group.whole(command(one, 8), 1)
    group.whole(command(two, 8), 2)
    far = apart(adapter(one, 8), adapter(two, 8))
    print(f"2 processes and 1, fp32, 8 steps: {far:.1e} relative")
    assert far < 1e-3
    said = next(event for event in events(two) if event.get("data", {}).get("processes"))
    assert said["data"]["gradient_bytes"] == sum(value.numel() * value.element_size() for value in adapter(two, 8).values())
    assert group.said(1).strip() == "", "only the first tells"
    wrote = [[line for line in (tmp_path / f"writes-{rank}").read_text().splitlines() if str(two) in line] for rank in (0, 1)]
    assert wrote[0], "the control: what is written is noticed"
    assert wrote[1] == [], "only the first writes"

    encoded = [{path.name for path in (tmp_path / f"cache-{rank}").glob("*.latents")} for rank in ("0-of-1", "0-of-2", "1-of-2")]
    assert encoded[1] | encoded[2] == encoded[0]
    assert encoded[1] & encoded[2] == set(), "each picture is encoded once"
    assert all(encoded)

    for before, after in ((2, 1), (1, 2)):
        out = tmp_path / f"{before}-then-{after}"
        pids = group.start(command(out, 100_000), before)
        small.until(reached(out, 3))
        os.kill(pids[-1], signal.SIGINT)  # whoever is asked, all stop, after the same step
        assert group.wait(pids)[0] == 130, group.said(0)
        at = max(int(path.name[5:]) for path in (out / "checkpoints").glob("ckpt-*"))
        group.whole(["resume", str(out), "--set", f"train.steps={at + 3}"], after)
        whole = tmp_path / f"whole-{before}"
        group.whole(command(whole, at + 3), 1)
        assert apart(adapter(out, at + 3), adapter(whole, at + 3)) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_one_that_dies_or_hangs_ends_the_other(
    killed: int, how: int, group: Group, command: Callable[[Path, int], list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    pids = group.start(command(out, 100_000), 2)
    small.until(reached(out, 4))
    os.kill(pids[killed], how)
    left = 1 - killed
    (code,) = group.wait([pids[left]])
    os.kill(pids[killed], signal.SIGKILL)
    assert code == RESOURCES, "it ends by itself: one that had to be killed has no code"
    assert "E-PROC-03" in group.said(left)
    assert "sdlora resume" in group.said(left)
    group.wait([pids[killed]])
    at = max(int(path.name[5:]) for path in (out / "checkpoints").glob("ckpt-*"))
    last = max(event["step"] for event in events(out) if event["kind"] == "step")
    assert at >= last - 2, "no more is lost than lay between two checkpoints"
    group.whole(["resume", str(out), "--set", f"train.steps={at + 2}"], 1)
    assert not list((out / "checkpoints").glob("bad-*"))


@pytest.mark.slow
def test_what_differs_between_them_is_refused_by_all(group: Group, command: Callable[[Path, int], list[str]], tmp_path: Path) -> None:
    port, pids = str(small.any_port()), []
    for rank in range(2):
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        arguments = [*command(tmp_path / "run", 4), "--set", f"seed={rank}"]
        pids.append(group.ask({"arguments": arguments, "environment": environment, "log": str(group.log(rank))})["pid"])
    assert all(group.wait(pids))
    assert "E-PROC-05" in group.said(0) + group.said(1)
    assert "seed" in group.said(0) + group.said(1)
    assert not (tmp_path / "run" / "mira.safetensors").exists()


def test_other_commands_say_that_they_work_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdlora import devices

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="E-PROC-06"):
        devices.for_training("fp32")
    assert [processes.leads({"WORLD_SIZE": "2", "RANK": rank}) for rank in ("0", "1")] == [True, False], "and one of them says so"


if __name__ == "__main__":
    trained_in_doubles(Path(sys.argv[1]))
