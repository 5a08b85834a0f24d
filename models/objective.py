"""The loss of a batch and its similarity, whichever a recipe names: the one place that picks them."""

from torch import Tensor

from setwise.models import devise, probabilistic
from setwise.models.batch_loss import batch_loss
from setwise.models.cross_attention import CrossAttention, triplet_of_scores
from setwise.models.loss_config import (
    HingeRankConfig,
    LossConfig,
    MatchingConfig,
    SimilarityConfig,
    SoftContrastiveConfig,
    TripletConfig,
)
from setwise.models.set_prediction import SetEmbedding
from setwise.models.similarity import Similarity


def similarity_of(config: SimilarityConfig, embed_size: int) -> Similarity:
    """The similarity that `config` describes, of embeddings of that width."""
    return CrossAttention(config, embed_size) if config.kind == "cross_attention" else Similarity(config)


def loss_of_batch(
    images: SetEmbedding, texts: SetEmbedding, owners: Tensor, similarity: Similarity, config: LossConfig, epoch: float
) -> dict[str, Tensor]:
    """Named parts of the loss of one batch, scalars before weighting; `total` is what is minimised, and it alone need
    have a gradient.

    Args:
        images, texts: as the two sides of a SetRetriever make them, I images and T captions.
        owners: (T,) int64: the index of the image that each caption belongs to.
        epoch: how many epochs (fractions count) the training is old.
    """
    match config:
        case TripletConfig() if similarity.of_dot_products:
            return batch_loss(images, texts, owners, similarity, config, config.negatives_at(epoch))._asdict()
        case TripletConfig():
            return triplet_of_scores(similarity(images.sets, texts.sets), owners, config, config.negatives_at(epoch))
        case SoftContrastiveConfig():
            return probabilistic.soft_contrastive(images, texts, owners, similarity, config)
        case MatchingConfig():
            return probabilistic.matching(images, texts, owners, similarity, config)
        case HingeRankConfig():
            return devise.hinge_rank(images, texts, owners, config)
