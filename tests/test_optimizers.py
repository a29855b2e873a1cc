"""Whatever the optimizer: a masked step has not been, a checkpoint holds all that it remembers, every setting does something."""

from pathlib import Path
from typing import Any

import pytest
import small
import torch
from torch import Tensor, nn

from sdlora import api, devices, lookup, state
from sdlora.errors import UserError
from sdlora.optimizer import groups, set_rate
from sdlora.optimizers import prodigy
from sdlora.state import Progress
from sdlora.train import Learner

NAMES = lookup.names("optimizers")
CHANGES: dict[str, Any] = {
    "weight_decay": 0.5, "beta1": 0.5, "beta2": 0.5, "eps": 0.5, "decay_rate": 0.3, "clip_threshold": 0.1, "d0": 1e-2, "d_coef": 3.0,
    "use_bias_correction": False, "safeguard_warmup": False,
}  # fmt: skip
SIZES = {"unet.up": (64, 80), "text_encoder.down": (3, 4)}  # the first is large enough for 8 bits


def learner(name: str, lr: float = 0.0, **settings: Any) -> Learner:
    """Two parameters in two groups, under an optimizer as a run prepares it."""
    module = lookup.find("optimizers", name)
    small.library(module.Config.library)
    lr = lr or (1.0 if module.Config.finds_its_rate else 0.5)
    params = {dotted: nn.Parameter(small.numbers(size)) for dotted, size in SIZES.items()}
    own = module.new(groups([({dotted: parameter}, lr) for dotted, parameter in params.items()]), module.Config(**settings))
    accelerator, _ = devices.for_training("fp32")
    return Learner("mira", None, params, accelerator.prepare(own), None, None)  # type: ignore[arg-type]


