"""Objectives are their formulas, and what diffusers' schedulers read back; noise with extras is a pure function of seed and sample."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from torch import Tensor

from sdlora import api, learners, lookup, train
from sdlora.adapter import Bank
from sdlora.data import ledger, noise
from sdlora.data.batches import micro_batch
from sdlora.errors import UserError
from sdlora.family import Family
from sdlora.objective import Noising, miss, placed
from sdlora.objectives import epsilon, flow, velocity

PREDICTIONS = {"epsilon": "epsilon", "velocity": "v_prediction"}
NAMES = lookup.names("objectives")
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (4, 8, 12)


def scheduler(**options: Any) -> DDIMScheduler:
    return DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, **options)


# ---------------------------------------------------------------- objectives


@pytest.mark.parametrize(("name", "zero"), [("epsilon", False), ("velocity", False), ("velocity", True)])
def test_diffusers_reads_the_picture_out_of_the_target(name: str, zero: bool) -> None:
    theirs = scheduler(prediction_type=PREDICTIONS[name], rescale_betas_zero_snr=zero)
    theirs.set_timesteps(1000)
    module = lookup.find("objectives", name)
    config = module.Config(zero_terminal_snr=True) if zero else module.Config()
    latents, white = small.numbers((4, 2, 3, 3)), small.numbers((4, 2, 3, 3), 1)
    noised = module.noise(latents, white, torch.tensor([0.05, 0.3, 0.6, 0.999]), scheduler().alphas_cumprod, config)
    torch.testing.assert_close(noised.x, theirs.add_noise(latents, white, noised.t), rtol=1e-4, atol=1e-4)
    for i, t in enumerate(noised.t):
        clean = theirs.step(noised.target[i], t, noised.x[i]).pred_original_sample
        torch.testing.assert_close(clean, latents[i], rtol=1e-2, atol=1e-2)


def test_diffusers_flows_to_the_picture() -> None:
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    latents, white = small.numbers((3, 2, 3, 3)), small.numbers((3, 2, 3, 3), 1)
    noised = flow.noise(latents, white, torch.tensor([0.25, 0.5, 0.999]), torch.zeros(1000), flow.Config())
    torch.testing.assert_close(noised.x, theirs.scale_noise(latents, noised.t.round(), white))
    for i in range(3):
        theirs.set_timesteps(sigmas=[float(noised.t[i]) / 1000])
        torch.testing.assert_close(theirs.step(noised.target[i], theirs.timesteps[0], noised.x[i]).prev_sample, latents[i])
    assert (noised.weight == 1).all()
    assert noised.snr.tolist() == pytest.approx([9, 1, (0.001 / 0.999) ** 2], rel=1e-3)


def test_the_schedule_is_rescaled_as_in_the_paper() -> None:
    plain, wanted = scheduler().alphas_cumprod, scheduler(rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close(velocity.rescaled(plain), wanted, rtol=1e-3, atol=1e-6)
    assert velocity.rescaled(plain)[-1] == 0 < plain[-1], "the control: it was not"
    torch.testing.assert_close(velocity.rescaled(velocity.rescaled(plain)), velocity.rescaled(plain)), "and twice is once"


@pytest.mark.parametrize("name", PREDICTIONS)
def test_weights_are_those_of_the_papers(name: str) -> None:
    module, alphas = lookup.find("objectives", name), scheduler().alphas_cumprod
    latents, white, uniform = small.numbers((4, 2, 2, 2)), small.numbers((4, 2, 2, 2), 1), torch.tensor([0.001, 0.2, 0.5, 0.99])
    for gamma, debiased in ((5.0, False), (0.0, False), (5.0, True)):
        noised = module.noise(latents, white, uniform, alphas, module.Config(min_snr_gamma=gamma, debiased=debiased))
        for u, weight, snr in zip(uniform, noised.weight, noised.snr, strict=True):
            a = float(alphas[int(u * 1000)])
            assert float(snr) == pytest.approx(a / (1 - a), rel=1e-3)
            own = float(snr) + (name == "velocity")
            wanted = math.sqrt(float(snr)) / own if debiased else min(float(snr), gamma) / own if gamma else 1.0
            assert float(weight) == pytest.approx(wanted, rel=1e-4)


def test_a_weight_means_the_same_for_noise_and_velocity() -> None:
    """A miss of x_0 by d misses the noise by sqrt(SNR) d and the velocity by sqrt(SNR + 1) d: weighted, they are one loss."""
    alphas, uniform = scheduler().alphas_cumprod, torch.tensor([0.01, 0.4, 0.9])
    latents, white = small.numbers((3, 2, 2, 2)), small.numbers((3, 2, 2, 2), 1)
    losses = []
    for module in (epsilon, velocity):
        noised = module.noise(latents, white, uniform, alphas, module.Config())  # type: ignore[attr-defined]
        wide = alphas[(uniform * 1000).long()].view(-1, 1, 1, 1)
        wrong = latents + 0.1
        said = (noised.x - wide.sqrt() * wrong) / (1 - wide).sqrt()
        said = said if module is epsilon else wide.sqrt() * said - (1 - wide).sqrt() * wrong
        losses.append((said - noised.target).square().mean((1, 2, 3)) * noised.weight)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=1e-4)


# ---------------------------------------------------------------- where in the schedule


def test_samples_lie_in_the_range_that_is_set() -> None:
    uniform = torch.linspace(0, 1 - 2**-24, 1001)
    assert torch.equal(placed(uniform, Noising()), uniform), "bit for bit, where nothing is set"
    for spread in ("uniform", "logit-normal"):
        share = placed(uniform, Noising(t_min=0.25, t_max=1.0, timesteps=spread))  # type: ignore[arg-type]
        assert share.min() >= 0.25
        assert share.max() < 1
        assert torch.equal(share, share.sort().values)
    with pytest.raises(UserError, match=r"t_min \(0.5\) must be below t_max"):
        api.settle({"name": "mira", "objective": {"t_min": 0.5, "t_max": 0.5}})


def test_logit_normal_places_are_logit_normal() -> None:
    uniform = (torch.arange(4000) + 0.5) / 4000
    logits = placed(uniform, Noising(timesteps="logit-normal", logit_mean=0.7, logit_std=0.5)).double().logit()
    assert float(logits.mean()) == pytest.approx(0.7, abs=1e-3)
    assert float(logits.std()) == pytest.approx(0.5, abs=1e-3)


# ---------------------------------------------------------------- noise


def test_noise_offset_is_constant_over_a_channel() -> None:
    latents = 3 * small.numbers(SHAPE)
    white, same = noise.drawn(latents, 1, 7, Noising())
    assert white is same
    fixed = noise.drawn(latents, 1, 7, Noising(noise_offset=0.1))[0] - white
    torch.testing.assert_close(fixed, fixed[:, :1, :1].expand(SHAPE))
    adaptive = noise.drawn(latents, 1, 7, Noising(noise_offset=0.1, noise_offset_adaptive=0.5))[0] - white
    wanted = fixed * (0.1 + 0.5 * latents.mean((1, 2), keepdim=True).abs()) / 0.1
    torch.testing.assert_close(adaptive, wanted, rtol=1e-3, atol=1e-5)

    def offset(number: int, **options: Any) -> Tensor:
        return noise.drawn(latents, 1, number, Noising(noise_offset=1.0, **options))[0] - noise.drawn(latents, 1, number, Noising())[0]

    strengths = torch.stack([(offset(n, noise_offset_random=True) / offset(n)).median() for n in range(100)])
    assert 0 <= strengths.min() < 0.1
    assert 0.9 < strengths.max() <= 1.001
    assert float(torch.stack([offset(n) for n in range(100)])[:, :, 0, 0].std()) == pytest.approx(1, rel=0.1)


def test_pyramid_noise_has_unit_spread_and_coarse_parts() -> None:
    def coarse(one: Tensor) -> float:
        return float(F.avg_pool2d(one, 8).std())

    latents, options = torch.zeros(4, 32, 32), Noising(pyramid_noise=0.8)
    plain, layered = noise.drawn(latents, 0, 3, Noising())[0], noise.drawn(latents, 0, 3, options)[0]
    assert float(layered.std()) == pytest.approx(1, abs=1e-5)
    assert coarse(layered) > 2 * coarse(plain)
    one = noise.drawn(latents, 0, 3, Noising(pyramid_noise=0.8, pyramid_levels=1))[0]
    added = noise.normal((4, 16, 16), 0, "pyramid", 3, 1)
    wanted = plain + 0.8 * F.interpolate(added[None], scale_factor=2.0, mode="bilinear")[0]
    torch.testing.assert_close(one, wanted / wanted.std())
    ended = [noise.drawn(latents, 0, 3, Noising(pyramid_noise=0.8, pyramid_levels=levels))[0] for levels in (5, 12)]
    assert torch.equal(*ended), "no level below a single latent"


def test_what_perturbs_the_input_is_not_asked_for() -> None:
    target, seen = noise.drawn(torch.zeros(4, 32, 32), 0, 3, Noising(input_perturbation=0.1))
    assert torch.equal(target, noise.drawn(torch.zeros(4, 32, 32), 0, 3, Noising())[0])
    assert float((seen - target).std()) == pytest.approx(0.1, rel=0.05)
    assert abs(float((seen * target - target.square()).mean())) < 0.01, "and says nothing about the noise"


def test_extras_are_functions_of_seed_and_sample() -> None:
    options = Noising(noise_offset=0.1, noise_offset_random=True, pyramid_noise=0.5, input_perturbation=0.1)
    drawn = [noise.drawn(torch.zeros(SHAPE), seed, number, options) for seed, number in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert all(torch.equal(a, b) for a, b in zip(*drawn[:2], strict=True))
    assert not any(torch.equal(drawn[0][i], other[i]) for other in drawn[2:] for i in (0, 1))


# ---------------------------------------------------------------- the loss


def test_the_huber_loss_is_its_formula() -> None:
    predicted, target, snr = small.numbers((3, 2, 2, 2)), small.numbers((3, 2, 2, 2), 1), torch.tensor([torch.inf, 1.0, 0.0])
    apart, share = predicted - target, torch.tensor([0.0, 0.5, 1.0])
    assert torch.equal(miss(predicted, target, snr, Noising(), share), apart.square())
    courses = {"constant": [0.2] * 3, "snr": [1.0, 0.2 + 0.8 / 4, 0.2], "exponential": [1.0, 0.2**0.5, 0.2]}
    for schedule, cs in courses.items():
        found = miss(predicted, target, snr, Noising(huber=0.2, huber_schedule=schedule), share)  # type: ignore[arg-type]
        for i, c in enumerate(cs):
            torch.testing.assert_close(found[i], 2 * c * ((apart[i].square() + c * c).sqrt() - c), rtol=1e-5, atol=1e-6)
    tight = miss(predicted, target, snr, Noising(huber=1e-3, huber_schedule="constant"), share)
    torch.testing.assert_close(tight / 2e-3, apart.abs() - 1e-3, rtol=0, atol=1e-3)


# ---------------------------------------------------------------- the base


def speaking(base: Path, folder: Path, prediction: str) -> Path:
    """The base, as if it had been trained to predict something else."""
    path = small.copy_base(base, folder) / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": prediction}))
    return folder


@pytest.mark.parametrize(("prediction", "objective"), [("v_prediction", "epsilon"), ("epsilon", "velocity"), ("epsilon", "flow")])
def test_an_objective_that_contradicts_the_base_is_refused(
    prediction: str, objective: str, squares: Path, base: Path, tmp_path: Path
) -> None:
    run = small.settled(squares, speaking(base, tmp_path / "base", prediction), objective__kind=objective)
    right = {"v_prediction": "velocity"}.get(prediction, prediction)
    with pytest.raises(UserError, match=f"E-OBJ-01.*set objective.kind={right}"):
        list(api.train(run, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_objective_that_nobody_names_is_the_bases(squares: Path, base: Path, tmp_path: Path) -> None:
    spoken = speaking(base, tmp_path / "base", "v_prediction")
    table = {"name": "mira", "data": {"folder": str(squares)}, "objective": {"min_snr_gamma": 3.0}}
    assert api.settle({**table, "base": str(spoken)}).objective.model_dump()["kind"] == "velocity"
    settled = api.settle({**table, "base": str(base)}).objective.model_dump()
    assert (settled["kind"], settled["min_snr_gamma"]) == ("epsilon", 3.0)


def test_a_base_that_predicts_velocity_is_trained_for_it(squares: Path, base: Path, tmp_path: Path) -> None:
    spoken = speaking(base, tmp_path / "base", "v_prediction")
    run = small.settled(squares, spoken, objective__kind="velocity", objective__zero_terminal_snr=True, train__steps=2)
    told = list(api.train(run, tmp_path / "run"))
    assert any("zero_terminal_snr" in event.text for event in told if event.kind == "warning"), "previews do not follow"
    with safe_open(tmp_path / "run" / "mira.safetensors", "pt") as pack:
        assert pack.metadata()["modelspec.prediction_type"] == "v"


CHANGES: dict[str, Any] = {
    "min_snr_gamma": 1.0, "debiased": True, "t_min": 0.3, "t_max": 0.7, "timesteps": "logit-normal", "logit_mean": 1.0, "logit_std": 0.3,
    "noise_offset": 0.1, "noise_offset_random": True, "noise_offset_adaptive": 1.0, "pyramid_noise": 0.3, "pyramid_levels": 1,
    "input_perturbation": 0.1, "huber": 0.2, "huber_schedule": "constant", "zero_terminal_snr": True,
}  # fmt: skip
NEEDED = {"logit": {"timesteps": "logit-normal"}, "noise_offset_random": {"noise_offset": 0.1}, "pyramid_levels": {"pyramid_noise": 0.3},
          "huber_schedule": {"huber": 0.1}, "zero": {"min_snr_gamma": 0.0}}  # fmt: skip
"""Settings without which others do nothing."""


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_of_an_objective_changes_the_loss(name: str, squares: Path, loaded: Family, tmp_path: Path) -> None:
    latents = [[(small.numbers((4, 8, 8), i), torch.full((4, 8, 8), 0.1))] for i in range(5)]

    usual = small.settled(squares, loaded.base.source.path, data__caption_dropout=1.0)
    dataset = ledger.fit_dataset(ledger.read_dataset(usual, tmp_path), usual, loaded)
    module = lookup.find("objectives", name)

    def losses(settings: dict[str, Any]) -> list[float]:
        run = usual.model_copy(update={"objective": module.Config(**settings)})
        data = learners.prepared(learners.Job(run, loaded.base, tmp_path, 0.0, dataset, ["text_encoder.x"]), loaded, latents)
        (batch,) = micro_batch([data], range(3))
        return train.sample_losses(loaded, Bank(loaded.components), batch, [train.Goal(module.noise, learners.noising(run))]).tolist()  # type: ignore[no-any-return]

    assert losses({}) == losses({}), "the control"
    for setting in module.Config.model_fields.keys() - {"kind"}:
        needed = next((others for start, others in NEEDED.items() if setting.startswith(start)), {})
        assert losses({**needed, setting: CHANGES[setting]}) != losses(needed), setting


def test_a_config_says_no_more_than_its_objective_does() -> None:
    fields = {name: set(lookup.find("objectives", name).Config.model_fields) for name in NAMES}
    assert fields["velocity"] - fields["epsilon"] == {"zero_terminal_snr"}
    assert "min_snr_gamma" not in fields["flow"]
