"""Settings of models that compare nothing: they teach an image encoder (VirTex), or find objects (Slot Attention).

Nothing here imports torch, as in config.py.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from setwise.models.config import ImageEncoderConfig, ModelSettings, check_heads


class CaptionerConfig(ModelSettings):
    """An image encoder that learns by writing captions in both directions (VirTex, Desai and Johnson, CVPR 2021)."""

    kind: Literal["captioner"]
    image_encoder: ImageEncoderConfig
    width: int = Field(1024, ge=8, le=8192, description="H, of the textual head; the image encoder's embed_size too")
    layers: int = Field(1, ge=1, le=24, description="L, of each of the two decoders")
    heads: int = Field(16, ge=1, le=128, description="attention heads; published: H / 64")
    ff_width: int = Field(4096, ge=1, le=65536, description="width inside the feed-forward layers; published: 4 H")
    dropout: float = Field(0.1, ge=0, lt=1, description="share dropped in training")
    max_words: int = Field(30, ge=3, le=512, description="of a caption, its marks of start and end included")

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        check_heads(self.width, self.heads)
        return self

    @property
    def title(self) -> str:
        return f"{self.image_encoder.title}_captioner"


class SlotAutoencoderConfig(ModelSettings):
    """Slot Attention's object discovery (Locatello et al., NeurIPS 2020): slots read an image, a decoder draws each."""

    kind: Literal["slot_autoencoder"]
    num_slots: int = Field(7, ge=1, le=64, description="K, objects and background")
    iterations: int = Field(3, ge=1, le=64, description="T, how often the slots read the image")
    slot_dim: int = Field(64, ge=4, le=4096, description="width of a slot")
    channels: int = Field(64, ge=4, le=4096, description="width of the convolutions of encoder and decoder")
    mlp_hidden: int = Field(128, ge=1, le=65536, description="width inside the slots' MLP")
    encoder_stride: Literal[1, 2, 4, 8] = Field(1, description="pixels of a side that become one input of the slots")
    broadcast_size: int = Field(8, ge=1, le=64, description="side of the map that a slot is spread over to be decoded")

    @property
    def title(self) -> str:
        return "slot_autoencoder"

    def doublings(self, image_size: int) -> int:
        """How often the decoder doubles the side of its map. Raises ValueError where that does not give the image's."""
        doublings = (image_size // self.broadcast_size).bit_length() - 1
        if image_size % self.encoder_stride or self.broadcast_size << max(doublings, 0) != image_size:
            raise ValueError(
                f"an image of {image_size} pixels a side needs a model.broadcast_size that becomes {image_size} by "
                f"doubling, and a model.encoder_stride that divides it; got {self.broadcast_size} and "
                f"{self.encoder_stride}"
            )
        return doublings
