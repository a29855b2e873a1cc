"""What a run, a search, a studio leave in memory: nothing, whatever they end by, and without Python's collector."""

import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from diffusers import StableDiffusionPipeline

from sdlora import api, cast, estimate, job, learners, train
from sdlora.errors import UserError, without_frames
from sdlora.family import Family
from sdlora.judge import Asking
from sdlora.kinds import Wanted
from sdlora.packs.pipelines import Pack
from sdlora.studio import Studio
from webui.easel import Easel, Wish
from webui.shelf import Shelf

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import living

RICH: dict[str, Any] = {"train__steps": 2, "preview__scales": [1.0], "preview__every": 1, "validation__share": 0.4, "validation__judge": 1}
"""Held-out loss, previews, a judge, and a strip with its likeness."""
ASKING = Asking(scales=(1.0,), prompts=1, seeds=1, steps=1)
NOTHING = living.Living(0, 0, 0)
Do = Callable[[int], Any]


def kept(do: Do, times: int = 1) -> list[living.Living]:
    """What so many times left, each beside what was there before."""
    found = itertools.pairwise(living.counts(times, do))
    return [living.Living(*(now - then for then, now in zip(before, after, strict=True))) for before, after in found]


def all_of(events: Iterator[api.Event], until: str = "") -> list[str]:
    """Kinds of events; after the first of the kind `until` nobody asks for more."""
    kinds = list[str]()
    for event in events:
        kinds.append(event.kind)
        if event.kind == until:
            break
    return kinds


@pytest.fixture
def trained(squares: Path, base: Path, tmp_path: Path) -> Do:
    """Train into the next folder, with settings."""

    def do(i: int, *, until: str = "", stop: api.Stop | None = None, **settings: Any) -> list[str]:
        return all_of(api.train(small.settled(squares, base, **{"train__steps": 2, **settings}), tmp_path / f"run-{i}", stop), until)

    return do


def test_a_base_that_is_kept_is_counted(base: Path) -> None:
    """The control of all others: one that somebody holds, and one that holds itself."""
    shelf = list[Studio]()
    (held,) = kept(lambda _: shelf.append(api.open_studio(base=str(base))))
    assert held.modules > 50
    assert held.bytes > sum(p.nbytes for whole in shelf[0].family.components.values() for p in whole.parameters())

    def knot(_: int) -> None:
        loaded: Any = api.open_studio(base=str(base)).family
        loaded.itself = loaded

    assert kept(knot) == [held]


def test_counting_a_runs_memory_keeps_nothing(loaded: Family, squares: Path, base: Path) -> None:
    run = small.settled(squares, base)
    pieces = learners.pieces(run, loaded)
    assert kept(lambda _: estimate.memory(run, loaded, pieces, [(32, 32)])) == [NOTHING]


@pytest.mark.parametrize("until", [pytest.param("note", marks=pytest.mark.slow), "step"])
def test_a_run_that_nobody_follows_on_leaves_nothing(trained: Do, until: str) -> None:
    assert kept(lambda i: trained(i, until=until)) == [NOTHING]


@pytest.mark.slow
def test_runs_leave_nothing(trained: Do) -> None:
    assert kept(lambda i: trained(i, **RICH), 2) == [NOTHING] * 2


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {"adapter": {"kind": "houlsby", "bottleneck": 2}, "train__gradient_checkpointing": "on", "train__ema": 0.9},
    {"adapter": {"kind": "prefix", "tokens": 2}, "train__profile": True},
    {"train__words_lr": 1e-3, "trigger": "mira", "train__base_weights": "int8"},
])  # fmt: skip
def test_whatever_sits_on_the_base_nothing_stays(trained: Do, settings: dict[str, Any]) -> None:
    assert kept(lambda i: trained(i, **settings)) == [NOTHING]


@pytest.mark.slow
def test_a_run_that_is_stopped_leaves_nothing(trained: Do) -> None:
    def stopped(i: int) -> None:
        stop = api.Stop()
        stop.stop = True
        assert trained(i, stop=stop)[-1] == "stopped"

    assert kept(stopped) == [NOTHING]


