"""Benchmarks: folds and extended positives by hand, and protocols that tell comparable numbers from others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from setwise.pipelines import benchmarks, metrics
from setwise.pipelines.benchmarks import Ranking
from setwise.platform import storage


def ranking(images: int = 23, seed: int = 0) -> Ranking:
    """Random scores of images with 1 to 3 captions each."""
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(images), rng.integers(1, 4, images))
    scores = rng.random((images, len(owners)))
    return Ranking(scores, owners, 100 + np.arange(images), 1000 + np.arange(len(owners)), {"kind": "chamfer"})


def test_five_folds_are_consecutive_and_averaged() -> None:
    whole = ranking()
    sums = []
    for start in range(0, 20, 4):  # a fifth of 23 images is 4; three are left out
        rows = list(range(start, start + 4))
        columns = [caption for caption, owner in enumerate(whole.owners) if owner in rows]
        truth = np.array([[whole.owners[caption] == image for caption in columns] for image in rows])
        sums.append(metrics.retrieval_metrics(whole.scores[np.ix_(rows, columns)], truth)["rsum"])
    outcome = benchmarks.five_folds("digits_1k", whole)
    assert outcome.values["rsum"] == pytest.approx(np.mean(sums))
    assert (outcome.protocol["folds"], outcome.protocol["images_per_fold"]) == (5, 4)


def test_a_fold_has_a_thousand_images_at_most() -> None:
    owners = np.arange(5500)
    large = Ranking(np.zeros((5500, 5500), dtype=np.float32), owners, owners, owners, {})
    assert benchmarks.five_folds("x", large).protocol["images_per_fold"] == 1000


def test_extended_positives_are_looked_up_by_id(tmp_path: Path) -> None:
    """Only the queries that the files name are asked, and ids that the split does not have are left out."""
    small = Ranking(
        scores=np.array([[0.9, 0.8, 0.1], [0.2, 0.7, 0.3]]),
        owners=np.array([0, 1, 1]),
        image_ids=np.array([7, 8]),
        caption_ids=np.array([70, 80, 81]),
        similarity={},
    )
    (tmp_path / "image_to_caption.json").write_text(json.dumps({"7": [70, 81, 999]}))
    (tmp_path / "caption_to_image.json").write_text(json.dumps({"80": [8], "81": [7, 8]}))
    values = benchmarks.extended("digits_extended", small, tmp_path).values
    assert values["i2t_R1"] == 100 and values["i2t_r_precision"] == 50 and values["i2t_map_at_r"] == 50
    assert values["t2i_R1"] == 50 and values["t2i_r_precision"] == 50 and values["t2i_map_at_r"] == 50


def test_a_protocol_changes_with_all_that_makes_numbers_incomparable_and_with_nothing_else() -> None:
    base = ranking()
    fingerprint = benchmarks.whole("x", base).fingerprint
    same_protocol = replace(base, scores=base.scores[:, ::-1].copy())
    assert benchmarks.whole("x", same_protocol).fingerprint == fingerprint
    others = [
        replace(base, image_ids=base.image_ids + 1),
        replace(base, caption_ids=base.caption_ids + 1),
        replace(base, owners=np.concatenate([base.owners[:-1], [0]])),
        replace(base, similarity={"kind": "mil"}),
    ]
    for other in others:
        assert storage.fingerprint(other.protocol(grouping="own captions", folds=1)) != fingerprint
    assert benchmarks.five_folds("x", base).fingerprint != fingerprint
