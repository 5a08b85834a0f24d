"""The losses as their definitions read: one triplet, one pair of rows after another, in float64."""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def triplet(scores: Array, positives: NDArray[np.bool_], margin: float, hardest: bool) -> float:
    """Mean over positive pairs of the hardest (or the mean) hinge over the image's negatives plus the caption's."""
    pairs = [(i, t) for i in range(scores.shape[0]) for t in range(scores.shape[1]) if positives[i, t]]
    total = 0.0
    for i, t in pairs:
        captions = [scores[i, other] for other in range(scores.shape[1]) if not positives[i, other]]
        images = [scores[other, t] for other in range(scores.shape[0]) if not positives[other, t]]
        for negatives in (captions, images):
            hinges = [max(0.0, margin + negative - scores[i, t]) for negative in negatives]
            if hinges:
                total += max(hinges) if hardest else sum(hinges) / len(hinges)
    return total / len(pairs) if pairs else 0.0


def triplet_violating(scores: Array, positives: NDArray[np.bool_], margin: float) -> float:
    """In each direction the mean of the hinges above zero; the two added."""
    return sum(_mean(hinge for hinge in hinges if hinge > 0) for hinges in _all_hinges(scores, positives, margin))


def triplet_semi_hard(scores: Array, positives: NDArray[np.bool_], margin: float) -> float:
    """In each direction the hinges cut to 0..margin, averaged over those that are not zero; the two added."""
    cut = ([min(max(hinge, 0.0), margin) for hinge in hinges] for hinges in _all_hinges(scores, positives, margin))
    return sum(_mean(hinge for hinge in hinges if hinge != 0) for hinges in cut)


def _all_hinges(scores: Array, positives: NDArray[np.bool_], margin: float) -> list[list[float]]:
    """Image-to-text and text-to-image: margin + negative - positive of every query, positive and negative."""
    return [
        [
            margin + table[q, other] - table[q, own]
            for q in range(table.shape[0])
            for own in range(table.shape[1])
            for other in range(table.shape[1])
            if truth[q, own] and not truth[q, other]
        ]
        for table, truth in ((scores, positives), (scores.T, positives.T))
    ]


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def mmd(x: Array, y: Array, gamma: float) -> float:
    def mean_kernel(first: Array, second: Array) -> float:
        kernels = [math.exp(-gamma * math.dist(a, b)) for a in first for b in second]
        return sum(kernels) / len(kernels)

    return mean_kernel(x, x) - 2 * mean_kernel(x, y) + mean_kernel(y, y)


def gram_diversity(slots: Array) -> float:
    """PVSE's: root of the sum of the squared cosines of different slots in both orders, over K squared."""
    norms = []
    for sample in slots:
        units = [slot / math.sqrt(slot @ slot) for slot in sample]
        squares = [(a @ b) ** 2 for i, a in enumerate(units) for j, b in enumerate(units) if i != j]
        norms.append(math.sqrt(sum(squares)) / len(units) ** 2)
    return sum(norms) / len(norms)


def diversity(slots: Array) -> float:
    samples = []
    for sample in slots:
        units = [slot / math.sqrt(slot @ slot) for slot in sample]
        pairs = [(a, b) for a in range(len(units)) for b in range(a)]
        samples.append(sum(math.exp(-2 * math.dist(units[a], units[b]) ** 2) for a, b in pairs) / len(pairs))
    return sum(samples) / len(samples)
