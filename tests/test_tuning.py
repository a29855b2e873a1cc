"""Layers with settings and rates of their own, text encoders that stop, searches, averages, and what a rate means at each rank."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bases
import pytest
import small
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from sdlora import api, average, family, learners, search
from sdlora.adapter import Bank
from sdlora.adapters import lora
from sdlora.errors import UserError
from sdlora.events import Event
from sdlora.family import Family
from sdlora.layers import choose_sites
from sdlora.packs import keys
from sdlora.packs.file import load
from sdlora.packs.writing import agreed


def loaded(base: Path) -> Family:
    return family.load(family.find(str(base)), torch.device("cpu"), torch.float32)


# ---------------------------------------------------------------- targets


def test_presets_mean_what_they_say(tmp_path: Path) -> None:
    one = loaded(bases.make_sdxl(tmp_path / "sdxl"))
    fitting = [name for name, layer in one.layers().items() if lora.fits(layer)]
    others = ("blocks", "cross-attention-blocks", "words")  # of other kinds than LoRA
    sites = {name: choose_sites(fitting, [name], one.presets) for name in one.presets if name not in others}
    assert {name.rpartition(".")[2] for name in sites["qv"]} == {"to_q", "to_v"}
    assert all(name.startswith("unet.up_blocks.") and ".attn" in name for name in sites["up-blocks"])
    assert all(name.startswith("unet.up_blocks.0.attentions.1.") for name in sites["style-block"])
    assert all(name.startswith("unet.up_blocks.0.attentions.0.") for name in sites["content-block"])
    assert set(sites["attention"]) < set(sites["all-linear"]) < set(sites["all-linear+conv"])
    assert any(name.endswith("samplers.0.conv") for name in sites["all-linear+conv"])
    with pytest.raises(UserError, match="did you mean style-block"):
        choose_sites(fitting, ["style-blok"], one.presets)


# ---------------------------------------------------------------- blocks

BLOCKS = [
    {"match": "unet.up_blocks.*", "rank": 4, "alpha": 2.0, "lr_factor": 0.5},
    {"match": "*.to_k", "rank": 3},
    {"match": "text_encoder.*.k_proj", "lr_factor": 0.0},
]


def test_layers_have_a_rank_an_alpha_and_a_rate_of_their_own(squares: Path, base: Path, tmp_path: Path) -> None:
    """The last table that says something counts; diffusers makes the same of a pack whose ranks differ."""
    run = small.settled(squares, base, adapter__blocks=BLOCKS, adapter__alpha=1.0, train__steps=3)
    events = list(api.train(run, tmp_path / "run"))
    found = keys.by_module(load_file(tmp_path / "run" / "mira.safetensors"))
    shape = {module: (len(one["lora_down.weight"]), float(one["alpha"])) for module, one in found.items()}
    ranks = {(up, leaf): 4 if up == "up_blocks" else 2 for up in ("up_blocks", "down_blocks") for leaf in ("to_q", "to_v")}
    ranks |= {("up_blocks", "to_k"): 3, ("down_blocks", "to_k"): 3}
    for (block, leaf), rank in ranks.items():
        downs = [one["lora_down.weight"] for name, one in found.items() if "unet" in name and block in name and leaf in name]
        assert {int(torch.linalg.matrix_rank(down.float().flatten(1))) for down in downs} == {rank}
    unet = {own for name, own in shape.items() if "unet" in name}
    assert unet == {(4, 4.0)}, "readers take one rank and one alpha for all of a component"
    assert not any("k_proj" in name for name in shape)
    assert any("q_proj" in name for name in shape)
    rows = {event.data["adapted"]["part"]: event.data["adapted"] for event in events if "adapted" in event.data}
    assert rows["unet up"]["ranks"] == [3, 4]
    assert rows["unet up"]["lr"] == [5e-3]
    assert rows["unet down"]["lr"] == [1e-2]
    assert 0 < rows["unet up"]["parameters"] < sum(row["parameters"] for row in rows.values())
    assert "What it adapts" in (tmp_path / "run" / "report.html").read_text()
    as_diffusers_has_it(base, tmp_path / "run" / "mira.safetensors")


@pytest.mark.parametrize("kind", ["lora", "subspace"])
def test_the_table_counts_each_number_once_and_no_others_adapter(kind: str, squares: Path, base: Path) -> None:
    one = loaded(base)
    bank, said = Bank(one.components), []
    for name in ("mira", "tavi"):
        run = small.settled(squares, base, name=name, adapter={"kind": kind, **({"dimension": 50} if kind == "subspace" else {"rank": 2})})
        bank.add(name, learners.pieces(run, one), small.stream_of)
        said.append(learners.adapted(bank, run, one))
    assert said[0] == said[1], "whatever sits beside it"
    sentence, rows = said[0]
    trained = sum(p.numel() for p in bank.parameters("mira").values())
    assert sum(row["parameters"] for row in rows) == trained
    assert f"{trained:,} parameters trained" in sentence
    whole = sum(p.numel() for module in loaded(base).components.values() for p in module.parameters())
    assert f"of {whole:,}," in sentence


def as_diffusers_has_it(base: Path, pack: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    x, t, states = small.numbers((1, 4, 8, 8)), torch.tensor([400]), small.numbers((1, small.TOKENS, 16), 1)
    with torch.no_grad():
        plain = pipe.unet(x, t, states).sample
        pipe.load_lora_weights(pack)
        theirs = pipe.unet(x, t, states).sample
        studio = api.open_studio([load(pack)], str(base))
        studio.bank.use({"mira": 1.0})
        ours = studio.family.predict(x, t, states)
    assert (theirs - plain).abs().max() > 1e-4, "the control: the pack does something"
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_one_alpha_in_a_pack_changes_no_difference() -> None:
    def module(name: str, rank: int, alpha: float) -> dict[str, Tensor]:
        down, up = small.numbers((rank, 6)), small.numbers((5, rank), 1)
        return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}

    names = ("lora_unet_a", "lora_unet_b", "lora_unet_c")
    before = {**module(names[0], 2, 1.0), **module(names[1], 3, 4.0), **module(names[2], 4, 1.0)}
    after = agreed(before)
    assert {float(after[f"{name}.alpha"]) for name in names} == {4.0}
    for name, change in differences(before).items():
        torch.testing.assert_close(differences(after)[name], change)


def test_a_block_that_matches_nothing_is_an_error(squares: Path, base: Path) -> None:
    run = small.settled(squares, base, adapter__blocks=[{"match": "unet.upblocks.*", "rank": 4}])
    with pytest.raises(UserError, match=r"adapter\.blocks\.0\.match"):
        learners.pieces(run, loaded(base))
    with pytest.raises(UserError, match="E-CONF-01"):
        small.settled(squares, base, adapter__kind="full", adapter__rank=None, adapter__blocks=[{"match": "unet.*", "rank": 4}])
    nothing = small.settled(squares, base, adapter__blocks=[{"match": "*", "lr_factor": 0.0}])
    with pytest.raises(UserError, match="E-ADAPT-05"):
        learners.pieces(nothing, loaded(base))


# ---------------------------------------------------------------- text encoder


def weights(out: Path, step: int) -> dict[str, Tensor]:
    return load_file(out / "checkpoints" / f"ckpt-{step:06d}" / "adapter.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_text_encoder_stops_where_it_is_told(optimizer: str, squares: Path, base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"train__steps": 4, "train__save_every": 2, "optimizer__weight_decay": 0.5, "optimizer__kind": optimizer}
    run = small.settled(squares, base, train__text_encoder_steps=2, **options)
    list(api.train(run, tmp_path / "run"))
    list(api.train(small.settled(squares, base, **options), tmp_path / "on"))
    two, last, on = weights(tmp_path / "run", 2), weights(tmp_path / "run", 4), weights(tmp_path / "on", 4)
    text = [name for name in two if "text_encoder" in name]
    assert text
    assert all(torch.equal(two[name], last[name]) for name in text)
    assert not any(torch.equal(two[name], last[name]) for name in two if name not in text)
    assert not all(torch.equal(two[name], on[name]) for name in text), "the control: without it they go on"
    if optimizer != "adamw":
        return
    stop = api.Stop()
    for event in api.train(run, tmp_path / "again", stop):
        stop.stop = stop.stop or (event.kind == "step" and event.step == 3)
    list(api.train(run, tmp_path / "again"))
    again = weights(tmp_path / "again", 4)
    assert all(torch.equal(again[name], last[name]) for name in last)


# ---------------------------------------------------------------- what a rate means


def first_change(rank: int, alpha: float) -> list[float]:
    """Of some layers: how far AdamW's first step moves ΔW along the gradient that the weight has."""
    found = []
    for i, (rows, columns) in enumerate([(24, 64), (64, 64), (96, 128), (128, 256), (320, 320)]):
        layer = torch.nn.Linear(columns, rows, bias=False)
        bank = Bank({"unet": torch.nn.ModuleDict({"layer": layer})})
        config = lora.Config(rank=rank, alpha=alpha)
        bank.add("a", {"unet.layer": (lora, config)}, lambda dotted: small.stream_of(dotted))
        ((_, frozen, delta),) = bank.deltas("a")
        gradient = small.numbers((rows, columns), i)
        optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-3)
        (delta.difference(frozen) * gradient).sum().backward()
        optimizer.step()
        found.append(-float((delta.difference(frozen) * gradient).sum() / gradient.norm()))
    return found