def advance(one: Learner, steps: range, broken: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Steps down a bowl, with noise of the step's own; `broken` ones have no finite gradient. The weights in the end."""
    for step in steps:
        for seed, parameter in enumerate(one.params.values()):
            bad = float("nan") if step in broken else 1.0
            parameter.grad = (parameter.detach() + 0.1 * small.numbers(tuple(parameter.shape), 10 * step + seed)) * bad
        one.optimizer.optimizer.mask(torch.tensor(step not in broken))
        set_rate(one.optimizer, 1 - step / 100)
        one.optimizer.step()
        one.optimizer.zero_grad(set_to_none=True)
    return {name: parameter.detach().clone() for name, parameter in one.params.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def remembered(one: Learner) -> list[Any]:
    slots = [value for parameter in one.params.values() for value in one.optimizer.state.get(parameter, {}).values()]
    numbers = [value for group in one.optimizer.param_groups for key, value in group.items() if key != "params"]
    return [value.tolist() if isinstance(value, Tensor) else value for value in [*slots, *numbers]]


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_step_has_not_been(name: str) -> None:
    whole, broken = learner(name), learner(name)
    ended = advance(whole, range(1, 4))
    assert same(advance(broken, range(1, 2), broken=(1,)), advance(learner(name), range(0))), "nor does a first one move anything"
    advance(broken, range(1, 3))
    kept, before = advance(broken, range(0)), remembered(broken)
    assert same(advance(broken, range(2, 3), broken=(2,)), kept)
    assert remembered(broken) == before, "nor is anything remembered of it"
    assert same(advance(broken, range(3, 4)), ended)
    assert not same(ended, kept), "the control: a step moves"


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(name: str, tmp_path: Path) -> None:
    whole, stopped, resumed = learner(name), learner(name), learner(name)
    ended = advance(whole, range(40))
    advance(stopped, range(20))
    state.save(tmp_path, Progress(20), [stopped], 2)
    assert state.restore(tmp_path, [resumed], 40).progress.step == 20
    assert same(advance(resumed, range(20, 40)), ended)
    forgetful = learner(name)
    for parameter, start in zip(forgetful.params.values(), advance(learner(name), range(20)).values(), strict=True):
        parameter.data.copy_(start)
    assert not same(advance(forgetful, range(20, 40)), ended), "the control: what it remembers matters"


@pytest.mark.parametrize("name", ["prodigy", "schedulefree"])
def test_no_number_that_is_not_finite_is_saved(name: str, tmp_path: Path) -> None:
    one = learner(name)
    advance(one, range(2))
    state.save(tmp_path, Progress(1), [one], 2)
    one.optimizer.param_groups[1][one.optimizer.param_groups[1]["memory"][1]] = float("inf")
    with pytest.raises(UserError, match=r"E-NUM-02.*optimizer"):
        state.save(tmp_path, Progress(2), [one], 2)
    assert state.steps(tmp_path) == [1]


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_down(name: str) -> None:
    one = learner(name, **({"d0": 1e-2, "d_coef": 3.0} if name == "prodigy" else {"lr": 0.05}))
    start = sum(float(p.detach().square().sum()) for p in one.params.values())
    assert sum(float(p.square().sum()) for p in advance(one, range(30)).values()) < 0.5 * start


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_of_an_optimizer_changes_its_steps(name: str) -> None:
    usual = advance(learner(name), range(25))
    assert same(usual, advance(learner(name), range(25)))
    for setting in lookup.find("optimizers", name).Config.model_fields.keys() - {"kind", "paged"}:
        assert not same(advance(learner(name, **{setting: CHANGES[setting]}), range(25)), usual), setting


def test_optimizers_differ() -> None:
    ended = [advance(learner(name), range(3)) for name in ("adamw", "lion", "adafactor")]
    assert not any(same(a, b) for i, a in enumerate(ended) for b in ended[:i])


def test_lion_is_the_algorithm() -> None:
    one = learner("lion", 0.1, weight_decay=0.2, beta1=0.8, beta2=0.6)
    p, m = small.numbers(SIZES["unet.up"]), torch.zeros(SIZES["unet.up"])
    for step in range(3):
        g, rate = p + 0.1 * small.numbers(SIZES["unet.up"], 10 * step), 0.1 * (1 - step / 100)
        c = 0.8 * m + 0.2 * g
        p = p - rate * (c.sign() + 0.2 * p)
        m = 0.6 * m + 0.4 * g
    torch.testing.assert_close(advance(one, range(3))["unet.up"], p)


def test_the_average_of_schedule_free_weights_is_the_librarys() -> None:
    one = learner("schedulefree")
    kept = advance(one, range(4))
    with one.averaged():
        shown = advance(one, range(0))
    assert same(advance(one, range(0)), kept), "and looking at it changes nothing"
    one.optimizer.optimizer.eval()
    for name, parameter in one.params.items():
        torch.testing.assert_close(parameter.detach(), shown[name])
        assert not torch.equal(kept[name], shown[name])


def test_a_missing_package_is_named_before_anything_is_written(
    squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prodigy.Config, "library", "not_installed_here")
    with pytest.raises(UserError, match=r'E-OPT-01.*not_installed_here.*pip install "sdlora\[optim\]"'):
        list(api.train(small.settled(squares, base, optimizer__kind="prodigy"), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_pages_need_a_card(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = small.library("bitsandbytes")
    run = small.settled(squares, base, optimizer__kind="adamw8bit", optimizer__paged=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"E-OPT-04.*no CUDA card"):
        list(api.train(run, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    module, parts = lookup.find("optimizers", "adamw8bit"), groups([({"a": nn.Parameter(torch.zeros(2))}, 1.0)])
    for paged, kind in ((True, "PagedAdamW8bit"), (False, "AdamW8bit")):
        made = module.new(parts, module.Config(paged=paged))
        assert isinstance(made, getattr(library.optim, kind))
        assert made.is_paged == paged


def test_what_finds_its_rate_has_one_for_all(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prodigy.Config, "library", "torch")
    run = small.settled(squares, base, optimizer__kind="prodigy", train__lr=1.0, train__text_encoder_lr=0.5)
    with pytest.raises(UserError, match=r"E-OPT-02.*train\.text_encoder_lr"):
        list(api.train(run, tmp_path / "run"))


def test_rates_and_schedules_follow_the_optimizer(base: Path) -> None:
    def settled(kind: str) -> Any:
        return api.settle({"name": "mira", "base": str(base), "optimizer": {"kind": kind}}).train

    assert (settled("prodigy").lr, settled("prodigy").text_encoder_lr) == (1.0, 1.0)
    assert settled("lion").lr == pytest.approx(settled("adamw").lr / 5)
    assert (settled("schedulefree").schedule, settled("adamw").schedule) == ("constant", "cosine")


def test_another_optimizer_does_not_go_on_in_the_folder(squares: Path, base: Path, tmp_path: Path) -> None:
    list(api.train(small.settled(squares, base, train__steps=1), tmp_path / "run"))
    with pytest.raises(UserError, match=r"E-RUN-02.*optimizer\.kind"):
        list(api.train(small.settled(squares, base, train__steps=1, optimizer__kind="lion"), tmp_path / "run"))
