"""Blocks of dot products to scores of sets, in few passes over memory, and what an error of the former does to the
latter.

Smooth-Chamfer, Chamfer, MIL and the mean cosine change by at most e where no dot product changes by more than e; the
closed form of PCME++ by at most 2 e times its scale. The two match probabilities are means of sigmoids: where no
argument changes by more than e, the odds of the mean change by at most a factor of exp(e). (Shifting an argument by e
multiplies the odds p / (1 - p) of its sigmoid by exp(e), which is a concave function of p; so the mean of the shifted
is at most the shifted mean.)

Dot products come as (K,R,J,C): K x J slabs that are added, multiplied or compared as wholes.

Shape suffixes: R sets of one block, C of the other, K and J their elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from setwise.models.similarity import Similarity

EXPONENTS = 120
"""Powers of two in which a product of sums of exponentials may lie: float32 ends at 126."""


class Pooling:
    """A similarity as it is computed of blocks.

    Args:
        similarity: what is computed.
        longest: upper bounds of the lengths of the vectors of both sides.
        elements: K and J.
    """

    def __init__(self, similarity: Similarity, longest: tuple[float, float], elements: tuple[int, int]) -> None:
        self.kind, self.alpha = similarity.config.kind, similarity.config.alpha
        self.longest, self.elements = longest, elements
        self.largest = longest[0] * longest[1]
        self.sigmoid = self.kind in ("match_probability", "pcme")
        self.of_distances = self.kind in ("pcme", "csd")
        """Whether `scores` reads the lengths of vectors."""
        self.scale, self.shift = (1.0, 0.0)
        if self.sigmoid or self.of_distances:
            self.scale, self.shift = (float(learned.detach()) for learned in (similarity.scale, similarity.shift))
        # bf16, at worst, makes a dot product larger by a 64th part.
        exponent = (1 + 1 / 64) * self.alpha * math.log2(math.e) * self.largest + math.log2(max(elements))
        self.factors_of_a_log = min(int(EXPONENTS / exponent), max(elements)) if exponent else max(elements)

    @property
    def largest_score(self) -> float:
        """In size, and no less than what smooth-Chamfer adds up on its way."""
        if self.sigmoid:
            return 1.0
        if self.kind == "csd":
            return abs(self.scale) * sum(self.longest) ** 2 + abs(self.shift)
        return self.largest + (sum(self.elements) / self.alpha if self.kind == "smooth_chamfer" else 0)

    @property
    def factor(self) -> float:
        """What `scores` wants the dot products multiplied with."""
        match self.kind:
            case "smooth_chamfer":
                return self.alpha * (math.log2(math.e) if self.factors_of_a_log else 1)
            case "match_probability":
                return self.scale
            case "pcme":
                return -2.0
            case "csd":
                return 2 * self.scale
            case _:
                return 1.0

    def scores(self, dots_KRJC: Tensor, row_squares: Tensor, column_squares: Tensor) -> tuple[Tensor, Tensor | None]:
        """(R,C), and for `pcme` the smallest squared distance. The dot products are overwritten.

        row_squares, column_squares: squared lengths as (K,R,1,1) and (J,C), or as (1,R,J,1); only `pcme` and `csd` read
        them.
        """
        K, _, J, _ = dots_KRJC.shape
        match self.kind:
            case "smooth_chamfer":
                return self._smooth_chamfer(dots_KRJC), None
            case "chamfer":
                forth_KRC, back_RJC = _fold(torch.maximum, dots_KRJC, 2), _fold(torch.maximum, dots_KRJC, 0)
                forth_RC, back_RC = _fold(torch.add, forth_KRC, 0), _fold(torch.add, back_RJC, 1)
                return forth_RC.mul_(1 / (2 * K)).add_(back_RC, alpha=1 / (2 * J)), None
            case "mil":
                return _fold(torch.maximum, _fold(torch.maximum, dots_KRJC, 0), 1), None
            case "cosine":
                return self._mean(dots_KRJC), None
            case "match_probability":
                return self._mean(dots_KRJC.add_(self.shift).sigmoid_()), None
            case "pcme":
                squared_KRJC = dots_KRJC.add_(row_squares).add_(column_squares)
                smallest = squared_KRJC.amin()
                distance_KRJC = squared_KRJC.clamp_(min=0).sqrt_()
                return self._mean(distance_KRJC.mul_(-self.scale).add_(self.shift).sigmoid_()), smallest
            case "csd":
                of_rows, of_columns = row_squares * self.scale, column_squares * self.scale
                return self._mean(dots_KRJC.sub_(of_rows).sub_(of_columns).add_(self.shift)), None
            case _:
                raise ValueError(f"the similarity '{self.kind}' is not computed of blocks")

    def _mean(self, values_KRJC: Tensor) -> Tensor:
        K, _, J, _ = values_KRJC.shape
        return _fold(torch.add, _fold(torch.add, values_KRJC, 0), 1).mul_(1 / (K * J))

    def _smooth_chamfer(self, logits_KRJC: Tensor) -> Tensor:
        K, _, J, _ = logits_KRJC.shape
        if not self.factors_of_a_log:
            forth_RC, back_RC = logits_KRJC.logsumexp(2).sum(0), logits_KRJC.logsumexp(0).sum(1)
        else:  # one exponential for both directions, and one logarithm for several sums
            exponential_KRJC = logits_KRJC.exp2_()
            forth_RC = self._sum_of_logs(_fold(torch.add, exponential_KRJC, 2), 0)
            back_RC = self._sum_of_logs(_fold(torch.add, exponential_KRJC, 0), 1)
        return forth_RC.mul_(1 / (2 * self.alpha * K)).add_(back_RC, alpha=1 / (2 * self.alpha * J))

    def _sum_of_logs(self, sums: Tensor, dim: int) -> Tensor:
        logs = [_fold(torch.mul, part, dim).log_() for part in torch.split(sums, self.factors_of_a_log, dim)]
        return reduce(Tensor.add_, logs)

    def reach(self, errors: Tensor, smallest: Tensor | None, dtype: torch.dtype) -> Tensor:
        """From errors of dot products to those of the numbers that are pooled: dot products, arguments of sigmoids, or
        logits of pairs.

        smallest: the least squared distance that was computed, for `pcme`.
        """
        unit, distance = torch.finfo(dtype).eps, self.longest[0] + self.longest[1]
        if self.kind == "csd":
            return 2 * abs(self.scale) * errors + 8 * unit * (abs(self.scale) * distance**2 + abs(self.shift))
        if not self.sigmoid:
            return errors
        if smallest is None:
            return abs(self.scale) * errors + 8 * unit * (abs(self.scale) * self.largest + abs(self.shift))
        # Of u and v = u + e, sqrt(v) - sqrt(u) = e / (sqrt(u) + sqrt(v)), and at most sqrt(e).
        squared = 2 * errors + 8 * unit * distance**2
        roots = ((smallest - squared).clamp(min=0).sqrt() + smallest.clamp(min=0).sqrt()).clamp(min=1e-30)
        of_distance = torch.minimum(squared.sqrt(), squared / roots)
        return abs(self.scale) * of_distance + 8 * unit * (abs(self.scale) * distance + abs(self.shift))

    def width(self, reach: Tensor, dtype: torch.dtype) -> Tensor:
        """From there to the error of the score, by the slope of the similarity and the rounding of pooling."""
        unit = torch.finfo(dtype).eps
        if self.sigmoid:
            return reach / 4 + (self.elements[0] * self.elements[1] + 32) * unit
        return reach + (sum(self.elements) + 8) * unit * self.largest_score

    def edges(self, low: Tensor, high: Tensor, reach: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A computed score below the first is truly below `low`, one above the second truly above `high`; float64."""
        if not self.sigmoid:
            width = self.width(reach, dtype)
            return low - width, high + width
        info = torch.finfo(dtype)
        relative, absolute = (self.elements[0] * self.elements[1] + 32) * info.eps, 16 * info.tiny
        factor = reach.double().clamp(max=500).exp()
        low, high = low / (low + (1 - low) * factor), high * factor / (1 - high + high * factor)
        return low * (1 - relative) - absolute, high * (1 + relative) + absolute


def _fold(operation: Callable[..., Tensor], slabs: Tensor, dim: int) -> Tensor:
    """`operation` over one dimension, slab by slab: torch's own reductions take longer over so few."""
    first, *others = slabs.unbind(dim)
    if not others:
        return first.clone()
    folded = operation(first, others[0])
    for slab in others[1:]:
        operation(folded, slab, out=folded)
    return folded
