"""A model with everything needed to use it: recipe, vocabulary, weights.

A checkpoint holds all of it, so whatever comes after training takes a checkpoint and never the training's settings
again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from setwise.models.config import ModelConfig
from setwise.models.pretext_config import CaptionerConfig, SlotAutoencoderConfig
from setwise.pipelines import batches, embeddings
from setwise.pipelines.pretext import Captioning, ObjectDiscovery
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.retrieval import Retrieval
from setwise.pipelines.system import System
from setwise.pipelines.word_pieces import Words, tokeniser
from setwise.platform import checkpoint, storage
from setwise.platform.errors import ConfigError, DataError


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint made usable."""

    retrieval: Retrieval
    recipe: Recipe
    vocabulary: Words
    metadata: dict[str, Any]
    device: torch.device

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that stand for what decides an embedding: weights, and how images are cut and the
        network is built.

        Two trainings that differ in `data.eval_view` alone end with the same weights.
        """
        recipe = self.recipe.model_dump(mode="json", include={"data", "model"})
        return storage.fingerprint([self.metadata["weights_sha256"], recipe, self.metadata["vocabulary"]])

    @torch.inference_mode()
    def encode_images(self, images: Tensor) -> Tensor:
        """(B,3,H,W) uint8 to sets (B,K,D) on the CPU."""
        sets: Tensor = self.retrieval.retriever.encode_images(images.to(self.device)).sets
        return sets.float().cpu()

    @torch.inference_mode()
    def encode_captions(self, captions: list[str]) -> Tensor:
        """Texts to sets (T,K,D) on the CPU."""
        tokens, lengths = batches.pad([self.vocabulary.encode(text) for text in captions])
        sets: Tensor = self.retrieval.retriever.encode_texts(tokens.to(self.device), lengths).sets
        return sets.float().cpu()

    def scores(self, image_sets: Tensor, text_sets: Tensor) -> Tensor:
        """(I,K,D) against (T,J,D) to (I,T) on the CPU."""
        return embeddings.score(self.retrieval.similarity, image_sets, text_sets, self.device)


def untrained(recipe: Recipe, vocabulary_size: int) -> System:
    """The system of a recipe, with random weights."""
    match recipe.model:
        case ModelConfig():
            return Retrieval(recipe, vocabulary_size)
        case CaptionerConfig():
            return Captioning(recipe, vocabulary_size)
        case SlotAutoencoderConfig():
            return ObjectDiscovery(recipe)


def default_device() -> torch.device:
    """The first GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(folder: Path, device: torch.device | None = None) -> TrainedModel:
    """The model of a checkpoint, verified, in evaluation mode.

    Raises:
        ConfigError: its model embeds nothing.
        DataError: the checkpoint is damaged or of another kind.
    """
    system, vocabulary, metadata = load_system(folder, device)
    if not isinstance(system, Retrieval):
        raise ConfigError(
            f"{folder} holds a model of kind '{system.recipe.model.kind}', which has no embeddings to search or to rank"
        )
    return TrainedModel(system, system.recipe, vocabulary, metadata, device or default_device())


def load_system(folder: Path, device: torch.device | None = None) -> tuple[System, Words, dict[str, Any]]:
    """Whatever a checkpoint holds, verified, in evaluation mode; its words, and its metadata with `weights_sha256`.

    Raises:
        DataError: the checkpoint is damaged or of another kind.
    """
    checkpoint.verify(folder)
    metadata = checkpoint.metadata(folder)
    try:
        recipe = Recipe.model_validate(metadata["recipe"])
        vocabulary = tokeniser(tuple(metadata["vocabulary"]))
    except (KeyError, ValueError) as error:
        raise DataError(f"{folder}: not a checkpoint of a model of setwise ({error})") from error
    system = untrained(recipe, len(vocabulary))
    try:
        system.load_state_dict(checkpoint.weights(folder))
    except RuntimeError as error:
        raise DataError(f"{folder}: its weights do not fit; another version of setwise wrote it. {error}") from error
    system.to(device or default_device()).eval()
    weights = storage.read_json(folder / checkpoint.MANIFEST)["files"][checkpoint.WEIGHTS]["sha256"]
    return system, vocabulary, metadata | {"weights_sha256": weights}
