"""The shipped recipe and preparation made small, for tests that train."""

from __future__ import annotations

from pathlib import Path

from setwise.pipelines import shards
from setwise.pipelines.prepare import PrepareConfig
from setwise.pipelines.shards import Shard

TINY_MODEL = [
    "model.embed_size=16",
    "model.image_encoder.channels=[8, 8]",
    "model.text_encoder.word_dim=8",
    "model.set_prediction.head_dim=4",
    "train.batch_size=20",
    "train.epochs=3",
]
"""Overrides that make the shipped recipe train in a second or two, through the same code."""


def write_serially(tasks: list[dict[str, str]], folder: Path, settings: PrepareConfig) -> list[Shard]:
    """What Ray Data does in preparation, in this process."""
    return [
        shards.write(
            folder / task["file"], shards.load_rows(task["rows"]), settings.shorter_side, settings.jpeg_quality
        )
        for task in tasks
    ]
