"""Packs made of packs and of bases, against dense matrices in float64, and against the pictures that they draw."""

import json
import shutil
from pathlib import Path
from typing import Any

import bases
import numpy as np
import pytest
import safetensors.torch
import small
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from sdlora import extraction, family, lookup
from sdlora.adapter import Bank
from sdlora.errors import UserError
from sdlora.family import Family
from sdlora.making import bake_packs, compare_packs, extract_pack, merge_packs, pack_spectrum, resize_pack
from sdlora.packs import file, spectrum
from sdlora.packs.workshop import Budget
from sdlora.studio import Studio

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
    cost, pictures = merge_packs([f"{a}:0.8", f"{b}:-0.5"], out := tmp_path / "m.safetensors", how)
    assert pictures is None, "no base is at hand"
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
        cost, _ = resize_pack(a, out := tmp_path / f"{rank}.safetensors", rank)
        lost = {m: np.linalg.svd(w, compute_uv=False)[rank:] for m, w in whole.items()}
        best = np.sqrt(sum((one**2).sum() for one in lost.values()) / sum((w**2).sum() for w in whole.values()))
        assert cost.error == pytest.approx(best, rel=1e-3)
        got = dense(out)
        assert np.linalg.norm(got[A] - whole[A]) == pytest.approx(np.linalg.norm(lost[A]), rel=1e-3)
    assert resize_pack(a, tmp_path / "1.safetensors", 1)[0].error > 0.5
    assert resize_pack(a, tmp_path / "e.safetensors", error=0.3)[0].worst <= 0.301
    assert resize_pack(a, tmp_path / "k.safetensors", energy=0.9)[0].energy >= 0.899
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
    assert all(found.relative == pytest.approx(0, abs=1e-12) for found in compare_packs(a, a)[0])
    first, *rest = compare_packs(a, b)[0]
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


# ---------------------------------------------------------------- with the base at hand


def loaded_of(folder: Path) -> Family:
    return family.load(family.find(str(folder)), torch.device("cpu"), torch.float32)


def kind_pack(path: Path, loaded: Family, kind: str, seed: int = 1) -> Path:
    """A pack of some kind with random weights on a base's cross-attention."""
    module, bank = lookup.find("adapters", kind), Bank(loaded.components)
    pieces = dict.fromkeys(small.matching(loaded, module, ["unet.*.attn2.*"]), (module, small.some_config(module, 2)))
    bank.add("a", pieces, small.stream_of)
    small.randomise(bank, "a", seed, 0.1)
    tensors = file.tensors_of(bank, "a", loaded)
    bank.eject()
    file.save(path, tensors, lambda sha: {"sdlora.adapter": kind, "sshs_model_hash": sha, "modelspec.trigger_phrase": "mira"})
    return path


def pixels(base: Path, packs: list[tuple[Path, float]]) -> torch.Tensor:
    studio = Studio.open(family.find(str(base)), torch.float32)
    scales = tuple((studio.add(file.load(path)), scale) for path, scale in packs)
    return studio.pixels([studio.recipe("mira", "64x64", steps=3, scales=scales)])


@pytest.mark.parametrize(
    ("kind", "single"),
    [
        ("sd1", False),
        ("sdxl", True),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in [("sdxl", False), ("sd1", True), ("sd2", True)]),
    ],
)
def test_a_baked_base_draws_as_the_base_with_the_packs_on(
    kind: str, single: bool, families: dict[str, Path], sd15_base: Path, tmp_path: Path
) -> None:
    base = families.get(kind, sd15_base)
    loaded = loaded_of(base)
    targets = ("all-linear", "text-encoder")
    packs = [(small.random_pack(tmp_path / f"{i}.safetensors", loaded, i + 1, targets=targets), 0.5 + i) for i in range(2)]
    if single:
        base = bases.single_file(base, tmp_path / "one" / "base.safetensors")
        shutil.copytree(base.parent / "tokenizer", tmp_path / "tokenizer")
    out = tmp_path / ("baked.safetensors" if single else "baked")
    baked, _ = bake_packs([f"{path}:{scale}" for path, scale in packs], str(base), out, pictures=False)
    assert baked.error < 1e-3
    assert set(baked.layers) == set(loaded.components)
    wanted, got, bare = pixels(base, packs), pixels(out, []), pixels(base, [])
    assert (wanted - got).abs().max() < 1e-4
    assert (wanted - bare).abs().max() > 0.01, "the control: the packs do something"
    if not single:
        pipeline = DiffusionPipeline.from_pretrained(str(out), local_files_only=True)
        for dotted, layer in loaded_of(out).layers().items():
            if dotted.startswith("unet.") and hasattr(layer, "weight"):
                assert torch.equal(layer.weight, pipeline.unet.get_submodule(dotted.removeprefix("unet.")).weight)


