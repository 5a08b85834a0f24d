"""Ranks, recalls and precisions against their definitions, ties and many-to-many truth included."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from setwise.pipelines import metrics
from setwise.pipelines.ranking import Ties


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
        assert measured[f"{direction}_median_rank"] == int(np.median(ranks)), "rounded down, as in the literature"
        assert measured[f"{direction}_mean_rank"] == pytest.approx(np.mean(ranks))
        for k in (1, 5, 10):
            recall = 100 * np.mean([rank <= k for rank in ranks])
            assert measured[f"{direction}_R{k}"] == pytest.approx(recall)
            total += recall
    assert measured["rsum"] == pytest.approx(total)


def naive_ranks(scores: NDArray[np.float64], positives: NDArray[np.bool_]) -> list[int]:
    """The places of all positives, every negative ahead of a positive that scores the same."""
    order = sorted(range(len(scores)), key=lambda item: (-scores[item], positives[item]))
    return [place for place, item in enumerate(order, start=1) if positives[item]]


@pytest.mark.parametrize("seed", range(8))
def test_precisions_agree_with_their_definitions(seed: int) -> None:
    """R counts what the gallery lacks: the last query has two more positives that are nowhere."""
    scores, positives = case(seed)
    missing = np.zeros(len(scores), dtype=np.int64)
    missing[-1] = 2
    ranks, rows, average, precision, first = [], [], [], [], []
    for row, (line, true) in enumerate(zip(scores, positives, strict=True)):
        found = naive_ranks(line, true)
        ranks += found[::-1]
        rows += [row] * len(found)
        wanted = len(found) + missing[row]
        precision.append(sum(rank <= wanted for rank in found) / wanted)
        average.append(sum(sum(r <= rank for r in found) / rank for rank in found if rank <= wanted) / wanted)
        first.append(found[0] == 1)
    relevant = positives.sum(axis=1) + missing
    measured = metrics.precisions(np.array(ranks), np.array(rows), relevant)
    assert measured == pytest.approx(
        {"map_at_r": 100 * np.mean(average), "r_precision": 100 * np.mean(precision), "R1": 100 * np.mean(first)},
        rel=1e-14,
    )


def test_a_query_whose_positives_are_all_elsewhere_counts_as_missed() -> None:
    found = metrics.precisions(np.array([1]), np.array([0]), np.array([1, 3]))
    assert found == {"map_at_r": 50, "r_precision": 50, "R1": 50}


@pytest.mark.parametrize("ties", ["pessimistic", "official"])
@pytest.mark.parametrize("seed", range(8))
def test_what_is_ahead_becomes_a_rank_whatever_ties(seed: int, ties: Ties) -> None:
    """Items ahead are counted as the engine counts them, other positives of the same score included."""
    scores, positives = case(seed, images=9, captions=14)
    query, item = np.nonzero(positives)
    place, counted = metrics.places(query, item, scores[positives], ties)
    index = np.arange(scores.shape[1])
    for row, true in enumerate(positives):
        mine = query == row
        ranks = []
        for column in item[mine]:
            of_equals = index > column if ties == "official" else index != column
            ahead = (scores[row] > scores[row, column]) | ((scores[row] == scores[row, column]) & of_equals)
            ranks.append(int(ahead.sum()))
        found = sorted(np.array(ranks) - counted[mine] + place[mine] + 1)
        if ties == "pessimistic":
            assert found == naive_ranks(scores[row], true)
        else:
            order = np.argsort(scores[row], kind="stable")[::-1]
            assert found == (np.flatnonzero(true[order]) + 1).tolist()


def test_one_score_for_all_earns_nothing() -> None:
    positives = np.repeat(np.eye(20, dtype=bool), 5, axis=1)
    measured = metrics.retrieval_metrics(np.ones((20, 100)), positives)
    assert measured["rsum"] == 0
    assert measured["i2t_median_rank"] == 96 and measured["t2i_mean_rank"] == 20


def test_a_perfect_ranking_earns_everything() -> None:
    positives = np.repeat(np.eye(20, dtype=bool), 5, axis=1)
    assert metrics.retrieval_metrics(positives.astype(float), positives)["rsum"] == 600
    row = np.repeat(np.arange(20), 5)
    perfect = metrics.precisions(np.tile(np.arange(1, 6), 20), row, np.full(20, 5))
    assert perfect == {"map_at_r": 100, "r_precision": 100, "R1": 100}


def test_chance_agrees_with_random_rankings() -> None:
    images, per_image = 40, 5
    positives = np.repeat(np.eye(images, dtype=bool), per_image, axis=1)
    rng = np.random.default_rng(0)
    sums = [metrics.retrieval_metrics(rng.random(positives.shape), positives)["rsum"] for _ in range(200)]
    expected = metrics.chance_rsum(images, images * per_image, per_image)
    assert np.mean(sums) == pytest.approx(expected, abs=4 * np.std(sums) / np.sqrt(len(sums)))


def test_chance_of_a_small_gallery() -> None:
    assert metrics.chance_rsum(1, 5, 5) == 600  # there is no negative
    assert metrics.chance_rsum(2, 2, 1) == pytest.approx(2 * (50 + 100 + 100))
    assert metrics.chance_rsum(3, 12, 4) == pytest.approx(100 * (1 / 3 + (1 - 56 / 792) + 1 + 1 / 3 + 1 + 1))
    for impossible in ((0, 0, 0), (3, 0, 0), (3, 2, 5)):
        with pytest.raises(ValueError, match="nothing could be found"):
            metrics.chance_rsum(*impossible)


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
    nothing = np.zeros((0, 0))
    with pytest.raises(ValueError, match="no query"):
        metrics.recalls({"i2t": np.zeros(0, dtype=np.int64)})
    with pytest.raises(ValueError, match="no query"):
        metrics.retrieval_metrics(nothing, nothing > 0)
    with pytest.raises(ValueError, match="NaN"):
        metrics.places(np.array([0]), np.array([0]), np.array([np.nan]), "pessimistic")
