"""Settings of the model, its similarity and its losses.

Nothing here imports torch, so that a recipe can be checked in well under two seconds. Defaults are the published
values of the authors' script (COCO, region features) wherever it has one.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positions = Literal["none", "sine"]
Negatives = Literal["all", "hardest", "violating"]


class _Settings(BaseModel):
    # protected_namespaces: pydantic would otherwise reserve every name that begins with `model_`.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ConvNetConfig(_Settings):
    """A small convolutional encoder, trained from scratch."""

    kind: Literal["cnn"]
    channels: tuple[Annotated[int, Field(ge=8, multiple_of=8)], ...] = Field(
        (24, 48, 64, 96), min_length=2, description="width of each layer; the last is the width of the local features"
    )


class BiGRUConfig(_Settings):
    """Word embeddings, trained from scratch, read in both directions."""

    kind: Literal["bigru"]
    word_dim: int = Field(300, ge=2, le=8192, multiple_of=2, description="width of a word embedding")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of embeddings and of GRU states dropped in training")
    local_features: Literal["words", "states"] = Field(
        "words", description="what the slots read: the word embeddings, or the GRU state at each word"
    )


class SetPredictionConfig(_Settings):
    """Slots that read an image or a caption and become its set of embeddings."""

    num_slots: int = Field(4, ge=1, le=256, description="K, the size of the set")
    iterations: int = Field(4, ge=1, le=64, description="T, how often the slots read the input; weights are shared")
    heads: int = Field(4, ge=1, le=64, description="attention heads")
    head_dim: int = Field(512, ge=1, le=8192, description="width of one head")
    ff_mult: int = Field(4, ge=1, le=64, description="hidden width of the slots' MLP, in multiples of embed_size")
    dropout: float = Field(0.1, ge=0, lt=1, description="share dropped after attention and inside the slots' MLP")
    image_positions: Positions = Field("none", description="position code of the keys of image features")
    text_positions: Positions = Field("sine", description="position code of the keys of words")


class ModelConfig(_Settings):
    """Two encoders and the set prediction that both feed (its settings are shared, its weights are not)."""

    embed_size: int = Field(1024, ge=2, le=65536, description="D, the width of an embedding")
    image_encoder: ConvNetConfig
    text_encoder: BiGRUConfig
    set_prediction: SetPredictionConfig = SetPredictionConfig()

    @model_validator(mode="after")
    def _position_codes_fit(self) -> Self:
        local_dim = (
            self.text_encoder.word_dim if self.text_encoder.local_features == "words" else self.embed_size
        )  # the code is added to the local features, and is made of pairs of a sine and a cosine
        if self.set_prediction.text_positions == "sine" and local_dim % 2:
            raise ValueError(f"text_positions='sine' needs text features of even width, got {local_dim}")
        return self


class SimilarityConfig(_Settings):
    """How two sets are compared."""

    kind: Literal["smooth_chamfer", "chamfer", "mil", "match_probability"] = "smooth_chamfer"
    alpha: float = Field(16, gt=0, le=1024, description="sharpness of smooth_chamfer; infinity would be chamfer")


class LossConfig(_Settings):
    """Triplet loss over the batch, plus two regularisers of the sets."""

    margin: float = Field(0.2, ge=0, le=2, description="by how much a positive must beat a negative")
    mmd_weight: float = Field(0.01, ge=0, description="weight of the discrepancy between image and text embeddings")
    mmd_gamma: float = Field(0.5, gt=0, description="of the kernel exp(-gamma * distance), distance not squared")
    diversity_weight: float = Field(0.01, ge=0, description="weight of the closeness of slots of one set")
    negatives: Negatives = Field(
        "hardest", description="negatives in the triplet loss: the hardest, all, or those that violate the margin"
    )
    all_negatives_epochs: float = Field(
        0, ge=0, description="the triplet loss averages over all negatives this long, whatever `negatives` says"
    )

    def negatives_at(self, epoch: float) -> Negatives:
        """Which negatives the triplet loss takes `epoch` epochs (fractions count) into training."""
        return "all" if epoch < self.all_negatives_epochs else self.negatives
