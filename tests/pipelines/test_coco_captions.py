"""COCO from its publishers' annotations: which captions belong to which split, in which order."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from setwise.pipelines import coco_captions, datasets
from setwise.pipelines.datasets import Source, SourceConfig
from setwise.platform.errors import DataError
from trees import Picture, coco_annotations, coco_pictures


class Canary:
    """Would leave a file if a pickle of it were read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def read(folder: Path, name: str = "coco") -> Source:
    return datasets.open_source(name, SourceConfig(folder=str(folder)))


def split(source: Source, name: str) -> list[int]:
    return [row.image_id for row in source.rows if row.split == name]


def of(pictures: list[Picture], *splits: str) -> list[int]:
    return [picture.image_id for picture in pictures if picture.split in splits]


def change(folder: Path, part: str, changed: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "annotations" / f"captions_{part}.json"
    content = json.loads(file.read_text())
    changed(content)
    file.write_text(json.dumps(content))


def test_with_the_authors_id_files_it_is_the_karpathy_split_in_their_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = coco_annotations(tmp_path)
    source = read(tmp_path)
    assert split(source, "test") == of(pictures, "test") and split(source, "val") == of(pictures, "val")
    assert split(source, "train") == [*of(pictures, "train"), *of(pictures, "restval")]
    by_id = {picture.image_id: picture for picture in pictures}
    for row in source.rows:
        assert row.path == tmp_path / "images" / by_id[row.image_id].part / by_id[row.image_id].file_name
        assert [caption.caption_id for caption in row.captions] == list(by_id[row.image_id].caption_ids)
        assert [caption.text for caption in row.captions] == by_id[row.image_id].captions
    assert [file.name for file in source.files] == [*coco_captions.FILES, *coco_captions.ID_FILES.values()]
    assert capsys.readouterr().out == "", "results are printed there, and pycocotools would print between them"


def test_the_order_of_a_split_is_that_of_its_ids_and_not_of_the_annotations(tmp_path: Path) -> None:
    pictures = coco_annotations(tmp_path)
    ids = [
        caption_id for picture in reversed(pictures) if picture.split == "test" for caption_id in picture.caption_ids
    ]
    np.save(tmp_path / "annotations" / "coco_test_ids.npy", np.array(ids))
    source = read(tmp_path)
    assert split(source, "test") == of(pictures, "test")[::-1]
    read_ids = [caption.caption_id for row in source.rows if row.split == "test" for caption in row.captions]
    assert read_ids == ids


def test_without_id_files_test_is_what_eccv_caption_lists_and_the_rest_is_val(tmp_path: Path) -> None:
    pictures = coco_annotations(tmp_path, ids=())
    source = read(tmp_path)
    assert split(source, "test") == of(pictures, "test")
    assert split(source, "train") == of(pictures, "train")
    assert sorted(split(source, "val")) == sorted(of(pictures, "val", "restval"))
    assert any("not the Karpathy split" in note for note in source.notes)
    assert "test is what ECCV Caption's package lists: 50 captions of the Karpathy split" in source.notes


@pytest.mark.parametrize("ids", [("dev",), ("dev", "test"), ("dev", "test", "train")])
def test_where_val_is_known_the_rest_of_val2014_is_training(tmp_path: Path, ids: tuple[str, ...]) -> None:
    pictures = coco_annotations(tmp_path, ids=ids)
    source = read(tmp_path)
    assert sorted(split(source, "train")) == sorted(of(pictures, "train", "restval"))
    assert split(source, "val") == of(pictures, "val") and split(source, "test") == of(pictures, "test")
    assert not any("not the Karpathy split" in note for note in source.notes)


def test_captions_that_are_in_no_split_are_counted(tmp_path: Path) -> None:
    coco_annotations(tmp_path)
    np.save(tmp_path / "annotations" / "coco_restval_ids.npy", np.array([], np.int64))
    assert "20 captions of val2014 are in no split" in read(tmp_path).notes


def test_id_files_may_be_in_the_folder_of_the_data_set(tmp_path: Path) -> None:
    pictures = coco_annotations(tmp_path)
    for file in (tmp_path / "annotations").glob("*.npy"):
        file.rename(tmp_path / file.name)
    assert split(read(tmp_path), "val") == of(pictures, "val")


@pytest.mark.parametrize("ids", [(), ("train", "restval", "dev", "test")])
def test_a_sixth_caption_is_not_used(tmp_path: Path, ids: tuple[str, ...]) -> None:
    pictures = {picture.image_id: picture for picture in coco_annotations(tmp_path, coco_pictures(), ids)}
    source = read(tmp_path)
    for row in source.rows:  # the five with the lowest ids, as in Karpathy's file
        assert [caption.caption_id for caption in row.captions] == list(pictures[row.image_id].caption_ids[:5])
    assert "2 images have more than 5 captions, up to 7; the first 5 are used" in source.notes


def test_an_image_in_two_splits_is_refused(tmp_path: Path) -> None:
    pictures = coco_annotations(tmp_path)
    image = of(pictures, "test")[0]
    ids = np.array([picture.caption_ids for picture in pictures if picture.split in ("val", "test")]).ravel()
    np.save(tmp_path / "annotations" / "coco_dev_ids.npy", ids)
    with pytest.raises(DataError, match=rf"of val and .* of test have the same id {image}"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([5, 6]), "2 ids have no caption in captions_train2014.json and captions_val2014.json: 5, 6"),
        (np.array([1.0, 2.0]), r"one dimension of integers; found float64 \(2,\)"),
        (np.array([[1, 2]]), r"found int64 \(1, 2\)"),
        (np.array(["a"]), "one dimension of integers"),
        (np.array([2**64 - 1], np.uint64), "have no caption"),
    ],
)
def test_wrong_ids_of_a_split_are_refused(tmp_path: Path, ids: np.ndarray[Any, Any], message: str) -> None:
    coco_annotations(tmp_path)
    np.save(tmp_path / "annotations" / "coco_test_ids.npy", ids)
    with pytest.raises(DataError, match=rf"coco_test_ids\.npy: .*{message}"):
        read(tmp_path)


