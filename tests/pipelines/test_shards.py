"""From the files of a data set to shards and batches: what is kept, what is set aside, in which order it is read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from setwise.pipelines import batches, datasets, prepare, shards, vocabulary
from setwise.pipelines.batches import Split
from setwise.pipelines.datasets import Caption, Row
from setwise.pipelines.prepare import PrepareConfig
from setwise.pipelines.recipe import DataConfig
from setwise.platform.errors import ConfigError, DataError


def picture(path: Path, size: tuple[int, int] = (64, 64), **options: Any) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 60).convert("RGB").save(path, **options)
    return path.read_bytes()


def entry(number: int, split: str = "train", captions: int = 5) -> dict[str, Any]:
    sentences = [{"raw": f"caption {c} of image {number}", "sentid": 10 * number + c} for c in range(captions)]
    return {"filename": f"{number}.jpg", "filepath": "a", "split": split, "imgid": number, "sentences": sentences}


def karpathy(folder: Path, entries: list[dict[str, Any]]) -> Path:
    file = folder / "dataset_digits.json"
    file.write_text(json.dumps({"dataset": "digits", "images": entries}))
    return file


def test_restval_is_training_and_cocos_ids_are_kept(tmp_path: Path) -> None:
    file = karpathy(tmp_path, [entry(1, "restval"), {**entry(2, "test", captions=7), "cocoid": 99}])
    first, second = datasets.read_karpathy(file, tmp_path)
    assert (first.split, first.image_id, second.split, second.image_id) == ("train", 1, "test", 99)
    assert first.path == tmp_path / "a" / "1.jpg" and len(second.captions) == 7


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry(1), entry(1)], "same id 1"),
        ([entry(1), {**entry(2), "sentences": entry(1)["sentences"]}], "caption id 10 is in"),
        ([{**entry(1), "split": "training"}], "split 'training'; known are train, val, test and restval"),
        ([{"split": "train"}], r"images\[0\] is not complete"),
        ([{**entry(1), "filename": "../../../etc/passwd"}], "outside"),
        ([], "lists no image"),
    ],
)
def test_wrong_annotations_are_refused_with_their_entry(
    tmp_path: Path, entries: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        datasets.read_karpathy(karpathy(tmp_path, entries), tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        datasets.read_karpathy(tmp_path / "none.json", tmp_path)
    (tmp_path / "bad.json").write_text("[1, 2]")
    with pytest.raises(DataError, match="not a Karpathy-split file"):
        datasets.read_karpathy(tmp_path / "bad.json", tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'digits'"):
        datasets.open_source("digit", tmp_path)


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
    shard = shards.write(tmp_path / "train-00000.parquet", shards.load_rows(shards.dump_rows(rows)), 64, 90)
    assert (shard.images, shard.captions) == (2, 2)
    table = shards.read(tmp_path, {"shards": [{"file": shard.file}]})
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
    assert shards.Shard.from_columns(shard.to_columns()) == shard


def prepare_here(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> prepare.Prepared:
    from tiny import write_serially

    monkeypatch.setattr(prepare, "_write_shards", write_serially)
    source = datasets.open_source("digits", folder)
    return prepare.prepare(source, folder / "prepared", PrepareConfig(**settings), lambda message: None)


def test_preparation_is_the_same_twice_reused_and_redone_when_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    karpathy(tmp_path, [entry(number, ("train", "val", "test")[number % 3]) for number in range(9)])
    for number in range(9):
        picture(tmp_path / "images" / "a" / f"{number}.jpg")
    first = prepare_here(tmp_path, monkeypatch, rows_per_shard=2)
    written = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    assert [len(split["shards"]) for split in first.manifest["splits"].values()] == [2, 2, 2]
    times = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    again = prepare_here(tmp_path, monkeypatch, rows_per_shard=2)
    assert {path.name: path.stat().st_mtime_ns for path in again.folder.iterdir()} == times, "reused"

    (tmp_path / "prepared" / "manifest.json").unlink()
    assert prepare_here(tmp_path, monkeypatch, rows_per_shard=2).fingerprint == first.fingerprint
    assert {path.name: path.read_bytes() for path in first.folder.iterdir()} == written, "the same bytes"

    picture(tmp_path / "images" / "a" / "0.jpg", (80, 70))
    assert prepare_here(tmp_path, monkeypatch, rows_per_shard=2).fingerprint != first.fingerprint


def test_too_many_bad_images_are_fatal_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    karpathy(tmp_path, [entry(number) for number in range(4)])
    for number in range(3):
        picture(tmp_path / "images" / "a" / f"{number}.jpg")
    with pytest.raises(DataError, match=r"1 of 4 images cannot be used.*3\.jpg: cannot be read"):
        prepare_here(tmp_path, monkeypatch, max_bad_share=0.2)
    assert not (tmp_path / "prepared").exists()
    allowed = prepare_here(tmp_path, monkeypatch, max_bad_share=0.25)
    assert allowed.manifest["splits"]["train"]["images"] == 3 and len(allowed.manifest["quarantine"]) == 1


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
            text = split.captions[place + owner][row - 5 * owner]
            assert batch.tokens[row, : batch.lengths[row]].tolist() == words.encode(text)
            assert not batch.tokens[row, batch.lengths[row] :].any()
        place += len(batch.images)
    assert place == len(split) == 50
    assert np.array_equal(split.owners, np.repeat(np.arange(50), 5))
