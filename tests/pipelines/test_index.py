"""Embeddings that are kept: found again by all that decides them, and by nothing else."""

from __future__ import annotations

from pathlib import Path

import torch

from setwise.pipelines import batches, index, prepare, recipe, trained_model
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.retrieval import Retrieval
from setwise.pipelines.trained_model import TrainedModel
from setwise.platform import checkpoint, seeding
from tiny import TINY_MODEL


def untrained(store: Path, folder: Path, recipe: Recipe) -> TrainedModel:
    """A model of random weights, the same for each recipe."""
    words = batches.open_words(recipe, prepare.open_prepared("digits", store))
    seeding.seed_everything(0)
    metadata = {"epoch": 1, "recipe": recipe.model_dump(mode="json"), "vocabulary": list(words.words)}
    checkpoint.save(folder, Retrieval(recipe, len(words)).state_dict(), metadata, None)
    return trained_model.load(folder)


def test_two_models_of_the_same_weights_that_cut_images_differently_have_embeddings_of_their_own(
    store: Path, tmp_path: Path
) -> None:
    """`data.eval_shorter_side` does not change a training, so its weights tell nothing of it."""
    prepared = prepare.open_prepared("digits", store)
    whole, middle = (
        untrained(store, tmp_path / name, recipe.load("digits_cnn_bigru", [*TINY_MODEL, *more]))
        for name, more in (("whole", []), ("middle", ["data.eval_shorter_side=96"]))
    )
    assert whole.metadata["weights_sha256"] == middle.metadata["weights_sha256"]
    sets = [index.stored_or_made(model, prepared, "test", tmp_path) for model in (whole, middle)]
    assert torch.equal(sets[0].text_sets, sets[1].text_sets)
    assert not torch.equal(sets[0].image_sets, sets[1].image_sets)
    again = index.stored(whole, prepared, "test", tmp_path)
    assert again is not None and torch.equal(again.image_sets, sets[0].image_sets)
