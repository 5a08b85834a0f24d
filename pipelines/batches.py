"""From shards to batches: which images, in which order, and as which tensors.

The place in the data is a pure function of (seed, epoch, offset), and what augments a sample one of (seed, epoch,
sample): no iterator has to be saved, and any number of workers sees the same global batches. Images stay uint8 until
they are on the device.

Shape suffixes: B images, T captions, L tokens, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from setwise.models.config import BertConfig
from setwise.models.set_prediction import on_device
from setwise.pipelines import datasets, shards, views, vocabulary, word_pieces
from setwise.pipelines.images import read_rgb
from setwise.pipelines.prepare import Prepared
from setwise.pipelines.recipe import DataConfig, Recipe
from setwise.pipelines.word_pieces import Words
from setwise.platform import seeding
from setwise.platform.errors import ConfigError, DataError


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
            on_device(self.images, device), on_device(self.tokens, device), self.lengths, on_device(self.owners, device)
        )


@dataclass(frozen=True)
class Share:
    """One worker's part of a global batch, and what it has to know of the others' parts.

    Every worker computes all of this by itself, so nothing about sizes has to be exchanged.
    """

    batch: Batch
    image_keys: Tensor
    """(B,) int64: what is random about a sample is a function of its key."""
    text_keys: Tensor
    """(T,) int64."""
    images: tuple[int, ...]
    """How many images each worker has, by rank."""
    captions: tuple[int, ...]
    """How many captions each worker has."""
    owners: Tensor
    """(captions of all,) int64: indices of owners where images and captions of all workers stand in order of ranks."""

    def to(self, device: torch.device) -> Share:
        keys = on_device(self.image_keys, device), on_device(self.text_keys, device)
        return Share(self.batch.to(device), *keys, self.images, self.captions, on_device(self.owners, device))


class Split:
    """One split of a prepared data set, with its compressed images in memory.

    Args:
        prepared: the data set.
        name: `train`, `val` or `test`.
        data: how images are cut and words dropped.

    Raises:
        DataError: the data set has no such split.
    """

    def __init__(self, prepared: Prepared, name: str, data: DataConfig, words: Words) -> None:
        splits = prepared.manifest["splits"]
        if name not in splits:
            known = ", ".join(split for split in datasets.SPLITS if split in splits)
            raise DataError(f"{prepared.folder}: no split '{name}'; there are {known}")
        table = shards.read(prepared.folder, splits[name])
        self.name = name
        self.data = data
        self.words = words
        self.image_ids = np.asarray(table.column("image_id"))
        self.captions: list[list[str]] = table.column("captions").to_pylist()
        self.caption_ids = np.asarray(table.column("caption_ids").combine_chunks().flatten())
        self.owners = np.repeat(np.arange(len(self.captions)), [len(texts) for texts in self.captions])
        self.first_caption = np.concatenate(([0], np.cumsum([len(texts) for texts in self.captions])))
        self._jpegs = table.column("image")
        self._tokens = [[words.encode(text) for text in texts] for texts in self.captions]

    def __len__(self) -> int:
        return len(self.captions)

    def image(self, index: int) -> bytes:
        """The stored JPEG of an image."""
        data: bytes = self._jpegs[index].as_py()
        return data

    def batch(self, indices: list[int]) -> Batch:
        """The images at `indices`, each with all its captions, as evaluation sees them."""
        pixels = [evaluation_pixels(self.image(index), self.data) for index in indices]
        return self._batch(indices, pixels, [ids for index in indices for ids in self._tokens[index]])

    def augmented(self, indices: list[int], seed: int, epoch: int) -> Batch:
        """The same as training sees them: each sample changed at random, by (seed, epoch, sample)."""
        if self.data.crop_scale is None and not self.data.flip and not self.data.word_drop:
            return self.batch(indices)
        views_seed, words_seed = (seeding.derive(seed, name, epoch) for name in ("views", "words"))
        pixels, captions = [], []
        for index in indices:
            random = np.random.default_rng([views_seed, index])
            pixels.append(_pixels(views.training_view(read_rgb(self.image(index)), self.data, random)))
            for place, ids in enumerate(self._tokens[index], start=int(self.first_caption[index])):
                random = np.random.default_rng([words_seed, place])
                captions.append(self.words.drop(ids, self.data.word_drop, random) if self.data.word_drop else ids)
        return self._batch(indices, pixels, captions)

    def _batch(self, indices: list[int], pixels: list[Tensor], captions: list[list[int]]) -> Batch:
        side = self.data.image_size
        images = torch.stack(pixels) if pixels else torch.empty(0, 3, side, side, dtype=torch.uint8)
        owners = [place for place, index in enumerate(indices) for _ in self._tokens[index]]
        return Batch(images, *pad(captions), torch.tensor(owners, dtype=torch.int64))


def evaluation_pixels(jpeg: bytes, data: DataConfig) -> Tensor:
    """An image as evaluation sees it, (3, H, W) uint8."""
    return _pixels(views.evaluation_view(read_rgb(jpeg), data))


def _pixels(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def pad(captions: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token lists as one tensor (T, L), filled with 0, and their lengths (T,)."""
    lengths = torch.tensor([len(ids) for ids in captions], dtype=torch.int64)
    tokens = torch.zeros(len(captions), max(map(len, captions), default=1), dtype=torch.int64)
    for row, ids in enumerate(captions):
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens, lengths


