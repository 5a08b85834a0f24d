"""PCME's and PCME++'s losses and the closed form, one pair, draw and dimension after another, in plain floats."""

import math
from itertools import product

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def match_probability(image_JD: Array, text_JD: Array, scale: float, shift: float) -> float:
    each = [sigmoid(shift - scale * math.dist(a, b)) for a, b in product(image_JD, text_JD)]
    return sum(each) / len(each)


def soft_contrastive(images_IJD: Array, texts_TJD: Array, owners: list[int], scale: float, shift: float) -> float:
    """Both directions: each pair costs the negative logarithm of the probability of what is true of it."""
    total = 0.0
    for i, image in enumerate(images_IJD):
        for t, text in enumerate(texts_TJD):
            probability = match_probability(image, text, scale, shift)
            total -= math.log(probability if owners[t] == i else 1 - probability)
    return 2 * total


def kl(mean_D: Array, log_sigma_D: Array) -> list[float]:
    """Of each dimension from the standard normal distribution, by the textbook formula of two normal ones."""
    found = []
    for mean, log_sigma in zip(mean_D, log_sigma_D, strict=True):
        sigma = math.exp(log_sigma)
        found.append(math.log(1 / sigma) + (sigma**2 + mean**2) / 2 - 1 / 2)
    return found


def uniformity(draws_ND: Array) -> float:
    pairs = [(a, b) for a in range(len(draws_ND)) for b in range(a)]
    return math.log(sum(math.exp(-2 * math.dist(draws_ND[a], draws_ND[b]) ** 2) for a, b in pairs) / len(pairs))


def closed_form_distance(mean: Array, log_sigma: Array, other: Array, other_log_sigma: Array) -> float:
    total = 0.0
    for m, s, n, r in zip(mean, log_sigma, other, other_log_sigma, strict=True):
        total += (m - n) ** 2 + math.exp(s) ** 2 + math.exp(r) ** 2
    return total


def cross_entropy(logit: float, label: bool) -> float:
    return -math.log(sigmoid(logit if label else -logit))


def matching(scores_IT: Array, owners: list[int]) -> float:
    """Both directions, each the mean over pairs."""
    images, texts = scores_IT.shape
    each = [cross_entropy(scores_IT[i, t], owners[t] == i) for i in range(images) for t in range(texts)]
    return 2 * sum(each) / len(each)


def pseudo_positive(scores_IT: Array, owners: list[int]) -> float:
    """Image-to-text, where an image asks once with each of its captions, and text-to-image."""
    images, texts = scores_IT.shape
    of_images = []
    for i in range(images):
        own = [t for t in range(texts) if owners[t] == i]
        rows = []
        for true in own or [None]:
            row = []
            for t in range(texts):
                near = true is not None and scores_IT[i, t] >= scores_IT[i, true]
                row.append(cross_entropy(scores_IT[i, t], owners[t] == i or near))
            rows.append(sum(row) / texts)
        of_images.append(sum(rows) / len(rows))
    of_texts = []
    for t in range(texts):
        row = [cross_entropy(scores_IT[i, t], bool(scores_IT[i, t] >= scores_IT[owners[t], t])) for i in range(images)]
        of_texts.append(sum(row) / images)
    return sum(of_images) / images + sum(of_texts) / texts
