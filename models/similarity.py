"""Similarities between sets of embeddings (Kim, Kim, Kwak, CVPR 2023).

Shape suffixes: I images, T captions, K elements of an image's set, J elements of a caption's set, D width.
Every function takes unit vectors, but where it says otherwise, and computes in float32 or better, whatever the inputs
or autocast say: at alpha = 64 half precision would keep fewer than two digits of alpha * cosine.
"""

import torch
from torch import Tensor, nn

from setwise.models.config import SimilarityConfig


def _cosines(image_sets_IKD: Tensor, text_sets_TJD: Tensor) -> Tensor:
    """All cosines as (I,K,T,J): the layout in which one matrix product leaves them, so nothing is transposed."""
    dtype = torch.promote_types(torch.promote_types(image_sets_IKD.dtype, text_sets_TJD.dtype), torch.float32)
    with torch.autocast(image_sets_IKD.device.type, enabled=False):
        flat = image_sets_IKD.to(dtype).flatten(0, 1) @ text_sets_TJD.to(dtype).flatten(0, 1).T
    return flat.view(*image_sets_IKD.shape[:2], *text_sets_TJD.shape[:2])


def smooth_chamfer(image_sets: Tensor, text_sets: Tensor, alpha: float) -> Tensor:
    """Smooth-Chamfer similarity of the paper: log-sum-exp over the other set, mean over one's
    own, averaged over the two directions.

    (I,K,D) and (T,J,D) unit vectors to (I,T). By logsumexp, so it is finite for any alpha > 0. Scores may exceed 1:
    a set of K equal vectors compared with itself gives 1 + log(K) / alpha.
    """
    return _smooth_chamfer(_cosines(image_sets, text_sets), alpha)


def chamfer(image_sets: Tensor, text_sets: Tensor) -> Tensor:
    """Chamfer similarity: each element's best cosine in the other set, averaged. (I,K,D), (T,J,D) to (I,T)."""
    return _chamfer(_cosines(image_sets, text_sets))


def mil(image_sets: Tensor, text_sets: Tensor) -> Tensor:
    """Multiple-instance similarity (PVSE): the best cosine of any pair. (I,K,D), (T,J,D) to (I,T)."""
    return _mil(_cosines(image_sets, text_sets))


def match_probability(image_sets: Tensor, text_sets: Tensor, scale: Tensor | float, shift: Tensor | float) -> Tensor:
    """Match probability (PCME, of cosines): mean over pairs of sigmoid(scale * cosine + shift).

    (I,K,D), (T,J,D) to (I,T), in 0..1.
    """
    return _match_probability(_cosines(image_sets, text_sets), scale, shift)


def mean_cosine(image_sets: Tensor, text_sets: Tensor) -> Tensor:
    """Mean of all cosines; of sets of one element the cosine. (I,K,D), (T,J,D) to (I,T)."""
    return _cosines(image_sets, text_sets).mean((1, 3))


def sampled_match_probability(
    image_samples: Tensor, text_samples: Tensor, scale: Tensor | float, shift: Tensor | float
) -> Tensor:
    """Match probability of probabilistic embeddings (PCME, Chun et al., CVPR 2021), by samples of them: mean over pairs
    of sigmoid(-scale * distance + shift), the distance being Euclidean.

    (I,K,D), (T,J,D), vectors of any length, to (I,T), in 0..1. At distance 0, where it has none, the gradient is 0.
    """
    dot_IKTJ = _cosines(image_samples, text_samples)
    image_IK, text_TJ = (x.to(dot_IKTJ.dtype).square().sum(-1) for x in (image_samples, text_samples))
    squared_IKTJ = image_IK[:, :, None, None] + text_TJ - 2 * dot_IKTJ
    return _sampled_match_probability(_root(squared_IKTJ), scale, shift)


def _smooth_chamfer(cosine_IKTJ: Tensor, alpha: float) -> Tensor:
    logits_IKTJ = alpha * cosine_IKTJ
    image_to_text_IT = logits_IKTJ.logsumexp(3).mean(1)
    text_to_image_IT = logits_IKTJ.logsumexp(1).mean(2)
    return (image_to_text_IT + text_to_image_IT) / (2 * alpha)


def _chamfer(cosine_IKTJ: Tensor) -> Tensor:
    return (cosine_IKTJ.amax(3).mean(1) + cosine_IKTJ.amax(1).mean(2)) / 2


def _mil(cosine_IKTJ: Tensor) -> Tensor:
    return cosine_IKTJ.amax((1, 3))


def _match_probability(cosine_IKTJ: Tensor, scale: Tensor | float, shift: Tensor | float) -> Tensor:
    return torch.sigmoid(scale * cosine_IKTJ + shift).mean((1, 3))


def _sampled_match_probability(distance_IKTJ: Tensor, scale: Tensor | float, shift: Tensor | float) -> Tensor:
    return torch.sigmoid(shift - scale * distance_IKTJ).mean((1, 3))


def _root(squared: Tensor) -> Tensor:
    """Square root, of rounding noise below zero too. At zero its slope is 0: infinity would make gradients NaN."""
    return squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()


class Similarity(nn.Module):
    """The similarity a configuration names: the one place that picks it, for training and evaluation alike.

    A module because the two match probabilities learn their scale and shift; the others have no parameters. That of
    cosines starts at 1 and 0, where DivE's code starts too (and on a GPU stays, unregistered as its parameters are);
    that of distances at 15 and 15, as in PCME's.
    """

    def __init__(self, config: SimilarityConfig) -> None:
        super().__init__()
        self.config = config
        if start := {"match_probability": (1.0, 0.0), "pcme": (15.0, 15.0)}.get(config.kind):
            self.scale, self.shift = (nn.Parameter(torch.tensor(value)) for value in start)

    def forward(self, image_sets: Tensor, text_sets: Tensor) -> Tensor:
        """(I,K,D) and (T,J,D), unit vectors unless the kind is `pcme`, to scores (I,T)."""
        if self.config.kind == "pcme":
            return sampled_match_probability(image_sets, text_sets, self.scale, self.shift)
        return self.of_cosines(_cosines(image_sets, text_sets))

    def of_cosines(self, cosines: Tensor) -> Tensor:
        """All cosines (I,K,T,J) of unit vectors to scores (I,T), in the precision of the cosines."""
        match self.config.kind:
            case "smooth_chamfer":
                return _smooth_chamfer(cosines, self.config.alpha)
            case "chamfer":
                return _chamfer(cosines)
            case "mil":
                return _mil(cosines)
            case "match_probability":
                return _match_probability(cosines, self.scale, self.shift)
            case "cosine":
                return cosines.mean((1, 3))
            case "pcme":
                return self.of_distances(_root(2 - 2 * cosines))

    def of_distances(self, distances: Tensor) -> Tensor:
        """All distances (I,K,T,J) to scores (I,T): of the kind `pcme` alone, for vectors of any length."""
        return _sampled_match_probability(distances, self.scale, self.shift)
