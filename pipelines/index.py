"""Embeddings of a split by a model, computed once and kept.

Keyed by what decides them, the weights and the data, so that a new benchmark, a new similarity or a search needs no
second pass of the encoders.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from safetensors.torch import load_file, save_file

from setwise.pipelines import trained_model
from setwise.pipelines.batches import Split
from setwise.pipelines.prepare import Prepared
from setwise.pipelines.trained_model import Embeddings, TrainedModel
from setwise.platform import storage


def open_split(model: TrainedModel, prepared: Prepared, name: str) -> Split:
    """A split as this model reads it: its image size, its vocabulary."""
    return Split(prepared, name, model.recipe.data, model.vocabulary)


def embeddings(model: TrainedModel, prepared: Prepared, split: Split, store: Path) -> Embeddings:
    """The sets of every image and caption of a split, from the index if they are there."""
    folder = store / "index" / f"{model.digest}-{prepared.fingerprint}-{split.name}"
    file = folder / "embeddings.safetensors"
    if file.is_file():
        return Embeddings(**load_file(file))
    sets = trained_model.embed(model.retrieval.retriever, split, model.recipe.train.eval_batch_size, model.device)
    with storage.publish_folder(folder) as building:
        save_file({field.name: getattr(sets, field.name) for field in fields(sets)}, building / file.name)
    return sets
