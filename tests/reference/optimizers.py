"""Optimizers written down number by number from their papers, for one weight of two dimensions: AdamP and Lookahead."""

from __future__ import annotations

import math
from collections.abc import Sequence

Matrix = list[list[float]]


class AdamP:
    """The AdamP paper's algorithm, with delta = 0.1 and, for projected weights, a tenth of the decay."""

    def __init__(self, lr: float, weight_decay: float) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        self.updates = 0
        self.mean: dict[tuple[int, int], float] = {}
        self.square: dict[tuple[int, int], float] = {}
        self.seen: list[str] = []
        """What each update was: projected by rows, as a whole, or not at all."""

    def step(self, weight: Matrix, gradient: Matrix) -> Matrix:
        self.updates += 1
        places = [(i, j) for i in range(len(weight)) for j in range(len(weight[0]))]
        update: dict[tuple[int, int], float] = {}
        for i, j in places:
            slope = gradient[i][j]
            self.mean[i, j] = 0.9 * self.mean.get((i, j), 0.0) + 0.1 * slope
            self.square[i, j] = 0.999 * self.square.get((i, j), 0.0) + 0.001 * slope * slope
            unbiased = self.square[i, j] / (1 - 0.999**self.updates)
            update[i, j] = self.mean[i, j] / (1 - 0.9**self.updates) / (math.sqrt(unbiased) + 1e-8)
        by_rows = [[(i, j) for j in range(len(weight[0]))] for i in range(len(weight))]
        kind = "not"
        for name, vectors in (("rows", by_rows), ("whole", [places])):
            if all(self._orthogonal(weight, gradient, vector) for vector in vectors):
                for vector in vectors:
                    self._project(weight, update, vector)
                kind = name
                break
        self.seen.append(kind)
        decay = self.lr * self.weight_decay * (1.0 if kind == "not" else 0.1)
        return [
            [weight[i][j] * (1 - decay) - self.lr * update[i, j] for j in range(len(weight[0]))]
            for i in range(len(weight))
        ]

    @staticmethod
    def _orthogonal(weight: Matrix, gradient: Matrix, vector: Sequence[tuple[int, int]]) -> bool:
        product = sum(weight[i][j] * gradient[i][j] for i, j in vector)
        lengths = math.hypot(*(weight[i][j] for i, j in vector)) * math.hypot(*(gradient[i][j] for i, j in vector))
        return abs(product) / max(lengths, 1e-30) < 0.1 / math.sqrt(len(vector))

    @staticmethod
    def _project(weight: Matrix, update: dict[tuple[int, int], float], vector: Sequence[tuple[int, int]]) -> None:
        length = math.hypot(*(weight[i][j] for i, j in vector))
        along = sum(update[i, j] * weight[i][j] / length for i, j in vector)
        for i, j in vector:
            update[i, j] -= along * weight[i][j] / length


def lookahead_of_momentum(
    initial: float, slopes: Sequence[float], lr: float, momentum: float, steps: int, alpha: float
) -> list[float]:
    """A weight after each update by SGD with momentum in Lookahead (algorithm 1); `slopes` do not depend on it."""
    slow = fast = initial
    speed, path = 0.0, []
    for number, slope in enumerate(slopes, 1):
        speed = momentum * speed + slope
        fast -= lr * speed
        if number % steps == 0:
            slow += alpha * (fast - slow)
            fast = slow
        path.append(fast)
    return path
