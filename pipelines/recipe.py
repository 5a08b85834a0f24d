"""The recipe: everything that decides what a training computes, as one settings tree.

A recipe is named data_imageEncoder_textEncoder[_variant]. This file imports no torch, so that a mistake in a recipe
is reported at once. Where and how fast it runs (workers, devices, folders) is decided here only as far as it may
change the result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from setwise.models.config import LossConfig, ModelConfig, SimilarityConfig
from setwise.platform import config
from setwise.platform.config import Settings

FOLDER = Path(__file__).parent / "recipes"


class DataConfig(Settings):
    """The data set, as `setwise data prepare` made it."""

    name: str = Field("digits", description="name of a prepared data set")
    image_size: int = Field(64, ge=16, le=1024, description="side of the square that encoders see, in pixels")


class OptimizerConfig(Settings):
    """AdamW with a schedule that is a pure function of the step (method: section 4 of the recipes)."""

    lr: float = Field(1e-3, gt=0, le=1, description="peak learning rate")
    weight_decay: float = Field(1e-4, ge=0, le=1)
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from zero")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after warm-up: cosine to zero, or constant")
    clip_norm: float = Field(2.0, gt=0, description="largest global norm of the gradient")


class TrainConfig(Settings):
    """Length, batch and randomness of a training."""

    epochs: int = Field(10, ge=1, le=10_000)
    batch_size: int = Field(100, ge=2, description="images in a batch, over all workers, each with all its captions")
    eval_batch_size: int = Field(250, ge=1, description="images in a batch when embedding; changes no result")
    workers: int = Field(1, ge=1, description="processes of Ray Train; the batch is divided among them")
    threads: int = Field(1, ge=1, description="CPU threads of a worker")
    seed: int = Field(0, ge=0, lt=2**31)
    keep_checkpoints: int = Field(2, ge=2, description="newest checkpoints kept beside the best one")

    @model_validator(mode="after")
    def _divisible(self) -> TrainConfig:
        if self.batch_size % self.workers:
            raise ValueError(f"batch_size {self.batch_size} cannot be divided evenly among {self.workers} workers")
        return self


class Recipe(Settings):
    """One training, completely."""

    data: DataConfig = DataConfig()
    model: ModelConfig
    similarity: SimilarityConfig = SimilarityConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()


def names() -> list[str]:
    """Recipes that come with the package."""
    return config.names_in(FOLDER)


def find(name: str) -> Path:
    """The file of a recipe, by path or by name; ConfigError if there is none."""
    return config.find_file("recipe", name, FOLDER)


def load(name: str, overrides: list[str] | None = None) -> Recipe:
    """A recipe by name or path, with `section.setting=value` overrides laid over it."""
    return config.build(Recipe, config.load_layers(find(name), find), overrides or [])
