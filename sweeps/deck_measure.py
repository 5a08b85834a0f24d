"""What a finished training of a deck is worth on the test split, measured once and kept with its run.

All systems are measured on the same images. A system of cross-attention computes every pair by itself, and on a whole
test split that may take hours: then all are measured on the first so many images and their captions alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from setwise.pipelines import (
    benchmarks,
    evaluate,
    index,
    lineage,
    prepare,
    query_ranks,
    ranking,
    references,
    trained_model,
)
from setwise.pipelines.batches import Split
from setwise.pipelines.benchmarks import Encoded, Outcome
from setwise.pipelines.embeddings import Embeddings
from setwise.pipelines.prepare import Prepared
from setwise.pipelines.references import Reference
from setwise.pipelines.retrieval import OF_SETS
from setwise.pipelines.trained_model import TrainedModel
from setwise.platform import config, storage
from setwise.platform import run as runs
from setwise.platform.run import Run

SPLIT = "test"
SPREAD = "sets/image_log_circular_variance"
BUDGET = (
    "pre-training epochs",
    "batch size",
    "embedding width",
    "learning rate",
    "training seconds",
    "pre-training seconds",
)
"""What of trainings need not be equal, though they see the same images equally often."""


@dataclass(frozen=True)
class Measured:
    """One training of one variant.

    validation: its best val/rsum. curve: val/rsum by epoch. outcome: on the test split. stored: numbers that are kept
    of an image, and of a caption. health: `sets/...` of the validation split in its best epoch. spread: the log
    circular variance of images' sets by epoch. Both are empty of a system without sets. budget: what it was trained
    with and how long, by the names of `BUDGET`.
    """

    variant: str
    seed: int
    run: Run
    validation: float
    curve: dict[int, float]
    outcome: Outcome
    stored: tuple[int, int]
    health: dict[str, float]
    spread: dict[int, float]
    budget: dict[str, float | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "variant": self.variant,
            "seed": self.seed,
            "run": self.run.name,
            "val/rsum": self.validation,
            "val/rsum by epoch": self.curve,
            "test": self.outcome.to_json(),
            "numbers stored of an image": self.stored[0],
            "numbers stored of a caption": self.stored[1],
            "sets": self.health,
            "log circular variance by epoch": self.spread,
            "budget": self.budget,
        }


def measure(training: Run, variant: str, seed: int, store: Path, images: int | None) -> Measured:
    """Evaluate the best checkpoint of a training on the test split; what was measured before is read.

    Args:
        images: how many of the split, the first ones; None for all of it.

    Raises:
        DataError: the checkpoint or the data is damaged or missing.
        DivergedError: an embedding is not finite.
    """
    checkpoint = training.best_checkpoint()
    model = trained_model.load(checkpoint)
    prepared = prepare.open_prepared(model.recipe.data.name, store)
    if images is None:
        reference = Reference(training.name, checkpoint, training)
        outcome = evaluate.evaluate([reference], store, names=[whole_benchmark(model.recipe.data.name)])[0]
    else:
        outcome = _on_first(training, model, prepared, images)
    by_epoch = {epoch: values for epoch, values in _told(training).items() if "val/rsum" in values}
    best = by_epoch.get(int(model.metadata["epoch"]), {})
    has_sets = model.recipe.retriever.set_prediction.kind in OF_SETS
    return Measured(
        variant=variant,
        seed=seed,
        run=training,
        validation=references.best_value(training) or 0.0,
        curve={epoch: float(values["val/rsum"]) for epoch, values in by_epoch.items()},
        outcome=outcome,
        stored=_stored(model, prepared),
        health={name: float(value) for name, value in best.items() if has_sets and name.startswith("sets/")},
        spread={epoch: float(values[SPREAD]) for epoch, values in by_epoch.items() if has_sets and SPREAD in values},
        budget=_budget(training, model, store),
    )


def _told(training: Run) -> dict[int, dict[str, Any]]:
    """What a training told of each epoch."""
    told: dict[int, dict[str, Any]] = {}
    for event in runs.read_events(training.events):
        if event["kind"] == "metrics" and "train/seconds" in event["values"]:
            told[int(event["step"])] = event["values"]
    return told


def _budget(training: Run, model: TrainedModel, store: Path) -> dict[str, float | None]:
    """By the names of `BUDGET`. Without a training before this one, its epochs and seconds are 0; None if its run is
    no longer there."""
    before = [Run(store / "runs" / one["run"]) for one in lineage.parents(training)]
    epochs = seconds_before = None
    if all(one.config.is_file() for one in before):
        epochs = float(sum(config.flatten(config.read_yaml(one.config).values)["train.epochs"] for one in before))
        seconds_before = float(sum(map(_seconds, before)))
    recipe = model.recipe
    own = map(float, (recipe.train.batch_size, recipe.retriever.embed_size, recipe.optimizer.lr, _seconds(training)))
    return dict(zip(BUDGET, (epochs, *own, seconds_before), strict=True))


def _seconds(training: Run) -> float:
    """That it took until its last epoch ended, all its starts together."""
    told = _told(training)
    return float(told[max(told)]["train/seconds"]) if told else 0.0


def whole_benchmark(dataset: str) -> str:
    """The benchmark of all of a test split by the captions that were written for an image."""
    return next(name for name, kind in benchmarks.kinds(dataset).items() if kind == "whole")


def first(model: TrainedModel, split: Split, images: int) -> Embeddings:
    """The sets of the first images of a split and of their captions."""
    count = min(images, len(split))
    retriever, size = model.retrieval.retriever, model.recipe.train.eval_batch_size
    image_sets, text_sets = [], []
    with torch.inference_mode():
        for start in range(0, count, size):
            batch = split.batch(list(range(start, min(start + size, count)))).to(model.device)
            image_sets.append(retriever.encode_images(batch.images).sets.float().cpu())
            text_sets.append(retriever.encode_texts(batch.tokens, batch.lengths).sets.float().cpu())
    captions = int(split.first_caption[count])
    return Embeddings(
        image_sets=torch.cat(image_sets),
        text_sets=torch.cat(text_sets),
        image_ids=torch.from_numpy(split.image_ids[:count].copy()),
        caption_ids=torch.from_numpy(split.caption_ids[:captions].copy()),
        owners=torch.from_numpy(split.owners[:captions].copy()),
    )


def _on_first(training: Run, model: TrainedModel, prepared: Prepared, images: int) -> Outcome:
    """The first images against their captions, recorded with the run as evaluate.py records benchmarks."""
    dataset = model.recipe.data.name
    name = f"{dataset}_first_{images}"
    measured_on = {"weights": model.digest, "data": prepared.fingerprint}
    if (before := evaluate.still_true(training, name, measured_on)) is not None:
        return before
    split = index.open_split(model, prepared, SPLIT)
    sets = first(model, split, images)
    member = ranking.member(sets.image_sets, sets.text_sets, model.retrieval.similarity, model.device)
    query_ranks.check_finite((member,), f"the test split in {prepared.folder}")
    texts = None
    if not benchmarks.has_published_ids(dataset):
        texts = storage.fingerprint([split.caption(place) for place in range(len(sets.owners))])
    encoded = Encoded((member,), sets.owners.numpy(), sets.image_ids.numpy(), sets.caption_ids.numpy(), texts=texts)
    found = benchmarks.measure({name: "whole"}, encoded, extended=prepared.folder, device=model.device)[0]
    evaluate.record(training, found, measured_on, int(model.metadata["epoch"]))
    return found


def _stored(model: TrainedModel, prepared: Prepared) -> tuple[int, int]:
    """Numbers of an image's set, and of a caption's."""
    size = model.recipe.data.image_size
    if prepared.kind == "images":
        images = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    else:
        images = index.open_split(model, prepared, SPLIT).batch([0]).images
    tokens = torch.ones(1, 1, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        image_set = model.retrieval.retriever.encode_images(images.to(model.device)).sets
        text_set = model.retrieval.retriever.encode_texts(tokens, torch.tensor([1])).sets
    return image_set[0].numel(), text_set[0].numel()
