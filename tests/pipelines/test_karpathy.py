"""Karpathy splits: what a good file is read as, and files as they should not be, none of which is a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from setwise.pipelines import datasets, karpathy
from setwise.pipelines.datasets import Caption, Row, SourceConfig
from setwise.pipelines.karpathy import read_karpathy
from setwise.platform.errors import DataError
from trees import coco_karpathy, coco_pictures, flickr30k, flickr30k_pictures, karpathy_json

GOOD: dict[str, Any] = {
    "filename": "1.jpg",
    "split": "train",
    "imgid": 1,
    "sentences": [{"raw": "a", "sentid": 1}],
}


def read(folder: Path, content: Any) -> list[Row]:
    file = folder / "dataset.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_karpathy(file, folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b"\x00" * 100,
        b"[" * 100_000,
        b'{"images": ' + b"9" * 5000 + b"}",
        {},
        [],
        "images",
        None,
        {"images": 5},
        {"images": None},
        {"images": True},
        {"images": "text"},
        {"images": {"a": 1}},
        {"images": []},
        {"images": [5]},
        {"images": [None]},
        {"images": [[]]},
        {"images": ["text"]},
        {"images": [{"raw": "a", "sentid": 1}]},
        {"raw": "a", "sentid": 1, "images": [GOOD]},
    ],
)
def test_a_file_of_another_form_is_refused_by_name(tmp_path: Path, content: Any) -> None:
    with pytest.raises(DataError, match=r"dataset\.json"):
        read(tmp_path, content)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("split", None),
        ("split", ["train"]),
        ("split", "Train"),
        ("imgid", None),
        ("imgid", "one"),
        ("imgid", "1"),
        ("imgid", 1.0),
        ("imgid", True),
        ("imgid", float("inf")),
        ("imgid", float("nan")),
        ("imgid", 2**63),  # does not fit the shards' int64
        ("imgid", -(2**63) - 1),
        ("imgid", [1]),
        ("cocoid", None),
        ("filename", None),
        ("filename", 3),
        ("filename", ""),
        ("filename", "nul\x00.jpg"),
        ("filename", "\ud800.jpg"),
        ("filename", "../1.jpg"),
        ("filename", "a/../1.jpg"),
        ("filename", "/etc/hostname"),
        ("filepath", "../.."),
        ("filepath", "/etc"),
        ("filepath", 3),
        ("sentences", None),
        ("sentences", 3),
        ("sentences", [3]),
        ("sentences", [{}]),
        ("sentences", [{"raw": "a"}]),
        ("sentences", [{"sentid": 1}]),
        ("sentences", [{"raw": "a", "sentid": "x"}]),
        ("sentences", [{"raw": "a", "sentid": 2**63}]),
        ("sentences", [{"raw": "a", "sentid": [1]}]),
        ("sentences", "ab"),
    ],
)
def test_an_entry_with_a_bad_value_is_refused_by_its_number(tmp_path: Path, key: str, value: Any) -> None:
    other = {**GOOD, "filename": "2.jpg", "imgid": 2, "sentences": []}
    with pytest.raises(DataError, match=r"dataset\.json.*images\[1\]"):
        read(tmp_path, {"images": [other, {**GOOD, key: value}]})


@pytest.mark.parametrize("key", ["filename", "split", "imgid", "sentences"])
def test_an_entry_that_lacks_something_is_refused_by_its_number(tmp_path: Path, key: str) -> None:
    entry = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(DataError, match=r"images\[0\] is not complete"):
        read(tmp_path, {"images": [entry]})


def test_a_good_entry_is_a_row(tmp_path: Path) -> None:
    (row,) = read(tmp_path, {"images": [{**GOOD, "filepath": "sub", "split": "restval", "cocoid": 42}]})
    assert row == Row(42, "train", tmp_path / "sub" / "1.jpg", (Caption(1, "a"),))


def test_a_caption_that_is_no_text_is_an_empty_one(tmp_path: Path) -> None:
    (row,) = read(tmp_path, {"images": [{**GOOD, "sentences": [{"raw": 5, "sentid": 1}]}]})
    assert row.captions == (Caption(1, ""),)


def test_repeated_ids_are_refused_and_the_first_ten_are_named(tmp_path: Path) -> None:
    entries = [{**GOOD, "filename": f"{place}.jpg", "imgid": place // 2, "sentences": []} for place in range(40)]
    with pytest.raises(DataError, match=r"dataset\.json.*same id 0; .*same id 9; and 10 more"):
        read(tmp_path, {"images": entries})
    twice = {"raw": "a", "sentid": 7}
    entries = [{**GOOD, "sentences": [twice]}, {**GOOD, "imgid": 2, "split": "test", "sentences": [twice]}]
    with pytest.raises(DataError, match=r"caption id 7 is in images 1 \(train\) and 2 \(test\)"):
        read(tmp_path, {"images": entries})
    with pytest.raises(DataError, match="caption id 7 is in images 1"):
        read(tmp_path, {"images": [{**GOOD, "sentences": [twice, twice]}]})


@pytest.mark.parametrize("of", ["file", "folder", "nowhere"])
def test_a_link_that_leads_outside_is_refused(tmp_path: Path, of: str) -> None:
    images, outside = tmp_path / "images", tmp_path / "outside"
    images.mkdir()
    outside.mkdir()
    (outside / "1.jpg").write_bytes(b"secret")
    if of == "file":
        (images / "sub").mkdir()
        (images / "sub" / "1.jpg").symlink_to(outside / "1.jpg")
    elif of == "folder":
        (images / "sub").symlink_to(outside)
    else:
        (images / "sub").symlink_to(images / "sub")
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps({"images": [{**GOOD, "filepath": "sub"}]}))
    with pytest.raises(DataError, match=r"images\[0\] names .*leads (outside|nowhere)"):
        read_karpathy(file, images)


def test_a_link_that_stays_inside_is_followed(tmp_path: Path) -> None:
    (tmp_path / "images" / "real").mkdir(parents=True)
    (tmp_path / "images" / "sub").symlink_to(tmp_path / "images" / "real")
    (tmp_path / "dataset.json").write_text(json.dumps({"images": [{**GOOD, "filepath": "sub"}]}))
    (row,) = read_karpathy(tmp_path / "dataset.json", tmp_path / "images")
    assert row.path == tmp_path / "images" / "sub" / "1.jpg"


@pytest.mark.parametrize("place", ["images", "."])
def test_coco_is_read_as_everybody_reads_it(tmp_path: Path, place: str) -> None:
    pictures = coco_karpathy(tmp_path, images=place)
    source = datasets.open_source("coco", SourceConfig(folder=str(tmp_path)))
    assert source.kind == "images" and source.files == (tmp_path / "dataset_coco.json",)
    for row, picture in zip(source.rows, pictures, strict=True):
        assert row.split == ("train" if picture.split == "restval" else picture.split)
        assert row.image_id == picture.image_id and row.path.is_file()
        assert [caption.caption_id for caption in row.captions] == list(picture.caption_ids[:5])
        assert [caption.text for caption in row.captions] == picture.captions[:5]
    assert source.notes == [
        "4 images of restval are used in training",
        "2 images have more than 5 captions, up to 7; the first 5 are used",
    ]


@pytest.mark.parametrize("place", ["images", "flickr30k-images", "."])
def test_flickr30k_is_found_wherever_its_images_are(tmp_path: Path, place: str) -> None:
    pictures = flickr30k(tmp_path, images=place)
    source = datasets.open_source("f30k", SourceConfig(folder=str(tmp_path)))
    assert [row.image_id for row in source.rows] == [picture.image_id for picture in pictures]
    assert all(row.path.is_file() and len(row.captions) == 5 for row in source.rows)
    assert source.notes == []


def test_the_file_is_found_by_the_name_of_the_data_set(tmp_path: Path) -> None:
    coco_karpathy(tmp_path, coco_pictures(train=1, restval=0, val=0, test=1))
    flickr30k(tmp_path, flickr30k_pictures(train=1, val=1, test=1))
    assert karpathy.find("coco", tmp_path) == karpathy.find("coco_small", tmp_path) == tmp_path / "dataset_coco.json"
    assert karpathy.find("f30k", tmp_path) == tmp_path / "dataset_flickr30k.json"
    with pytest.raises(DataError, match=r"dataset_coco\.json, dataset_flickr30k\.json; none is called after 'mine'"):
        karpathy.find("mine", tmp_path)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "dataset_coco.json").rename(tmp_path / "annotations" / "dataset_coco.json")
    (tmp_path / "dataset_flickr30k.json").unlink()
    assert karpathy.find("mine", tmp_path) == tmp_path / "annotations" / "dataset_coco.json"
    assert karpathy.find("mine", tmp_path / "images") is None


def test_file_and_images_may_be_given(tmp_path: Path) -> None:
    pictures = coco_karpathy(tmp_path / "here")
    (tmp_path / "here" / "dataset_coco.json").rename(tmp_path / "split.json")
    (tmp_path / "empty").mkdir()
    config = SourceConfig(
        folder=str(tmp_path / "empty"),
        annotations=str(tmp_path / "split.json"),
        images=str(tmp_path / "here" / "images"),
    )
    source = datasets.open_source("mine", config)
    assert len(source.rows) == len(pictures) and all(row.path.is_file() for row in source.rows)
    assert max(len(row.captions) for row in source.rows) == 7, "only of COCO it is known that five are used"


def test_tokens_do_not_stay_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps(karpathy_json("coco", coco_pictures())))
    for entry in karpathy.read_entries(file):
        assert all(type(caption) is Caption for caption in entry.captions)
