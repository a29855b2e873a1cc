"""Laws of every adapter kind: how it starts, leaves, scales, merges, and how adapters share a batch; LoRA is held against PEFT."""

import copy
from collections.abc import Sequence
from typing import Any

import peft
import pytest
import small
import torch
from torch import Tensor, nn

from sdlora import lookup
from sdlora.adapter import Bank, Delta, Route, choose_sites
from sdlora.adapters import lora
from sdlora.errors import UserError
from sdlora.family import Family

KINDS = lookup.names("adapters")
LAYERS = ["linear", "linear-plain", "conv1", "conv3", "conv3-wide"]


def new_layer(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A frozen layer and an input of four samples for it."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layer: nn.Module = {
            "linear": nn.Linear(6, 5),
            "linear-plain": nn.Linear(6, 5, bias=False),
            "conv1": nn.Conv2d(4, 5, 1),
            "conv3": nn.Conv2d(4, 6, 3, stride=2, padding=1),
            "conv3-wide": nn.Conv2d(4, 6, 3, padding=2, dilation=2),
        }[name]
    shape = (4, 3, 6) if name.startswith("linear") else (4, 4, 7, 7)
    return layer.requires_grad_(False).to(dtype), small.numbers(shape, 5, dtype)


def banked(layer: nn.Module, kinds: Sequence[str], ranks: Sequence[int] = (3, 3, 3), dtype: torch.dtype = torch.float32) -> Bank:
    """The layer as `unet.layer` under adapters a, b, c ... of the given kinds, with random weights."""
    bank = Bank({"unet": nn.ModuleDict({"layer": layer})})
    for i, name in enumerate(kinds):
        kind = lookup.find("adapters", name)
        bank.add("abc"[i], kind, small.some_config(kind, ranks[i], 1.5 + i), ["unet.layer"], small.stream_of)
        small.randomise(bank, "abc"[i], seed=i + 1)
        for _, _, delta in bank.deltas("abc"[i]):
            delta.to(dtype)
    return bank


def run(bank: Bank, x: Tensor) -> Tensor:
    y: Tensor = bank.components["unet"].get_submodule("layer")(x)
    return y


def delta_of(bank: Bank, name: str = "a") -> Delta:
    ((_, _, delta),) = bank.deltas(name)
    return delta


def kind_and_layer(kind: str, name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, nn.Module, Tensor]:
    module = lookup.find("adapters", kind)
    layer, x = new_layer(name, dtype)
    if not module.fits(layer):
        pytest.skip(f"{kind} does not sit on such a layer")
    return module, layer, x


