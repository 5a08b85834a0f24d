"""How many items are ahead of the right one: ranks of whole galleries without sorting and without the score matrix.

One pass over blocks of pairs answers every question: both directions, the whole gallery and its folds, any number of
pairs asked of one query. A block is computed by the fastest product there is, int8 for one, with a proven bound on its
error (screens.py, pooling.py). An item whose score is farther than that from the asked one is counted; the few others
are computed in float32, and those that are still too near in float64 (exact_scores.py), where ties are seen. If too
many of a block are near, as in a model that has collapsed, all of it is computed in the next precision.

So ranks are those of the exact scores, whatever the screen, the blocks, the threads and the device.

A similarity that is no function of dot products has no such bound: its scores are computed one by one, and counted as
they are (score_matrices.py).

Shape suffixes: R rows and C columns of a block; Q queries and G gallery items, the same from one side; A asked pairs;
B pairs inside a bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from setwise.models.similarity import Similarity
from setwise.pipelines import embeddings, exact_scores, score_matrices, screens
from setwise.pipelines.block_scores import Block, Comparison, Integers, Scores
from setwise.pipelines.exact_scores import Member as Member
from setwise.pipelines.screens import Precision, Screen

Ties = Literal["pessimistic", "official"]
SHARE = 0.08
"""Of a block's pairs: where more are near, computing all of them in the next precision is faster."""
PATIENCE, PAUSE = 4, 32
"""After so many such blocks in a row the screen is left out for so many."""
MANY = 16384
"""Pairs in doubt are computed again when there are so many."""
SMALL = 1e9
"""Multiplications of numbers below which it is not worth the time to find the fastest screen."""
INF = float("inf")


@dataclass(frozen=True)
class Asked:
    """Pairs whose rank is asked: query (P,) index on the asking side, item (P,) index on the other.

    limit (P,): how many items are ahead need not be known exactly beyond it, only that they are at least so many.
    """

    query: Integers
    item: Integers
    limit: Integers | None = None


@dataclass(frozen=True)
class Answers:
    """Of each asked pair: scores (P,) exact; ahead (P,) how many other items of the gallery are ahead of its item;
    ahead_in_fold (P,) the same within the query's fold where folds were given, 0 where the query has none.

    Where `ahead` has reached the limit, `ahead_in_fold` too is only a lower bound.
    """

    scores: NDArray[np.float32]
    ahead: Integers
    ahead_in_fold: Integers | None


def member(rows: Tensor, columns: Tensor, similarity: Similarity, device: torch.device | None = None) -> Member:
    """One model's sets of the two sides, to be ranked on `device`; with all scores, if the similarity needs that."""
    if similarity.of_dot_products:
        return Member(rows, columns, similarity)
    scores = embeddings.score(similarity, rows, columns, device or rows.device)
    return Member(rows, columns, similarity, scores)


def _given_scores(members: Sequence[Member], device: torch.device | None) -> NDArray[np.float32] | None:
    """(N,M) the scores of all pairs, if a member's were computed beforehand."""
    if all(member.scores is None for member in members):
        return None
    sizes = {(len(member.rows), len(member.columns)) for member in members}
    if len(sizes) > 1:
        raise ValueError(f"members have {sizes} sets: scores can be averaged only over the same ones")
    whole = (score_matrix([one], device) if one.scores is None else one.scores.numpy() for one in members)
    mean: NDArray[np.float64] = np.mean(list(whole), axis=0, dtype=np.float64)
    return mean.astype(np.float32)


def pair_scores(
    members: Sequence[Member], row: Integers, column: Integers, device: torch.device | None = None
) -> NDArray[np.float32]:
    """(P,) exact scores of pairs of a row and a column, computed on `device`, or where the members are.

    Raises:
        ValueError: the members do not fit each other, or an embedding is not finite.
    """
    if (given := _given_scores(members, device)) is not None:
        return given[row, column]
    comparison = Comparison(members, device)
    row_P, column_P = (torch.from_numpy(index).to(comparison.device) for index in (row, column))
    found: NDArray[np.float32] = exact_scores.of_pairs(comparison.members, row_P, column_P).cpu().numpy()
    return found


@torch.inference_mode()
def score_matrix(members: Sequence[Member], device: torch.device | None = None) -> NDArray[np.float32]:
    """(N,M) exact scores.

    Raises:
        ValueError: the members do not fit each other, or an embedding is not finite.
    """
    if (given := _given_scores(members, device)) is not None:
        return given
    comparison = Comparison(members, device)
    scores = np.empty((comparison.rows, comparison.columns), dtype=np.float32)
    for block in comparison.blocks():
        scores[block.rows, block.columns] = comparison.exact(block).cpu().numpy()
    return scores


