"""Similarities between sets of embeddings (Kim, Kim, Kwak, CVPR 2023).

Shape suffixes: I images, T captions, K elements of an image's set, J elements of a caption's set, D width.
Every function takes unit vectors and computes in float32 or better, whatever the inputs or autocast say: at alpha = 64
half precision would keep fewer than two digits of alpha * cosine.
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


class Similarity(nn.Module):
    """The similarity a configuration names: the one place that picks it, for training and evaluation alike.

    A module because match probability learns its scale and shift; the others have no parameters. They start at 1 and 0,
    where the authors' code starts too (and on a GPU stays, unregistered as its parameters are).
    """

    def __init__(self, config: SimilarityConfig) -> None:
        super().__init__()
        self.config = config
        if config.kind == "match_probability":
            self.scale = nn.Parameter(torch.ones(()))
            self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, image_sets: Tensor, text_sets: Tensor) -> Tensor:
        """(I,K,D) and (T,J,D) unit vectors to scores (I,T)."""
        return self.of_cosines(_cosines(image_sets, text_sets))

    def of_cosines(self, cosines: Tensor) -> Tensor:
        """All cosines (I,K,T,J) to scores (I,T), in the precision of the cosines."""
        match self.config.kind:
            case "smooth_chamfer":
                return _smooth_chamfer(cosines, self.config.alpha)
            case "chamfer":
                return _chamfer(cosines)
            case "mil":
                return _mil(cosines)
            case "match_probability":
                return _match_probability(cosines, self.scale, self.shift)
