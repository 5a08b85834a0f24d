"""Losses of set-embedding retrieval (Kim, Kim, Kwak, CVPR 2023), with the reductions of the authors' published code.

Shape suffixes: I images, T captions, Q queries, G gallery, P positive pairs, B samples, K slots, N and M rows, D width.
Everything is computed in float32 or better.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from setwise.models.config import LossConfig, Negatives
from setwise.models.set_prediction import SetEmbedding


class LossParts(NamedTuple):
    """The named parts of the loss, each a scalar before weighting, and `total`, what is minimised."""

    i2t: Tensor
    t2i: Tensor
    mmd: Tensor
    diversity: Tensor
    total: Tensor


def triplet(scores: Tensor, positives: Tensor, margin: float, hardest: bool) -> Tensor:
    """Triplet loss over the batch, image-to-text and text-to-image summed.

    `scores` (I,T); `positives` (I,T) bool, any many-to-many relation; everything not positive is a negative. A positive
    pair costs max(0, margin + negative - positive) for its query's hardest negative, or the mean of that over all of
    the query's negatives; the loss is the mean over positive pairs. A query without negatives or without positives
    costs nothing.
    """
    image_to_text, text_to_image = _both_directions(scores, positives, margin, "hardest" if hardest else "all")
    return image_to_text + text_to_image


def triplet_violating(scores: Tensor, positives: Tensor, margin: float) -> Tensor:
    """As `triplet`, with the mean taken over the violations alone: the triples whose hinge is above zero.

    Between the two others: the mean over all negatives fades as most of them are beaten, and the hardest alone let
    encoders that start from nothing collapse to one point, where every hinge equals the margin. This keeps its scale
    and looks at every negative that is still too near. (The authors' semi-hard option is the same with the hinge cut at
    the margin, which takes the gradient from exactly those that a positive has yet to overtake.)
    """
    image_to_text, text_to_image = _both_directions(scores, positives, margin, "violating")
    return image_to_text + text_to_image


def _both_directions(
    scores_IT: Tensor, positives_IT: Tensor, margin: float, negatives: Negatives
) -> tuple[Tensor, Tensor]:
    scores_IT = _at_least_float32(scores_IT)
    direction = {"all": _triplet_all, "hardest": _triplet_hardest, "violating": _triplet_violating}[negatives]
    return direction(scores_IT, positives_IT, margin), direction(scores_IT.T, positives_IT.T, margin)


def _triplet_hardest(scores_QG: Tensor, positives_QG: Tensor, margin: float) -> Tensor:
    # The hinge grows with the negative, so the hardest negative serves all positives of a query: no list of pairs is
    # needed. Without a negative the maximum is -inf and the hinge 0.
    hardest_Q1 = scores_QG.masked_fill(positives_QG, -torch.inf).amax(1, keepdim=True)
    hinge_QG = F.relu(margin + hardest_Q1 - scores_QG)
    return (hinge_QG * positives_QG).sum() / positives_QG.sum().clamp(min=1)


def _triplet_all(scores_QG: Tensor, positives_QG: Tensor, margin: float) -> Tensor:
    hinge_PG, negative_PG = _hinges(scores_QG, positives_QG, margin)
    mean_P = hinge_PG.sum(1) / negative_PG.sum(1).clamp(min=1)
    return mean_P.sum() / max(len(mean_P), 1)


def _triplet_violating(scores_QG: Tensor, positives_QG: Tensor, margin: float) -> Tensor:
    hinge_PG, _ = _hinges(scores_QG, positives_QG, margin)
    return hinge_PG.sum() / (hinge_PG > 0).sum().clamp(min=1)


def _hinges(scores_QG: Tensor, positives_QG: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """The hinge of each positive pair against each item of the gallery, 0 where that is no negative; and which are."""
    query_P, gallery_P = positives_QG.nonzero(as_tuple=True)  # on a GPU this waits for the device
    negative_PG = ~positives_QG[query_P]
    hinge_PG = F.relu(margin + scores_QG[query_P] - scores_QG[query_P, gallery_P].unsqueeze(1))
    return hinge_PG * negative_PG, negative_PG


def mmd(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """Maximum mean discrepancy between rows `x` (N,D) and `y` (M,D), both unit vectors here, as a scalar.

    The kernel is exp(-gamma * distance) with the distance not squared, and each row is also compared with itself, both
    as in the authors' code.
    """
    x, y = _at_least_float32(x), _at_least_float32(y)
    return _mean_kernel(x, x, gamma) - 2 * _mean_kernel(x, y, gamma) + _mean_kernel(y, y, gamma)


def _mean_kernel(x_ND: Tensor, y_MD: Tensor, gamma: float) -> Tensor:
    # One matrix product instead of N * M differences. It leaves rounding noise where a row meets itself, and the
    # square root would magnify it, so that distance is set to the zero it is.
    distance_NM = torch.cdist(x_ND, y_MD, compute_mode="use_mm_for_euclid_dist")
    if x_ND is y_MD:
        itself_NN = torch.eye(len(x_ND), dtype=torch.bool, device=x_ND.device)
        distance_NM = distance_NM.masked_fill(itself_NN, 0.0)
    return torch.exp(-gamma * distance_NM).mean()


def diversity(slots: Tensor) -> Tensor:
    """How close together the slots of one set lie: mean of exp(-2 * squared distance) over pairs of a set, then over
    the batch; 0 is diverse, 1 is collapsed.

    `slots` (B,K,D) are the slot outputs before the global feature is added, of any length; they are normalised here.
    One slot has no pair and costs 0.
    """
    slots_BKD = F.normalize(_at_least_float32(slots), dim=-1)
    first_P, second_P = torch.triu_indices(slots.shape[1], slots.shape[1], offset=1, device=slots.device)
    squared_BP = (slots_BKD[:, first_P] - slots_BKD[:, second_P]).square().sum(-1)
    return torch.exp(-2 * squared_BP).sum() / max(squared_BP.numel(), 1)


def set_embedding_loss(
    scores: Tensor,
    positives: Tensor,
    images: SetEmbedding,
    texts: SetEmbedding,
    config: LossConfig,
    *,
    negatives: Negatives,
) -> LossParts:
    """The whole loss of one batch, by parts.

    `scores` (I,T) compare `images.sets` (I,K,D) with `texts.sets` (T,J,D); `positives` (I,T) bool. MMD compares all
    vectors of the sets, diversity reads the slots. A part whose weight is 0 is not computed and reads 0.
    """
    zero = scores.new_zeros((), dtype=torch.promote_types(scores.dtype, torch.float32))
    i2t, t2i = _both_directions(scores, positives, config.margin, negatives)
    discrepancy = (
        mmd(images.sets.flatten(0, 1), texts.sets.flatten(0, 1), config.mmd_gamma) if config.mmd_weight else zero
    )
    closeness = diversity(images.slots) + diversity(texts.slots) if config.diversity_weight else zero
    total = i2t + t2i + config.mmd_weight * discrepancy + config.diversity_weight * closeness
    return LossParts(i2t, t2i, discrepancy, closeness, total)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
