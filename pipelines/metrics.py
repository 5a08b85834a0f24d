"""Retrieval metrics from ranks, and the ranks of what is true of a query.

Ranks count from 1 and are pessimistic unless said otherwise: a negative with the same score as a positive counts as
ranked before it, so a model that gives every pair one score gets the lowest value there is, not the luck of the sort.

Shape suffixes: I images, T captions, Q queries, G gallery items, P pairs of a query and an item that is true of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from setwise.pipelines.ranking import Ties

Scores = NDArray[np.floating]
Truth = NDArray[np.bool_]
Integers = NDArray[np.int64]
Ranks = NDArray[np.integer]

DIRECTIONS = ("i2t", "t2i")
KS = (1, 5, 10)


def recalls(ranks: Mapping[str, Ranks], ks: Sequence[int] = KS) -> dict[str, float]:
    """R@K of each direction: the share of queries whose best positive is among the first K.

    Args:
        ranks: by direction, (Q,) the rank of each query's best positive.

    Returns:
        `i2t_R1` ... in percent.

    Raises:
        ValueError: a direction has no query.
    """
    values: dict[str, float] = {}
    for direction, ranks_Q in ranks.items():
        _check_asked(ranks_Q)
        values |= {f"{direction}_R{k}": float((ranks_Q <= k).mean() * 100) for k in ks}
    return values


def best_rank_metrics(ranks: Mapping[str, Ranks], ks: Sequence[int] = KS) -> dict[str, float]:
    """What is reported where one positive is enough: `recalls`, their sum `rsum`, and median and mean rank.

    Of an even number of queries the median may lie between two ranks; it is rounded down, as in the literature's Med r.
    """
    values = recalls(ranks, ks)
    rsum = sum(values.values())
    for direction, ranks_Q in ranks.items():
        values[f"{direction}_median_rank"] = float(np.floor(np.median(ranks_Q)))
        values[f"{direction}_mean_rank"] = float(ranks_Q.mean())
    return values | {"rsum": rsum}


class QueryPrecisions(NamedTuple):
    """Of each query (Q,), as shares: AP@R, R-Precision, and whether the first item is a positive."""

    average: NDArray[np.float64]
    precision: NDArray[np.float64]
    first: NDArray[np.float64]

    def means(self) -> dict[str, float]:
        """`map_at_r`, `r_precision`, `R1`: the means, in percent."""
        ends = ("map_at_r", "r_precision", "R1")
        return {end: float(each_Q.mean() * 100) for end, each_Q in zip(ends, self, strict=True)}


def precisions(ranks_P: Ranks, row_P: Integers, relevant_Q: Integers) -> dict[str, float]:
    """mAP@R, R-Precision and R@1 in percent: the means of `query_precisions`, as `map_at_r`, `r_precision`, `R1`."""
    return query_precisions(ranks_P, row_P, relevant_Q).means()


def query_precisions(ranks_P: Ranks, row_P: Integers, relevant_Q: Integers) -> QueryPrecisions:
    """AP@R, R-Precision and R@1 where queries have many positives (Musgrave et al. 2020; ECCV Caption, 2022).

    For a query with R positives, of which the j-th best has rank r_j: R-Precision is the share of the first R places
    that are positive; AP@R is the mean over R of j / r_j for r_j <= R.

    Args:
        ranks_P: rank of each pair among all items; what is beyond R need not be exact.
        row_P: the query of each pair, 0 to Q-1, ascending.
        relevant_Q: R, the number of positives, those that the gallery does not hold included.

    Raises:
        ValueError: there is no query.
    """
    _check_asked(relevant_Q)
    order_P = np.lexsort((ranks_P, row_P))
    ranks_P = ranks_P[order_P]
    place_P = np.arange(1, len(row_P) + 1) - np.searchsorted(row_P, row_P)
    hit_P = ranks_P <= relevant_Q[row_P]
    queries = len(relevant_Q)
    average_Q = np.bincount(row_P, np.where(hit_P, place_P / ranks_P, 0), queries) / relevant_Q
    precision_Q = np.bincount(row_P, hit_P, queries) / relevant_Q
    first_Q = np.bincount(row_P, ranks_P == 1, queries).astype(np.float64)
    return QueryPrecisions(average_Q, precision_Q, first_Q)


def places(query_P: Integers, item_P: Integers, scores_P: Scores, ties: Ties) -> tuple[Integers, Integers]:
    """The order of each query's positives among themselves, which turns what is ahead of a pair into its rank.

    A positive is not pushed back by another positive of the same score: two captions of one image may be the same
    sentence. So rank = (items ahead) - (positives counted among them) + place + 1.

    Args:
        query_P, item_P, scores_P: all positives in the gallery, by query.
        ties: as the items ahead are counted: all of the same score, or those with a later index.

    Returns:
        (P,) place of each pair among its query's, from 0, the best first; (P,) how many of the query's other
        positives count as ahead of it.

    Raises:
        ValueError: a score is NaN.
    """
    if np.isnan(scores_P).any():
        raise ValueError("a score is NaN: the model has diverged, and no ranking of it means anything")
    order = np.lexsort((-item_P, -scores_P, query_P))
    query, scores = query_P[order], scores_P[order]
    first = np.searchsorted(query, query)
    place = np.arange(len(query)) - first
    ahead = place
    if ties == "pessimistic" and len(query):
        ends_group = np.append((query[1:] != query[:-1]) | (scores[1:] != scores[:-1]), True)
        last = np.flatnonzero(ends_group)[np.cumsum(ends_group) - ends_group]
        ahead = last - first
    place_P, ahead_P = np.empty_like(place), np.empty_like(ahead)
    place_P[order], ahead_P[order] = place, ahead
    return place_P, ahead_P


def ranks_of_best_positive(scores_QG: Scores, positives_QG: Truth) -> Integers:
    """Rank of each query's best positive: one more than the negatives that score at least as high. (Q,).

    Raises:
        ValueError: shapes differ, a score is NaN, or a query has no positive.
    """
    if scores_QG.shape != positives_QG.shape or scores_QG.ndim != 2:
        raise ValueError(f"scores {scores_QG.shape} and positives {positives_QG.shape} must be equal matrices")
    if np.isnan(scores_QG).any():
        raise ValueError("a score is NaN: the model has diverged, and no ranking of it means anything")
    if not positives_QG.any(axis=1).all():
        raise ValueError(f"{int((~positives_QG.any(axis=1)).sum())} queries have no positive")
    best_Q = np.where(positives_QG, scores_QG, -np.inf).max(axis=1, initial=-np.inf)
    ahead_QG = (scores_QG >= best_Q[:, None]) & ~positives_QG
    ranks: Integers = ahead_QG.sum(axis=1) + 1
    return ranks


def retrieval_metrics(scores: Scores, positives: Truth, ks: Sequence[int] = KS) -> dict[str, float]:
    """R@K in both directions and their sum, of a matrix of scores.

    Args:
        scores: (I, T), higher is more alike.
        positives: (I, T) bool, the pairs that match.
        ks: cut-offs.

    Returns:
        `i2t_R1` ... `t2i_R10` and `rsum` in percent; `i2t_median_rank` and `i2t_mean_rank` likewise for both.

    Raises:
        ValueError: shapes differ, a score is NaN, a query has no positive, or there is none.
    """
    sides = zip(DIRECTIONS, ((scores, positives), (scores.T, positives.T)), strict=True)
    return best_rank_metrics({direction: ranks_of_best_positive(*side) for direction, side in sides}, ks)


def chance_rsum(images: int, captions: int, per_image: int, ks: Sequence[int] = KS) -> float:
    """Expected RSUM of a random ranking, in percent: each caption has one image, each image `per_image` captions.

    Raises:
        ValueError: there is no image, or an image has no caption.
    """
    if images < 1 or not 1 <= per_image <= captions:
        raise ValueError(f"{images} images with {per_image} of {captions} captions each: nothing could be found")
    # Without enough negatives to fill K places a factor is 0, and something true is found for certain.
    missed = [np.prod([max(0, captions - per_image - j) / (captions - j) for j in range(min(k, captions))]) for k in ks]
    i2t = sum(1 - miss for miss in missed)
    t2i = sum(min(1.0, k / images) for k in ks)
    return float(i2t + t2i) * 100


def _check_asked(queries: NDArray[np.integer]) -> None:
    if not len(queries):
        raise ValueError("there is no query to measure")
