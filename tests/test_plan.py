"""Measures that let a run fit into little memory: blocks computed again, weights in fewer bits, and the plan that chooses among them."""

import importlib
import json
import math
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sdlora import api, devices, estimate, family, layers, learners, lookup, plan, quantise
from sdlora.adapter import Bank, Delta
from sdlora.adapters import lora
from sdlora.config import Train
from sdlora.data import cache
from sdlora.errors import RESOURCES, UserError
from sdlora.family import RECOMPUTED, Family
from sdlora.quantise import Int8, Quantised, multiply_integers

CPU = torch.device("cpu")
TARGETS = ["all-linear+conv", "text-encoder"]
ELSEWHERE = ("full", "houlsby", "prefix", "prompt")
"""Kinds that sit on no packed layer: refused there, or on blocks and embeddings."""


class Alive(TorchDispatchMode):
    """Bytes of the tensors that operators made and somebody still holds, now and at most."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self.seen = {one.untyped_storage()._cdata for one in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor):
                self._count(one.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage._cdata in self.seen:
            return
        size = storage.nbytes()
        self.seen.add(storage._cdata)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def adapted(loaded: Family, kind: str = "lora", targets: list[str] = TARGETS, **settings: Any) -> Bank:
    bank, module = Bank(loaded.components), lookup.find("adapters", kind)
    patterns = [pattern for preset in targets for pattern in loaded.presets.get(preset, [preset])]
    config = small.some_config(module).model_copy(update=settings)
    bank.add("mira", dict.fromkeys(small.matching(loaded, module, patterns), (module, config)), small.stream_of)
    small.randomise(bank, "mira", size=0.05)
    bank.use({"mira": 1.0})
    return bank


def gradients(loaded: Family, bank: Bank, side: int = 32) -> tuple[dict[str, Tensor], Alive, int]:
    """Of a forward and backward of two samples; what was alive meanwhile, and bytes that were, at the end of the forward."""
    bank.use({"mira": 1.0})  # as each step of a training does
    x = small.numbers((2, loaded.latent_channels, side // loaded.latent_factor, side // loaded.latent_factor))
    tokens = loaded.tokens(["mira", "a ball"])
    weights = [p for module in loaded.parts().values() for p in (*module.parameters(), *module.buffers())]
    with Alive([*weights, x, tokens]) as alive:
        said = loaded.predict(x, torch.tensor([10, 700]), loaded.states(tokens))
        held = alive.now
        said.square().mean().backward()
    found = {name: p.grad.clone() for name, p in bank.parameters("mira").items() if p.grad is not None}
    for p in bank.parameters("mira").values():
        p.grad = None
    return found, alive, held


# ---------------------------------------------------------------- blocks computed again


@pytest.mark.parametrize("name", [pytest.param("sd1", marks=pytest.mark.slow), "sdxl"])
def test_blocks_computed_again_give_the_same_gradients_for_less_memory(name: str, families: dict[str, Path]) -> None:
    loaded = family.load(family.find(str(families[name])), CPU, torch.float32)
    bank = adapted(loaded)
    plain, before, held = gradients(loaded, bank)
    loaded.blocks(RECOMPUTED)
    again, after, kept = gradients(loaded, bank)
    loaded.blocks(None)
    assert plain.keys() == again.keys()
    assert len(plain) > 0.8 * len(bank.parameters("mira")), "all but what the network is not told of"
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max()))
    assert kept < held / 3, (kept, held, before.most, after.most)
    assert after.most < before.most / 1.5
    assert gradients(loaded, bank)[2] == held, "and it can be undone"


def test_nothing_in_a_text_encoder_drops_out_when_its_layers_are_computed_again(loaded: Family) -> None:
    for module in loaded.text_encoder.modules():  # type: ignore[attr-defined]
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5
    bank, tokens = adapted(loaded), loaded.tokens(["mira"])
    usual = loaded.states(tokens)
    calls = list[nn.Module]()

    def counted(block: Any, *given: Any) -> Any:
        calls.append(block)
        return RECOMPUTED(block, *given)

    loaded.blocks(counted)
    assert torch.equal(loaded.states(tokens), usual)
    assert len(calls) == 2, "each of its layers"
    loaded.text_encoder.train()  # type: ignore[attr-defined]
    assert not torch.equal(loaded.states(tokens), usual), "the control: in training it would drop out half"
    bank.eject()


@pytest.mark.parametrize("name", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_what_a_plan_counts_is_what_is_held(name: str, families: dict[str, Path]) -> None:
    """The law of two small forwards against all tensors alive at the end of a real one."""
    loaded = family.load(family.find(str(families[name])), CPU, torch.float32)
    run = small.settled(families[name], families[name], adapter__targets=TARGETS, train__batch_size=2, data__resolution_px=64)
    measured = estimate.memory(run, loaded, learners.pieces(run, loaded), [(128, 128)])
    bank = Bank(loaded.components)
    bank.add("mira", learners.pieces(run, loaded), small.stream_of)
    bank.use({"mira": 1.0})
    told = {"plain": 2 * measured.activations, "checkpointed": 2 * measured.checkpointed}
    _, _, held = gradients(loaded, bank, 128)
    assert told["plain"] == pytest.approx(held, rel=0.1)
    loaded.blocks(RECOMPUTED)
    _, alive, kept = gradients(loaded, bank, 128)
    assert kept < told["checkpointed"] < alive.most <= (1 + plan.BORROWED) * told["checkpointed"], (kept, told, alive.most)


# ---------------------------------------------------------------- weights in fewer bits


def unpacked(layer: Quantised) -> nn.Linear:
    """The dense layer that a packed one stands for."""
    dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    with torch.no_grad():
        dense.weight.copy_(layer.whole())
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)
    return dense.requires_grad_(False)


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A layer whose numbers are the same whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Linear(inputs, outputs, bias)


@pytest.mark.parametrize("how", quantise.BLOCKS)
@pytest.mark.parametrize("kind", [name for name in lookup.names("adapters") if name not in ELSEWHERE])
def test_a_kind_on_packed_weights_is_the_kind_on_what_they_stand_for(kind: str, how: str) -> None:
    module, layer = lookup.find("adapters", kind), linear(48, 40)
    packed = Quantised(layer, how, CPU)
    for one in (packed, unpacked(packed)):
        assert module.fits(one)
    said = dict[str, list[Tensor]]()
    for name, one in (("packed", packed), ("dense", unpacked(packed))):
        bank = Bank({"unet": nn.ModuleDict({"to_q": one})})
        bank.add("mira", {"unet.to_q": (module, small.some_config(module))}, small.stream_of)
        small.randomise(bank, "mira", size=0.1)
        bank.use({"mira": 0.7})
        x = small.numbers((3, 5, 48)).requires_grad_()
        y = bank.components["unet"]["to_q"](x)  # type: ignore[index]
        y.square().sum().backward()
        said[name] = [y.detach(), x.grad, *(p.grad for p in bank.parameters("mira").values())]  # type: ignore[list-item]
    for a, b in zip(said["packed"], said["dense"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    rounding = float((packed.whole() - layer.weight).norm() / layer.weight.norm())
    assert rounding < {"8bit": 0.02, "nf4": 0.12}[how]
    assert rounding > {"8bit": 0.002, "nf4": 0.05}[how], "the control: which is rounded"


@pytest.mark.parametrize("bias", [True, False])
def test_products_of_integers_are_what_their_rounding_says(bias: bool) -> None:
    layer, x = linear(48, 40, bias), small.numbers((4, 9, 48))
    whole = layer.weight.detach().clone()
    packed = Int8(layer, CPU)
    assert packed.weight.dtype == torch.int8
    assert packed.weight.abs().max() == 127, "no integer is wasted, and none wraps around"
    steps = whole.abs().amax(1, keepdim=True) / 127
    assert ((packed.whole() - whole) / steps).abs().max() <= 0.51
    x.requires_grad_()
    said = packed(x)
    (grad,) = torch.autograd.grad(said, x, weight := small.numbers((4, 9, 40), 1))

    def near(rows: Tensor) -> Tensor:  # the oracle, in float64: each row in steps of a 127th of its largest number
        step = rows.abs().amax(-1, keepdim=True) / 127
        return (rows / step).round() * step

    dense = packed.whole().double()
    torch.testing.assert_close(
        said.double(), near(x.detach().double()) @ dense.t() + (layer.bias.double() if bias else 0), rtol=1e-4, atol=1e-4
    )
    scaled = near(weight.double() * packed.scale.double()) / packed.scale.double()
    torch.testing.assert_close(grad.double(), scaled @ dense, rtol=1e-4, atol=1e-4)
    apart = (said - layer(x)).norm() / layer(x).norm()
    assert 1e-3 < apart < 0.02, "near the layer in full, and not it"
    few = packed(x[:1])  # fewer rows than CUDA's kernels take are multiplied in the run's own precision
    torch.testing.assert_close(few, F.linear(x[:1], packed.whole(), layer.bias))


@pytest.mark.parametrize("saturates", [True, False])
def test_integers_are_multiplied_right_on_processors_that_saturate(saturates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if saturates:
        monkeypatch.setattr(quantise, "adds_without_saturation", lambda: False)
    left, right = torch.full((32, 64), 127, dtype=torch.int8), torch.full((64, 16), -127, dtype=torch.int8)
    right[:, ::2] = 126
    assert torch.equal(multiply_integers(left, right).long(), left.long() @ right.long())


def test_adapters_on_integers_are_on_what_the_layers_say(loaded: Family) -> None:
    """In one step of differentiation with the layers, or after them: the same, but for the rounding of sums."""
    loaded.place(CPU, "int8")
    bank = adapted(loaded, "lora", ["all-linear"])
    together, _, _ = gradients(loaded, bank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Delta, "at_once", lambda *_: None)
        patch.setattr(lora.Adapter, "at_once", lambda *_: None)
        singly, _, _ = gradients(loaded, bank)
    assert together.keys() == singly.keys() != set()
    for key, gradient in singly.items():
        assert (together[key] - gradient).norm() <= 0.03 * gradient.norm(), key


def test_a_base_that_does_not_bear_integers_is_refused(base: Path, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small.settled(squares, base, train__base_weights="int8", train__steps=2)
    events = list(api.train(run, tmp_path / "run"))
    assert any("products in 8-bit integers: its loss is" in event.text for event in events)
    monkeypatch.setattr(quantise, "rounded", coarse)
    with pytest.raises(UserError, match="E-QUANT-04"):
        list(api.train(run, tmp_path / "coarse"))
    assert not (tmp_path / "coarse" / "config.toml").exists()


def coarse(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as -1, 0 and 1."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-30)
    return (rows / scale).round().to(torch.int8), scale


@pytest.mark.parametrize(("kind", "target"), [("houlsby", "blocks"), ("prefix", "cross-attention-blocks"), ("lora", "all-linear")])
def test_a_network_of_packed_weights_is_that_of_what_they_stand_for(kind: str, target: str, loaded: Family) -> None:
    """Kinds that call the frozen layers inside a block among them, and the blocks computed again."""
    loaded.place(CPU, "nf4")
    loaded.blocks(RECOMPUTED)
    bank = adapted(loaded, kind, [target])
    packed, _, _ = gradients(loaded, bank)
    bank.eject()
    for component in loaded.components.values():
        for name, layer in [*component.named_modules()]:
            if isinstance(layer, Quantised):
                parent, _, last = name.rpartition(".")
                setattr(component.get_submodule(parent), last, unpacked(layer))
    dense, _, _ = gradients(loaded, adapted(loaded, kind, [target]))
    assert packed.keys() == dense.keys() != set()
    for key, gradient in dense.items():
        torch.testing.assert_close(packed[key], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_memory_is_counted_on_a_cpu_in_any_precision(dtype: torch.dtype, base: Path) -> None:
    """Which is where a base lies before its plan is made, whatever it is trained on."""
    run, found = small.settled(base, base, train__precision="bf16"), []
    for one in (dtype, torch.float32):
        loaded = family.load(family.find(str(base)), CPU, one)
        found.append(estimate.memory(run, loaded, learners.pieces(run, loaded), [(64, 64)]))
    assert found[0].activations == pytest.approx(found[1].activations, rel=0.15)
    assert found[0].weights == found[1].weights


@pytest.mark.parametrize("how", quantise.BLOCKS)
def test_packed_weights_are_as_small_as_was_counted_and_kept_alone_for_the_backward_pass(how: str) -> None:
    layer = nn.Linear(512, 256).to(torch.bfloat16)
    packed = Quantised(layer, how, CPU)
    held = [packed.weight, packed.absmax, packed.nested_absmax]
    assert sum(one.nbytes for one in held) == quantise.packed_bytes(layer.weight.shape, how)
    whole = Int8(layer, CPU)
    assert whole.weight.nbytes + whole.scale.nbytes == quantise.packed_bytes(layer.weight.shape, "int8")
    assert quantise.packed_bytes(layer.weight.shape, how) < {"8bit": 0.51, "nf4": 0.26}[how] * 2 * 512 * 256
    assert packed.whole().dtype == torch.bfloat16
    saved = list[int]()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one.nbytes) or one.detach(), lambda one: one):
        packed(torch.zeros(1, 512, dtype=torch.bfloat16, requires_grad=True))
        assert sum(saved) == 0
        layer(torch.zeros(1, 512, dtype=torch.bfloat16, requires_grad=True))
        assert sum(saved) >= layer.weight.nbytes, "the control: a dense layer keeps its weight"


def test_what_cannot_be_on_packed_weights_is_refused(loaded: Family) -> None:
    layers = len(quantise.chosen(loaded.components["unet"]))
    numbers = quantise.numbers(loaded.components["unet"])
    loaded.place(CPU, "nf4")
    packed = [name for name, layer in loaded.layers().items() if isinstance(layer, Quantised)]
    assert sum(name.startswith("unet") for name in packed) == layers > 10
    assert quantise.numbers(loaded.components["unet"]) == numbers
    assert not any("time_emb" in name for name in packed)
    bank = adapted(loaded)
    with pytest.raises(UserError, match=r"E-QUANT-02.*merged"):
        bank.merge("mira")
    assert bank.adapters == ["mira"]
    bank.eject()
    with pytest.raises(UserError, match=r"E-QUANT-03.*full"):
        adapted(loaded, "full")


def test_bitsandbytes_is_named_where_it_is_missing(loaded: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r'E-QUANT-01.*pip install "sdlora\[optim\]"'):
        loaded.place(CPU, "nf4")


@pytest.mark.slow
@pytest.mark.parametrize("how", quantise.WAYS)
def test_a_run_on_packed_weights_learns_goes_on_and_its_pack_opens_on_the_full_base(
    how: str, squares: Path, base: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"train__base_weights": how, "validation__share": 0.4, "train__lr": 3e-3, "adapter__targets": TARGETS[:1]}
    whole = small.settled(squares, base, **changes, train__steps=20, train__save_every=10, train__gradient_checkpointing="on")
    list(api.train(whole, tmp_path / "whole"))
    losses = [one["data"]["loss"] for one in log(tmp_path / "whole") if one["kind"] == "validation"]
    assert losses[-1] < losses[0]
    assert how in next(one["text"] for one in log(tmp_path / "whole") if "memory: " in one.get("text", ""))
    stop = api.Stop()
    for event in api.train(whole, tmp_path / "parts", stop):
        stop.stop = stop.stop or event.kind == "checkpoint"
    list(api.train(whole, tmp_path / "parts"))
    packs = [api.open_pack(tmp_path / run / "mira.safetensors").tensors for run in ("whole", "parts")]
    assert all(torch.equal(packs[0][name], packs[1][name]) for name in packs[0])
    studio = api.open_studio([api.open_pack(tmp_path / "whole" / "mira.safetensors")], str(base))
    assert studio.bank.sites
    assert not any(isinstance(site.layer, Quantised) for site in studio.bank.sites.values())


def log(run: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in (run / "events.jsonl").read_text().splitlines())


def test_states_of_packed_text_encoders_are_kept_apart(loaded: Family) -> None:
    names = [cache._identity(loaded, ["text_encoder"])]
    loaded.place(CPU, "8bit")
    names.append(cache._identity(loaded, ["text_encoder"]))
    assert names[0] != names[1]


# ---------------------------------------------------------------- the plan

GB = 10**9
MEASURED = estimate.Measured({"full": 5 * GB, "8bit": 3 * GB, "int8": 3 * GB, "nf4": 2 * GB}, GB // 2, 6 * GB, GB, 2)


def chosen(free: float | None, **settings: Any) -> tuple[str, bool, int]:
    found = plan.choose(Train(**settings), MEASURED, None if free is None else round(free * GB))
    assert found.limit is None or found.peak <= found.limit
    return found.weights, found.checkpointing, found.samples


def test_the_settings_decide_which_measures_are_taken() -> None:
    """Weights 5, adapter 0.5; of two samples 12 are kept, or 2; of these again 0.4 are borrowed."""
    assert chosen(None) == ("full", False, 0)
    assert chosen(22.31) == ("full", False, 0)
    assert chosen(22.29) == chosen(8.31) == ("full", True, 0)
    assert chosen(8.29) == chosen(6.91) == ("full", True, 1), "less than a batch at once"
    assert chosen(22.29, gradient_checkpointing="off") == chosen(13.91, gradient_checkpointing="off") == ("full", False, 1)
    assert chosen(None, gradient_checkpointing="on") == ("full", True, 0)
    assert chosen(6.89, base_weights="auto") == ("8bit", True, 1)
    assert chosen(4.89, base_weights="auto") == chosen(3.91, base_weights="auto") == ("nf4", True, 1)
    assert chosen(None, base_weights="nf4") == ("nf4", False, 0)
    assert chosen(None, memory_gb=8.31) == chosen(99, memory_gb=8.31) == ("full", True, 0), "the setting counts, whatever is free"
    with pytest.raises(UserError, match=r"E-MEM-02.*6\.89 GB.*22\.30 GB.*8\.30 GB.*6\.90 GB.*train\.base_weights to auto") as caught:
        chosen(6.89)
    assert caught.value.exit_code == RESOURCES


def test_a_run_goes_on_over_the_weights_it_began_with() -> None:
    auto = Train(base_weights="auto")
    assert plan.choose(auto, MEASURED, None, "nf4").weights == "nf4", "there is room for more"
    assert plan.choose(auto, MEASURED, 5 * GB, "8bit").weights == "8bit"
    assert plan.choose(Train(base_weights="8bit"), MEASURED, None, "nf4").weights == "8bit", "the settings name others"
    with pytest.raises(UserError, match=r"E-MEM-02.*began on weights in full"):
        plan.choose(auto, MEASURED, 5 * GB, "full")


@pytest.mark.slow
def test_what_is_free_when_a_run_goes_on_does_not_change_its_weights(
    squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, packs, room = small.settled(squares, base, train__base_weights="auto", adapter__targets=TARGETS), {}, 0
    choose = plan.choose

    def tight(train: Train, measured: Any, _: int | None, before: str = "") -> plan.Plan:
        at_most = plan.Plan("8bit", True, 1, measured.parts("8bit", True, 1), None)
        return choose(train, measured, at_most.peak if room == 0 else None, before)

    monkeypatch.setattr(plan, "choose", tight)
    for name, stops in (("whole", False), ("parts", True)):
        room, stop = 0, api.Stop()
        for event in api.train(run, tmp_path / name, stop):
            stop.stop = stops and (stop.stop or event.kind == "checkpoint")
        room = 1
        if stops:
            list(api.train(run, tmp_path / name))
        assert [" in 8bit" in one["text"] for one in log(tmp_path / name) if "memory: " in one.get("text", "")] == [True] * (1 + stops)
        packs[name] = api.open_pack(tmp_path / name / "mira.safetensors").tensors
    for key, tensor in packs["whole"].items():
        torch.testing.assert_close(packs["parts"][key], tensor, rtol=2e-3, atol=1e-5)
    list(api.train(run, tmp_path / "other"))
    assert any("weights in full" in one.get("text", "") for one in log(tmp_path / "other")), "the control: nothing was before it"


@pytest.mark.slow
def test_a_run_takes_the_measures_that_its_plan_says(squares: Path, base: Path, tmp_path: Path) -> None:
    run = small.settled(squares, base, adapter__targets=TARGETS)
    loaded = family.load(family.find(str(base)), CPU, torch.float32)
    measured = learners.memory(run, loaded, learners.pieces(run, loaded), dataset(run, loaded, tmp_path))
    ends = [plan.choose(Train(batch_size=2, gradient_checkpointing=one), measured, None).peak for one in ("off", "on")]
    assert ends[1] < ends[0]
    packs = {}
    for name, bytes_ in (("wide", ends[0]), ("narrow", ends[1])):
        tight = small.settled(squares, base, adapter__targets=TARGETS, train__memory_gb=bytes_ / 1e9)
        (line,) = (one["text"] for one in log_of(tight, tmp_path / name) if one.get("text", "").startswith("memory: "))
        assert (", no gradient checkpointing" in line) == (name == "wide"), line
        packs[name] = api.open_pack(tmp_path / name / "mira.safetensors").tensors
    for key, tensor in packs["wide"].items():
        torch.testing.assert_close(packs["narrow"][key], tensor, rtol=2e-3, atol=1e-5)
    with pytest.raises(UserError, match="E-MEM-02"):
        list(api.train(small.settled(squares, base, train__memory_gb=1e-4), tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    assert any("memory: " in note for note in api.check(tight, tmp_path)[0]["notes"])


def log_of(run: Any, out: Path) -> list[dict[str, Any]]:
    list(api.train(run, out))
    return list(log(out))


def dataset(run: Any, loaded: Family, folder: Path) -> Any:
    from sdlora.data import ledger

    return ledger.fit_dataset(ledger.read_dataset(run, folder / "cache"), run, loaded)


def test_a_card_says_what_the_first_step_took(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small.settled(squares, base, train__steps=2)
    assert not any("first step took" in one.get("text", "") for one in log_of(run, tmp_path / "cpu")), "the CPU does not say"
    monkeypatch.setattr(devices, "peak_bytes", lambda _: 3 * GB)
    measured = list[int]()
    monkeypatch.setattr(devices, "forget_peak", lambda _: measured.append(len(list(log(tmp_path / "card")))))
    run = small.settled(squares, base, train__steps=2, preview__every=1)
    told = log_of(run, tmp_path / "card")
    previews = [n for n, one in enumerate(told) if one["kind"] == "preview"]
    assert previews[0] < measured[0] <= previews[1], "what the preview before the first step takes is no part of it"
    (note,) = (one for one in told if "first step took" in one.get("text", ""))
    assert note["text"].startswith("memory: the first step took 3.00 GB at most, ")
    assert note["data"]["peak"] == 3 * GB
    made = plan.Plan("full", False, 0, {"base": GB, "adapter": 0, "activations": 5 * GB, "total": 6 * GB}, None)
    assert made.peak == 8 * GB
    assert made.compared(6 * GB).endswith("6.00 GB at most, 75% of what was counted")


# ---------------------------------------------------------------- whose attention


def test_attention_is_what_runs(monkeypatch: pytest.MonkeyPatch, squares: Path, base: Path, tmp_path: Path) -> None:
    def broken(_: Tensor) -> None:
        raise RuntimeError("no kernel image is available")

    def works(_: Tensor) -> None:
        pass

    def chosen(wanted: str) -> str:
        return devices.attention(wanted, CPU, torch.float32)

    assert devices._runs(devices._fused, CPU, torch.float32) is None
    assert chosen("auto") == chosen("sdpa") == "sdpa"
    monkeypatch.setattr(devices, "_xformers", broken)
    with pytest.raises(UserError, match=r"E-CONF-11.*no kernel image is available"):
        list(api.train(small.settled(squares, base, train__attention="xformers"), tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(devices, "_fused", broken)
    assert chosen("auto") == "sdpa", "neither runs: torch's plain way does"
    monkeypatch.setattr(devices, "_xformers", works)
    assert chosen("auto") == chosen("xformers") == "xformers"
    assert chosen("sdpa") == "sdpa"


# ---------------------------------------------------------------- what is laid aside, what overflows


def test_parts_laid_aside_come_to_hand_when_they_are_asked(loaded: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    moves, tokens = list[tuple[str, str]](), loaded.tokens(["mira"])
    pixels, usual = torch.zeros(1, 3, 32, 32), loaded.states(tokens)
    for name in ("vae", "text_encoder"):
        monkeypatch.setattr(loaded.parts()[name], "to", lambda where, name=name: moves.append((name, str(where))))
    loaded.lay_aside(["vae", "text_encoder"])
    assert moves == [("vae", "cpu"), ("text_encoder", "cpu")]
    moves.clear()
    loaded.encode(pixels)
    assert torch.equal(loaded.states(tokens), usual)
    assert moves == [("vae", "cpu")] * 2 + [("text_encoder", "cpu")] * 2
    moves.clear()
    loaded.device = torch.device("meta")
    with loaded.at_hand("vae", "unet"):
        assert moves == [("vae", "meta")], "the network was never laid aside"
    assert moves[1:] == [("vae", "cpu")]


def test_a_decoder_that_overflows_in_half_precision_is_asked_again_in_full(loaded: Family) -> None:
    vae: Any = loaded.vae  # type: ignore[attr-defined]
    latents = small.numbers((1, 4, 8, 8))
    vae.to(torch.float16)
    sound = loaded.decode(latents)
    assert sound.isfinite().all()
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(3e5)
        vae.decoder.conv_in.bias.mul_(3e5)
    with torch.no_grad():
        assert not vae.decode(latents.half()).sample.isfinite().all(), "the control: it overflows"
    assert loaded.decode(latents).isfinite().all()
    assert vae.dtype == torch.float16


def test_a_number_of_bits_is_no_more_than_it_says() -> None:
    layer = nn.Linear(512, 512)
    assert math.isclose(8 * quantise.packed_bytes(torch.Size((512, 512)), "nf4") / layer.weight.numel(), 4.127, abs_tol=1e-2)
    assert layers.shape_of(Quantised(layer, "nf4", CPU)) == layer.weight.shape
