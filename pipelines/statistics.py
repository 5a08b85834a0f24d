"""Is one system better than another, or are these images, and these seeds, all that differs?

A paired bootstrap on two levels (Efron and Tibshirani 1993, chapters 6 and 16). Each resample draws as many test images
as there are, with replacement, and with an image all of its queries: its captions were written about one scene and
succeed or fail together, so treated as independent they would make intervals too narrow. Both systems, and all of their
seeds, get the same draw. A side with several seeds has these drawn too, one fewer than there are: the variance of the
drawn mean is then the unbiased one (Rao and Wu 1988), which with two seeds is twice that of the plain bootstrap.

What it does not cover. A rank stays what it was: galleries are not drawn anew. A few seeds say only roughly how much
seeds differ: where seeds matter more than images do, 95 % intervals of 2, 3 and 5 seeds a side held the truth in 79, 88
and 92 % of 600 simulations; where seeds hardly matter, those of 3 seeds in 97 %. One seed says nothing of other seeds:
the interval is about these two trainings. Nor does it know of other training data, or of a choice of settings made on
the same test images.

Shape suffixes: Q queries, I images, M metrics, D directions, S seeds, R resamples.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from setwise.pipelines.benchmarks import Outcome, QueryRanks

Floats = NDArray[np.float64]

DIRECTIONS = ("i2t", "t2i", "t2t", "i2i")
ENDS = ("R1", "R5", "R10", "map_at_r", "r_precision")
"""What is measured of each query, by the end of a metric's name."""
RESAMPLES = 2000
CONFIDENCE = 95.0  # percent
BLOCK = 256
"""Resamples at once: with 5,000 images their counts take 10 MB."""
DIGITS = 9
"""Values in percent are rounded so: what sums in another order differ by is no difference."""


@dataclass(frozen=True)
class Difference:
    """Candidate minus baseline in percentage points, its 95 % interval, and the p-value of there being none."""

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Interval:
    """A value in percent, and its 95 % interval."""

    value: float
    low: float
    high: float


def metrics_of(outcome: Outcome) -> list[str]:
    """The values of an outcome that come of its queries one by one, which can be compared, in the order of tables:
    `rsum`, then direction by direction R@K by K, mAP@R, R-Precision."""
    names = [f"{direction}_{end}" for direction in DIRECTIONS if direction in outcome.ranks for end in ENDS]
    of_queries = [name for name in names if name in outcome.values]
    return ["rsum", *of_queries] if "rsum" in outcome.values and of_queries else of_queries


def differences(
    candidate: Sequence[Outcome], baseline: Sequence[Outcome], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Difference]:
    """The differences between two systems on one benchmark, by metric.

    Args:
        candidate: one outcome a seed.
        baseline: likewise; as many or another number.
        resamples: the smallest p-value there can be is 2 / (resamples + 1), and of few images 2 / 2^images, as if the
            sign of each image's difference had been drawn: they resample to nothing else where all agree.
        seed: of the resampling; the same arguments give the same intervals.

    Returns:
        R@K, `rsum`, mAP@R and R-Precision as far as the benchmark has them, in percent, means over seeds. Intervals are
        the percentiles of the resamples; p-values are two-sided, twice the share of resamples on the other side of
        none, one more counted so that none is 0.

    Raises:
        ValueError: a side is empty, benchmarks or protocols differ, or results of queries are missing.
    """
    _check(candidate, baseline)
    names = metrics_of(baseline[0])
    random = np.random.default_rng(seed)
    sides = [_Sums.of(outcomes, names) for outcomes in (candidate, baseline)]
    images = sides[0].totals.shape[-1]
    value_M = np.subtract(*(side.values(np.ones((1, images))).mean(axis=1)[0] for side in sides))
    drawn_RM = np.empty((resamples, len(names)))
    for start in range(0, resamples, BLOCK):
        block = drawn_RM[start : start + BLOCK]
        picked = random.integers(0, images, (len(block), images))
        counts_RI = np.array([np.bincount(row, minlength=images) for row in picked], dtype=np.float64)
        drawn = (_mean_of_drawn_seeds(side.values(counts_RI), random) for side in sides)
        block[:] = np.subtract(*drawn)
    drawn_RM, value_M = drawn_RM.round(DIGITS), value_M.round(DIGITS)
    tail = (100 - CONFIDENCE) / 2
    low_M, high_M = np.percentile(drawn_RM, [tail, 100 - tail], axis=0)
    beyond_M = np.minimum((drawn_RM <= 0).sum(axis=0), (drawn_RM >= 0).sum(axis=0))
    p_M = np.clip(2 * (beyond_M + 1) / (resamples + 1), 2.0 ** (1 - images), 1)
    each = zip(names, value_M, low_M, high_M, p_M, strict=True)
    return {name: Difference(*map(float, numbers)) for name, *numbers in each}


