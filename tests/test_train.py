"""Laws of the loop: who trains beside others ends as if alone, sums do not depend on their split, nothing not finite moves a weight."""

import dataclasses
import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import small
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlora import api, devices, family, learners, lookup, optimizer, train
from sdlora.adapter import Bank
from sdlora.adapters import lora
from sdlora.config import Packing, Run, flat
from sdlora.data import buckets, cache, ledger
from sdlora.data.ahead import Ahead
from sdlora.data.batches import Prepared, micro_batch, picture_of
from sdlora.data.pixels import read_picture
from sdlora.data.store import Store
from sdlora.errors import NUMBERS, UserError
from sdlora.objective import Noised
from sdlora.objectives import epsilon
from sdlora.schedule import rate
from sdlora.settings import Settings
from sdlora.train import Goal, Learner, Setup, sample_losses, steps


@pytest.fixture
def doubles() -> Iterator[None]:
    """float64 throughout."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def exact_noise(latents: Tensor, noise: Tensor, uniform: Tensor, alphas: Tensor, config: Settings) -> Noised:
    assert isinstance(config, epsilon.Config)
    return epsilon.noise(latents, noise.to(latents.dtype), uniform, alphas.to(latents.dtype), config)


def exactly(learners: Sequence[Learner], settings: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Let learners begin, with noise that is not rounded to fp32."""
    for one in learners:
        one.goal, one.train, one.step = Goal(exact_noise, one.goal.config), one.train.model_copy(update=settings), 0


@dataclass
class Cast:
    """Learners over one base, ready to be trained."""

    loaded: family.Family
    bank: Bank
    learners: list[Learner]
    accelerator: Any
    run: Run

    def train(self, accumulation: int = 1, batch_size: int = 2) -> dict[str, dict[str, Tensor]]:
        """Train to the end; the weights of each learner."""
        exactly(self.learners, {"accumulation": accumulation, "batch_size": batch_size})
        self.told = list(steps(Setup(self.loaded, self.bank, self.learners)))
        return {one.name: {name: p.detach().clone() for name, p in one.params.items()} for one in self.learners}


def cast(runs: Sequence[Run], folder: Path, dtype: torch.dtype) -> Cast:
    base = family.find(runs[0].base)
    accelerator, _ = devices.for_training("fp32")
    loaded = family.load(base, torch.device("cpu"), dtype)
    bank, built = Bank(loaded.components), []
    for one in [job_of(run, base, loaded, folder) for run in runs]:
        found = cache.latents(one.dataset.account.used, one.dataset.variants, "white", loaded, Store(folder / "cache"))
        latents = [[(mean.to(dtype), std.to(dtype)) for mean, std in some] for some in found]
        built.append(learners.new_learner(one, loaded, bank, accelerator, latents))
        for _, _, delta in bank.deltas(one.settled.name):
            delta.to(dtype)
    return Cast(loaded, bank, built, accelerator, runs[0])


def job_of(run: Run, base: family.Base, loaded: family.Family, folder: Path) -> learners.Job:
    dataset = ledger.fit_dataset(ledger.read_dataset(run, folder / "cache"), run, loaded)
    return learners.Job(run, base, folder, 0.0, dataset, learners.pieces(run, loaded))


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest relative difference between two adapters, tensor by tensor."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max() / a[name].abs().max()) for name in a)


@pytest.fixture
def two(base: Path, tmp_path: Path) -> list[Run]:
    """Two learners that differ in all that a learner may have of its own, the shapes of their pictures among it."""
    pictures, other = small.draw_folder(tmp_path / "first", 3), small.draw_folder(tmp_path / "other", 1)
    # AdamW divides by the gradient's size plus eps: what batches of another shape round otherwise grows by 1 / eps, and with every step.
    common: dict[str, Any] = {"train__steps": 50, "train__lr": 3e-3, "optimizer__eps": 1e-4}
    first = small.settled(pictures, base, name="mira", adapter__targets=["cross-attention", "unet.conv_*", "text-encoder"], **common)
    rest: dict[str, Any] = {**common, "adapter__rank": 3, "adapter__alpha": 1.0, "data__caption_dropout": 0.4}
    rest |= {"data__prior_share": 0.4, "data__prior_prompts": ["a dog"]}
    rest |= {"adapter__dropout": 0.1, "adapter__rank_dropout": 0.2, "adapter__module_dropout": 0.1}
    second = small.settled(other, base, name="tavi", seed=7, adapter__targets=["all-linear", "unet.conv_in", "text-encoder"], **rest)
    return [first, second]


