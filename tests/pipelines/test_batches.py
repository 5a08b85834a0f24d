"""Batches of data sets of every size, for every number of workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from setwise.pipelines import batches, images, prepare
from setwise.pipelines.batches import Split
from setwise.platform.errors import DataError


@pytest.fixture(scope="module")
def split(store: Path) -> Split:
    """The validation split of the shared data set: 30 images."""
    prepared = prepare.open_prepared("digits", store)
    return Split(prepared, "val", 64, batches.open_vocabulary(prepared))


def places(split: Split, batch: batches.Batch) -> list[int]:
    """Which images of the split a batch holds."""
    known = {bytes(batches.decode(split.image(index), 64).contiguous().numpy()): index for index in range(len(split))}
    assert len(known) == len(split)
    return [known[bytes(image.contiguous().numpy())] for image in batch.images]


@pytest.mark.parametrize("size", [2, 7, 10, 29, 30, 31, 500])
def test_an_epoch_holds_each_image_at_most_once_in_whole_batches(split: Split, size: int) -> None:
    epoch = [places(split, batch) for batch in batches.training_batches(split, size, seed=1, epoch=1)]
    assert len(epoch) == batches.batches_per_epoch(len(split), size)
    assert {len(batch) for batch in epoch} == {min(size, 30)}
    flat = [place for batch in epoch for place in batch]
    assert len(set(flat)) == len(flat) == max(30 - 30 % size, 30 if size > 30 else 0)


def test_what_an_epoch_leaves_out_the_next_ones_have(split: Split) -> None:
    seen = set()
    for epoch in range(1, 9):
        seen |= {place for batch in batches.training_batches(split, 20, 1, epoch) for place in places(split, batch)}
    assert seen == set(range(30))


def test_the_order_is_a_function_of_seed_and_epoch(split: Split) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        torch.rand(7)  # the global generator has no part in it
        return [places(split, batch) for batch in batches.training_batches(split, 10, seed, epoch)]

    assert order(1, 1) == order(1, 1)
    assert len({str(order(*key)) for key in [(1, 1), (1, 2), (2, 1), (0, 12)]}) == 4


@pytest.mark.parametrize(("size", "world"), [(12, 3), (30, 4), (500, 4), (7, 2)])
def test_workers_share_every_batch_without_loss(split: Split, size: int, world: int) -> None:
    """Also where a batch cannot be divided evenly, since the data set is smaller than it."""
    alone = [places(split, batch) for batch in batches.training_batches(split, size, 1, 1)]
    shares = [
        [places(split, batch) for batch in batches.training_batches(split, size, 1, 1, rank, world)]
        for rank in range(world)
    ]
    for number, whole in enumerate(alone):
        parts = [share[number] for share in shares]
        assert sorted(place for part in parts for place in part) == sorted(whole)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_every_caption_stands_beside_its_image(split: Split) -> None:
    for batch in batches.training_batches(split, 7, 1, 1):
        for row, owner in enumerate(batch.owners.tolist()):
            index = places(split, batch)[owner]
            ids = batch.tokens[row, : batch.lengths[row]].tolist()
            assert ids in split._tokens[index]


def test_padding_is_zero_after_each_captions_end() -> None:
    tokens, lengths = batches.pad([[1, 5, 2], [1, 2], [1, 5, 6, 7, 2]])
    assert lengths.tolist() == [3, 2, 5]
    assert tokens.tolist() == [[1, 5, 2, 0, 0], [1, 2, 0, 0, 0], [1, 5, 6, 7, 2]]


@pytest.mark.parametrize("size", [(64, 64), (128, 64), (64, 100), (20, 30), (1, 1)])
def test_the_middle_square_is_cut_and_scaled(size: tuple[int, int]) -> None:
    """White borders left and right, or above and below, of a black square in the middle are cut away."""
    side = min(size)
    picture = Image.new("RGB", size, "white")
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    picture.paste("black", (left, top, left + side, top + side))
    tensor = batches.decode(images.encode_jpeg(picture, 100), 64)
    assert (tensor.shape, tensor.dtype) == ((3, 64, 64), torch.uint8)
    assert float(tensor[:, 16:48, 16:48].float().mean()) < 3
    assert float(tensor.float().mean()) < 12


def test_colours_are_in_the_order_red_green_blue() -> None:
    tensor = batches.decode(images.encode_jpeg(Image.new("RGB", (64, 64), (200, 100, 10)), 95), 64)
    assert np.allclose(tensor.float().mean((1, 2)).numpy(), (200, 100, 10), atol=3)


def test_a_split_that_is_not_there_is_named(store: Path) -> None:
    prepared = prepare.open_prepared("digits", store)
    with pytest.raises(DataError, match=r"no split 'dev'; there are .*train"):
        Split(prepared, "dev", 64, batches.open_vocabulary(prepared))
