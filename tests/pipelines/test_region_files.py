"""Region features in SCAN's layout: numbers that fit, ids that are known, and files as they should not be."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from setwise.pipelines import coco_captions, datasets, positives
from setwise.pipelines.datasets import FIRST_NUMBER, Source, SourceConfig
from setwise.platform.errors import DataError
from trees import Picture, coco_karpathy, coco_pictures, flickr30k_pictures, scan_features


class Canary:
    """Would leave a file if a pickle of it were read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def read(folder: Path, name: str = "coco_butd", annotations: Path | None = None) -> Source:
    given = None if annotations is None else str(annotations)
    return datasets.open_source(name, SourceConfig(folder=str(folder), annotations=given))


def ordered(pictures: list[Picture]) -> list[Picture]:
    order = {"train": 0, "restval": 0, "val": 1, "test": 2}
    return sorted(pictures, key=lambda picture: order[picture.split])


def test_rows_point_at_the_features_of_their_image_once_or_five_times(tmp_path: Path) -> None:
    pictures = ordered(scan_features(tmp_path, regions=4, width=16))
    source = read(tmp_path)
    assert source.kind == "regions" and len(source.rows) == len(pictures)
    for row, picture in zip(source.rows, pictures, strict=True):
        stem = {"train": "train", "restval": "train", "val": "dev", "test": "testall"}[picture.split]
        assert row.path == tmp_path / f"{stem}_ims.npy" and row.image_id == picture.image_id
        assert np.array_equal(np.load(row.path, allow_pickle=False)[row.place], picture.regions(4, 16))
        assert [caption.text.replace(" .", ".") for caption in row.captions] == picture.captions
    assert "dev_ims.npy has the features of an image 5 times; the first are used" in source.notes
    assert "test is testall_ims.npy; test_ims.npy is not used" in source.notes
    assert not any(file.suffix == ".npy" for file in source.files), "34 GB are not hashed"


def test_without_testall_test_is_read(tmp_path: Path) -> None:
    pictures = scan_features(tmp_path)
    (tmp_path / "testall_ims.npy").unlink()
    source = read(tmp_path)
    assert sum(row.split == "test" for row in source.rows) == sum(p.split == "test" for p in pictures) // 5
    assert "testall_caps.txt is not used: there is no testall_ims.npy" in source.notes


@pytest.mark.parametrize("once", [True, False])
def test_ids_may_be_one_an_image_or_one_a_caption(tmp_path: Path, once: bool) -> None:
    pictures = scan_features(tmp_path)
    ids = [picture.image_id for picture in pictures if picture.split == "val"]
    lines = ids if once else [image_id for image_id in ids for _ in range(5)]
    (tmp_path / "dev_ids.txt").write_text("\n".join(map(str, lines)))
    assert [row.image_id for row in read(tmp_path).rows if row.split == "val"] == ids


def test_without_ids_images_and_captions_are_numbered_and_clash_with_none(tmp_path: Path) -> None:
    scan_features(tmp_path, ids=False)
    source = read(tmp_path)
    assert [row.image_id for row in source.rows] == [FIRST_NUMBER + place for place in range(31)]
    numbers = [caption.caption_id for row in source.rows for caption in row.captions]
    assert numbers == [FIRST_NUMBER + place for place in range(155)]
    assert f"images of train have no ids; they are numbered from {FIRST_NUMBER} on, in order" in source.notes
    (tmp_path / "dev_ids.txt").write_text("".join(f"{FIRST_NUMBER + 7 + place}\n" for place in range(5)))
    assert len({row.image_id for row in read(tmp_path).rows}) == 31


def test_caption_ids_beside_the_features_are_taken(tmp_path: Path) -> None:
    pictures = ordered(scan_features(tmp_path, caption_ids=True))
    source = read(tmp_path)
    found = [[caption.caption_id for caption in row.captions] for row in source.rows]
    assert found == [list(picture.caption_ids) for picture in pictures]
    assert not any("no ids" in note for note in source.notes)


def write_coco_test(folder: Path, image_ids: list[int]) -> None:
    """All 5,000 test images, with next to no features."""
    folder.mkdir(exist_ok=True)
    np.save(folder / "testall_ims.npy", np.ones((len(image_ids), 1, 1), np.float16))
    (folder / "testall_caps.txt").write_text("a caption\n" * 5 * len(image_ids))
    (folder / "testall_ids.txt").write_text("".join(f"{image_id}\n" for image_id in image_ids))


def test_cocos_test_split_is_recognised_by_its_images(tmp_path: Path) -> None:
    ids = coco_captions.packaged_test_ids()
    image_of = json.loads((positives.package_data() / positives.TEST_CAPTIONS).read_bytes())
    images = [image_of[str(caption_id)][0] for caption_id in ids[::5]]
    write_coco_test(tmp_path, images)
    assert [caption.caption_id for row in read(tmp_path).rows for caption in row.captions] == ids
    assert read(tmp_path, "mine").rows[0].captions[0].caption_id == FIRST_NUMBER, "another data set is not COCO"
    images[0], images[1] = images[1], images[0]
    write_coco_test(tmp_path, images)
    assert read(tmp_path).rows[0].captions[0].caption_id == FIRST_NUMBER, "in another order they cannot be told"


