"""Whether sets are used as sets: how far the elements of one set lie apart, and how many of them find matches.

A set whose elements have become equal (set collapse) is one vector at K times the price, and its log circular variance
sinks. Elements may also differ and yet only one of them ever match: then the slot usage is near 1.

Shape suffixes: I images, T captions, P pairs of them, N items of either side; K elements of an image's set, J of a
caption's, D width.
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
    images_IKD, texts_TJD = (nn.functional.normalize(sets, dim=2) for sets in (image_sets_IKD, text_sets_TJD))
    values = {
        f"sets/{side}_log_circular_variance": log_circular_variance(sets)
        for side, sets in (("image", images_IKD), ("text", texts_TJD))
        if sets.shape[1] > 1
    }
    of_images, of_texts = slot_usage(images_IKD, texts_TJD, owners_T)
    return values | {"sets/image_slot_usage": of_images, "sets/text_slot_usage": of_texts}


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
    blocks = [slice(start, start + PAIRS) for start in range(0, len(owners_T), PAIRS)]
    cosines = (image_sets_IKD[owners_T[block]] @ text_sets_TJD[block].mT for block in blocks)
    best_T = torch.cat([cosines_PKJ.flatten(1).argmax(1) for cosines_PKJ in cosines])
    width = text_sets_TJD.shape[1]
    return _effective_number(best_T // width), _effective_number(best_T % width)


def _effective_number(winner_T: Tensor) -> float:
    share = winner_T.bincount().double() / len(winner_T)
    return float(torch.special.entr(share).sum().exp())
