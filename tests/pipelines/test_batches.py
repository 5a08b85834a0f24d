"""Batches of data sets of every size, for every number of workers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from setwise.pipelines import batches, images, prepare, shards, vocabulary
from setwise.pipelines.batches import Split
from setwise.pipelines.recipe import DataConfig
from setwise.platform.errors import DataError

DATA = DataConfig()


@pytest.fixture(scope="module")
def split(store: Path) -> Split:
    """The validation split of the shared data set: 30 images."""
    prepared = prepare.open_prepared("digits", store)
    return Split(prepared, "val", DATA, vocabulary.read(prepared.folder / "vocabulary.json"))


def places(split: Split, batch: batches.Batch) -> list[int]:
    """Which images of the split a batch holds."""
    known = {
        bytes(batches.evaluation_pixels(split.image(index), DATA).contiguous().numpy()): index
        for index in range(len(split))
    }
    assert len(known) == len(split)
    return [known[bytes(image.contiguous().numpy())] for image in batch.images]


@pytest.mark.parametrize("size", [2, 7, 10, 29, 30, 31, 500])
def test_an_epoch_holds_each_image_at_most_once_in_whole_batches(split: Split, size: int) -> None:
    epoch = [places(split, share.batch) for share in batches.training_batches(split, size, seed=1, epoch=1)]
    assert len(epoch) == batches.batches_per_epoch(len(split), size)
    assert {len(batch) for batch in epoch} == {min(size, 30)}
    flat = [place for batch in epoch for place in batch]
    assert len(set(flat)) == len(flat) == max(30 - 30 % size, 30 if size > 30 else 0)


def test_what_an_epoch_leaves_out_the_next_ones_have(split: Split) -> None:
    seen = set()
    for epoch in range(1, 9):
        epoch_batches = batches.training_batches(split, 20, 1, epoch)
        seen |= {place for share in epoch_batches for place in places(split, share.batch)}
    assert seen == set(range(30))


def test_the_order_is_a_function_of_seed_and_epoch(split: Split) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        torch.rand(7)  # the global generator has no part in it
        return [places(split, share.batch) for share in batches.training_batches(split, 10, seed, epoch)]

    assert order(1, 1) == order(1, 1)
    assert len({str(order(*key)) for key in [(1, 1), (1, 2), (2, 1), (0, 12)]}) == 4


@pytest.mark.parametrize(("size", "world"), [(12, 3), (30, 4), (500, 4), (7, 2)])
def test_workers_share_every_batch_without_loss(split: Split, size: int, world: int) -> None:
    """Also where a batch cannot be divided evenly, since the data set is smaller than it."""
    alone = [places(split, share.batch) for share in batches.training_batches(split, size, 1, 1)]
    shares = [
        [places(split, share.batch) for share in batches.training_batches(split, size, 1, 1, rank, world)]
        for rank in range(world)
    ]
    for number, whole in enumerate(alone):
        parts = [share[number] for share in shares]
        assert sorted(place for part in parts for place in part) == sorted(whole)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_every_caption_stands_beside_its_image(split: Split) -> None:
    for share in batches.training_batches(split, 7, 1, 1):
        batch = share.batch
        shown = places(split, batch)
        for row, owner in enumerate(batch.owners.tolist()):
            index = shown[owner]
            ids = batch.tokens[row, : batch.lengths[row]].tolist()
            assert ids in [split.words.encode(text) for text in split.captions_of(index)]


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
    tensor = batches.evaluation_pixels(images.encode_jpeg(picture, 100), DATA)
    assert (tensor.shape, tensor.dtype) == ((3, 64, 64), torch.uint8)
    assert float(tensor[:, 16:48, 16:48].float().mean()) < 3
    assert float(tensor.float().mean()) < 12


def test_colours_are_in_the_order_red_green_blue() -> None:
    tensor = batches.evaluation_pixels(images.encode_jpeg(Image.new("RGB", (64, 64), (200, 100, 10)), 95), DATA)
    assert np.allclose(tensor.float().mean((1, 2)).numpy(), (200, 100, 10), atol=3)


def test_a_split_that_is_not_there_is_named(store: Path) -> None:
    prepared = prepare.open_prepared("digits", store)
    with pytest.raises(DataError, match=r"no split 'dev'; there are .*train"):
        Split(prepared, "dev", DATA, vocabulary.read(prepared.folder / "vocabulary.json"))


@pytest.mark.parametrize(("size", "world"), [(12, 3), (7, 4), (29, 4)])
def test_shares_say_of_everyone_what_each_has(split: Split, size: int, world: int) -> None:
    """Put together in the order of ranks, each caption belongs to the image that `owners` says; with a last batch that
    is not whole (30 = 4 * 7 + 2 = 29 + 1), of which some workers have nothing."""
    by_rank = [list(batches.training_batches(split, size, 1, 1, rank, world, drop_last=False)) for rank in range(world)]
    alone = list(batches.training_batches(split, size, 1, 1, drop_last=False))
    assert sum(len(share.batch.images) for share in alone) == 30
    for number, whole in enumerate(alone):
        shares = [share[number] for share in by_rank]
        assert {share.images for share in shares} == {tuple(len(share.batch.images) for share in shares)}
        assert {share.captions for share in shares} == {tuple(len(share.batch.lengths) for share in shares)}
        images = torch.cat([share.batch.images for share in shares])
        local = torch.cat([share.batch.owners + sum(shares[0].images[:rank]) for rank, share in enumerate(shares)])
        for share in shares:
            assert torch.equal(share.owners, local)
        assert sorted(image.sum() for image in images) == sorted(image.sum() for image in whole.batch.images)
        for keys in ("image_keys", "text_keys"):
            together = torch.cat([getattr(share, keys) for share in shares])
            assert sorted(together.tolist()) == sorted(getattr(whole, keys).tolist())
            assert len(set(together.tolist())) == len(together)
    assert batches.batches_per_epoch(30, size, drop_last=False) == len(alone)


def test_keys_are_of_the_sample_and_the_epoch(split: Split) -> None:
    def keys(epoch: int, seed: int = 1) -> dict[int, int]:
        shares = batches.training_batches(split, 10, seed, epoch)
        return {
            place: key
            for share in shares
            for place, key in zip(places(split, share.batch), share.image_keys.tolist(), strict=True)
        }

    assert keys(1) == keys(1)
    assert not set(keys(1).values()) & set(keys(2).values()) and not set(keys(1).values()) & set(keys(1, 2).values())


def test_words_and_views_change_by_sample_and_epoch_alone(store: Path) -> None:
    prepared = prepare.open_prepared("digits", store)
    words = vocabulary.read(prepared.folder / "vocabulary.json")
    split = Split(prepared, "val", DataConfig(crop_scale=(0.3, 1), flip=True, word_drop=0.5), words)
    one, two = split.augmented([3, 8], seed=1, epoch=1), split.augmented([8, 5, 3], seed=1, epoch=1)
    assert torch.equal(one.images[0], two.images[2]) and torch.equal(one.images[1], two.images[0])
    ids = [[row[:length].tolist() for row, length in zip(b.tokens, b.lengths, strict=True)] for b in (one, two)]
    assert ids[0][:5] == ids[1][10:] and ids[0][5:] == ids[1][:5]
    later = split.augmented([3, 8], seed=1, epoch=2)
    assert not torch.equal(one.images, later.images) and not torch.equal(one.images, split.batch([3, 8]).images)
    assert ids[0] != [words.encode(text) for index in (3, 8) for text in split.captions_of(index)]


def test_nothing_is_changed_unless_asked_for(split: Split) -> None:
    plain, augmented = split.batch([4, 2]), split.augmented([4, 2], seed=1, epoch=1)
    assert torch.equal(plain.images, augmented.images) and torch.equal(plain.tokens, augmented.tokens)


def test_a_batch_of_nothing_has_the_shapes_of_one(split: Split) -> None:
    batch = split.batch([])
    assert batch.images.shape == (0, 3, 64, 64) and batch.tokens.shape == (0, 1)
    assert len(batch.lengths) == len(batch.owners) == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_made_ahead_are_the_same(store: Path, threads: int) -> None:
    prepared = prepare.open_prepared("digits", store)
    words = vocabulary.read(prepared.folder / "vocabulary.json")
    split = Split(prepared, "train", DataConfig(crop_scale=(0.3, 1), flip=True, word_drop=0.5), words)
    alone = batches.training_batches(split, 7, 1, 2, 1, 2)
    ahead = batches.training_batches(split, 7, 1, 2, 1, 2, threads=threads)
    for one, other in zip(alone, ahead, strict=True):
        assert torch.equal(one.batch.images, other.batch.images) and torch.equal(one.batch.tokens, other.batch.tokens)
        assert torch.equal(one.image_keys, other.image_keys) and torch.equal(one.owners, other.owners)
    for plain, early in zip(batches.in_order(split, 7), batches.in_order(split, 7, threads), strict=True):
        assert torch.equal(plain.images, early.images) and torch.equal(plain.lengths, early.lengths)


def test_captions_and_their_tokens_are_those_of_the_shards(split: Split, store: Path) -> None:
    prepared = prepare.open_prepared("digits", store)
    texts = list(shards.captions(prepared.folder, prepared.manifest["splits"]["val"]))
    assert [split.caption(place) for place in range(len(texts))] == texts
    assert [text for index in range(len(split)) for text in split.captions_of(index)] == texts
    assert [split.tokens(place).tolist() for place in range(len(texts))] == [split.words.encode(t) for t in texts]


def test_pixels_are_those_that_pillow_decodes(split: Split) -> None:
    for index in (0, 7):
        expected = np.asarray(images.read_rgb(split.image(index)))
        assert np.array_equal(split.batch([index]).images[0].permute(1, 2, 0).numpy(), expected)


def test_a_stored_image_that_was_damaged_is_named(store: Path, tmp_path: Path) -> None:
    own = shutil.copytree(store / "data" / "digits" / "prepared", tmp_path / "data" / "digits" / "prepared")
    shard = own / "val-00000.parquet"
    begin, length = np.load(own / "val-00000.offsets.npy", allow_pickle=False)[3]
    content = bytearray(shard.read_bytes())
    content[begin + 2 : begin + length] = bytes(length - 2)
    shard.write_bytes(content)
    prepared = prepare.open_prepared("digits", tmp_path)
    damaged = Split(prepared, "val", DATA, vocabulary.read(prepared.folder / "vocabulary.json"))
    damaged.batch([0, 1, 2, 4])
    with pytest.raises(DataError, match=f"image {damaged.image_ids[3]} of split 'val' is damaged"):
        next(batches.in_order(damaged, 10, threads=2))


def test_offsets_that_were_changed_are_refused(store: Path, tmp_path: Path) -> None:
    own = shutil.copytree(store / "data" / "digits" / "prepared", tmp_path / "data" / "digits" / "prepared")
    file = own / "val-00000.offsets.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    prepared = prepare.open_prepared("digits", tmp_path)
    with pytest.raises(DataError, match=r"offsets\.npy is damaged"):
        Split(prepared, "val", DATA, vocabulary.read(prepared.folder / "vocabulary.json"))