def test_a_karpathy_split_gives_captions_their_ids(tmp_path: Path) -> None:
    pictures = ordered(scan_features(tmp_path / "features", coco_pictures()[:]))
    coco_karpathy(tmp_path / "coco", pictures)
    file = tmp_path / "coco" / "dataset_coco.json"
    source = read(tmp_path / "features", "coco_butd", file)
    found = [[caption.caption_id for caption in row.captions] for row in source.rows]
    assert found == [list(picture.caption_ids[:5]) for picture in pictures]
    assert f"captions of val have the ids of {file.name}; 25 of 25 read alike" in source.notes
    assert file in source.files


def test_a_karpathy_split_of_other_images_or_captions_is_refused(tmp_path: Path) -> None:
    pictures = scan_features(tmp_path / "features")
    coco_karpathy(tmp_path / "coco", pictures[:-1])
    with pytest.raises(DataError, match=rf"has 0 captions of image {pictures[-1].image_id}"):
        read(tmp_path / "features", "mine", tmp_path / "coco" / "dataset_coco.json")
    coco_karpathy(tmp_path / "coco", pictures)
    (tmp_path / "features" / "train_caps.txt").write_text("something else\n" * 80)
    with pytest.raises(DataError, match="only 0 of 80 captions read as in"):
        read(tmp_path / "features", "mine", tmp_path / "coco" / "dataset_coco.json")


@pytest.mark.parametrize(
    ("rows", "captions"), [(1, 0), (2, 9), (2, 11), (3, 3), (10, 9), (10, 11), (10, 2), (4, 4), (5, 30), (0, 5)]
)
def test_numbers_that_do_not_fit_are_refused_with_both(tmp_path: Path, rows: int, captions: int) -> None:
    np.save(tmp_path / "train_ims.npy", np.ones((rows, 2, 3), np.float32))
    (tmp_path / "train_caps.txt").write_text("a\n" * captions)
    with pytest.raises(DataError, match=rf"{rows} rows .* {captions} captions|holds no feature"):
        read(tmp_path)


@pytest.mark.parametrize(("rows", "captions", "images"), [(1, 5, 1), (5, 5, 1), (3, 15, 3), (15, 15, 3), (25, 125, 25)])
def test_numbers_that_fit_are_read(tmp_path: Path, rows: int, captions: int, images: int) -> None:
    np.save(tmp_path / "train_ims.npy", np.ones((rows, 2, 3), np.float32))
    (tmp_path / "train_caps.txt").write_text("a\n" * captions)
    source = read(tmp_path)
    assert [row.place for row in source.rows] == [place * rows // images for place in range(images)]


def test_features_that_should_repeat_and_do_not_are_refused(tmp_path: Path) -> None:
    features = np.repeat(np.arange(20.0, dtype=np.float32), 5).reshape(100, 1, 1)
    features[98] = 7
    np.save(tmp_path / "dev_ims.npy", features)
    (tmp_path / "dev_caps.txt").write_text("a\n" * 100)
    with pytest.raises(DataError, match=r"rows 95 and 98 differ"):
        read(tmp_path)


def raw_npy(header: str, data: bytes) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def saved(array: np.ndarray[Any, Any]) -> Callable[[Path], None]:
    return lambda path: np.save(path, array)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x93NUMPY"),
        lambda path: path.write_bytes(b"no array"),
        lambda path: path.write_bytes(b"\x80\x04]\x94."),
        saved(np.ones((2, 3), np.float32)),
        saved(np.ones((2, 3, 4, 5), np.float32)),
        saved(np.float32(1)),
        saved(np.ones((2, 3, 4), np.float64)),
        saved(np.ones((2, 3, 4), np.int32)),
        saved(np.ones((2, 3, 4), ">f4")),
        saved(np.asfortranarray(np.ones((2, 3, 4), np.float32))),
        saved(np.ones((2, 3, 4), [("a", np.float32)])),
        saved(np.ones((0, 3, 4), np.float32)),
        lambda path: np.savez(path.open("wb"), features=np.ones((2, 3, 4), np.float32)),
        lambda path: path.write_bytes(raw_npy("{'descr':'<f4','fortran_order':False,'shape':(2,3,4),}", b"\0" * 95)),
        lambda path: path.write_bytes(raw_npy("{'descr':'<f4','fortran_order':False,'shape':(2,3,4),}", b"\0" * 97)),
        lambda path: path.write_bytes(raw_npy("{'descr':'<f4','fortran_order':False,'shape':(2**9,3,4),}", b"")),
        lambda path: path.write_bytes(raw_npy("{'descr':'<f4','fortran_order':False,'shape':(99999999999,9,9),}", b"")),
        lambda path: path.write_bytes(raw_npy("{'descr':'<f4','fortran_order':False,'shape':(-2,-3,4),}", b"\0" * 96)),
        lambda path: path.write_bytes(raw_npy("{'descr':'<f4','fortran_order':False,}", b"\0" * 96)),
        lambda path: path.write_bytes(raw_npy("__import__('os').system('true')", b"\0" * 96)),
    ],
)
def test_features_of_another_form_are_refused(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "train_ims.npy")
    (tmp_path / "train_caps.txt").write_text("a\n" * 10)
    with pytest.raises(DataError, match=r"train_ims\.npy"):
        read(tmp_path)


