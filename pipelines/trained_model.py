"""A model with everything needed to use it: recipe, vocabulary, weights.

A checkpoint holds all of it, so whatever comes after training takes a checkpoint and never the training's settings
again.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setwise.models.retriever import SetRetriever
from setwise.models.similarity import Similarity
from setwise.pipelines import batches
from setwise.pipelines.batches import Batch, Split
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.word_pieces import Words, tokeniser
from setwise.platform import checkpoint, storage
from setwise.platform.errors import DataError

SCORE_BLOCK = (64, 1024)
"""Images and captions that are compared at once: with K = 4 their cosines take 4 MB, which stay in a CPU's cache."""


class Retrieval(nn.Module):
    """What is trained, saved and evaluated as one: the two encoders and the similarity between their sets."""

    def __init__(self, recipe: Recipe, vocabulary_size: int) -> None:
        super().__init__()
        self.retriever = SetRetriever(recipe.model, vocabulary_size)
        self.similarity = Similarity(recipe.similarity)


@dataclass(frozen=True)
class Embeddings:
    """The sets of a split, on the CPU. Captions are in the order of their images.

    image_sets (I,K,D) and text_sets (T,J,D) are float32 unit vectors; owners (T,) is the index of each caption's image.
    """

    image_sets: Tensor
    text_sets: Tensor
    image_ids: Tensor
    caption_ids: Tensor
    owners: Tensor


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
        return score(self.retrieval.similarity, image_sets, text_sets, self.device)


def default_device() -> torch.device:
    """The first GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(folder: Path, device: torch.device | None = None) -> TrainedModel:
    """The model of a checkpoint, verified, in evaluation mode.

    Raises:
        DataError: the checkpoint is damaged or of another kind.
    """
    checkpoint.verify(folder)
    metadata = checkpoint.metadata(folder)
    try:
        recipe = Recipe.model_validate(metadata["recipe"])
        vocabulary = tokeniser(tuple(metadata["vocabulary"]))
    except (KeyError, ValueError) as error:
        raise DataError(f"{folder}: not a checkpoint of a retrieval model ({error})") from error
    device = device or default_device()
    retrieval = Retrieval(recipe, len(vocabulary))
    try:
        retrieval.load_state_dict(checkpoint.weights(folder))
    except RuntimeError as error:
        raise DataError(f"{folder}: its weights do not fit; another version of setwise wrote it. {error}") from error
    retrieval.to(device).eval()
    weights = storage.read_json(folder / checkpoint.MANIFEST)["files"][checkpoint.WEIGHTS]["sha256"]
    return TrainedModel(retrieval, recipe, vocabulary, metadata | {"weights_sha256": weights}, device)


@torch.inference_mode()
def score(similarity: Similarity, image_sets: Tensor, text_sets: Tensor, device: torch.device) -> Tensor:
    """(I,K,D) against (T,J,D) to (I,T) float32 on the CPU, computed on `device` block by block."""
    scores = torch.empty(len(image_sets), len(text_sets))
    images, texts = image_sets.to(device), text_sets.to(device)
    rows, columns = SCORE_BLOCK
    for i in range(0, len(images), rows):
        for t in range(0, len(texts), columns):
            scores[i : i + rows, t : t + columns] = similarity(images[i : i + rows], texts[t : t + columns])
    return scores


@torch.inference_mode()
def embed(retriever: SetRetriever, split: Split, batch_size: int, device: torch.device, threads: int = 0) -> Embeddings:
    """Encode each image and each caption of a split once, in evaluation mode; `threads` make the batches ahead."""
    was_training = retriever.training
    retriever.eval()
    images, texts = [], []
    with closing(batches.in_order(split, batch_size, threads)) as whole:
        for batch in whole:
            on_device: Batch = batch.to(device)
            images.append(retriever.encode_images(on_device.images).sets.float().cpu())
            texts.append(retriever.encode_texts(on_device.tokens, on_device.lengths).sets.float().cpu())
    retriever.train(was_training)
    return Embeddings(
        image_sets=torch.cat(images),
        text_sets=torch.cat(texts),
        image_ids=torch.from_numpy(split.image_ids.copy()),
        caption_ids=torch.from_numpy(split.caption_ids.copy()),
        owners=torch.from_numpy(split.owners.copy()),
    )
