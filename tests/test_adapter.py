"""Laws of every adapter kind: how it starts, leaves, scales, merges, and how adapters share a batch; PEFT is the oracle."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import peft
import pytest
import small
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from sdlora import lookup
from sdlora.adapter import Bank, Delta
from sdlora.adapters import dora, lokr, lora, oft, subspace
from sdlora.errors import UserError
from sdlora.family import Family
from sdlora.layers import choose_sites
from sdlora.lowrank import Init
from sdlora.optimizer import groups
from sdlora.routing import Route
from sdlora.settings import Settings

KINDS = lookup.names("adapters")
OTHERWISE = {"houlsby": "attention", "prefix": "attention", "prompt": "embedding"}
"""Kinds that sit on no layer with a weight to multiply by, and one that they sit on."""
PRESET = {kind: ["attention", "text-encoder"] for kind in KINDS} | {
    "houlsby": ["blocks"],
    "prefix": ["cross-attention-blocks"],
    "prompt": ["words"],
}
LAYERS = ("linear", "linear-plain", "conv1", "conv3", "conv3-wide", "attention", "attention-biased", "attention-narrow", "feed-forward",
          "feed-forward-gelu", "embedding", "embedding-broad")  # fmt: skip


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
            "conv3-plain": nn.Conv2d(4, 6, 3, bias=False),
            "linear-broad": nn.Linear(36, 25),
            "attention": Attention(6, heads=2, dim_head=4),
            "attention-biased": Attention(6, heads=2, dim_head=4, bias=True),
            "attention-narrow": Attention(6, heads=3, dim_head=2),
            "feed-forward": FeedForward(6, mult=2),
            "feed-forward-gelu": FeedForward(6, mult=3, activation_fn="gelu"),
            "embedding": nn.Embedding(9, 6),
            "embedding-broad": nn.Embedding(9, 10),
        }[name]
    if isinstance(layer, nn.Embedding):
        layer.register_buffer("ends", torch.arange(9) != 3)
        ids = torch.tensor([[0, 3, 1, 5, 3, 1, 2], [3, 3, 1, 5, 3, 1, 1], [1, 3, 1, 1, 1, 3, 3], [2, 5, 7, 3, 1, 3, 1]])
        return layer.requires_grad_(False).to(dtype), ids  # `small.some_config` says that the trigger is 3, 1
    shape = (4, 4, 7, 7) if isinstance(layer, nn.Conv2d) else (4, 3, {"linear-broad": 36}.get(name, 6))
    return layer.requires_grad_(False).to(dtype), small.numbers(shape, 5, dtype)


def banked(layer: nn.Module, kinds: Sequence[str], ranks: Sequence[int] = (3, 3, 3), dtype: torch.dtype = torch.float32) -> Bank:
    """The layer as `unet.layer` under adapters a, b, c ... of the given kinds, with random weights."""
    bank = Bank({"unet": nn.ModuleDict({"layer": layer})})
    for i, name in enumerate(kinds):
        kind = lookup.find("adapters", name)
        bank.add("abc"[i], dict.fromkeys(["unet.layer"], (kind, small.some_config(kind, ranks[i], 1.5 + i))), small.stream_of)
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


def fits(kind: str, name: str) -> bool:
    return bool(lookup.find("adapters", kind).fits(new_layer(name)[0]))


def merges(kind: str) -> bool:
    return bool(lookup.find("adapters", kind).Adapter.merges)


SITES = [(kind, name) for kind in KINDS for name in LAYERS if fits(kind, name)]
"""Each kind on each layer that it sits on."""
MERGED = [(kind, name) for kind, name in SITES if merges(kind)]
"""Those of which the base's weight can hold all that they do: no reader of packs knows the others."""


def kind_and_layer(kind: str, name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, nn.Module, Tensor]:
    module = lookup.find("adapters", kind)
    layer, x = new_layer(name, dtype)
    if kind in OTHERWISE and name in ("linear", "conv3", "linear-broad"):  # where a test has one layer for all kinds
        layer, x = new_layer(OTHERWISE[kind], dtype)
    assert module.fits(layer)
    return module, layer, x


# ---------------------------------------------------------------- one adapter on one layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "name"), SITES)
def test_it_starts_as_it_declares(kind: str, name: str, dtype: torch.dtype) -> None:
    module, layer, x = kind_and_layer(kind, name, dtype)
    y = layer(x)
    bank = Bank({"unet": nn.ModuleDict({"layer": layer})})
    bank.add("a", dict.fromkeys(["unet.layer"], (module, small.some_config(module))), small.stream_of)
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


@pytest.mark.parametrize(("kind", "name"), SITES)
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


@pytest.mark.parametrize(("kind", "name"), MERGED)
def test_merged_is_the_adapter(kind: str, name: str) -> None:
    _, layer, x = kind_and_layer(kind, name)
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
    bank.unmerge()
    assert torch.equal(before, layer.get_parameter("weight"))


