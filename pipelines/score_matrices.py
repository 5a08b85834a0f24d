"""Ranks by scores that were computed one by one, for similarities that are no function of dot products.

Cross-attention has no fast screen: every pair is computed once, whole, and the matrix answers every question. What
that costs is what the papers on embeddings hold against it.

Shape suffixes: N rows, M columns, P asked pairs, G items of a gallery.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
CELLS = 4_000_000
"""Scores that are looked at at once."""


class Counted(NamedTuple):
    """Of each asked pair, in the order asked: its score, how many items are ahead of its own, and how many of these are
    in the query's fold, 0 where it has none."""

    scores: NDArray[np.float32]
    ahead: Integers
    ahead_in_fold: Integers


def count_ahead(
    scores_NM: NDArray[np.float32],
    row_P: Integers,
    column_P: Integers,
    *,
    by_rows: bool,
    later_first: bool,
    folds: tuple[Integers, Integers] | None,
) -> Counted:
    """Count the items that are ahead of each pair's own, in the gallery of its row, or else of its column.

    Args:
        later_first: of equal scores only the item of the larger index is ahead; else any other item is.
        folds: number of the fold of each row and of each column, -1 for none.

    Raises:
        ValueError: a score is NaN.
    """
    if np.isnan(scores_NM).any():
        raise ValueError("a score is NaN: the model has diverged, and no ranking of it means anything")
    galleries, query_P, item_P = (scores_NM, row_P, column_P) if by_rows else (scores_NM.T, column_P, row_P)
    own_P = scores_NM[row_P, column_P]
    ahead_P, in_fold_P = np.zeros(len(row_P), np.int64), np.zeros(len(row_P), np.int64)
    place_G = np.arange(galleries.shape[1])
    step = max(CELLS // max(galleries.shape[1], 1), 1)
    for start in range(0, len(row_P), step):
        part = slice(start, start + step)
        query, own, item = query_P[part], own_P[part, None], item_P[part, None]
        values_PG = galleries[query]
        equal_PG = (values_PG == own) & ((place_G > item) if later_first else (place_G != item))
        is_ahead_PG = (values_PG > own) | equal_PG
        ahead_P[part] = is_ahead_PG.sum(1)
        if folds is not None:
            of_query, of_item = folds if by_rows else folds[::-1]
            fold = of_query[query][:, None]
            in_fold_P[part] = (is_ahead_PG & (of_item == fold) & (fold >= 0)).sum(1)
    return Counted(own_P, ahead_P, in_fold_P)
