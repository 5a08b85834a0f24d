"""Settings of the model.

Nothing here imports torch, so that a recipe can be checked in well under two seconds. Defaults are the published
values of the authors' script (COCO, region features) wherever it has one.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positions = Literal["none", "sine", "learned"]
Pooling = Literal["max", "mean"]
Projection = Literal["mlp", "raw_mlp", "linear", "none"]


class ModelSettings(BaseModel):
    """Base of every settings class here: immutable, and a name it does not know is an error."""

    # protected_namespaces: pydantic would otherwise reserve every name that begins with `model_`.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ConvNetConfig(ModelSettings):
    """A small convolutional encoder, trained from scratch."""

    kind: Literal["cnn"]
    channels: tuple[Annotated[int, Field(ge=8, multiple_of=8)], ...] = Field(
        (24, 48, 64, 96), min_length=2, description="width of each layer; the last is the width of the local features"
    )
    cell: int = Field(2, ge=1, le=4, description="side of the square of positions whose maximum becomes one cell")
    cell_drop: float = Field(0, ge=0, lt=1, description="share of cells left out in training")

    @property
    def title(self) -> str:
        """The encoder's part of a recipe's name."""
        return self.kind


class ImageHeadConfig(ModelSettings):
    """How local features of a fixed width become what the slots read, and the global feature."""

    projection: Projection = Field(
        "mlp",
        description="of local features: linear; linear with a residual MLP behind it (mlp) or, as in VSE-infinity, "
        "beside it (raw_mlp); or none (as they come)",
    )
    global_feature: Literal["projected", "linear"] = Field(
        "projected", description="pool the projected local features, or pool the raw ones and project the result"
    )
    pooling: Pooling = Field("max", description="over regions or cells, to the global feature")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of projected features dropped in training")

    @model_validator(mode="after")
    def _pooled_has_a_width(self) -> Self:
        if self.projection == "none" and self.global_feature == "projected":
            raise ValueError("projection='none' leaves nothing projected to pool: set global_feature='linear'")
        return self


class RegionsConfig(ModelSettings):
    """Region features of the bottom-up-attention detector ("BUTD"), computed beforehand."""

    kind: Literal["butd"]
    feature_dim: int = Field(2048, ge=1, le=65536, description="width of a region feature")
    region_drop: float = Field(0.2, ge=0, lt=1, description="share of regions left out in training")
    head: ImageHeadConfig = ImageHeadConfig()

    @property
    def title(self) -> str:
        return self.kind


class GridConfig(ModelSettings):
    """The last feature map of a torchvision network, one local feature a cell."""

    kind: Literal["grid"]
    architecture: Literal["resnet18", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d"] = (
        Field("resnet152", description="torchvision's name of the network")
    )
    weights: str | None = Field(
        None, description="to start from: a name of torchvision's weights, a file, or an https address; none: random"
    )
    frozen_batch_norm: bool = Field(
        True, description="normalise by the statistics that came with the weights, not by the batch's"
    )
    cell_drop: float = Field(0, ge=0, lt=1, description="share of cells left out in training")
    head: ImageHeadConfig = ImageHeadConfig()

    @property
    def title(self) -> str:
        return self.architecture.partition("_")[0]


class BiGRUConfig(ModelSettings):
    """Word embeddings read in both directions."""

    kind: Literal["bigru"]
    word_dim: int = Field(300, ge=2, le=8192, multiple_of=2, description="width of a word embedding")
    word_vectors: str | None = Field(
        None, description="GloVe text file whose vectors the embeddings start from; none: random"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="share of embeddings and of GRU states dropped in training")
    local_features: Literal["words", "states"] = Field(
        "words", description="what the slots read: the word embeddings, or the GRU state at each word"
    )
    directions: Literal["mean", "concatenated"] = Field(
        "mean", description="two states of embed_size averaged, or two of half that width side by side"
    )
    pooling: Literal["last", "max"] = Field("last", description="global feature: the final states, or the maximum")

    @property
    def title(self) -> str:
        return self.kind


def check_heads(width: int, heads: int) -> None:
    """Raises ValueError if attention of that width has no room for so many heads."""
    if width % heads:
        raise ValueError(f"width {width} cannot be divided among {heads} heads")


class BertConfig(ModelSettings):
    """BERT; its sizes are those of `bert-base-uncased`."""

    kind: Literal["bert"]
    weights: str | None = Field(
        None, description="to start from: a folder, or a name on the Hugging Face hub; none: random"
    )
    layers: int = Field(12, ge=1, le=96, description="of self-attention and feed-forward")
    width: int = Field(768, ge=2, le=8192, description="of a hidden state")
    heads: int = Field(12, ge=1, le=128, description="attention heads of a layer")
    ff_width: int = Field(3072, ge=1, le=65536, description="width inside the feed-forward layers")
    max_tokens: int = Field(512, ge=64, le=8192, description="positions that the weights have a code for")
    dropout: float = Field(0.1, ge=0, lt=1, description="share dropped in training, of hidden states and of attention")
    pooling: Literal["cls", "max"] = Field("max", description="global feature: the first token's, or the maximum")

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        check_heads(self.width, self.heads)
        return self

    @property
    def title(self) -> str:
        return self.kind


class WordMeanConfig(ModelSettings):
    """The mean of word vectors that do not learn (DeViSE's label vectors, for captions)."""

    kind: Literal["word_mean"]
    word_vectors: str = Field(
        "captions", description="text file of vectors in GloVe's form, or 'captions': made from the training captions"
    )

    @property
    def title(self) -> str:
        return "words"


ImageEncoderConfig = Annotated[ConvNetConfig | RegionsConfig | GridConfig, Field(discriminator="kind")]
TextEncoderConfig = Annotated[BiGRUConfig | BertConfig | WordMeanConfig, Field(discriminator="kind")]


def kind_if_none_is_named(values: Any, section: str, kind: str) -> Any:
    """What was written before a section had kinds means the first of them."""
    if isinstance(values, dict) and isinstance(inner := values.get(section), dict) and "kind" not in inner:
        return {**values, section: {"kind": kind, **inner}}
    return values


class SetPredictionConfig(ModelSettings):
    """Slots that read an image or a caption and become its set of embeddings."""

    kind: Literal["slots"] = "slots"
    num_slots: int = Field(4, ge=1, le=256, description="K, the size of the set")
    iterations: int = Field(4, ge=1, le=64, description="T, how often the slots read the input; weights are shared")
    heads: int = Field(4, ge=1, le=64, description="attention heads")
    head_dim: int = Field(512, ge=1, le=8192, description="width of one head")
    ff_mult: int = Field(4, ge=1, le=64, description="hidden width of the slots' MLP, in multiples of embed_size")
    dropout: float = Field(0.1, ge=0, lt=1, description="share dropped after attention and inside the slots' MLP")
    slots: Literal["learned", "sampled"] = Field(
        "learned", description="K vectors of their own, or draws from one learned normal distribution (Slot Attention)"
    )
    image_positions: Positions = Field("none", description="position code of the keys of image features")
    text_positions: Positions = Field("sine", description="position code of the keys of words")


class PIENetConfig(ModelSettings):
    """PIE-Net of PVSE (Song and Soleymani, CVPR 2019): the global feature plus each of K attentions over local ones."""

    kind: Literal["pie_net"]
    num_slots: int = Field(2, ge=1, le=256, description="K, the size of the set")
    dropout: float = Field(0, ge=0, lt=1, description="share of each attended vector dropped in training")


class GPOConfig(ModelSettings):
    """Generalised pooling operator of VSE-infinity (Chen et al., CVPR 2021): sorted features are weighted."""

    kind: Literal["gpo"]
    position_dim: int = Field(32, ge=2, le=1024, multiple_of=2, description="width of the code of a position")
    hidden: int = Field(32, ge=1, le=1024, description="width of the GRU that turns positions into weights")
    temperature: float = Field(0.1, gt=0, description="of the softmax over positions")

    @property
    def num_slots(self) -> int:
        return 1


class PooledConfig(ModelSettings):
    """The global feature alone, as before sets (VSE++, Faghri et al., BMVC 2018)."""

    kind: Literal["pooled"]

    @property
    def num_slots(self) -> int:
        return 1


class GaussianConfig(ModelSettings):
    """A normal distribution for each item: PCME (Chun et al., CVPR 2021) and PCME++ (Chun, ICLR 2024)."""

    kind: Literal["gaussian"]
    pooling: Literal["pie_net", "gpo"] = Field("pie_net", description="of mean and variance: PCME's, or PCME++'s")
    samples: int = Field(
        7, ge=0, le=256, description="J, drawn of each item; 0: none, mean and variance are compared in closed form"
    )
    initial_log_sigma: float = Field(
        0, ge=-20, le=20, description="logarithm of the standard deviations that training begins with, about"
    )

    @property
    def num_slots(self) -> int:
        return max(self.samples, 1)


class WordSpaceConfig(ModelSettings):
    """One linear map of the image into the space of word vectors (DeViSE, Frome et al., NeurIPS 2013)."""

    kind: Literal["word_space"]

    @property
    def num_slots(self) -> int:
        return 1


class FragmentsConfig(ModelSettings):
    """No pooling: regions or cells, and words, as they are, to be compared by cross-attention."""

    kind: Literal["fragments"]
    max_words: int = Field(32, ge=1, le=512, description="words of a caption that take part; the rest is left out")

    @property
    def num_slots(self) -> int:
        return self.max_words


SetsConfig = Annotated[
    SetPredictionConfig | PIENetConfig | GPOConfig | PooledConfig | GaussianConfig | WordSpaceConfig | FragmentsConfig,
    Field(discriminator="kind"),
]


class ModelConfig(ModelSettings):
    """Two encoders and the set prediction that both feed (its settings are shared, its weights are not)."""

    kind: Literal["retriever"] = "retriever"
    embed_size: int = Field(1024, ge=2, le=65536, description="D, the width of an embedding")
    image_encoder: ImageEncoderConfig
    text_encoder: TextEncoderConfig
    set_prediction: SetsConfig = SetPredictionConfig()

    padding: Literal["exact", "official"] = Field(
        "exact",
        description="exact: padding has no influence; official: as in the authors' code, for weights trained with it",
    )

    @property
    def title(self) -> str:
        """The encoders' part of a recipe's name."""
        return f"{self.image_encoder.title}_{self.text_encoder.title}"

    @model_validator(mode="before")
    @classmethod
    def _slots_unless_named(cls, values: Any) -> Any:
        return kind_if_none_is_named(values, "set_prediction", "slots")

    @property
    def image_local_dim(self) -> int:
        """Width of the local features that the image's slots read."""
        encoder = self.image_encoder
        if isinstance(encoder, ConvNetConfig) or encoder.head.projection != "none":
            return self.embed_size
        if isinstance(encoder, RegionsConfig):
            return encoder.feature_dim
        return 512 if encoder.architecture == "resnet18" else 2048

    @property
    def text_local_dim(self) -> int:
        """Width of the local features that a caption's slots read."""
        words = isinstance(self.text_encoder, BiGRUConfig) and self.text_encoder.local_features == "words"
        return self.text_encoder.word_dim if words else self.embed_size  # type: ignore[union-attr]

    @model_validator(mode="after")
    def _widths_fit(self) -> Self:
        concatenated = isinstance(self.text_encoder, BiGRUConfig) and self.text_encoder.directions == "concatenated"
        if concatenated and self.embed_size % 2:
            raise ValueError(f"directions='concatenated' needs an even embed_size, got {self.embed_size}")
        return self

    @model_validator(mode="after")
    def _positions_fit(self) -> Self:
        prediction, grid = self.set_prediction, not isinstance(self.image_encoder, RegionsConfig)
        if not isinstance(prediction, SetPredictionConfig):
            return self
        if isinstance(self.image_encoder, RegionsConfig) and prediction.image_positions != "none":
            raise ValueError("regions come in no order: set set_prediction.image_positions='none'")
        if prediction.image_positions != "none" and self.image_local_dim % (4 if grid else 2):
            raise ValueError(
                f"image_positions='{prediction.image_positions}' needs image features of a width that four divides, "
                f"got {self.image_local_dim}"
            )
        if prediction.text_positions == "sine" and self.text_local_dim % 2:
            raise ValueError(f"text_positions='sine' needs text features of even width, got {self.text_local_dim}")
        return self

    @model_validator(mode="after")
    def _every_weight_learns(self) -> Self:
        """What is read by nobody would get no gradient, and workers would wait for it."""
        kind, text = self.set_prediction.kind, self.text_encoder
        head = None if isinstance(self.image_encoder, ConvNetConfig) else self.image_encoder.head
        by_gpo = isinstance(self.set_prediction, GaussianConfig) and self.set_prediction.pooling == "gpo"
        local, pooled = by_gpo or kind in ("gpo", "fragments"), kind in ("pooled", "word_space")
        if local and head is not None and (head.projection == "none" or head.global_feature == "linear"):
            raise ValueError(
                f"set_prediction.kind={kind} takes projected features and reads no global one: set the head's "
                "global_feature='projected'"
            )
        if local and isinstance(text, BiGRUConfig) and text.local_features == "words":
            raise ValueError(f"set_prediction.kind={kind} takes states: set text_encoder.local_features='states'")
        if pooled and head is not None and head.global_feature == "linear" and head.projection != "none":
            raise ValueError(
                f"set_prediction.kind={kind} reads the global feature alone: set the head's projection='none' or its "
                "global_feature='projected'"
            )
        return self

    @model_validator(mode="after")
    def _words_have_a_space(self) -> Self:
        words = isinstance(self.text_encoder, WordMeanConfig)
        if words != isinstance(self.set_prediction, WordSpaceConfig):
            raise ValueError(
                "text_encoder.kind=word_mean and set_prediction.kind=word_space go together: the image is mapped into "
                "the space of the word vectors"
            )
        return self