@torch.inference_mode()
def count_ahead(
    members: Sequence[Member],
    by_rows: Asked,
    by_columns: Asked | None,
    *,
    folds: tuple[Integers, Integers] | None = None,
    ties: Ties = "pessimistic",
    device: torch.device | None = None,
    screen: Screen | None = None,
) -> tuple[Answers, Answers | None]:
    """Count the items that are ahead of each asked one.

    Args:
        members: whose scores are averaged.
        by_rows: pairs asked by rows, whose gallery are the columns.
        by_columns: pairs asked by columns, whose gallery are the rows. None: none; and where one side is compared with
            itself, half of the blocks are enough. (A query is an item like any other there.)
        folds: number of the fold of each row and of each column, ascending, -1 for none. The item of an asked pair is
            in its query's fold, if that has one.
        ties: an item with an equal score is ahead; or, "official", only if its index is the larger, as in the authors'
            ascending sort read backwards.
        device: to compute on; None: where the members are.
        screen: the precision that blocks are computed in at first; None: the fastest here. No answer depends on it.

    Raises:
        ValueError: the members do not fit each other, folds or asked pairs do not fit them, or an embedding is not
            finite.
    """
    if (given := _given_scores(members, device)) is not None:
        return _counted(given, by_rows, True, folds, ties), (
            None if by_columns is None else _counted(given, by_columns, False, folds, ties)
        )
    comparison = Comparison(members, device)
    if folds is not None and not all(map(_are_folds, folds, (comparison.rows, comparison.columns))):
        raise ValueError(
            f"folds must be ascending numbers, one for each of {comparison.rows} rows and {comparison.columns} columns"
        )
    half = by_columns is None and exact_scores.is_symmetric(members)
    row_scores, column_scores = _asked_scores(comparison, by_rows, by_columns)
    row_tally = _Tally(comparison, by_rows, row_scores, ties, True)
    column_tally = None if by_columns is None else _Tally(comparison, by_columns, column_scores, ties, False)
    in_folds = folds is not None
    with screens.full_precision():
        counting = _Counting(comparison, screen or _fastest(comparison))
        for block in comparison.blocks(folds, half):
            questions = [_Question(row_tally, block, transposed=False)]
            if column_tally is not None:
                questions.append(_Question(column_tally, block, transposed=True))
            elif half and block.rows.stop <= block.columns.start:
                questions.append(_Question(row_tally, block, transposed=True))
            if questions := [question for question in questions if len(question.asks)]:
                counting.answer(block, questions)
        return row_tally.answers(in_folds), None if column_tally is None else column_tally.answers(in_folds)


def _counted(
    scores: NDArray[np.float32], asked: Asked, by_rows: bool, folds: tuple[Integers, Integers] | None, ties: Ties
) -> Answers:
    row, column = (asked.query, asked.item) if by_rows else (asked.item, asked.query)
    later_first = ties == "official"
    found = score_matrices.count_ahead(scores, row, column, by_rows=by_rows, later_first=later_first, folds=folds)
    return Answers(found.scores, found.ahead, found.ahead_in_fold if folds is not None else None)


def _are_folds(fold: Integers, size: int) -> bool:
    return fold.shape == (size,) and not (np.diff(fold) < 0).any()


def _fastest(comparison: Comparison) -> Screen:
    multiplications = float(comparison.rows) * comparison.columns * comparison.width
    for vectors in comparison.vectors_of_a_set:
        multiplications *= vectors
    return "float32" if multiplications < SMALL else screens.fastest(comparison.device, comparison.width)


def _asked_scores(comparison: Comparison, by_rows: Asked, by_columns: Asked | None) -> tuple[Tensor, Tensor]:
    """Exact scores of all asked pairs, each pair once however often it is asked."""
    row, column = by_rows.query, by_rows.item
    if by_columns is not None:
        row, column = np.concatenate([row, by_columns.item]), np.concatenate([column, by_columns.query])
    for index, size in ((row, comparison.rows), (column, comparison.columns)):
        if len(index) and not 0 <= index.min() <= index.max() < size:
            raise ValueError(f"pairs asked of {size} sets have indices {index.min()} to {index.max()}")
    pairs, place = np.unique(row * max(comparison.columns, 1) + column, return_inverse=True)
    each = (torch.from_numpy(index).to(comparison.device) for index in divmod(pairs, max(comparison.columns, 1)))
    scores = exact_scores.of_pairs(comparison.members, *each)[torch.from_numpy(place).to(comparison.device)]
    return scores[: len(by_rows.query)], scores[len(by_rows.query) :]


