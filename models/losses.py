"""Losses of set-embedding retrieval (Kim, Kim, Kwak, CVPR 2023), with the reductions of the authors' published code.

First the definitions, which autograd differentiates; then, for batch_loss.py, the same for a training batch with the
derivatives written out.

Shape suffixes: I images, T captions, Q queries, G gallery, P pairs of a query and an item of the gallery, B samples, K
slots, N and M rows, D width. Everything is computed in float32 or better.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from setwise.models.loss_config import Diversity, Negatives


def triplet(scores: Tensor, positives: Tensor, margin: float, hardest: bool) -> Tensor:
    """Triplet loss over the batch, image-to-text and text-to-image summed.

    `scores` (I,T); `positives` (I,T) bool, any many-to-many relation; everything not positive is a negative. A positive
    pair costs max(0, margin + negative - positive) for its query's hardest negative, or the mean of that over all of
    the query's negatives; the loss is the mean over positive pairs. A query without negatives or without positives
    costs nothing.
    """
    return _both_directions(scores, positives, margin, "hardest" if hardest else "all")


def triplet_violating(scores: Tensor, positives: Tensor, margin: float) -> Tensor:
    """As `triplet`, with the mean taken over the violations alone: the triples whose hinge is above zero.

    Between the two others: the mean over all negatives fades as most of them are beaten, and the hardest alone let
    encoders that start from nothing collapse to one point, where every hinge equals the margin. This keeps its scale
    and looks at every negative that is still too near.
    """
    return _both_directions(scores, positives, margin, "violating")


def triplet_semi_hard(scores: Tensor, positives: Tensor, margin: float) -> Tensor:
    """As `triplet_violating`, with each hinge cut at the margin: the authors' semi-hard option.

    So a negative that scores higher than the positive costs the margin, and has no gradient.
    """
    return _both_directions(scores, positives, margin, "semi_hard")


def _both_directions(scores_IT: Tensor, positives_IT: Tensor, margin: float, negatives: Negatives) -> Tensor:
    scores_IT = _at_least_float32(scores_IT)
    return _triplet(scores_IT, positives_IT, margin, negatives) + _triplet(
        scores_IT.T, positives_IT.T, margin, negatives
    )


def _triplet(scores_QG: Tensor, positives_QG: Tensor, margin: float, negatives: Negatives) -> Tensor:
    query_P, gallery_P = positives_QG.nonzero(as_tuple=True)
    own_P = scores_QG[query_P, gallery_P]
    return _mean_cost(scores_QG[query_P], own_P, ~positives_QG[query_P], margin, negatives)


def triplet_of_owners(scores: Tensor, owners: Tensor, margin: float, negatives: Negatives) -> tuple[Tensor, Tensor]:
    """The triplet loss with any of the `negatives`, image-to-text and text-to-image apart, where every caption has one
    positive: `owners` (T,) int64 are the images (rows of `scores`, (I,T)) they belong to. Waits for no device."""
    scores_IT = _at_least_float32(scores)
    every_I = torch.arange(len(scores), device=owners.device)
    own_T = scores_IT.gather(0, owners[None])[0]
    i2t = _mean_cost(scores_IT[owners], own_T, owners[:, None] != owners, margin, negatives)
    return i2t, _mean_cost(scores_IT.T, own_T, owners[:, None] != every_I, margin, negatives)


def _mean_cost(scores_PG: Tensor, own_P: Tensor, negative_PG: Tensor, margin: float, negatives: Negatives) -> Tensor:
    """Of positive pairs that score `own_P`, against those of their query's gallery that are negatives."""
    hinge_PG = F.relu(margin + scores_PG - own_P.unsqueeze(1)) * negative_PG
    pairs = max(len(own_P), 1)
    match negatives:
        case "hardest":
            return hinge_PG.amax(1).sum() / pairs
        case "all":
            return (hinge_PG.sum(1) / negative_PG.sum(1).clamp(min=1)).sum() / pairs
        case "violating":
            return hinge_PG.sum() / (hinge_PG > 0).sum().clamp(min=1)
        case "semi_hard":
            return hinge_PG.clamp(max=margin).sum() / (hinge_PG > 0).sum().clamp(min=1)


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


