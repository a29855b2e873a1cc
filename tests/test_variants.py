"""Laws of augmentation: off is what it was, bit for bit; on, each setting changes something; all of it known before the run."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch.nn.functional import avg_pool2d

from sdlora import api, learners
from sdlora.config import Run
from sdlora.data import buckets, ledger, masks, scan, variants
from sdlora.data.batches import Prepared, micro_batch
from sdlora.data.buckets import Crop
from sdlora.data.pixels import decode, read_picture
from sdlora.data.variants import LOOKS, Variant
from sdlora.family import Family
from sdlora.randomness import normal

ALL_ON: dict[str, Any] = {"data__further_resolutions_px": [16], "data__crop": "subject", "data__crop_jitter": 0.3,
                          "data__colour_jitter": 0.2, "data__alpha_mask": True, "data__flip": True}  # fmt: skip


def masked_folder(folder: Path) -> Path:
    """Pictures of several shapes, two with masks, one of those of twice the picture's size; one is transparent."""
    small.draw_folder(folder)
    for name, size in {"1": (64, 40), "4": (72, 112)}.items():
        mask = Image.new("L", size, 40)
        ImageDraw.Draw(mask).ellipse((3, 5, 30, 33), 255)
        mask.save(folder / f"{name}-masklabel.png")
    return folder


def fitted(run: Run, loaded: Family, where: Path) -> ledger.Dataset:
    return ledger.fit_dataset(ledger.read_dataset(run, where), run, loaded)


def data_of(run: Run, dataset: ledger.Dataset, loaded: Family, where: Path, latents: learners.Latents) -> Prepared:
    return learners.prepared(learners.Job(run, loaded.base, where, 0.0, dataset, ["text_encoder.x"]), loaded, latents)


