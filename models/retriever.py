"""The two-sided model: images and captions to sets of embeddings that can be compared.

Shape suffixes: B images, T captions, N words or regions, K slots, D width of an embedding, H height, W width.
"""

from typing import Literal

from torch import Tensor, nn

from setwise.models import official
from setwise.models.batch_norm import has_batch_statistics
from setwise.models.config import (
    FragmentsConfig,
    GaussianConfig,
    GPOConfig,
    ModelConfig,
    PIENetConfig,
    PooledConfig,
    Positions,
    RegionsConfig,
    SetPredictionConfig,
    WordSpaceConfig,
)
from setwise.models.cross_attention import Fragments
from setwise.models.devise import WordSpace
from setwise.models.dropout import name_layers
from setwise.models.gpo import GPO
from setwise.models.image_encoders import Grid, image_encoder
from setwise.models.micro_batches import in_micro_batches
from setwise.models.pie_net import PIENet
from setwise.models.pooled import Pooled
from setwise.models.probabilistic import Gaussian
from setwise.models.set_prediction import SetEmbedding, SetPrediction
from setwise.models.text_encoders import text_encoder


def set_prediction(config: ModelConfig, side: Literal["image", "text"]) -> nn.Module:
    """What makes sets of one side's features, without weights. Whichever it is, it is called with Features, keys or
    None, and whether attention is wanted, and returns a SetEmbedding."""
    width, image = config.embed_size, side == "image"
    local_dim = config.image_local_dim if image else config.text_local_dim
    match config.set_prediction:
        case SetPredictionConfig() as slots:
            is_grid = image and not isinstance(config.image_encoder, RegionsConfig)
            positions = slots.image_positions if image else slots.text_positions
            return SetPrediction(slots, width, local_dim, positions, config.padding, grid=is_grid)
        case PIENetConfig() as pie_net:
            return PIENet(pie_net, width, local_dim)
        case GPOConfig() as gpo:
            return GPO(gpo, width, local_dim)
        case PooledConfig():
            return Pooled()
        case GaussianConfig() as gaussian:
            return Gaussian(gaussian, width, local_dim, side)
        case WordSpaceConfig():
            return WordSpace(width, side)
        case FragmentsConfig() as fragments:
            return Fragments(fragments, width, local_dim, side)


class SetRetriever(nn.Module):
    """An encoder and a set prediction for images, another pair for captions.

    Token ids run from 0, which is padding, to `vocabulary_size` - 1. What is random in training (dropout, region drop,
    sampled slots) is a function of each sample's key, if keys are given.
    """

    def __init__(self, config: ModelConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.config = config
        width = config.embed_size
        self.image_encoder = image_encoder(config.image_encoder, width)
        self.text_encoder = text_encoder(config.text_encoder, vocabulary_size, width)
        self.image_sets, self.text_sets = set_prediction(config, "image"), set_prediction(config, "text")
        name_layers(self)

    def encode_images(
        self,
        images: Tensor,
        lengths: Tensor | None = None,
        keys: Tensor | None = None,
        *,
        keep_attention: bool = False,
    ) -> SetEmbedding:
        """Sets of images (B,K,D), in evaluation each independent of its batch.

        Args:
            images: what the configured encoder reads: (B,3,H,W) uint8 or normalised floats, the last feature map
                (B,C,h,w) of a backbone, or region features (B,N,F).
            lengths: (B,) how many of the N regions are real; None where all are.
            keys: (B,) int64, one a sample, which decide what is drawn at random in training.
            keep_attention: also return the attention of each iteration.
        """
        embedding: SetEmbedding = self.image_sets(self.image_encoder(images, lengths, keys), keys, keep_attention)
        return embedding

    def encode_texts(
        self, tokens: Tensor, lengths: Tensor, keys: Tensor | None = None, *, keep_attention: bool = False
    ) -> SetEmbedding:
        """Sets of captions (T,K,D): `tokens` (T,N) padded with 0, `lengths` (T,) at least 1, `keys` as for images.

        A set depends neither on its batch nor on padding. BERT also takes its last hidden state (T,N,width), as floats.
        """
        embedding: SetEmbedding = self.text_sets(self.text_encoder(tokens, lengths, keys), keys, keep_attention)
        return embedding

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        lengths: Tensor,
        image_lengths: Tensor | None = None,
        image_keys: Tensor | None = None,
        text_keys: Tensor | None = None,
        micro_batch: int | None = None,
    ) -> tuple[SetEmbedding, SetEmbedding]:
        """Both sides of a batch in one call, through which alone DistributedDataParallel sees the gradients.

        With `micro_batch`, that many images (and their share of the captions) are encoded at a time: less memory, the
        same numbers. What is normalised by statistics of the batch is left whole, which the head of region and grid
        features is: it and the set prediction behind it then run on the whole batch, and only the backbone in pieces.
        """
        if micro_batch is None:
            return (
                self.encode_images(images, image_lengths, image_keys),
                self.encode_texts(tokens, lengths, text_keys),
            )
        if not has_batch_statistics(self.image_encoder):
            image_sets = in_micro_batches(self.encode_images, micro_batch, images, image_lengths, image_keys)
        else:
            if isinstance(self.image_encoder, Grid):
                if has_batch_statistics(self.image_encoder.backbone):
                    raise ValueError("a backbone that normalises by its batch cannot run in micro-batches: freeze it")
                images = in_micro_batches(self.image_encoder.backbone, micro_batch, images)
            image_sets = self.encode_images(images, image_lengths, image_keys)
        captions = -(-micro_batch * len(tokens) // max(len(images), 1))
        return image_sets, in_micro_batches(self.encode_texts, max(captions, 1), tokens, lengths, text_keys)


def from_official(
    state_dict: dict[str, Tensor],
    padding: Literal["official", "exact"] = "official",
    *,
    heads: int = 4,
    iterations: int | None = None,
    num_slots: int | None = None,
    image_positions: Positions = "none",
    text_positions: Positions = "sine",
    text_pooling: Literal["last", "cls", "max"] | None = None,
) -> SetRetriever:
    """The model whose weights the authors' code saved, in evaluation mode; its embeddings are theirs.

    Sizes and options are read off the tensors. What leaves no trace in them is given: `heads` (published: 4 of 512,
    with BERT 8 of 256), `iterations` where the blocks that share weights were saved once (published: 4), `num_slots`
    where slots are sampled, position codes, and what the captions' global feature is (published: the GRU's last state;
    for BERT the maximum). Weights of one side alone give a model of that side. Sampled slots are drawn anew in each of
    the authors' evaluations, and are always the same here, so sets that begin with them agree in distribution alone.

    Args:
        state_dict: names as in the authors' code, with or without `module.` in front; of one side alone also without
            `img_enc.` or `txt_enc.`.
        padding: "official" lets padding take attention, as the weights were trained; "exact" does not.

    Raises:
        ValueError: a weight is missing, has another shape than the others say, or belongs to an option that is not
            available here.
    """
    weights = official.two_sided(state_dict)
    config = official.configuration(
        weights,
        padding=padding,
        heads=heads,
        iterations=iterations,
        num_slots=num_slots,
        image_positions=image_positions,
        text_positions=text_positions,
        text_pooling=text_pooling,
    )
    model = SetRetriever(config, official.vocabulary_size(weights))
    official.load(model, weights)
    return model.eval()
