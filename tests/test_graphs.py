"""Laws of recorded steps: repeated as a whole they are the steps without, whatever changes between them; what cannot be is refused.

On a CPU there is nothing to record into, so a pass is computed again from its fixed places; a GPU's recordings are tested on one.
"""

from pathlib import Path
from typing import Any

import pytest
import small
import torch
from safetensors.torch import load_file
from test_train import cast
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdlora import api, graphs, lookup
from sdlora.config import Run
from sdlora.errors import UserError
from sdlora.graphs import Graphs, Recorded
from sdlora.train import Setup, steps


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Run:
    """Pictures of several shapes, prior samples, dropout, and text encoders that end earlier."""
    rest: dict[str, Any] = {"train__steps": 12, "data__prior_share": 0.4, "data__prior_prompts": ["a dog"], "adapter__dropout": 0.2}
    rest |= {"train__text_encoder_steps": 7, "train__accumulation": 2, "train__batch_size": 2, "train__ema": 0.5}
    targets = ["cross-attention", "unet.conv_*", "text-encoder"]
    return small.settled(small.draw_folder(tmp_path / "pictures", 5), base, adapter__targets=targets, train__lr=3e-3, **rest)


def trained(run: Run, folder: Path, repeated: bool) -> tuple[dict[str, Tensor], list[float], Graphs | None]:
    """Weights and losses of a run, and the recordings that it made."""
    made = cast([run], folder, torch.float32)
    own = made.learners[0]
    setup = Setup(made.loaded, made.bank, made.learners, graphs=Graphs([*own.params.values()]) if repeated else None)
    losses = [float(one.loss[0]) for one in steps(setup)]
    return {name: one.detach().clone() for name, one in own.params.items()} | own.ema, losses, setup.graphs


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_repeated_steps_are_the_steps_without(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, losses, _ = trained(run, tmp_path, False)
    count, repeat = [], Recorded.repeat
    monkeypatch.setattr(Recorded, "repeat", lambda self, inputs: count.append(1) or repeat(self, inputs))
    weights, told, found = trained(run, tmp_path, True)
    assert found is not None
    assert same(plain, weights)
    assert losses == told
    assert 3 < len(found.known) <= graphs.MOST
    assert len({key[0] for key in found.known}) > 1, "passes with and without prior samples"
    assert len(count) > len(found.known), "some are repeated"
    monkeypatch.setattr(graphs, "MOST", 1)
    weights, told, found = trained(run, tmp_path, True)
    assert found is not None
    assert len(found.known) == 1
    assert same(plain, weights), "passes of further shapes go without"
    assert losses == told

    def stale(self: Recorded, _: object) -> None:
        self._compute()

    monkeypatch.setattr(graphs, "MOST", 16)
    monkeypatch.setattr(Recorded, "repeat", stale)
    assert not same(plain, trained(run, tmp_path, True)[0]), "the control: inputs that are not renewed are noticed"


class Waits(TorchDispatchMode):
    """Takes down what would wait for a GPU, or bring numbers of the host to it: neither can be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(one is not None and one.dtype == torch.bool for one in args[1])
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "_unique2", "repeat_interleave"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "kind", ["lora", *(pytest.param(one, marks=pytest.mark.slow) for one in lookup.names("adapters") if one != "lora")]
)
def test_a_pass_waits_for_nothing(kind: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits, compute = Waits(), Recorded._compute

    def watched(self: Recorded) -> None:
        with waits:
            compute(self)

    monkeypatch.setattr(Recorded, "_compute", watched)
    own = {**run.model_dump(), "adapter": {"kind": kind}}
    own["train"] = {**own["train"], "steps": 3, "text_encoder_steps": 0, "words_lr": 1e-3 * (kind == "prompt")}
    assert trained(api.settle(own), tmp_path, True)[1]
    assert waits.found == []
    with waits:  # the control
        torch.tensor([1.0])[torch.tensor([True])].sum().item()
    assert set(waits.found) == {"lift_fresh", "index", "_local_scalar_dense"}


def test_a_run_whose_steps_are_repeated_is_the_run_without(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small.draw_folder(tmp_path / "pictures")
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "check", lambda *_: None)  # where there is no GPU nothing is recorded, but all else is as there
        list(api.train(small.settled(folder, base, train__cuda_graphs=True, preview__every=2), tmp_path / "repeated"))
    list(api.train(small.settled(folder, base), tmp_path / "plain"))
    one, other = (load_file(tmp_path / name / "mira.safetensors") for name in ("repeated", "plain"))
    assert same(one, other)


def test_where_memory_is_short_recordings_are_given_up(run: Run, tmp_path: Path) -> None:
    made = cast([run], tmp_path, torch.float32)
    setup = Setup(made.loaded, made.bank, made.learners, graphs=Graphs([*made.learners[0].params.values()]), spare=False)
    next(steps(setup))
    assert setup.graphs is not None
    assert setup.graphs.known
    assert setup.thriftier(4)
    assert not setup.graphs.known
    setup.spare = True
    assert setup.thriftier(4)
    assert setup.graphs is None, "what is computed again in the backward pass is not recorded"


def test_what_cannot_be_recorded_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small.draw_folder(tmp_path / "pictures", square=True)
    with pytest.raises(UserError, match=r"E-CONF-15 .* on cpu"):
        list(api.train(small.settled(folder, base, train__cuda_graphs=True), tmp_path / "run"))
    assert not (tmp_path / "run" / "config.toml").exists()
    cuda = torch.device("cuda")
    for said, members in (({"compile": True}, 1), ({"gradient_checkpointing": "on"}, 1), ({}, 2)):
        settings = small.settled(folder, base, **{f"train__{name}": value for name, value in said.items()}).train
        with pytest.raises(UserError, match="E-CONF-15"):
            graphs.check(settings, cuda, members)
    graphs.check(small.settled(folder, base).train, cuda, 1)

    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    one = Graphs([torch.nn.Parameter(torch.zeros(2))])
    monkeypatch.setattr(Recorded, "__init__", refuse)
    with pytest.raises(UserError, match=r"E-CONF-16 .* capturing · "):
        one.take("kind", {"x": torch.zeros(1)}, lambda _: (torch.zeros(1), torch.zeros(())))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU to record on")
def test_a_gpu_repeats_what_it_recorded(base: Path, tmp_path: Path) -> None:
    folder = small.draw_folder(tmp_path / "pictures")
    for name in ("repeated", "plain"):
        list(api.train(small.settled(folder, base, train__cuda_graphs=name == "repeated", train__steps=12), tmp_path / name))
    one, other = (load_file(tmp_path / name / "mira.safetensors") for name in ("repeated", "plain"))
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-3, atol=1e-5)