def test_a_rate_means_the_same_at_every_rank() -> None:
    """The change along the gradient; the control: with alpha = rank it grows with the rank."""

    def median(rank: int, alpha: float) -> float:
        moved, usual = first_change(rank, alpha), first_change(16, 16.0)
        return float(torch.tensor([a / b for a, b in zip(moved, usual, strict=True)]).median())

    assert all(0.9 < median(rank, 16.0) < 1.1 for rank in (4, 16, 64))
    assert median(64, 64.0) > 3
    run = api.settle({"name": "mira", "adapter": {"rank": 64}})
    assert run.adapter.model_dump()["alpha"] == 16.0


# ---------------------------------------------------------------- searches


def test_the_steepest_fall_is_proposed() -> None:
    falls = [(1e-4, 1.0), (1e-3, 0.98), (1e-2, 0.7), (1e-1, 0.5), (1.0, 4.0)]
    assert search.proposed(falls, 1.0) in (1e-2, 1e-1)
    with pytest.raises(UserError, match="E-FIND-03"):
        search.proposed([(rate, 1.0 + i) for i, (rate, _) in enumerate(falls)], 1.0)


def done(events: list[Event]) -> Mapping[str, Any]:
    return events[-1].data


def test_searches_leave_the_base_as_it_was_and_repeat(squares: Path, base: Path, tmp_path: Path) -> None:
    run = small.settled(squares, base, train__text_encoder_lr=0.0)
    bench = search.Bench(run, tmp_path)
    before = small.modules(bench.family)
    one, two = bench.trial(run, looks=2), bench.trial(run, looks=2)
    assert one.curve == two.curve
    assert len(one.curve) == 3
    assert small.modules(bench.family) == before
    found = done(list(search.find_dimension(run, tmp_path, 10, {"rank": [1, 2]})))
    assert [row["size"] for row in found["rows"]] == [1, 2]
    assert found["rows"][0]["parameters"] * 2 == found["rows"][1]["parameters"]
    assert found["picture"].size == (900, 540)


