"""The two-sided model: images and captions to sets of embeddings that can be compared.

Shape suffixes: B samples, N words, K slots, D width of an embedding, H height, W width.
"""

from torch import Tensor, nn

from setwise.models.config import ModelConfig
from setwise.models.image_encoders import ConvNet
from setwise.models.set_prediction import SetEmbedding, SetPrediction
from setwise.models.text_encoders import BiGRU


class SetRetriever(nn.Module):
    """An encoder and a set prediction for images, another pair for captions.

    Token ids run from 0, which is padding, to `vocabulary_size` - 1. Raises ValueError where a position code does not
    fit the width of the features.
    """

    def __init__(self, config: ModelConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.config = config
        prediction = config.set_prediction
        self.image_encoder = ConvNet(config.image_encoder, config.embed_size)
        self.text_encoder = BiGRU(config.text_encoder, vocabulary_size, config.embed_size)
        self.image_sets = SetPrediction(
            prediction, config.embed_size, self.image_encoder.local_dim, prediction.image_positions
        )
        self.text_sets = SetPrediction(
            prediction, config.embed_size, self.text_encoder.local_dim, prediction.text_positions
        )

    def encode_images(
        self, images: Tensor, lengths: Tensor | None = None, *, keep_attention: bool = False
    ) -> SetEmbedding:
        """Sets of `images` (B,3,H,W), uint8 or normalised floats. An image's set does not depend on its batch."""
        embedding: SetEmbedding = self.image_sets(self.image_encoder(images, lengths), keep_attention)
        return embedding

    def encode_texts(self, tokens: Tensor, lengths: Tensor, *, keep_attention: bool = False) -> SetEmbedding:
        """Sets of captions: `tokens` (B,N) padded with 0, `lengths` (B,). A set does not depend on batch or padding."""
        embedding: SetEmbedding = self.text_sets(self.text_encoder(tokens, lengths), keep_attention)
        return embedding

    def forward(self, images: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[SetEmbedding, SetEmbedding]:
        """Both sides of a batch in one call, through which alone DistributedDataParallel sees the gradients."""
        return self.encode_images(images), self.encode_texts(tokens, lengths)