@pytest.mark.parametrize(("kind", "name"), SITES)
def test_gradients_are_the_numeric_ones(kind: str, name: str) -> None:
    _, layer, x = kind_and_layer(kind, name, torch.float64)
    x = x[:2] if x.ndim < 4 else x[:2, :, :4, :4]
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    bank = banked(layer, [kind], dtype=torch.float64)
    bank.route = Route(torch.tensor([[0.5], [1.25]], dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x, *_: run(bank, x), (x, *delta_of(bank).parameters()), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_gives_to_a_pack_it_takes_back(kind: str) -> None:
    module, layer, x = kind_and_layer(kind, "linear")
    bank = banked(layer, [kind])
    bank.use({"a": 1.0})
    y = run(bank, x)
    other = Bank({"unet": nn.ModuleDict({"layer": layer})})
    other.add("a", dict.fromkeys(["unet.layer"], (module, module.Config.blank())), small.stream_of)
    delta_of(other).load(delta_of(bank).tensors())
    other.use({"a": 1.0})
    assert torch.equal(run(other, x), y)
    assert {k: v.tolist() for k, v in delta_of(other).tensors().items()} == {k: v.tolist() for k, v in delta_of(bank).tensors().items()}
    with pytest.raises(ValueError, match="unheard_of"):
        delta_of(other).load({**delta_of(bank).tensors(), "unheard_of": torch.zeros(1)})


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_do_not_fit_are_refused(kind: str) -> None:
    module, layer, _ = kind_and_layer(kind, "conv3")
    sound = delta_of(banked(layer, [kind])).tensors()
    for leaf, tensor in sound.items():
        delta = module.Adapter(layer, module.Config.blank(), small.stream_of("x"))
        if tensor.ndim:
            for wrong in (torch.cat([tensor, tensor]), tensor[:0], tensor[..., None, None], torch.ones(())):
                with pytest.raises(ValueError, match=r"."):
                    delta.load({**sound, leaf: wrong})
        if leaf != "alpha":
            with pytest.raises((ValueError, KeyError)):
                delta.load({name: other for name, other in sound.items() if name != leaf})
        delta = module.Adapter(layer, module.Config.blank(), small.stream_of("x"))
        delta.load(sound)
        assert torch.equal(delta.tensors()[leaf], tensor), "the control: the sound ones are taken"


Leaves = dict[str, Tensor]


def read_lora(t: Leaves, w: Tensor) -> Tensor:
    up, down = t["lora_up.weight"], t["lora_down.weight"]
    return (up.flatten(1) @ down.flatten(1)).view_as(w) * t["alpha"] / len(down)


def read_dora(t: Leaves, w: Tensor) -> Tensor:
    turned = w + read_lora(t, w)
    along_inputs = turned.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, *[1] * (w.ndim - 2))
    return t["dora_scale"] * turned / along_inputs - w


def read_loha(t: Leaves, w: Tensor) -> Tensor:
    first, second = t["hada_w1_a"] @ t["hada_w1_b"], t["hada_w2_a"] @ t["hada_w2_b"]
    return (first * second * t["alpha"] / len(t["hada_w1_b"])).view_as(w)


def read_lokr(t: Leaves, w: Tensor) -> Tensor:
    if "lokr_w2" in t:
        kernel = t["lokr_w2"].shape[2:]
        return torch.kron(t["lokr_w1"].view(*t["lokr_w1"].shape, *[1] * len(kernel)), t["lokr_w2"])
    second = t["lokr_w2_a"] @ t["lokr_w2_b"]
    return torch.kron(t["lokr_w1"], second).view_as(w) * t["alpha"] / len(t["lokr_w2_b"])


def read_ia3(t: Leaves, w: Tensor) -> Tensor:
    assert not t["on_input"]
    return w * t["weight"].reshape(-1, *[1] * (w.ndim - 1))


def read_oft(t: Leaves, w: Tensor) -> Tensor:
    skew = t["oft_blocks"] - t["oft_blocks"].transpose(1, 2)
    assert skew.norm() < t["alpha"]
    eye = torch.eye(skew.shape[-1])
    turn = torch.matmul(eye + skew, torch.linalg.inv(eye - skew)) - eye
    return torch.einsum("k n m, k n ... -> k m ...", turn, w.view(*skew.shape[:2], *w.shape[1:])).reshape(w.shape)


READERS = {
    "lora": read_lora, "dora": read_dora, "loha": read_loha, "lokr": read_lokr, "ia3": read_ia3, "oft": read_oft,
    "full": lambda t, _: t["diff"], "subspace": lambda t, _: t["diff"],
}  # fmt: skip
"""What ComfyUI, A1111 and LyCORIS make of a layer's leaves (docs/packs.md)."""


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize(("kind", "name"), MERGED)
def test_readers_of_packs_make_the_same_of_its_leaves(kind: str, name: str, rank: int) -> None:
    _, layer, _ = kind_and_layer(kind, name)
    delta = delta_of(banked(layer, [kind], (rank,)))
    leaves = {leaf: tensor.detach() for leaf, tensor in delta.tensors().items()}
    merged = delta.merged(layer)
    assert merged is not None
    torch.testing.assert_close(READERS[kind](leaves, layer.get_parameter("weight")), merged, rtol=1e-4, atol=1e-5)


OTHER: dict[str, Any] = {
    "rank": 4, "alpha": 0.5, "rank_stabilised": True, "init": "orthogonal", "axis": "out", "constant_norm": True,
    "factor": 2, "decompose_both": True, "side": "in", "block_size": 5, "lora_fa": True, "dropout": 0.5, "rank_dropout": 0.5,
    "module_dropout": 0.5, "bottleneck": 5, "tokens": 3, "dimension": 9,
}  # fmt: skip
"""Another value for each setting that a kind may have."""


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (kind, name)
        for kind in KINDS
        for name in lookup.find("adapters", kind).Config.model_fields
        if name not in ("kind", "targets", "blocks")
    ],
)
def test_each_of_its_settings_changes_how_it_starts_or_learns(kind: str, setting: str) -> None:
    module, layer, x = kind_and_layer(kind, "linear-broad")
    usual = small.some_config(module, rank=2)

    def shown(config: Settings) -> list[Any]:
        bank = Bank({"unet": nn.ModuleDict({"layer": layer})})
        bank.add("a", dict.fromkeys(["unet.layer"], (module, config)), small.stream_of)
        parameters = list(delta_of(bank).parameters())
        starts = [p.tolist() for p in parameters]
        small.randomise(bank, "a")
        bank.route = Route(torch.ones(1), keys=torch.arange(4))
        y = run(bank, x)
        learnt = [p for p in parameters if p.requires_grad]
        found = [starts, y.tolist(), *(grad.tolist() for grad in torch.autograd.grad(y.square().sum(), learnt))]
        bank.eject()
        return found

    assert shown(usual) == shown(usual)
    assert shown(usual.model_copy(update={setting: OTHER[setting]})) != shown(usual)


