"""From the files of a data set to shards and batches: what is kept, what is set aside, in which order it is read."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from setwise.pipelines import batches, prepare, shards, vocabulary
from setwise.pipelines.batches import Split
from setwise.pipelines.datasets import Caption, Row
from setwise.pipelines.recipe import DataConfig


def picture(path: Path, size: tuple[int, int] = (64, 64), **options: Any) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 60).convert("RGB").save(path, **options)
    return path.read_bytes()


def test_good_rows_are_stored_and_bad_ones_set_aside_with_their_reason(tmp_path: Path) -> None:
    original = picture(tmp_path / "plain.jpg", quality=90)
    picture(tmp_path / "large.png", (200, 100))
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.jpg").write_bytes(original[: len(original) // 2])
    good = (Caption(1, "a  noisy\tpicture "), Caption(2, "   "), Caption(3, "x" * 5001), Caption(4, "bad \x00 byte"))
    rows = [
        Row(10, "train", tmp_path / "plain.jpg", good),
        Row(11, "train", tmp_path / "large.png", (Caption(5, "wide"),)),
        Row(12, "train", tmp_path / "empty.jpg", (Caption(6, "nothing"),)),
        Row(13, "train", tmp_path / "cut.jpg", (Caption(7, "half"),)),
        Row(14, "train", tmp_path / "gone.jpg", (Caption(8, "gone"),)),
        Row(15, "train", tmp_path / "plain.jpg", (Caption(9, ""),)),
    ]
    file = tmp_path / "train-00000.parquet"
    assert shards.written(file) is None
    shard = shards.write(file, shards.load_rows(shards.dump_rows(rows)), 64, 90)
    assert (shard.images, shard.captions) == (2, 2)
    table = shards.read(tmp_path, {"shards": [{"file": shard.file}]}, ("image_id", "image", "captions"))
    assert table.column("image_id").to_pylist() == [10, 11]
    assert table.column("captions").to_pylist() == [["a noisy picture"], ["wide"]]
    assert table.column("image")[0].as_py() == original, "a JPEG of the right size is stored as it is"
    assert Image.open(io.BytesIO(table.column("image")[1].as_py())).size == (128, 64)
    reasons = {(bad["image_id"], bad["caption_id"]): bad["reason"] for bad in shard.quarantine}
    assert {key: reason.split(":")[0] for key, reason in reasons.items()} == {
        (10, 2): "the caption is empty",
        (10, 3): "the caption has 5,001 characters; the limit is 5,000",
        (10, 4): "the caption holds bytes that are not text",
        (12, None): "the file is empty",
        (13, None): "cannot be decoded",
        (14, None): "cannot be read",
        (15, 9): "the caption is empty",
        (15, None): "no usable caption",
    }
    assert shards.written(file) == shard


def test_jpegs_are_slices_of_the_file(tmp_path: Path) -> None:
    """Also where pages of the file begin between them, and where they are equal or contain each other's beginning."""
    stored = [picture(tmp_path / f"{n}.jpg", (300 + 11 * n, 200), quality=97) for n in range(40)]
    stored += [stored[3], stored[3], picture(tmp_path / "one.jpg", (1, 1))]
    for number, data in enumerate(stored):
        (tmp_path / f"{number}.jpg").write_bytes(data)
    rows = [Row(n, "train", tmp_path / f"{n}.jpg", (Caption(n, "words"),)) for n in range(len(stored))]
    first = shards.write(tmp_path / "train-00000.parquet", rows[:30], None, 95)
    second = shards.write(tmp_path / "train-00001.parquet", rows[30:], None, 95)
    jpegs = shards.Jpegs(tmp_path, {"shards": [asdict(first), asdict(second)]})
    assert sum(map(len, stored)) > 2**21, "more than a page of each column"
    assert [jpegs[index].tobytes() for index in range(len(jpegs))] == stored
    assert jpegs[5].base is not None, "a slice, and no copy"
    with pytest.raises(IndexError):
        jpegs[len(stored)]