@pytest.mark.usefixtures("doubles")
def test_a_cast_of_two_is_two_runs(two: list[Run], tmp_path: Path) -> None:
    together = cast(two, tmp_path, torch.float64).train()
    for run in two:
        own = cast([run], tmp_path, torch.float64)
        start = {name: p.detach().clone() for name, p in own.learners[0].params.items()}
        single = own.train()[run.name]
        assert all(p.dtype == torch.float64 for p in single.values())
        assert apart(single, together[run.name]) <= 1e-9
        assert apart(single, {name: p + 1e-6 for name, p in start.items()}) > 0.1, "the control: training moved the weights"


@pytest.mark.usefixtures("doubles")
def test_a_learner_whose_numbers_break_does_not_touch_the_other(two: list[Run], tmp_path: Path) -> None:
    runs = [run.model_copy(update={"train": run.train.model_copy(update={"steps": 5})}) for run in two]
    broken = cast(runs, tmp_path, torch.float64)
    ((mean, std),) = broken.learners[0].data.latents[0]
    broken.learners[0].data.latents[0][0] = (mean * math.nan, std)  # type: ignore[index]
    ended = broken.train()
    assert all(one.finite[1] for one in broken.told)
    assert not all(one.finite[0] for one in broken.told)
    assert all(p.isfinite().all() for p in ended["mira"].values())
    assert apart(cast(runs[1:], tmp_path, torch.float64).train()["tavi"], ended["tavi"]) <= 1e-9


@pytest.mark.usefixtures("doubles")
def test_micro_batches_accumulate_to_one_large_batch(pictures: Path, base: Path, tmp_path: Path) -> None:
    dropped = {"adapter__dropout": 0.1, "adapter__rank_dropout": 0.2, "adapter__module_dropout": 0.1, "optimizer__eps": 1e-4}  # see `two`
    run = small.settled(pictures, base, train__steps=5, adapter__targets=["cross-attention", "text-encoder"], **dropped)
    ended = {(size, times): cast([run], tmp_path, torch.float64).train(times, size)["mira"] for size, times in ((4, 1), (2, 2), (1, 4))}
    assert apart(ended[4, 1], ended[2, 2]) <= 1e-9
    assert apart(ended[4, 1], ended[1, 4]) <= 1e-9
    assert apart(ended[4, 1], cast([run], tmp_path, torch.float64).train(1, 2)["mira"]) > 1e-3, "the control: half the samples"


