"""Textual inversion of the trigger: where it acts, that it learns, and that packs and diffusers make the same of it."""

from pathlib import Path
from typing import Any

import pytest
import small
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sdlora import api, family, learners, search, sharing
from sdlora.adapter import Bank
from sdlora.adapters import prompt
from sdlora.errors import UserError
from sdlora.family import Family
from sdlora.packs import bundle, file, words
from sdlora.packs.pipelines import Pack

TRIGGER = "mira"


def loaded(base: Path) -> Family:
    return family.load(family.find(str(base)), torch.device("cpu"), torch.float32)


def spelt(one: Family, bank: Bank, size: float = 0.0) -> None:
    """Put embeddings of the trigger on a base."""
    pieces: Any = {layer: (prompt, prompt.Config().spelt(ids)) for layer, ids in one.spelling(TRIGGER).items()}
    bank.add(TRIGGER, pieces, small.stream_of)
    if size:
        small.randomise(bank, TRIGGER, size=size)
    bank.use({TRIGGER: 1.0})


def said(one: Family, *texts: str) -> Tensor:
    with torch.no_grad():
        return one.states(one.tokens(texts))


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_it_acts_where_the_trigger_stands_as_a_word_and_nowhere_else(name: str, families: dict[str, Path]) -> None:
    one = loaded(families[name])
    without = ["", "a cat", "admira", "miracle", "mir a", "mi ra"]
    holding = ["mira", "a mira, red", "mira mira", "MIRA!"]
    plain, called = said(one, *without), said(one, *holding)
    bank = Bank(one.components)
    spelt(one, bank, 0.5)
    assert torch.equal(said(one, *without), plain)
    changed = said(one, *holding)
    assert all(not torch.allclose(new, old, atol=1e-3) for new, old in zip(changed, called, strict=True))
    bank.use({TRIGGER: 0.0})
    assert torch.equal(said(one, *holding), called)


def test_strength_is_linear_in_the_embeddings(families: dict[str, Path]) -> None:
    one = loaded(families["sd1"])
    bank = Bank(one.components)
    spelt(one, bank, 0.5)
    layer = bank.sites[next(iter(one.spelling(TRIGGER)))]
    ids = one.tokens(["a mira, red"])
    base, whole = layer.layer(ids), layer(ids)
    bank.use({TRIGGER: -0.5})
    torch.testing.assert_close(layer(ids) - base, -0.5 * (whole - base))


