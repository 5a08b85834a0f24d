"""Retrieval metrics from scores and the truth about which pairs match.

Ranks are pessimistic: a negative with the same score as a positive counts as ranked before it, so a model that gives
every pair one score gets the lowest value there is, not the luck of the sort.

Shape suffixes: I images, T captions, Q queries, G gallery items.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.floating]
Truth = NDArray[np.bool_]

DIRECTIONS = ("i2t", "t2i")


def ranks_of_best_positive(scores_QG: Scores, positives_QG: Truth) -> NDArray[np.int64]:
    """Rank, from 1, of each query's best positive: one more than the negatives that score at least as high. (Q,).

    Raises:
        ValueError: shapes differ, a score is NaN, or a query has no positive.
    """
    _check(scores_QG, positives_QG)
    best_Q = np.where(positives_QG, scores_QG, -np.inf).max(axis=1)
    ahead_QG = (scores_QG >= best_Q[:, None]) & ~positives_QG
    ranks: NDArray[np.int64] = ahead_QG.sum(axis=1) + 1
    return ranks


def retrieval_metrics(scores: Scores, positives: Truth, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """R@K in both directions and their sum.

    Args:
        scores: (I, T), higher is more alike.
        positives: (I, T) bool, the pairs that match.
        ks: cut-offs.

    Returns:
        `i2t_R1` ... `t2i_R10` and `rsum` in percent; `i2t_median_rank` and `i2t_mean_rank` likewise for both.
    """
    metrics: dict[str, float] = {}
    for direction, (scores_QG, positives_QG) in zip(
        DIRECTIONS, ((scores, positives), (scores.T, positives.T)), strict=True
    ):
        ranks = ranks_of_best_positive(scores_QG, positives_QG)
        metrics |= {f"{direction}_R{k}": float((ranks <= k).mean() * 100) for k in ks}
        metrics |= {f"{direction}_median_rank": float(np.median(ranks)), f"{direction}_mean_rank": float(ranks.mean())}
    metrics["rsum"] = sum(metrics[f"{direction}_R{k}"] for direction in DIRECTIONS for k in ks)
    return metrics


def ranked_positives_metrics(scores_QG: Scores, positives_QG: Truth) -> dict[str, float]:
    """mAP@R, R-Precision and R@1 where queries have many positives (Musgrave et al. 2020; ECCV Caption, 2022).

    For a query with R positives, of which the j-th best has rank r_j: R-Precision is the share of the first R places
    that are positive; AP@R is the mean over R of j / r_j for r_j <= R.

    Args:
        scores_QG: (Q, G). Queries without any positive are left out.
        positives_QG: (Q, G) bool.

    Returns:
        `map_at_r`, `r_precision`, `R1` in percent.
    """
    asked = positives_QG.any(axis=1)
    _check(scores_QG[asked], positives_QG[asked])
    average, precision, first = [], [], []
    for scores_G, positives_G in zip(scores_QG[asked], positives_QG[asked], strict=True):
        own = np.sort(scores_G[positives_G])[::-1]
        others = np.sort(scores_G[~positives_G])
        ahead = len(others) - np.searchsorted(others, own, side="left")
        place = np.arange(1, len(own) + 1)
        rank = ahead + place
        hit = rank <= len(own)
        average.append((place[hit] / rank[hit]).sum() / len(own))
        precision.append(hit.mean())
        first.append(rank[0] == 1)
    return {
        "map_at_r": float(np.mean(average) * 100),
        "r_precision": float(np.mean(precision) * 100),
        "R1": float(np.mean(first) * 100),
    }


def chance_rsum(images: int, captions: int, per_image: int, ks: Sequence[int] = (1, 5, 10)) -> float:
    """Expected RSUM of a random ranking, in percent: each caption has one image, each image `per_image` captions."""
    i2t = sum(1 - np.prod([(captions - per_image - j) / (captions - j) for j in range(k)]) for k in ks)
    t2i = sum(min(1.0, k / images) for k in ks)
    return float(i2t + t2i) * 100


def _check(scores_QG: Scores, positives_QG: Truth) -> None:
    if scores_QG.shape != positives_QG.shape or scores_QG.ndim != 2:
        raise ValueError(f"scores {scores_QG.shape} and positives {positives_QG.shape} must be equal matrices")
    if np.isnan(scores_QG).any():
        raise ValueError("a score is NaN: the model has diverged, and no ranking of it means anything")
    if not positives_QG.any(axis=1).all():
        raise ValueError(f"{int((~positives_QG.any(axis=1)).sum())} queries have no positive")
