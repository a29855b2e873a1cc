"""Fleets: who is started next, what outlives a death of anybody, storage that is believed only whole, scripts that parse."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import small
import yaml
from fsspec.implementations.local import LocalFileSystem
from test_cli import call
from test_resume import differences, pack

from sdlora import api, lock
from sdlora.errors import RESOURCES, UserError
from sdlora.estimate import Measured
from sdlora.fleet import asking, carried, packing, scripts, storage, work
from sdlora.fleet.folder import Folder, Job
from sdlora.fleet.storage import Storage
from sdlora.fleet.work import Fleet, Outcome, Room, Task

DIED, DONE = Outcome(None, "", "gone"), Outcome(0, "node", "")


class Scripted:
    """An engine that runs nothing: jobs end in the order in which they began, as they were told to."""

    def __init__(self, room: Room, **ends: list[Outcome]) -> None:
        self.whole, self.ends, self.began, self.running, self.most = room, ends, list[str](), list[str](), 0

    def room(self) -> Room:
        return self.whole

    def start(self, name: str, task: Task) -> None:
        assert task.arguments[0] == "-m"
        assert all(isinstance(one, str) for one in [*task.arguments, *task.environment, *task.environment.values()])
        self.began.append(name)
        self.running.append(name)
        self.most = max(self.most, len(self.running))

    def ended(self, seconds: float) -> dict[str, Outcome]:
        if not self.running:
            time.sleep(min(seconds, 0.02))
            return {}
        name = self.running.pop(0)
        return {name: self.ends[name].pop(0) if self.ends.get(name) else DONE}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "PAUSE_S", 0.0)


def fleet(place: Path, *jobs: Job, **more: Any) -> Fleet:
    made = Fleet(Folder(place), str(place / "runs"), **more)
    for i, job in enumerate(jobs):
        made.folder.add(replace(job, added=float(i)), f'name = "{job.name}"\n')
    return made


def drive(one: Fleet, engine: Scripted, asked: list[int] | None = None) -> dict[str, str]:
    """How each job stands in the end."""
    with one.folder.held():
        for _ in one.work(engine, asked if asked is not None else []):
            pass
    return {job.name: one.folder.standing(job.name).state for job in one.folder.jobs()}


def test_the_most_urgent_go_first_within_the_room_and_the_limits_of_users(tmp_path: Path) -> None:
    jobs = [Job("a", "anna"), Job("b", "anna"), Job("c", "ben", 5), Job("d", "anna", 1), Job("e", "ben")]
    one, engine = fleet(tmp_path, *jobs, limits={"anna": 1}), Scripted(Room(2, 0))
    assert set(drive(one, engine).values()) == {"finished"}
    assert engine.began == ["c", "d", "e", "a", "b"]
    assert engine.most == 2
    again = Scripted(Room(2, 0))
    drive(one, again)
    assert again.began == []  # what is finished stays


def test_nobody_passes_a_larger_job_that_waits_for_room(tmp_path: Path) -> None:
    engine = Scripted(Room(2, 0))
    drive(fleet(tmp_path, Job("a", "u"), Job("large", "u", cpus=2), Job("c", "u")), engine)
    assert engine.began == ["a", "large", "c"]
    assert engine.most == 1


def test_jobs_share_a_card_by_what_they_take_and_too_large_a_one_fails_alone(tmp_path: Path) -> None:
    engine = Scripted(Room(9, 1))
    one = fleet(tmp_path, Job("a", "u", gpus=0.4), Job("b", "u", gpus=0.6), Job("c", "u"), Job("huge", "u", cpus=10))
    assert drive(one, engine) == {"a": "finished", "b": "finished", "c": "finished", "huge": "failed"}
    assert engine.most == 2  # a and b; c takes a whole card, as there is one
    assert "E-FLEET-05" in one.folder.standing("huge").why
    with pytest.raises(UserError, match=r"E-FLEET-07.*1 of 4"):
        work.check([(job, one.folder.standing(job.name)) for job in one.folder.jobs()], tmp_path)


def test_a_lost_job_is_started_again_and_one_that_fails_is_not(tmp_path: Path) -> None:
    ends = {"lost": [DIED, Outcome(-9, "n", ""), DONE], "doomed": [DIED] * 9, "wrong": [Outcome(2, "n", "error: E-BASE-01 · none\nbye")]}
    one = fleet(tmp_path, *(Job(name, "u") for name in [*ends, "halted"]), attempts=3)
    engine = Scripted(Room(1, 0), **ends, halted=[Outcome(130, "n", "")])
    assert drive(one, engine) == {"lost": "finished", "doomed": "failed", "wrong": "failed", "halted": "stopped"}
    assert [attempt.end for attempt in one.folder.standing("lost").attempts] == ["its worker died", "code -9", "code 0"]
    assert engine.began.count("doomed") == 3
    assert "the node n" in one.folder.standing("wrong").why
    assert one.folder.log("wrong").read_text() == "error: E-BASE-01 · none\nbye"
    assert drive(one, Scripted(Room(1, 0))) == dict.fromkeys(["lost", "doomed", "wrong", "halted"], "finished")  # put right, asked anew


def test_a_driver_that_died_is_followed_by_one_that_goes_on(tmp_path: Path) -> None:
    one = fleet(tmp_path, *(Job(name, "u") for name in "abc"))
    with one.folder.held():
        for standings in one.work(Scripted(Room(1, 0)), []):
            if [own.state for _, own in standings].count("finished") == 1:
                break
    assert [one.folder.standing(name).state for name in "abc"] == ["finished", "running", "waiting"]
    engine = Scripted(Room(1, 0))
    assert set(drive(one, engine).values()) == {"finished"}
    assert engine.began == ["b", "c"]
    assert [attempt.end for attempt in one.folder.standing("b").attempts] == ["the driver ended", "code 0"]
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert kinds.count("finished") == 3


class Obedient(Scripted):
    """Its job ends when a file asks it to."""

    def __init__(self, room: Room, stop: Path) -> None:
        super().__init__(room, a=[Outcome(130, "n", "")])
        self.stop = stop

    def ended(self, seconds: float) -> dict[str, Outcome]:
        return super().ended(seconds) if self.stop.exists() else {}


def test_who_asks_to_stop_lets_the_runs_save(tmp_path: Path) -> None:
    one, asked, stop = fleet(tmp_path, Job("a", "u"), Job("b", "u")), list[int](), tmp_path / "runs" / "a" / "stop"
    stop.parent.mkdir(parents=True)
    with one.folder.held():
        working = one.work(Obedient(Room(1, 0), stop), asked)
        next(working)
        asked.append(signal.SIGTERM)
        for _ in working:
            pass
    assert [one.folder.standing(name).state for name in "ab"] == ["waiting", "waiting"]
    drive(one, Scripted(Room(1, 0)))
    assert not stop.exists()  # else the next attempt would stop at once


def test_a_folder_has_one_driver_and_a_name_one_job(tmp_path: Path) -> None:
    one = fleet(tmp_path, Job("a", "u"))
    with one.folder.held():
        with pytest.raises(UserError, match="E-FLEET-02"):
            drive(one, Scripted(Room(1, 0)))
        assert one.folder.add(Job("late", "u"), "x = 1")  # which needs no driver
    assert not one.folder.add(Job("a", "other"), 'name = "a"\n')
    with pytest.raises(UserError, match="E-FLEET-03"):
        one.folder.add(Job("a", "u"), "other = 1")
    with pytest.raises(UserError, match="E-FLEET-03"):
        asking.add(one.folder, one.store, [(Job("B", "u"), ""), (Job("b", "u"), "")])
    (tmp_path / "jobs" / "odd.json").write_text("[]")
    with pytest.raises(UserError, match="E-FLEET-04"):
        one.folder.jobs()


# ---------------------------------------------------------------- packing


def sizes(*adapters: int) -> list[Measured]:
    return [Measured(dict.fromkeys(("full", "8bit", "nf4"), 1_000_000_000), one, 100_000_000, 50_000_000, 1) for one in adapters]


def test_members_go_together_as_far_as_a_card_holds_them(pictures: Path, base: Path) -> None:
    runs = [small.settled(pictures, base, name=name) for name in "abcde"]
    assert packing.groups(runs, 0) == [[0, 1, 2, 3, 4]]
    assert packing.groups(runs, 2) == [[0, 1], [2, 3], [4]]
    sized = sizes(*[1_000_000_000] * 5)
    groups = packing.groups(runs, 0, sized, 4.2e9)
    assert groups == [[0, 1], [2, 3], [4]]
    for group in groups:
        assert packing.needed([runs[i] for i in group], [sized[i] for i in group], 4.2e9) <= 3.4e9
    with pytest.raises(UserError, match="E-MEM-02"):
        packing.groups(runs, 0, sized, 2.2e9)
    assert packing.share(1_200_000_000, 8e9) == 0.25
    assert packing.share(1_200_000_001, 8e9) == 0.26  # up: what is packed must fit
    like, terms = Job("", "u"), asking.Terms(2)
    assert [job.name for job, _ in asking.jobs("sweep", runs, terms, like)] == ["sweep-1", "sweep-2", "e"]


def test_a_plan_of_real_runs_is_kept_to(squares: Path, base: Path) -> None:
    runs = [small.settled(squares, base, name=name) for name in "ab"]
    ((job, settings),) = asking.jobs("two", runs, asking.Terms(card_gb=2.0), Job("", "u"))
    assert job.gpus is not None
    assert 0.4 < job.gpus <= 0.5  # almost all of it CUDA's context
    assert settings.count("memory_gb = 0.0") == 2


# ---------------------------------------------------------------- shared storage


@pytest.fixture(params=["memory", "local"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    system = fsspec.filesystem("memory") if request.param == "memory" else LocalFileSystem()
    yield Storage(system, f"/{tmp_path.name}" if request.param == "memory" else str(tmp_path / "shared"))
    if request.param == "memory":
        system.store.clear()


def tree(folder: Path, **files: str) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_what_is_pushed_is_pulled_and_what_is_gone_goes(shared: Storage, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    assert not storage.pull(shared, "runs/a", there)
    for i in range(4):
        storage.push(shared, "runs/a", tree(here, deep__x=f"step {i}", same="same", lock="1", **{f"only{i}": str(i)}), 1)
        assert storage.pull(shared, "runs/a", there)
        assert content(there) == {"deep/x": f"step {i}", "same": "same", f"only{i}": str(i)}
    assert len(shared.names("runs/a/manifests")) == storage.KEPT
    assert len(shared.names("runs/a/blobs")) == 5  # two steps, two files of their own, and what never changed


class Failing:
    """A file system whose disk is full from the n-th write on, the write that fails being torn."""

    def __init__(self, system: Any, left: int, code: int) -> None:
        self.system, self.left, self.code = system, left, code

    def __getattr__(self, name: str) -> Any:
        return getattr(self.system, name)

    def pipe_file(self, path: str, value: bytes) -> None:
        self.left -= 1
        if self.left < 0:
            self.system.pipe_file(path, value[: len(value) // 2])
            raise OSError(self.code, os.strerror(self.code))
        self.system.pipe_file(path, value)


def test_a_push_that_breaks_anywhere_leaves_what_was_pushed_before(shared: Storage, tmp_path: Path) -> None:
    old, new = {"x": "old", "y": "same"}, {"x": "new", "y": "same", "z": "more"}
    for left in range(4):
        place, broken = f"runs/{left}", Storage(Failing(shared.system, left, errno.ENOSPC), shared.root)
        storage.push(shared, place, tree(tmp_path / "here", **old), 1)
        full = contextlib.nullcontext() if left == 3 else pytest.raises(UserError, match="E-FLEET-12")
        with full as caught:
            storage.push(broken, place, tree(tmp_path / "here", **new), 1)
        assert left == 3 or caught.value.exit_code == RESOURCES
        assert storage.pull(shared, place, tmp_path / "there")
        assert content(tmp_path / "there") == (new if left == 3 else old)
        storage.push(shared, place, tmp_path / "here", 1)  # with room again
        storage.pull(shared, place, tmp_path / "there")
        assert content(tmp_path / "there") == new
    with pytest.raises(UserError, match="E-FLEET-13"):
        storage.push(Storage(Failing(shared.system, 0, errno.EACCES), shared.root), "runs/0", tree(tmp_path / "here", q="q"), 1)


def test_damage_is_noticed_and_the_push_before_taken(shared: Storage, tmp_path: Path) -> None:
    storage.push(shared, "a", tree(tmp_path / "here", x="first"), 1)
    storage.push(shared, "a", tree(tmp_path / "here", x="second"), 1)
    shared.write(f"a/blobs/{hashlib.sha256(b'second').hexdigest()}", b"secend")
    assert storage.pull(shared, "a", tmp_path / "there")
    assert content(tmp_path / "there") == {"x": "first"}
    storage.push(shared, "a", tree(tmp_path / "here", x="third"), 1)
    (*_, last) = shared.names("a/manifests")
    shared.write(f"a/manifests/{last}", (shared.read(f"a/manifests/{last}") or b"")[:-3])
    assert len(storage.manifests(shared, "a")) == 1
    outside = storage.Manifest(9, 1, {"../x": hashlib.sha256(b"first").hexdigest()})
    shared.write(f"a/manifests/{outside.name}", outside.content())
    with pytest.raises(UserError, match="E-FLEET-14"):
        storage.pull(shared, "a", tmp_path / "there")


def test_a_straggler_is_not_believed(shared: Storage, tmp_path: Path) -> None:
    storage.push(shared, "a", tree(tmp_path / "new", x="of the second attempt"), 2)
    storage.push(shared, "a", tree(tmp_path / "old", x="of the first, which hung"), 1)
    storage.pull(shared, "a", tmp_path / "there")
    assert content(tmp_path / "there") == {"x": "of the second attempt"}


def test_storage_that_is_not_there_is_said() -> None:
    with pytest.raises(UserError, match="E-FLEET-11"):
        Storage.open("nosuch://bucket/fleet")
    assert [Storage.is_local(one) for one in ("/a/b", "memory://a", "s3://a/b")] == [True, False, False]


# ---------------------------------------------------------------- scripts, bad input


def test_the_scripts_parse_and_run_the_same_list(tmp_path: Path) -> None:
    one = fleet(tmp_path, Job("plain", "u"), Job('a "quoted" $name', "u", cpus=2, gpus=0.5), limits={"u": 3})
    script = scripts.slurm(one, one.folder.jobs())
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert subprocess.run(["bash", "-n"], input=script.replace("esac", ""), text=True, check=False, capture_output=True).returncode != 0
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-"], input=script, text=True, check=True)
    shown = script.replace("srun python", "show").replace("set -u", 'show() { printf "%s\\n" "$OMP_NUM_THREADS" "$@"; }')
    for i, job in enumerate(one.folder.jobs()):
        said = subprocess.run(
            ["bash"], input=shown, text=True, env={**os.environ, "SLURM_ARRAY_TASK_ID": str(i)}, capture_output=True, check=True
        )
        assert said.stdout.splitlines() == [str(job.cpus), *work.command(one, job, 1)]
    for line in ("#SBATCH --array=0-1%3", "#SBATCH --cpus-per-task=2", "#SBATCH --gres=gpu:1"):
        assert line in script.splitlines()
    remote = scripts.slurm(Fleet(one.folder, "s3://bucket/fleet"), one.folder.jobs())
    assert "$((1 + ${SLURM_RESTART_COUNT:-0}))" in remote
    found = yaml.safe_load(scripts.ray_yaml(one, one.folder.jobs(), "me/sdlora:1", "claim", 3))
    (workers,) = found["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    assert (found["kind"], found["apiVersion"], workers["replicas"]) == ("RayJob", "ray.io/v1", 3)
    assert container["resources"]["limits"] == {"cpu": "2", "nvidia.com/gpu": 1}
    assert found["spec"]["entrypoint"].startswith(f"sdlora fleet --in {tmp_path}")


def test_what_is_given_wrong_is_one_line(tmp_path: Path) -> None:
    place = ["fleet", "--in", str(tmp_path / "fleet")]
    fleet(tmp_path / "full", Job("a", "u"))
    full = ["fleet", "--in", str(tmp_path / "full")]
    nobody = f"ray://127.0.0.1:{small.any_port()}"
    wrong = {"E-FLEET-01": place, "E-FLEET-16": [*place, "--print", "pbs"], "E-FLEET-18": [*place, "--limit", "anna"],
             "E-FLEET-10": [*full, "--on", nobody]}  # fmt: skip
    for code, arguments in wrong.items():
        result = call(*arguments)
        assert result.exit_code == (RESOURCES if code == "E-FLEET-10" else 2), result.output
        assert f"error: {code} · " in result.stderr
        assert "Traceback" not in result.output
    assert Folder(tmp_path / "full").standing("a").state == "waiting"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_what_a_worker_started_dies_with_it(tmp_path: Path) -> None:
    inner = f"""import os, time
