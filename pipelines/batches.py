"""From shards to batches: which images, in which order, and as which tensors.

The place in the data is a pure function of (seed, epoch, offset): no iterator has to be saved, and any number of
workers sees the same global batches. Images stay uint8 until they are on the device.

Shape suffixes: B images, T captions, L tokens, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from setwise.pipelines import datasets, shards, vocabulary
from setwise.pipelines.images import read_rgb
from setwise.pipelines.prepare import Prepared
from setwise.pipelines.vocabulary import Vocabulary
from setwise.platform import seeding
from setwise.platform.errors import DataError


@dataclass(frozen=True)
class Batch:
    """Some images, each with all its captions."""

    images: Tensor
    """(B, 3, H, W) uint8."""
    tokens: Tensor
    """(T, L) int64, 0 after a caption's end."""
    lengths: Tensor
    """(T,) int64, on the CPU, where packing wants them."""
    owners: Tensor
    """(T,) int64: index in `images` of the image that a caption belongs to."""

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.images.to(device, non_blocking=True),
            self.tokens.to(device, non_blocking=True),
            self.lengths,
            self.owners.to(device, non_blocking=True),
        )


class Split:
    """One split of a prepared data set, with its compressed images in memory.

    Args:
        prepared: the data set.
        name: `train`, `val` or `test`.
        image_size: side of the square to cut from the middle of each image, in pixels.

    Raises:
        DataError: the data set has no such split.
    """

    def __init__(self, prepared: Prepared, name: str, image_size: int, words: Vocabulary) -> None:
        splits = prepared.manifest["splits"]
        if name not in splits:
            known = ", ".join(split for split in datasets.SPLITS if split in splits)
            raise DataError(f"{prepared.folder}: no split '{name}'; there are {known}")
        table = shards.read(prepared.folder, splits[name])
        self.name = name
        self.image_size = image_size
        self.image_ids = np.asarray(table.column("image_id"))
        self.captions: list[list[str]] = table.column("captions").to_pylist()
        self.caption_ids = np.asarray(table.column("caption_ids").combine_chunks().flatten())
        self.owners = np.repeat(np.arange(len(self.captions)), [len(texts) for texts in self.captions])
        self._jpegs = table.column("image")
        self._tokens = [[words.encode(text) for text in texts] for texts in self.captions]

    def __len__(self) -> int:
        return len(self.captions)

    def image(self, index: int) -> bytes:
        """The stored JPEG of an image."""
        data: bytes = self._jpegs[index].as_py()
        return data

    def batch(self, indices: list[int]) -> Batch:
        """The images at `indices`, each with all its captions."""
        pixels = torch.stack([decode(self.image(index), self.image_size) for index in indices])
        tokens, lengths = pad([ids for index in indices for ids in self._tokens[index]])
        owners = torch.tensor([place for place, index in enumerate(indices) for _ in self._tokens[index]])
        return Batch(pixels, tokens, lengths, owners)


def decode(jpeg: bytes, size: int) -> Tensor:
    """The square of `size` pixels in the middle of an image, (3, size, size) uint8; smaller images are enlarged."""
    from PIL import Image, ImageOps

    image = read_rgb(jpeg)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def pad(captions: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token lists as one tensor (T, L), filled with 0, and their lengths (T,)."""
    lengths = torch.tensor([len(ids) for ids in captions])
    tokens = torch.zeros(len(captions), int(lengths.max()), dtype=torch.int64)
    for row, ids in enumerate(captions):
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens, lengths


def batches_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches in an epoch. The rest is left out, another rest in each epoch, so that every batch offers as many
    negatives; a data set smaller than a batch is one batch."""
    return max(1, images // batch_size)


def training_batches(
    split: Split, batch_size: int, seed: int, epoch: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """This worker's share of each global batch of an epoch, in the order of (seed, epoch)."""
    order = torch.randperm(len(split), generator=seeding.generator(seed, "order", epoch)).tolist()
    for number in range(batches_per_epoch(len(split), batch_size)):
        yield split.batch(order[number * batch_size : (number + 1) * batch_size][rank::world])


def in_order(split: Split, batch_size: int) -> Iterator[Batch]:
    """Every image once, in the order of the data set; the last batch may be smaller."""
    for start in range(0, len(split), batch_size):
        yield split.batch(list(range(start, min(start + batch_size, len(split)))))


def open_vocabulary(prepared: Prepared) -> Vocabulary:
    return vocabulary.read(prepared.folder / "vocabulary.json")


def dataset_identity(prepared: Prepared) -> dict[str, Any]:
    """What a model must remember of the data it was trained on."""
    return {"name": prepared.manifest["name"], "fingerprint": prepared.fingerprint}
