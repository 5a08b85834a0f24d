"""DeViSE as its definitions read: words counted pair by pair, the matrix decomposed whole, the loss term by term."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def information(captions: Sequence[Sequence[int]], number: int, window: int, negatives: int) -> Floats:
    """(V,V): shifted positive pointwise mutual information of words and the words in their contexts."""
    pairs = Counter(
        (word, other)
        for caption in captions
        for place, word in enumerate(caption)
        for where, other in enumerate(caption)
        if place != where and abs(place - where) <= window
    )
    total = sum(pairs.values())
    words: Counter[int] = Counter()
    for (word, _), count in pairs.items():
        words[word] += count
    matrix = np.zeros((number, number))
    for (word, other), count in pairs.items():
        more = count / total / (words[word] / total * words[other] / total)
        matrix[word, other] = max(0.0, math.log(more) - math.log(negatives))
    return matrix


def best_gram(matrix: Floats, width: int) -> Floats:
    """(V,V) dot products of word vectors U sqrt(S), U S V^T being the decomposition, cut to `width`."""
    u, s, _ = np.linalg.svd(matrix)
    return (u[:, :width] * s[:width]) @ u[:, :width].T


def caption(vectors: Floats, tokens: Sequence[int]) -> Floats:
    """(W,) the mean of the words' unit vectors, at length 1."""
    mean = sum(vectors[token] / np.linalg.norm(vectors[token]) for token in tokens) / len(tokens)
    return np.asarray(mean / np.linalg.norm(mean))


def hinge_rank(images: Floats, texts: Floats, owners: Sequence[int], margin: float) -> float:
    """Of mapped images (I,W) and captions (T,W), one image with one of its captions after another."""
    total = 0.0
    for t, own in enumerate(owners):
        for other in range(len(owners)):
            if owners[other] != own:
                total += max(0.0, margin - float(texts[t] @ images[own]) + float(texts[other] @ images[own]))
    return total / len(owners)
