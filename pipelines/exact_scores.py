"""The score of a pair of sets, to the last bit.

It is the similarity in float64 of the float32 embeddings, averaged over the members of an ensemble, rounded to float32:
a function of the sets alone. So that it is, wherever a pair stands and beside whichever others, its dot products are
summed in one fixed order, elementwise (each product is exact in float64). An ordinary float32 computation differs from
it by rounding only; GPUs may round the last bit of an exponential another way, which changes one score in a billion.

Shape suffixes: P pairs, K and J elements of their sets, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from setwise.models.similarity import Similarity

LONGEST = 1e9
PARTIAL_SUMS = 256
PAIRS = {"cpu": 64, "cuda": 4096}
"""So many pairs are computed at once, by the type of the device: on a CPU their partial sums stay in cache."""


@dataclass(frozen=True)
class Member:
    """One model's sets of the two sides: rows (N,K,D) and columns (M,J,D) float32, on one device. `pcme` takes vectors
    of any length, the other similarities mean unit vectors.

    An ensemble has several members, of the same N and M, whose scores are averaged. One side is compared with itself
    where `rows` is `columns`.
    """

    rows: Tensor
    columns: Tensor
    similarity: Similarity


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
    """(P,) upper bounds: of D squares a sum in any order is off by at most a share of D times half a unit."""
    unit = torch.finfo(sets_PKD.dtype).eps
    lengths_PK: Tensor = torch.linalg.vector_norm(sets_PKD, dim=2)
    return lengths_PK.amax(1) * (1 + (sets_PKD.shape[2] + 8) * unit)


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
            total += _scores(member.rows[row], member.columns[column], member.similarity)
        found.append((total / len(members)).float())
    return torch.cat(found)


def _scores(x_PKD: Tensor, y_PJD: Tensor, similarity: Similarity) -> Tensor:
    """(P,) float64."""
    x_PK1D, y_P1JD = x_PKD.double()[:, :, None], y_PJD.double()[:, None]
    if similarity.config.kind == "pcme":
        squared_PKJ = _summed(lambda part: (x_PK1D[..., part] - y_P1JD[..., part]).square_(), x_PK1D.shape[3])
        return similarity.of_distances(squared_PKJ.sqrt()[:, :, None])[:, 0]
    cosine_PKJ = _summed(lambda part: x_PK1D[..., part] * y_P1JD[..., part], x_PK1D.shape[3])
    return similarity.of_cosines(cosine_PKJ[:, :, None])[:, 0]


def _summed(terms: Callable[[slice], Tensor], width: int) -> Tensor:
    """The sum of `terms` over their last dimension, in an order that depends on nothing but its width."""
    total = terms(slice(0, PARTIAL_SUMS))
    for start in range(PARTIAL_SUMS, width, PARTIAL_SUMS):
        part = terms(slice(start, start + PARTIAL_SUMS))
        total[..., : part.shape[-1]] += part
    while (size := total.shape[-1]) > 1:
        rest = size - size // 2  # one more where the size is odd
        total[..., : size - rest] += total[..., rest:]
        total = total[..., :rest]
    return total[..., 0]
