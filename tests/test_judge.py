"""The judge on pictures of small random bases: what it reports, what it chooses, and what it refuses to tell apart."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from small import new_tokenizer, numbers, random_pack
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

from sdlora import api, best, course, eyes, family, lock, measures, settings, state
from sdlora.errors import UserError
from sdlora.judge import Judge, Questions, Truth

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "projection_dim": 12}


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)).save_pretrained(
        folder
    )
    CLIPImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("clip"), new_tokenizer()
    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def questions(**changes: object) -> Questions:
    return Questions(**{"asked": ["mira", "mira, red"], "other": ["a cat", "a house", "a tree"], "seeds": [0], "scales": [0.5, 1.0],
                        "size": (32, 32), "steps": 2, **changes})  # type: ignore[arg-type]  # fmt: skip


def truth(held: int = 2) -> Truth:
    pixels = numbers((6, 3, 32, 32), 5).sigmoid()
    return Truth(pixels[held:], pixels[:held], ["mira"] * (held or 6))


def test_dinov2_sees_as_transformers_does(dino: Path, studio: api.Studio) -> None:
    seen = eyes.opened(str(dino), studio.family)
    pixels = numbers((3, 3, 224, 224), 1).sigmoid()
    model = Dinov2Model.from_pretrained(dino).eval()
    usual = CLIPImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False)(list(pixels), return_tensors="pt").pixel_values
    with torch.no_grad():
        assert torch.allclose(seen.see(pixels), model(usual).last_hidden_state[:, 0], atol=1e-5)
    assert seen.read(["a cat"]) is None


def test_clip_sees_and_reads_as_transformers_does(clip: Path, studio: api.Studio) -> None:
    seen = eyes.opened(str(clip), studio.family)
    pixels = numbers((3, 3, 32, 32), 1).sigmoid()
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    usual = CLIPImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False)(list(pixels), return_tensors="pt").pixel_values
    texts = ["a cat", "red"]
    with torch.no_grad():
        true = model(pixel_values=usual, **tokenizer([*texts, "x"], padding=True, return_tensors="pt"))
    said = seen.read([*texts, "x"])
    assert said is not None
    assert torch.allclose(torch.nn.functional.normalize(seen.see(pixels), dim=1), true.image_embeds, atol=1e-5)
    assert torch.allclose(torch.nn.functional.normalize(said, dim=1), true.text_embeds, atol=1e-5)


def test_eyes_are_named_and_none_is_fetched_unasked(studio: api.Studio, tmp_path: Path, dino: Path) -> None:
    assert eyes.opened("base", studio.family).name.startswith("autoencoder of")
    with pytest.raises(UserError, match="E-EYES-01"):
        eyes.opened("no such thing", studio.family)
    with pytest.raises(UserError, match="E-EYES-03"):
        eyes.opened(str(tmp_path), studio.family)
    config = json.loads((dino / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(UserError, match=r"E-EYES-03.*vit"):
        eyes.opened(str(tmp_path), studio.family)


def test_sharpness_is_seen_where_latents_alone_see_a_blur_as_likeness() -> None:
    """Held-out pictures against what was done to them, on the embedded base: a sharp one moved by 2 px is right, a blurred one is not.

    The negative control: by latents alone the blurred ones are the more alike.
    """
    tiny, true = api.open_studio().family, drawings()
    shown = torch.nn.functional.pad(true, (2, 2, 2, 2), "replicate")
    versions = {
        "moved": shown[:, :, 4:, 2:-2],
        "blurred": gaussian_blur(true, 2.0),
        "posterised": true.mul(2).round() / 2,
        "pale": 0.5 * true + 0.25,
        "another subject": drawings(seed=1),
    }
    fits = torch.eye(len(true), dtype=torch.bool)

    def like(sight: eyes.Eyes) -> dict[str, float]:
        centre = sight.see(torch.cat([true, drawings(seed=2)]))
        own = {name: measures.centred(sight.see(pixels), centre) for name, pixels in versions.items()}
        return {name: float(measures.likeness(row, measures.centred(sight.see(true), centre), fits).mean()) for name, row in own.items()}

    seen, control = like(eyes.Detailed(tiny)), like(eyes.Autoencoder(tiny))
    assert max((name for name in seen), key=lambda name: seen[name]) == "moved", seen
    assert control["blurred"] > control["moved"], control


def gaussian_blur(pixels: Tensor, sigma: float) -> Tensor:
    places = torch.arange(-8, 9)
    kernel = torch.exp(-((places / sigma) ** 2) / 2)
    plane = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(3, 1, -1, -1)
    return torch.nn.functional.conv2d(torch.nn.functional.pad(pixels, (8, 8, 8, 8), "replicate"), plane, groups=3)


def drawings(count: int = 8, seed: int = 0) -> Tensor:
    """Pictures (N, 3, 64, 64) of a striped disc on a ground, its place, size and colours drawn; another seed: a square, and others."""
    rng = np.random.default_rng(seed)
    across, down = np.meshgrid(np.arange(64), np.arange(64))
    made = []
    for _ in range(count):
        x, y, size = (*rng.uniform(24, 40, 2), rng.uniform(14, 20))
        inside = np.maximum(abs(across - x), abs(down - y)) < size if seed else np.hypot(across - x, down - y) < size
        stripes = np.sin((across * rng.uniform(-1, 1) + down) * rng.uniform(0.8, 1.4)) > 0
        ground, one, other = rng.uniform(0, 1, (3, 3, 1, 1))
        made.append(np.where(inside, np.where(stripes, one, other), ground))
    return torch.from_numpy(np.stack(made)).float()


def test_local_contrast_falls_with_blur_and_knows_no_faint_noise() -> None:
    sharp = drawings()
    levels = [float(eyes.contrast(gaussian_blur(sharp, sigma)).mean()) for sigma in (0.5, 1.0, 2.0)]
    assert levels == sorted(levels, reverse=True)
    flat = torch.full((1, 3, 64, 64), 0.5)
    assert float((eyes.contrast(flat) - eyes.contrast(flat + 0.002 * numbers(flat.shape, 3))).abs().max()) < 0.02


def test_an_adapter_that_does_nothing_is_told_from_nothing(studio: api.Studio, tmp_path: Path) -> None:
    """The negative control: zero weights have the base's figures at every scale, and no candidate is recommended."""
    pack = replace(api.open_pack(random_pack(tmp_path / "mira.safetensors", studio.family)), sha256="")  # of a file it would be refused
    for tensor in pack.tensors.values():
        tensor.zero_()
    judge = Judge(studio, questions(), truth(), eyes.opened("base", studio.family))
    judge.ask(studio.add(pack), 3)
    verdict = judge.verdict()
    base = verdict.rows[0]
    assert {(row.likeness, row.drift, row.effect) for row in verdict.rows} == {(base.likeness, base.drift, base.effect)}
    assert base.drift == pytest.approx(0, abs=1e-6)
    assert "nothing" in verdict.words