class _Tally:
    """The asked pairs of one direction in the order of their queries, and what was counted for them."""

    def __init__(self, comparison: Comparison, asked: Asked, scores: Tensor, ties: Ties, by_rows: bool) -> None:
        self.comparison, self.ties, self.by_rows = comparison, ties, by_rows
        self.order = np.argsort(asked.query, kind="stable")
        self.sorted_queries = asked.query[self.order]
        order = torch.from_numpy(self.order).to(comparison.device)
        self.scores, self.query, self.item = scores[order], *(_on(x, order) for x in (asked.query, asked.item))
        self.limit = None if asked.limit is None else _on(asked.limit, order)
        # A true score that rounds to a larger float32 than the asked one lies above that one, or on their middle.
        self.below, self.above = (
            torch.nextafter(self.scores, self.scores.new_tensor(infinity)).double() for infinity in (-INF, INF)
        )
        self.ahead, self.ahead_in_fold = torch.zeros_like(self.query), torch.zeros_like(self.query)
        self.doubts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.doubtful = 0

    def asks(self, queries: slice) -> Tensor:
        """Indices of the pairs asked by some queries, but those that have reached their limit."""
        start, stop = np.searchsorted(self.sorted_queries, (queries.start, queries.stop)).tolist()
        asks = torch.arange(start, stop, device=self.query.device)
        return asks if self.limit is None else asks[self.ahead[start:stop] < self.limit[start:stop]]

    def is_open(self, asks: Tensor, more: Tensor) -> Tensor:
        """Whether the limit lies beyond what was counted and `more`."""
        return torch.ones_like(asks) if self.limit is None else self.ahead[asks] + more < self.limit[asks]

    def add(self, asks: Tensor, counts: Tensor, in_fold: Tensor | bool) -> None:
        self.ahead.index_add_(0, asks, counts)
        self.ahead_in_fold.index_add_(0, asks, counts * in_fold)

    def is_ahead(self, scores: Tensor, items: Tensor, asks: Tensor) -> Tensor:
        """Of exact scores. No item is ahead of itself."""
        equal = scores == self.scores[asks]
        equal &= items > self.item[asks] if self.ties == "official" else items != self.item[asks]
        return equal | (scores > self.scores[asks])

    def decide(self, values: Tensor, asks: Tensor, reaches: list[Tensor], in_fold: Tensor | bool) -> Tensor:
        """Of float32 scores of single pairs, add those that are surely ahead, and give those that may be."""
        low, high = self.edges(asks, reaches)
        surely = values > high
        self.add(asks, surely.long(), in_fold)
        return ((values >= low) & ~surely).nonzero()[:, 0]

    def edges(self, asks: Tensor, reaches: list[Tensor]) -> tuple[Tensor, Tensor]:
        """A float32 score below the first is surely not ahead, one above the second surely is; float32."""
        low, high = self.comparison.edges(self.below[asks], self.above[asks], reaches, torch.float32)
        return _outward(low, -INF), _outward(high, INF)

    def doubt(self, asks: Tensor, items: Tensor, in_fold: bool) -> None:
        """Pairs to be computed again, many at once."""
        self.doubts.append((asks, items, torch.full_like(asks, in_fold)))
        self.doubtful += len(asks)
        if self.doubtful >= MANY:
            self.settle()

    def settle(self) -> None:
        """Compute in float32, and then exactly, what is in doubt."""
        if not self.doubts:
            return
        asks, items, in_fold = (torch.cat(parts) for parts in zip(*self.doubts, strict=True))
        order = self._pairs(asks, items)[1].argsort()  # so that a column stays in cache
        asks, items, in_fold = asks[order], items[order], in_fold[order]
        self.doubts, self.doubtful = [], 0
        values, reaches = self.comparison.pair_scores(*self._pairs(asks, items))
        some = self.decide(values, asks, reaches, in_fold)
        asks, items, in_fold = asks[some], items[some], in_fold[some]
        exact = exact_scores.of_pairs(self.comparison.members, *self._pairs(asks, items))
        self.add(asks, self.is_ahead(exact, items, asks).long(), in_fold)

    def _pairs(self, asks: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Their rows and columns."""
        return (self.query[asks], items) if self.by_rows else (items, self.query[asks])

    def answers(self, in_folds: bool) -> Answers:
        """In the order in which they were asked."""
        self.settle()
        back = np.empty_like(self.order)
        back[self.order] = np.arange(len(back))
        scores, ahead, in_fold = (x.cpu().numpy()[back] for x in (self.scores, self.ahead, self.ahead_in_fold))
        return Answers(scores, ahead, in_fold if in_folds else None)


class _Question:
    """What one block has to say about the pairs asked by its rows, or, `transposed`, by its columns."""

    def __init__(self, tally: _Tally, block: Block, *, transposed: bool) -> None:
        self.tally, self.transposed, self.in_fold = tally, transposed, block.same_fold
        queries, items = (block.columns, block.rows) if transposed else (block.rows, block.columns)
        self.asks = tally.asks(queries)
        self.query = tally.query[self.asks] - queries.start
        """Of each ask, in the block."""
        self.items = torch.arange(items.start, items.stop, device=self.asks.device)

    def look(self, scores: Scores) -> int:
        """Count the items that are surely ahead, and give the number of those that may be."""
        values_QG = self._by_query(scores.values)
        low, high = self.tally.edges(self.asks, self._reaches(scores, self.query, None))
        some = (values_QG.amax(1)[self.query] >= low).nonzero()[:, 0]
        self.near, self.near_query, self.low, self.high = self.asks[some], self.query[some], low[some], high[some]
        self.values_AG = values_QG[self.near_query]
        self.surely_A = (self.values_AG > self.high[:, None]).sum(1)
        within_A = (self.values_AG >= self.low[:, None]).sum(1).sub_(self.surely_A)
        self.within_A = within_A * self.tally.is_open(self.near, self.surely_A)
        return int(self.within_A.sum())

    def settle(self, scores: Scores) -> None:
        """Add what was counted, and leave to the tally what is in doubt by the bound of each pair's own."""
        self.tally.add(self.near, self.surely_A, self.in_fold)
        some = self.within_A.nonzero()[:, 0]
        values_AG = self.values_AG[some]
        within_AG = (values_AG >= self.low[some, None]) & (values_AG <= self.high[some, None])
        within_AG &= self.items != self.tally.item[self.near[some], None]
        ask, item = within_AG.nonzero(as_tuple=True)
        asks_B = self.near[some[ask]]
        reaches = self._reaches(scores, self.near_query[some[ask]], item)
        doubtful = self.tally.decide(values_AG[ask, item], asks_B, reaches, self.in_fold)
        if len(doubtful):
            self.tally.doubt(asks_B[doubtful], self.items[item[doubtful]], self.in_fold)

    def _by_query(self, values_RC: Tensor) -> Tensor:
        return values_RC.T if self.transposed else values_RC

    def _reaches(self, scores: Scores, query: Tensor, item: Tensor | None) -> list[Tensor]:
        row, column = (item, query) if self.transposed else (query, item)
        return self.tally.comparison.reaches(scores, row, column)

    def count(self, exact_RC: Tensor) -> None:
        """Add what exact scores say."""
        values_AG = self._by_query(exact_RC)[self.query]
        ahead_AG = self.tally.is_ahead(values_AG, self.items[None], self.asks[:, None])
        self.tally.add(self.asks, ahead_AG.sum(1), self.in_fold)


def _on(values: Integers, order: Tensor) -> Tensor:
    return torch.from_numpy(values).to(order.device)[order]


def _outward(edge: Tensor, infinity: float) -> Tensor:
    """To float32, never inward."""
    return torch.nextafter(edge.float(), torch.tensor(infinity, device=edge.device))


class _Counting:
    """Answers block by block, each in the first precision that leaves few pairs in doubt."""

    def __init__(self, comparison: Comparison, screen: Screen) -> None:
        self.comparison = comparison
        self.precisions: tuple[Precision, ...] = tuple(dict.fromkeys((screen, "float32")))
        self.failures = self.pause = 0

    def answer(self, block: Block, questions: list[_Question]) -> None:
        """Add what a block says to the tallies."""
        paused = self.pause > 0
        self.pause -= paused
        if not paused:
            succeeded = self._answer_in(self.precisions[0], block, questions)
            self.failures = 0 if succeeded else self.failures + 1
            if self.failures == PATIENCE:
                self.failures, self.pause = 0, PAUSE
            if succeeded:
                return
        if any(self._answer_in(precision, block, questions) for precision in self.precisions[1:]):
            return
        exact_RC = self.comparison.exact(block)
        for question in questions:
            question.count(exact_RC)

    def _answer_in(self, precision: Precision, block: Block, questions: list[_Question]) -> bool:
        scores = self.comparison.scores(block, precision)
        if sum(question.look(scores) for question in questions) > SHARE * scores.values.numel():
            return False
        for question in questions:
            question.settle(scores)
        return True
