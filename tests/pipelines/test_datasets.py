"""Data sets by name and by what is in their folder."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from setwise.pipelines import datasets
from setwise.pipelines.datasets import Caption, ImageFolder, Row, SourceConfig
from setwise.platform.errors import ConfigError, DataError
from trees import any_folder, coco_annotations, coco_karpathy, flickr30k, flickr30k_pictures, scan_features


def kind_and_file(name: str, folder: Path) -> tuple[str, str]:
    source = datasets.open_source(name, SourceConfig(folder=str(folder)))
    return source.kind, source.files[0].name


def test_names_that_are_known_are_those_of_the_papers_and_digits() -> None:
    assert datasets.known() == ("coco", "coco_butd", "f30k", "f30k_butd", "digits")


def test_the_form_is_found_by_what_is_in_the_folder(tmp_path: Path) -> None:
    coco_karpathy(tmp_path / "a")
    coco_annotations(tmp_path / "b")
    flickr30k(tmp_path / "c")
    scan_features(tmp_path / "d")
    scan_features(tmp_path / "e" / "precomp")
    any_folder(tmp_path / "f", form="parquet")
    assert kind_and_file("any.name", tmp_path / "a") == ("images", "dataset_coco.json")
    assert kind_and_file("any.name", tmp_path / "b") == ("images", "captions_train2014.json")
    assert kind_and_file("any.name", tmp_path / "c") == ("images", "dataset_flickr30k.json")
    assert kind_and_file("any.name", tmp_path / "d") == ("regions", "train_caps.txt")
    assert kind_and_file("any.name", tmp_path / "e") == ("regions", "train_caps.txt")
    assert kind_and_file("any.name", tmp_path / "f") == ("images", "captions.parquet")


def test_where_images_and_features_are_both_there_the_name_decides(tmp_path: Path) -> None:
    flickr30k(tmp_path)
    scan_features(tmp_path / "precomp", flickr30k_pictures())
    assert kind_and_file("f30k_butd", tmp_path)[0] == "regions"
    assert kind_and_file("mine_butd", tmp_path)[0] == "regions"
    assert kind_and_file("mine", tmp_path / "precomp")[0] == "regions"
    source = datasets.open_source("f30k", SourceConfig(folder=str(tmp_path)))
    assert source.kind == "images"
    assert source.notes == [
        f"{tmp_path}/precomp holds region features too; they are prepared as f30k_butd, or with --from "
        f"{tmp_path}/precomp"
    ]


def test_a_folder_without_a_data_set_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        datasets.open_source("f30k", SourceConfig(folder=str(tmp_path)))
    for name in ("dataset_flickr30k.json", "captions_val2014.json", "captions.csv", "testall_ims.npy"):
        assert name in str(caught.value)
    with pytest.raises(DataError, match="no such folder"):
        datasets.open_source("f30k", SourceConfig(folder=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match=r"source\.folder=FOLDER"):
        datasets.open_source("f30k", SourceConfig())


def test_a_data_set_without_its_images_is_refused(tmp_path: Path) -> None:
    flickr30k(tmp_path, images="elsewhere")
    with pytest.raises(DataError, match=r"flickr30k-images.*source\.images=FOLDER"):
        datasets.open_source("f30k", SourceConfig(folder=str(tmp_path)))
    given = SourceConfig(folder=str(tmp_path), images=str(tmp_path / "elsewhere"))
    assert all(row.path.is_file() for row in datasets.open_source("f30k", given).rows)
    with pytest.raises(DataError, match=r"none: no such folder \(source\.images\)"):
        datasets.open_source("f30k", SourceConfig(folder=str(tmp_path), images=str(tmp_path / "none")))


def test_extended_positives_beside_the_files_belong_to_the_data_set(tmp_path: Path) -> None:
    flickr30k(tmp_path)
    assert datasets.open_source("f30k", SourceConfig(folder=str(tmp_path))).extended_positives is None
    (tmp_path / "extended_positives").mkdir()
    found = datasets.open_source("f30k", SourceConfig(folder=str(tmp_path))).extended_positives
    assert found == tmp_path / "extended_positives"


@pytest.mark.parametrize(
    ("name", "limit", "expected", "note"),
    [
        ("mine", None, [7, 5, 3], "images have from 3 to 7 captions; all are used"),
        ("coco_mine", None, [5, 5, 3], "1 images have more than 5 captions, up to 7; the first 5 are used"),
        ("cocoa", None, [7, 5, 3], "images have from 3 to 7 captions; all are used"),
        ("mine", 4, [4, 4, 3], "2 images have more than 4 captions, up to 7; the first 4 are used"),
        ("mine", 1, [1, 1, 1], "3 images have more than 1 captions, up to 7; the first 1 are used"),
        ("coco", 6, [6, 5, 3], "1 images have more than 6 captions, up to 7; the first 6 are used"),
    ],
)
def test_how_many_captions_are_used_is_said(
    tmp_path: Path, name: str, limit: int | None, expected: list[int], note: str
) -> None:
    pictures = flickr30k_pictures(train=1, val=1, test=1)
    ids = [tuple(range(10 * place, 10 * place + number)) for place, number in enumerate((7, 5, 3))]
    flickr30k(tmp_path, [replace(p, caption_ids=own) for p, own in zip(pictures, ids, strict=True)])
    source = datasets.open_source(name, SourceConfig(folder=str(tmp_path), captions_per_image=limit))
    assert [len(row.captions) for row in source.rows] == expected
    assert source.notes[0] == note
    assert ("fewer than" in source.notes[-1]) == (name != "cocoa" and limit != 1 and (limit or name) != "mine")


def test_ids_are_checked_as_a_naive_search_would() -> None:
    generator = random.Random(0)
    for _ in range(200):
        images = [generator.randrange(40) for _ in range(6)]
        captions = [[generator.randrange(200) for _ in range(3)] for _ in images]
        rows = [
            Row(image, "train", Path("x"), tuple(Caption(caption, "a") for caption in own))
            for image, own in zip(images, captions, strict=True)
        ]
        flat = [caption for own in captions for caption in own]
        if len(set(images)) == len(images) and len(set(flat)) == len(flat):
            datasets.check_ids(rows, "here")
        else:
            with pytest.raises(DataError, match=r"here: .*id"):
                datasets.check_ids(rows, "here")


@pytest.mark.parametrize(
    "name", ["", ".", "/etc/hostname", "..", "../a", "a/../../b", "a/..", "a\x00b", "\ud800", "\udc80.jpg", "//a"]
)
def test_a_name_that_leads_outside_or_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"outside|no file"):
        ImageFolder(tmp_path).path(name)


@pytest.mark.parametrize("name", ["a.jpg", "a/b.jpg", "a/./b.jpg", "…/ü.jpg", "..a/b", "a" * 300, "a\\..\\b", "~/x"])
def test_a_name_inside_is_a_path_whether_the_file_is_there_or_not(tmp_path: Path, name: str) -> None:
    assert ImageFolder(tmp_path).path(name) == tmp_path / name


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert ImageFolder(tmp_path / "link").path("a/b.jpg") == tmp_path / "link" / "a" / "b.jpg"


def test_a_list_of_mistakes_names_the_first_ten() -> None:
    assert datasets.listed(range(3)) == "0, 1, 2"
    assert datasets.listed(range(1012)).endswith("8, 9, and 1,002 more")


def test_what_the_embedded_data_set_is_published_as_can_be_read_back(tmp_path: Path) -> None:
    content = {"images": [{"filename": "a.jpg", "split": "test", "imgid": 1, "sentences": [{"raw": "a", "sentid": 5}]}]}
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    (tmp_path / "dataset_digits.json").write_text(json.dumps(content))
    (row,) = datasets.open_source("digits", SourceConfig(folder=str(tmp_path))).rows
    assert row == Row(1, "test", tmp_path / "images" / "a.jpg", (Caption(5, "a"),))