def batches_per_epoch(images: int, batch_size: int, drop_last: bool = True) -> int:
    """Batches in an epoch. Without the last one, if it is not whole, every batch offers as many negatives, and each
    epoch leaves out another rest; a data set smaller than a batch is one batch."""
    return max(1, images // batch_size if drop_last else -(-images // batch_size))


def training_batches(
    split: Split, batch_size: int, seed: int, epoch: int, rank: int = 0, world: int = 1, drop_last: bool = True
) -> Iterator[Share]:
    """This worker's share of each global batch of an epoch, in the order of (seed, epoch).

    Of a batch that cannot be divided evenly, the first workers have one image more; of a last batch with fewer images
    than workers, the last ones have none.
    """
    order = torch.randperm(len(split), generator=seeding.generator(seed, "order", epoch)).tolist()
    for number in range(batches_per_epoch(len(split), batch_size, drop_last)):
        chosen = order[number * batch_size : (number + 1) * batch_size]
        yield _share(split, chosen, seed, epoch, rank, world)


def _share(split: Split, chosen: list[int], seed: int, epoch: int, rank: int, world: int) -> Share:
    parts = [chosen[other::world] for other in range(world)]
    captions = [[place for index in part for place in _captions_of(split, index)] for part in parts]
    in_order = [index for part in parts for index in part]
    owners = [place for place, index in enumerate(in_order) for _ in _captions_of(split, index)]
    mine = parts[rank]
    return Share(
        batch=split.augmented(mine, seed, epoch),
        image_keys=_keys(mine, seed, "images", epoch),
        text_keys=_keys(captions[rank], seed, "captions", epoch),
        images=tuple(map(len, parts)),
        captions=tuple(map(len, captions)),
        owners=torch.tensor(owners, dtype=torch.int64),
    )


def _captions_of(split: Split, index: int) -> range:
    """Numbers of an image's captions among all captions of the split."""
    return range(int(split.first_caption[index]), int(split.first_caption[index + 1]))


def _keys(places: list[int], seed: int, name: str, epoch: int) -> Tensor:
    """Keys of samples by their number in the split: a stream of (seed, epoch), from which each takes its own."""
    start = seeding.derive(seed, "keys", name, epoch) >> 1  # leaves room to count up
    return torch.tensor([start + place for place in places], dtype=torch.int64)


def in_order(split: Split, batch_size: int) -> Iterator[Batch]:
    """Every image once, in the order of the data set; the last batch may be smaller."""
    for start in range(0, len(split), batch_size):
        yield split.batch(list(range(start, min(start + batch_size, len(split)))))


def open_words(recipe: Recipe, prepared: Prepared) -> Words:
    """What turns captions into tokens: the training captions' words or, for BERT, the word pieces of its weights.

    Raises:
        ConfigError: BERT without weights, which would leave open how to cut words into pieces.
    """
    encoder = recipe.model.text_encoder
    if not isinstance(encoder, BertConfig):
        return vocabulary.read(prepared.folder / "vocabulary.json")
    if encoder.weights is None:
        raise ConfigError(
            "model.text_encoder.weights: BERT reads the word pieces that its weights were trained with. Name a folder "
            "or a model on the Hugging Face hub, such as bert-base-uncased."
        )
    return word_pieces.read(encoder.weights)


def dataset_identity(prepared: Prepared) -> dict[str, Any]:
    """What a model must remember of the data it was trained on."""
    return {"name": prepared.manifest["name"], "fingerprint": prepared.fingerprint}