def test_a_shard_of_nothing_is_one(tmp_path: Path) -> None:
    row = Row(1, "test", tmp_path / "gone.jpg", (Caption(1, "gone"),))
    shard = shards.write(tmp_path / "test-00000.parquet", [row], 64, 90)
    assert (shard.images, shard.captions, len(shard.quarantine)) == (0, 0, 1)
    assert len(shards.Jpegs(tmp_path, {"shards": [asdict(shard)]})) == 0


def test_features_are_pointed_at_and_not_copied(tmp_path: Path) -> None:
    features = np.ones((8, 3, 4), np.float32)
    features[5, 2, 1] = np.nan
    np.save(tmp_path / "ims.npy", features)
    rows = [
        Row(n, "train", tmp_path / "ims.npy", (Caption(n, "words"),), place) for n, place in enumerate((7, 5, 0, 8))
    ]
    shard = shards.write(tmp_path / "train-00000.parquet", shards.load_rows(shards.dump_rows(rows)), None, 90)
    table = shards.read(tmp_path, {"shards": [asdict(shard)]}, ("image_id", "place"))
    assert table.to_pydict() == {"image_id": [0, 2], "place": [7, 0]}
    assert [(bad["image_id"], bad["reason"]) for bad in shard.quarantine] == [
        (1, "the features in row 5 are not finite numbers"),
        (3, "row 8 is not in the file, which has 8 rows"),
    ]


def test_the_vocabulary_is_of_the_training_captions_alone(store: Path) -> None:
    prepared = prepare.open_prepared("digits", store)
    words = vocabulary.read(prepared.folder / "vocabulary.json")
    captions = list(shards.captions(prepared.folder, prepared.manifest["splits"]["train"]))
    assert set(words.words[5:]) == {word for text in captions for word in vocabulary.tokenize(text)}
    assert words.encode("a Red, ZEBRA!")[1:-1] == [words.ids["a"], words.ids["red"], words.ids[vocabulary.UNKNOWN]]
    assert words.unknown("a Red, ZEBRA!") == ["zebra"]
    assert len(words.encode("red " * 500)) == vocabulary.MAX_TOKENS


def test_any_number_of_workers_sees_the_same_batches_and_each_image_once(store: Path) -> None:
    prepared = prepare.open_prepared("digits", store)
    split = Split(prepared, "train", DataConfig(), vocabulary.read(prepared.folder / "vocabulary.json"))
    alone = [share.batch for share in batches.training_batches(split, 20, seed=3, epoch=2)]
    assert len(alone) == 4
    seen = torch.cat([batch.images.flatten(1).sum(1) for batch in alone])
    assert len(seen) == 80 == len({bytes(image.numpy().tobytes()) for batch in alone for image in batch.images})
    for world in (2, 4, 5):
        shares = [
            [share.batch for share in batches.training_batches(split, 20, 3, 2, rank, world)] for rank in range(world)
        ]
        for number, batch in enumerate(alone):
            for rank in range(world):
                part = shares[rank][number]
                assert torch.equal(part.images, batch.images[rank::world])
                assert torch.equal(part.owners.bincount(), torch.full((20 // world,), 5))
    other = next(iter(batches.training_batches(split, 20, seed=3, epoch=3))).batch
    assert not torch.equal(other.images, alone[0].images)


def test_batches_in_order_hold_each_caption_beside_its_image(store: Path) -> None:
    prepared = prepare.open_prepared("digits", store)
    words = vocabulary.read(prepared.folder / "vocabulary.json")
    split = Split(prepared, "test", DataConfig(), words)
    place = 0
    for batch in batches.in_order(split, 16):
        for row, owner in enumerate(batch.owners.tolist()):
            text = split.captions_of(place + owner)[row - 5 * owner]
            assert batch.tokens[row, : batch.lengths[row]].tolist() == words.encode(text)
            assert not batch.tokens[row, batch.lengths[row] :].any()
        place += len(batch.images)
    assert place == len(split) == 50
    assert np.array_equal(split.owners, np.repeat(np.arange(50), 5))