# ---------------------------------------------------------------- PEFT


@dataclass(frozen=True)
class Oracle:
    """A kind as PEFT has it: its parameters by ours, of which `offset` is their difference."""

    kind: str
    ours: dict[str, Any]
    theirs: peft.PeftConfig
    names: dict[str, str]
    offset: float = 0.0
    layers: Sequence[str] = LAYERS


ON = {"target_modules": ["layer"]}
FACTORS = {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}
UNDILATED = tuple(name for name in LAYERS if name != "conv3-wide")  # PEFT's LoRA forgets the dilation


def same(*names: str) -> dict[str, str]:
    return {name: f"{name}.default" for name in names}


def kronecker(*names: str) -> dict[str, str]:
    return {f"parts.{name}": f"{name}.default" for name in names}


ORACLES = {
    "lora": Oracle("lora", {}, peft.LoraConfig(r=3, lora_alpha=7, **ON), FACTORS, layers=UNDILATED),
    "lora, rank-stabilised": Oracle(
        "lora", {"rank_stabilised": True}, peft.LoraConfig(r=3, lora_alpha=7, use_rslora=True, **ON), FACTORS, layers=UNDILATED
    ),
    "dora": Oracle(
        "dora",
        {"axis": "out", "constant_norm": True},
        peft.LoraConfig(r=3, lora_alpha=7, use_dora=True, **ON),
        {**FACTORS, "magnitude": "lora_magnitude_vector.default.weight"},
        layers=UNDILATED,
    ),
    "loha": Oracle("loha", {}, peft.LoHaConfig(r=3, alpha=7, **ON), same("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
    "lokr": Oracle("lokr", {"rank": 1}, peft.LoKrConfig(r=1, alpha=7, **ON), kronecker("lokr_w1", "lokr_w2_a", "lokr_w2_b")),
    "lokr of whole factors": Oracle("lokr", {"alpha": 3.0}, peft.LoKrConfig(r=3, alpha=3, **ON), kronecker("lokr_w1", "lokr_w2")),
    "lokr of narrow factors": Oracle(
        "lokr",
        {"rank": 2, "decompose_both": True},
        peft.LoKrConfig(r=2, alpha=7, decompose_both=True, **ON),
        kronecker("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"),
        layers=("linear-broad",),
    ),
    "ia3": Oracle(
        "ia3", {}, peft.IA3Config(feedforward_modules=[], **ON), {"vector": "ia3_l.default"}, 1.0, ("linear-plain", "conv3-plain")
    ),
    "ia3 of inputs": Oracle("ia3", {"side": "in"}, peft.IA3Config(feedforward_modules=["layer"], **ON), {"vector": "ia3_l.default"}, 1.0),
}


@pytest.mark.parametrize(("oracle", "name"), [(key, name) for key, one in ORACLES.items() for name in one.layers if fits(one.kind, name)])
def test_it_is_pefts_in_forward_and_gradients(oracle: str, name: str) -> None:
    case = ORACLES[oracle]
    module, layer, x = kind_and_layer(case.kind, name)
    holder = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    theirs = peft.inject_adapter_in_model(copy.deepcopy(case.theirs), holder).get_submodule("layer")
    bank = Bank({"unet": nn.ModuleDict({"layer": layer})})
    given = {"rank": 3, "alpha": 7.0} if "rank" in module.Config.model_fields else {}
    bank.add("a", dict.fromkeys(["unet.layer"], (module, module.Config(**{**given, **case.ours}))), small.stream_of)
    small.randomise(bank, "a")
    ours = delta_of(bank)
    pairs = [(ours.get_parameter(a), theirs.get_parameter(b)) for a, b in case.names.items()]
    assert len(pairs) == len(list(ours.parameters()))
    with torch.no_grad():
        for a, b in pairs:
            b.copy_((a + case.offset).view_as(b))
    bank.use({"a": 1.0})
    weight = small.numbers(tuple(layer(x).shape), 9)
    results = []
    for which, site in enumerate((bank.sites["unet.layer"], theirs)):
        given_x = x.clone().requires_grad_()
        y = site(given_x)
        grads = torch.autograd.grad((y * weight).sum(), [given_x, *(pair[which] for pair in pairs)])
        results.append([y, *(grad.flatten() for grad in grads)])
    for ours_, theirs_ in zip(*results, strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-5, atol=1e-5 * float(theirs_.detach().abs().max().clamp(min=1)))
    assert not torch.allclose(results[0][0], layer(x), atol=1e-3), "the control: it does something"


# ---------------------------------------------------------------- LoRA


def test_lora_scales_by_alpha_over_rank() -> None:
    layer, x = new_layer("linear")
    bank = banked(layer, ["lora"])
    bank.use({"a": 1.0})
    delta = delta_of(bank)
    product = delta.get_parameter("up") @ delta.get_parameter("down")
    torch.testing.assert_close(run(bank, x) - layer(x), x @ product.T * (1.5 / 3))
    torch.testing.assert_close(delta.merged(layer), product * (1.5 / 3))


def test_a_rank_stabilised_pack_has_its_strength_for_readers_that_divide_by_the_rank() -> None:
    layer, _ = new_layer("linear")
    delta = lora.Adapter(layer, lora.Config(rank=4, alpha=3.0, rank_stabilised=True), small.stream_of("x"))
    assert delta.scale == 3.0 / 4**0.5
    assert delta.tensors()["alpha"] / 4 == pytest.approx(delta.scale)
    assert lora.Adapter(layer, lora.Config(rank=4, alpha=3.0), small.stream_of("x")).scale == 0.75


@pytest.mark.parametrize(("rank", "inputs"), [(16, 400), (40, 10)])
def test_factors_start_as_is_set(rank: int, inputs: int) -> None:
    layer = nn.Linear(inputs, 8)
    downs = {}
    for init in get_args(Init):
        delta = lora.Adapter(layer, lora.Config(rank=rank, alpha=1.0, init=init), small.stream_of("x"))
        assert not delta.up.any()
        downs[init] = delta.down.detach()
    assert downs["kaiming"].abs().max() <= inputs**-0.5
    assert downs["kaiming"].square().sum() == pytest.approx(rank / 3, rel=0.1)
    assert downs["gaussian"].std() == pytest.approx(1 / rank, rel=0.1)
    narrow = downs["orthogonal"] if rank < inputs else downs["orthogonal"].T
    torch.testing.assert_close(narrow @ narrow.T, torch.eye(len(narrow)) / 3, rtol=1e-5, atol=1e-6)
    gram = downs["kaiming"] @ downs["kaiming"].T
    assert (gram - gram.diag().diag()).abs().max() > 1e-2, "the control: others are not orthogonal"


@pytest.mark.parametrize("name", ["linear", "linear-plain", "conv1", "conv3"])
def test_pissa_starts_at_the_principal_part_and_its_pack_is_a_lora_that_does_the_same(name: str) -> None:
    layer, x = new_layer(name)
    y, weight = layer(x), layer.get_parameter("weight")
    bank = Bank({"unet": nn.ModuleDict({"layer": layer})})
    bank.add("a", dict.fromkeys(["unet.layer"], (lora, lora.Config(rank=2, alpha=3.0, init="pissa"))), small.stream_of)
    delta = delta_of(bank)
    product = 3.0 / 2 * delta.get_parameter("up").flatten(1) @ delta.get_parameter("down").flatten(1)
    u, values, v = torch.linalg.svd(weight.flatten(1))
    torch.testing.assert_close(product, u[:, :2] * values[:2] @ v[:2])
    for keys in (None, torch.arange(4)):
        bank.route = Route(torch.ones(1), keys=keys)
        assert torch.equal(run(bank, x), y), "bit for bit"
    small.randomise(bank, "a")
    bank.use({"a": 1.0})
    adapted = run(bank, x)
    assert not torch.allclose(adapted, y, atol=1e-2)
    leaves = {leaf: tensor.detach() for leaf, tensor in delta.tensors().items()}
    assert len(leaves["lora_down.weight"]) == leaves["lora_up.weight"].shape[1] == 4
    merged = delta.merged(layer)
    assert merged is not None
    torch.testing.assert_close(read_lora(leaves, weight), merged, rtol=1e-4, atol=1e-5)
    again = Bank({"unet": nn.ModuleDict({"layer": copy.deepcopy(layer)})})
    again.add("a", dict.fromkeys(["unet.layer"], (lora, lora.Config.blank())), small.stream_of)
    delta_of(again).load(leaves)
    again.use({"a": 1.0})
    torch.testing.assert_close(run(again, x), adapted, rtol=1e-4, atol=1e-5)
    bank.merge("a")
    torch.testing.assert_close(run(bank, x), adapted, rtol=1e-4, atol=1e-5)


def test_what_pissa_learnt_survives_half_precision() -> None:
    """A small step beside a large principal part: a thousandth of it would be lost in the halves of the factors as they are."""
    layer, _ = new_layer("linear-broad")
    with torch.no_grad():
        layer.get_parameter("weight").mul_(1000)
    delta = lora.Adapter(layer, lora.Config(rank=4, alpha=4.0, init="pissa"), small.stream_of("x"))
    with torch.no_grad():
        delta.up.add_(1e-3 * small.numbers(tuple(delta.up.shape)))
    merged, halves = delta.merged(layer), {leaf: tensor.half().float() for leaf, tensor in delta.tensors().items()}
    assert merged is not None
    read = read_lora(halves, layer.get_parameter("weight"))
    assert (read - merged).norm() < 2e-3 * merged.norm()
    assert delta.first is not None
    naive = delta.up.half().float() @ delta.down.half().float() - delta.first[1].half().float() @ delta.first[0].half().float()
    assert (naive - merged).norm() > 0.1 * merged.norm(), "the control"


def test_lora_fa_leaves_down_to_no_optimizer() -> None:
    layer, x = new_layer("linear")
    bank = Bank({"unet": nn.ModuleDict({"layer": layer})})
    bank.add("a", dict.fromkeys(["unet.layer"], (lora, lora.Config(rank=2, alpha=2.0, lora_fa=True))), small.stream_of)
    params = bank.parameters("a")
    assert list(params) == ["unet.layer.down", "unet.layer.up"], "both are in the checkpoint"
    ((one,),) = (group["params"] for group in groups([(params, 1.0)]))
    assert one is params["unet.layer.up"]
    bank.use({"a": 1.0})
    run(bank, x).sum().backward()
    assert params["unet.layer.down"].grad is None
    assert one.grad is not None


@pytest.mark.parametrize("setting", ["dropout", "rank_dropout", "module_dropout"])
@pytest.mark.parametrize("name", ["linear", "conv3"])
def test_dropout_is_a_function_of_layer_and_sample_that_keeps_the_mean(name: str, setting: str) -> None:
    layer, x = new_layer(name, torch.float64)
    bank = Bank({"unet": nn.ModuleDict({"layer": layer, "other": copy.deepcopy(layer)})})
    config = lora.Config(rank=3, alpha=3.0, **{setting: 0.4})
    bank.add("a", dict.fromkeys(["unet.layer", "unet.other"], (lora, config)), small.stream_of)
    small.randomise(bank, "a")
    for _, _, delta in bank.deltas("a"):
        delta.double()
    one, keys = torch.ones(1, dtype=torch.float64), torch.tensor([7, 8, 9, 10])
    bank.use({"a": 1.0})
    whole = run(bank, x)
    bank.route = Route(one, keys=keys)
    dropped = run(bank, x)
    assert not torch.allclose(dropped, whole)
    order = torch.tensor([2, 0, 3, 1])
    for rows in (order, order[:1], order[1:]):
        bank.route = Route(one, keys=keys[rows])
        torch.testing.assert_close(run(bank, x[rows]), dropped[rows], rtol=1e-12, atol=1e-12)
    bank.route = Route(one, [0, 1, 0, 1], keys=keys)
    torch.testing.assert_close(run(bank, x)[[0, 2]], dropped[[0, 2]], rtol=1e-12, atol=1e-12)
    assert torch.equal(run(bank, x)[[1, 3]], layer(x)[[1, 3]])
    bank.route = Route(one, keys=torch.arange(3000))
    many = x[:1].expand(3000, *x.shape[1:])
    mean, apart = run(bank, many).mean(0), (whole[0] - layer(x)[0]).abs().max()
    assert (mean - whole[0]).abs().max() < 0.15 * apart
    masks = [delta._kept(torch.arange(400), 2, 1, 0.4) for _, _, delta in bank.deltas("a") if isinstance(delta, lora.Adapter)]
    assert not torch.equal(*masks), "layers differ"


# ---------------------------------------------------------------- the others


def test_houlsbys_and_prefix_are_the_papers_formulas() -> None:
    layer, x = new_layer("attention", torch.float64)
    assert isinstance(layer, Attention)
    bank = banked(layer, ["houlsby"], dtype=torch.float64)
    bank.use({"a": 1.0})
    p, y = dict(delta_of(bank).named_parameters()), layer(x)
    hidden = y @ p["down"].T + p["down_bias"]
    torch.testing.assert_close(run(bank, x), y + nn.functional.gelu(hidden) @ p["up"].T + p["up_bias"])
    bank = banked(layer, ["prefix"], dtype=torch.float64)
    bank.use({"a": 1.0})
    p, out = dict(delta_of(bank).named_parameters()), []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        weights = torch.softmax(layer.to_q(x)[..., part] @ p["keys"][:, part].T / 2, -1)
        out.append(weights @ p["values"][:, part])
    torch.testing.assert_close(run(bank, x), y + p["gate"] * layer.to_out[0](torch.cat(out, -1)))


def test_a_subspace_is_one_vector_for_all_layers_through_a_projection_that_keeps_lengths() -> None:
    holder = nn.ModuleDict({name: nn.Linear(40, 30) for name in "ab"}).requires_grad_(False)
    bank = Bank({"unet": holder})
    pieces = dict.fromkeys(["unet.a", "unet.b"], (subspace, subspace.Config(dimension=50)))
    bank.add("a", pieces, small.stream_of)
    assert [(name, p.shape) for name, p in bank.parameters("a").items()] == [("unet.a.vector", (50,))]
    assert bank.parameters("a", "text_encoder") == {}
    ((_, _, one), (_, _, two)) = bank.deltas("a")
    assert one.get_parameter("vector") is two.get_parameter("vector")
    vector = one.get_parameter("vector")
    columns = []
    for unit in torch.eye(50):
        with torch.no_grad():
            vector.copy_(unit)
        columns.append(one.difference(holder["a"]).detach().flatten())
    columns = torch.stack(columns, 1)
    norms = columns.norm(dim=0)
    assert norms.mean() == pytest.approx(1, abs=0.05)
    gram = columns.T @ columns
    assert (gram - gram.diag().diag()).abs().max() < 0.3, "and angles, nearly"
    with torch.no_grad():
        vector.copy_(small.numbers((50,)))
    torch.testing.assert_close(one.difference(holder["a"]), (columns @ vector.detach()).view(30, 40))
    assert not torch.allclose(one.difference(holder["a"]), two.difference(holder["b"]))
    bank.use({"a": 1.0})
    (holder["a"](torch.ones(1, 40)).sum() + holder["b"](torch.ones(1, 40)).sum()).backward()
    assert vector.grad is not None


@pytest.mark.parametrize("side", [1, 2, 8])
def test_hadamards_matrix(side: int) -> None:
    matrix = subspace.hadamard(torch.eye(side))
    torch.testing.assert_close(matrix @ matrix.T, side * torch.eye(side))
    assert set(matrix.flatten().tolist()) <= {1.0, -1.0}


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("name", ["linear", "conv3"])
def test_dora_is_the_papers_formula(axis: str, name: str) -> None:
    """Equation 5, as the readers of packs compute it: each slice of W + ΔV has the length that its magnitude says."""
    layer, x = new_layer(name, torch.float64)
    bank = Bank({"unet": nn.ModuleDict({"layer": layer})})
    bank.add("a", dict.fromkeys(["unet.layer"], (dora, dora.Config(rank=3, alpha=1.5, axis=axis))), small.stream_of)
    small.randomise(bank, "a")
    delta = delta_of(bank).double()
    leaves = delta.tensors()
    v = layer.get_parameter("weight") + 1.5 / 3 * torch.einsum("or,r...->o...", delta.up.flatten(1), delta.down)
    sums = v.square().sum((0, *range(2, v.ndim)) if axis == "in" else tuple(range(1, v.ndim)), keepdim=True)
    assert leaves["dora_scale"].shape == sums.shape == ((1, v.shape[1]) if axis == "in" else (len(v), 1)) + (1,) * (v.ndim - 2)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.get_parameter("weight").copy_(leaves["dora_scale"] * v / sums.sqrt())
    bank.use({"a": 1.0})
    torch.testing.assert_close(run(bank, x), other(x), rtol=1e-10, atol=1e-10)


def test_doras_readers_have_its_magnitudes_in_full() -> None:
    assert dora.Adapter.exact == {"alpha", "dora_scale"}


@pytest.mark.parametrize("axis", ["in", "out"])
def test_dora_leaves_a_weight_of_zeros_as_it_is(axis: str) -> None:
    layer = nn.Linear(6, 5)
    with torch.no_grad():
        layer.weight[2], layer.weight[:, 3] = 0.0, 0.0
    delta = dora.Adapter(layer, dora.Config(rank=2, alpha=2.0, axis=axis), small.stream_of("x"))
    change = delta.difference(layer)
    assert not change.any()
    change.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in delta.parameters())


def test_a_constant_norm_has_the_papers_gradient_and_not_the_numeric_one() -> None:
    layer, x = new_layer("linear", torch.float64)
    bank = banked(layer, ["dora"], dtype=torch.float64)
    delta = delta_of(bank)
    bank.use({"a": 1.0})
    assert torch.autograd.gradcheck(lambda x, *_: run(bank, x), (x, *delta.parameters()))
    delta.constant_norm = True
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda x, *_: run(bank, x), (x, *delta.parameters()))