def numbered(dataset: ledger.Dataset) -> learners.Latents:
    """Latents that are the picture's number and, in the hundreds, the variant's, each of its variant's shape."""
    return [
        [(torch.full((1, one.size[1] // 4, one.size[0] // 4), i + 100.0 * n), torch.zeros(1, 1, 1)) for n, one in enumerate(some)]
        for i, some in enumerate(dataset.variants)
    ]


def seen(data: Prepared, numbers: range) -> Counter[int]:
    """How often each of `numbered` is shown in these samples as a picture of its own."""
    counted: Counter[int] = Counter()
    for batch in micro_batch([data], numbers):
        counted.update(batch.latents[~batch.prior][:, 0, 0, 0].int().tolist())
    return counted


# ---------------------------------------------------------------- off


def numbers_of(run: Run, loaded: Family, where: Path) -> tuple[str, list[int]]:
    """A digest of all that is a whole number in the first samples: which picture and which of its variants, where in the schedule, by which
    caption; no processor has another opinion of these. And how many variants each picture has."""
    dataset = fitted(run, loaded, where)
    data, told = data_of(run, dataset, loaded, where, numbered(dataset)), []
    weights = learners.loss_weights(learners.Job(run, loaded.base, where, 0.0, dataset, []), loaded)
    for number in range(24):
        (batch,) = micro_batch([data], range(number, number + 1))
        mark = int(batch.latents[0, 0, 0, 0])
        told.append([mark, int(batch.uniform * 2**24), int(batch.slot), bool(batch.prior), batch.text.tolist()])
        assert torch.equal(batch.noise[0], normal(tuple(batch.noise[0].shape), run.seed, "noise", number))
        assert torch.equal(batch.seen, batch.noise), "one noise, where nothing perturbs what the network sees"
        own = torch.ones(1, 1, 1) if batch.prior else weights[mark % 100][mark // 100]
        assert torch.equal(batch.weight[0], own.expand_as(batch.weight[0]))
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16], [len(some) for some in dataset.variants]


def plainly(run: Run, loaded: Family, where: Path) -> None:
    """Pixels and weights are what they are of a picture that is only cut to its size, mirrored or not."""
    dataset = fitted(run, loaded, where)
    weights = learners.loss_weights(learners.Job(run, loaded.base, where, 0.0, dataset, []), loaded)
    for item, some, its in zip(dataset.account.used, dataset.variants, weights, strict=True):
        picture = read_picture(item.path)
        weight = torch.ones(1, 1, 1)
        if item.mask:
            mask = masks.read(item.mask, item.path)
            weight = masks.weights(mask, some[0].size, Crop(), loaded.latent_factor, run.data.mask_floor)
        for one, own in zip(some, its, strict=True):
            turned = [2] if one.flip else []
            assert torch.equal(variants.pixels(picture, one), buckets.fit(picture, one.size).flip(turned))
            assert torch.equal(own, weight.flip(turned))


@pytest.mark.parametrize(("flip", "recorded"), [(False, "607a54b77126f825"), (True, "5419b55450624ff3")])
def test_without_augmentation_a_run_is_what_it_was_before_there_was_any(
    flip: bool, recorded: str, base: Path, loaded: Family, tmp_path: Path
) -> None:
    """The digests are of numbers that the program which knew of no variants drew, too."""
    changes = {
        "seed": 3,
        "data__prior_share": 0.3,
        "data__prior_prompts": ["a dog"],
        "data__caption_dropout": 0.2,
        "data__flip": flip,
    }
    folder = masked_folder(tmp_path / "set")
    run = small.settled(folder, base, **changes)
    assert numbers_of(run, loaded, tmp_path) == (recorded, [1 + flip] * 5)
    plainly(run, loaded, tmp_path)
    other = small.settled(folder, base, **{**changes, "seed": 4})
    assert numbers_of(other, loaded, tmp_path)[0] != recorded, "the control"


# ---------------------------------------------------------------- on


@pytest.mark.parametrize("setting", sorted(ALL_ON))
def test_each_setting_changes_what_is_trained(setting: str, base: Path, loaded: Family, tmp_path: Path) -> None:
    folder = masked_folder(tmp_path / "set")
    found = []
    for changes in ({}, {setting: ALL_ON[setting]}):
        run = small.settled(folder, base, **changes)
        dataset = fitted(run, loaded, tmp_path)
        weights = learners.loss_weights(learners.Job(run, loaded.base, tmp_path, 0.0, dataset, []), loaded)
        found.append((dataset.variants, [[one.tolist() for one in some] for some in weights]))
    assert found[0] != found[1]
    assert [len(some) for some in found[0][0]] == [1] * 5


def test_a_sample_says_where_it_was_cut(base: Path, loaded: Family, tmp_path: Path) -> None:
    run = small.settled(masked_folder(tmp_path / "set"), base, **ALL_ON)
    dataset = fitted(run, loaded, tmp_path)
    data = data_of(run, dataset, loaded, tmp_path, numbered(dataset))
    said = set()
    for batch in micro_batch([data], range(48)):
        for latents, frame in zip(batch.latents, batch.frame, strict=True):
            variant, picture = divmod(int(latents[0, 0, 0]), 100)
            assert torch.equal(frame, variants.frame(dataset.account.used[picture], dataset.variants[picture][variant]))
            said.add(tuple(frame.tolist()))
    assert len(said) > 10, "the control: they are of many kinds"


def test_a_sample_shows_the_same_variant_in_any_batch_and_all_are_shown(base: Path, loaded: Family, tmp_path: Path) -> None:
    run = small.settled(masked_folder(tmp_path / "set"), base, **ALL_ON)
    dataset = fitted(run, loaded, tmp_path)
    data = data_of(run, dataset, loaded, tmp_path, numbered(dataset))
    at_once = seen(data, range(800))
    assert sum((seen(data, range(start, start + 8)) for start in range(0, 800, 8)), Counter()) == at_once
    assert len(at_once) == sum(map(len, dataset.variants)) > 5 * LOOKS
    assert seen(data, range(800, 1600)) != at_once, "the control"


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_each_variant_is_shown_as_often_as_the_ledger_says(share: float, base: Path, loaded: Family, tmp_path: Path) -> None:
    changes = {**ALL_ON, "data__prior_share": share, "data__prior_prompts": ["a dog"], "train__steps": 17, "train__batch_size": 3}
    run = small.settled(masked_folder(tmp_path / "set"), base, **changes)
    dataset = fitted(run, loaded, tmp_path)
    table = ledger.ledger(dataset, run, loaded, [])
    rows = {row["file"]: row for row in table["pictures"]}
    said = {
        i + 100 * n: one["shown"] for i, item in enumerate(dataset.account.used) for n, one in enumerate(rows[item.path.name]["shown_as"])
    }
    counted = seen(data_of(run, dataset, loaded, tmp_path, numbered(dataset)), range(17 * 3))
    assert counted == Counter(said)
    for row in rows.values():
        assert row["shown"] == sum(row["shown_at"].values()) == sum(one["shown"] for one in row["shown_as"])
    total = table["totals"]["samples_of_pictures"]
    assert total == counted.total()
    assert (total == 51) == (share == 0), "the control: prior samples show no picture of their own"


def test_a_run_with_all_of_it_trains_and_says_what_it_used(base: Path, tmp_path: Path, cache_folder: Path) -> None:
    changes = {**ALL_ON, "train__steps": 2, "train__save_every": 1}
    run, out = small.settled(masked_folder(tmp_path / "set"), base, **changes), tmp_path / "run"
    begun = api.train(run, out)
    assert next(event.step for event in begun if event.kind == "checkpoint") == 1
    del begun  # as if it had been killed
    assert list(api.train(run, out))[-1].kind == "done"
    assert list(api.train(run, tmp_path / "at once"))[-1].kind == "done"
    stopped, at_once = (load_file(folder / "mira.safetensors") for folder in (out, tmp_path / "at once"))
    assert all(torch.equal(stopped[name], tensor) for name, tensor in at_once.items())
    table = json.loads((out / "ledger.json").read_text())
    assert table["totals"]["samples_of_pictures"] == sum(row["shown"] for row in table["pictures"]) == 4
    assert len(list(cache_folder.rglob("*.latents"))) == sum(len(row["shown_as"]) for row in table["pictures"]), "all differ"
    held = sum(8 * 4 * (one["bucket_px"][0] // 4) * (one["bucket_px"][1] // 4) for row in table["pictures"] for one in row["shown_as"])
    assert table["totals"]["disk_bytes"] == held
    checked, page = api.check(run, tmp_path / "unpacked")
    table["totals"]["seconds"] = checked["totals"]["seconds"]  # known once a run has been
    assert {key: checked[key] for key in table} == table
    assert f"in {4 * LOOKS} ways" in page()


# ---------------------------------------------------------------- crops and colours


def item_of(tmp_path: Path, size: tuple[int, int], name: str = "a", mask: Image.Image | None = None) -> scan.Item:
    folder = tmp_path / name
    folder.mkdir()
    Image.fromarray(np.random.default_rng(len(name)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(folder / "a.png")
    if mask:
        mask.save(folder / "a-masklabel.png")
    (item,) = scan.scan(folder, False).used
    return item


@pytest.fixture(scope="module")
def plain(base: Path) -> Run:
    return small.settled(Path("set"), base)


def shown(item: scan.Item, plain: Run, seed: int = 0, **data: Any) -> tuple[Variant, ...]:
    run = plain.model_copy(update={"seed": seed, "data": plain.data.model_copy(update=data)})
    return variants.variants(item, run, [buckets.sizes(32, 8)])


def test_crops_move_within_the_whole_one_and_enlarge_nothing(plain: Run, tmp_path: Path) -> None:
    for name, size in {"large": (200, 130), "barely": (36, 36)}.items():
        item = item_of(tmp_path, size, name)
        whole, *moved = shown(item, plain, crop_jitter=0.25)
        outer = buckets.crop_box(*size, whole.size, whole.crop)
        assert outer == buckets.crop_box(*size, whole.size)
        assert len(moved) == LOOKS - 1
        for one in moved:
            box = buckets.crop_box(*size, one.size, one.crop)
            assert outer[0] - 1e-9 <= box[0] < box[2] <= outer[2] + 1e-9
            assert outer[1] - 1e-9 <= box[1] < box[3] <= outer[3] + 1e-9
            assert 0.75 <= (box[2] - box[0]) / (outer[2] - outer[0]) < 1
            assert buckets.enlargement(box[2] - box[0], box[3] - box[1], one.size) <= 1 + 1e-9
    for name, size in {"exactly": (32, 32), "too small": (24, 24)}.items():
        assert len(shown(item_of(tmp_path, size, name), plain, crop_jitter=0.5)) == 1, "there is no room"


def test_variants_belong_to_the_picture_and_the_seed(plain: Run, tmp_path: Path) -> None:
    """Other pictures come and go without changing them, so the cache holds."""
    on = {"crop_jitter": 0.2, "colour_jitter": 0.2}
    item, other = item_of(tmp_path, (80, 60)), item_of(tmp_path, (80, 60), "other")
    assert shown(item, plain, **on) == shown(item, plain, **on)
    assert len({*shown(item, plain, **on), *shown(item, plain, seed=1, **on)}) == 2 * LOOKS - 1, "all but the plain one"
    assert len({*shown(item, plain, **on), *shown(other, plain, **on)}) == 2 * LOOKS - 1


def test_colours_change_by_no_more_than_is_set(plain: Run, tmp_path: Path) -> None:
    item = item_of(tmp_path, (48, 48))
    picture = Image.new("RGB", (48, 48), (120, 100, 80))
    first, *changed = shown(item, plain, colour_jitter=0.1)
    assert torch.equal(variants.pixels(picture, first), buckets.fit(picture, first.size))
    for one in changed:
        assert one.crop == first.crop
        assert all(0.9 <= factor <= 1.1 for factor in one.colour)
        moved = (variants.pixels(picture, one) - variants.pixels(picture, first)).abs()
        assert 0 < moved.max() * 127.5 <= 120 * 0.1 + 8, "brightness by a tenth, saturation by a tenth of 40 levels at most"


@pytest.mark.parametrize("side", [(64, 40), (96, 64), (33, 32)])
def test_a_mask_is_cropped_and_turned_as_its_picture(side: tuple[int, int], base: Path, loaded: Family, tmp_path: Path) -> None:
    """A picture that shows its own mask is where its weights are, in every variant."""
    mask = Image.new("L", side)
    ImageDraw.Draw(mask).rectangle((4, 6, side[0] // 2, side[1] - 9), 255)
    item = item_of(tmp_path, side, mask=mask)
    mask.convert("RGB").save(item.path)
    run = small.settled(item.path.parent, base, **{**ALL_ON, "data__colour_jitter": 0.0, "data__mask_floor": 0.01})
    dataset = fitted(run, loaded, tmp_path)
    (weights,) = learners.loss_weights(learners.Job(run, loaded.base, tmp_path, 0.0, dataset, []), loaded)
    assert len(weights) > 4
    picture, other = read_picture(item.path), weights[-1:] + weights[:-1]
    apart: dict[str, list[float]] = {"own": [], "another's": []}
    for one, its, wrong in zip(dataset.variants[0], weights, other, strict=True):
        light = (variants.pixels(picture, one)[:1] / 2 + 0.5) ** 2.2  # in which pictures are scaled
        wanted = 0.01 + 0.99 * avg_pool2d(light, loaded.latent_factor)
        wanted = wanted / wanted.mean()
        apart["own"].append(float((its - wanted).abs().mean()))
        if wrong.shape == wanted.shape:
            apart["another's"].append(float((wrong - wanted).abs().mean()))
    assert max(apart["own"]) < 0.06
    assert max(apart["another's"]) > 0.3, "the control"


def test_the_crop_lies_around_what_the_mask_shows(base: Path, plain: Run, loaded: Family, tmp_path: Path) -> None:
    for name, at, wanted in (("right", 150, 100), ("middle", 118, 86), ("left", 3, 0)):
        mask = Image.new("L", (164, 64))
        mask.paste(255, (at - 3, 20, at + 3, 30))
        item = item_of(tmp_path, (164, 64), name, mask)
        focus = masks.focus(masks.read(item.mask or item.path, item.path))
        assert focus == (pytest.approx(at / 164), pytest.approx(25 / 64))
        run = small.settled(item.path.parent, base, data__crop="subject")
        (size,) = fitted(run, loaded, tmp_path).sizes
        place = buckets.place_around(focus, 164, 64, (32, 32))
        assert buckets.crop_box(164, 64, (32, 32), Crop(place)) == pytest.approx((wanted, 0, wanted + 64, 64))
        table = ledger.ledger(fitted(run, loaded, tmp_path), run, loaded, [])
        left, _, right, _ = table["pictures"][0]["crop_px"]
        assert left <= max(0, at - 3)
        assert at + 3 <= right or name == "right"
        assert right - left == pytest.approx(64 * size[0] / size[1], abs=0.1)
    unmasked = item_of(tmp_path, (164, 64), "none")
    assert shown(unmasked, plain, crop="subject") == shown(unmasked, plain), "without a mask around the centre"
    black = Image.new("L", (9, 9))
    assert masks.focus(black) == (0.5, 0.5)


def test_the_ledger_tells_the_crop_that_is_taken(base: Path, loaded: Family, tmp_path: Path) -> None:
    """Of a picture that is as large as its size, and odd, whole pixels; of any other, the box that is scaled."""
    item = item_of(tmp_path, (33, 32))
    run = small.settled(item.path.parent, base)
    (row,) = ledger.ledger(fitted(run, loaded, tmp_path), run, loaded, [])["pictures"]
    picture = read_picture(item.path)
    assert row["crop_px"] == [0, 0, 32, 32]
    assert torch.equal(buckets.fit(picture, (32, 32)), buckets.pixels_of(picture.crop((0, 0, 32, 32))))
    assert buckets.crop_box(33, 32, (32, 32))[0] == 0.5, "the control: the middle lies between two pixels"


# ---------------------------------------------------------------- resolutions


@pytest.mark.parametrize(("side", "sizes"), [(70, [64, 32, 16]), (40, [32, 16]), (20, [16]), (12, [16])])
def test_a_picture_is_trained_at_each_resolution_that_does_not_enlarge_it(side: int, sizes: list[int]) -> None:
    available = [buckets.sizes(resolution, 8) for resolution in (64, 32, 16)]
    assert variants.sizes(side, side, available) == [(one, one) for one in sizes]
    assert variants.sizes(side, side, available[:1]) == [(64, 64)], "unless it is the only one"


def test_resolutions_that_a_picture_is_too_small_for_are_told(base: Path, loaded: Family, tmp_path: Path) -> None:
    Image.effect_noise((80, 80), 60).convert("RGB").save(tmp_path / "large.png")
    Image.effect_noise((40, 40), 60).convert("RGB").save(tmp_path / "small.png")
    run = small.settled(tmp_path, base, data__resolution_px=64, data__further_resolutions_px=[32], train__steps=40)
    table = ledger.ledger(fitted(run, loaded, tmp_path), run, loaded, [])
    rows = {row["file"]: row for row in table["pictures"]}
    assert "fewer-resolutions" in rows["small.png"]["why"]
    assert "upscaled" not in rows["small.png"]["why"]
    assert "fewer-resolutions" not in rows["large.png"]["why"]
    assert list(rows["small.png"]["shown_at"]) == ["32x32"]
    assert min(rows["large.png"]["shown_at"].values()) > 5
    assert table["totals"]["buckets_px"] == {"32x32": 2, "64x64": 1}


# ---------------------------------------------------------------- transparency as mask


def test_transparency_is_a_mask_where_that_is_set(base: Path, loaded: Family, tmp_path: Path) -> None:
    folder = small.draw_folder(tmp_path / "set", 3, square=True)
    for on in (False, True):
        run = small.settled(folder, base, data__alpha_mask=on)
        dataset = fitted(run, loaded, tmp_path)
        rows = {row["file"]: row for row in ledger.ledger(dataset, run, loaded, [])["pictures"]}
        assert (rows["2.png"]["mask"] == "2.png") == ("alpha-as-mask" in rows["2.png"]["why"]) == on
        assert rows["1.png"]["mask"] is None, "what is opaque has none"
    item = next(item for item in dataset.account.used if item.path.name == "2.png")
    weights = masks.weights(masks.read(item.path, item.path), (32, 32), Crop(), 4, 0.1)[0]
    assert weights[:3, :3].max() / weights[5:, 5:].min() == pytest.approx(0.1)
    Image.new("L", (48, 48), 255).save(folder / "2-masklabel.png")
    masked = {row["file"]: row for row in ledger.ledger(fitted(run, loaded, tmp_path), run, loaded, [])["pictures"]}
    assert masked["2.png"]["mask"] == "2-masklabel.png", "a mask file comes first"
    assert "alpha-as-mask" not in masked["2.png"]["why"]


def test_transparency_is_turned_as_its_picture(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (40, 24), (200, 30, 30, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 10, 6))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    decoded = decode(tmp_path / "a.png", "white")
    assert decoded.alpha is not None
    assert decoded.alpha.size == decoded.picture.size == (24, 40)
    assert np.array_equal(np.asarray(decoded.alpha) == 0, (np.asarray(decoded.picture) == 255).all(-1)), "where the ground is seen"
