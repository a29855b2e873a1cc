"""Laws of the fused step: the same function as layer by layer, and fewer kernels and bytes; PEFT's loop is what it is counted against."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import small
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdlora.adapter import Bank, Route
from sdlora.adapters import lora
from sdlora.fused import Adapted, One, spare_divisions

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import speed
from counting import counted


def banked(dtype: torch.dtype = torch.float32, layers: int = 1, **settings: object) -> Bank:
    """As many linear layers in a row as `unet.0`, `unet.1` ..., under an adapter that does something."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        rows = nn.Sequential(*(nn.Linear(6, 6, bias=i % 2 == 0) for i in range(layers))).requires_grad_(False).to(dtype)
    bank = Bank({"unet": rows})
    config = lora.Config(rank=3, alpha=1.5, **settings)
    bank.add("a", dict.fromkeys([f"unet.{i}" for i in range(layers)], (lora, config)), small.stream_of)
    small.randomise(bank, "a")
    if dtype == torch.float64:
        for _, _, delta in bank.deltas("a"):
            delta.double()
    return bank


def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every layer that goes the fused way."""
    calls: list[int] = []
    apply = Adapted.apply
    monkeypatch.setattr(Adapted, "apply", lambda *args: (calls.append(1), apply(*args))[1])
    return calls


def gradients(bank: Bank, route: Route, x: Tensor, way: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    """The output, and the gradients of the input and all factors."""
    bank.route, x = route, x.clone().requires_grad_()
    y = way(bank.components["unet"], x)
    parameters = [one for one in bank.parameters("a").values() if one.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *parameters])]


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6)], ids=str)
def test_its_gradients_are_the_numeric_ones(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    bank, calls = banked(torch.float64), fused(monkeypatch)

    def under_a_new_route(x: Tensor, *_: Tensor) -> Tensor:
        bank.route = Route(torch.tensor([0.7], dtype=torch.float64))
        y: Tensor = bank.components["unet"](x)
        return y

    x = small.numbers(shape, 5, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(under_a_new_route, (x, *bank.parameters("a").values()))
    assert calls


@pytest.mark.parametrize("way", ["alone", "routed", "recomputed", "recomputed reentrantly"])
def test_it_is_what_layer_by_layer_is(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, calls = banked(layers=3), fused(monkeypatch)
    x = small.numbers((4, 3, 6), 5)

    def through(network: nn.Module, x: Tensor) -> Tensor:
        if not way.startswith("recomputed"):
            return network(x)
        for layer in network.children():
            x = checkpoint(layer, x, use_reentrant="reentrantly" in way)
        return x

    alike = Route(torch.tensor([0.7]), torch.zeros(4, dtype=torch.long) if way == "routed" else None)
    expected = gradients(bank, Route(torch.full((4, 1), 0.7)), x, lambda network, x: network(x))
    assert not calls, "strengths of their own go the general way"
    bank.route, given = alike, x.clone().requires_grad_()
    y = through(bank.components["unet"], given)
    y.square().sum().backward()
    assert len(calls) == (6 if way.startswith("recomputed") else 3)
    for got, wanted in zip([y, given.grad, *(p.grad for p in bank.parameters("a").values())], expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_strength_zero_is_the_base_in_the_dtype_of_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, calls, x = banked(torch.bfloat16), fused(monkeypatch), small.numbers((4, 3, 6), 5, torch.bfloat16)
    bank.route = None
    base = bank.components["unet"](x)
    bank.route = Route(torch.zeros(1))
    assert torch.equal(bank.components["unet"](x), base)
    bank.route = Route(torch.ones(1))
    assert not torch.equal(bank.components["unet"](x), base), "the control"
    assert len(calls) == 2


def test_gradients_of_a_half_base_come_back_in_full_precision() -> None:
    bank, x = banked(torch.bfloat16, layers=2), small.numbers((64, 6), 5, torch.bfloat16)
    half = gradients(bank, Route(torch.ones(1)), x, lambda network, x: network(x))
    full = banked(layers=2)
    exact = gradients(full, Route(torch.ones(1)), x.float(), lambda network, x: network(x))
    for a, b in zip(half[2:], exact[2:], strict=True):
        assert a.dtype == torch.float32
        assert F.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.999


def test_factors_that_were_written_to_are_cast_again() -> None:
    bank, x = banked(torch.bfloat16), small.numbers((4, 6), 5, torch.bfloat16)
    bank.route = Route(torch.ones(1))
    before = bank.components["unet"](x)
    assert torch.equal(bank.components["unet"](x), before)
    with torch.no_grad():
        bank.parameters("a")["unet.0.up"].mul_(2)
    assert not torch.equal(bank.components["unet"](x), before)


def test_factors_are_cast_once_for_all_layers_and_passes_of_a_route() -> None:
    bank, x = banked(torch.bfloat16, layers=5), small.numbers((4, 6), 5, torch.bfloat16)
    bank.route = Route(torch.ones(1))
    found = counted(lambda: [bank.components["unet"](x) for _ in range(3)])
    assert found.by_name["_foreach_copy_"] == 1
    assert not found.by_name["_to_copy"]


def test_layers_that_a_pass_leaves_out_have_no_gradient() -> None:
    bank = banked(torch.bfloat16, layers=2)
    bank.route = Route(torch.ones(1))
    bank.components["unet"].get_submodule("1")(small.numbers((4, 6), 5, torch.bfloat16)).sum().backward()
    assert {name for name, p in bank.parameters("a").items() if p.grad is not None} == {"unet.1.down", "unet.1.up"}


def test_lora_fa_keeps_no_inputs() -> None:
    x = small.numbers((4096, 6), 5, torch.bfloat16)

    def kept(lora_fa: bool) -> int:
        bank = banked(torch.bfloat16, lora_fa=lora_fa)
        bank.route = Route(torch.ones(1))
        return counted(lambda: bank.components["unet"](x)).saved

    assert kept(False) - kept(True) == x.numel() * x.element_size()


class Own(nn.Linear):
    """A layer that computes in a way of its own."""


@pytest.mark.parametrize("what", ["subclass", "hook", "dropout", "pissa", "two"])
def test_what_it_cannot_do_goes_the_general_way(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fused(monkeypatch)
    bank = banked(**{"dropout": {"dropout": 0.5}, "pissa": {"init": "pissa"}}.get(what, {}))
    ((_, layer, _),) = bank.deltas("a")
    if what == "subclass":
        layer.__class__ = Own
    if what == "hook":
        layer.register_forward_hook(lambda *_: None)
    if what == "two":
        bank.add("b", {"unet.0": (lora, lora.Config(rank=2, alpha=1.0))}, small.stream_of)
    bank.route = Route(torch.ones(len(bank.adapters)), keys=torch.arange(4))
    assert bank.components["unet"](small.numbers((4, 6), 5)).isfinite().all()
    assert not calls


def test_dividing_by_one_costs_nothing_and_is_one_everywhere_else() -> None:
    x, whole = small.numbers((3,)), torch.tensor([1, 2])
    assert x / One() is x
    assert torch.equal(whole / One(), whole / 1.0)
    assert (whole / One()).dtype == torch.float32
    assert torch.equal(x * One() + One(), x + 1)
    assert 3 / One() == 3.0


def test_divisions_are_spared_without_a_bit_of_difference() -> None:
    network, x = narrow(torch.float32), small.numbers((1, 4, 16, 16))
    said = (x, torch.tensor([500]), small.numbers((1, 7, 16)))
    with torch.no_grad():
        before = network(*said).sample
        divisions = counted(lambda: network(*said)).by_name["div"]
        spare_divisions(network)
        assert torch.equal(network(*said).sample, before)
        assert divisions - counted(lambda: network(*said)).by_name["div"] == 54, "32 attentions and 22 residual blocks"


def narrow(dtype: torch.dtype) -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet2DConditionModel(**small.NARROW_SD15)
    return network.to(dtype).requires_grad_(False).eval()


def test_a_step_takes_few_kernels_and_bytes_beside_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    first = speed.ours(speed.NARROW, device)
    assert len(first.ups) == 160
    peer = speed.pefts(speed.NARROW, device, torch.bfloat16, {name: down.detach() for name, down in first.downs.items()})
    (sample,) = speed.samples(1, 1, 512, speed.NARROW["cross_attention_dim"], device)
    peers, ours = counted(lambda: peer.gradients(sample)), counted(lambda: first.gradients(sample))
    assert ours.kernels <= 0.55 * peers.kernels
    assert ours.moved <= 0.65 * peers.moved
    assert ours.saved < peers.saved
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in first.trained)
    monkeypatch.setattr(lora.Adapter, "at_once", lambda *_: None)
    assert counted(lambda: first.gradients(sample)).kernels > 0.9 * peers.kernels, "the control: layer by layer it is as many"
