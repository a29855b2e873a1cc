"""A mask weighs the loss: what it leaves out hardly counts, and it is cropped and scaled as its picture."""

from pathlib import Path
from typing import Any

import pytest
import small
import torch
from PIL import Image
from torch import Tensor

from sdlora import api, learners, train
from sdlora.adapter import Bank
from sdlora.data import buckets, ledger, masks
from sdlora.data.batches import micro_batch
from sdlora.data.buckets import CENTRE, Crop
from sdlora.errors import UserError
from sdlora.family import Family
from sdlora.objectives import epsilon


def put(folder: Path, size: tuple[int, int], white: tuple[int, int, int, int], mask_size: tuple[int, int] | None = None) -> Path:
    """A picture whose mask is white in a box."""
    folder.mkdir()
    Image.effect_noise(size, 80).convert("RGB").save(folder / "a.png")
    mask = Image.new("L", mask_size or size)
    mask.paste(255, white)
    mask.save(folder / "a-masklabel.png")
    return folder


def weights(folder: Path, size: buckets.Size, floor: float, crop: Crop = CENTRE) -> Tensor:
    return masks.weights(masks.read(folder / "a-masklabel.png", folder / "a.png"), size, crop, 4, floor)


def test_weights_follow_the_mask_and_average_to_one(tmp_path: Path) -> None:
    folder = put(tmp_path / "set", (64, 64), (0, 0, 32, 64))
    found = weights(folder, (32, 32), 0.25)
    assert found.shape == (1, 8, 8)
    assert found.mean().item() == pytest.approx(1)
    assert found[0, :, 4:].unique().tolist() == pytest.approx([0.4])
    assert found[0, :, :4].unique().tolist() == pytest.approx([1.6]), "four times as much"


def test_a_mask_is_cropped_as_its_picture(tmp_path: Path) -> None:
    folder = put(tmp_path / "set", (128, 64), (32, 0, 96, 64))
    assert weights(folder, (32, 32), 0.1).unique().tolist() == [1], "only what is white is left"
    assert len(weights(folder, (64, 32), 0.1).unique()) == 2, "the control: uncropped it is not"


def test_a_mask_of_another_shape_is_refused_and_of_another_size_is_not(base: Path, tmp_path: Path) -> None:
    other = put(tmp_path / "other", (64, 64), (0, 0, 8, 8), (64, 32))
    with pytest.raises(UserError, match=r"a-masklabel\.png has another shape"):
        list(api.train(small.settled(other, base), tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    half = put(tmp_path / "half", (64, 64), (0, 0, 8, 8), (32, 32))
    assert list(api.train(small.settled(half, base, train__steps=1), tmp_path / "run"))[-1].kind == "done"


def errors(run: Any, loaded: Family, where: Path, latents: list[tuple[Tensor, Tensor]]) -> Tensor:
    dataset = ledger.fit_dataset(ledger.read_dataset(run, where), run, loaded)
    data = learners.prepared(learners.Job(run, loaded.base, where, 0.0, dataset, ["text_encoder.x"]), loaded, [latents])
    (batch,) = micro_batch([data], range(4))
    return train.sample_losses(loaded, Bank(loaded.components), batch, [train.Goal(epsilon.noise, run.objective)])


@pytest.mark.parametrize("floor", [0.01, 1.0])
def test_what_is_masked_hardly_counts(floor: float, base: Path, loaded: Family, tmp_path: Path) -> None:
    """A change of the target where the mask is black changes the loss by the floor's share; where it is white, by nearly all."""
    folder = put(tmp_path / "set", (32, 32), (0, 0, 16, 32))
    run = small.settled(folder, base, data__mask_floor=floor, objective__min_snr_gamma=0.0)
    plain = (torch.zeros(4, 8, 8), torch.zeros(4, 8, 8))
    first = errors(run, loaded, tmp_path, [plain])
    moved = {}
    for side, columns in {"white": slice(0, 4), "black": slice(4, 8)}.items():
        loaded_predict = loaded.predict

        def shifted(x: Tensor, t: Tensor, states: Tensor, frame: Tensor, at: slice = columns, say: Any = loaded_predict) -> Tensor:
            said: Tensor = say(x, t, states, frame).clone()
            said[..., at] += 10
            return said

        loaded.predict = shifted  # type: ignore[method-assign]
        moved[side] = (errors(run, loaded, tmp_path, [plain]) - first).mean().item()
        loaded.predict = loaded_predict  # type: ignore[method-assign]
    assert moved["black"] / moved["white"] == pytest.approx(floor, rel=0.25)
