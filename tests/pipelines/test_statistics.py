"""Differences between systems: intervals against scipy's and against simulated truth, and Holm's correction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from setwise.pipelines import statistics
from setwise.pipelines.benchmarks import Outcome, QueryRanks
from setwise.pipelines.statistics import differences, holm

Bools = NDArray[np.bool_]
Ints = NDArray[np.integer]


def ranks_of(ranks: Ints, owners: Ints, **more: Any) -> QueryRanks:
    return QueryRanks(np.arange(len(ranks)), owners.astype(np.int64), ranks.astype(np.int32), **more)


def found(hits: Bools, owners: Ints) -> Outcome:
    """Captions of which some find their image first."""
    ranks = {"t2i": ranks_of(np.where(hits, 1, 2), owners)}
    return Outcome("x", {"t2i_R1": 100 * float(hits.mean())}, {"ties": "pessimistic"}, ranks)


def both_directions(seed: int, images: int = 60) -> Outcome:
    """Random ranks of images and of one to three captions each."""
    random = np.random.default_rng(seed)
    owners = np.repeat(np.arange(images), np.random.default_rng(0).integers(1, 4, images))
    ranks = {
        "i2t": ranks_of(random.integers(1, 15, images), np.arange(images)),
        "t2i": ranks_of(random.integers(1, 15, len(owners)), owners),
    }
    values = {f"{d}_R{k}": 100 * float((one.ranks <= k).mean()) for d, one in ranks.items() for k in (1, 5, 10)}
    values |= {"rsum": sum(values.values()), "i2t_median_rank": float(np.median(ranks["i2t"].ranks))}
    return Outcome("x", values, {"ties": "pessimistic"}, ranks)


def simulate(
    random: np.random.Generator, seeds: int, images: int = 150, captions: int = 5, better: float = 0.0
) -> tuple[list[Outcome], list[Outcome]]:
    """Two systems on images of different difficulty, on which each has strengths of its own, and so have its seeds;
    `better` the first."""
    owners = np.repeat(np.arange(images), captions)
    shared = random.normal(size=images)
    sides = []
    for gain in (better, 0.0):
        own = shared + 0.5 * random.normal(size=images) + gain
        noise = random.normal(size=(seeds, images, captions))
        if seeds > 1:
            noise += 0.15 * random.normal(size=(seeds, 1, 1))
        sides.append([found((own[:, None] + one > 0.3).ravel(), owners) for one in noise])
    return sides[0], sides[1]


def test_the_difference_is_that_of_the_means_over_seeds() -> None:
    candidate, baseline = [both_directions(seed) for seed in (1, 2, 3)], [both_directions(seed) for seed in (4, 5)]
    measured = differences(candidate, baseline, resamples=50)
    assert list(measured) == ["rsum", *(f"{d}_R{k}" for d in ("i2t", "t2i") for k in (1, 5, 10))]
    for name, one in measured.items():
        sides = [np.mean([outcome.values[name] for outcome in side]) for side in (candidate, baseline)]
        assert one.value == pytest.approx(sides[0] - sides[1])
        assert one.low < one.value < one.high


def test_intervals_agree_with_scipy_s_paired_bootstrap_over_images() -> None:
    (one,), (other,) = simulate(np.random.default_rng(0), 1, better=0.2)
    ours = differences([one], [other], resamples=20_000)["t2i_R1"]
    per_image = [(side.ranks["t2i"].ranks == 1).reshape(-1, 5).mean(axis=1) * 100 for side in (one, other)]
    theirs = scipy.stats.bootstrap(
        per_image,
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        paired=True,
        n_resamples=20_000,
        batch=1000,
        method="percentile",
        random_state=1,
    )
    low, high = theirs.confidence_interval
    width = high - low
    assert ours.low == pytest.approx(low, abs=0.03 * width)
    assert ours.high == pytest.approx(high, abs=0.03 * width)
    assert (ours.high - ours.low) == pytest.approx(width, rel=0.04)
    normal = 2 * scipy.stats.norm.sf(abs(ours.value) / theirs.standard_error)
    assert ours.p == pytest.approx(normal, rel=0.35, abs=0.002)


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_hold_the_truth_in_95_of_100_cases_and_no_difference_is_seldom_significant(seeds: int) -> None:
    """Of 300 cases, 95 % with a standard deviation of 1.3 %."""
    cases = [
        differences(*simulate(np.random.default_rng((seeds, case)), seeds), resamples=300, seed=case)["t2i_R1"]
        for case in range(300)
    ]
    held = np.mean([one.low <= 0 <= one.high for one in cases])
    significant = np.mean([one.p < 0.05 for one in cases])
    assert 0.92 <= held <= 0.985
    assert 0.015 <= significant <= 0.08


def test_a_real_difference_is_found() -> None:
    one, other = simulate(np.random.default_rng(0), 2, better=0.6)
    ours = differences(one, other)["t2i_R1"]
    assert ours.low > 0 and ours.p == pytest.approx(2 / 2001)
    turned = differences(other, one)["t2i_R1"]
    assert turned.high < 0 and turned.p == ours.p


def test_captions_of_one_image_are_no_independent_evidence() -> None:
    """Taken for images of their own, they would make the interval too narrow."""
    one, other = simulate(np.random.default_rng(3), 1, images=300)
    alone = [
        replace(side, ranks={"t2i": replace(side.ranks["t2i"], images=np.arange(1500))}) for side in (one[0], other[0])
    ]
    nested, independent = differences(one, other)["t2i_R1"], differences([alone[0]], [alone[1]])["t2i_R1"]
    assert nested.value == independent.value
    assert nested.high - nested.low > 1.1 * (independent.high - independent.low)


def test_seeds_that_differ_widen_the_interval() -> None:
    """By the variance of their mean, as it is estimated from so many."""
    owners = np.repeat(np.arange(400), 5)
    random = np.random.default_rng(0)
    shares = (0.40, 0.50, 0.54)
    candidate = [found(random.random(2000) < share, owners) for share in shares]
    baseline = [found(random.random(2000) < 0.45, owners)]
    interval = differences(candidate, baseline, resamples=4000)["t2i_R1"]
    mean = replace(candidate[0], ranks={"t2i": replace(candidate[0].ranks["t2i"])})
    of_images = differences([mean], baseline, resamples=4000)["t2i_R1"]
    assert interval.high - interval.low > 2 * (of_images.high - of_images.low)
    sums = statistics._Sums.of(candidate, ["t2i_R1"])
    drawn = statistics._mean_of_drawn_seeds(np.repeat(sums.values(np.ones((1, 400))), 20_000, axis=0), random)
    values = [one.values["t2i_R1"] for one in candidate]
    assert drawn.var() == pytest.approx(np.var(values, ddof=1) / 3, rel=0.05)


def test_a_system_does_not_differ_from_itself() -> None:
    same = both_directions(1)
    for one in differences([same], [same], resamples=100).values():
        assert (one.value, one.low, one.high, one.p) == (0, 0, 0, 1)


@pytest.mark.parametrize(("images", "p"), [(1, 1.0), (3, 0.25)])
def test_few_images_that_all_agree_are_no_proof(images: int, p: float) -> None:
    every, none = (found(np.full(images, hit), np.arange(images)) for hit in (True, False))
    difference = differences([every], [none])["t2i_R1"]
    assert (difference.value, difference.p) == (100, p)


def test_the_same_arguments_give_the_same_and_another_seed_gives_another() -> None:
    sides = simulate(np.random.default_rng(0), 2)
    assert differences(*sides, resamples=300) == differences(*sides, resamples=300)
    assert differences(*sides, resamples=300) != differences(*sides, resamples=300, seed=1)


def test_each_fold_counts_the_same_however_many_queries_it_has() -> None:
    owners, fold = np.array([0, 0, 0, 1]), np.array([0, 0, 0, 1], dtype=np.int8)
    one = found(np.array([True, False, False, True]), owners)
    other = found(np.array([False, False, False, False]), owners)
    folded = [replace(side, ranks={"t2i": replace(side.ranks["t2i"], fold=fold)}) for side in (one, other)]
    assert differences([folded[0]], [folded[1]], resamples=10)["t2i_R1"].value == pytest.approx(100 * (1 / 3 + 1) / 2)
    assert differences([one], [other], resamples=10)["t2i_R1"].value == 50


def test_precisions_are_compared_as_they_are_reported() -> None:
    random = np.random.default_rng(0)
    sides = []
    for _ in range(2):
        average, precise = (random.random(40).astype(np.float32) for _ in range(2))
        ranks = {"t2i": ranks_of(random.integers(1, 9, 40), np.arange(40), average_precision=average)}
        ranks["t2i"] = replace(ranks["t2i"], r_precision=precise)
        values = {"t2i_map_at_r": 100 * float(average.mean()), "t2i_r_precision": 100 * float(precise.mean())}
        sides.append(Outcome("x", values, {}, ranks))
    measured = differences([sides[0]], [sides[1]], resamples=50)
    assert measured.keys() == sides[0].values.keys()
    for name, one in measured.items():
        assert one.value == pytest.approx(sides[0].values[name] - sides[1].values[name], abs=1e-4)
    lacking = replace(sides[0], ranks={"t2i": replace(sides[0].ranks["t2i"], average_precision=None)})
    with pytest.raises(ValueError, match="t2i_map_at_r of each query was not kept"):
        differences([lacking], [sides[1]])


def test_only_what_was_measured_alike_is_compared() -> None:
    one = both_directions(1)
    fewer = {"i2t": one.ranks["i2t"]}
    shifted = {**one.ranks, "i2t": replace(one.ranks["i2t"], ids=one.ranks["i2t"].ids + 1)}
    for other, message in (
        (replace(one, protocol={"ties": "official"}), "measured alike"),
        (replace(one, benchmark="y"), "measured alike"),
        (replace(one, ranks={}), "of each query is missing"),
        (replace(one, ranks=fewer), "of each query is missing"),
        (replace(one, ranks=shifted), "other queries were asked"),
    ):
        with pytest.raises(ValueError, match=message):
            differences([other], [one])
    with pytest.raises(ValueError, match="one seed at least"):
        differences([one], [])
    own_similarity = replace(one, protocol={"ties": "pessimistic", "similarity": {"kind": "mil"}})
    assert differences([own_similarity], [one], resamples=10)["rsum"].value == 0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize("seed", range(5))
def test_holm_rejects_what_its_steps_reject(seed: int) -> None:
    p = np.random.default_rng(seed).random(9) ** 3
    p[3] = p[5]
    adjusted = holm(p.tolist())
    for alpha in (0.01, 0.05, 0.2, 0.5):
        rejected, left = set(), list(range(9))
        while left and p[smallest := min(left, key=lambda one: p[one])] * len(left) <= alpha:
            rejected.add(smallest)
            left.remove(smallest)
        assert rejected == {place for place, value in enumerate(adjusted) if value <= alpha}