def left_of_the_loss(one: Family, rate: float) -> float:
    """The loss after ten steps towards what other embeddings say, as a share of the loss before."""
    x, t, tokens = small.numbers((2, 4, 8, 8)), torch.tensor([300, 700]), one.tokens(["mira", "a mira, red"])
    bank = Bank(one.components)
    spelt(one, bank, 0.5)
    with torch.no_grad():
        wanted = one.predict(x, t, one.states(tokens))
    bank.eject()
    spelt(one, bank)
    learnt = list(bank.parameters(TRIGGER).values())
    assert len(learnt) == len(one.spelling(TRIGGER))
    optimizer, losses = torch.optim.AdamW(learnt, rate), list[float]()
    for _ in range(11):
        loss = (one.predict(x, t, one.states(tokens)) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    bank.eject()
    return losses[-1] / losses[0]


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_it_learns(name: str, families: dict[str, Path]) -> None:
    """A seventh of the loss is left, or a sixth; where nobody moves them, all of it. The bound lies between."""
    one = loaded(families[name])
    assert left_of_the_loss(one, 0.01) < 0.5
    assert left_of_the_loss(one, 0.0) == pytest.approx(1.0, rel=1e-6), "the control"


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_diffusers_reads_the_embeddings_as_textual_inversions(name: str, families: dict[str, Path]) -> None:
    one = loaded(families[name])
    bank = Bank(one.components)
    spelt(one, bank, 0.3)
    found = words.inversion(file.exact_tensors(bank, TRIGGER, one), one)
    ours = said(one, "a mira, red")
    two = name == "sdxl"
    pipe: Any = (StableDiffusionXLPipeline if two else StableDiffusionPipeline).from_pretrained(families[name])
    assert sorted(found) == (["clip_g", "clip_l"] if two else ["emb_params"])
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")) if two else (("emb_params", ""),):
        encoder, tokenizer = getattr(pipe, f"text_encoder{suffix}"), getattr(pipe, f"tokenizer{suffix}")
        pipe.load_textual_inversion({key: found[key]}, token=TRIGGER, text_encoder=encoder, tokenizer=tokenizer)
    with torch.no_grad():
        rows, _, *pooled = pipe.encode_prompt("a mira, red", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    torch.testing.assert_close(ours[:, : rows.shape[1]], rows, rtol=1e-4, atol=1e-5)
    if two:
        torch.testing.assert_close(ours[:, -1, : pooled[0].shape[1]], pooled[0], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("kind", ["prompt", "lora"])
def test_a_run_learns_it_alone_or_beside_lora(kind: str, squares: Path, base: Path, tmp_path: Path) -> None:
    """Pivotal tuning: a pack that programs open as the LoRA, whose header holds the embeddings; stopped, it goes on to the same."""
    adapter = {"kind": kind, **({"rank": 2} if kind == "lora" else {})}
    run = small.settled(squares, base, adapter=adapter, train__words_lr=1e-2, train__steps=4)
    list(api.train(run, tmp_path / "run"))
    path = tmp_path / "run" / "mira.safetensors"
    pack = file.load(path)
    rest, learnt = words.apart(pack.tensors)
    assert bool(rest) == (kind == "lora")
    assert all(tensor.any() for tensor in learnt.values())
    with safe_open(path, "pt") as opened:
        assert set(opened.keys()) == set(rest or learnt)
        assert (words.FIELD in opened.metadata()) == (kind == "lora")
    studio = api.open_studio([pack], str(base))
    before = said(studio.family, "mira", "a cat")
    studio.bank.use({"mira": 1.0})
    layer = studio.bank.sites[next(iter(studio.family.spelling(TRIGGER)))]
    (whole,) = load_file(tmp_path / "run" / "mira-embedding.safetensors").values()
    torch.testing.assert_close(layer(studio.family.tokens(["mira"]))[0, 1 : 1 + len(whole)], whole)
    after = said(studio.family, "mira", "a cat")
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1]) == (kind == "prompt")
    stop = api.Stop()
    for event in api.train(run, tmp_path / "again", stop):
        stop.stop = stop.stop or (event.kind == "step" and event.step == 3)
    list(api.train(run, tmp_path / "again"))
    again = file.load(tmp_path / "again" / "mira.safetensors").tensors
    assert all(torch.equal(again[key], tensor) for key, tensor in pack.tensors.items())


def test_embeddings_lie_inside_the_pack_where_that_is_wished_and_in_its_bundle(squares: Path, base: Path, tmp_path: Path) -> None:
    adapter = {"kind": "lora", "rank": 2}
    run = small.settled(squares, base, adapter=adapter, train__words_lr=1e-2, train__steps=2, pack__embeddings_inside=True)
    events = list(api.train(run, tmp_path / "run"))
    (whole,) = load_file(tmp_path / "run" / f"mira{words.BESIDE}").values()
    with safe_open(tmp_path / "run" / "mira.safetensors", "pt") as opened:
        assert torch.equal(opened.get_tensor("bundle_emb.mira.string_to_param.*"), whole)
    told = next(event.text for event in events if event.text.startswith("the pack: "))
    assert "not in diffusers" in told, "who refuses such a pack is said"
    studio = api.open_studio([file.load(tmp_path / "run" / "mira.safetensors")], str(base))
    assert any("stand in the header as well" in line for line in studio.remarks()), "they act once"
    made = sharing.bundled(tmp_path / "run")
    assert made[f"mira{words.BESIDE}"] == (tmp_path / "run" / f"mira{words.BESIDE}").read_bytes()
    assert bundle.packs(made) == ["mira.safetensors"], "embeddings beside a pack are no second one"
    bundle.write(tmp_path / "mira.zip", made)
    assert api.open_pack(tmp_path / "mira.zip").trigger == "mira"
    assert words.bundled({"clip_l": whole}, "dr. x") == {"bundle_emb.dr- x.clip_l": whole}


def test_a_pack_with_embeddings_goes_on_a_pipeline(base: Path, tmp_path: Path) -> None:
    one = loaded(base)
    bank = Bank(one.components)
    spelt(one, bank, 0.3)
    ours = said(one, "a mira")
    file.save(tmp_path / "mira.safetensors", file.tensors_of(bank, TRIGGER, one), lambda sha: {"sshs_model_hash": sha})
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    Pack.open(tmp_path / "mira.safetensors").apply(pipe, 1.0)
    with torch.no_grad():
        torch.testing.assert_close(pipe.text_encoder(one.tokens(["a mira"])).last_hidden_state, ours)


def test_a_header_with_other_things_than_embeddings_is_refused(pack_path: Path, tmp_path: Path) -> None:
    pack = file.load(pack_path)
    key = "lora_te_text_model_embeddings_token_embedding"
    sound = {f"{key}.{words.DIFFERENCE}": torch.ones(1, 16), f"{key}.{words.IDS}": torch.ones(1)}
    file.save(tmp_path / "a.safetensors", {**pack.tensors, **sound}, lambda sha: {"sshs_model_hash": sha})
    assert torch.equal(file.load(tmp_path / "a.safetensors").tensors[f"{key}.{words.DIFFERENCE}"], torch.ones(1, 16)), "the control"
    for wrong in ("no base64", "AAAA", "////////"):
        with pytest.raises(UserError, match="E-PACK"):
            words.from_header({words.FIELD: wrong}, pack_path)


def test_a_trigger_that_cannot_be_read_at_once_is_refused(squares: Path, base: Path) -> None:
    run = small.settled(squares, base, train__words_lr=1e-3, trigger="a" * 40)
    with pytest.raises(UserError, match="E-ADAPT-06"):
        learners.pieces(run, loaded(base))
    sound = small.settled(squares, base, train__words_lr=1e-3)
    assert any(kind is prompt for kind, _ in learners.pieces(sound, loaded(base)).values()), "the control"


def test_a_search_knows_dimensions_of_a_subspace(squares: Path, base: Path, tmp_path: Path) -> None:
    run = small.settled(squares, base, train__text_encoder_lr=0.0)
    *_, end = search.find_dimension(run, tmp_path, 10, {"rank": [1], "dimension": [8, 64]})
    assert [row["parameters"] for row in end.data["rows"] if row["ladder"] == "dimension"] == [8, 64]
    assert set(end.data["chosen"]) == {"rank", "dimension"}