def test_what_is_not_changed_stays_byte_for_byte(base: Path, tmp_path: Path) -> None:
    """In the number format that the base has: half precision here, in two files, beside older versions that must not go along."""
    held = small.copy_base(base, tmp_path / "held")
    for weights in held.glob("*/*.safetensors"):
        tensors = {name: tensor.half() for name, tensor in safetensors.torch.load_file(weights).items()}
        safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    shutil.copy(held / "unet" / "diffusion_pytorch_model.safetensors", held / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    (held / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"old")
    (held / "whole.safetensors").write_bytes(b"old")
    (held / ".git").mkdir()
    (held / ".git" / "x").write_text("x")
    index = json.loads((held / "model_index.json").read_text())
    (held / "model_index.json").write_text(json.dumps({**index, "safety_checker": ["x", "Y"]}))
    pack = small.random_pack(tmp_path / "a.safetensors", loaded_of(held), 1, targets=("unet.*.to_k",))
    baked, pictures = bake_packs([str(pack)], str(held), out := tmp_path / "baked")
    assert pictures is not None
    assert pictures.rms < 0.05 * pictures.effect
    assert 1e-6 < baked.error < 0.02, "rounded once"
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert not names & {
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "whole.safetensors",
        ".git/x",
    }
    assert {"model_index.json", "scheduler/scheduler_config.json", "vae/config.json"} <= names
    assert json.loads((out / "model_index.json").read_text())["safety_checker"] == [None, None]
    for name in names:
        if not name.endswith(".safetensors"):
            continue
        with safe_open(held / name, "pt") as before, safe_open(out / name, "pt") as after:
            assert [*before.keys()] == [*after.keys()]
            changed = {key for key in before.keys() if not torch.equal(before.get_tensor(key), after.get_tensor(key))}  # noqa: SIM118
            assert all(after.get_tensor(key).dtype == torch.float16 for key in after.keys())  # noqa: SIM118
        assert all(".to_k." in key for key in changed)
        assert bool(changed) == name.startswith("unet")


def test_what_cannot_be_baked_is_refused_and_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_of(base)
    pack, words = small.random_pack(tmp_path / "a.safetensors", loaded), tmp_path / "w.safetensors"
    bank, prompt = Bank(loaded.components), lookup.find("adapters", "prefix")
    bank.add("a", dict.fromkeys(small.matching(loaded, prompt, ["unet.*"]), (prompt, small.some_config(prompt))), small.stream_of)
    small.randomise(bank, "a")
    file.save(words, file.tensors_of(bank, "a", loaded), lambda _: {"sdlora.adapter": "prefix"})
    there = tmp_path / "there"
    there.mkdir()
    cases: list[tuple[list[Any], str]] = [
        ([[str(pack)], str(base), there], "E-SHOP-11"),
        ([[str(pack)], str(base), base / "inside"], "E-SHOP-11"),
        ([[str(pack)], str(base), tmp_path / "x.safetensors"], "E-SHOP-12"),
        ([[str(words)], str(base), tmp_path / "x"], "E-SHOP-04"),
        ([[str(tmp_path / "none.safetensors")], str(base), tmp_path / "x"], "E-PACK-02"),
    ]
    for arguments, code in cases:
        with pytest.raises(UserError, match=code):
            bake_packs(*arguments)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="E-DISK-01"):
        bake_packs([str(pack)], str(base), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert not list(there.iterdir())


def test_what_was_baked_in_is_extracted_again(base: Path, tmp_path: Path) -> None:
    loaded = loaded_of(base)
    pack = small.random_pack(tmp_path / "a.safetensors", loaded, rank=3, targets=("all-linear", "unet.*.resnets.*.conv*", "text-encoder"))
    bake_packs([str(pack)], str(base), tuned := tmp_path / "tuned", pictures=False)
    norms = tuned / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(norms)
    moved = next(name for name in tensors if ".norm1." in name)
    tensors[moved] = tensors[moved] + 0.5
    safetensors.torch.save_file(tensors, norms, {"format": "pt"})
    found, _ = extract_pack(str(base), str(tuned), out := tmp_path / "x.safetensors", Budget(rank=3), pictures=False)
    assert found.beside == [f"unet.{moved}"], "what no pack holds is named"
    first, second = dense(pack), dense(out)
    assert first.keys() == second.keys()
    assert found.layers == len(first)
    assert found.same > 0
    for module, change in first.items():
        assert np.linalg.norm(second[module] - change) < 2e-3 * np.linalg.norm(change), module
    assert found.cost.error < 2e-3
    less, _ = extract_pack(str(base), str(tuned), tmp_path / "y.safetensors", Budget(rank=1), pictures=False)
    assert less.cost.error > 0.1, "the control"
    _, pictures = extract_pack(str(base), str(tuned), tmp_path / "z.safetensors", Budget(energy=1.0))
    assert pictures is not None
    assert pictures.effect > 0


def test_a_randomised_svd_is_nearly_the_best() -> None:
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((side, 200)))[0] for side in (300, 260))
    matrix = torch.from_numpy(left * (1 / np.arange(1, 201)) @ right.T)
    u, values, v = extraction.randomised(matrix, 10)
    best = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(values, best[:10], rtol=1e-4, atol=0)
    lost = torch.linalg.vector_norm(matrix - u * values @ v)
    assert lost < 1.001 * torch.linalg.vector_norm(best[10:])


