"""Context-aware attention between the fragments of an image and of a caption (CAAN: Zhang, Lei, Zhang and Li,
"Context-Aware Attention Network for Image-Text Retrieval", CVPR 2020).

Its authors published no code, and the paper was not at hand: this follows summaries of it, and what those leave open is
said where it is decided. A pair's score depends on attention between the two, so nothing of it can be computed for one
side beforehand: that is what its accuracy costs.

Shape suffixes: B samples, N fragments of an image, J words, I images, T captions, X width of a local feature, D width
of a fragment, A width of the attention. Inside of a block one item of the one side, with O fragments, is compared with
P of the other, with M fragments each.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from setwise.models import losses
from setwise.models.config import FragmentsConfig
from setwise.models.loss_config import Negatives, SimilarityConfig, TripletConfig
from setwise.models.set_prediction import Features, SetEmbedding
from setwise.models.similarity import Similarity

SHARE = 4
"""The attention's hidden width is this part of the fragments' width: a guess, for the price of a pair depends on it."""
PAIRS = 512
"""So many are computed at once: those of an image with so many captions, or of a caption with so many images."""
EPSILON = 1e-6
"""No vector of affinities is taken for shorter, so that one of rounding noise alone is not blown up."""


class Fragments(nn.Module):
    """Regions or cells, or words, as unit vectors; what is padding is zero, which no unit vector is.

    Captions have always `max_words` fragments, so that those of all batches fit together; longer ones are cut. Images
    have as many as the encoder makes. Where the local features have another width than an embedding, one linear layer
    makes it fit. The global feature is not read.
    """

    def __init__(
        self, config: FragmentsConfig, embed_size: int, input_dim: int, side: Literal["image", "text"]
    ) -> None:
        super().__init__()
        self.num = config.max_words if side == "text" else None
        self.project = nn.Linear(input_dim, embed_size) if input_dim != embed_size else nn.Identity()

    def forward(self, features: Features, keys: Tensor | None = None, keep_attention: bool = False) -> SetEmbedding:
        """Fragments (B,N,D), or (B,max_words,D), of local features (B,N,X). There is no attention to be kept yet, and
        nothing is random: `keys` decide nothing."""
        local_BNX, is_padding_BN = features.local, features.is_padding
        if self.num is not None and local_BNX.shape[1] > self.num:
            local_BNX = local_BNX[:, : self.num]
            is_padding_BN = None if is_padding_BN is None else is_padding_BN[:, : self.num]
        if is_padding_BN is None:
            sets_BND = F.normalize(self.project(local_BNX), dim=-1)
        else:
            # Ahead of the layer too: what is not a number would otherwise reach its gradient.
            clean_BNX = local_BNX.masked_fill(is_padding_BN[..., None], 0)
            sets_BND = F.normalize(self.project(clean_BNX), dim=-1).masked_fill(is_padding_BN[..., None], 0)
        if self.num is not None:
            sets_BND = F.pad(sets_BND, (0, 0, 0, self.num - sets_BND.shape[1]))
        return SetEmbedding(sets_BND, sets_BND)


class CrossAttention(Similarity):
    """The score of every pair of an image and a caption, by attention of each to the other and to itself.

    For an image's fragments V (N,D) and a caption's U (J,D), rows being unit vectors:

    - affinity: H = tanh(V K U^T), (N,J), with a learned matrix K.
    - between the two: softmax of H over words is how a region attends to words, over regions how a word attends to
      regions.
    - within each ("semantics-based"): two regions belong together as far as their rows of H, their affinities to all
      words, point the same way; their cosines, H H^T of rows of length 1, go through a softmax over regions. Words
      likewise by H^T H.
    - each fragment gathers both, and a softmax of w . tanh(within V Q + between U Q') weighs it; so for words.
    - score: the inner product of the weighted sums of V and of U, between -1 and 1.

    The summaries agree on the affinity, on both attentions and on the inner product. That rows of affinities are cut to
    length 1 and cosines go through a softmax, and the form of the weight, are ours. K starts as the identity, with
    which an affinity is a cosine, as fragments of the two sides are of one space.

    Rows of zeros are padding and take no part. Always in the precision of the weights, whatever autocast says.
    """

    def __init__(self, config: SimilarityConfig, embed_size: int) -> None:
        super().__init__(config)
        width = max(embed_size // SHARE, 1)
        self.affinity = nn.Parameter(torch.eye(embed_size))
        self.image_within, self.image_between, self.text_within, self.text_between = (
            nn.Linear(embed_size, width, bias=False) for _ in range(4)
        )
        self.image_weight, self.text_weight = (nn.Linear(width, 1, bias=False) for _ in range(2))

    def forward(self, image_sets: Tensor, text_sets: Tensor) -> Tensor:
        """Fragments (I,N,D) and (T,J,D) to scores (I,T), all pairs.

        Of the side with fewer items one after another is compared with PAIRS of the other at a time: so few steps are
        enough for a query against a gallery, whichever side it is of, and memory is bounded; with gradients too, for
        which each such block is computed again. What else is computed beside a pair changes the rounding of its score.
        """
        with torch.autocast(image_sets.device.type, enabled=False):
            images_IND, texts_TJD = image_sets.to(self.affinity.dtype), text_sets.to(self.affinity.dtype)
            of_images = (images_IND, *(_values(layer, images_IND) for layer in (self.image_within, self.text_between)))
            of_texts = (texts_TJD, *(_values(layer, texts_TJD) for layer in (self.text_within, self.image_between)))
            if len(images_IND) <= len(texts_TJD):
                block = partial(self._scores, self.image_weight, self.text_weight)
                return _by_one(block, of_images, (*of_texts, texts_TJD @ self.affinity.T))
            block = partial(self._scores, self.text_weight, self.image_weight)
            return _by_one(block, of_texts, (*of_images, images_IND @ self.affinity)).T

    def _scores(
        self,
        weight_of_one: nn.Linear,
        weight_of_many: nn.Linear,
        one_OD: Tensor,
        one_within_OA: Tensor,
        many_between_OA: Tensor,
        many_PMD: Tensor,
        many_within_PMA: Tensor,
        one_between_PMA: Tensor,
        keyed_PMD: Tensor,
    ) -> Tensor:
        """(P,) scores of an image and P captions, or of a caption and P images. What is the one's is a plain matrix,
        and its products are large. `..._between` is what a side gathers of the other's fragments.

        All logits lie between -1 and 1, so a softmax needs no maximum taken off; and H's exponentials serve both ways.
        """
        with torch.autocast(one_OD.device.type, enabled=False):  # this runs once more outside of `forward`
            affinity_PMO = torch.tanh(keyed_PMD @ one_OD.T)
            between_PMO = affinity_PMO.exp()
            alike_POO = _cosines(affinity_PMO.transpose(1, 2)).exp()
            alike_PMM = _cosines(affinity_PMO).exp()

            gathered_POA = _attended(alike_POO, one_within_OA)
            gathered_POA = gathered_POA + _attended(between_PMO.transpose(1, 2), one_between_PMA)
            weight_PO = _shares(weight_of_one(torch.tanh(gathered_POA))[..., 0], one_within_OA[..., -1] > 0)

            gathered_PMA = _attended(alike_PMM, many_within_PMA) + _attended(between_PMO, many_between_OA)
            weight_PM = _shares(weight_of_many(torch.tanh(gathered_PMA))[..., 0], many_within_PMA[..., -1] > 0)

            one_PD, many_PD = weight_PO @ one_OD, (weight_PM[:, None] @ many_PMD)[:, 0]
            return (one_PD * many_PD).sum(-1)


def _by_one(block: Callable[..., Tensor], of_ones: Sequence[Tensor], of_many: Sequence[Tensor]) -> Tensor:
    """The scores of each item of the one side (rows) with all of the other, PAIRS at a time."""
    parts = list(zip(*(torch.split(x, PAIRS) for x in of_many), strict=True))
    rows = [torch.cat([_kept_small(block, *one, *part) for part in parts]) for one in zip(*of_ones, strict=True)]
    return torch.stack(rows) if rows else of_many[0].new_zeros(0, len(of_many[0]))


def _kept_small(block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """A block, of whose insides nothing is kept for the backward pass."""
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
        return block(*inputs)
    scores_P: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return scores_P


def _values(layer: nn.Module, sets_BND: Tensor) -> Tensor:
    """(B,N,A+1): what a fragment is attended for, and a last 1. Padding has zeros alone, so that in a product with
    exponentials it adds nothing to the sum, nor to what the sum is to be divided by."""
    return torch.cat((layer(sets_BND), sets_BND.any(-1, keepdim=True).to(sets_BND.dtype)), -1)


def _attended(exponentials: Tensor, values: Tensor) -> Tensor:
    """(P,X,A): the mean of the values (P,Y,A+1) or (Y,A+1), weighted by (P,X,Y); 0 where all are padding."""
    summed = exponentials @ values
    return summed[..., :-1] / summed[..., -1:].clamp(min=torch.finfo(summed.dtype).tiny)


def _cosines(affinities: Tensor) -> Tensor:
    """(P,X,X): how far the rows of (P,X,Y) point the same way; a row of zeros, which padding has, points nowhere."""
    rows = affinities * affinities.square().sum(-1, keepdim=True).clamp(min=EPSILON**2).rsqrt()
    return rows @ rows.transpose(1, 2)


def _shares(logits: Tensor, takes_part: Tensor) -> Tensor:
    """Softmax of (P,X) over what takes part (bool, broadcast); the rest is 0, everything if nothing takes part."""
    lowest = torch.finfo(logits.dtype).min
    return logits.masked_fill(~takes_part, lowest).softmax(-1).masked_fill(~takes_part, 0)


def triplet_of_scores(scores: Tensor, owners: Tensor, config: TripletConfig, negatives: Negatives) -> dict[str, Tensor]:
    """The triplet loss of `losses.py` of a matrix of scores (I,T), by direction, and `total`, their sum.

    Args:
        owners: (T,) int64: the index of the image that each caption belongs to.

    Raises:
        ValueError: `owners` is not one index for each caption, or a side has nothing.
    """
    losses.check_owners(owners, *scores.shape)
    i2t, t2i = losses.triplet_of_owners(scores, owners, config.margin, negatives)
    return {"i2t": i2t, "t2i": t2i, "total": i2t + t2i}
