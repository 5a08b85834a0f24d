"""The shipped recipe and preparation made small, and small data sets, for tests that prepare and train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from setwise.pipelines import datasets, prepare, shards
from setwise.pipelines.datasets import Caption, Row, Source
from setwise.pipelines.prepare import PrepareConfig, Prepared, Task

TINY_MODEL = [
    "model.embed_size=16",
    "model.image_encoder.channels=[8, 8]",
    "model.text_encoder.word_dim=8",
    "model.set_prediction.head_dim=4",
    "train.batch_size=20",
    "train.epochs=3",
]
"""Overrides that make the shipped recipe train in a second or two, through the same code."""


def write_serially(tasks: list[Task], folder: Path, settings: PrepareConfig) -> None:
    """What Ray Data does in preparation, in this process."""
    for file, rows in tasks:
        copied = shards.load_rows(shards.dump_rows(rows))  # as a task of Ray gets them
        shards.write(folder / file, copied, settings.shorter_side, settings.jpeg_quality, settings.halved_colour)


def two_captions(number: int) -> tuple[Caption, ...]:
    return tuple(Caption(10 * number + c, f"caption {c} of image {number}") for c in range(2))


def images_source(folder: Path, count: int = 9, size: tuple[int, int] = (70, 50)) -> Source:
    """A data set of images: every third image in each split."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(count):
        path = folder / f"{number}.jpg"
        if not path.exists():
            noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
        rows.append(Row(number, datasets.SPLITS[number % 3], path, two_captions(number)))
    annotations = folder / "annotations.json"
    annotations.write_text(json.dumps([[row.image_id, row.split] for row in rows]))
    return Source("pictures", "images", rows, (annotations,), [], [], None)


def regions_source(folder: Path, bad: tuple[int, ...] = ()) -> Source:
    """Features as SCAN's layout has them: the test split's are stored once for each of two captions."""
    folder.mkdir(exist_ok=True)
    rows, random = [], np.random.default_rng(0)
    for split, count, times in (("train", 20, 1), ("val", 4, 1), ("test", 4, 2)):
        path = folder / f"{split}_ims.npy"
        features = random.normal(size=(count * times, 6, 5)).astype(np.float32)
        if split == "train":
            features[list(bad)] = np.nan
        np.save(path, features)
        rows += [Row(len(rows) + n, split, path, two_captions(len(rows) + n), n * times) for n in range(count)]
    (folder / "train_caps.txt").write_text("as in the rows\n")
    files = (folder / "train_caps.txt", *sorted(folder.glob("*.npy")))
    return Source("pictures_butd", "regions", rows, files, [], ["features of test are stored twice"], None)


def run(source: Source, target: Path, **settings: Any) -> Prepared:
    """Prepare, quietly."""
    return prepare.prepare(source, target, PrepareConfig(**settings), lambda message: None, str(target.parent))
