"""The benchmarks by name: which queries meet which gallery, and what is reported.

Each value comes with its protocol: everything that makes two numbers comparable or not. Values are compared only
where the fingerprints of their protocols are equal.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from setwise.pipelines import metrics
from setwise.pipelines.metrics import Scores, Truth
from setwise.platform import storage

FOLDS = 5
FOLD_IMAGES = 1000  # of the COCO 1K protocol
TIES = "pessimistic"


@dataclass(frozen=True)
class Outcome:
    """The values of one benchmark and the protocol they were measured under."""

    benchmark: str
    values: dict[str, float]
    protocol: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return storage.fingerprint(self.protocol)

    def to_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "values": self.values,
            "protocol": self.protocol,
            "fingerprint": self.fingerprint,
        }


@dataclass(frozen=True)
class Ranking:
    """All scores of a split, and the ids that say which pairs match.

    scores (I,T); owners (T,) index of each caption's image; image_ids (I,) and caption_ids (T,) as in the data set.
    `similarity` describes how the scores were computed.
    """

    scores: Scores
    owners: np.ndarray[Any, np.dtype[np.int64]]
    image_ids: np.ndarray[Any, np.dtype[np.int64]]
    caption_ids: np.ndarray[Any, np.dtype[np.int64]]
    similarity: dict[str, Any]

    def protocol(self, **more: Any) -> dict[str, Any]:
        """What every benchmark of this ranking shares, and `more`."""
        pairs = [self.image_ids.tolist(), self.caption_ids.tolist(), self.owners.tolist()]
        return {
            "images": len(self.image_ids),
            "captions": len(self.caption_ids),
            "ids": storage.fingerprint(pairs),
            "ties": TIES,
            "similarity": self.similarity,
            **more,
        }

    def positives(self) -> Truth:
        """(I,T) bool: each caption matches the image that it was written for."""
        return np.asarray(self.owners[None, :] == np.arange(len(self.image_ids))[:, None])


def whole(name: str, ranking: Ranking) -> Outcome:
    """R@K of all images against all captions."""
    values = metrics.retrieval_metrics(ranking.scores, ranking.positives())
    return Outcome(name, values, ranking.protocol(grouping="own captions", folds=1))


def five_folds(name: str, ranking: Ranking) -> Outcome:
    """R@K within five consecutive folds, averaged: the COCO 1K protocol.

    A fold has 1,000 images, or a fifth of the split where that is smaller; the protocol says which.
    """
    images = min(FOLD_IMAGES, len(ranking.image_ids) // FOLDS)
    positives = ranking.positives()
    folds = []
    for start in range(0, FOLDS * images, images):
        rows = slice(start, start + images)
        columns = (ranking.owners >= start) & (ranking.owners < start + images)
        folds.append(metrics.retrieval_metrics(ranking.scores[rows, columns], positives[rows, columns]))
    values = {key: float(np.mean([fold[key] for fold in folds])) for key in folds[0]}
    return Outcome(name, values, ranking.protocol(grouping="own captions", folds=FOLDS, images_per_fold=images))


def extended(name: str, ranking: Ranking, folder: Path) -> Outcome:
    """mAP@R, R-Precision and R@1 on extended positives, which name all that is true and not only what was written.

    Args:
        folder: `image_to_caption.json` and `caption_to_image.json` as ECCV Caption has them: {id: [ids]}. Only their
            keys are queries; the gallery is the whole split.
    """
    values: dict[str, float] = {}
    hashes = {}
    sides = {
        "i2t": ("image_to_caption.json", ranking.scores, ranking.image_ids, ranking.caption_ids),
        "t2i": ("caption_to_image.json", ranking.scores.T, ranking.caption_ids, ranking.image_ids),
    }
    for direction, (file, scores, query_ids, gallery_ids) in sides.items():
        truth: dict[str, list[int]] = json.loads((folder / file).read_bytes())
        hashes[direction] = storage.sha256(folder / file)[:16]
        column = {int(item): index for index, item in enumerate(gallery_ids)}
        positives = np.zeros(scores.shape, dtype=bool)
        for row, query in enumerate(query_ids):
            matching = [column[item] for item in truth.get(str(query), []) if item in column]
            positives[row, matching] = True
        measured = metrics.ranked_positives_metrics(scores, positives)
        values |= {f"{direction}_{key}": value for key, value in measured.items()}
    return Outcome(name, values, ranking.protocol(grouping="extended positives", truth=hashes))


def names(dataset: str) -> tuple[str, ...]:
    """The benchmarks of a data set."""
    return (f"{dataset}_1k", f"{dataset}_5k", f"{dataset}_extended")


def measure(dataset: str, ranking: Ranking, extended_positives: Path) -> list[Outcome]:
    """All benchmarks of a data set, from one matrix of scores."""
    one, five, more = names(dataset)
    outcomes = [five_folds(one, ranking), whole(five, ranking)]
    if extended_positives.is_dir():
        outcomes.append(extended(more, ranking, extended_positives))
    return outcomes
