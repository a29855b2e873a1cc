"""Every measure moves the way it should on a case that was built for it, and stays where nothing changed."""

import pytest
import torch
from small import numbers
from torch import Tensor

from sdlora import measures
from sdlora.judge import Judged, overtrained, response
from sdlora.state import Score


def unit(seed: int, count: int = 12, width: int = 32) -> Tensor:
    return torch.nn.functional.normalize(numbers((count, width), seed), dim=1)


def near(vectors: Tensor, share: float, seed: int = 9) -> Tensor:
    """Unit vectors that are a share of the given ones and noise otherwise."""
    return torch.nn.functional.normalize(share * vectors + (1 - share) * unit(seed, *vectors.shape), dim=1)


def test_likeness_grows_with_what_is_shared_and_takes_the_best_of_all() -> None:
    true = unit(1)
    all_fit = torch.ones(12, 12, dtype=torch.bool)
    found = [float(measures.likeness(near(true.roll(3, 0), share), true, all_fit).mean()) for share in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(1.0, abs=1e-5)
    assert found[0] < 0.5


def test_what_a_prompt_asks_for_is_not_answered_by_another_picture() -> None:
    """Pictures of the right set under the wrong prompts, as an adapter draws that knows its training pictures by heart."""
    true, says = unit(1), [f"tavi {i}" for i in range(12)]
    fits = measures.fitting(says, says)
    assert float(measures.likeness(near(true, 0.9), true, fits).mean()) > 0.9
    assert float(measures.likeness(near(true.roll(1, 0), 0.9), true, fits).mean()) < 0.5
    assert float(measures.likeness(near(true.roll(1, 0), 0.9), true, torch.ones_like(fits)).mean()) > 0.9, "the control: it would pass"
    assert measures.fitting(["tavi", "a"], ["tavi", "tavi", "b"]).tolist() == [[True, True, False], [True, True, True]]


def test_drift_is_zero_for_the_base_itself_and_grows_with_the_change() -> None:
    base = unit(2)
    assert float(measures.drift(base, base).abs().max()) < 1e-5, "a sum of 32 products in fp32 is within 32 half units of 6e-8"
    found = [float(measures.drift(base, near(base, share)).mean()) for share in (0.9, 0.6, 0.3, 0.0)]
    assert found == sorted(found)


def test_centring_parts_what_a_common_share_makes_alike() -> None:
    common = 10 * numbers((1, 32), 5)
    a, b, other = (common + numbers((6, 32), seed) for seed in (1, 2, 3))
    raw = torch.nn.functional.cosine_similarity(a, b).mean()
    own = (measures.centred(a, other) * measures.centred(b, other)).sum(1).mean()
    assert raw > 0.95
    assert own < 0.8


def test_a_copy_is_told_from_what_is_only_alike() -> None:
    seen = numbers((10, 32), 4)
    copies, alike = seen + 0.01 * numbers((10, 32), 6), numbers((10, 32), 7)
    assert measures.copied(measures.memorisation(copies, seen)) == 1.0
    assert measures.copied(measures.memorisation(alike, seen)) == 0.0
    assert measures.memorisation(copies, seen[:1]).isnan().all()  # one picture has no neighbour to compare with


def test_diversity_is_within_a_prompt_alone() -> None:
    group = ["a"] * 6 + ["b"] * 6
    apart, alike = unit(1), torch.cat([near(unit(1)[:1].expand(6, -1), 0.9), near(unit(2)[:1].expand(6, -1), 0.9)])
    assert measures.diversity(alike, group) < 0.2 < measures.diversity(apart, group)
    assert measures.diversity(unit(1)[:2], ["a", "b"]) != measures.diversity(unit(1)[:2], ["a", "b"])  # nan: no pair


def test_a_prompt_that_draws_another_thing_loses_its_place() -> None:
    base = unit(3)
    assert measures.own_rank(near(base, 0.9), base).eq(1).all()
    assert measures.own_rank(base.roll(1, 0), base).gt(1).all()
    assert float(measures.following(base, base).mean()) == pytest.approx(1.0, abs=1e-5)


def test_the_bootstrap_pairs_what_it_compares() -> None:
    """Two that differ by little in every single picture differ for sure, however much the pictures differ among themselves."""
    values = numbers((40,), 8)
    places = measures.resampled(40)
    low, high = measures.interval((values + 0.05)[places].mean(1) - values[places].mean(1))
    assert low == pytest.approx(0.05, abs=1e-5)
    assert high == pytest.approx(0.05, abs=1e-5)
    low, high = measures.interval(numbers((40,), 9)[places].mean(1) - values[places].mean(1))
    assert high - low > 0.2


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    places = measures.resampled(30)
    inside = 0
    for seed in range(200):
        low, high = measures.interval(numbers((30,), 100 + seed)[places].mean(1))
        inside += low <= 0 <= high
    assert 0.80 <= inside / 200 <= 0.96  # of 90 %; a bootstrap of 30 is a little too sure


def test_the_front_holds_what_nothing_else_beats() -> None:
    gain, cost = [0.0, 0.5, 0.4, 0.9, 0.9], [0.0, 0.2, 0.3, 0.5, 0.6]
    assert measures.front(gain, cost) == [0, 1, 3]


def judged(scale: float, likeness: float) -> Judged:
    return Judged("a", 0, scale, likeness, 0, 0, 0, 0, 1.0, 0, 0, 0, 0)


def test_where_a_pack_saturates_and_where_it_breaks() -> None:
    rows = [judged(scale, likeness) for scale, likeness in [(0.25, 0.3), (0.5, 0.6), (0.75, 0.78), (1.0, 0.8), (1.5, 0.5)]]
    assert response(rows, judged(0, 0.1)) == {"saturates_at": 0.75, "breaks_at": 1.5}
    assert response(rows[:4], judged(0, 0.1))["breaks_at"] is None
    assert response(rows, judged(0, 0.9)) == {"saturates_at": None, "breaks_at": None}  # nothing learnt


def test_overtraining_is_said_only_where_copies_come_and_likeness_goes() -> None:
    better = [Score(1, 0, 0.5, 0, 1.0), Score(2, 0, 0.6, 0, 0.7)]
    assert overtrained(better) is None
    assert overtrained([*better, Score(3, 0, 0.55, 0, 0.9)]) is None, "less like, but no copy: it only wavers"
    assert overtrained([*better, Score(3, 0, 0.55, 0, 0.4)]) == 3
