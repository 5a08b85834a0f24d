"""The recipe: everything that decides what a training computes, as one settings tree.

A recipe is named data_imageEncoder_textEncoder[_variant]. This file imports no torch, so that a mistake in a recipe
is reported at once. Where and how fast it runs (workers, devices, folders) is decided here only as far as it may
change the result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from setwise.models.config import GaussianConfig, GridConfig, ModelConfig, kind_if_none_is_named
from setwise.models.loss_config import (
    HingeRankConfig,
    LossConfig,
    MatchingConfig,
    SimilarityConfig,
    SoftContrastiveConfig,
    TripletConfig,
)
from setwise.models.pretext_config import CaptionerConfig, SlotAutoencoderConfig
from setwise.platform import config
from setwise.platform.config import Settings
from setwise.platform.errors import ConfigError

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
    """The optimizer, with a schedule that is a pure function of the step (method: section 4 of the recipes), and of
    the validation metrics before it where it is `plateau`."""

    kind: Literal["adamw", "adam", "adamp", "sgd"] = Field("adamw", description="which optimizer")
    lr: float = Field(1e-3, gt=0, le=1, description="peak learning rate")
    weight_decay: float = Field(
        1e-4, ge=0, le=1, description="of every weight, apart from the gradient; with adam and sgd, as part of it"
    )
    amsgrad: bool = Field(False, description="of adam and adamw: divide by the largest second moment so far")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    lookahead_steps: int | None = Field(
        None, ge=1, description="updates after which slow weights follow (Lookahead); none: there are no slow weights"
    )
    lookahead_alpha: float = Field(0.5, gt=0, le=1, description="part of the way that slow weights go each time")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from zero")
    schedule: Literal["cosine", "constant", "step", "plateau"] = Field(
        "cosine",
        description="after warm-up: cosine to zero, constant, or times step_factor, every step_epochs or where the "
        "validation metric no longer gets better",
    )
    step_epochs: int = Field(20, ge=1, description="epochs between two steps of schedule=step")
    step_factor: float = Field(0.1, gt=0, le=1, description="of the rate, at each step of schedule=step or plateau")
    plateau_patience: int = Field(
        10, ge=0, description="epochs in a row without a better metric that schedule=plateau lets pass"
    )
    backbone_scale: float = Field(1, ge=0, description="learning rate of the image backbone, in multiples of lr")
    image_scale: float = Field(1, ge=0, description="of everything else on the image side")
    text_scale: float = Field(1, ge=0, description="of the text encoder")
    text_sets_scale: float = Field(1, ge=0, description="of the text side's set prediction")
    frozen_backbone_epochs: int = Field(0, ge=0, description="epochs at the start in which the backbone stands still")
    clip_norm: float = Field(2.0, gt=0, description="largest global norm of the gradient")

    @model_validator(mode="after")
    def _there_are_second_moments(self) -> Self:
        if self.amsgrad and self.kind not in ("adamw", "adam"):
            raise ValueError(f"amsgrad is of kind 'adamw' or 'adam', not of '{self.kind}'")
        return self

    @property
    def numbers_per_weight(self) -> int:
        """That the optimizer remembers."""
        moments = int(self.momentum > 0) if self.kind == "sgd" else 2
        return moments + self.amsgrad + (self.lookahead_steps is not None)


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


class PretrainingConfig(Settings):
    """A training that comes first, in a run of its own, and whose image encoder this one starts from (VirTex)."""

    recipe: str = Field(description="a recipe of kind captioner, with the same image encoder and the same data")
    epochs: int | None = Field(None, ge=1, le=10_000, description="instead of that recipe's own")


class Recipe(Settings):
    """One training, completely."""

    data: DataConfig = DataConfig()
    model: Annotated[ModelConfig | CaptionerConfig | SlotAutoencoderConfig, Field(discriminator="kind")]
    similarity: SimilarityConfig = SimilarityConfig()
    loss: LossConfig = TripletConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    pretraining: PretrainingConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _kinds_unless_named(cls, values: Any) -> Any:
        values = kind_if_none_is_named(values, "model", "retriever")
        return kind_if_none_is_named(values, "loss", "triplet")

    @property
    def title(self) -> str:
        """data_imageEncoder_textEncoder, the way recipes are named."""
        return f"{self.data.name.partition('_')[0]}_{self.model.title}"

    @property
    def retriever(self) -> ModelConfig:
        """The model, of a recipe whose model embeds images and captions. Raises ConfigError for another."""
        if isinstance(self.model, ModelConfig):
            return self.model
        raise ConfigError(
            f"a model of kind '{self.model.kind}' has no embeddings to compare, so there is nothing to search or to "
            "rank; this takes one of kind 'retriever'"
        )

    @property
    def metric(self) -> str:
        """By which the best checkpoint is chosen; more is better."""
        metrics = {"retriever": "val/rsum", "captioner": "val/log_likelihood", "slot_autoencoder": "val/psnr"}
        return metrics[self.model.kind]

    @property
    def _image_encoder(self) -> Any:
        return getattr(self.model, "image_encoder", None)

    @model_validator(mode="after")
    def _loss_and_similarity_fit(self) -> Self:
        if not isinstance(self.model, ModelConfig):
            return self
        sets, similarity = self.model.set_prediction, self.similarity.kind
        samples = sets.samples if isinstance(sets, GaussianConfig) else None
        needs: list[tuple[bool, str]] = [
            (
                (similarity == "cross_attention") == (sets.kind == "fragments"),
                "similarity.kind=cross_attention and model.set_prediction.kind=fragments go together",
            ),
            (
                similarity != "csd" or samples == 0,
                "similarity.kind=csd compares distributions: set model.set_prediction.kind=gaussian and samples=0",
            ),
            (samples != 0 or similarity == "csd", "model.set_prediction.samples=0 goes with similarity.kind=csd alone"),
            (
                not isinstance(self.loss, SoftContrastiveConfig) or (similarity == "pcme" and bool(samples)),
                "loss.kind=soft_contrastive goes with similarity.kind=pcme and model.set_prediction.kind=gaussian",
            ),
            (
                not isinstance(self.loss, MatchingConfig) or similarity == "csd",
                "loss.kind=matching goes with similarity.kind=csd",
            ),
            (
                samples is None or isinstance(self.loss, SoftContrastiveConfig | MatchingConfig),
                "model.set_prediction.kind=gaussian learns by loss.kind=soft_contrastive, or matching if samples=0",
            ),
            (
                not isinstance(self.loss, HingeRankConfig) or sets.kind == "word_space",
                "loss.kind=hinge_rank goes with model.set_prediction.kind=word_space",
            ),
        ]
        if isinstance(self.loss, TripletConfig) and sets.kind == "fragments":
            regularised = bool(self.loss.mmd_weight or self.loss.diversity_weight)
            needs.append((not regularised, "fragments have no sets: set loss.mmd_weight=0 and loss.diversity_weight=0"))
        for holds, told in needs:
            if not holds:
                raise ValueError(told)
        return self

    @model_validator(mode="after")
    def _pretraining_is_of_a_retriever(self) -> Self:
        if self.pretraining is not None and not isinstance(self.model, ModelConfig):
            raise ValueError(f"pretraining comes before a retriever, not before a model of kind '{self.model.kind}'")
        if self.pretraining is not None and getattr(self._image_encoder, "weights", None) is not None:
            raise ValueError(
                "pretraining and model.image_encoder.weights both say what the image encoder starts from: name one"
            )
        return self

    @model_validator(mode="after")
    def _pretext_reads_what_it_is_to_learn(self) -> Self:
        if isinstance(self.model, CaptionerConfig) and self.data.word_drop:
            raise ValueError("data.word_drop would teach a captioner words that were masked or exchanged: set it to 0")
        if isinstance(self.model, SlotAutoencoderConfig):
            self.model.doublings(self.data.image_size)
        return self

    @model_validator(mode="after")
    def _there_is_a_backbone_to_freeze(self) -> Self:
        encoder = self._image_encoder
        if self.optimizer.frozen_backbone_epochs and not isinstance(encoder, GridConfig):
            kind = encoder.kind if encoder is not None else self.model.kind
            raise ValueError(
                f"optimizer.frozen_backbone_epochs: an image encoder of kind '{kind}' has no "
                "backbone that could stand still; kind 'grid' has one"
            )
        return self

    @model_validator(mode="after")
    def _what_is_frozen_was_trained(self) -> Self:
        encoder = self._image_encoder
        begins = self.pretraining is not None or getattr(encoder, "weights", None) is not None
        if isinstance(encoder, GridConfig) and encoder.frozen_batch_norm and not begins:
            raise ValueError(
                "model.image_encoder.frozen_batch_norm keeps the statistics that came with the weights, and no weights "
                "are named: give model.image_encoder.weights, or set frozen_batch_norm=false"
            )
        return self

    @model_validator(mode="after")
    def _micro_batches_are_exact(self) -> Self:
        encoder = self._image_encoder
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