def test_the_loss_falls_on_a_single_picture(base: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    Image.new("RGB", (32, 32), "#c04020").save(tmp_path / "one" / "a.png")
    run = small.settled(
        tmp_path / "one", base, train__steps=40, train__batch_size=4, train__text_encoder_lr=0.0,
        adapter__targets=["unet.*"], adapter__rank=8, train__schedule="constant",
    )  # fmt: skip
    trained = cast([run], tmp_path, torch.float32)
    trained.train(batch_size=4)
    losses = [float(one.loss[0]) for one in trained.told]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


# ---------------------------------------------------------------- numbers that are not finite


def test_a_step_that_is_not_finite_moves_nothing(pictures: Path, base: Path, tmp_path: Path) -> None:
    run = small.settled(pictures, base, train__steps=4)
    trained = cast([run], tmp_path, torch.float32)
    learner = trained.learners[0]
    sound = list(learner.data.latents)
    before = {name: p.detach().clone() for name, p in learner.params.items()}
    learner.data.latents[:] = [[(mean * math.nan, std)] for ((mean, std),) in sound]  # type: ignore[index]
    ended = trained.train()["mira"]
    assert not any(one.finite[0] for one in trained.told)
    assert all(torch.equal(ended[name], p) for name, p in before.items())
    slots = [slot for state in learner.optimizer.state.values() for slot in state.values()]
    assert slots
    assert not any(slot.any() for slot in slots), "nor does the optimizer remember it"
    learner.data.latents[:] = sound  # type: ignore[index]
    ended = trained.train()["mira"]
    assert all(one.finite[0] for one in trained.told)
    assert not all(torch.equal(ended[name], p) for name, p in before.items()), "the control: a sound step moves"


def test_a_run_whose_numbers_break_ends_with_its_exit_code(pictures: Path, base: Path, tmp_path: Path) -> None:
    broken = small.copy_base(base, tmp_path / "broken")
    path = broken / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["encoder.conv_in.weight"] += 1e38  # finite, but nothing computed with it is
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"E-VAE-01.*pictures") as caught:
        list(api.train(small.settled(pictures, broken), tmp_path / "run"))
    assert caught.value.exit_code == NUMBERS
    assert not (tmp_path / "run" / "mira.safetensors").exists()


# ---------------------------------------------------------------- rate


@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (100, 0), (5, 5), (1, 0), (3, 10)])
def test_the_rate_has_its_closed_form(steps: int, warmup: int, pictures: Path, base: Path) -> None:
    for schedule in ("cosine", "constant"):
        train = small.settled(pictures, base, train__steps=steps, train__warmup_steps=warmup, train__schedule=schedule).train
        rates = [rate(step, train) for step in range(steps + 1)]
        assert all(0 < rate <= 1 for rate in rates[:-1])
        for step in range(min(warmup, steps)):
            assert rates[step] == pytest.approx((step + 1) / (warmup + 1))
        if warmup < steps:
            assert rates[warmup] == 1.0
            middle = (steps - warmup) / 2
            if schedule == "cosine" and middle.is_integer():
                assert rates[warmup + int(middle)] == pytest.approx(0.5)
            assert rates[steps] == pytest.approx(0.0 if schedule == "cosine" else 1.0)
            assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_each_part_learns_at_its_own_rate(pictures: Path, base: Path, tmp_path: Path) -> None:
    run = small.settled(pictures, base, train__lr=1e-2, train__text_encoder_lr=1e-3)
    learner = cast([run], tmp_path, torch.float32).learners[0]
    for factor in (1.0, 0.25):
        optimizer.set_rate(learner.optimizer, factor)
        assert [group["lr"] for group in learner.optimizer.param_groups] == pytest.approx([1e-2 * factor, 1e-3 * factor])
    held = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in learner.params.values()}


def test_lora_plus_lets_up_learn_faster(pictures: Path, base: Path, tmp_path: Path) -> None:
    run = small.settled(pictures, base, train__lr=1e-3, train__text_encoder_lr=1e-4, train__lora_plus_ratio=16.0)
    learner = cast([run], tmp_path, torch.float32).learners[0]
    names = {id(p): name for name, p in learner.params.items()}
    found = {names[id(p)]: group["peak_lr"] for group in learner.optimizer.param_groups for p in group["params"]}
    assert found.keys() == learner.params.keys()
    for name, lr in found.items():
        wanted = (1e-4 if name.startswith("text_encoder") else 1e-3) * (16 if name.endswith(".up") else 1)
        assert lr == pytest.approx(wanted), name