def test_figures_of_a_pack_that_does_something(studio: api.Studio, tmp_path: Path) -> None:
    judge = Judge(studio, questions(seeds=[0, 1]), truth(), eyes.opened("base", studio.family))
    judge.ask(studio.add(api.open_pack(random_pack(tmp_path / "mira.safetensors", studio.family))), 3)
    verdict = judge.verdict()
    half, whole = verdict.rows[1:]
    assert 0 < half.drift < whole.drift
    assert 0 < half.effect < whole.effect
    assert all(row.low <= row.score <= row.high for row in verdict.rows)
    table = json.loads(json.dumps(verdict.table()))
    assert table["likeness_to"] == "pictures held out"
    assert [row["scale"] for row in table["rows"]] == [0.0, 0.5, 1.0]
    assert ["base", 0.0] in table["front"]
    assert judge.sheet("mira").width == 8 + 3 * (4 * 32 + 8)


def test_without_pictures_held_out_it_says_so(studio: api.Studio, clip: Path) -> None:
    judge = Judge(studio, questions(), truth(held=0), eyes.opened(str(clip), studio.family))
    assert "trained on" in judge.verdict().against
    assert -1 <= judge.rows[0].following <= 1
    assert measures.centred(judge.seen, judge.centre).shape == (6, 12)


