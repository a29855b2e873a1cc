"""What happens between the steps of a run: it stops, saves and shows itself when asked, measures itself, and gets over what is broken."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small
import torch
from safetensors.torch import load_file
from test_resume import differences, pack, told

from sdlora import api, cast, course, diagnose, estimate, events, job, lock, safeio, state, train, validation
from sdlora.api import Event
from sdlora.data.batches import picture_of
from sdlora.errors import UserError
from sdlora.families import sd1
from sdlora.stop import Interrupted, Stop

STEPS = {"train__steps": 8, "train__save_every": 4, "train__log_every": 2}


def go(out: Path, run: Any, stop: Stop | None = None, act: Callable[[Event], None] | None = None) -> list[Event]:
    seen = []
    for event in api.train(run, out, stop):
        seen.append(event)
        if act:
            act(event)
    return seen


@pytest.fixture(scope="module")
def whole(squares: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("course") / "whole"
    go(out, small.settled(squares, base, **STEPS))
    return out


# ---------------------------------------------------------------- stopping, saving, showing


def test_a_wish_to_stop_saves_and_the_run_goes_on_as_if_never_stopped(whole: Path, squares: Path, base: Path, tmp_path: Path) -> None:
    run, stop = small.settled(squares, base, **STEPS), Stop()

    def act(event: Event) -> None:
        stop.stop = stop.stop or (event.kind == "step" and event.step == 2)

    told_first = go(tmp_path / "run", run, stop, act)
    assert (told_first[-1].kind, told_first[-1].step) == ("stopped", 3), "within a step of the wish"
    assert state.steps(tmp_path / "run") == [3]
    assert not (tmp_path / "run" / "mira.safetensors").exists()
    told_then = go(tmp_path / "run", run)
    assert told_then[-1].kind == "done"
    assert min(event.step for event in told_then if event.kind == "step") == 4
    assert differences(pack(tmp_path / "run"), pack(whole)) == []


@pytest.mark.parametrize("name", ["stop", "save", "sample"])
def test_a_file_in_the_run_folder_is_a_wish(name: str, whole: Path, squares: Path, base: Path, tmp_path: Path) -> None:
    run, out = small.settled(squares, base, **STEPS), tmp_path / "run"

    def act(event: Event) -> None:
        if event.kind == "step" and event.step == 1:
            (out / name).touch()

    seen = go(out, run, act=act)
    assert not (out / name).exists(), "a wish is taken up once"
    where = {event.kind: event.step for event in seen if event.step == 3 and event.kind != "step"}
    assert where == {"stop": {"checkpoint": 3, "stopped": 3}, "save": {"checkpoint": 3}, "sample": {"preview": 3}}[name]
    if name == "sample":
        assert (out / "previews" / "step-000003.png").is_file()
    if name != "stop":
        assert differences(pack(out), pack(whole)) == []


def test_the_first_signal_waits_for_the_step_and_the_second_does_not() -> None:
    stop = Stop()
    with pytest.raises(Interrupted) as caught:
        stop.handle(signal.SIGTERM)  # nothing runs that would look
    assert caught.value.exit_code == 143
    with stop.gently():
        stop.handle(signal.SIGINT)
        assert (stop.stop, stop.signum) == (True, signal.SIGINT)
        with pytest.raises(Interrupted) as caught:
            stop.handle(signal.SIGINT)
        assert caught.value.exit_code == 130


def test_signal_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stop().on_signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.parametrize(("signals", "code"), [([signal.SIGINT], 130), ([signal.SIGTERM], 143), ([signal.SIGTERM, signal.SIGTERM], 143)])
def test_a_signal_saves_and_exits_with_its_number(signals: list[int], code: int, squares: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["train.steps=100000", "train.save_every=50000", "train.log_every=1", "preview.scales=[]", "preview.every=0",
               "data.resolution_px=32", 'train.precision="fp32"']  # fmt: skip
    sets = [part for option in options for part in ("--set", option)]
    process = subprocess.Popen(
        [sys.executable, "-m", "sdlora.cli", "train", str(squares), "--name", "mira", "--base", str(base), *sets, "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    log = out / "events.jsonl"
    small.until(lambda: (log.exists() and '"kind": "step"' in log.read_text()) or process.poll() is not None)
    assert process.poll() is None, process.communicate()[0]
    for number in signals:
        process.send_signal(number)
    said, _ = process.communicate(timeout=small.PATIENCE_S)
    assert process.returncode == code, said
    last = json.loads(log.read_text().splitlines()[-1])
    if len(signals) == 1:
        assert last["kind"] == "stopped"
        assert state.steps(out) == [last["step"]]
        assert "sdlora resume" in said
    assert lock.holder(out) is None


# ---------------------------------------------------------------- one folder, one run


NOW = 1_790_000_000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the lock takes for the time, and the seconds of each pause that it makes; nobody waits for them."""
    pauses: list[float] = []
    clock = SimpleNamespace(time=lambda: NOW + 0.25, sleep=pauses.append, strftime=time.strftime, localtime=time.localtime)
    monkeypatch.setattr(lock, "time", clock)
    return pauses