parent = os.getppid()
open({str(tmp_path / "new")!r}, 'w').write(str(os.getpid()))
os.rename({str(tmp_path / "new")!r}, {str(tmp_path / "pid")!r})
while os.getppid() == parent: time.sleep(0.02)
open({str(tmp_path / "outlived")!r}, 'w')
while True: time.sleep(1)"""
    for bound in (["-m", "sdlora.fleet.bound", "{}"], []):
        words = ", ".join(f"{word!r}.format(os.getpid())" for word in bound)
        outer = f"import os, subprocess, sys; subprocess.run([sys.executable, {words}{', ' * bool(bound)}'-c', {inner!r}])"
        for name in ("pid", "outlived"):
            (tmp_path / name).unlink(missing_ok=True)
        parent = subprocess.Popen([sys.executable, "-c", outer])
        small.until(lambda: (tmp_path / "pid").exists())
        pid = int((tmp_path / "pid").read_text())
        parent.kill()
        parent.wait()
        if bound:
            small.until(lambda pid=pid: not is_alive(pid))  # type: ignore[misc]
        else:
            small.until((tmp_path / "outlived").exists)  # the control: without it, it goes on
            os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


# ---------------------------------------------------------------- for real

QUICK = {"train__save_every": 2, "train__steps": 6, "train__batch_size": 1}


def worker_of(out: Path, driver: subprocess.Popen[str]) -> int:
    """The Ray worker whose child trains in this folder, once that has written a checkpoint."""
    small.until(lambda: bool(list(out.glob("checkpoints/ckpt-*"))) or driver.poll() is not None)
    assert driver.poll() is None
    holder = lock.holder(out)
    assert holder is not None
    return int(Path(f"/proc/{holder['pid']}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
def test_six_jobs_on_two_workers_one_of_them_killed_give_the_undisturbed_packs(squares: Path, base: Path, tmp_path: Path) -> None:
    """A real Ray of two CPUs. The undisturbed runs are made here, in one process."""
    small.library("ray")
    place, runs = tmp_path / "fleet", [small.settled(squares, base, name=f"j{i}", seed=i, **QUICK) for i in range(6)]
    runs[0] = small.settled(squares, base, name="j0", seed=0, **{**QUICK, "train__steps": 96})  # long enough to be met at work
    words = ["--in", str(place), "--workers", "2"]
    for run in runs:
        (tmp_path / f"{run.name}.toml").write_text(api.settings_text(run))
    command = [sys.executable, "-m", "sdlora.cli", "fleet", *(str(tmp_path / f"{run.name}.toml") for run in runs), *words]
    out = place / "runs" / "j0"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            os.kill(worker_of(out, process), signal.SIGKILL)
            killed = time.time()
            said, _ = process.communicate(timeout=small.PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode == 0, said
    folder = Folder(place)
    assert [attempt.end for attempt in folder.standing("j0").attempts] == ["its worker died", "code 0"]
    assert [len(folder.standing(f"j{i}").attempts) for i in range(1, 6)] == [1] * 5
    resumed = next(one["time"] for one in api.events(out)[0] if one["time"] > killed and one["kind"] == "step")
    noticed, begun = folder.standing("j0").attempts[0].ended, folder.standing("j0").attempts[1].began
    assert noticed is not None
    print(f"killed to noticed, started elsewhere, its next step: {noticed - killed:.1f}, {begun - killed:.1f}, {resumed - killed:.1f} s")
    for run in runs:
        for _ in api.train(run, tmp_path / "alone" / run.name):
            pass
        assert differences(pack(tmp_path / "alone" / run.name, run.name), pack(place / "runs" / run.name, run.name)) == []


@pytest.mark.slow
def test_a_job_in_shared_storage_goes_on_on_another_node(
    squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carried, "LOOK_S", 0.05)
    shared = Storage(fsspec.filesystem("memory"), f"/{tmp_path.name}")
    run = small.settled(squares, base, train__steps=12, train__save_every=2)
    asking_folder = Folder(tmp_path / "fleet")
    asking_folder.add(Job("mira", "u"), api.settings_text(run))
    with pytest.raises(UserError, match="E-FLEET-15"):
        carried.carry(shared, "mira", 1, tmp_path / "first")
    shared.write("jobs/mira.toml", api.settings_text(run).encode())
    push, pushes = storage.push, list[int]()

    def lost(*given: Any) -> None:  # the node dies once two pushes are there
        pushes.append(1)
        if len(pushes) > 2:
            raise KeyboardInterrupt
        push(*given)

    monkeypatch.setattr(storage, "push", lost)
    with pytest.raises(KeyboardInterrupt):
        carried.carry(shared, "mira", 1, tmp_path / "first")
    monkeypatch.setattr(storage, "push", push)
    assert carried.carry(shared, "mira", 2, tmp_path / "second") == 0
    log = api.events(tmp_path / "second" / "work" / "run")[0]
    assert any(one["text"].startswith("going on") or "from step" in one["text"] for one in log), [one["text"] for one in log]
    for _ in api.train(run, tmp_path / "alone"):
        pass
    assert differences(pack(tmp_path / "alone"), pack(tmp_path / "second" / "work" / "run")) == []
    assert shared.read("packs/mira/mira.safetensors") == (tmp_path / "second" / "work" / "run" / "mira.safetensors").read_bytes()
    shared.system.store.clear()