def gram_diversity(slots: Tensor) -> Tensor:
    """How close together the slots of one set lie, as PVSE measures it (Song and Soleymani, CVPR 2019): the Frobenius
    norm of the cosines of different slots, over K squared, then the mean over the batch; 0 is orthogonal.

    `slots` (B,K,D) of any length; they are normalised here. Each pair counts in both orders. A set without any cosine
    but zero has no slope, so its gradient is 0. One slot has no pair and costs 0.
    """
    slots_BKD = F.normalize(_at_least_float32(slots), dim=-1)
    size = slots.shape[1]
    itself_KK = torch.eye(size, dtype=torch.bool, device=slots.device)
    cosine_BKK = (slots_BKD @ slots_BKD.transpose(1, 2)).masked_fill(itself_KK, 0)
    norm_B: Tensor = torch.linalg.vector_norm(cosine_BKK, dim=(1, 2))
    return norm_B.sum() / (max(len(slots), 1) * size**2)


def check_owners(owners: Tensor, images: int, captions: int) -> None:
    """Raises ValueError if `owners` is not one index for each of so many captions, or if a side has nothing."""
    if owners.shape != (captions,):
        raise ValueError(
            f"owners must be a vector, the index of an image for each of the {captions} captions; "
            f"its shape is {tuple(owners.shape)}"
        )
    if not images or not captions:
        raise ValueError(f"{images} images and {captions} captions: there is nothing to compare")


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# With derivatives, for batches in which every caption has one positive, its image: `owners` (T,) int64 are the indices
# of these. So no positives need to be searched for, and nothing waits for a device.


class Pairs(NamedTuple):
    """Where d(loss)/d(score) may differ from zero, and what it is."""

    images: Tensor
    """(P,) int64"""
    texts: Tensor
    """(P,) int64"""
    slopes: Tensor
    """(P,)"""


def hardest_with_slopes(scores: Tensor, owners: Tensor, margin: float) -> tuple[Tensor, Tensor, Pairs]:
    """`triplet` with the hardest negatives: image-to-text, text-to-image, and their gradient at I + 2 T pairs.

    Overwrites the positives in `scores` (I,T).
    """
    own_T = _take_positives(scores, owners)
    every_I, every_T = (torch.arange(count, device=owners.device) for count in scores.shape)
    best_text_I, text_I = scores.max(1)
    best_image_T, image_T = scores.max(0)
    i2t_T, t2i_T = F.relu(margin + best_text_I[owners] - own_T), F.relu(margin + best_image_T - own_T)
    i2t_slope_T, t2i_slope_T = (_slopes(hinge_T).to(own_T.dtype) / len(own_T) for hinge_T in (i2t_T, t2i_T))
    i2t_slope_I = torch.zeros_like(best_text_I).index_add_(0, owners, i2t_slope_T)
    pairs = Pairs(
        images=torch.cat((owners, every_I, image_T)),
        texts=torch.cat((every_T, text_I, every_T)),
        slopes=torch.cat((-i2t_slope_T - t2i_slope_T, i2t_slope_I, t2i_slope_T)),
    )
    return i2t_T.mean(), t2i_T.mean(), pairs


