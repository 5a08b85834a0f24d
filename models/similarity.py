"""Similarities between sets of embeddings (Kim, Kim, Kwak, CVPR 2023).

Shape suffixes: I images, T captions, K elements of an image's set, J elements of a caption's set, D width.
Every function takes unit vectors, but where it says otherwise, and computes in float32 or better, whatever the inputs
or autocast say: at alpha = 64 half precision would keep fewer than two digits of alpha * cosine.
"""

import torch
from torch import Tensor, nn

from setwise.models.loss_config import SimilarityConfig


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
    return _sampled_match_probability(_root(_squared_distances(image_samples, text_samples)), scale, shift)


def closed_form_match(image_sets: Tensor, text_sets: Tensor, scale: Tensor | float, shift: Tensor | float) -> Tensor:
    """Logit of the match of two distributions (PCME++, Chun, ICLR 2024): mean over pairs of shift - scale * squared
    distance, which is Euclidean.

    (I,K,D), (T,J,D), vectors of any length, to (I,T), of any sign. Of the vectors that probabilistic.py makes of a mean
    and a variance, the squared distance is the closed-form sampled distance of the two distributions.
    """
    return (shift - scale * _squared_distances(image_sets, text_sets)).mean((1, 3))


def _squared_distances(images_IKD: Tensor, texts_TJD: Tensor) -> Tensor:
    """(I,K,T,J), by their dot products: rounding may leave one below zero."""
    dot_IKTJ = _cosines(images_IKD, texts_TJD)
    image_IK, text_TJ = (x.to(dot_IKTJ.dtype).square().sum(-1) for x in (images_IKD, texts_TJD))
    return image_IK[:, :, None, None] + text_TJ - 2 * dot_IKTJ


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

    A module because the two match probabilities and the closed form learn their scale and shift; the others have no
    parameters. That of cosines starts at 1 and 0, where DivE's code starts too (and on a GPU stays, unregistered as its
    parameters are); that of distances at 15 and 15, as in PCME's, and the closed form at 5 and 5, as in PCME++'s.
    """

    def __init__(self, config: SimilarityConfig) -> None:
        super().__init__()
        self.config = config
        self.of_dot_products = config.kind != "cross_attention"
        """Whether a pair's score is a function of the dot products of its vectors, and of their lengths."""
        if start := {"match_probability": (1.0, 0.0), "pcme": (15.0, 15.0), "csd": (5.0, 5.0)}.get(config.kind):
            self.scale, self.shift = (nn.Parameter(torch.tensor(value)) for value in start)

    def forward(self, image_sets: Tensor, text_sets: Tensor) -> Tensor:
        """(I,K,D) and (T,J,D), unit vectors unless the kind is `pcme` or `csd`, to scores (I,T)."""
        match self.config.kind:
            case "pcme":
                return sampled_match_probability(image_sets, text_sets, self.scale, self.shift)
            case "csd":
                return closed_form_match(image_sets, text_sets, self.scale, self.shift)
            case _:
                return self.of_cosines(_cosines(image_sets, text_sets))

    def pair_logits(self, image_sets: Tensor, text_sets: Tensor) -> Tensor:
        """(I,K,D) and (T,J,D), vectors of any length, to (I,K,T,J): the argument of the sigmoid whose mean over K and J
        is the score. Of the kind `pcme` alone."""
        return self.shift - self.scale * _root(_squared_distances(image_sets, text_sets))

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
            case "pcme" | "csd":
                return self.of_squared_distances(2 - 2 * cosines)
            case kind:
                raise ValueError(f"the similarity '{kind}' is no function of cosines")

    def of_squared_distances(self, squared: Tensor) -> Tensor:
        """All squared distances (I,K,T,J) to scores (I,T): of the kinds `pcme` and `csd`, for vectors of any length."""
        if self.config.kind == "csd":
            return (self.shift - self.scale * squared).mean((1, 3))
        return _sampled_match_probability(_root(squared), self.scale, self.shift)