def test_repeated_ids_of_a_split_are_refused(tmp_path: Path) -> None:
    pictures = coco_annotations(tmp_path)
    first = next(picture for picture in pictures if picture.split == "test").caption_ids[0]
    np.save(tmp_path / "annotations" / "coco_test_ids.npy", np.array([first, first]))
    with pytest.raises(DataError, match=f"coco_test_ids.npy: repeats the ids {first}"):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x93NUMPY", b"\x80\x04]\x94."])
def test_damaged_ids_are_refused(tmp_path: Path, content: bytes) -> None:
    coco_annotations(tmp_path)
    (tmp_path / "annotations" / "coco_val_ids.npy").write_bytes(content)
    (tmp_path / "annotations" / "coco_dev_ids.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"coco_dev_ids\.npy: not a whole \.npy file of numbers"):
        read(tmp_path)


def test_pickled_ids_are_refused_and_not_run(tmp_path: Path) -> None:
    coco_annotations(tmp_path)
    ids = np.array([Canary(tmp_path / "ran")], dtype=object)
    np.save(tmp_path / "annotations" / "coco_dev_ids.npy", ids, allow_pickle=True)  # written here, never read
    with pytest.raises(DataError, match=r"coco_dev_ids\.npy"):
        read(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"5",
        b"{",
        b"{}",
        b"[" * 100_000,
        b'{"images": [], "annotations": 5}',
        b'{"images": 5, "annotations": []}',
        b'{"images": [5], "annotations": []}',
        b'{"images": [], "annotations": [5]}',
        b'{"images": [], "annotations": [{}]}',
        b'{"images": [{}], "annotations": []}',
        b'{"images": [], "annotations": [{"id": [1], "image_id": 1, "caption": "a"}]}',
    ],
)
def test_a_file_of_another_form_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    coco_annotations(tmp_path)
    (tmp_path / "annotations" / "captions_val2014.json").write_bytes(content)
    with pytest.raises(DataError, match=r"captions_val2014\.json"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("where", "key", "value", "message"),
    [
        ("images", "id", "5", r"images\[0\] is not complete"),
        ("images", "id", 2**63, r"images\[0\] is not complete"),
        ("images", "file_name", None, r"images\[0\] is not complete"),
        ("images", "file_name", "../../../etc/passwd", "names .*outside"),
        ("images", "file_name", "a\x00b", "names .*no file"),
        ("annotations", "id", True, r"annotations\[0\] is not complete"),
        ("annotations", "id", -(2**64), r"annotations\[0\] is not complete"),
        ("annotations", "image_id", 5, r"annotations\[0\] is for image 5, which the file does not list"),
    ],
)
def test_an_entry_with_a_bad_value_is_refused(tmp_path: Path, where: str, key: str, value: Any, message: str) -> None:
    coco_annotations(tmp_path, ids=())

    def spoil(content: dict[str, Any]) -> None:
        content[where][0][key] = value

    change(tmp_path, "val2014", spoil)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("other", ["val2014", "train2014"])
def test_ids_that_are_used_twice_are_refused(tmp_path: Path, other: str) -> None:
    coco_annotations(tmp_path, ids=())
    taken = json.loads((tmp_path / "annotations" / f"captions_{other}.json").read_text())

    def repeat_annotation(content: dict[str, Any]) -> None:
        content["annotations"][5]["id"] = taken["annotations"][0]["id"]

    def repeat_image(content: dict[str, Any]) -> None:
        content["images"].append({**content["images"][0], "id": taken["images"][0]["id"]})

    change(tmp_path, "val2014", repeat_annotation)
    with pytest.raises(DataError, match=f"annotation ids are used before.*: {taken['annotations'][0]['id']}"):
        read(tmp_path)
    coco_annotations(tmp_path, ids=())
    change(tmp_path, "val2014", repeat_image)
    with pytest.raises(DataError, match=f"image ids are listed before.*: {taken['images'][0]['id']}"):
        read(tmp_path)


def test_a_caption_that_is_no_text_is_an_empty_one(tmp_path: Path) -> None:
    coco_annotations(tmp_path)

    def spoil(content: dict[str, Any]) -> None:
        content["annotations"][0]["caption"] = None

    change(tmp_path, "train2014", spoil)
    assert sum(caption.text == "" for row in read(tmp_path).rows for caption in row.captions) == 1


def test_one_file_alone_is_no_data_set(tmp_path: Path) -> None:
    coco_annotations(tmp_path)
    (tmp_path / "annotations" / "captions_val2014.json").unlink()
    with pytest.raises(DataError, match="holds no data set"):
        read(tmp_path)
    given = SourceConfig(folder=str(tmp_path), annotations=str(tmp_path / "annotations" / "captions_train2014.json"))
    with pytest.raises(DataError, match=r"captions_val2014\.json: cannot be read"):
        datasets.open_source("coco", given)


def test_the_package_lists_the_whole_test_split() -> None:
    ids = coco_captions.packaged_test_ids()
    assert (len(ids), len(set(ids)), ids[:5]) == (25_000, 25_000, [770337, 771687, 772707, 776154, 781998])
