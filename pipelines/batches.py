"""From shards to batches: which images, in which order, and as which tensors.

The place in the data is a pure function of (seed, epoch, offset), and what augments a sample one of (seed, epoch,
sample): no iterator has to be saved, and any number of workers sees the same global batches. Images stay uint8 until
they are on the device, and region features stay in their file until a batch takes them.

Shape suffixes: B images, T captions, L tokens, H W pixels, N regions, F width of a region's feature.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from setwise.models.config import BertConfig
from setwise.models.set_prediction import on_device
from setwise.pipelines import datasets, feature_files, prefetch, shards, views, vocabulary, word_pieces
from setwise.pipelines.images import decode_jpeg
from setwise.pipelines.prepare import Prepared
from setwise.pipelines.recipe import DataConfig, Recipe
from setwise.pipelines.word_pieces import Words
from setwise.platform import seeding
from setwise.platform.errors import ConfigError, DataError

DECODED_BYTES = 3 * 1024 * 1024
"""Memory that images are decoded into one after the other; only one of more pixels takes some of its own."""


@dataclass(frozen=True)
class Batch:
    """Some images, each with all its captions."""

    images: Tensor
    """(B, 3, H, W) uint8, or (B, N, F) float32 where the data set holds region features."""
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
    """One split of a prepared data set. In memory are its captions; images and features stay in their files.

    Args:
        prepared: the data set.
        name: `train`, `val` or `test`.
        data: how images are cut and words dropped.

    Raises:
        DataError: the data set has no such split, or a file of it is damaged.
    """

    def __init__(self, prepared: Prepared, name: str, data: DataConfig, words: Words) -> None:
        from pyarrow import compute

        splits = prepared.manifest["splits"]
        if name not in splits:
            known = ", ".join(split for split in datasets.SPLITS if split in splits)
            raise DataError(f"{prepared.folder}: no split '{name}'; there are {known}")
        self.prepared = prepared
        self.name = name
        self.data = data
        self.words = words
        table = shards.read(prepared.folder, splits[name], ("image_id", "caption_ids", "captions"))
        self.image_ids = np.asarray(table.column("image_id"))
        self.caption_ids = np.asarray(compute.list_flatten(table.column("caption_ids")))
        counts = np.asarray(compute.list_value_length(table.column("captions")), np.int64)
        self.owners = np.repeat(np.arange(len(table)), counts)
        self.first_caption = np.concatenate(([0], np.cumsum(counts)))
        self._texts = compute.list_flatten(table.column("captions"))
        ids, lengths = array("i"), array("i")
        for text in self._texts:
            encoded = words.encode(text.as_py())
            ids.extend(encoded)
            lengths.append(len(encoded))
        self._ids = np.frombuffer(ids, np.int32) if ids else np.empty(0, np.int32)
        self._first_id = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        self._jpegs: shards.Jpegs | None = None
        if prepared.kind == "images":
            self._jpegs = shards.Jpegs(prepared.folder, splits[name])
        else:
            self._features = feature_files.open_features(Path(prepared.manifest["features"][name]["file"]))
            self._places = np.asarray(shards.read(prepared.folder, splits[name], ("place",)).column("place"))

    def __len__(self) -> int:
        return len(self.image_ids)

    def image(self, index: int) -> bytes:
        """The stored JPEG of an image. Raises DataError where only features of it are stored."""
        if self._jpegs is None:
            raise DataError(f"split '{self.name}' holds region features; there are no images to be shown")
        return self._jpegs[index].tobytes()

    def captions_of(self, index: int) -> list[str]:
        """The captions of an image, as they were written."""
        return [self.caption(place) for place in _captions_of(self, index)]

    def caption(self, place: int) -> str:
        """Caption number `place` of the split, where captions stand in the order of their images."""
        text: str = self._texts[place].as_py()
        return text

    def tokens(self, place: int) -> np.ndarray:
        """The ids of caption number `place`, (length,) int32."""
        return self._ids[self._first_id[place] : self._first_id[place + 1]]

    def batch(self, indices: list[int]) -> Batch:
        """The images at `indices`, each with all its captions, as evaluation sees them."""
        captions = [self.tokens(place) for index in indices for place in _captions_of(self, index)]
        return self._batch(indices, self._images(indices, None), captions)

    def augmented(self, indices: list[int], seed: int, epoch: int) -> Batch:
        """The same as training sees them: each sample changed at random, by (seed, epoch, sample)."""
        if self.data.crop_scale is None and not self.data.flip and not self.data.word_drop:
            return self.batch(indices)
        images = self._images(indices, seeding.derive(seed, "views", epoch))
        words_seed = seeding.derive(seed, "words", epoch)
        captions: list[Sequence[int] | np.ndarray] = []
        for place in (place for index in indices for place in _captions_of(self, index)):
            ids = self.tokens(place)
            if self.data.word_drop:
                random = np.random.default_rng([words_seed, place])
                captions.append(self.words.drop(ids.tolist(), self.data.word_drop, random))
            else:
                captions.append(ids)
        return self._batch(indices, images, captions)

    def _images(self, indices: list[int], views_seed: int | None) -> Tensor:
        """Features, or pixels as training sees them by `views_seed`, without one as evaluation does."""
        if self._jpegs is None:
            return torch.from_numpy(self._features[self._places[indices]].astype(np.float32, copy=False))
        side = self.data.image_size
        images = torch.empty(len(indices), 3, side, side, dtype=torch.uint8)
        memory = np.empty(DECODED_BYTES, np.uint8)
        for place, index in enumerate(indices):
            try:
                pixels = decode_jpeg(self._jpegs[index], memory)
            except ValueError as error:
                image_id = self.image_ids[index]
                raise DataError(
                    f"the stored image {image_id} of split '{self.name}' is damaged ({error}). Prepare the data set "
                    "again, after removing its folder `prepared`."
                ) from error
            if views_seed is None:
                images[place] = views.evaluation_view(pixels, self.data)
            else:
                random = np.random.default_rng([views_seed, index])
                images[place] = views.training_view(pixels, self.data, random)
        return images

    def _batch(self, indices: list[int], images: Tensor, captions: Sequence[Sequence[int] | np.ndarray]) -> Batch:
        owners = [place for place, index in enumerate(indices) for _ in _captions_of(self, index)]
        return Batch(images, *pad(captions), torch.tensor(owners, dtype=torch.int64))


def evaluation_pixels(jpeg: bytes, data: DataConfig) -> Tensor:
    """An image as evaluation sees it, (3, H, W) uint8."""
    return views.evaluation_view(decode_jpeg(jpeg), data)


def pad(captions: Sequence[Sequence[int] | np.ndarray]) -> tuple[Tensor, Tensor]:
    """Token lists as one tensor (T, L), filled with 0, and their lengths (T,)."""
    lengths = [len(ids) for ids in captions]
    tokens = np.zeros((len(captions), max(lengths, default=1)), np.int64)
    for row, ids in enumerate(captions):
        tokens[row, : len(ids)] = ids
    return torch.from_numpy(tokens), torch.tensor(lengths, dtype=torch.int64)


def batches_per_epoch(images: int, batch_size: int, drop_last: bool = True) -> int:
    """Batches in an epoch. Without the last one, if it is not whole, every batch offers as many negatives, and each
    epoch leaves out another rest; a data set smaller than a batch is one batch."""
    return max(1, images // batch_size if drop_last else -(-images // batch_size))


def training_batches(
    split: Split,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    drop_last: bool = True,
    threads: int = 0,
    first: int = 0,
) -> Generator[Share, None, None]:
    """This worker's share of each global batch of an epoch, in the order of (seed, epoch), from batch `first` on.

    Of a batch that cannot be divided evenly, the first workers have one image more; of a last batch with fewer images
    than workers, the last ones have none. The next ones are made in `threads` while one is in use.
    """
    order = torch.randperm(len(split), generator=seeding.generator(seed, "order", epoch)).tolist()
    number = batches_per_epoch(len(split), batch_size, drop_last)
    chosen = (order[start : start + batch_size] for start in range(first * batch_size, number * batch_size, batch_size))
    return prefetch.ahead((partial(_share, split, part, seed, epoch, rank, world) for part in chosen), threads)


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


def in_order(split: Split, batch_size: int, threads: int = 0) -> Generator[Batch, None, None]:
    """Every image once, in the order of the data set; the last batch may be smaller. The next ones are made in
    `threads` while one is in use."""
    starts = range(0, len(split), batch_size)
    parts = (list(range(start, min(start + batch_size, len(split)))) for start in starts)
    return prefetch.ahead((partial(split.batch, part) for part in parts), threads)


def open_words(recipe: Recipe, prepared: Prepared) -> Words:
    """What turns captions into tokens: the training captions' words or, for BERT, the word pieces of its weights.

    Raises:
        ConfigError: BERT without weights, which would leave open how to cut words into pieces.
    """
    encoder = getattr(recipe.model, "text_encoder", None)
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
