"""The benchmarks of ranked lists of ids, such as another system leaves: the same numbers as from our own ranks.

A list may end early where the benchmark looks no further: R@10 takes ten items, mAP@R as many as the query with the
most positives has, and a fold its first ten items, wherever they are. A list that is too short is an error: to count
what is missing as not found would give a number that looks right.

Shape suffixes: Q queries, M places of a list, P pairs of a query and an item that is true of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from setwise.pipelines import benchmarks, metrics, positives
from setwise.pipelines.benchmarks import FOLDS, Kind
from setwise.pipelines.metrics import KS, Integers
from setwise.pipelines.positives import Positives

DEEPEST = max(KS)
BLOCK = 1 << 24
"""Comparisons made at once."""


@dataclass(frozen=True)
class Side:
    """One direction: lists (Q,M) of item ids by descending similarity, one for each query of the split in its order;
    item_ids (G,) the gallery; the fold of each query and of each item."""

    lists: Integers
    item_ids: Integers
    fold: Integers
    item_fold: Integers


def measure(
    wanted: Mapping[str, Kind],
    i2t_QM: Integers,
    t2i_QM: Integers,
    image_ids: Integers,
    caption_ids: Integers,
    owners: Integers,
    extended: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Values of each wanted benchmark by its name; without median and mean rank, which take whole rankings.

    Args:
        wanted: from benchmarks.kinds.
        i2t_QM: for each of `image_ids`, in their order, caption ids by descending similarity.
        t2i_QM: for each of `caption_ids`, image ids.
        owners: (T,) index of each caption's image, ascending.
        extended: folder of extended positives, where the data set has them.

    Raises:
        ValueError: the lists are not as many as the ids, or end too early; says how long they must be.
    """
    fold_of_image, fold_of_caption = benchmarks.folds(len(image_ids), owners)
    sides = {
        "i2t": Side(i2t_QM, caption_ids, fold_of_image, fold_of_caption),
        "t2i": Side(t2i_QM, image_ids, fold_of_caption, fold_of_image),
    }
    for direction, side in sides.items():
        if side.lists.ndim != 2 or len(side.lists) != len(side.fold):
            raise ValueError(f"{direction}: {side.lists.shape} is not a list for each of {len(side.fold):,} queries")
    truths = benchmarks.truths(wanted, image_ids, caption_ids, owners, extended)
    values: dict[str, dict[str, float]] = {}
    for name, kind in wanted.items():
        truth = truths[benchmarks.asks(kind)]
        pairs = {"i2t": (sides["i2t"], truth.i2t), "t2i": (sides["t2i"], truth.t2i)}
        if kind in ("extended", "eccv"):
            values[name] = {}
            for direction, (side, true) in pairs.items():
                deepest = int(true.relevant.max(initial=0))
                ranks = ranks_in(side.lists, true, side.item_ids, deepest)
                precise = metrics.precisions(ranks, true.row(), true.relevant)
                values[name] |= {f"{direction}_{key}": value for key, value in precise.items()}
        elif kind == "folds":
            within = {d: best_in(within_folds(side, DEEPEST), true, side.item_ids) for d, (side, true) in pairs.items()}
            each = [
                metrics.recalls({d: ranks[pairs[d][0].fold == number] for d, ranks in within.items()})
                for number in range(FOLDS)
            ]
            values[name] = {key: float(np.mean([one[key] for one in each])) for key in each[0]}
        else:
            best = {d: best_in(side.lists, true, side.item_ids) for d, (side, true) in pairs.items()}
            values[name] = metrics.recalls(best)
        if kind in ("whole", "folds"):
            values[name]["rsum"] = sum(values[name].values())
    return values


def ranks_in(lists_QM: Integers, true: Positives, item_ids: Integers, depth: int) -> Integers:
    """(P,) the place of each true item in its query's list, from 1; `depth` + 1 where it is not among the first.

    Raises:
        ValueError: the lists are shorter than `depth` and than the gallery.
    """
    depth = min(depth, len(item_ids))
    if lists_QM.shape[1] < depth:
        raise ValueError(f"the lists have {lists_QM.shape[1]:,} places; at least {depth:,} are needed")
    wanted_P = item_ids[true.item]
    ranks = np.empty(len(wanted_P), dtype=np.int64)
    step = max(1, BLOCK // max(depth, 1))
    for start in range(0, len(wanted_P), step):
        part = slice(start, start + step)
        hit = lists_QM[true.query[part], :depth] == wanted_P[part, None]
        ranks[part] = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, depth + 1)
    return ranks


def best_in(lists_QM: Integers, true: Positives, item_ids: Integers) -> Integers:
    """(Q,) the place of the first true item among the first ten of each query's list; a later place if it is not."""
    best = np.full(len(true.rows), DEEPEST + 1)
    np.minimum.at(best, true.row(), ranks_in(lists_QM, true, item_ids, DEEPEST))
    return best


def within_folds(side: Side, depth: int) -> Integers:
    """(Q,depth) the first items of each list that are in the query's fold; -1 after the last of a small fold.

    Raises:
        ValueError: a list ends before so many were met.
    """
    kept = np.full((len(side.lists), depth), -1)
    have = np.zeros(len(side.lists), dtype=np.int64)
    enough = np.minimum(np.bincount(side.item_fold, minlength=FOLDS + 1), depth)
    enough[FOLDS] = 0  # of queries after the last fold
    need = enough[side.fold]
    fold_or_none = np.append(side.item_fold, -1).astype(np.int8)  # the last for ids that are not there
    start, width = 0, 8 * depth
    while len(rows := np.flatnonzero(have < need)) and start < side.lists.shape[1]:
        block = side.lists[rows, start : start + width]
        inside = fold_or_none[positives.find(side.item_ids, block)] == side.fold[rows, None]
        place = have[rows, None] + np.cumsum(inside, axis=1) - 1
        row, column = np.nonzero(inside & (place < depth))
        kept[rows[row], place[row, column]] = block[row, column]
        have[rows] += inside.sum(axis=1)
        start += width
    if len(rows):
        raise ValueError(
            f"a list of {side.lists.shape[1]:,} places holds {have[rows[0]]} of the query's fold, and {need[rows[0]]} "
            f"are needed: give whole lists, {len(side.item_ids):,} places"
        )
    return kept