def test_bases_that_have_no_difference_that_a_pack_holds_are_refused(base: Path, families: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="E-SHOP-15"):
        extract_pack(str(base), str(base), out, Budget(rank=2))
    with pytest.raises(UserError, match=r"E-SHOP-06.*different families"):
        extract_pack(str(base), str(families["sdxl"]), out, Budget(rank=2))
    other = small.make_base(tmp_path / "wider", {**small.SMALL_UNET, "block_out_channels": (16, 48)}, text_layers=2, vae_levels=3)
    with pytest.raises(UserError, match=r"E-SHOP-06.*shape"):
        extract_pack(str(base), str(other), out, Budget(rank=2))
    halves = small.copy_base(base, tmp_path / "halves")
    for weights in halves.glob("*/*.safetensors"):
        tensors = {name: tensor.half() for name, tensor in safetensors.torch.load_file(weights).items()}
        safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match="E-SHOP-15"):
        extract_pack(str(base), str(halves), out, Budget(rank=2))
    assert not out.exists()


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "ia3", "oft"])
def test_with_its_base_any_change_of_weights_is_merged(kind: str, base: Path, tmp_path: Path) -> None:
    loaded = loaded_of(base)
    one, two = kind_pack(tmp_path / "one.safetensors", loaded, kind), small.random_pack(tmp_path / "two.safetensors", loaded)
    with pytest.raises(UserError, match=r"E-SHOP-03.*--base"):
        merge_packs([str(one), str(two)], tmp_path / "m.safetensors", "sum")
    cost, pictures = merge_packs([f"{one}:1", f"{two}:0.5"], out := tmp_path / "m.safetensors", "sum", base=str(base))
    assert cost.error < 2e-3
    assert pictures is not None
    assert pictures.rms < 0.02 * pictures.effect, "merged packs draw what the packs draw together"
    wanted, got = pixels(base, [(one, 1.0), (two, 0.5)]), pixels(base, [(out, 1.0)])
    assert (wanted - got).abs().max() < 5e-3
    assert (wanted - pixels(base, [(one, 1.0)])).abs().max() > 5e-3, "the control: both do something"


def test_errors_of_the_workshop_are_told(tmp_path: Path) -> None:
    a = tmp_path / "a.safetensors"
    write(a, 1, 4, 2.0)
    full = tmp_path / "full.safetensors"
    file.save(full, {f"{A}.diff": torch.ones(3, 3)}, lambda _: {})
    for arguments, code in [
        (([str(a)], tmp_path / "x.safetensors", "svd"), "E-SHOP-07"),
        (([str(full)], tmp_path / "x.safetensors", "concat"), "E-SHOP-08"),
        (([], tmp_path / "x.safetensors"), "E-SHOP-09"),
        (([str(a)], tmp_path / "x.safetensors", "melt"), "E-SHOP-10"),
        (([str(a)], tmp_path / "x.safetensors", "concat", 4), "E-SHOP-10"),
    ]:
        with pytest.raises(UserError, match=code):
            merge_packs(*arguments)  # type: ignore[arg-type]
    other = tmp_path / "other.safetensors"
    file.save(other, {f"{A}.diff": torch.ones(4, 4)}, lambda _: {})
    with pytest.raises(UserError, match="E-SHOP-01"):
        merge_packs([str(full), str(other)], tmp_path / "x.safetensors", "sum")
    loose = tmp_path / "loose.safetensors"
    file.save(loose, {"a.lora_down.weight": torch.ones(1, 4), "a.lora_up.weight": torch.ones(4, 1)}, lambda _: {})
    with pytest.raises(UserError, match="E-SHOP-02"):
        resize_pack(loose, tmp_path / "x.safetensors", 1)
    assert not (tmp_path / "x.safetensors").exists()


def test_intruders_are_found_beside_the_base(base: Path, tmp_path: Path) -> None:
    loaded = loaded_of(base)
    quiet = small.random_pack(tmp_path / "quiet.safetensors", loaded, alpha=1e-3, targets=("unet.*.to_q",))
    loud = small.random_pack(tmp_path / "loud.safetensors", loaded, alpha=300.0, targets=("unet.*.to_q",))
    found = {path: pack_spectrum(path, tmp_path / "s.png", str(base))[0] for path in (quiet, loud)}
    assert all(one.intruders == [] for one in found[quiet])
    assert any(one.intruders for one in found[loud])
    assert all(one.intruders is None for one in pack_spectrum(loud)[0])