def test_oft_is_a_rotation_of_blocks_of_outputs() -> None:
    """The formula as readers of packs have it: Cayley's R = (I + Q)(I - Q)^-1 for Q = B - B^T, and R^T W for each block."""
    for name in ("linear-broad", "conv3"):
        layer, x = new_layer(name, torch.float64)
        bank = Bank({"unet": nn.ModuleDict({"layer": layer})})
        bank.add("a", dict.fromkeys(["unet.layer"], (oft, oft.Config(block_size=4))), small.stream_of)
        small.randomise(bank, "a")
        delta = delta_of(bank).double()
        blocks = delta.get_parameter("blocks")
        count, size = blocks.shape[:2]
        assert (count, size) == ((5, 5) if name == "linear-broad" else (2, 3))
        eye, given = torch.eye(size, dtype=torch.float64), blocks.detach().clone().requires_grad_()
        rotation = torch.block_diag(*[(eye + b - b.T) @ torch.linalg.inv(eye - b + b.T) for b in given])
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(count * size, dtype=torch.float64))
        weight = layer.get_parameter("weight")
        turned = (rotation.T @ weight.flatten(1)).view_as(weight)
        values = [torch.linalg.svdvals(w.detach().flatten(1)) for w in (turned, weight)]
        torch.testing.assert_close(*values)
        wanted = torch.func.functional_call(layer, {"weight": turned}, (x,))
        bank.use({"a": 1.0})
        torch.testing.assert_close(run(bank, x), wanted, rtol=1e-10, atol=1e-10)
        ours = torch.autograd.grad(run(bank, x).square().sum(), blocks)
        torch.testing.assert_close(ours, torch.autograd.grad(wanted.square().sum(), given), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(wanted, layer(x), atol=1e-3)


def test_a_rotation_beyond_its_bound_is_not_guessed_at() -> None:
    layer, _ = new_layer("linear")
    delta = oft.Adapter(layer, oft.Config(), small.stream_of("x"))
    blocks = small.numbers((1, 5, 5))
    norm = (blocks - blocks.mT).norm()
    with pytest.raises(ValueError, match="bound"):
        delta.load({"oft_blocks": blocks, "alpha": 0.9 * norm})
    for alpha in (1.1 * norm, torch.zeros(())):
        delta.load({"oft_blocks": blocks, "alpha": alpha})
    delta.load({"oft_blocks": blocks})
    assert delta.tensors()["alpha"] >= 1e3 * norm


def test_sides_are_split_as_pefts_are() -> None:
    assert all(lokr.split(n, 0) == factorization(n) for n in range(1, 3000))
    assert [lokr.split(320, factor) for factor in (1, 4, 8, 16)] == [factorization(320, factor) for factor in (1, 4, 8, 16)]


def test_a_kronecker_product_has_one_form() -> None:
    layer, _ = new_layer("linear-broad")
    delta = lokr.Adapter(layer, lokr.Config(rank=2, alpha=1.0), small.stream_of("x"))
    sound = delta.tensors()
    for extra in ("lokr_w1_a", "lokr_w1_b", "lokr_w2"):
        with pytest.raises(ValueError, match=extra):
            delta.load({**sound, extra: torch.ones(2, 2)})


# ---------------------------------------------------------------- several adapters in one batch


def alone(layer: nn.Module, kinds: Sequence[str], ranks: Sequence[int], slot: int, x: Tensor) -> Tensor:
    """What one of several adapters adds at strength 1, computed on a bank of which nothing else is used, sample by sample."""
    bank = banked(layer, kinds, ranks, layer(x).dtype)
    bank.use({"abc"[slot]: 1.0})
    return torch.cat([run(bank, one[None]) for one in x]) - layer(x)


@pytest.mark.parametrize(("kind", "name"), MERGED)
def test_adapters_stacked_on_a_layer_add_up(kind: str, name: str) -> None:
    """Without an index: every adapter on every sample, at one strength each or at each sample's own."""
    _, layer, x = kind_and_layer(kind, name, torch.float64)
    ranks = (2, 3, 1)
    parts = [alone(layer, [kind] * 3, ranks, slot, x) for slot in range(3)]
    bank = banked(layer, [kind] * 3, ranks, torch.float64)
    for strength in (torch.tensor([0.5, -1.0, 2.0]), small.numbers((4, 3), 8)):
        bank.route = Route(strength.double())
        rows = strength.double().expand(4, 3)
        wanted = layer(x) + sum(rows[:, k].view(-1, *[1] * (x.ndim - 1)) * part for k, part in enumerate(parts))
        torch.testing.assert_close(run(bank, x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(("kind", "name"), SITES)
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
            bank.route = Route(strength, index)
            wanted = layer(x)
            for row, slot in enumerate(index):
                if slot != missing:
                    wanted[row] += strength.expand(4)[row] * parts[slot][row]
            torch.testing.assert_close(run(bank, x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_share_a_layer_and_a_batch(kind: str) -> None:
    """An adapter of this kind between two of its neighbours, on every sample or each on its own."""
    _, layer, x = kind_and_layer(kind, "linear", torch.float64)
    alike = [one for one in KINDS if OTHERWISE.get(one) == OTHERWISE.get(kind)]
    other = alike[alike.index(kind) - 1]
    kinds, ranks = [other, kind, other], (2, 3, 1)
    parts = [alone(layer, kinds, ranks, slot, x) for slot in range(3)]
    bank = banked(layer, kinds, ranks, torch.float64)
    bank.route = Route(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(run(bank, x), layer(x) + 0.5 * parts[0] - parts[1] + 2 * parts[2], rtol=1e-12, atol=1e-12)
    bank.route = Route(torch.tensor([1.0, 0.3, 1.0, -2.0], dtype=torch.float64), [1, 0, 2, 1])
    wanted = layer(x) + torch.stack([parts[1][0], 0.3 * parts[0][1], parts[2][2], -2 * parts[1][3]])
    torch.testing.assert_close(run(bank, x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_routed_batch_reach_only_the_samples_own_adapter(kind: str) -> None:
    _, layer, x = kind_and_layer(kind, "linear", torch.float64)
    bank = banked(layer, [kind] * 3, (2, 1, 3), torch.float64)
    bank.route = Route(torch.ones(1, dtype=torch.float64), [0, 2, 0, 2])
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
    for route in (Route(torch.ones(1).double(), [1, 0, 0, 1]), Route(small.numbers((4, 2), 3, torch.float64))):
        bank.route = route
        torch.testing.assert_close(run(bank, x[:, 0]), run(bank, x)[:, 0], rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- on a whole base


def adapt(bank: Bank, loaded: Family, name: str, kind: str, targets: Sequence[str], seed: int = 1) -> None:
    module = lookup.find("adapters", kind)
    fitting = {dotted: layer for dotted, layer in loaded.layers().items() if module.fits(layer)}
    config, words = small.some_config(module), loaded.spelling("cat")
    sites = choose_sites(fitting, targets, loaded.presets)
    bank.add(name, {site: (module, config.spelt(words.get(site, ()))) for site in sites}, small.stream_of)
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
    adapt(bank, loaded, "a", kind, PRESET[kind])
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
    others = {"attention": "unet.*.attn[12]", "embedding": "words", "": "all-linear"}
    for seed, (name, preset) in enumerate((("a", PRESET[kind][0]), ("b", others[OTHERWISE.get(kind, "")]))):
        adapt(bank, loaded, name, kind, [preset], seed)
    bank.use({"b": 1.0})
    y = predict(loaded)
    bank.use({"a": 1.0, "b": 1.0})
    assert not torch.allclose(predict(loaded), y, atol=1e-4)
    bank.remove("a")
    bank.use({"b": 1.0})
    torch.testing.assert_close(predict(loaded), y, rtol=1e-6, atol=1e-6)
    with pytest.raises(UserError, match="E-ADAPT-02"):
        bank.add("b", dict.fromkeys(list(bank.sites), (module, small.some_config(module))), small.stream_of)


def test_the_layers_of_a_base_are_the_same_with_an_adapter_on_it(loaded: Family) -> None:
    def fitting() -> list[str]:
        return [name for name, layer in loaded.layers().items() if lora.fits(layer)]

    names = fitting()
    bank = Bank(loaded.components)
    adapt(bank, loaded, "a", "lora", ["attention", "text-encoder"])
    assert fitting() == names


def test_an_adapter_on_a_block_and_one_inside_it_leave_in_any_order(loaded: Family) -> None:
    y, modules = predict(loaded), small.modules(loaded)
    for first, second in (("houlsby", "lora"), ("lora", "houlsby")):
        bank = Bank(loaded.components)
        targets = {"houlsby": ["blocks"], "lora": ["attention"]}
        alone = []
        for kind in (first, second):
            adapt(bank, loaded, kind, kind, targets[kind])
            bank.use({kind: 1.0})
            alone.append(predict(loaded))
        bank.use({"lora": 1.0, "houlsby": 1.0})
        assert all(not torch.allclose(predict(loaded), one, atol=1e-4) for one in alone)
        bank.remove(first)
        bank.use({second: 1.0})
        torch.testing.assert_close(predict(loaded), alone[1], rtol=1e-6, atol=1e-6)
        bank.eject()
        assert small.modules(loaded) == modules
        assert torch.equal(predict(loaded), y)


PARTS = {
    "cross-attention": ".attn2.", "qv": ".to_", "attention": ".attn", "up-blocks": "unet.up_blocks.", "all-linear": "unet.",
    "text-encoder": "text_encoder.text_model.",
}  # fmt: skip


@pytest.mark.parametrize("preset", PARTS)
def test_every_preset_finds_its_layers_and_no_others(loaded: Family, preset: str) -> None:
    fitting = {name: layer for name, layer in loaded.layers().items() if lora.fits(layer)}
    assert set(loaded.presets) == {*PARTS, "all-linear+conv", "blocks", "cross-attention-blocks", "words"}
    chosen = choose_sites(fitting, [preset], loaded.presets)
    blocks = 2 if preset in ("text-encoder", "up-blocks") else 4  # one attention in a down block, one in the middle, two in an up block
    each = {"cross-attention": 4, "qv": 4, "attention": 8, "up-blocks": 8, "all-linear": 12, "text-encoder": 6}
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


@pytest.mark.parametrize("name", ["linear", "conv3"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_way_to_route_mixes_devices(kind: str, name: str) -> None:
    """On torch's device without memory, which takes no tensor of the CPU beside its own, as CUDA does not."""
    if kind in OTHERWISE and name == "conv3":
        name = {"attention": "attention-biased", "embedding": "embedding-broad"}[OTHERWISE[kind]]
    _, layer, x = kind_and_layer(kind, name)
    shape = layer(x).shape
    bank = banked(layer, [kind] * 3, (2, 3, 1))
    bank.components["unet"].to("meta")
    elsewhere = x.to("meta")
    keys, device = torch.arange(4, device="meta"), torch.device("meta")
    with pytest.raises(RuntimeError):  # the control
        run(bank, elsewhere) + torch.ones(shape)
    strengths: list[Any] = [{"a": 1.0}, {"a": 0.5, "c": -1.0}, {"a": torch.ones(4), "b": small.numbers((4,))}]
    for strength in strengths:
        bank.use(strength)
        assert bank.route
        assert bank.route.strength.device == device, "one copy, and not one for each layer"
        assert run(bank, elsewhere).shape == shape
    for strength in (torch.ones(1), small.numbers((4,))):
        for slots in ([0, 0, 1, 1], [0, 1, 1, 2], [2, 2, 2, 2], [2, 0, 1, 0]):
            for given in (None, keys):
                bank.route = Route(strength, slots, keys=given)
                assert run(bank, elsewhere).shape == shape
