"""The recipe: everything that decides what a training computes, as one settings tree.

A recipe is named data_imageEncoder_textEncoder[_variant]. This file imports no torch, so that a mistake in a recipe
is reported at once. Where and how fast it runs (workers, devices, folders) is decided here only as far as it may
change the result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from setwise.models.config import GridConfig, LossConfig, ModelConfig, SimilarityConfig
from setwise.platform import config
from setwise.platform.config import Settings

FOLDER = Path(__file__).parent / "recipes"
LABEL = r"^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$"
"""What Ray takes as the value of a label."""


class DataConfig(Settings):
    """The data set, as `setwise data prepare` made it."""

    name: str = Field("digits", description="name of a prepared data set")
    image_size: int = Field(64, ge=16, le=1024, description="side of the square that encoders see, in pixels")
    crop_scale: tuple[float, float] | None = Field(
        None, description="in training, cut out a rectangle of this share of the area, at random; none: the middle"
    )
    flip: bool = Field(False, description="in training, mirror every other image")
    eval_view: Literal["center", "squash"] = Field(
        "center", description="in evaluation, the square in the middle, or the whole image pressed into one"
    )
    eval_shorter_side: int | None = Field(
        None, ge=16, le=2048, description="shorter side, in pixels, that the square of eval_view=center is cut from"
    )
    word_drop: float = Field(
        0, ge=0, lt=1, description="in training, share of words masked (half), replaced (a tenth) or deleted (the rest)"
    )

    @model_validator(mode="after")
    def _views_exist(self) -> Self:
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale goes from a smaller to a larger share of the area, not {self.crop_scale}")
        if (self.eval_shorter_side or self.image_size) < self.image_size:
            raise ValueError(f"eval_shorter_side {self.eval_shorter_side} is less than image_size {self.image_size}")
        return self


class OptimizerConfig(Settings):
    """AdamW with a schedule that is a pure function of the step (method: section 4 of the recipes)."""

    lr: float = Field(1e-3, gt=0, le=1, description="peak learning rate")
    weight_decay: float = Field(1e-4, ge=0, le=1, description="of every weight, apart from the gradient (AdamW)")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from zero")
    schedule: Literal["cosine", "constant", "step"] = Field(
        "cosine", description="after warm-up: cosine to zero, constant, or times step_factor every step_epochs"
    )
    step_epochs: int = Field(20, ge=1, description="epochs between two steps of schedule=step")
    step_factor: float = Field(0.1, gt=0, le=1, description="of the learning rate at each step of schedule=step")
    backbone_scale: float = Field(1, ge=0, description="learning rate of the image backbone, in multiples of lr")
    image_scale: float = Field(1, ge=0, description="of everything else on the image side")
    text_scale: float = Field(1, ge=0, description="of the text encoder")
    text_sets_scale: float = Field(1, ge=0, description="of the text side's set prediction")
    frozen_backbone_epochs: int = Field(0, ge=0, description="epochs at the start in which the backbone stands still")
    clip_norm: float = Field(2.0, gt=0, description="largest global norm of the gradient")


class TrainConfig(Settings):
    """Length, batch and randomness of a training."""

    epochs: int = Field(10, ge=1, le=10_000, description="how often every image is seen")
    batch_size: int = Field(100, ge=2, description="images in a batch, over all workers, each with all its captions")
    eval_batch_size: int = Field(250, ge=1, description="images in a batch when embedding; changes no result")
    drop_last: bool = Field(True, description="leave out an epoch's last batch if it is not whole")
    workers: int = Field(1, ge=1, description="processes of Ray Train; the batch is divided among them")
    min_workers: int | None = Field(
        None, ge=1, description="train with as few where there is no room for `workers`, and with more once there is"
    )
    accelerators: tuple[Annotated[str, Field(pattern=LABEL)], ...] = Field(
        (), description="kinds of GPU to train on, as Ray's label ray.io/accelerator-type has them; none: any"
    )
    micro_batch: int | None = Field(
        None, ge=1, description="images a worker encodes at a time; less memory, more time, the same numbers"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of encoders and set prediction; the loss and the weights are always fp32"
    )
    compile: bool = Field(False, description="compile the set prediction with torch.compile; the first step takes long")
    threads: int = Field(1, ge=1, description="CPU threads of a worker")
    loader_threads: int = Field(
        0, ge=0, le=256, description="threads of a worker that make the next batches ahead; 0: the loop makes its own"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="decides initial weights, order and all that is random")
    keep_checkpoints: int = Field(2, ge=2, description="newest checkpoints kept beside the best one")
    checkpoint_steps: int | None = Field(
        500, ge=1, description="steps within an epoch that a crash costs at most; none: as many as an epoch has"
    )

    @model_validator(mode="after")
    def _everyone_has_work(self) -> Self:
        if self.batch_size < self.workers:
            raise ValueError(f"batch_size {self.batch_size} leaves some of {self.workers} workers without an image")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}, the most there are")
        return self


class Recipe(Settings):
    """One training, completely."""

    data: DataConfig = DataConfig()
    model: ModelConfig
    similarity: SimilarityConfig = SimilarityConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()

    @property
    def title(self) -> str:
        """data_imageEncoder_textEncoder, the way recipes are named."""
        data = self.data.name.partition("_")[0]
        return f"{data}_{self.model.image_encoder.title}_{self.model.text_encoder.title}"

    @model_validator(mode="after")
    def _there_is_a_backbone_to_freeze(self) -> Self:
        if self.optimizer.frozen_backbone_epochs and not isinstance(self.model.image_encoder, GridConfig):
            raise ValueError(
                f"optimizer.frozen_backbone_epochs: an image encoder of kind '{self.model.image_encoder.kind}' has no "
                "backbone that could stand still; kind 'grid' has one"
            )
        return self

    @model_validator(mode="after")
    def _what_is_frozen_was_trained(self) -> Self:
        encoder = self.model.image_encoder
        if isinstance(encoder, GridConfig) and encoder.frozen_batch_norm and encoder.weights is None:
            raise ValueError(
                "model.image_encoder.frozen_batch_norm keeps the statistics that came with the weights, and no weights "
                "are named: give model.image_encoder.weights, or set frozen_batch_norm=false"
            )
        return self

    @model_validator(mode="after")
    def _micro_batches_are_exact(self) -> Self:
        encoder = self.model.image_encoder
        if self.train.micro_batch is not None and isinstance(encoder, GridConfig) and not encoder.frozen_batch_norm:
            raise ValueError(
                "train.micro_batch would change the result: the backbone's batch normalisation takes its statistics "
                "over the whole batch. Set model.image_encoder.frozen_batch_norm=true, or train.micro_batch=null"
            )
        return self


def names() -> list[str]:
    """Recipes that come with the package."""
    return config.names_in(FOLDER)


def find(name: str) -> Path:
    """The file of a recipe, by path or by name; ConfigError if there is none."""
    return config.find_file("recipe", name, FOLDER)


def load(name: str, overrides: list[str] | None = None) -> Recipe:
    """A recipe by name or path, with `section.setting=value` overrides laid over it."""
    return config.build(Recipe, config.load_layers(find(name), find), overrides or [])
