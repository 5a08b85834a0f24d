"""The loss of a batch in the authors' formulation, differentiated by autograd: what batch_loss.py must agree with, and
what its time and memory are compared with.

Written from a description of their code. Every intermediate is a whole matrix: cosines, their exponentials and pools,
one hinge for each positive pair and negative, three full kernels; and diversity goes sample by sample.

Shape suffixes: I images, T captions, K and J elements of a set, D width; N = I * K, M = T * J; Q queries, G gallery, P
positive pairs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from setwise.models.loss_config import Negatives, SimilarityConfig, TripletConfig

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def official_loss(
    image_sets: Tensor,
    text_sets: Tensor,
    image_slots: Tensor,
    text_slots: Tensor,
    owners: Tensor,
    similarity: SimilarityConfig,
    config: TripletConfig,
    negatives: Negatives,
    scale: Tensor | float = 1.0,
    shift: Tensor | float = 0.0,
) -> Parts:
    """(i2t, t2i, mmd, diversity, total) of sets and slots (I,K,D), (T,J,D) and `owners` (T,); all in their dtype."""
    scores_IT = scores(image_sets, text_sets, similarity, scale, shift)
    positive_IT = owners == torch.arange(len(image_sets))[:, None]
    i2t = triplet(scores_IT, positive_IT, config.margin, negatives)
    t2i = triplet(scores_IT.T, positive_IT.T, config.margin, negatives)
    x_ND, y_MD = image_sets.flatten(0, 1), text_sets.flatten(0, 1)
    zero = i2t.new_zeros(())
    mmd = zero
    if config.mmd_weight:
        gamma = config.mmd_gamma
        mmd = mean_kernel(x_ND, x_ND, gamma) - 2 * mean_kernel(x_ND, y_MD, gamma) + mean_kernel(y_MD, y_MD, gamma)
    diversity = closeness(image_slots) + closeness(text_slots) if config.diversity_weight else zero
    total = i2t + t2i + config.mmd_weight * mmd + config.diversity_weight * diversity
    return i2t, t2i, mmd, diversity, total


def scores(
    image_sets_IKD: Tensor,
    text_sets_TJD: Tensor,
    config: SimilarityConfig,
    scale: Tensor | float,
    shift: Tensor | float,
) -> Tensor:
    """Pools with kernels of the size of a set over the matrix (1,N,M) of all cosines."""
    K, J = image_sets_IKD.shape[1], text_sets_TJD.shape[1]
    cosine_1NM = (image_sets_IKD.flatten(0, 1) @ text_sets_TJD.flatten(0, 1).T)[None]
    match config.kind:
        case "smooth_chamfer":
            exponential_1NM = torch.exp(config.alpha * cosine_1NM)
            forth_1NT = torch.log(J * F.avg_pool2d(exponential_1NM, (1, J)))
            back_1IM = torch.log(K * F.avg_pool2d(exponential_1NM, (K, 1)))
            both_1IT = F.avg_pool2d(forth_1NT, (K, 1)) + F.avg_pool2d(back_1IM, (1, J))
            return both_1IT[0] / (2 * config.alpha)
        case "chamfer":
            forth_1NT, back_1IM = F.max_pool2d(cosine_1NM, (1, J)), F.max_pool2d(cosine_1NM, (K, 1))
            return (F.avg_pool2d(forth_1NT, (K, 1)) + F.avg_pool2d(back_1IM, (1, J)))[0] / 2
        case "mil":
            return F.max_pool2d(cosine_1NM, (K, J))[0]
        case "match_probability":
            return F.avg_pool2d(torch.sigmoid(scale * cosine_1NM + shift), (K, J))[0]


def triplet(scores_QG: Tensor, positive_QG: Tensor, margin: float, negatives: Negatives) -> Tensor:
    """One direction, from the hinges of every positive pair against every negative of its query."""
    query_P, gallery_P = positive_QG.nonzero(as_tuple=True)
    negative_PG = ~positive_QG[query_P]
    hinge_PG = (margin + scores_QG[query_P] - scores_QG[query_P, gallery_P][:, None]) * negative_PG
    if negatives == "semi_hard":
        cut_PG = hinge_PG.clamp(0, margin)
        return cut_PG.sum() / torch.count_nonzero(cut_PG).clamp(min=1)
    cost_PG = hinge_PG.clamp(min=0)
    if negatives == "violating":
        return cost_PG.sum() / torch.count_nonzero(cost_PG).clamp(min=1)
    if negatives == "hardest":
        return cost_PG.max(1).values.mean()
    return (cost_PG.sum(1) / negative_PG.sum(1).clamp(min=1)).mean()


def mean_kernel(x_ND: Tensor, y_MD: Tensor, gamma: float) -> Tensor:
    distance_NM = torch.cdist(x_ND, y_MD)
    if x_ND is y_MD and x_ND.dtype == torch.float64:
        # For exact comparisons: the authors' code leaves the root of a rounding error where a row meets itself.
        distance_NM = distance_NM.masked_fill(torch.eye(len(x_ND), dtype=torch.bool), 0.0)
    return torch.exp(-gamma * distance_NM).mean()


def closeness(slots_BKD: Tensor) -> Tensor:
    """Mean over samples of the mean over pairs of their slots."""
    pairs = slots_BKD.shape[1] * (slots_BKD.shape[1] - 1) // 2
    if not pairs:
        return slots_BKD.new_zeros(())
    return torch.stack(
        [torch.exp(-2 * F.pdist(sample).square()).sum() / pairs for sample in F.normalize(slots_BKD, dim=-1)]
    ).mean()
