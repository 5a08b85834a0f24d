"""Scores of blocks of pairs, each with the bounds between which the true ones lie, in a precision of choice.

Shape suffixes: R rows and C columns of a block, K and J elements of their sets, D width, B single pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from setwise.pipelines import exact_scores, screens
from setwise.pipelines.exact_scores import Member
from setwise.pipelines.pooling import Pooling
from setwise.pipelines.screens import Encoded, Precision

Integers = NDArray[np.int64]
Side = Literal["rows", "columns"]
VECTORS = {"cpu": (512, 2048), "cuda": (4096, 8192)}
"""Vectors of a block, of rows and of columns, by the type of the device. On a CPU their dot products, 4 MB, stay in
cache."""
KEPT = 2**28
"""Bytes, 256 MiB: up to so many encoded rows are kept from one block of columns to the next."""
PAIRS = {"cpu": 32, "cuda": 8192}
"""So many single pairs are computed at once."""


class Block(NamedTuple):
    rows: slice
    columns: slice
    same_fold: bool


class Scores(NamedTuple):
    """values (R,C), float32 or float64; and of each member the rows and columns as they were compared, and for `pcme`
    the smallest squared distance."""

    values: Tensor
    compared: list[tuple[Encoded, Encoded, Tensor | None]]


class Comparison:
    """The members, checked and on one device, and how scores of theirs are computed.

    Raises:
        ValueError: the members do not fit each other, or an embedding is not finite.
    """

    def __init__(self, members: Sequence[Member], device: torch.device | None) -> None:
        self.device = device or members[0].rows.device
        self.members: list[Member] = []
        for member in members:
            rows = member.rows.to(self.device)
            columns = rows if member.rows is member.columns else member.columns.to(self.device)
            self.members.append(Member(rows, columns, copy.deepcopy(member.similarity).to(self.device)))
        self.rows, self.columns = len(self.members[0].rows), len(self.members[0].columns)
        self._lengths = exact_scores.checked_lengths(self.members)
        self.poolings = []
        self._squares: dict[int, tuple[Tensor, Tensor]] = {}
        for number, (member, lengths) in enumerate(zip(self.members, self._lengths, strict=True)):
            longest = [float(side.amax()) if len(side) else 0.0 for side in lengths]
            elements = member.rows.shape[1], member.columns.shape[1]
            self.poolings.append(Pooling(member.similarity, (longest[0], longest[1]), elements))
            if self.poolings[number].of_distances:
                self._squares[number] = _squared_lengths(member.rows), _squared_lengths(member.columns)
        self._kept: dict[tuple[int, Side, int, Precision], tuple[Encoded, Tensor]] = {}
        self._columns_kept = slice(0, 0)

    @property
    def width(self) -> int:
        """The largest of any member."""
        return max(member.rows.shape[2] for member in self.members)

    @property
    def vectors_of_a_set(self) -> tuple[int, int]:
        """Of a row and of a column, the most of any member. The mean cosine compares means."""
        each = [(1, 1) if pooling.kind == "cosine" else pooling.elements for pooling in self.poolings]
        return max(k for k, _ in each), max(j for _, j in each)

    def blocks(self, folds: tuple[Integers, Integers] | None = None, half: bool = False) -> Iterator[Block]:
        """All pairs, column block by column block, each block in one fold of rows and one of columns.

        With `half`, of one side against itself: only what is needed where a pair is the same from both ends. A block
        lies above the diagonal, or its rows are among its columns.
        """
        sizes = VECTORS["cpu" if self.device.type == "cpu" else "cuda"]
        row_size, column_size = (
            max(size // vectors, 1) for size, vectors in zip(sizes, self.vectors_of_a_set, strict=True)
        )
        row_folds, column_folds = folds if folds is not None else (np.zeros(self.rows), np.zeros(self.columns))
        column_slices = list(_cut(column_folds, slice(0, self.columns), column_size))
        coarse = column_slices if half else [slice(0, self.rows)]
        row_slices = [part for whole in coarse for part in _cut(row_folds, whole, row_size)]
        for columns in column_slices:
            for rows in row_slices:
                if not half or rows.start < columns.stop:
                    fold = row_folds[rows.start]
                    yield Block(rows, columns, bool(fold >= 0 and fold == column_folds[columns.start]))

    def scores(self, block: Block, precision: Precision) -> Scores:
        """In float64 for float64, else in float32."""
        values, compared = [], []
        for number, pooling in enumerate(self.poolings):
            rows, row_squares_KR = self._encoded(number, "rows", block.rows, precision)
            columns, column_squares_JC = self._encoded(number, "columns", block.columns, precision)
            dots_KRJC = screens.dots(rows, columns, pooling.factor)
            values_RC, smallest = pooling.scores(dots_KRJC, row_squares_KR[:, :, None, None], column_squares_JC)
            values.append(values_RC)
            compared.append((rows, columns, smallest))
        return Scores(_mean(values), compared)

    def reaches(self, scores: Scores, row: Tensor | None, column: Tensor | None) -> list[Tensor]:
        """How far the numbers that were pooled may be wrong, of each member (see Pooling.reach): for pairs of a row and
        a column of the block; or, where one is None, for the other with any."""
        found = []
        for pooling, (rows, columns, smallest) in zip(self.poolings, scores.compared, strict=True):
            rounding = screens.rounding(rows.precision, rows.values.shape[1])
            errors = screens.errors(*rows.of(row), *columns.of(column), rounding)
            found.append(pooling.reach(errors, smallest, scores.values.dtype))
        return found

    def _encoded(self, number: int, side: Side, at: slice, precision: Precision) -> tuple[Encoded, Tensor]:
        """Sets of one side, and for `pcme` and `csd` their squared lengths (K,R). Columns are kept while their block
        lasts, rows for good if there is no harm in that."""
        if side == "columns" and at != self._columns_kept:
            self._kept = {key: kept for key, kept in self._kept.items() if key[1] == "rows"}
            self._columns_kept = at
        key = number, side, at.start, precision
        if key in self._kept:
            return self._kept[key]
        member, kind = self.members[number], self.poolings[number].kind
        sets_RKD, squares_KR = (member.rows if side == "rows" else member.columns)[at], torch.empty(0, 0)
        if kind == "cosine":  # the mean of all dot products is the dot product of the means
            sets_RKD = sets_RKD.double().mean(1, keepdim=True)
        elif self.poolings[number].of_distances:
            squares_RK = self._squares[number][side == "columns"][at]
            squares_KR = squares_RK.T.to(torch.float64 if precision == "float64" else torch.float32)
        made = screens.encode(sets_RKD, precision), squares_KR
        if side == "columns" or made[0].values.element_size() * member.rows.numel() <= KEPT:
            self._kept[key] = made
        return made

    def pair_scores(self, row_B: Tensor, column_B: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B,) float32 scores of single pairs, and how far the numbers pooled may be wrong, (B,) of each member."""
        values, reaches = [], []
        for number, (member, pooling) in enumerate(zip(self.members, self.poolings, strict=True)):
            lengths = self._lengths[number]
            dots_KBJ1 = _dots_of_pairs(member, row_B, column_B).mul_(pooling.factor).transpose(0, 1)[..., None]
            x_KB11, y_1BJ1 = torch.empty(0), torch.empty(0)
            if pooling.of_distances:
                x_KB11 = self._squares[number][0][row_B].float().T[:, :, None, None]
                y_1BJ1 = self._squares[number][1][column_B].float()[None, :, :, None]
            values_B1, smallest = pooling.scores(dots_KBJ1, x_KB11, y_1BJ1)
            error_B = lengths[0][row_B] * lengths[1][column_B] * screens.rounding("float32", member.rows.shape[2])
            values.append(values_B1[:, 0])
            reaches.append(pooling.reach(error_B, smallest, torch.float32))
        return _mean(values), reaches

    def edges(self, low: Tensor, high: Tensor, reaches: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Float64: a score computed in `dtype` that is below the first is truly below `low`, one above the second truly
        above `high`."""
        if len(reaches) == 1:
            return self.poolings[0].edges(low, high, reaches[0], dtype)
        rounding = len(reaches) * torch.finfo(dtype).eps  # of their mean
        widths = [
            pooling.width(reach, dtype) + rounding * pooling.largest_score
            for pooling, reach in zip(self.poolings, reaches, strict=True)
        ]
        width = _mean([width.double() for width in widths])
        return low - width, high + width

    def exact(self, block: Block) -> Tensor:
        """(R,C) float32, as exact_scores.of_pairs: where all numbers within the bounds of a float64 product round to
        one float32, it is that; the few others are computed pair by pair."""
        scores = self.scores(block, "float64")
        row_R1 = torch.arange(block.rows.stop - block.rows.start, device=self.device)[:, None]
        reaches = self.reaches(scores, row_R1, None)
        bounds = self.edges(scores.values, scores.values, reaches, torch.float64)
        low_RC, high_RC = self.edges(*bounds, reaches, torch.float64)  # again, as single pairs are rounded too
        exact_RC, other_RC = low_RC.float(), high_RC.float()
        row, column = (exact_RC != other_RC).nonzero(as_tuple=True)
        exact_RC[row, column] = exact_scores.of_pairs(
            self.members, row + block.rows.start, column + block.columns.start
        )
        return exact_RC


def _dots_of_pairs(member: Member, row_B: Tensor, column_B: Tensor) -> Tensor:
    """(B,K,J), a few at a time, so that on a CPU they stay in cache."""
    size = PAIRS["cpu" if row_B.device.type == "cpu" else "cuda"]
    dots_BKJ = member.rows.new_empty(len(row_B), member.rows.shape[1], member.columns.shape[1])
    for start in range(0, len(row_B), size):
        part = slice(start, start + size)
        x_BKD, y_BJD = member.rows.index_select(0, row_B[part]), member.columns.index_select(0, column_B[part])
        torch.bmm(x_BKD, y_BJD.transpose(1, 2), out=dots_BKJ[part])
    return dots_BKJ


def _squared_lengths(sets_NKD: Tensor) -> Tensor:
    """(N,K) float64."""
    parts = [part_NKD.double().square().sum(2) for part_NKD in torch.split(sets_NKD, 1024)]
    return torch.cat(parts) if parts else sets_NKD.new_zeros(sets_NKD.shape[:2], dtype=torch.float64)


def _mean(values: list[Tensor]) -> Tensor:
    return sum(values[1:], start=values[0]) / len(values) if len(values) > 1 else values[0]


def _cut(fold: NDArray[np.generic], whole: slice, size: int) -> Iterator[slice]:
    """Evenly, into slices of at most `size` and of one fold."""
    changes = np.flatnonzero(np.diff(fold[whole].astype(np.int64))) + 1 + whole.start
    edges = [whole.start, *changes.tolist(), whole.stop]
    for start, stop in pairwise(edges):
        parts = -(-(stop - start) // size)
        for part in range(parts):
            yield slice(start + (stop - start) * part // parts, start + (stop - start) * (part + 1) // parts)
