"""Ranks, recalls and precisions against their definitions, ties and many-to-many truth included."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from setwise.pipelines import metrics


def case(seed: int, images: int = 7, captions: int = 11) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Coarse scores, so that many tie, and a relation in which everything has a positive."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 5, (images, captions)) / 4
    positives = rng.random((images, captions)) < 0.2
    positives[np.arange(images), np.arange(images)] = True
    positives[rng.integers(0, images, captions), np.arange(captions)] = True
    return scores, positives


def naive_rank(scores: NDArray[np.float64], positives: NDArray[np.bool_]) -> int:
    """Sort with every negative ahead of a positive that scores the same, and find the first positive."""
    order = sorted(range(len(scores)), key=lambda item: (-scores[item], positives[item]))
    return next(place for place, item in enumerate(order, start=1) if positives[item])


@pytest.mark.parametrize("seed", range(8))
def test_recalls_agree_with_sorting(seed: int) -> None:
    scores, positives = case(seed)
    measured = metrics.retrieval_metrics(scores, positives)
    total = 0.0
    for direction, table, truth in (("i2t", scores, positives), ("t2i", scores.T, positives.T)):
        ranks = [naive_rank(row, true) for row, true in zip(table, truth, strict=True)]
        assert measured[f"{direction}_median_rank"] == np.median(ranks)
        assert measured[f"{direction}_mean_rank"] == pytest.approx(np.mean(ranks))
        for k in (1, 5, 10):
            recall = 100 * np.mean([rank <= k for rank in ranks])
            assert measured[f"{direction}_R{k}"] == pytest.approx(recall)
            total += recall
    assert measured["rsum"] == pytest.approx(total)


@pytest.mark.parametrize("seed", range(8))
def test_precisions_agree_with_their_definitions(seed: int) -> None:
    scores, positives = case(seed)
    positives[2] = False  # a query that nobody asks
    average, precision, first = [], [], []
    for row, true in zip(scores, positives, strict=True):
        if not true.any():
            continue
        order = sorted(range(len(row)), key=lambda item: (-row[item], true[item]))
        hits = [bool(true[item]) for item in order]
        wanted = sum(hits)
        precision.append(sum(hits[:wanted]) / wanted)
        average.append(sum(sum(hits[:r]) / r for r in range(1, wanted + 1) if hits[r - 1]) / wanted)
        first.append(hits[0])
    measured = metrics.ranked_positives_metrics(scores, positives)
    assert measured == pytest.approx(
        {"map_at_r": 100 * np.mean(average), "r_precision": 100 * np.mean(precision), "R1": 100 * np.mean(first)}
    )


def test_one_score_for_all_earns_nothing() -> None:
    positives = np.repeat(np.eye(20, dtype=bool), 5, axis=1)
    measured = metrics.retrieval_metrics(np.ones((20, 100)), positives)
    assert measured["rsum"] == 0
    assert measured["i2t_median_rank"] == 96 and measured["t2i_mean_rank"] == 20


def test_a_perfect_ranking_earns_everything() -> None:
    positives = np.repeat(np.eye(20, dtype=bool), 5, axis=1)
    assert metrics.retrieval_metrics(positives.astype(float), positives)["rsum"] == 600
    perfect = metrics.ranked_positives_metrics(positives.astype(float), positives)
    assert perfect == {"map_at_r": 100, "r_precision": 100, "R1": 100}


def test_chance_agrees_with_random_rankings() -> None:
    images, per_image = 40, 5
    positives = np.repeat(np.eye(images, dtype=bool), per_image, axis=1)
    rng = np.random.default_rng(0)
    sums = [metrics.retrieval_metrics(rng.random(positives.shape), positives)["rsum"] for _ in range(200)]
    expected = metrics.chance_rsum(images, images * per_image, per_image)
    assert np.mean(sums) == pytest.approx(expected, abs=4 * np.std(sums) / np.sqrt(len(sums)))


def test_what_cannot_be_ranked_is_refused() -> None:
    scores, positives = case(0)
    broken = scores.copy()
    broken[1, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        metrics.retrieval_metrics(broken, positives)
    with pytest.raises(ValueError, match="equal matrices"):
        metrics.retrieval_metrics(scores[:, :-1], positives)
    positives[3] = False
    with pytest.raises(ValueError, match="1 queries have no positive"):
        metrics.retrieval_metrics(scores, positives)
