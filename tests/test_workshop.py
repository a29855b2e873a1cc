"""Packs made of packs, against dense matrices in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sdlora.errors import UserError
from sdlora.making import compare_packs, merge_packs, pack_spectrum, resize_pack
from sdlora.packs import file, spectrum

A, B, CONV = "lora_unet_a_to_q", "lora_unet_b_to_q", "lora_unet_c_conv1"
Matrices = dict[str, np.ndarray]


def write(path: Path, seed: int, rank: int, alpha: float, modules: tuple[str, ...] = (A, B, CONV), **said: str) -> Matrices:
    """A random pack; returns its ΔW, by NumPy from the written halves."""
    rng, tensors, dense = np.random.default_rng(seed), {}, {}
    for module in modules:
        kernel = (3, 3) if module == CONV else ()
        down, up = rng.standard_normal((rank, 20, *kernel)), rng.standard_normal((24, rank, *[1] * len(kernel)))
        halves = [torch.from_numpy(one).half() for one in (down, up)]
        tensors |= {f"{module}.lora_down.weight": halves[0], f"{module}.lora_up.weight": halves[1], f"{module}.alpha": torch.tensor(alpha)}
        flat = [one.double().numpy().reshape(len(one), -1) for one in halves]
        dense[module] = alpha / rank * flat[1] @ flat[0]
    file.save(path, tensors, lambda _: dict(said))
    return dense


def dense(path: Path) -> Matrices:
    """ΔW of a pack by another way than the code under test."""
    tensors, found = file.load(path).tensors, {}
    for module in {key.partition(".")[0] for key in tensors}:
        if f"{module}.diff" in tensors:
            found[module] = tensors[f"{module}.diff"].double().flatten(1).numpy()
            continue
        down, up = (tensors[f"{module}.lora_{side}.weight"].double().flatten(1).numpy() for side in ("down", "up"))
        found[module] = float(tensors[f"{module}.alpha"]) / len(down) * up @ down
    return found


@pytest.mark.parametrize("how", ["concat", "sum"])
def test_a_merged_pack_is_the_weighted_sum(tmp_path: Path, how: str) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    one, two = write(a, 1, 4, 2.0), write(b, 2, 3, 3.0, (A, CONV), **{"modelspec.trigger_phrase": "fox"})
    cost = merge_packs([f"{a}:0.8", f"{b}:-0.5"], out := tmp_path / "m.safetensors", how)
    got = dense(out)
    for module, first in one.items():
        wanted = 0.8 * first - 0.5 * two.get(module, 0.0)
        assert np.linalg.norm(got[module] - wanted) < 1e-3 * np.linalg.norm(wanted)
    assert 0 < cost.error < 1e-3
    assert cost.ranks == ((4, 7) if how == "concat" else (0, 0))
    pack = file.load(out)
    assert pack.trigger == "fox"
    assert pack.metadata["sdlora.merged"].startswith("a:0.8 sha256 ")
    if how == "concat":
        assert {float(tensor) for key, tensor in pack.tensors.items() if key.endswith("alpha")} == {7.0}


def test_a_pack_is_resized_as_well_as_can_be_and_says_what_is_lost(tmp_path: Path) -> None:
    a = tmp_path / "a.safetensors"
    whole = write(a, 1, 6, 6.0)
    for rank in (1, 4):
        cost = resize_pack(a, out := tmp_path / f"{rank}.safetensors", rank)
        lost = {m: np.linalg.svd(w, compute_uv=False)[rank:] for m, w in whole.items()}
        best = np.sqrt(sum((one**2).sum() for one in lost.values()) / sum((w**2).sum() for w in whole.values()))
        assert cost.error == pytest.approx(best, rel=1e-3)
        got = dense(out)
        assert np.linalg.norm(got[A] - whole[A]) == pytest.approx(np.linalg.norm(lost[A]), rel=1e-3)
    assert resize_pack(a, tmp_path / "1.safetensors", 1).error > 0.5
    assert resize_pack(a, tmp_path / "e.safetensors", error=0.3).worst <= 0.301
    assert resize_pack(a, tmp_path / "k.safetensors", energy=0.9).energy >= 0.899
    with pytest.raises(UserError, match="one bound"):
        resize_pack(a, out, 2, 0.5)


def test_packs_of_different_bases_are_refused(tmp_path: Path) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write(a, 1, 4, 2.0, (A,))
    write(b, 2, 4, 2.0, (B,))
    with pytest.raises(UserError, match="different bases"):
        merge_packs([str(a), str(b)], tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()
    write(a, 1, 4, 2.0, (A,), ss_base_model_version="sd_v1")
    write(b, 2, 4, 2.0, (A,), ss_base_model_version="other")
    with pytest.raises(UserError, match="different families"):
        merge_packs([str(a), str(b)], tmp_path / "m.safetensors")


def test_a_kind_that_its_base_shapes_is_refused(tmp_path: Path) -> None:
    a = tmp_path / "a.safetensors"
    file.save(a, {f"{A}.weight": torch.ones(4), f"{A}.on_input": torch.tensor(True)}, lambda _: {})
    with pytest.raises(UserError, match="beside its base's weight"):
        compare_packs(a, a)


def test_packs_are_compared_module_by_module(tmp_path: Path) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    one, two = write(a, 1, 4, 2.0), write(b, 2, 3, 3.0, (A, CONV))
    assert all(found.relative == pytest.approx(0, abs=1e-12) for found in compare_packs(a, a))
    first, *rest = compare_packs(a, b)
    assert (first.module, first.only) == (B, str(a))
    for found in rest:
        x, y = one[found.module], two[found.module]
        norms = np.linalg.norm(x), np.linalg.norm(y)
        assert found.relative == pytest.approx(np.linalg.norm(x - y) / max(norms))
        assert found.cosine == pytest.approx((x * y).sum() / norms[0] / norms[1])


def test_a_spectrum_is_that_of_the_dense_matrix(tmp_path: Path) -> None:
    a = tmp_path / "a.safetensors"
    whole = write(a, 1, 6, 3.0)
    found, advice = pack_spectrum(a, tmp_path / "s.png")
    for one in found:
        values = np.linalg.svd(whole[one.module], compute_uv=False)[:6]
        assert one.values == pytest.approx(values)
        shares = values / values.sum()
        assert one.effective == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
        assert (values[: one.needed] ** 2).sum() >= 0.95 * (values**2).sum() > (values[: one.needed - 1] ** 2).sum()
    assert 1 < advice <= 6
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_a_planted_intruder_is_found_and_a_small_change_has_none() -> None:
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.standard_normal((40, 40)))[0] for _ in range(2))
    weight = torch.from_numpy(left * np.linspace(10, 1, 40) @ right.T)
    planted = torch.from_numpy(20 * np.outer(left.sum(1), rng.standard_normal(40)) / 40)
    assert spectrum.intruders(weight, planted) == [0]
    assert spectrum.intruders(weight, 1e-4 * torch.from_numpy(rng.standard_normal((40, 40)))) == []