@pytest.fixture(scope="module")
def run(squares: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "mira"
    settled = small.settled(squares, base, validation__share=0.4, train__ema=0.5, data__prior_prompts=["a cat", "a house"])
    assert [*api.train(settled, out)][-1].kind == "done"
    return out


ASKING = api.Asking(scales=(0.5, 1.0), prompts=2, seeds=1, steps=2, eyes="base")


def test_a_checkpoint_is_judged_as_the_pack_that_it_would_have_become(run: Path) -> None:
    """Average and all: the last checkpoint's pack is the run's own, bit for bit."""
    settled = api.settle(settings.read(run / "config.toml"))
    found = best.checkpoints(settled, family.find(settled.base), run, 2)
    assert [*found] == [2, 6]
    own = api.open_pack(run / "mira.safetensors").tensors
    assert own.keys() == found[6].tensors.keys()
    assert all(torch.equal(own[key], tensor) for key, tensor in found[6].tensors.items())
    assert any(not torch.equal(own[key], tensor) for key, tensor in found[2].tensors.items())


def test_a_run_is_judged_and_left_as_it_is(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, copy := tmp_path / "mira")
    broken = state.folder(copy, 4) / "adapter.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1] + b"\x00\x01")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and "cache" not in path.parts}
    events = [*api.find_best(copy, ASKING)]
    assert {path: path.read_bytes() for path in before} == before, "a damaged checkpoint is passed over, not set aside"
    table = json.loads((copy / "score" / "score.json").read_text())
    assert events[-1].data == table
    assert table["rows"][0]["diversity"] is None, "of one seed there is none"
    assert [(row["name"], row["scale"]) for row in table["rows"]] == [
        ("base", 0.0), ("step 2", 0.5), ("step 2", 1.0), ("step 6", 0.5), ("step 6", 1.0),
    ]  # fmt: skip
    assert table["likeness_to"] == "pictures held out"
    assert {path.name for path in (copy / "score").glob("*.*")} == {
        "score.json", "score.html", "grid.png", "front.png", "following.png",
    }  # fmt: skip


def test_a_pack_is_judged_by_a_folder(run: Path, squares: Path, tmp_path: Path) -> None:
    pack = run / "mira.safetensors"
    with pytest.raises(UserError, match="E-BEST-01"):
        api.find_best(pack, ASKING)
    base = settings.read(run / "config.toml")["base"]
    events = [*api.find_best(pack, ASKING, str(squares), base, tmp_path / "out")]
    assert "trained on" in events[-1].data["likeness_to"]
    assert [row["step"] for row in events[-1].data["rows"]] == [0, 6, 6]


JUDGED: dict[str, Any] = {
    "validation__share": 0.4,
    "validation__judge": 2,
    "data__prior_prompts": ["a cat", "a house"],
    "preview__steps": 2,
}


@pytest.mark.slow
def test_a_run_is_judged_while_it_trains(squares: Path, base: Path, tmp_path: Path) -> None:
    """Its pack recommends the scale that was judged best; a run that was stopped judges what is left, and ends with the same bytes."""
    settled = small.settled(squares, base, **JUDGED)
    events = [*api.train(settled, tmp_path / "whole")]
    judged = [event for event in events if "judged" in event.data]
    assert [event.step for event in judged] == [2, 4, 6]
    table = json.loads((tmp_path / "whole" / "score.json").read_text())
    pack = api.open_pack(tmp_path / "whole" / "mira.safetensors")
    assert [row["scale"] for row in table["rows"]] == [0.0, 0.5, 0.75, 1.0, 1.25]
    assert pack.recommended_scale == (table["recommended"]["scale"] or 1.0)
    scores = scored(tmp_path / "whole")
    assert [(one["step"], round(one["score"], 4)) for one in scores] == [(e.step, e.data["judged"]["score"]) for e in judged]

    stop = api.Stop()
    for event in api.train(settled, tmp_path / "parts", stop):
        stop.stop = stop.stop or event.step == 3
    resumed = [*api.train(settled, tmp_path / "parts")]
    assert [event.step for event in resumed if "judged" in event.data] == [6], "it was judged at step 4 before it stopped"
    assert scored(tmp_path / "parts") == scores
    again = api.open_pack(tmp_path / "parts" / "mira.safetensors")
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in pack.tensors.items())