# ---------------------------------------------------------------- one adapter on one layer


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_it_declares(kind: str, name: str) -> None:
    module, layer, x = kind_and_layer(kind, name)
    y = layer(x)
    bank = Bank({"unet": nn.ModuleDict({"layer": layer})})
    bank.add("a", module, small.some_config(module), ["unet.layer"], small.stream_of)
    bank.use({"a": 1.0})
    if module.Adapter.start == "exact":
        assert torch.equal(run(bank, x), y)
    else:
        torch.testing.assert_close(run(bank, x), y, rtol=1e-5, atol=1e-5)
    fast = bank.fast("a")
    assert fast <= bank.parameters("a").keys()
    assert not any(parameter.any() for dotted, parameter in bank.parameters("a").items() if dotted in fast), "they start at zero"
    small.randomise(bank, "a")
    assert not torch.allclose(run(bank, x), y, atol=1e-3), "the control: weights that are not the start do something"


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_from_its_stream_alone(kind: str) -> None:
    module, layer, _ = kind_and_layer(kind, "linear")
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        delta = module.Adapter(layer, small.some_config(module), small.stream_of("x"))
        starts.append([p.detach() for p in delta.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_strength_zero_is_the_base_and_output_is_linear_in_strength(kind: str, name: str) -> None:
    module, layer, x = kind_and_layer(kind, name)
    y = layer(x)
    bank = banked(layer, [kind])
    bank.use({"a": 0.0})
    assert torch.equal(run(bank, x), y)
    bank.route = Route(torch.zeros(1))
    assert torch.equal(run(bank, x), y), "also when it is computed"
    bank.use({"a": torch.tensor([0.0, 1.0, 0.0, 2.0])})
    assert torch.equal(run(bank, x)[[0, 2]], y[[0, 2]]), "also beside samples at other strengths"
    if not module.Adapter.merges:
        return
    bank.use({"a": 1.0})
    whole = run(bank, x) - y
    for strength in (-1.0, 0.3, 2.5):
        bank.use({"a": strength})
        torch.testing.assert_close(run(bank, x) - y, strength * whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_the_adapter(kind: str, name: str) -> None:
    module, layer, x = kind_and_layer(kind, name)
    if not module.Adapter.merges:
        pytest.skip("declares that it does not merge")
    y, before = layer(x), layer.get_parameter("weight").clone()
    bank = banked(layer, [kind])
    bank.use({"a": 0.7})
    adapted = run(bank, x)
    bank.merge("a", 0.7)
    assert run(bank, x) is not None
    assert isinstance(bank.components["unet"].get_submodule("layer"), type(layer))
    torch.testing.assert_close(run(bank, x), adapted, rtol=1e-5, atol=1e-5)
    assert not torch.equal(before, layer.get_parameter("weight"))
    assert not torch.allclose(adapted, y, atol=1e-3)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_numeric_ones(kind: str, name: str) -> None:
    _, layer, x = kind_and_layer(kind, name, torch.float64)
    x = x[:2] if x.ndim == 3 else x[:2, :, :4, :4]
    x = x.clone().requires_grad_()
    bank = banked(layer, [kind], dtype=torch.float64)
    bank.route = Route(torch.tensor([[0.5], [1.25]], dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x, *_: run(bank, x), (x, *delta_of(bank).parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_gives_to_a_pack_it_takes_back(kind: str) -> None:
    module, layer, x = kind_and_layer(kind, "linear")
    bank = banked(layer, [kind])
    bank.use({"a": 1.0})
    y = run(bank, x)
    other = Bank({"unet": nn.ModuleDict({"layer": layer})})
    other.add("a", module, module.Config.blank(), ["unet.layer"], small.stream_of)
    delta_of(other).load(delta_of(bank).tensors())
    other.use({"a": 1.0})
    assert torch.equal(run(other, x), y)
    assert {k: v.tolist() for k, v in delta_of(other).tensors().items()} == {k: v.tolist() for k, v in delta_of(bank).tensors().items()}
    with pytest.raises(ValueError, match="unheard_of"):
        delta_of(other).load({**delta_of(bank).tensors(), "unheard_of": torch.zeros(1)})


# ---------------------------------------------------------------- LoRA and PEFT


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "conv3-wide"])  # PEFT forgets the dilation
def test_lora_is_pefts(name: str) -> None:
    layer, x = new_layer(name)
    holder = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=7, target_modules=["layer"]), holder).get_submodule("layer")
    bank = Bank({"unet": nn.ModuleDict({"layer": layer})})
    bank.add("a", lora, lora.Config(rank=3, alpha=7.0), ["unet.layer"], small.stream_of)
    small.randomise(bank, "a")
    ours = delta_of(bank)
    down, up = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    with torch.no_grad():
        down.copy_(ours.get_parameter("down"))
        up.copy_(ours.get_parameter("up"))
    bank.use({"a": 1.0})
    weight = small.numbers(tuple(layer(x).shape), 9)
    results = []
    for module, parameters in ((bank.sites["unet.layer"], list(ours.parameters())), (theirs, [down, up])):
        given = x.clone().requires_grad_()
        y = module(given)
        results.append([y, *torch.autograd.grad((y * weight).sum(), [given, *parameters])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(results[0][0], layer(x), atol=1e-3)


def test_lora_scales_by_alpha_over_rank() -> None:
    layer, x = new_layer("linear")
    bank = banked(layer, ["lora"])
    bank.use({"a": 1.0})
    delta = delta_of(bank)
    product = delta.get_parameter("up") @ delta.get_parameter("down")
    torch.testing.assert_close(run(bank, x) - layer(x), x @ product.T * (1.5 / 3))
    torch.testing.assert_close(delta.merged(layer), product * (1.5 / 3))


# ---------------------------------------------------------------- several adapters in one batch


def alone(layer: nn.Module, kinds: Sequence[str], ranks: Sequence[int], slot: int, x: Tensor) -> Tensor:
    """What one of several adapters adds at strength 1, computed on a bank of which nothing else is used, sample by sample."""
    bank = banked(layer, kinds, ranks, x.dtype)
    bank.use({"abc"[slot]: 1.0})
    return torch.cat([run(bank, one[None]) for one in x]) - layer(x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_stacked_on_a_layer_add_up(kind: str, name: str) -> None:
    """Without an index: every adapter on every sample, at one strength each or at each sample's own."""
    module, layer, x = kind_and_layer(kind, name, torch.float64)
    if not module.Adapter.merges:
        pytest.skip("its changes do not add up")
    ranks = (2, 3, 1)
    parts = [alone(layer, [kind] * 3, ranks, slot, x) for slot in range(3)]
    bank = banked(layer, [kind] * 3, ranks, torch.float64)
    for strength in (torch.tensor([0.5, -1.0, 2.0]), small.numbers((4, 3), 8)):
        bank.route = Route(strength.double())
        rows = strength.double().expand(4, 3)
        wanted = layer(x) + sum(rows[:, k].view(-1, *[1] * (x.ndim - 1)) * part for k, part in enumerate(parts))
        torch.testing.assert_close(run(bank, x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_of_a_routed_batch_goes_through_its_own_adapter_alone(kind: str, name: str, per_sample: bool) -> None:
    """Ranks differ, the second adapter does not sit on the layer, and the order is mixed."""
    module, layer, x = kind_and_layer(kind, name, torch.float64)
    ranks = (2, 1, 3)
    parts = [alone(layer, [kind] * 3, ranks, slot, x) for slot in range(3)]
    for missing in (None, 0, 1, 2):
        bank = banked(layer, [kind] * 3, ranks, torch.float64)
        if missing is not None:
            del bank.sites["unet.layer"].deltas["abc"[missing]]
        for index in ([2, 0, 1, 0], [1, 1, 1, 1], [0, 0, 2, 2], [2, 2, 2, 2]):
            strength = small.numbers((4,), 2, torch.float64) if per_sample and module.Adapter.merges else torch.ones(1, dtype=torch.float64)
            bank.route = Route(strength, torch.tensor(index))
            wanted = layer(x)
            for row, slot in enumerate(index):
                if slot != missing:
                    wanted[row] += strength.expand(4)[row] * parts[slot][row]
            torch.testing.assert_close(run(bank, x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_routed_batch_reach_only_the_samples_own_adapter(kind: str) -> None:
    _, layer, x = kind_and_layer(kind, "linear", torch.float64)
    bank = banked(layer, [kind] * 3, (2, 1, 3), torch.float64)
    bank.route = Route(torch.ones(1, dtype=torch.float64), torch.tensor([0, 2, 0, 2]))
    run(bank, x).square().sum().backward()
    grads = {name: list(bank.parameters(name).values()) for name in "abc"}
    assert all(p.grad is None or not p.grad.any() for p in grads["b"])
    assert all(p.grad is not None and p.grad.any() for p in grads["a"] + grads["c"])
    bank.use({"a": 1.0})
    wanted = torch.autograd.grad(run(bank, x[[0, 2]]).square().sum(), grads["a"])
    for p, grad in zip(grads["a"], wanted, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, grad, rtol=1e-12, atol=1e-12)


def test_a_flat_batch_is_routed_as_well() -> None:
    layer, x = new_layer("linear", torch.float64)
    bank = banked(layer, ["lora", "lora"], (2, 3), torch.float64)
    for route in (Route(torch.ones(1).double(), torch.tensor([1, 0, 0, 1])), Route(small.numbers((4, 2), 3, torch.float64))):
        bank.route = route
        torch.testing.assert_close(run(bank, x[:, 0]), run(bank, x)[:, 0], rtol=1e-12, atol=1e-12)


def test_guidance_lays_a_route_behind_itself() -> None:
    layer, x = new_layer("linear", torch.float64)
    bank = banked(layer, ["lora", "lora"], (2, 3), torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    routes = [Route(one.expand(2)), Route(small.numbers((4, 2), 3, torch.float64)), Route(one, torch.tensor([1, 0, 0, 1]))]
    for route in [*routes, Route(small.numbers((4,), 4, torch.float64), torch.tensor([1, 0, 0, 1]))]:
        bank.route = route
        y = run(bank, x)
        bank.route = route.repeated(2)
        torch.testing.assert_close(run(bank, torch.cat([x, x])), torch.cat([y, y]), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- on a whole base


def adapt(bank: Bank, loaded: Family, name: str, kind: str, targets: Sequence[str], seed: int = 1) -> None:
    module = lookup.find("adapters", kind)
    fitting = {dotted: layer for dotted, layer in loaded.layers().items() if module.fits(layer)}
    bank.add(name, module, small.some_config(module), choose_sites(fitting, targets, loaded.presets), small.stream_of)
    small.randomise(bank, name, seed)


def predict(loaded: Family) -> Tensor:
    with torch.no_grad():
        states = loaded.states(loaded.tokens(["a cat", "a dog"]))
        return loaded.predict(small.numbers((2, 4, 8, 8)), torch.tensor([10, 500]), states)


@pytest.mark.parametrize("kind", KINDS)
def test_ejecting_restores_the_same_modules_and_bits(loaded: Family, kind: str) -> None:
    modules = small.modules(loaded)
    before = {part: {k: v.clone() for k, v in module.state_dict().items()} for part, module in loaded.components.items()}
    y = predict(loaded)
    bank = Bank(loaded.components)
    adapt(bank, loaded, "a", kind, ["attention", "text-encoder"])
    assert torch.equal(predict(loaded), y), "no route is the base, bit for bit"
    bank.use({"a": 1.0})
    assert not torch.allclose(predict(loaded), y, atol=1e-4)
    bank.eject()
    assert bank.sites == {}
    assert bank.adapters == []
    assert small.modules(loaded) == modules
    for part, module in loaded.components.items():
        after = module.state_dict()
        assert after.keys() == before[part].keys()
        assert all(torch.equal(after[key], value) for key, value in before[part].items())
    assert torch.equal(predict(loaded), y)


@pytest.mark.parametrize("kind", KINDS)
def test_removing_one_adapter_leaves_the_other_as_it_was(loaded: Family, kind: str) -> None:
    bank = Bank(loaded.components)
    module = lookup.find("adapters", kind)
    fitting = {dotted: layer for dotted, layer in loaded.layers().items() if module.fits(layer)}
    for seed, (name, preset) in enumerate((("a", "attention"), ("b", "all-linear"))):
        bank.add(name, module, small.some_config(module), choose_sites(fitting, [preset], loaded.presets), small.stream_of)
        small.randomise(bank, name, seed)
    bank.use({"b": 1.0})
    y = predict(loaded)
    bank.use({"a": 1.0, "b": 1.0})
    assert not torch.allclose(predict(loaded), y, atol=1e-4)
    bank.remove("a")
    bank.use({"b": 1.0})
    torch.testing.assert_close(predict(loaded), y, rtol=1e-6, atol=1e-6)
    with pytest.raises(UserError, match="E-ADAPT-02"):
        bank.add("b", module, small.some_config(module), list(bank.sites), small.stream_of)


def test_the_layers_of_a_base_are_the_same_with_an_adapter_on_it(loaded: Family) -> None:
    def fitting() -> list[str]:
        return [name for name, layer in loaded.layers().items() if lora.fits(layer)]

    names = fitting()
    bank = Bank(loaded.components)
    adapt(bank, loaded, "a", "lora", ["attention", "text-encoder"])
    assert fitting() == names


PARTS = {"cross-attention": ".attn2.", "attention": ".attn", "all-linear": "unet.", "text-encoder": "text_encoder.text_model."}


@pytest.mark.parametrize("preset", PARTS)
def test_every_preset_finds_its_layers_and_no_others(loaded: Family, preset: str) -> None:
    fitting = {name: layer for name, layer in loaded.layers().items() if lora.fits(layer)}
    assert set(loaded.presets) == set(PARTS)
    chosen = choose_sites(fitting, [preset], loaded.presets)
    blocks = 2 if preset == "text-encoder" else 4  # one attention in a down block, one in the middle, two in an up block
    each = {"cross-attention": 4, "attention": 8, "all-linear": 12, "text-encoder": 6}
    assert len(chosen) == blocks * each[preset]
    assert all(PARTS[preset] in name for name in chosen)
    assert chosen == [name for name in fitting if name in chosen], "in the model's own order"


def test_targets_add_up_and_repeat_nothing(loaded: Family) -> None:
    fitting = {name: layer for name, layer in loaded.layers().items() if lora.fits(layer)}
    both = choose_sites(fitting, ["cross-attention", "attention", "unet.conv_in"], loaded.presets)
    assert both == choose_sites(fitting, ["unet.conv_in", "attention"], loaded.presets)
    assert len(both) == 33


@pytest.mark.parametrize(
    ("target", "near"),
    [("cross-atention", "cross-attention"), ("unet.conv_inn", "unet.conv_in"), ("zzz", "")],
)
def test_a_target_that_matches_nothing_is_named_with_a_near_one(loaded: Family, target: str, near: str) -> None:
    fitting = {name: layer for name, layer in loaded.layers().items() if lora.fits(layer)}
    with pytest.raises(UserError, match="E-ADAPT-01") as caught:
        choose_sites(fitting, [target], loaded.presets)
    assert f'"{target}"' in str(caught.value)
    assert "all-linear" in str(caught.value)
    assert ("did you mean" in str(caught.value)) == bool(near)
    assert near in str(caught.value)
