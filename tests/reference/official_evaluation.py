"""Evaluation as the authors' published code does it, query after query: what the engine's ranks must agree with, and
what its time is compared with.

Written from a description of their code. Each image meets all captions, each caption all images; of every query all
scores are sorted, and the rank is where the right item is found. So each pair is computed twice, and each product is
of one set against all others.

Shape suffixes: I images, T captions, K and J elements of a set, G items of a gallery, D width.
"""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from setwise.models.loss_config import SimilarityConfig

Ranks = NDArray[np.int64]


def image_ranks(
    images_IKD: Tensor, texts_TJD: Tensor, owners: NDArray[np.int64], config: SimilarityConfig, queries: Iterable[int]
) -> Ranks:
    """For each queried image the rank, from 0, of the best of its captions."""
    ranks = []
    for image in queries:
        scores_G = scores(images_IKD[image : image + 1], texts_TJD, config)[0].numpy()
        descending = np.argsort(scores_G)[::-1]
        best = min(np.where(descending == caption)[0][0] for caption in np.flatnonzero(owners == image))
        ranks.append(best)
    return np.array(ranks)


def caption_ranks(
    images_IKD: Tensor, texts_TJD: Tensor, owners: NDArray[np.int64], config: SimilarityConfig, queries: Iterable[int]
) -> Ranks:
    """For each caption of the queried images the rank, from 0, of its image. An image's captions meet the gallery
    together, and are sorted one by one."""
    ranks = []
    for image in queries:
        captions = np.flatnonzero(owners == image)
        scores_QG = scores(texts_TJD[captions], images_IKD, config).numpy()
        for scores_G in scores_QG:
            descending = np.argsort(scores_G)[::-1]
            ranks.append(np.where(descending == image)[0][0])
    return np.array(ranks)


def scores(queries_QKD: Tensor, gallery_GJD: Tensor, config: SimilarityConfig) -> Tensor:
    """(Q,G), by pools over the matrix (1,N,M) of all cosines; each direction of a similarity from the start."""
    K, J = queries_QKD.shape[1], gallery_GJD.shape[1]
    cosine_1NM = (queries_QKD.flatten(0, 1) @ gallery_GJD.flatten(0, 1).T)[None]
    match config.kind:
        case "smooth_chamfer":
            forth_1NG = torch.log(J * F.avg_pool2d(torch.exp(config.alpha * cosine_1NM), (1, J)))
            back_1QM = torch.log(K * F.avg_pool2d(torch.exp(config.alpha * cosine_1NM), (K, 1)))
            both_1QG = F.avg_pool2d(forth_1NG, (K, 1)) + F.avg_pool2d(back_1QM, (1, J))
            return both_1QG[0] / (2 * config.alpha)
        case "chamfer":
            forth_1NG, back_1QM = F.max_pool2d(cosine_1NM, (1, J)), F.max_pool2d(cosine_1NM, (K, 1))
            return (F.avg_pool2d(forth_1NG, (K, 1)) + F.avg_pool2d(back_1QM, (1, J)))[0] / 2
        case "mil":
            return F.max_pool2d(cosine_1NM, (K, J))[0]
        case "match_probability":  # with the scale and shift that it starts with
            return F.avg_pool2d(torch.sigmoid(cosine_1NM), (K, J))[0]
        case "cosine":
            return F.avg_pool2d(cosine_1NM, (K, J))[0]
        case "pcme":
            raise ValueError("PCME's scores are not of cosines: see sampled_match_probabilities")


def sampled_match_probabilities(query_KD: Tensor, gallery_GJD: Tensor, scale: float, shift: float) -> Tensor:
    """(G,) of one query, PCME's evaluation: its samples, once for each item of the gallery, against that item's, by the
    differences of all pairs."""
    copies_GKD = query_KD.repeat(len(gallery_GJD), 1, 1)
    difference_GKJD = copies_GKD[:, :, None] - gallery_GJD[:, None]
    distance_GKJ = difference_GKJD.square().sum(-1).sqrt()
    return torch.sigmoid(-scale * distance_GKJ + shift).mean((1, 2))