def intervals(outcomes: Sequence[Outcome], *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Interval]:
    """The metrics of one system on one benchmark, means over its seeds, with intervals as those of `differences`.

    Raises:
        ValueError: there is no outcome, protocols differ, or results of queries are missing.
    """
    _check(outcomes, outcomes)
    names = metrics_of(outcomes[0])
    random = np.random.default_rng(seed)
    side = _Sums.of(outcomes, names)
    images = side.totals.shape[-1]
    value_M = side.values(np.ones((1, images))).mean(axis=1)[0]
    drawn_RM = np.empty((resamples, len(names)))
    for start in range(0, resamples, BLOCK):
        block = drawn_RM[start : start + BLOCK]
        picked = random.integers(0, images, (len(block), images))
        counts_RI = np.array([np.bincount(row, minlength=images) for row in picked], dtype=np.float64)
        block[:] = _mean_of_drawn_seeds(side.values(counts_RI), random)
    tail = (100 - CONFIDENCE) / 2
    low_M, high_M = np.percentile(drawn_RM, [tail, 100 - tail], axis=0)
    each = zip(names, value_M, low_M, high_M, strict=True)
    return {name: Interval(*(float(number.round(DIGITS)) for number in numbers)) for name, *numbers in each}


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for being many (Holm 1979): where one stays below alpha, at most a share alpha of such families
    of tests holds a false discovery, however the tests depend on each other."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [float(one) for one in adjusted]


@dataclass(frozen=True)
class _Sums:
    """The results of one system, summed by image: all that a resample needs, as a product with how often each image was
    drawn.

    totals (S,M,I): over an image's queries, weight times result; weights (D,I): the sums of the weights; direction (M,)
    the row of `weights` that a metric is divided by; recalls: the metrics that `rsum` adds up, where there is `rsum`.
    """

    totals: Floats
    weights: Floats
    direction: NDArray[np.intp]
    recalls: NDArray[np.intp] | None

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], names: Sequence[str]) -> _Sums:
        ranks = outcomes[0].ranks
        images = np.unique(np.concatenate([one.images for one in ranks.values()]))
        place = {direction: np.searchsorted(images, one.images) for direction, one in ranks.items()}
        weight = {direction: _weights(one) for direction, one in ranks.items()}

        def by_image(direction: str, values_Q: Floats) -> Floats:
            return np.bincount(place[direction], weight[direction] * values_Q, len(images)).astype(np.float64)

        measured = [name for name in names if name != "rsum"]
        of_metric = [name.partition("_")[0] for name in measured]
        pairs = list(zip(measured, of_metric, strict=True))
        totals = [[by_image(to, _results(one.ranks[to], name)) for name, to in pairs] for one in outcomes]
        weights = [by_image(direction, np.ones(len(one.ids))) for direction, one in ranks.items()]
        summed = [place for place, name in enumerate(measured) if re.fullmatch(r"(i2t|t2i)_R\d+", name)]
        return cls(
            totals=np.array(totals),
            weights=np.array(weights),
            direction=np.array([list(ranks).index(direction) for direction in of_metric]),
            recalls=np.array(summed) if "rsum" in names else None,
        )

    def values(self, counts_RI: Floats) -> Floats:
        """(R,S,M) each metric of each seed in percent, each image counted so often."""
        seeds, metrics, images = self.totals.shape
        summed = (counts_RI @ self.totals.reshape(-1, images).T).reshape(-1, seeds, metrics)
        weight = (counts_RI @ self.weights.T)[:, None, self.direction]
        # A draw without any query of a direction, possible where there are few, says nothing: both sides get 0.
        found = np.divide(summed, weight, out=np.zeros_like(summed), where=weight > 0) * 100
        if self.recalls is None:
            return found
        return np.concatenate([found[..., self.recalls].sum(axis=-1, keepdims=True), found], axis=-1)


def _mean_of_drawn_seeds(values_RSM: Floats, random: np.random.Generator) -> Floats:
    """(R,M) the mean over the seeds that each resample draws, or the one there is."""
    resamples, seeds, _ = values_RSM.shape
    if seeds == 1:
        return values_RSM[:, 0]
    drawn = random.integers(0, seeds, (resamples, seeds - 1))
    counts_RS = (drawn[:, :, None] == np.arange(seeds)).sum(axis=1)
    mean: Floats = np.einsum("rs,rsm->rm", counts_RS, values_RSM) / (seeds - 1)
    return mean


def _results(ranks: QueryRanks, name: str) -> Floats:
    """(Q,) the share of each query that a metric is the mean of."""
    end = name.partition("_")[2]
    if end == "map_at_r" or end == "r_precision":
        kept = ranks.average_precision if end == "map_at_r" else ranks.r_precision
        if kept is None:
            raise ValueError(f"{name} of each query was not kept")
        return kept.astype(np.float64)
    return (ranks.ranks <= int(end[1:])).astype(np.float64)


def _weights(ranks: QueryRanks) -> Floats:
    """(Q,) equal, or such that each fold counts the same however many queries it has, as the benchmark averages."""
    if ranks.fold is None:
        return np.ones(len(ranks.ids))
    return 1 / np.bincount(ranks.fold)[ranks.fold]


def _check(candidate: Sequence[Outcome], baseline: Sequence[Outcome]) -> None:
    if not candidate or not baseline:
        raise ValueError("each side needs the outcome of one seed at least")
    first = baseline[0]
    for other in (*candidate, *baseline):
        if (other.benchmark, other.task) != (first.benchmark, first.task):
            raise ValueError(
                f"{other.benchmark} under protocol {other.task} and {first.benchmark} under {first.task}: only what "
                "was measured alike can be compared"
            )
        if not other.ranks or other.ranks.keys() != first.ranks.keys():
            raise ValueError(f"{other.benchmark}: what was found of each query is missing")
        for direction, one in other.ranks.items():
            if not np.array_equal(one.ids, first.ranks[direction].ids):
                raise ValueError(f"{other.benchmark} {direction}: other queries were asked")