def averaged_with_slopes(
    scores: Tensor, owners: Tensor, margin: float, negatives: Negatives, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The triplet losses that average over negatives: image-to-text, text-to-image, and their gradient (I,T).

    Overwrites the positives in `scores` (I,T). The hinges of `block` positives at a time are in memory.
    """
    own_T = _take_positives(scores, owners)
    every_T = torch.arange(len(owners), device=owners.device)
    captions_I = own_T.new_zeros(len(scores)).index_add_(0, owners, torch.ones_like(own_T))
    i2t_negatives_T, t2i_negatives_T = len(owners) - captions_I[owners], torch.full_like(own_T, len(scores) - 1)
    i2t, slope_IT, i2t_own_T = _mean_hinge(scores, owners, own_T, i2t_negatives_T, margin, negatives, block)
    t2i, slope_TI, t2i_own_T = _mean_hinge(scores.T, every_T, own_T, t2i_negatives_T, margin, negatives, block)
    slope_IT.add_(slope_TI.T).index_put_((owners, every_T), i2t_own_T + t2i_own_T, accumulate=True)
    return i2t, t2i, slope_IT


def _mean_hinge(
    scores_QG: Tensor,
    query_P: Tensor,
    own_P: Tensor,
    negatives_P: Tensor,
    margin: float,
    negatives: Negatives,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction, for positives that score `own_P` and whose queries have `negatives_P` negatives; its derivatives
    by the negatives' scores (Q,G) and by `own_P`."""
    share_P = 1 / (negatives_P.clamp(min=1) * len(own_P)) if negatives == "all" else torch.ones_like(own_P)
    slope_QG, own_slope_P = torch.zeros_like(scores_QG), torch.zeros_like(own_P)
    total, count = own_P.new_zeros(()), own_P.new_zeros((), dtype=torch.int64)
    blocks = (torch.split(x, block) for x in (query_P, own_P, share_P, own_slope_P))
    for query, own, share, own_slope in zip(*blocks, strict=True):
        hinge_PG = scores_QG[query].sub_(own[:, None]).add_(margin).relu_()
        sloping_PG = _slopes(hinge_PG)
        count += sloping_PG.sum()
        if negatives == "semi_hard":
            sloping_PG &= ~(hinge_PG > margin)
            hinge_PG.clamp_(max=margin)
        total += hinge_PG.sum(1) @ share
        slope_PG = sloping_PG * share[:, None]
        slope_QG.index_add_(0, query, slope_PG)
        own_slope.sub_(slope_PG.sum(1))
    divisor = torch.ones_like(total) if negatives == "all" else count.clamp(min=1)
    return total / divisor, slope_QG.div_(divisor), own_slope_P.div_(divisor)


def _take_positives(scores_IT: Tensor, owners_T: Tensor) -> Tensor:
    """The positives' scores (T,), in whose place -inf is left: a positive is nobody's negative, its hinge is 0."""
    positive = owners_T, torch.arange(len(owners_T), device=owners_T.device)
    own_T = scores_IT[positive]
    scores_IT.index_put_(positive, torch.full_like(own_T, -torch.inf))
    return own_T


def _slopes(hinge: Tensor) -> Tensor:
    """Where a hinge has a slope; also where it is no number, which shall show in the gradient."""
    return ~(hinge <= 0)


def diversity_with_gradient(slots: Tensor, kind: Diversity = "exponential") -> tuple[Tensor, Tensor]:
    """`diversity`, or `gram_diversity`, and its gradient (B,K,D), from the slots' Gram matrices."""
    gram_BKK = slots @ slots.transpose(1, 2)
    inverse_BK = gram_BKK.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-12).reciprocal()
    inverse_BKK = inverse_BK[:, :, None] * inverse_BK[:, None]
    cosine_BKK = gram_BKK * inverse_BKK
    closeness, slope_BKK = (_exponential if kind == "exponential" else _gram)(cosine_BKK)
    # d(cosine) / d(slot i) is the direction of slot j, less its part along slot i.
    mixture_BKK = slope_BKK * inverse_BKK
    mixture_BKK.diagonal(dim1=1, dim2=2).copy_(-(slope_BKK * cosine_BKK).sum(2) * inverse_BK.square())
    return closeness, mixture_BKK @ slots


def _exponential(cosine_BKK: Tensor) -> tuple[Tensor, Tensor]:
    """`diversity` of the cosines, and twice its derivative by each, since each stands there in both orders: for unit
    vectors, exp(-2 * squared distance) is exp(4 * cosine - 4)."""
    samples, size, _ = cosine_BKK.shape
    pairs = max(samples * size * (size - 1) // 2, 1)
    close_BKK = torch.exp(4 * cosine_BKK - 4)
    close_BKK.diagonal(dim1=1, dim2=2).zero_()
    return close_BKK.sum() / (2 * pairs), (4 / pairs) * close_BKK


def _gram(cosine_BKK: Tensor) -> tuple[Tensor, Tensor]:
    """`gram_diversity` of the cosines, and twice its derivative by each, as in `_exponential`."""
    samples, size, _ = cosine_BKK.shape
    others_BKK = cosine_BKK.clone()
    others_BKK.diagonal(dim1=1, dim2=2).zero_()
    norm_B = torch.linalg.vector_norm(others_BKK, dim=(1, 2))
    share = 1 / (max(samples, 1) * size**2)
    # Where all cosines are zero, the derivative is too; a norm that is no number stays none.
    slope_BKK = others_BKK * (2 * share / norm_B.masked_fill(norm_B == 0, 1))[:, None, None]
    return norm_B.sum() * share, slope_BKK
