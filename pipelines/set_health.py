"""Whether sets are used as sets: how far the elements of one set lie apart, and how many of them find matches.

A set whose elements have become equal (set collapse) is one vector at K times the price, and its log circular variance
sinks. Elements may also differ and yet only one of them ever match: then the slot usage is near 1.

Shape suffixes: I images, T captions, K elements of an image's set, J elements of a caption's set, D width; N items.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SMALLEST_VARIANCE = 1e-14
"""What rounding to float32 makes of equal vectors; below it a variance says nothing."""
PAIRS = 4096
"""Pairs whose cosines are computed at once: with K = 4 and D = 1024 their sets take 128 MB."""


@torch.inference_mode()
def set_health(image_sets_IKD: Tensor, text_sets_TJD: Tensor, owners_T: Tensor) -> dict[str, float]:
    """Spread and use of the elements of sets, as `sets/...`.

    Args:
        image_sets_IKD, text_sets_TJD: finite vectors, of which only the direction counts.
        owners_T: index of each caption's image.

    Returns:
        `sets/image_log_circular_variance` and `sets/text_...`, of sides whose sets have several elements;
        `sets/image_slot_usage`, 1 to K, and `sets/text_slot_usage`, 1 to J.
    """
    sides = {
        "image": nn.functional.normalize(image_sets_IKD, dim=2),
        "text": nn.functional.normalize(text_sets_TJD, dim=2),
    }
    values = {
        f"sets/{side}_log_circular_variance": log_circular_variance(sets)
        for side, sets in sides.items()
        if sets.shape[1] > 1
    }
    used = slot_usage(*sides.values(), owners_T)
    return values | {f"sets/{side}_slot_usage": value for side, value in zip(sides, used, strict=True)}


def log_circular_variance(sets_NKD: Tensor) -> float:
    """Natural logarithm of the mean over items of 1 - |mean of the set's unit vectors|; at least log(1e-14).

    log(1 - 1/sqrt(K)), -0.69 for K = 4, if elements are orthogonal; 0 is the most, if they cancel each other.
    """
    mean_N1D = sets_NKD.mean(1, keepdim=True)
    # Of unit vectors 1 - |mean|^2 is their mean squared distance from the mean: no difference of nearly equal numbers.
    squared_N = (sets_NKD - mean_N1D).square().sum(2).mean(1)
    variance_N = squared_N / (1 + mean_N1D[:, 0].norm(dim=1))
    return float(variance_N.double().mean().clamp(min=SMALLEST_VARIANCE).log())


def slot_usage(image_sets_IKD: Tensor, text_sets_TJD: Tensor, owners_T: Tensor) -> tuple[float, float]:
    """How many elements of images' sets, and of captions', hold the best cosine of a matched pair: the exponential of
    the entropy of which one does. K if all do equally often, 1 if always the same one."""
    width = text_sets_TJD.shape[1]
    best_T = torch.cat(
        [
            (image_sets_IKD[owners] @ texts.mT).flatten(1).argmax(1)
            for owners, texts in zip(owners_T.split(PAIRS), text_sets_TJD.split(PAIRS), strict=True)
        ]
    )
    return _effective_number(best_T // width), _effective_number(best_T % width)


def _effective_number(winner_T: Tensor) -> float:
    share = winner_T.bincount().double() / len(winner_T)
    return float(torch.special.entr(share).sum().exp())