@pytest.mark.slow
def test_the_base_that_was_trained_on_is_gone_when_that_of_the_pictures_is_loaded(trained: Do, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, living_then = list[weakref.ref[Family]](), list[int]()
    really, opening = cast.family.load, Studio.open

    def load(*given: Any) -> Family:
        found = really(*given)
        loaded.append(weakref.ref(found))
        return found

    def opened(*given: Any) -> Studio:
        living_then.append(sum(one() is not None for one in loaded))
        return opening(*given)

    monkeypatch.setattr(cast.family, "load", load)
    monkeypatch.setattr(cast.Studio, "open", opened)
    with living.counted_references():
        trained(0, preview__scales=[1.0])
    assert (len(loaded), living_then) == (2, [0])


def broken_after_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no loss be a number."""
    really = train.sample_losses
    monkeypatch.setattr(train, "sample_losses", lambda *given: really(*given) * float("nan"))


@pytest.mark.parametrize(
    ("code", "settings"),
    [
        ("E-MEM-02", {"train__memory_gb": 1e-6}),
        pytest.param("E-NUM-01", {"train__on_nonfinite": "stop"}, marks=pytest.mark.slow),
        ("E-ADAPT-01", {"adapter__targets": ["nothing"]}),
    ],
)
def test_a_run_that_fails_leaves_nothing_even_to_who_keeps_the_error(
    code: str, settings: dict[str, Any], trained: Do, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_after_a_step(monkeypatch)
    errors = list[UserError]()

    def fail(i: int) -> None:
        try:
            trained(i, **settings)
        except UserError as error:
            errors.append(error)

    assert kept(fail) == [NOTHING]
    (error,) = errors
    assert error.code == code


def test_what_the_caller_was_handling_keeps_its_frames() -> None:
    @without_frames
    def failing() -> Iterator[int]:
        held = torch.zeros(3)
        yield len(held)
        try:
            raise ValueError(held)
        except ValueError as error:
            raise UserError("E-PLANTED", "it fails") from error

    try:
        raise KeyError
    except KeyError as error:
        own = error
        with pytest.raises(UserError) as caught:
            list(failing())
    assert own.__traceback__
    names = [entry.name for entry in caught.traceback]
    assert "failing" not in names
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.__cause__.__traceback__ is None


@pytest.mark.slow
def test_a_cast_two_of_which_fail_leaves_nothing(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = job.export.foresee

    def foresee(settled: Any, *given: Any) -> None:
        really(settled, *given)
        if settled.name != "mira":
            raise UserError("E-PLANTED", "this one fails")

    def fail(i: int) -> None:
        with pytest.raises(UserError, match="E-PLANTED"):
            all_of(api.train_cast(runs, tmp_path / f"cast-{i}"))

    monkeypatch.setattr(job.export, "foresee", foresee)
    runs = [small.settled(squares, base, train__steps=1, preview__scales=[1.0], name=name) for name in ("mira", "nora", "ida")]
    assert kept(fail) == [NOTHING]
    assert (tmp_path / "cast-0" / "mira" / "mira.safetensors").is_file()


@pytest.mark.slow
def test_searches_leave_nothing(squares: Path, base: Path, tmp_path: Path) -> None:
    run = small.settled(squares, base, train__steps=2, train__save_every=1, validation__share=0.4)
    table, out = run.model_dump(exclude_none=True), tmp_path / "run"
    all_of(api.train(run, out))
    wanted = Wanted(["lora"], [1], steps=2)

    searches: dict[str, Do] = {
        "rate": lambda _: all_of(api.find_rate(run, tmp_path / "rate", 6, 1e-4, 1e-1)),
        "dimension": lambda _: all_of(api.find_dimension(run, tmp_path / "dimension", 4, {"rank": [1, 2]})),
        "kind": lambda _: all_of(api.find_kind(table, wanted, ASKING, tmp_path / "kind")),
        "kind, left": lambda _: all_of(api.find_kind(table, wanted, ASKING, tmp_path / "part"), until="note"),
        "best": lambda _: all_of(api.find_best(out, ASKING, out=tmp_path / "best")),
        "checkpoint": lambda _: api.keep_checkpoint(out, 1, 1.0, tmp_path / "kept.safetensors"),
        "check": lambda _: api.check(run, tmp_path / "check"),
    }
    assert {name: kept(search) for name, search in searches.items()} == {name: [NOTHING] for name in searches}


def test_studios_leave_nothing_with_packs_on_them_or_off_again(base: Path, pack: Pack) -> None:
    def use(i: int) -> None:
        studio = api.open_studio([pack] * (i % 2), str(base))
        names = [studio.add(pack), studio.add(pack)]
        studio.render([studio.recipe("mira", steps=1, scales=tuple((name, 0.5) for name in names))])
        studio.remove(names[0])

    assert kept(use, 2) == [NOTHING] * 2


def test_packs_on_a_pipeline_leave_nothing(base: Path, pack_path: Path) -> None:
    pack = Pack.open(pack_path)

    def use(i: int) -> None:
        pipeline = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        for _ in range(2):
            first, second = pack.apply(pipeline), pack.apply(pipeline, 0.5)
            pipeline("mira", num_inference_steps=1, output_type="np")
            first.remove()
        if i:
            second.remove()

    assert kept(use, 2) == [NOTHING] * 2


def test_packs_act_on_a_pipeline_that_took_the_parts_of_one_that_is_gone(base: Path, pack_path: Path) -> None:
    """Sites do not hold their bank, and need none."""
    first = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
    Pack.open(pack_path).apply(first, 1.0)
    x, t, text = torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.ones(1, 4, 16)
    with torch.no_grad():
        adapted = first.unet(x, t, text).sample
        unet = first.unet
        del first
        assert torch.equal(unet(x, t, text).sample, adapted)
        plain = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32).unet(x, t, text).sample
    assert not torch.equal(adapted, plain)


@pytest.mark.slow
def test_the_pages_easel_leaves_nothing_of_bases_and_packs_that_it_changes(trained: Do, tmp_path: Path) -> None:
    trained(0)
    trained(1, adapter__rank=3)
    (tmp_path / "drawn").mkdir()
    easel = Easel(Shelf(tmp_path), tmp_path / "drawn")
    ids = [found.id for found in easel.shelf.packs()]
    assert len(ids) == 2

    def use(_: int) -> None:
        for pack in ids:
            easel.pair(Wish(pack, "mira", "", 1, 1, 3.0, "", 1.0))
        easel.rest()

    assert kept(use, 2)[1:] == [NOTHING], "packs are kept once they are read"