def test_pickled_features_are_refused_and_not_run(tmp_path: Path) -> None:
    array = np.array([[[Canary(tmp_path / "ran")]]], dtype=object)
    np.save(tmp_path / "train_ims.npy", array, allow_pickle=True)  # written here, never read
    (tmp_path / "train_caps.txt").write_text("a\n" * 5)
    with pytest.raises(DataError, match=r"train_ims\.npy"):
        read(tmp_path)
    assert not (tmp_path / "ran").exists()


def one_image(folder: Path, captions: bytes) -> Source:
    np.save(folder / "train_ims.npy", np.ones((1, 2, 3), np.float32))
    (folder / "train_caps.txt").write_bytes(captions)
    return read(folder, "mine")


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (b"a\nb\nc\nd\ne\n", ["a", "b", "c", "d", "e"]),
        (b"a\nb\nc\nd\ne", ["a", "b", "c", "d", "e"]),
        (b"a\r\nb\r\nc\r\nd\r\ne\r\n", ["a", "b", "c", "d", "e"]),
        (b"\xef\xbb\xbfa\nb\nc\nd\ne\n", ["a", "b", "c", "d", "e"]),
        (b"a\n\nc\n  \n", ["a", "", "c", ""]),
        ("ä\x85b\n\u2028c\x0bd\n日\x1c\ne\nf\n".encode(), ["ä\x85b", "c\x0bd", "日", "e", "f"]),
    ],
)
def test_a_caption_is_a_line_and_keeps_its_place(tmp_path: Path, captions: bytes, expected: list[str]) -> None:
    if len(expected) < 5:
        captions, expected = captions + b"e\n", [*expected, "e"]
    (row,) = one_image(tmp_path, captions).rows
    assert [caption.text for caption in row.captions] == expected


def test_a_line_that_is_not_utf_8_is_set_aside_by_its_number(tmp_path: Path) -> None:
    source = one_image(tmp_path, b"a\n\xff\nc\nd\ne\n")
    (row,) = source.rows
    assert [(caption.caption_id - FIRST_NUMBER, caption.text) for caption in row.captions] == [
        (0, "a"),
        (2, "c"),
        (3, "d"),
        (4, "e"),
    ]
    (bad,) = source.quarantine
    assert (bad["path"], bad["caption_id"]) == (f"{tmp_path}/train_caps.txt:2", FIRST_NUMBER + 1)
    assert bad["reason"] == "the line is not UTF-8"


def test_an_image_without_a_caption_that_can_be_read_is_set_aside(tmp_path: Path) -> None:
    np.save(tmp_path / "train_ims.npy", np.ones((2, 2, 3), np.float32))
    (tmp_path / "train_caps.txt").write_bytes(b"\xff\n" * 5 + b"a\n" * 5)
    source = read(tmp_path)
    assert [row.place for row in source.rows] == [1]
    assert [bad["caption_id"] is None for bad in source.quarantine] == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dev_ids.txt", "1\n2\n", "has 2 ids for 5 images and 25 captions"),
        ("dev_ids.txt", "1\n" * 26, "has 26 ids"),
        ("dev_ids.txt", "1\n2\nx\n4\n\n", "there is none in line 3, 5"),
        ("dev_ids.txt", "1\n2\n3\n4\n1.5\n", "there is none in line 5"),
        ("dev_ids.txt", f"1\n2\n3\n4\n{2**63}\n", "there is none in line 5"),
        ("dev_ids.txt", "1\n2\n3\n4\n" + "9" * 5000, "there is none in line 5"),
        ("dev_ids.txt", "7\n" * 4 + "8\n" * 21, "from line 1 on"),
        ("dev_ids.txt", "1\n1\n3\n4\n5\n", "have the same id 1"),
        ("dev_capids.txt", "1\n" * 24, "has 24 ids for 25 captions"),
        ("dev_capids.txt", "1\n" * 25, "caption id 1 is in images"),
    ],
)
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    scan_features(tmp_path, flickr30k_pictures())
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path, "f30k_butd")


def test_an_image_in_two_splits_is_refused(tmp_path: Path) -> None:
    pictures = ordered(scan_features(tmp_path, flickr30k_pictures()))
    ids = [picture.image_id for picture in pictures if picture.split == "val"]
    (tmp_path / "dev_ids.txt").write_text("".join(f"{i}\n" for i in [pictures[0].image_id, *ids[1:]]))
    with pytest.raises(DataError, match=rf"of train and .* of val have the same id {pictures[0].image_id}"):
        read(tmp_path)


def test_features_without_captions_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "train_ims.npy", np.ones((1, 2, 3), np.float32))
    with pytest.raises(DataError, match=r"train_caps\.txt: cannot be read .* belongs to the features"):
        read(tmp_path)