def scored(run: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads((state.folder(run, 6) / "state.json").read_text())["scores"]
    return found


@pytest.mark.slow
def test_judging_changes_nothing_of_what_is_learnt(squares: Path, base: Path, tmp_path: Path) -> None:
    packs = []
    for name, judge in (("with", 2), ("without", 0)):
        settled = small.settled(squares, base, **{**JUDGED, "validation__judge": judge})
        assert [*api.train(settled, tmp_path / name)][-1].kind == "done"
        packs.append(api.open_pack(tmp_path / name / "mira.safetensors").tensors)
    assert all(torch.equal(packs[0][key], tensor) for key, tensor in packs[1].items())


@pytest.mark.slow
def test_the_best_weights_may_go_by_the_score(squares: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = course.Score
    monkeypatch.setattr(course, "Score", lambda step, _, *rest: real(step, {2: 0.1, 4: 0.5, 6: 0.3}[step], *rest))
    settled = small.settled(squares, base, **JUDGED, validation__by="score", validation__pack="best")
    events = [*api.train(settled, tmp_path / "run")]
    assert any("step 4, whose score is best" in event.text for event in events)
    found = best.checkpoints(settled, family.find(str(base)), tmp_path / "run", 6)
    own = api.open_pack(tmp_path / "run" / "mira.safetensors").tensors
    assert all(torch.equal(own[key], tensor) for key, tensor in found[4].tensors.items())
    with pytest.raises(UserError, match="E-CONF-12"):
        small.settled(squares, base, validation__by="score")


def test_a_run_without_a_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, copy := tmp_path / "mira", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(UserError, match="E-RUN-08"):
        api.find_best(copy, ASKING)


def test_what_was_judged_is_a_page_that_holds_all_it_shows(run: Path, tmp_path: Path) -> None:
    """Each picture stands beside the training picture that it is nearest to, and nothing of a judging before is left."""
    out = tmp_path / "score"
    (out / "pictures").mkdir(parents=True)
    (out / "pictures" / "9-9-9.jpg").write_bytes(b"old")
    (done,) = [event for event in api.find_best(run, ASKING, out=out) if event.kind == "done"]
    table = api.read_judged(out)
    assert table == done.data
    rows = table["pictures"]
    assert len(rows) == 2 * len(table["rows"]), "of each row of figures, both prompts that name the trigger"
    assert {path.name for path in (out / "pictures").iterdir()} == {
        Path(row[key]).name for row in rows for key in ("file", "nearest")
    }  # fmt: skip
    page = (out / "score.html").read_text()
    assert page.count("<img") == 2 * len(rows) + 2
    assert page.count('src="data:image/') == page.count("src=")
    assert page.count('class="best"') == (2 if table["recommended"]["step"] else 0)
    found = measures.nearest(torch.tensor([[0.0, 1.0], [5.0, 0.0]]), torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    assert found == [1, 0]


def test_a_damaged_or_hostile_score_shows_nothing_of_the_disk(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "score"
    [*api.find_best(run, ASKING, out=out)]
    table = json.loads((out / "score.json").read_text())
    for row in table["pictures"]:
        row["file"] = "../mira.safetensors"
    asked: list[str] = []
    shown = api.judged_body({**table, "words": "<b>x</b>"}, lambda name: asked.append(name) or name)
    assert asked == ["front.png", "following.png"]
    assert "<b>x</b>" not in shown
    for text in ("", "[]", '{"rows": 3}', json.dumps({**table, "rows": [{}]})):
        (out / "score.json").write_text(text)
        assert api.read_judged(out) == {}


def test_a_folder_is_judged_into_by_one_at_a_time(run: Path, tmp_path: Path) -> None:
    with lock.held(tmp_path / "score"), pytest.raises(UserError, match="E-RUN-05"):
        [*api.find_best(run, ASKING, out=tmp_path / "score")]
    assert not (tmp_path / "score").exists()


def test_a_checkpoint_that_was_chosen_becomes_a_pack(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, copy := tmp_path / "mira")
    path = api.keep_checkpoint(copy, 2, 0.75)
    assert path == copy / "mira-2.safetensors"
    pack, own = api.open_pack(path), api.open_pack(copy / "mira.safetensors")
    settled = api.settle(settings.read(copy / "config.toml"))
    (found,) = best.checkpoints(settled, family.find(settled.base), copy, 1, [2]).values()
    assert all(torch.equal(pack.tensors[key], tensor) for key, tensor in found.tensors.items())
    assert (pack.recommended_scale, pack.trigger, pack.metadata["ss_steps"]) == (0.75, own.trigger, "2")
    assert pack.metadata["sdlora.checkpoint"] == "2"
    again = api.keep_checkpoint(copy, 6, 1.0, tmp_path / "last.safetensors")
    assert api.open_pack(again).sha256 == own.sha256, "the last step's is the run's own"
    for step, code in ((3, "E-RUN-08"),):
        with pytest.raises(UserError, match=code):
            api.keep_checkpoint(copy, step, 1.0)
    (copy / "mira.safetensors").unlink()
    with pytest.raises(UserError, match="E-RUN-09"):
        api.keep_checkpoint(copy, 2, 1.0)
