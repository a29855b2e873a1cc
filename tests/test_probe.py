"""What a network predicts is measured where its files do not say, and never against clear figures."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bases
import pytest
import small
import torch
from torch import Tensor, nn

from sdlora import api, family, learners, probe
from sdlora.data import ledger
from sdlora.data.store import Store
from sdlora.errors import UserError
from sdlora.family import Family
from sdlora.objectives.velocity import rescaled

CPU = torch.device("cpu")
TAVI = Path(__file__).parent.parent / "datasets" / "tavi"


class AsVelocity(nn.Module):
    """A network that predicts velocity, exactly, made of one that predicts noise; by the same schedule, or by one that ends at noise alone.

    At a timestep of that schedule the other network is asked at the one where ᾱ is the same. What lies beyond its noisiest one it was never
    shown: there its picture fades to the mean of all, 0, which is the best word on noise alone.
    """

    def __init__(self, unet: nn.Module, plain: Tensor, zero_snr: bool) -> None:
        super().__init__()
        self.unet, self.plain, self.schedule, self.dtype = unet, plain, rescaled(plain) if zero_snr else plain, torch.float32

    def forward(self, x: Tensor, t: Tensor, states: Tensor) -> Any:
        alpha = self.schedule[t]
        then = torch.bucketize(-alpha, -self.plain).clamp(max=len(self.plain) - 1)
        alpha, known = alpha.view(-1, 1, 1, 1), self.plain[then].view(-1, 1, 1, 1)
        said = self.unet(x, then, states)
        picture = (alpha / known).clamp(max=1) * (x - (1 - known).sqrt() * said.sample) / known.sqrt()
        said.sample = (alpha.sqrt() * x - picture) / (1 - alpha).sqrt()
        return said


NETWORKS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "epsilon": lambda unet, _: unet,
    "velocity": lambda unet, plain: AsVelocity(unet, plain, zero_snr=False),
    "velocity to noise alone": lambda unet, plain: AsVelocity(unet, plain, zero_snr=True),
    "untrained": lambda unet, _: random(unet),
}


def random(unet: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return type(unet).from_config(unet.config).eval()


@pytest.fixture(scope="module")
def tiny() -> Family:
    return family.load(family.find("tiny"), CPU, torch.float32)


@pytest.fixture
def speaking(tiny: Family, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Family]:
    """The embedded base, which truly predicts noise, with a network made of its own, and files that say this or nothing."""
    usual, own = family.find("tiny"), tiny.unet  # type: ignore[attr-defined]

    def made(network: str, said: bool, prediction: str = "epsilon") -> Family:
        tiny.take_for(dataclasses.replace(usual, said=said, prediction=prediction))
        monkeypatch.setattr(tiny, "unet", NETWORKS[network](own, tiny.alphas_cumprod.clone()))
        return tiny

    return made


def settled(**changes: Any) -> Any:
    return small.settled(TAVI, Path("tiny"), data__resolution_px=64, **changes)


def checked(loaded: Family, **changes: Any) -> tuple[Any, list[str]]:
    run, store = settled(**changes), Store()
    return learners.check_objective(run, loaded, ledger.fit_dataset(ledger.read_dataset(run, TAVI, store), run, loaded), store)


@pytest.mark.parametrize(
    ("network", "prediction", "zero_snr"),
    [("epsilon", "epsilon", False), ("velocity", "velocity", False), ("velocity to noise alone", "velocity", True)],
)
@pytest.mark.parametrize("assumed", ["epsilon", "velocity"])
@pytest.mark.slow
def test_what_nobody_says_is_measured(speaking: Callable[..., Family], network: str, prediction: str, zero_snr: bool, assumed: str) -> None:
    loaded = speaking(network, said=False, prediction=assumed)
    run, told = checked(loaded, objective__kind=assumed, probe="choose", objective__min_snr_gamma=3.0)
    objective = run.objective.model_dump()
    assert (objective["kind"], objective["min_snr_gamma"]) == (prediction, 3.0)
    assert (loaded.prediction, loaded.base.prediction, loaded.base.zero_snr) == (prediction, prediction, zero_snr)
    assert (float(loaded.alphas_cumprod[-1]) < 1e-6) == zero_snr, "pictures are drawn by the same schedule"
    assert loaded.new_scheduler().config.prediction_type == {"velocity": "v_prediction"}.get(prediction, prediction)
    assert f"measured to predict {prediction}" in told[0]
    assert ("noise alone" in told[0]) == zero_snr
    base = loaded.base
    checked(loaded, objective__kind=assumed, probe="choose")
    assert loaded.base == base, "another run over the same loaded base finds the same"


def test_an_untrained_network_cannot_be_told(speaking: Callable[..., Family]) -> None:
    for kind in ("epsilon", "velocity"):
        loaded = speaking("untrained", said=False)
        run, told = checked(loaded, objective__kind=kind, probe="choose")
        assert (run.objective.model_dump()["kind"], loaded.prediction) == (kind, kind), "what is set, or usual, stands"
        assert "a probe cannot tell (epsilon error" in told[0]


@pytest.mark.parametrize(("said", "assumed"), [(True, "epsilon"), (False, "epsilon")])
def test_a_setting_against_the_network_is_refused_with_the_figures(speaking: Callable[..., Family], said: bool, assumed: str) -> None:
    loaded = speaking("epsilon", said=said, prediction=assumed)
    with pytest.raises(UserError, match=r"E-OBJ-01.*epsilon error 0\.\d\d, velocity error 1\.\d\d.*set objective.kind=epsilon"):
        checked(loaded, objective__kind="velocity")


def test_a_setting_that_the_network_bears_out_stands_against_the_files(speaking: Callable[..., Family]) -> None:
    loaded = speaking("velocity", said=True, prediction="epsilon")
    run, told = checked(loaded, objective__kind="velocity")
    assert (run.objective.model_dump()["kind"], loaded.prediction) == ("velocity", "velocity")
    assert "files say epsilon, but it was measured to predict velocity" in told[0]
    loaded = speaking("untrained", said=True, prediction="epsilon")
    with pytest.raises(UserError, match="E-OBJ-01"):
        checked(loaded, objective__kind="velocity")


def test_nothing_is_measured_where_it_need_not_be(speaking: Callable[..., Family], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    measure = probe.measure
    monkeypatch.setattr(probe, "measure", lambda *a: asked.append(a) or measure(*a))
    assert checked(speaking("epsilon", said=True))[1] == []
    assert "unasked" in checked(speaking("epsilon", said=False), objective__kind="velocity", probe="off")[1][0]
    with pytest.raises(UserError, match="E-OBJ-01"):
        checked(speaking("velocity", said=True), objective__kind="velocity", probe="off")
    assert asked == []
    checked(speaking("epsilon", said=False))
    assert len(asked) == 1, "the control"


@pytest.mark.slow
def test_a_run_on_an_unmarked_file_says_what_it_took_it_for(families: dict[str, Path], squares: Path, tmp_path: Path) -> None:
    path = bases.single_file(families["sd1"], tmp_path / "one" / "model.safetensors", **{"modelspec.resolution": "64x64"})
    assert not family.find(str(path)).said
    assert api.inspect_base(str(path))["prediction_is_read"] is False
    run = small.settled(squares, path, train__steps=1, data__resolution_px=64)
    assert run.probe == "choose"
    told = list(api.train(run, tmp_path / "run"))
    assert any("a probe cannot tell" in event.text for event in told if event.kind == "warning")
    named = small.settled(squares, path, train__steps=1, data__resolution_px=64, objective__kind="velocity")
    assert named.probe == "refuse"
    list(api.train(named, tmp_path / "named"))
    pack = api.open_pack(tmp_path / "named" / "mira.safetensors")
    assert pack.metadata["sdlora.prediction"] == "velocity"
    studio = api.open_studio([pack], str(path))
    assert studio.family.prediction == "velocity", "pictures are drawn as it was trained"
    studio.remove("mira")
    assert studio.family.prediction == "epsilon"


def test_a_file_with_a_mark_is_not_measured(families: dict[str, Path], tmp_path: Path) -> None:
    for number, (marks, said) in enumerate([(("v_pred",), {}), ((), {"modelspec.prediction_type": "epsilon"})]):
        path = bases.single_file(families["sd1"], tmp_path / str(number) / "model.safetensors", marks, **said)
        assert family.find(str(path)).said
    folder = small.copy_base(families["sd1"], tmp_path / "folder")
    assert family.find(str(folder)).said
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "prediction_type"}))
    assert not family.find(str(folder)).said