def test_lora_plus_is_refused_where_it_would_do_nothing(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora.Adapter, "fast", ())
    with pytest.raises(UserError, match=r"E-OPT-03.*lora has no factor"):
        list(api.train(small.settled(squares, base, train__lora_plus_ratio=16.0), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_rate_of_zero_leaves_the_text_encoder_alone(pictures: Path, base: Path, tmp_path: Path) -> None:
    run = small.settled(pictures, base, train__text_encoder_lr=0.0)
    learner = cast([run], tmp_path, torch.float32).learners[0]
    assert learner.data.text.is_floating_point(), "its states are computed once"
    assert not any(name.startswith("text_encoder") for name in learner.params)


def test_half_of_the_samples_are_mirrored_each_with_its_mask() -> None:
    plain = tagged(3)
    mask = torch.tensor([[[1.5, 0.5], [1.5, 0.5]]])
    data = dataclasses.replace(
        plain,
        latents=[[(mean, std), (mean + 100, std)] for ((mean, std),) in plain.latents],
        frames=[[torch.zeros(6)] * 2] * 3,
        weights=[[mask, mask.flip(2)]] * 3,
    )
    (batch,) = micro_batch([data], range(300))
    mirrored = batch.latents[:, 0, 0, 0] >= 100
    assert 0.4 < mirrored.float().mean() < 0.6
    assert (batch.latents[:, 0, 0, 0] % 100).tolist() == batch.text[:, 0].tolist(), "the caption is the picture's own"
    assert torch.equal(batch.weight[mirrored], mask.flip(2).expand(int(mirrored.sum()), 1, 2, 2))
    assert torch.equal(batch.weight[~mirrored], mask.expand(int((~mirrored).sum()), 1, 2, 2))


def test_mirror_images_are_encoded_as_pictures_of_their_own(squares: Path, base: Path, tmp_path: Path) -> None:
    loaded = family.load(family.find(str(base)), torch.device("cpu"), torch.float32)
    dataset = job_of(small.settled(squares, base, data__flip=True), loaded.base, loaded, tmp_path).dataset
    plain, flipped = cache.latents(dataset.account.used, dataset.variants, "white", loaded, Store(tmp_path / "cache"))[0]
    seen = buckets.fit(read_picture(dataset.account.used[0].path), dataset.sizes[0]).flip(2)
    assert torch.equal(flipped[0], loaded.encode(seen[None])[0][0])
    assert not torch.allclose(flipped[0], plain[0].flip(2), atol=1e-3), "the control: which is more than mirrored latents"


# ---------------------------------------------------------------- what the base keeps


def prior_run(pictures: Path, base: Path, share: float) -> Run:
    return small.settled(pictures, base, train__steps=1, data__prior_share=share, data__prior_prompts=["a dog", "red"])


def test_prior_samples_say_the_prompts_and_no_caption(squares: Path, base: Path, tmp_path: Path) -> None:
    for share in (0.0, 0.3, 1.0):
        data = cast([prior_run(squares, base, share)], tmp_path, torch.float32).learners[0].data
        (batch,) = micro_batch([data], range(200))
        assert batch.prior.float().mean().item() == pytest.approx(share, abs=0.1)
        kept = {tuple(data.text[row].tolist()) for row in data.prior}
        said = [tuple(row.tolist()) for row in batch.text]
        assert len(kept) == 3, "both prompts, and the empty one"
        assert all((text in kept) == bool(prior) for text, prior in zip(said, batch.prior, strict=True))
        assert share == 0 or {text for text, prior in zip(said, batch.prior, strict=True) if prior} == kept


def test_the_target_of_prior_samples_is_the_bases_own_word(squares: Path, base: Path, tmp_path: Path) -> None:
    one = cast([prior_run(squares, base, 0.5)], tmp_path, torch.float32)
    goal, params = Goal(epsilon.noise, one.run.objective), one.learners[0].params
    (batch,) = micro_batch([one.learners[0].data], range(8))
    assert 0 < batch.prior.sum() < 8
    untrained = sample_losses(one.loaded, one.bank, batch, [goal])
    assert untrained[batch.prior].max() <= 1e-9, "an adapter that does nothing says what the base says"
    assert untrained[~batch.prior].min() > 1e-3, "the control: the others are asked for the noise"
    with torch.no_grad():
        for p in params.values():
            p += 0.1
    moved = sample_losses(one.loaded, one.bank, batch, [goal])
    assert moved[batch.prior].min() > 1e-6
    moved[batch.prior].sum().backward()
    grad = {name: p.grad.clone() for name, p in params.items() if p.grad is not None}
    assert grad.keys() == params.keys()
    step = 1e-4 / math.sqrt(sum(float(g.square().sum()) for g in grad.values()))
    with torch.no_grad():
        for name, p in params.items():
            p -= step * grad[name]
    assert sample_losses(one.loaded, one.bank, batch, [goal])[batch.prior].sum() < moved[batch.prior].sum(), "down is towards the base"


def test_a_prior_prompt_that_names_the_trigger_is_refused(squares: Path, base: Path) -> None:
    with pytest.raises(UserError, match="names the trigger"):
        small.settled(squares, base, name="mira", data__prior_prompts=["a dog", "a portrait of Mira"])
    small.settled(squares, base, name="mira", data__prior_prompts=["a miracle"])
    usual = {name: small.settled(squares, base, name=name).data.prior_prompts or [] for name in ("mira", "Lemon")}
    assert set(usual["mira"]) - set(usual["Lemon"]) == {"lemon, white background"}, "the defaults give way"


# ---------------------------------------------------------------- samples


def tagged(count: int, seed: int = 0, dropout: float = 0.0) -> Prepared:
    """Data whose latents are the picture's number, without spread, and so are its tokens; the empty caption is -1."""
    latents = [[(torch.full((1, 2, 2), float(i)), torch.zeros(1, 2, 2))] for i in range(count)]
    rows = [[i] for i in range(count)]
    text, frames, weights = torch.tensor([*range(count), -1])[:, None], [[torch.zeros(6)]] * count, [[torch.ones(1, 1, 1)]] * count
    return Prepared(seed, latents, text, dropout, range(count), rows, frames, weights, [-1], 0.0)


@pytest.mark.parametrize("count", [1, 2, 5, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_every_epoch_shows_every_picture_once(count: int, size: int) -> None:
    epochs = 2 * size
    shown = []
    for start in range(0, epochs * count, size):
        for batch in micro_batch([tagged(count)], range(start, start + size)):
            shown += batch.latents[:, 0, 0, 0].long().tolist()
            assert batch.text[:, 0].tolist() == shown[-len(batch.text) :], "with its own caption"
    assert len(shown) == epochs * count
    for epoch in range(epochs):
        assert sorted(shown[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert shown == [picture_of(number, range(count), 0) for number in range(epochs * count)], "whatever the batch size"


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = {tuple(picture_of(epoch * 20 + i, range(20), seed) for i in range(20)) for epoch in range(5) for seed in range(5)}
    assert len(orders) == 25


def test_a_sample_is_the_same_in_any_batch() -> None:
    def draw(learners: list[Prepared], numbers: range) -> dict[tuple[int, int], list[Tensor]]:
        (batch,) = micro_batch(learners, numbers)
        keys = [(slot, number) for slot in range(len(learners)) for number in numbers]
        return {key: [batch.latents[i], batch.noise[i], batch.uniform[i], batch.text[i]] for i, key in enumerate(keys)}

    data = [tagged(5, 0, 0.3), tagged(3, 1, 0.3)]
    whole = draw(data, range(12))
    for number in range(12):
        for slot, one in enumerate(data):
            alone = draw([one], range(number, number + 1))[0, number]
            assert all(torch.equal(a, b) for a, b in zip(alone, whole[slot, number], strict=True))
    noises = {tuple(sample[1].flatten().tolist()) for sample in whole.values()}
    assert len(noises) == 24, "the control: no two samples share their noise"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_captions_are_dropped_as_often_as_is_set(share: float) -> None:
    (batch,) = micro_batch([tagged(4, 3, share)], range(1500))
    dropped = (batch.text[:, 0] == -1).float().mean().item()
    assert abs(dropped - share) <= 4 * math.sqrt(share * (1 - share) / 1500)
    uniform = batch.uniform
    assert 0 <= uniform.min() < 0.01
    assert 0.99 < uniform.max() < 1
    if share == 0.5:  # what is dropped says nothing about where in the schedule a sample is
        assert abs(uniform[batch.text[:, 0] == -1].mean() - 0.5) < 0.05


def test_pictures_of_several_shapes_share_a_batch(pictures: Path, base: Path, tmp_path: Path) -> None:
    learner = cast([small.settled(pictures, base)], tmp_path, torch.float32).learners[0]
    parts = list(micro_batch([learner.data], range(5)))
    assert len(parts) == len({tuple(mean.shape) for ((mean, _),) in learner.data.latents}) > 1
    assert sum(len(part.slot) for part in parts) == 5


@pytest.mark.parametrize("name", lookup.names("objectives"))
def test_an_objective_gives_what_the_loss_needs(name: str) -> None:
    module = lookup.find("objectives", name)
    alphas = torch.linspace(0.999, 0.005, 1000)
    latents, noise = small.numbers((6, 4, 3, 3)), small.numbers((6, 4, 3, 3), 1)
    uniform = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1 - 2**-24])
    noised = module.noise(latents, noise, uniform, alphas, module.Config())
    assert noised.x.shape == noised.target.shape == latents.shape
    assert noised.t.shape == noised.weight.shape == noised.snr.shape == (6,)
    assert noised.t.min() >= 0
    assert noised.t.max() < 1000
    assert (noised.weight > 0).all()
    one = module.noise(latents[2:3], noise[2:3], uniform[2:3], alphas, module.Config())
    assert torch.equal(one.x[0], noised.x[2]), "a sample's noise does not depend on its batch"


def test_epsilon_is_the_formula() -> None:
    alphas = torch.linspace(0.999, 0.005, 1000)
    latents, noise, uniform = small.numbers((3, 4, 2, 2)), small.numbers((3, 4, 2, 2), 1), torch.tensor([0.0, 0.5, 0.99])
    noised = epsilon.noise(latents, noise, uniform, alphas, epsilon.Config(min_snr_gamma=5.0))
    for i, t in enumerate([0, 500, 990]):
        a = float(alphas[t])
        assert int(noised.t[i]) == t
        torch.testing.assert_close(noised.x[i], math.sqrt(a) * latents[i] + math.sqrt(1 - a) * noise[i], rtol=1e-5, atol=1e-5)
        assert float(noised.weight[i]) == pytest.approx(min(a / (1 - a), 5.0) / (a / (1 - a)), rel=1e-3)
    assert torch.equal(noised.target, noise)
    assert (epsilon.noise(latents, noise, uniform, alphas, epsilon.Config(min_snr_gamma=0.0)).weight == 1).all()


def test_the_ledger_counts_what_is_trained_on(pictures: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    list(api.train(small.settled(pictures, base, train__steps=1), out))
    written = json.loads((out / "ledger.json").read_text())
    assert {key: written["totals"][key] for key in ("found", "used", "left_out")} == {"found": 5, "used": 5, "left_out": 0}
    assert {row["file"] for row in written["pictures"]} == {path.name for path in pictures.iterdir() if path.suffix != ".txt"}


# ---------------------------------------------------------------- every setting does something

BY_WEIGHTS: dict[str, Any] = {
    "kind": "style",
    "trigger": "zorn",
    "seed": 5,
    "data.resolution_px": 40,
    "data.ground": "black",
    "data.caption_dropout": 1.0,
    "data.prior_share": 0.9,
    "data.flip": True,
    "adapter.rank": 3,
    "adapter.alpha": 0.5,
    "adapter.rank_stabilised": True,
    "adapter.init": "gaussian",
    "adapter.targets": ["attention"],
    "adapter.lora_fa": True,
    "adapter.dropout": 0.5,
    "adapter.rank_dropout": 0.5,
    "adapter.module_dropout": 0.5,
    "objective.min_snr_gamma": 0.0,
    "text.clip_skip": 2,
    "train.steps": 4,
    "train.batch_size": 3,
    "train.accumulation": 2,
    "train.lr": 2e-2,
    "train.text_encoder_lr": 1e-3,
    "train.words_lr": 1e-3,
    "train.schedule": "constant",
    "train.warmup_steps": 0,
    "train.lora_plus_ratio": 4.0,
    "optimizer.weight_decay": 0.5,
    "train.clip_norm": 1e-3,
    "train.precision": "bf16",
    "train.ema": 0.5,
    "validation.share": 0.4,
}
BY_STRIP: dict[str, Any] = {
    "preview.prompts": ["a cat"],
    "preview.scales": [0.0, 2.0],
    "preview.seed": 3,
    "preview.steps": 2,
    "preview.guidance": 1.0,
}
ELSEWHERE = {  # which test shows it
    "data.prior_prompts": "test_train: prior samples say the prompts and no caption",
    "data.prior_pictures": "test_priors: a run trains on what the base draws and its ledger says so",
    "data.folders": "test_layouts: folders have repeats, weight and kind of their own",
    "data.mask_floor": "test_masks: what is masked hardly counts",
    **dict.fromkeys(
        ["data.further_resolutions_px", "data.crop", "data.crop_jitter", "data.colour_jitter", "data.alpha_mask"],
        "test_variants: each setting changes what is trained",
    ),
    "data.shuffle_tags": "test_captions: tags are mixed as is set",
    "data.keep_tokens": "test_captions: tags are mixed as is set",
    "data.tag_dropout": "test_captions: tags are dropped as often as is set",
    "train.compile": "test_compiled: a run with compiled blocks is the run without",
    "train.cuda_graphs": "test_graphs: a run whose steps are repeated is the run without",
    "train.profile": "test_profiling: a profile says where the time went and changes nothing",
    "train.prefetch": "test_train: samples prepared ahead are the same",
    "train.trackers": "test_trackers: trackers are told the figures",
    "pack.layouts": "test_writing: a run writes each layout it is asked for",
    "pack.embeddings_inside": "test_words: embeddings lie inside the pack where that is wished",
    "pack.dtype": "test_writing: a run writes each layout it is asked for",
    "preview.every": "test_course: previews change nothing",
    "train.on_nonfinite": "test_course: a broken picture is named and left out",
    "validation.judge": "test_judge: a run is judged while it trains",
    "validation.by": "test_judge: the best weights may go by the score",
    "validation.patience": "test_course: training ends when the loss falls no more",
    "validation.pack": "test_course: the pack may hold the best weights",
    **dict.fromkeys([f"pack.{name}" for name in Packing.model_fields], "test_sharing: every setting of a pack shows in its header"),
    "name": "test_resume: another run does not go on in the folder",
    "base": "test_config: a row is chosen by the size of the base",
    "vae": "test_readings: another autoencoder is taken for training and its pictures",
    "probe": "test_probe: what nobody says is measured",
    "text.chunks": "test_readings: a long caption is read in pieces",
    "data.folder": "test_train: a cast of two is two runs",
    "data.skip_unreadable": "test_data: what is left out is accounted for",
    "adapter.kind": "test_adapter: every kind",
    "objective.kind": "test_train: an objective gives what the loss needs",
    **dict.fromkeys(
        [f"objective.{name}" for name in epsilon.Config.model_fields if name not in ("kind", "min_snr_gamma")],
        "test_objectives: every setting of an objective changes the loss",
    ),
    **dict.fromkeys(
        ["optimizer.kind", *(f"optimizer.{name}" for name in ("beta1", "beta2", "eps"))],
        "test_optimizers: every setting of an optimizer changes its steps",
    ),
    "adapter.blocks": "test_tuning: layers have a rank, an alpha and a rate of their own",
    "train.text_encoder_steps": "test_tuning: a text encoder stops where it is told",
    "train.cycles": "test_schedule: schedules have their closed forms",
    "train.decay_share": "test_schedule: schedules have their closed forms",
    "train.warmup_share": "test_schedule: a warm-up may be a share of the steps",
    **dict.fromkeys(
        ["train.gradient_checkpointing", "train.base_weights", "train.memory_gb", "train.attention"],
        "test_plan: the settings decide which measures are taken",
    ),
    "train.save_every": "test_resume: what may change is said",
    "train.keep_checkpoints": "test_resume: the newest checkpoints are kept",
    "train.log_every": "test_train: the loss is read as often as is set",
}


def test_every_setting_is_shown_to_do_something(squares: Path, base: Path) -> None:
    names = {name for name, _ in flat(small.settled(squares, base))}
    shown = [*BY_WEIGHTS, *BY_STRIP, *ELSEWHERE]
    assert sorted(shown) == sorted(names)


@pytest.fixture(scope="module")
def usual(squares: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("usual") / "run"
    list(api.train(small.settled(squares, base, train__steps=3, preview__scales=[0.0, 1.0], preview__steps=1), out))
    return outcome(out)


def outcome(out: Path) -> dict[str, Any]:
    weights = {key: tensor.tolist() for key, tensor in load_file(out / "mira.safetensors").items() if not key.endswith("alpha")}
    with Image.open(out / "strip.png") as strip:
        return {"weights": weights, "strip": strip.tobytes()}


@pytest.mark.parametrize("name", BY_WEIGHTS)
def test_a_setting_changes_what_is_learnt(name: str, usual: dict[str, Any], squares: Path, base: Path, tmp_path: Path) -> None:
    run = small.settled(squares, base, **{"train__steps": 3, name.replace(".", "__"): BY_WEIGHTS[name]})
    list(api.train(run, tmp_path / "run"))
    weights = load_file(tmp_path / "run" / "mira.safetensors")
    assert {key: tensor.tolist() for key, tensor in weights.items() if not key.endswith("alpha")} != usual["weights"]


@pytest.mark.parametrize("name", BY_STRIP)
def test_a_setting_changes_what_is_shown(name: str, usual: dict[str, Any], squares: Path, base: Path, tmp_path: Path) -> None:
    changes = {"train__steps": 3, "preview__scales": [0.0, 1.0], "preview__steps": 1, name.replace(".", "__"): BY_STRIP[name]}
    list(api.train(small.settled(squares, base, **changes), tmp_path / "run"))
    changed = outcome(tmp_path / "run")
    assert changed["strip"] != usual["strip"]
    assert changed["weights"] == usual["weights"], "the control: and nothing else"


def test_samples_prepared_ahead_are_the_same(
    squares: Path, base: Path, tmp_path: Path, usual: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, drawn = [], train.drawn

    def noted(*given: Any) -> Any:
        prepared.append(threading.current_thread() is not threading.main_thread())
        return drawn(*given)

    monkeypatch.setattr(train, "drawn", noted)
    settings = {"train__steps": 3, "preview__scales": [0.0, 1.0], "preview__steps": 1}
    list(api.train(small.settled(squares, base, train__prefetch=True, **settings), tmp_path / "run"))
    assert outcome(tmp_path / "run") == usual
    assert sum(prepared) >= 2
    assert prepared.count(False) == 1, "the first step's alone were waited for"


def test_what_was_prepared_for_other_learners_is_thrown_away() -> None:
    ahead = Ahead[int]()
    ahead.prepare("without the broken picture", lambda: 1)
    assert ahead.take("with it", lambda: 2) == 2
    ahead.prepare("a", lambda: 3)
    assert ahead.take("a", lambda: 4) == 3
    assert ahead.take("a", lambda: 4) == 4, "once"


def test_the_loss_is_read_as_often_as_is_set(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses that are read together are told together: after steps 4 and 6 here, since the last one is always read."""
    order: list[str] = []

    def noted(setup: Setup) -> Iterator[Any]:
        for trained in steps(setup):
            order.append(f"step {trained.step}")
            yield trained

    monkeypatch.setattr("sdlora.cast.steps", noted)
    for event in api.train(small.settled(squares, base, train__log_every=4, train__save_every=6), tmp_path / "run"):
        order += [f"loss {event.step}"] * (event.kind == "step")
    parts = [range(1, 5), range(5, 7)]
    assert order == [f"{what} {step}" for part in parts for what in ("step", "loss") for step in part]
