"""Laws of the fused step: the same function as layer by layer, and fewer kernels and bytes; PEFT's loop is what it is counted against."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import small
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdlora.adapter import Bank
from sdlora.adapters import lora
from sdlora.fused import Adapted, Gate, Gated, One, spare
from sdlora.routing import Route

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import arms
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


def attentive(kind: str, dtype: torch.dtype = torch.float32, ranks: tuple[int, int, int] = (3, 2, 3)) -> Bank:
    """An attention whose query, key and value have adapters of these ranks; "cross" reads a text, "wide" is a convolution of 1 x 1."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        whole: nn.Module = nn.Conv2d(6, 4, 1) if kind == "wide" else Attention(6, 6 if kind == "cross" else None, heads=2, dim_head=4)
    bank = Bank({"unet": nn.ModuleDict({"it": whole}).requires_grad_(False).to(dtype)})
    names = ["unet.it"] if kind == "wide" else [f"unet.it.to_{one}" for one in "qkv"]
    bank.add("a", {name: (lora, lora.Config(rank=r, alpha=1.5)) for name, r in zip(names, ranks, strict=False)}, small.stream_of)
    small.randomise(bank, "a")
    for _, _, delta in bank.deltas("a"):
        delta.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return bank


KINDS = {"self": (2, 5, 6), "cross": (2, 5, 6), "wide": (2, 6, 3, 2)}


def asked(bank: Bank, kind: str, x: Tensor) -> Tensor:
    text = [small.numbers((2, 3, 6), 9, x.dtype)] if kind == "cross" else []
    y: Tensor = bank.components["unet"].get_submodule("it")(x, *text)
    return y


@pytest.mark.parametrize("kind", KINDS)
def test_what_reads_the_same_is_computed_together_and_right(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    apply = Adapted.apply
    monkeypatch.setattr(Adapted, "apply", lambda *args: (calls.append(len(args[1])), apply(*args))[1])
    bank, x = attentive(kind, torch.float64), small.numbers(KINDS[kind], 5, torch.float64).requires_grad_()

    def under_a_new_route(x: Tensor, *_: Tensor) -> Tensor:
        bank.route = Route(torch.tensor([0.7], dtype=torch.float64))
        return asked(bank, kind, x)

    under_a_new_route(x)
    assert calls == {"self": [3], "cross": [1, 2], "wide": []}[kind]
    assert torch.autograd.gradcheck(under_a_new_route, (x, *bank.parameters("a").values()))


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_together_is_what_layer_by_layer_is(kind: str, dtype: torch.dtype, recomputed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, x = attentive(kind, dtype), small.numbers(KINDS[kind], 5, dtype)

    def all_of_it() -> list[Tensor]:
        bank.route, given = Route(torch.tensor([0.7])), x.clone().requires_grad_()
        y = checkpoint(asked, bank, kind, given, use_reentrant=False) if recomputed else asked(bank, kind, given)
        return [y, *torch.autograd.grad(y.float().square().sum(), [given, *bank.parameters("a").values()])]

    together = all_of_it()
    monkeypatch.setattr(lora.Adapter, "at_once", lambda *_: None)
    for got, wanted in zip(together, all_of_it(), strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(
            got, wanted, **({"rtol": 0.05, "atol": 0.05 * float(wanted.detach().abs().max())} if dtype == torch.bfloat16 else {})
        )


def test_another_input_is_computed_anew() -> None:
    bank, x = attentive("self"), small.numbers((2, 5, 6), 5)
    bank.route = Route(torch.ones(1))
    inside = bank.components["unet"].get_submodule("it")
    with torch.no_grad():
        inside.to_q(x)  # computes key and value of x along
        key = inside.to_k(2 * x)
        inside.to_q(x)
        x.mul_(2)
        assert torch.equal(inside.to_k(x), key), "not what was kept of x before it was written to"


def test_a_gate_is_diffusers_own_bit_for_bit_and_keeps_less() -> None:
    x = small.numbers((2, 5, 6), 5).requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        plain = GEGLU(6, 8).requires_grad_(False)
    ours = copy.deepcopy(plain)
    spare(ours)
    assert type(ours) is Gate

    def both(gate: nn.Module) -> tuple[Tensor, Tensor]:
        y = gate(x)
        return y, torch.autograd.grad(y.square().sum(), x)[0]

    for one, other in zip(both(plain), both(ours), strict=True):
        assert torch.equal(one, other)
    assert counted(lambda: plain(x)).saved - counted(lambda: ours(x)).saved == 2 * 5 * 8 * 4
    assert torch.autograd.gradcheck(Gated.apply, small.numbers((3, 4), 1, torch.float64).requires_grad_())


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

    alike = Route(torch.tensor([0.7]), [0] * 4 if way == "routed" else None)
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
        spare(network)
        assert torch.equal(network(*said).sample, before)
        assert divisions - counted(lambda: network(*said)).by_name["div"] == 54, "32 attentions and 22 residual blocks"


def narrow(dtype: torch.dtype) -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet2DConditionModel(**small.NARROW_SD15)
    return network.to(dtype).requires_grad_(False).eval()


def test_a_step_takes_few_kernels_and_bytes_beside_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    ours = arms.ours(arms.network(arms.NARROW, device, torch.bfloat16))
    peer = arms.pefts(arms.network(arms.NARROW, device, torch.bfloat16), {name: down.detach() for name, down in ours.downs.items()})
    assert len(ours.ups) == 192
    (sample,) = arms.samples(1, 1, 512, arms.NARROW, device)
    peers, own = counted(lambda: peer.gradients(sample)), counted(lambda: ours.gradients(sample))
    assert own.kernels <= 0.55 * peers.kernels
    assert own.moved <= 0.61 * peers.moved, "factors weigh more in so narrow a network than in the true one"
    assert own.saved < peers.saved
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in ours.trained)
    monkeypatch.setattr(lora.Adapter, "at_once", lambda *_: None)
    plain = counted(lambda: ours.gradients(sample))
    assert plain.kernels > 0.8 * peers.kernels, "the control: layer by layer it is nearly as many"
    assert plain.moved > 0.65 * peers.moved, "the control"


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "full", "most"), [(8, False, 0.6), (1, True, 0.6)])
def test_the_true_networks_step_takes_few_kernels_and_bytes(batch: int, full: bool, most: float) -> None:
    ours, peers = arms.counts(arms.SD15, batch, 512, full)
    assert ours.kernels <= 0.55 * peers.kernels
    assert ours.moved <= most * peers.moved
