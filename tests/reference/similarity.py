"""Set similarities as their definitions read: one pair of sets after another, one element after another, in float64."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def each_pair(image_sets: Array, text_sets: Array, similarity: Callable[[Array], float]) -> Array:
    """`similarity` of the matrix of cosines (K,J) of every image (I,K,D) and caption (T,J,D), as (I,T)."""
    scores = np.empty((len(image_sets), len(text_sets)))
    for i, image in enumerate(image_sets):
        for t, text in enumerate(text_sets):
            scores[i, t] = similarity(np.array([[float(x @ y) for y in text] for x in image]))
    return scores


def smooth_chamfer(cosines: Array, alpha: float) -> float:
    forth = sum(math.log(sum(math.exp(alpha * c) for c in row)) for row in cosines) / (2 * alpha * len(cosines))
    back = sum(math.log(sum(math.exp(alpha * c) for c in row)) for row in cosines.T) / (2 * alpha * len(cosines.T))
    return forth + back


def chamfer(cosines: Array) -> float:
    forth = sum(max(row) for row in cosines) / len(cosines)
    back = sum(max(row) for row in cosines.T) / len(cosines.T)
    return float(forth + back) / 2


def mil(cosines: Array) -> float:
    return float(max(max(row) for row in cosines))


def match_probability(cosines: Array, scale: float, shift: float) -> float:
    return sum(1 / (1 + math.exp(-scale * c - shift)) for c in cosines.flat) / cosines.size