@pytest.mark.slow
def test_the_proposed_rate_beats_ten_times_more_and_less(tmp_path: Path) -> None:
    folder = small.draw_folder(tmp_path / "set", 10, square=True)
    table = {"name": "ball", "data": {"folder": str(folder), "prior_share": 0.0}, "validation": {"share": 0.3}}
    run = api.settle({**table, "train": {"batch_size": 4, "steps": 40, "warmup_steps": 4}})
    events = list(search.find_rate(run, tmp_path, 60, 1e-5, 1e-1))
    lr = done(events)["lr"]
    bench = search.Bench(run, tmp_path)
    gains = []
    for factor in (0.1, 1.0, 10.0):
        changed = search.laid_over(run, {"train": {"lr": min(10.0, lr * factor), "text_encoder_lr": lr * factor / 4}})
        gains.append(bench.trial(changed).gain)
    assert gains[1] == max(gains), json.dumps([lr, gains])


# ---------------------------------------------------------------- averages


def test_an_average_is_that_of_the_differences(squares: Path, base: Path, tmp_path: Path) -> None:
    run = small.settled(squares, base, adapter__alpha=1.0)
    list(api.train(run, tmp_path / "run"))
    pack = api.average_run(tmp_path / "run", tmp_path / "mean.safetensors", [2, 4])
    parts = [differences(load_parts(tmp_path / "run", step)) for step in (2, 4)]
    for name, change in differences(load(tmp_path / "mean.safetensors").tensors).items():
        torch.testing.assert_close(change, (parts[0][name] + parts[1][name]) / 2, rtol=2e-2, atol=1e-5)
    assert pack.metadata["ss_network_dim"] == "4"
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        api.average_run(tmp_path / "run", tmp_path / "x.safetensors", [2, 3])
    with pytest.raises(UserError, match="E-AVG-02"):
        average.mean([{"a.oft_blocks": torch.zeros(1), "a.alpha": torch.zeros(())}] * 2)


def load_parts(run: Path, step: int) -> dict[str, Tensor]:
    """A checkpoint's weights as a pack would name them."""
    names = {"down": "lora_down.weight", "up": "lora_up.weight"}
    found = {}
    for name, tensor in weights(run, step).items():
        dotted, _, leaf = name.partition("/")[2].rpartition(".")
        module = keys.module_name(dotted, {"unet": "lora_unet", "text_encoder": "lora_te"})
        found |= {f"{module}.{names[leaf]}": tensor, f"{module}.alpha": torch.tensor(1.0)}
    return found


def differences(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for module, one in keys.by_module(tensors).items():
        down, up = one["lora_down.weight"].float().flatten(1), one["lora_up.weight"].float().flatten(1)
        found[module] = float(one["alpha"]) / len(down) * up @ down
    return found
