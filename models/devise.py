"""DeViSE: one linear map takes an image into the space of word vectors (Frome et al., "DeViSE: A Deep Visual-Semantic
Embedding Model", NeurIPS 2013).

There the text is a label and its vector that of one word; here it is a caption, and the mean of its words' vectors, as
those do who compare DeViSE with systems for captions.

Shape suffixes: B samples, N words of a caption, V words of the vocabulary, W width of a word vector and of an
embedding, I images, T captions.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setwise.models.loss_config import HingeRankConfig
from setwise.models.losses import check_owners
from setwise.models.set_prediction import Features, SetEmbedding, padding_after


class WordMean(nn.Module):
    """A caption as the mean of its words' vectors, at length 1. The vectors do not learn, but are saved as weights are.

    They are random at first; `set_vectors` puts in others.
    """

    vectors: Tensor
    """(V,W): unit vectors; zeros where a word has none. Of padding, word 0, the one of captions without any vector."""

    def __init__(self, vocabulary_size: int, embed_size: int) -> None:
        super().__init__()
        self.register_buffer("vectors", F.normalize(torch.randn(vocabulary_size, embed_size), dim=-1))

    def set_vectors(self, vectors: Tensor) -> None:
        """Take `vectors` (V,W) of any length; a row of zeros says that a word has none, and row 0 is not read.

        Raises:
            ValueError: their shape is another, a number is not finite, or no word has a vector.
        """
        if vectors.shape != self.vectors.shape:
            raise ValueError(f"word vectors of shape {tuple(vectors.shape)}, expected {tuple(self.vectors.shape)}")
        if not vectors.isfinite().all():
            raise ValueError("a word vector is not finite")
        unit_VW = _unit(vectors.double())
        unit_VW[0] = 0
        if not unit_VW.any():
            raise ValueError("no word has a vector: every caption would be the same")
        mean_W = unit_VW.sum(0)
        # Should the vectors cancel out, any direction is as good as another.
        unit_VW[0] = _unit(mean_W if mean_W.any() else torch.eye(len(mean_W)).double()[0])
        self.vectors.copy_(unit_VW)

    def forward(self, tokens: Tensor, lengths: Tensor, keys: Tensor | None = None) -> Features:
        """`tokens` (B,N) integers, `lengths` (B,). Nothing is random, so `keys` decide nothing.

        Local features are the words' vectors, and the global one (B,W) their mean at length 1, added up in float64.
        """
        is_padding_BN = padding_after(lengths, tokens.shape[1], tokens.device)
        words_BNW = self.vectors[tokens].masked_fill(is_padding_BN[..., None], 0)
        total_BW = words_BNW.double().sum(1)
        nothing_B1 = total_BW.abs().amax(1, keepdim=True) < torch.finfo(self.vectors.dtype).eps
        pooled_BW = torch.where(nothing_B1, self.vectors[0].double(), _unit(total_BW)).to(words_BNW.dtype)
        return Features(words_BNW, pooled_BW, is_padding_BN)


class WordSpace(nn.Module):
    """Where images and captions meet: an image's global feature goes through one linear map without bias, a caption's
    is there already.

    `sets` are unit vectors, as rankings compare directions; `slots` are the same before they are normalised, which the
    loss reads.
    """

    def __init__(self, embed_size: int, side: Literal["image", "text"]) -> None:
        super().__init__()
        self.map = nn.Linear(embed_size, embed_size, bias=False) if side == "image" else nn.Identity()

    def forward(self, features: Features, keys: Tensor | None = None, keep_attention: bool = False) -> SetEmbedding:
        """Sets and slots (B,1,W) of the global feature (B,W). There is no attention, and nothing is random."""
        slots_B1W = self.map(features.pooled)[:, None]
        return SetEmbedding(F.normalize(slots_B1W, dim=-1), slots_B1W)


def hinge_rank(images: SetEmbedding, texts: SetEmbedding, owners: Tensor, config: HingeRankConfig) -> dict[str, Tensor]:
    """The paper's loss: for an image with the mapped vector v and its caption's unit vector t, the sum over the others'
    captions of max(0, margin - t . v + other . v). v is of any length. Mean over captions, as an image has several.

    The paper cuts the sum off after the first term above zero, in random order, which trains faster one sample at a
    time; of a batch all terms are at hand.

    Args:
        images: slots (I,1,W); texts: sets (T,1,W) unit vectors.
        owners: (T,) int64: the index of the image that each caption belongs to.

    Returns:
        `total` alone: an image against captions is the only direction. Float32 or better, whatever autocast says.

    Raises:
        ValueError: `owners` is not one index for each caption, or a side has nothing.
    """
    check_owners(owners, len(images.slots), len(texts.sets))
    image_IW, text_TW = images.slots[:, 0], texts.sets[:, 0]
    dtype = torch.promote_types(torch.promote_types(image_IW.dtype, text_TW.dtype), torch.float32)
    with torch.autocast(owners.device.type, enabled=False):
        scores_IT = image_IW.to(dtype) @ text_TW.to(dtype).T
        scores_TT = scores_IT[owners]  # of each caption's image
        hinge_TT = F.relu(config.margin + scores_TT - scores_TT.diagonal()[:, None])
        loss = hinge_TT.masked_fill(owners[:, None] == owners, 0).sum() / len(owners)
    return {"total": loss}


def _unit(vectors: Tensor) -> Tensor:
    """At length 1, along the last dimension; zeros stay."""
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / length.clamp(min=torch.finfo(vectors.dtype).tiny)