@pytest.mark.usefixtures("clock")
def test_two_runs_do_not_share_a_folder(squares: Path, base: Path, tmp_path: Path) -> None:
    run, out = small.settled(squares, base), tmp_path / "run"
    first = api.train(run, out)
    next(first)
    with pytest.raises(UserError, match=f"E-RUN-05.*process {os.getpid()} since"):
        next(api.train(run, out))
    assert lock.holder(out) == {"pid": os.getpid(), "since": NOW}
    first.close()  # type: ignore[attr-defined]
    assert lock.holder(out) is None
    assert go(out, run)[-1].kind == "done"


def test_of_many_at_once_exactly_one_has_the_folder(tmp_path: Path) -> None:
    for turn in range(50):
        inside, most, codes, start = [0], [0], list[str](), threading.Barrier(4)

        def enter(place: Path, inside: list[int] = inside, most: list[int] = most, codes: list[str] = codes, start: Any = start) -> None:
            start.wait()
            try:
                with lock.held(place):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    time.sleep(0.002)
                    inside[0] -= 1
            except UserError as error:
                codes.append(error.code)

        threads = [threading.Thread(target=enter, args=(tmp_path / str(turn),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [1], "somebody gets in, and nobody beside"
        assert set(codes) <= {"E-RUN-05"}


def test_who_asks_for_the_holder_keeps_nobody_out(tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe takes the lock for a moment; here it takes its time, and is done at the third look."""
    handle = os.open(tmp_path / lock.NAME, os.O_RDWR | os.O_CREAT)
    assert lock._lock(handle)

    def pause(seconds: float) -> None:
        clock.append(seconds)
        if len(clock) == 3:
            os.close(handle)

    with monkeypatch.context() as patch:
        patch.setattr(lock.time, "sleep", pause)
        with lock.held(tmp_path):
            assert lock.holder(tmp_path) == {"pid": os.getpid(), "since": NOW}
    assert clock == [lock.LOOK_S] * 3
    with lock.held(tmp_path), pytest.raises(UserError, match="E-RUN-05"), lock.held(tmp_path):
        pass  # the control: who keeps it keeps others out
    assert len(clock) == 3 + lock.LOOKS - 1


@pytest.mark.usefixtures("clock")
def test_a_lock_left_by_a_dead_process_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / lock.NAME).write_text('{"pid": 1, "since": 0}')
    assert lock.holder(tmp_path) is None
    with lock.held(tmp_path) as said:
        assert said == ""
        assert lock.holder(tmp_path) == {"pid": os.getpid(), "since": NOW}


# ---------------------------------------------------------------- a full disk


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A disk on which the next n writes find no room; the list holds n."""
    left, really = [0], safeio.write_tree

    def write_tree(path: Path, files: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise safeio.refused(OSError(errno.ENOSPC, "no space"), path)
        really(path, files)

    monkeypatch.setattr(safeio, "write_tree", write_tree)
    monkeypatch.setattr(events, "RETRY_S", 0.01)
    return left


def test_a_full_disk_is_waited_for(full_disk: list[int], whole: Path, squares: Path, base: Path, tmp_path: Path) -> None:
    full_disk[0] = 3
    seen = go(tmp_path / "run", small.settled(squares, base, **STEPS))
    assert len(told(seen, "paused")) == 1, "said once, however long it takes"
    assert "E-DISK-01" in told(seen, "paused")[0]
    assert differences(pack(tmp_path / "run"), pack(whole)) == []


def test_a_run_that_is_to_stop_waits_for_no_disk(full_disk: list[int], squares: Path, base: Path, tmp_path: Path) -> None:
    full_disk[0], stop = 10**9, Stop()

    def act(event: Event) -> None:
        stop.stop = stop.stop or event.kind == "paused"

    with pytest.raises(UserError, match="E-DISK-01") as caught:
        go(tmp_path / "run", small.settled(squares, base, **STEPS), stop, act)
    assert caught.value.exit_code == 3
    assert lock.holder(tmp_path / "run") is None


def test_events_that_found_no_room_are_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, really = events.Log(tmp_path / "events.jsonl"), safeio.append_line
    monkeypatch.setattr(safeio, "append_line", lambda path, _: (_ for _ in ()).throw(safeio.refused(OSError(errno.ENOSPC, ""), path)))
    log.add(Event("note", "first"))
    monkeypatch.setattr(safeio, "append_line", really)
    log.add(Event("note", "second"))
    assert [json.loads(line)["text"] for line in log.path.read_text().splitlines()] == ["first", "second"]


def test_a_torn_line_takes_no_other_with_it(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"kind": "note"}\n{"kind": "no')
    events.Log(tmp_path / "events.jsonl").add(Event("note", "next"))
    events.Log(tmp_path / "events.jsonl").add(Event("note", "last"))
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line).get("text") for line in lines if line != '{"kind": "no'] == [None, "next", "last"]


# ---------------------------------------------------------------- measuring and looking


def test_held_out_pictures_are_measured_and_never_trained_on(squares: Path, base: Path, tmp_path: Path) -> None:
    seen = go(tmp_path / "run", small.settled(squares, base, **STEPS, validation__share=0.4))
    measured = [(event.step, event.data["loss"]) for event in seen if event.kind == "validation"]
    assert [step for step, _ in measured] == [0, 4, 8]
    assert len({loss for _, loss in measured}) == 3
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    held = [row for row in ledger["pictures"] if row["held_out"]]
    assert len(held) == ledger["totals"]["held_out"] == 2
    assert all(row["shown"] == 0 for row in held)
    assert all(row["shown"] > 0 for row in ledger["pictures"] if not row["held_out"])


def test_the_validation_loss_depends_on_nothing_but_weights_and_pictures(squares: Path, base: Path, tmp_path: Path) -> None:
    """Another seed, batch and schedule: the base's loss on the same pictures is the same."""
    held = small.draw_folder(tmp_path / "held", 2, square=True)
    losses = []
    for n, changes in enumerate([{}, {"seed": 7, "train__batch_size": 3, "train__lr": 1e-3}, {"data__folders": []}]):
        folders = {"data__folders": [{"folder": str(held), "kind": "validation"}], "train__steps": 1}
        run = small.settled(squares, base, **{**folders, **changes})
        losses.append([event.data["loss"] for event in go(tmp_path / str(n), run) if event.kind == "validation"][:1])
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert losses[2] == []


def test_the_curve_is_the_same_after_a_stop(squares: Path, base: Path, tmp_path: Path) -> None:
    run, stop = small.settled(squares, base, **STEPS, validation__share=0.4, train__ema=0.8), Stop()

    def act(event: Event) -> None:
        stop.stop = stop.stop or (event.kind == "step" and event.step == 5)

    go(tmp_path / "a", run)
    go(tmp_path / "b", run, stop, act)
    go(tmp_path / "b", run)
    ends = [json.loads((state.folder(tmp_path / one, 8) / "state.json").read_text()) for one in "ab"]
    assert ends[0]["validations"] == ends[1]["validations"] != []
    a, b = (load_file(state.folder(tmp_path / one, 8) / "ema.safetensors") for one in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert differences(pack(tmp_path / "a"), pack(tmp_path / "b")) == []


def scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    told_losses = iter([9.0, *losses])
    monkeypatch.setattr(validation, "loss", lambda *_: next(told_losses))


def test_training_ends_when_the_loss_falls_no_more(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small.settled(squares, base, train__save_every=1, train__steps=9, validation__share=0.4, validation__patience=2)
    scripted(monkeypatch, [5, 4, 4.5, 4.2, 3, 3, 3, 3, 3])
    seen = go(tmp_path / "run", run)
    assert max(event.step for event in seen if event.kind == "step") == 4
    assert pack(tmp_path / "run").metadata["ss_steps"] == "4"
    again = go(tmp_path / "run", run)
    assert not [event for event in again if event.kind == "step"], "and it does not begin anew"


def test_the_pack_may_hold_the_best_weights(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packs = {}
    for which in ("last", "best"):
        scripted(monkeypatch, [5, 2, 4, 4, 4, 4])
        settings = {"train__save_every": 1, "train__keep_checkpoints": 2, "validation__share": 0.4, "validation__pack": which}
        go(tmp_path / which, small.settled(squares, base, **settings))
        assert state.steps(tmp_path / which) == [2, 5, 6], "the best one is kept beside the newest"
        packs[which] = pack(tmp_path / which).tensors
    best = load_file(state.folder(tmp_path / "best", 2) / "adapter.safetensors")
    name = next(name for name in packs["best"] if name.endswith("lora_up.weight"))
    assert not torch.equal(packs["best"][name], packs["last"][name])
    assert any(torch.equal(packs["best"][name], tensor.half().to(packs["best"][name].dtype)) for tensor in best.values())


def test_previews_change_nothing(whole: Path, squares: Path, base: Path, tmp_path: Path) -> None:
    seen = go(tmp_path / "run", small.settled(squares, base, **STEPS, preview__every=3))
    files = [event.data["file"] for event in seen if event.kind == "preview"]
    assert files == [f"previews/step-{step:06d}.png" for step in (0, 3, 6)]
    pictures = [(tmp_path / "run" / name).read_bytes() for name in files]
    assert len(set(pictures)) == 3, "what is learnt is seen"
    assert [name for name in differences(pack(tmp_path / "run"), pack(whole)) if name.endswith("weight")] == []


def test_an_average_is_of_the_weights(squares: Path, base: Path, tmp_path: Path) -> None:
    settings = {"train__steps": 3, "train__save_every": 1}
    go(tmp_path / "run", small.settled(squares, base, **settings, train__ema=0.5))
    steps = [load_file(state.folder(tmp_path / "run", step) / "adapter.safetensors") for step in (1, 2, 3)]
    name = next(name for name in steps[0] if name.endswith("up"))
    average = torch.zeros_like(steps[0][name])  # `up` begins at zero
    for weights in steps:
        average = 0.5 * average + 0.5 * weights[name]
    kept = load_file(state.folder(tmp_path / "run", 3) / "ema.safetensors")[name]
    torch.testing.assert_close(kept, average)


# ---------------------------------------------------------------- numbers that are not finite


def poisoned(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    """Let something happen to a run's learner before its first step."""
    really = job.new_learner

    def new_learner(*given: Any) -> Any:
        learner = really(*given)
        change(learner)
        return learner

    monkeypatch.setattr(job, "new_learner", new_learner)


def test_a_broken_picture_is_named_and_left_out(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(learner: Any) -> None:
        learner.data.latents[3][0][0][0, 0, 0] = float("nan")

    poisoned(monkeypatch, change)
    run = small.settled(squares, base, train__steps=12, train__log_every=4, train__save_every=6)
    seen = go(tmp_path / "run", run)
    warnings = [text for text in told(seen, "warning") if "not finite" in text]
    assert len(warnings) == 1
    assert "3.jpg: its latents are not finite" in warnings[0]
    assert seen[-1].kind == "done"
    broken = [event.step for event in seen if event.kind == "step" and event.loss is None]
    assert broken
    assert max(broken) <= 4, "once it was read, no step meets the picture again"
    assert all(tensor.isfinite().all() for tensor in pack(tmp_path / "run").tensors.values())

    stop = Stop()
    seen = go(tmp_path / "stopped", run, stop, lambda event: setattr(stop, "stop", stop.stop or (event.kind == "step" and event.step == 4)))
    assert seen[-1].kind == "stopped"
    go(tmp_path / "stopped", run)
    assert differences(pack(tmp_path / "stopped"), pack(tmp_path / "run")) == [], "what is left out is part of the checkpoint"


def test_a_run_may_end_at_what_is_not_finite(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, lambda learner: learner.data.latents[3][0][0].fill_(float("inf")))
    with pytest.raises(UserError, match=r"E-NUM-01.*3\.jpg") as caught:
        go(tmp_path / "run", small.settled(squares, base, train__on_nonfinite="stop"))
    assert caught.value.exit_code == 4
    last = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "failed"


def test_a_broken_caption_is_told_from_a_broken_picture(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = sd1.SD1.states

    def states(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        mine = self.tokens(["mira, ball 2"])
        return really(self, tokens).masked_fill((tokens == mine).all(1)[:, None, None], float("nan"))

    monkeypatch.setattr(sd1.SD1, "states", states)
    seen = go(tmp_path / "run", small.settled(squares, base))
    warning = next(text for text in told(seen, "warning") if "not finite" in text)
    assert "2.png: what the text encoder makes of its caption" in warning


def test_one_broken_gradient_is_traced_to_its_sample(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = train.sample_losses

    def sample_losses(family: Any, bank: Any, batch: Any, *rest: Any) -> torch.Tensor:
        each = really(family, bank, batch, *rest)
        wrong = (batch.text == family.tokens(["mira, ball 4"])).all(1)
        if wrong.any() and each.requires_grad:
            each.register_hook(lambda gradient: torch.where(wrong, torch.full_like(gradient, float("nan")), gradient))
        return each

    for module in (train, diagnose):
        monkeypatch.setattr(module, "sample_losses", sample_losses)
    seen = go(tmp_path / "run", small.settled(squares, base))
    warning = next(text for text in told(seen, "warning") if "not finite" in text)
    assert "4.png: the gradient is not finite at timestep" in warning


def test_weights_that_diverge_end_the_run(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(learner: Any) -> None:
        with torch.no_grad():
            next(iter(learner.params.values())).fill_(float("nan"))

    poisoned(monkeypatch, change)
    with pytest.raises(UserError, match=r"E-NUM-01.*own weights are not finite"):
        go(tmp_path / "run", small.settled(squares, base))
    assert state.steps(tmp_path / "run") == []


def test_no_checkpoint_holds_a_number_that_is_not_finite(
    squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = small.settled(squares, base), tmp_path / "run"
    really = cast.steps

    def steps(setup: Any) -> Iterator[Any]:
        for trained in really(setup):
            if trained.step == 4:
                slots = next(iter(setup.learners[0].optimizer.state.values()))
                slots["exp_avg"].view(-1)[0] = float("nan")
            yield trained

    monkeypatch.setattr(cast, "steps", steps)
    with pytest.raises(UserError, match=r"E-NUM-02.*optimizer"):
        go(out, run)
    assert state.steps(out) == [2]
    assert all(tensor.isfinite().all() for tensor in load_file(state.folder(out, 2) / "optimizer.safetensors").values())


def test_a_lapse_of_half_precision_names_its_layer(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = sd1.SD1.predict

    def predict(self: Any, x: torch.Tensor, t: torch.Tensor, states: torch.Tensor, frame: Any = None) -> torch.Tensor:
        dtype = self.unet.conv_in.weight.dtype
        return really(self, x, t, states, frame) + (0.0 if dtype == torch.float32 else float("inf"))

    monkeypatch.setattr(sd1.SD1, "predict", predict)
    with pytest.raises(UserError, match=r"E-NUM-01.*overflows in.*train.precision=fp32"):
        go(tmp_path / "run", small.settled(squares, base, train__precision="bf16"))
    seen = (tmp_path / "run" / "events.jsonl").read_text()
    assert seen.count("did not move") >= course.MOST_LAPSES, "it is put up with for a few steps"


# ---------------------------------------------------------------- memory


def scarce(monkeypatch: pytest.MonkeyPatch, fits: int) -> None:
    """Memory for only so many samples at once."""
    really = sd1.SD1.predict

    def predict(self: Any, x: torch.Tensor, t: torch.Tensor, states: torch.Tensor, frame: Any = None) -> torch.Tensor:
        if len(x) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return really(self, x, t, states, frame)

    monkeypatch.setattr(sd1.SD1, "predict", predict)


@pytest.mark.slow
def test_where_memory_is_scarce_a_step_is_taken_in_parts(
    squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small.settled(squares, base, train__batch_size=4)
    go(tmp_path / "whole", run)
    scarce(monkeypatch, 1)
    stop = Stop()
    seen = go(tmp_path / "run", run, stop, lambda event: setattr(stop, "stop", event.kind == "step" and event.step == 3))
    assert [text for text in told(seen, "warning") if "only 1 samples go through the network at once" in text]
    again = go(tmp_path / "run", run)
    assert not [text for text in told(again, "warning") if "samples go through" in text], "the split is remembered"
    a, b = pack(tmp_path / "run").tensors, pack(tmp_path / "whole").tensors
    assert max(float((a[name].float() - b[name].float()).abs().max()) for name in a) < 1e-3


@pytest.mark.parametrize("setting", ["auto", "off"])
@pytest.mark.slow
def test_before_that_its_blocks_are_computed_again(
    setting: str, squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, larger = sd1.SD1.predict, list[int]()

    def predict(self: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(x) > 1 and torch.is_grad_enabled() and not self.unet.down_blocks[0].gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        larger.extend([len(x)] * (len(x) > 1 and torch.is_grad_enabled()))
        return really(self, x, *rest)

    monkeypatch.setattr(estimate, "memory", plain(estimate.memory, really, monkeypatch, predict))
    run, stop = small.settled(squares, base, train__gradient_checkpointing=setting), Stop()
    seen = go(tmp_path / "run", run, stop, lambda event: setattr(stop, "stop", event.kind == "step" and event.step == 3))
    warnings = [text for text in told(seen, "warning") if "memory did not suffice" in text]
    assert [("checkpointing is on" in text, "samples go through" in text) for text in warnings] == [(setting == "auto", setting == "off")]
    assert bool(larger) == (setting == "auto"), "batches stay whole"
    again = go(tmp_path / "run", run)
    assert not [text for text in told(again, "warning") if "memory did not suffice" in text], "it is remembered"


def plain(memory: Any, really: Any, monkeypatch: pytest.MonkeyPatch, scarcely: Any) -> Any:
    """What counts memory, while there is enough; afterwards there is not."""

    def counted(*given: Any) -> Any:
        monkeypatch.setattr(sd1.SD1, "predict", really)
        found = memory(*given)
        monkeypatch.setattr(sd1.SD1, "predict", scarcely)
        return found

    return counted


def test_when_not_one_sample_fits_the_run_says_so(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = sd1.SD1.predict
    scarce(monkeypatch, 0)
    monkeypatch.setattr(estimate, "memory", plain(estimate.memory, really, monkeypatch, sd1.SD1.predict))  # it takes forwards of its own
    with pytest.raises(UserError, match="E-MEM-01") as caught:
        go(tmp_path / "run", small.settled(squares, base))
    assert caught.value.exit_code == 3


def test_no_preview_is_worth_a_run(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scarce(monkeypatch, 1)  # a preview takes two, one of them without the prompt
    seen = go(tmp_path / "run", small.settled(squares, base, preview__every=3))
    assert {event.step for event in seen if event.kind == "warning" and "E-MEM-03" in event.text} == {0, 3, 6}
    assert seen[-1].kind == "done"


# ---------------------------------------------------------------- going on under other conditions


@pytest.mark.slow
def test_a_run_can_be_extended_and_shortened(squares: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    go(out, small.settled(squares, base, train__steps=4))
    longer = go(out, small.settled(squares, base, train__steps=6))
    assert any("train.steps changes from 4 to 6" in text for text in told(longer, "note"))
    assert [event.step for event in longer if event.kind == "step"] == [5, 6]
    shorter = go(out, small.settled(squares, base, train__steps=5))
    assert [event.step for event in shorter if event.kind == "step"] == [5]
    assert pack(out).metadata["ss_steps"] == "5"


@pytest.mark.slow
def test_other_pictures_are_said(base: Path, tmp_path: Path) -> None:
    folder, out = small.draw_folder(tmp_path / "set", square=True), tmp_path / "run"
    go(out, small.settled(folder, base, train__steps=2))
    assert not [text for text in told(go(out, small.settled(folder, base, train__steps=3)), "warning") if "others than before" in text]
    (folder / "0.txt").write_text("another ball")
    assert [text for text in told(go(out, small.settled(folder, base, train__steps=4)), "warning") if "others than before" in text]


@pytest.mark.slow
def test_another_machine_is_said(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    go(out, small.settled(squares, base, train__steps=2))
    assert not [text for text in told(go(out, small.settled(squares, base, train__steps=3)), "warning") if "bit for bit" in text]
    really = state.machine
    monkeypatch.setattr(state, "machine", lambda device: really(device) | {"threads": 99})
    said = told(go(out, small.settled(squares, base, train__steps=4)), "warning")
    assert any("threads" in text and "-> 99" in text for text in said)


def test_the_machine_is_on_record(whole: Path) -> None:
    record = json.loads((whole / "environment.json").read_text())
    assert record["torch"] == torch.__version__
    assert {"python", "system", "sdlora", "diffusers", "threads", "device"} <= record.keys()


def test_a_run_may_be_moved_and_copied(whole: Path, squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, stop = small.settled(squares, base, **STEPS), Stop()
    go(tmp_path / "run", run, stop, lambda event: setattr(stop, "stop", stop.stop or (event.kind == "step" and event.step == 4)))
    shutil.copytree(tmp_path / "run", tmp_path / "elsewhere" / "copy")  # whose files have another time and inode
    monkeypatch.chdir(tmp_path / "elsewhere")
    settled = api.settle(api.read_settings(Path("copy/config.toml"), []))
    events_then = go(Path("copy"), settled)
    assert min(event.step for event in events_then if event.kind == "step") > 4, "it did not begin anew"
    assert differences(pack(Path("copy")), pack(whole)) == []


def test_a_resumed_run_sees_the_samples_that_it_would_have_seen() -> None:
    """Random runs: pictures, batches, accumulation and the step of the stop; what follows depends on none of them."""
    random = np.random.default_rng(0)
    for _ in range(500):
        pool = [int(n) for n in random.integers(0, 50, random.integers(1, 50))]
        batch, accumulation, steps = (int(n) for n in random.integers(1, [9, 5, 9]))
        samples, stop = batch * accumulation, int(random.integers(0, steps + 1))
        whole_run = [picture_of(number, pool, 3) for number in range(steps * samples)]
        resumed = [picture_of(number, pool, 3) for step in range(stop, steps) for number in range(step * samples, (step + 1) * samples)]
        assert whole_run[stop * samples :] == resumed
        full = len(whole_run) // len(pool) * len(pool)
        assert Counter(whole_run[:full]) == Counter(pool * (full // len(pool))), "every epoch shows the whole pool"
