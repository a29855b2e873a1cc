"""Where memory runs out, or something else breaks, while a trained run is looked at: its pack lies on the disk, and the run ends well."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from test_resume import pack
from torch import Tensor

from sdlora import api, eyes, family, job, judge, preview, record, report, score, state, validation
from sdlora.api import Event
from sdlora.devices import Portion, compute_in_portions, is_out_of_memory
from sdlora.errors import RESOURCES, UserError
from sdlora.events import warn_on_failure
from sdlora.family import Family
from sdlora.packs.file import load
from sdlora.studio import Studio

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 18.00 GiB. GPU 0 has a total capacity of 23.64 GiB")
LOOKED_AT: dict[str, Any] = {"preview__scales": [0.0, 1.0], "validation__judge": 1, "train__steps": 2, "train__save_every": 1}


def go(out: Path, run: Any) -> list[Event]:
    return list(api.train(run, out))


def raising(error: BaseException) -> Callable[..., Any]:
    def broken(*_: Any, **__: Any) -> Any:
        raise error

    return broken


@pytest.fixture(scope="module")
def undisturbed(squares: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shortage") / "run"
    go(out, small.settled(squares, base, **LOOKED_AT))
    return out


# ---------------------------------------------------------------- the pack is on the disk


PLACES = {
    "the base for pictures": (Studio, "open"),
    "the strip": (preview, "strip"),
    "the sheet": (preview, "sheet"),
    "likeness": (preview, "likeness"),
    "encoding for likeness": (score, "embed"),
    "the judge": (job, "judging"),
    "the judge's verdict": (judge.Judge, "verdict"),
    "what sees": (eyes, "opened"),
    "decoding": (AutoencoderKL, "decode"),
    "the report": (report, "page"),
}
NO_MEMORY = {"cuda": FULL, "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")}
OTHERS = {"bug": ValueError("a bug of ours"), "user": UserError("E-BASE-13", "its weights do not fit into fp16"), "memory": MemoryError()}
ERRORS = NO_MEMORY | OTHERS
FAST = [("the base for pictures", "cuda"), ("decoding", "cuda"), ("the strip", "bug")]
SLOW = [(place, "cuda") for place in PLACES] + [("the strip", error) for error in ERRORS if error != "cuda"]
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW if case not in FAST)]


@pytest.mark.parametrize(("place", "error"), CASES)
def test_whatever_breaks_once_it_is_trained_leaves_the_pack_and_a_warning(
    place: str, error: str, undisturbed: Path, squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = job.take_off

    def take_off(member: Any) -> Iterator[Event]:
        yield from really(member)
        monkeypatch.setattr(*PLACES[place], raising(ERRORS[error]))  # from here on, the training is over

    monkeypatch.setattr(job, "take_off", take_off)
    seen = go(tmp_path / "run", small.settled(squares, base, **LOOKED_AT))
    assert seen[-1].kind == "done"
    assert [event for event in seen if event.kind == "warning"], "nothing is silent"
    assert not [event for event in seen if event.kind == "failed"]
    mine, theirs = load(tmp_path / "run" / "mira.safetensors").tensors, load(undisturbed / "mira.safetensors").tensors
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert record.read_whole(tmp_path / "run")[0].state == "finished"


def test_the_pack_lies_there_before_anything_is_drawn_and_says_later_what_was_seen(
    squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def opened(*given: Any) -> Studio:
        found.append(load(tmp_path / "run" / "mira.safetensors"))
        return really(*given)

    really = Studio.open
    monkeypatch.setattr(Studio, "open", opened)
    go(tmp_path / "run", small.settled(squares, base, **LOOKED_AT))
    (before,), after = found, load(tmp_path / "run" / "mira.safetensors")
    assert "modelspec.thumbnail" not in before.metadata
    assert "modelspec.thumbnail" in after.metadata
    assert all(torch.equal(before.tensors[key], after.tensors[key]) for key in after.tensors)
    assert before.metadata.keys() <= after.metadata.keys()


def test_a_run_that_is_killed_while_it_draws_is_drawn_on_resuming(
    squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small.settled(squares, base, **LOOKED_AT)
    with monkeypatch.context() as patch:
        patch.setattr(preview, "strip", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "run", run)
    tensors = pack(tmp_path / "run").tensors
    assert go(tmp_path / "run", run)[-1].kind == "done"
    after = pack(tmp_path / "run")
    assert "modelspec.thumbnail" in after.metadata
    assert all(torch.equal(tensors[key], after.tensors[key]) for key in tensors)


def test_what_breaks_a_look_during_training_breaks_no_training(
    squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "in_training", raising(FULL))
    monkeypatch.setattr(job, "judging", raising(ValueError("a bug of ours")))
    seen = go(tmp_path / "run", small.settled(squares, base, **LOOKED_AT, preview__every=1))
    warned = [event for event in seen if event.kind == "warning" and event.step]
    assert {event.step for event in warned} == {1, 2}
    assert seen[-1].kind == "done"
    assert state.steps(tmp_path / "run") == [1, 2]


def test_a_tracker_that_fails_is_told_no_more(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Server:
        name, calls = "server", 0

        def log(self, *_: Any, **__: Any) -> None:
            self.calls += 1
            raise ConnectionError("gone")

    server = Server()
    monkeypatch.setattr("sdlora.trackers.Trackers.__enter__", lambda self: self._open.append(server) or self)
    seen = go(tmp_path / "run", small.settled(squares, base, train__steps=3))
    assert seen[-1].kind == "done"
    assert server.calls == 1
    assert len([event for event in seen if event.kind == "warning" and "server" in event.text]) == 1


def test_a_warning_keeps_the_traceback_of_a_bug_and_of_nothing_else() -> None:
    def failing(error: BaseException) -> Iterator[Event]:
        yield Event("note", "before")
        raise error

    first, second = warn_on_failure(failing(ValueError("a bug of ours")), "no picture", 3)
    assert (first.kind, second.kind, second.step) == ("note", "warning", 3)
    assert "ValueError" in second.data["traceback"]
    *_, told = warn_on_failure(failing(UserError("E-DISK-01", "full")), "no picture")
    assert told.kind == "warning"
    assert not told.data
    with pytest.raises(KeyboardInterrupt):
        list(warn_on_failure(failing(KeyboardInterrupt()), "no picture"))
    assert [event.kind for event in warn_on_failure([Event("note")], "no picture")] == ["note"]


# ---------------------------------------------------------------- less at once


SAID = [
    "CUDA out of memory. Tried to allocate 20.00 MiB",
    "CUDA error: out of memory",
    "HIP out of memory. Tried to allocate 1 GiB",
    "MPS backend out of memory (MPS allocated: 1 GB)",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes",
]
SOUND = ["mat1 and mat2 shapes cannot be multiplied", "CUDA error: an illegal memory access was encountered", ""]


def test_every_text_by_which_memory_runs_out_is_known() -> None:
    assert all(is_out_of_memory(RuntimeError(text)) for text in SAID)
    assert is_out_of_memory(FULL)
    assert is_out_of_memory(MemoryError())
    assert not any(is_out_of_memory(RuntimeError(text)) for text in SOUND)
    assert not is_out_of_memory(ValueError(SAID[0])), "a message that quotes another"


def test_what_does_not_fit_is_computed_again_by_halves_and_in_tiles_last() -> None:
    tried: list[Portion] = []

    def fits(portion: Portion) -> str:
        tried.append(portion)
        if not portion.tiled:
            raise FULL
        return "done"

    assert compute_in_portions(fits, 6, "picture", can_tile=True) == "done"
    assert tried == [Portion(6), Portion(3), Portion(2), Portion(1), Portion(1, tiled=True)]
    with pytest.raises(UserError) as raised:
        compute_in_portions(raising(FULL), 6, "picture", can_tile=True)
    assert (raised.value.code, raised.value.exit_code) == ("E-MEM-03", RESOURCES)
    tried.clear()
    with pytest.raises(UserError):
        compute_in_portions(fits, 2, "caption")
    assert tried == [Portion(2), Portion(1)], "only pictures come in tiles"
    with pytest.raises(RuntimeError, match="shapes"):
        compute_in_portions(raising(RuntimeError(SOUND[0])), 6, "picture")


def most(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, fits: Callable[[Tensor], bool]) -> list[int]:
    """Memory of a network for inputs alone that fit; returns the rows of each input that did."""
    really, rows = getattr(owner, name), list[int]()

    def limited(self: Any, x: Tensor, *rest: Any, **named: Any) -> Any:
        if not fits(x):
            raise FULL
        rows.append(len(x))
        return really(self, x, *rest, **named)

    monkeypatch.setattr(owner, name, limited)
    return rows


@pytest.fixture(scope="module")
def studio(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    opened = Studio.open(family.find(str(base)))
    opened.add(load(small.random_pack(tmp_path_factory.mktemp("packs") / "mira.safetensors", opened.family)))
    return opened


def test_pictures_are_drawn_one_by_one_where_only_one_fits(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = [studio.recipe("a ball", "32x32", seed=seed, steps=2, scales=(("mira", 1.0),)) for seed in range(5)]
    alone = torch.cat([studio.pixels([recipe]) for recipe in recipes])
    rows = most(monkeypatch, UNet2DConditionModel, "forward", lambda x: len(x) <= 2)  # with guidance, one picture is two rows
    assert torch.equal(studio.pixels(recipes), alone)
    assert set(rows) == {2}


@pytest.mark.parametrize("owner", [UNet2DConditionModel, AutoencoderKL])
def test_scale_0_is_the_base_bit_for_bit_however_little_fits(owner: Any, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = [studio.recipe(prompt, "32x32", steps=2, guidance=1.0) for prompt in ("a ball", "a box", "a cone")]
    scales, calls = [0.0, 0.5, 1.0, 1.5], [0]

    def fits(x: Tensor) -> bool:
        calls[0] += 1
        return len(x) <= 3 or calls[0] < 4  # after some batches of four there is less

    most(monkeypatch, owner, "forward" if owner is UNet2DConditionModel else "decode", fits)
    for base, nothing, half, *_ in studio.strips(recipes, ["mira"], scales):
        assert base.tobytes() == nothing.tobytes()
        assert base.tobytes() != half.tobytes()
    assert calls[0] > 4


def test_the_autoencoder_takes_tiles_where_no_picture_fits(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = studio.recipe("a ball", "64x64", steps=2, scales=(("mira", 1.0),))
    whole, means = studio.pixels([recipe]), score.embed(studio.family, studio.pixels([recipe]))
    decoder, encoder = type(studio.family.vae.decoder), type(studio.family.vae.encoder)
    with monkeypatch.context() as patch:
        most(patch, decoder, "forward", lambda _: False)
        with pytest.raises(UserError) as raised:
            studio.pixels([recipe])
        assert raised.value.code == "E-MEM-03"
    side = 64 // studio.family.latent_factor
    most(monkeypatch, decoder, "forward", lambda x: x.shape[-1] < side)
    most(monkeypatch, encoder, "forward", lambda x: x.shape[-1] < 64)
    tiled = studio.pixels([recipe])
    assert tiled.shape == whole.shape
    assert 0 < (tiled - whole).abs().mean() < 0.1, "seams, and the same picture"
    near = score.embed(studio.family, whole)
    assert near.shape == means.shape
    assert (near - means).norm() < 0.5 * means.norm()
    assert not studio.family.vae.use_tiling, "the next picture is drawn whole"


def test_one_large_picture_goes_through_the_autoencoder_at_once_and_many_small_ones(
    sd15_base: Path, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = most(monkeypatch, AutoencoderKL, "encode", lambda _: True)
    pixels = small.numbers((3, 3, 32, 32)).clamp(-1, 1)
    mean, _ = studio.family.encode(pixels)
    assert rows == [3]
    torch.testing.assert_close(mean, torch.cat([studio.family.encode(one[None])[0] for one in pixels]), rtol=1e-4, atol=1e-5)
    large: Family = family.load(family.find(str(sd15_base)), torch.device("cpu"), torch.float32)
    rows.clear()
    large.encode(small.numbers((2, 3, 512, 512)).clamp(-1, 1))
    assert rows == [1, 1]


def test_held_out_loss_is_measured_picture_by_picture_where_memory_is_short(
    squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small.settled(squares, base, train__steps=2, validation__share=0.4, train__batch_size=2)
    losses = [event.data["loss"] for event in go(tmp_path / "whole", run) if event.kind == "validation"]
    really = validation._errors

    def limited(loaded: Family, goal: Any, rows: Any) -> Tensor:
        if len(rows) > 1:
            raise FULL
        return really(loaded, goal, rows)

    monkeypatch.setattr(validation, "_errors", limited)
    again = [event.data["loss"] for event in go(tmp_path / "run", run) if event.kind == "validation"]
    assert len(again) == len(losses) > 0
    torch.testing.assert_close(torch.tensor(again), torch.tensor(losses), rtol=1e-4, atol=1e-5)


def test_a_base_that_does_not_fit_is_an_error_in_the_users_words(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "load", raising(FULL))
    with pytest.raises(UserError) as raised:
        Studio.open(family.find(str(base)))
    assert (raised.value.code, raised.value.exit_code) == ("E-MEM-04", RESOURCES)
