"""The score of a pair of sets, to the last bit.

It is the similarity in float64 of the float32 embeddings, averaged over the members of an ensemble, rounded to float32:
a function of the sets alone. So that it is, wherever a pair stands and beside whichever others, its dot products are
summed in one fixed order, elementwise (each product is exact in float64). An ordinary float32 computation differs from
it by rounding only; GPUs may round the last bit of an exponential another way, which changes one score in a billion.

Shape suffixes: P pairs, K and J elements of their sets, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from setwise.models.similarity import Similarity

LONGEST = 1e9
PARTIAL_SUMS = 256
PAIRS = {"cpu": 32, "cuda": 4096}
"""So many pairs are computed at once, by the type of the device: on a CPU their partial sums stay in cache."""


@dataclass(frozen=True)
class Member:
    """One model's sets of the two sides: rows (N,K,D) and columns (M,J,D) float32, on one device. `pcme` and `csd` take
    vectors of any length, the other similarities mean unit vectors.

    An ensemble has several members, of the same N and M, whose scores are averaged. One side is compared with itself
    where `rows` is `columns`. scores (N,M) float32 on the CPU: of all pairs, computed beforehand, where the similarity
    is no function of dot products (see ranking.member).
    """

    rows: Tensor
    columns: Tensor
    similarity: Similarity
    scores: Tensor | None = None


def is_symmetric(members: Sequence[Member]) -> bool:
    """Whether one side is compared with itself, so that a pair's score is the same from both ends."""
    return all(member.rows is member.columns for member in members)


def checked_lengths(members: Sequence[Member]) -> list[tuple[Tensor, Tensor]]:
    """Upper bounds (N,) and (M,) of the length of the longest vector of each set, for each member.

    Raises:
        ValueError: the members do not fit each other, or a vector is NaN, infinite or too long to compute with.
    """
    rows, columns = len(members[0].rows), len(members[0].columns)
    found = []
    for member in members:
        if (len(member.rows), len(member.columns)) != (rows, columns):
            raise ValueError(
                f"members have {rows} x {columns} and {len(member.rows)} x {len(member.columns)} sets: scores can be "
                "averaged only over the same ones"
            )
        lengths = longest(member.rows), longest(member.columns)
        if not all(bool((side <= LONGEST).all()) for side in lengths):
            raise ValueError(
                f"an embedding is NaN, infinite or longer than {LONGEST:g}: the model has diverged, and no ranking of "
                "it means anything"
            )
        found.append(lengths)
    return found


def longest(sets_PKD: Tensor) -> Tensor:
    """(P,) upper bounds: of D squares a sum in any order is off by at most a share of D times half a unit, and a square
    that is too small for its type is lost."""
    info, width = torch.finfo(sets_PKD.dtype), sets_PKD.shape[2]
    lengths_P: Tensor = torch.linalg.vector_norm(sets_PKD, dim=2).amax(1)
    return lengths_P * (1 + (width + 8) * info.eps) + math.sqrt(width * info.tiny)


@torch.inference_mode()
def of_pairs(members: Sequence[Member], row_P: Tensor, column_P: Tensor) -> Tensor:
    """(P,) float32 scores of pairs of indices, on the device of the members."""
    if is_symmetric(members):
        row_P, column_P = torch.minimum(row_P, column_P), torch.maximum(row_P, column_P)
    found = [torch.empty(0, device=row_P.device)]
    size = PAIRS["cpu" if row_P.device.type == "cpu" else "cuda"]
    for start in range(0, len(row_P), size):
        row, column = row_P[start : start + size], column_P[start : start + size]
        total = torch.zeros(len(row), dtype=torch.float64, device=row.device)
        for member in members:
            sets = member.rows.index_select(0, row), member.columns.index_select(0, column)
            total += _scores(*sets, member.similarity)
        found.append((total / len(members)).float())
    return torch.cat(found)


def _scores(x_PKD: Tensor, y_PJD: Tensor, similarity: Similarity) -> Tensor:
    """(P,) float64."""
    x_PK1D, y_P1JD = x_PKD.double()[:, :, None], y_PJD.double()[:, None]
    if similarity.config.kind in ("pcme", "csd"):
        squares_PKJD = (x_PK1D - y_P1JD).square_()
        return similarity.of_squared_distances(_dot(squares_PKJD, torch.ones_like(y_P1JD))[:, :, None])[:, 0]
    return similarity.of_cosines(_dot(x_PK1D, y_P1JD)[:, :, None])[:, 0]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Over the last dimension. Their products are exact, so that it makes no difference if one operation multiplies and
    adds; and they are added in an order that depends on nothing but the width."""
    total = x[..., :PARTIAL_SUMS] * y[..., :PARTIAL_SUMS]
    for start in range(PARTIAL_SUMS, x.shape[-1], PARTIAL_SUMS):
        part = slice(start, min(start + PARTIAL_SUMS, x.shape[-1]))
        total[..., : part.stop - start].addcmul_(x[..., part], y[..., part])
    while (size := total.shape[-1]) > 1:
        rest = size - size // 2  # one more where the size is odd
        total[..., : size - rest] += total[..., rest:]
        total = total[..., :rest]
    return total[..., 0]
