"""Embeddings of a split by a model, computed once and kept.

Keyed by what decides them, the weights and the data, so that a new benchmark, a new similarity or a search needs no
second pass of the encoders.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path

from safetensors.torch import load_file, save_file

from setwise.pipelines.batches import Split
from setwise.pipelines.embeddings import Embeddings, embed
from setwise.pipelines.prepare import Prepared
from setwise.pipelines.trained_model import TrainedModel
from setwise.platform import storage

EMBEDDINGS, HASH = "embeddings.safetensors", "embeddings.sha256"


def open_split(model: TrainedModel, prepared: Prepared, name: str) -> Split:
    """A split as this model reads it: its image size, its vocabulary."""
    return Split(prepared, name, model.recipe.data, model.vocabulary)


def embeddings(model: TrainedModel, prepared: Prepared, split: Split, store: Path) -> Embeddings:
    """The sets of every image and caption of a split, from the index if they are there."""
    return stored(model, prepared, split.name, store) or _make(model, prepared, split, store)


def stored_or_made(model: TrainedModel, prepared: Prepared, name: str, store: Path) -> Embeddings:
    """The same; the split itself, with its images and captions, is opened only if there is something to encode."""
    return stored(model, prepared, name, store) or _make(model, prepared, open_split(model, prepared, name), store)


def stored(model: TrainedModel, prepared: Prepared, name: str, store: Path) -> Embeddings | None:
    """What the index holds, None if that is nothing or damaged."""
    folder = _folder(model, prepared, name, store)
    file, sha256 = folder / EMBEDDINGS, folder / HASH
    if not file.is_file():
        return None
    # A flipped bit would only show as a model that is worse than it is.
    if not sha256.is_file() or sha256.read_bytes() != storage.sha256(file).encode():
        logging.getLogger(__name__).warning("%s: damaged, so the split is encoded again", file)
        return None
    return Embeddings(**load_file(file))


def _make(model: TrainedModel, prepared: Prepared, split: Split, store: Path) -> Embeddings:
    sets = embed(
        model.retrieval.retriever,
        split,
        model.recipe.train.eval_batch_size,
        model.device,
        model.recipe.train.loader_threads,
    )
    with storage.publish_folder(_folder(model, prepared, split.name, store)) as building:
        file = building / EMBEDDINGS
        save_file({field.name: getattr(sets, field.name) for field in fields(sets)}, file)
        (building / HASH).write_text(storage.sha256(file))
    return sets


def _folder(model: TrainedModel, prepared: Prepared, name: str, store: Path) -> Path:
    return store / "index" / f"{model.digest}-{prepared.fingerprint}-{name}"
