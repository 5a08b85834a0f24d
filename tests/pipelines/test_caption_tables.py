"""Any folder with a table of captions: what is read, what is set aside with its line, what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from setwise.pipelines import datasets
from setwise.pipelines.datasets import FIRST_NUMBER, Caption, Row, Source, SourceConfig
from setwise.platform.errors import DataError
from trees import any_folder

IMAGES = ("a.jpg", "b.jpg", "sub/c.jpg", "ü 1.jpg")


def folder_of_images(folder: Path) -> Path:
    for name in IMAGES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def read(folder: Path, file: str, content: bytes | str, **config: Any) -> Source:
    folder_of_images(folder)
    (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
    return datasets.open_source("mine", SourceConfig(folder=str(folder), **config))


def captions(source: Source) -> dict[str, list[str]]:
    return {row.path.name: [caption.text for caption in row.captions] for row in source.rows}


def reasons(source: Source, file: str = "captions.csv") -> dict[int, str]:
    """What was set aside, by the line of the table."""
    return {int(bad["path"].partition(f"{file}:")[2]): bad["reason"] for bad in source.quarantine}


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("place", [".", "images"])
def test_all_forms_are_read_alike(tmp_path: Path, form: str, place: str) -> None:
    pictures = any_folder(tmp_path / place, form=form)
    if place != ".":
        (tmp_path / place / f"captions.{form}").rename(tmp_path / f"captions.{form}")
    source = datasets.open_source("mine", SourceConfig(folder=str(tmp_path)))
    assert source.kind == "images" and source.quarantine == []
    assert source.files == (tmp_path / f"captions.{form}",)
    number = FIRST_NUMBER
    for row, picture in zip(source.rows, pictures, strict=True):
        assert (row.split, row.path) == (picture.split, tmp_path / place / picture.file_name)
        assert row.path.is_file()
        expected = [Caption(number + place, text) for place, text in enumerate(picture.captions)]
        assert row.captions == tuple(expected)
        number += len(expected)
    assert [row.image_id for row in source.rows] == list(range(FIRST_NUMBER, FIRST_NUMBER + len(pictures)))
    assert source.notes == ["images have from 1 to 7 captions; all are used"]


def test_lines_of_an_image_may_be_anywhere_and_its_name_be_written_in_several_ways(tmp_path: Path) -> None:
    source = read(tmp_path, "captions.csv", "image,caption\nsub/c.jpg,1\na.jpg,2\nsub//c.jpg,3\n./sub/./c.jpg,4\n")
    assert captions(source) == {"c.jpg": ["1", "3", "4"], "a.jpg": ["2"]}


@pytest.mark.parametrize(
    "content",
    [
        'caption,image\n"one, ""two""\nthree",a.jpg\nfour,b.jpg\n',
        '\ufeffcaption,image\n"one, ""two""\nthree",a.jpg\nfour,b.jpg\n',
        'caption,image\r\n"one, ""two""\nthree",a.jpg\r\n\r\nfour,b.jpg\r\n\r\n',
        'caption, image ,width\n"one, ""two""\nthree",a.jpg,5\nfour,b.jpg,\n',
    ],
)
def test_csv_may_have_quotes_a_mark_of_byte_order_any_line_ends_and_more_columns(tmp_path: Path, content: str) -> None:
    source = read(tmp_path, "captions.csv", content)
    assert captions(source) == {"a.jpg": ['one, "two"\nthree'], "b.jpg": ["four"]}
    assert source.quarantine == []


def test_jsonl_may_have_several_captions_in_a_line(tmp_path: Path) -> None:
    lines = [
        {"image": "a.jpg", "captions": ["1", "2"], "split": "restval"},
        {"image": "a.jpg", "caption": "3", "split": "train"},
        {"image": "b.jpg", "caption": ["4"], "split": "dev"},
        {"image": "ü 1.jpg", "captions": ["5"], "split": "validation", "more": 1},
    ]
    text = "\ufeff" + "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    source = read(tmp_path, "captions.jsonl", text)
    assert captions(source) == {"a.jpg": ["1", "2", "3"], "b.jpg": ["4"], "ü 1.jpg": ["5"]}
    assert [row.split for row in source.rows] == ["train", "val", "val"]
    assert "1 lines of restval are used in training" in source.notes


def test_ids_of_the_table_are_taken(tmp_path: Path) -> None:
    text = "image,caption,image_id,caption_id,split\na.jpg,1,7,70,train\nb.jpg,2,-8,80,test\na.jpg,3,7,71,train\n"
    source = read(tmp_path, "captions.csv", text)
    assert source.rows == [
        Row(7, "train", tmp_path / "a.jpg", (Caption(70, "1"), Caption(71, "3"))),
        Row(-8, "test", tmp_path / "b.jpg", (Caption(80, "2"),)),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a.jpg", "there are 1 values for 2 columns"),
        ("a.jpg,b,c", "there are 3 values for 2 columns"),
        (",b", "there is no name of an image"),
        ("../x.jpg,b", "it names '../x.jpg', which is outside"),
        ("/etc/hostname,b", "it names '/etc/hostname', which is outside"),
        ("sub/../../x.jpg,b", "which is outside"),
        ("a\x00.jpg,b", "which no file can be called"),
        ('a.jpg,"b"c', "not CSV"),
        ('a.jpg,"' + "b" * 200_000 + '"', "not CSV (field larger than field limit"),
        ("a.jpg,caf\xe9".encode("latin-1"), "the line is not UTF-8"),
        (b"\xff.jpg,b", "the line is not UTF-8"),
    ],
)
def test_a_bad_line_of_csv_is_set_aside_by_its_number(tmp_path: Path, line: str | bytes, reason: str) -> None:
    line = line.encode() if isinstance(line, str) else line
    content = b'image,caption\na.jpg,"good\nas ever"\n' + line + b"\n\nb.jpg,good\n"
    source = read(tmp_path, "captions.csv", content)
    assert captions(source) == {"a.jpg": ["good\nas ever"], "b.jpg": ["good"]}
    ((number, said),) = reasons(source).items()
    assert number == 4 and reason in said


def test_a_quote_that_never_ends_takes_the_rest_and_says_so(tmp_path: Path) -> None:
    source = read(tmp_path, "captions.csv", 'image,caption\na.jpg,good\nb.jpg,"open\nsub/c.jpg,lost\nü 1.jpg,lost\n')
    assert captions(source) == {"a.jpg": ["good"]}
    ((number, said),) = reasons(source).items()
    assert number == 3 and said.endswith("through line 5")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ("5", "not an object"),
        ("[" * 100_000, "not JSON"),
        ('{"image": ' + "9" * 5000 + "}", "not JSON"),
        ("{}", "there is no name of an image; there are no values"),
        ('{"image": 5, "caption": "b"}', "there is no name of an image; there are image, caption"),
        ('{"image": "b.jpg"}', "there is no caption"),
        ('{"image": "b.jpg", "captions": []}', "there is no caption"),
        ('{"image": "b.jpg", "captions": ["a", 5]}', "there is no caption"),
        ('{"image": "b.jpg", "caption": null}', "there is no caption"),
        ('{"image": "b.jpg", "caption": {"a": 1}}', "there is no caption"),
        ('{"image": "b.jpg", "caption": "b", "split": 5}', "the split 5 is no text"),
        ('{"image": "b.jpg", "caption": "b", "image_id": "5"}', "'5' is no id"),
        ('{"image": "b.jpg", "caption": "b", "image_id": 9223372036854775808}', "more than 64 bits"),
        ('{"image": "b.jpg", "caption": "b", "caption_id": 1.5}', "1.5 is no id"),
        ('{"image": "b.jpg", "captions": ["b", "c"], "caption_id": 1}', "one caption_id stands beside several"),
        ('{"image": "a\\u0000", "caption": "b"}', "no file can be called"),
        ('{"image": "\\ud800.jpg", "caption": "b"}', "no file can be called"),
        ('{"image": "../a.jpg", "caption": "b"}', "outside"),
        (b'{"image": "b.jpg", "caption": "\xff"}', "the line is not UTF-8"),
    ],
)
def test_a_bad_line_of_jsonl_is_set_aside_by_its_number(tmp_path: Path, line: str | bytes, reason: str) -> None:
    line = line.encode() if isinstance(line, str) else line
    good = b'{"image": "a.jpg", "caption": "good"}\n'
    source = read(tmp_path, "captions.jsonl", good + b"\n" + line + b"\n" + good)
    assert captions(source) == {"a.jpg": ["good", "good"]}
    ((number, said),) = reasons(source, "captions.jsonl").items()
    assert number == 3 and reason in said


def test_a_bad_row_of_parquet_is_set_aside_by_its_number(tmp_path: Path) -> None:
    texts = pyarrow.array([b"good", b"\xff", None, b"good"], pyarrow.binary()).view(pyarrow.string())
    names = pyarrow.array(["a.jpg", "b.jpg", "b.jpg", "a.jpg"]).dictionary_encode()
    folder_of_images(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"image": names, "caption": texts}), tmp_path / "captions.parquet")
    source = datasets.open_source("mine", SourceConfig(folder=str(tmp_path)))
    assert captions(source) == {"a.jpg": ["good", "good"]}
    said = reasons(source, "captions.parquet")
    assert said[2] == "the row is not UTF-8" and said[3].startswith("there is no caption")


def test_parquet_may_have_lists_of_captions(tmp_path: Path) -> None:
    folder_of_images(tmp_path)
    table = pyarrow.table({"image": ["a.jpg", "b.jpg"], "caption": [["1", "2"], ["3"]], "image_id": [5, 6]})
    pyarrow.parquet.write_table(table, tmp_path / "captions.parquet")
    source = datasets.open_source("mine", SourceConfig(folder=str(tmp_path)))
    assert captions(source) == {"a.jpg": ["1", "2"], "b.jpg": ["3"]}
    assert [row.image_id for row in source.rows] == [5, 6]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("captions.csv", b"", "has the columns none"),
        ("captions.csv", b"image,caption\n", "no line can be used"),
        ("captions.csv", b"image,text\na.jpg,b\n", "has the columns image, text. Expected image and caption"),
        ("captions.csv", b"a.jpg,a caption\n", "Expected image and caption, and if wanted split"),
        ("captions.csv", b"image,caption,image\na.jpg,b,c\n", "image more than once"),
        ("captions.csv", b"image,caption\n,b\n,c\n", r"no line can be used\. .*captions\.csv:2: there is no name"),
        ("captions.csv", b'"image\n', "not a CSV file"),
        ("captions.jsonl", b"", "no line can be used"),
        ("captions.jsonl", b"\x00" * 50, "no line can be used"),
        ("captions.jsonl", b'{"file": "a.jpg", "text": "b"}', "there are file, text"),
        ("captions.parquet", b"", "not a whole Parquet file"),
        ("captions.parquet", b"PAR1", "not a whole Parquet file"),
        ("captions.parquet", b"PAR1" + b"\xff" * 50 + b"\x20\x00\x00\x00PAR1", "cannot be read"),
        ("captions.parquet", b"PAR1" + b"\xff" * 50 + b"\xff\xff\xff\x7fPAR1", "not a whole Parquet file"),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"captions\.\w+: .*{message}"):
        read(tmp_path, file, content)


def test_parquet_without_the_columns_is_refused_with_those_it_has(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"url": ["a"], "caption": ["b"]}), tmp_path / "captions.parquet")
    with pytest.raises(DataError, match=r"has the columns url, caption\. Expected image and caption"):
        datasets.open_source("mine", SourceConfig(folder=str(tmp_path)))


def test_parquet_of_an_extension_type_is_refused_before_its_reader_runs(tmp_path: Path) -> None:
    ran = []

    class Canary(pyarrow.ExtensionType):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(pyarrow.string(), "setwise.canary")

        def __arrow_ext_serialize__(self) -> bytes:
            return b"code"

        @classmethod
        def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> Any:
            ran.append(serialized)
            return cls()

    pyarrow.register_extension_type(Canary())
    try:
        for before in range(3):  # wherever the name falls in base64
            columns = {
                "x" * (1 + before): pyarrow.array(["b"]),
                "image": pyarrow.array(["a.jpg"]),
                "caption": pyarrow.ExtensionArray.from_storage(Canary(), pyarrow.array(["b"])),
            }
            pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "captions.parquet")
            ran.clear()
            with pytest.raises(DataError, match="extension types"):
                datasets.open_source("mine", SourceConfig(folder=str(tmp_path)))
            assert ran == []
        pyarrow.parquet.ParquetFile(tmp_path / "captions.parquet")
        assert ran == [b"code"], "this is what it is refused for"
    finally:
        pyarrow.unregister_extension_type("setwise.canary")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,caption,split\na.jpg,b,train\na.jpg,c,test\n", r"'a\.jpg' is in train and in test \(line 3\)"),
        ("image,caption,image_id\na.jpg,b,1\na.jpg,c,2\n", r"'a\.jpg' has the ids 1 and 2 \(line 3\)"),
        ("image,caption,image_id\na.jpg,b,1\nb.jpg,c,1\n", "have the same id 1"),
        ("image,caption,caption_id\na.jpg,b,1\nb.jpg,c,1\n", "caption id 1 is in images"),
        ("image,caption,split\na.jpg,b,Train\nb.jpg,c,train\n", r"has the splits 'Train' \(line 2\); known are train"),
        ("image,caption,split\na.jpg,b,train\nb.jpg,c,\n", "line 2 has a value of 'split' and line 3 has none"),
        ("image,caption,image_id\na.jpg,b,\nb.jpg,c,1\n", "line 3 has a value of 'image_id' and line 2 has none"),
        ("image,caption,caption_id\na.jpg,b,1\nb.jpg,c,\n", "line 2 has a value of 'caption_id' and line 3 has none"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, "captions.csv", content)


def test_of_many_images_in_two_splits_ten_are_named(tmp_path: Path) -> None:
    lines = [f"{number}.jpg,b,{split}" for number in range(30) for split in ("train", "val")]
    with pytest.raises(DataError, match=r"'0\.jpg' is in train and in val .*'9\.jpg' .*and 20 more"):
        read(tmp_path, "captions.csv", "image,caption,split\n" + "\n".join(lines))


def test_a_link_that_leads_outside_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.jpg").touch()
    (tmp_path / "data" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "data" / "inside.jpg").symlink_to(tmp_path / "data" / "a.jpg")
    source = read(tmp_path / "data", "captions.csv", "image,caption\nlink.jpg,b\ninside.jpg,c\n")
    assert [row.path.name for row in source.rows] == ["inside.jpg"]
    (bad,) = source.quarantine
    assert bad["image_id"] == FIRST_NUMBER and "leads outside" in bad["reason"]


def test_two_tables_are_one_too_many(tmp_path: Path) -> None:
    any_folder(tmp_path, form="csv")
    any_folder(tmp_path, form="jsonl")
    with pytest.raises(DataError, match=r"captions\.csv, captions\.jsonl\. Say which"):
        datasets.open_source("mine", SourceConfig(folder=str(tmp_path)))
    given = SourceConfig(folder=str(tmp_path), annotations=str(tmp_path / "captions.jsonl"))
    assert datasets.open_source("mine", given).files == (tmp_path / "captions.jsonl",)


def test_a_table_may_have_another_name_and_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("image,caption\na.jpg,b\n")
    folder_of_images(tmp_path / "photos")
    given = SourceConfig(folder=str(tmp_path / "photos"), annotations=str(tmp_path / "mine.csv"))
    assert datasets.open_source("mine", given).rows[0].path == tmp_path / "photos" / "a.jpg"
    missing = SourceConfig(folder=str(tmp_path / "photos"), annotations=str(tmp_path / "none.csv"))
    with pytest.raises(DataError, match=r"none\.csv: cannot be read"):
        datasets.open_source("mine", missing)


def splits_of(folder: Path, names: list[str]) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    (folder / names[0]).touch()
    lines = "".join(f"{name},a caption\n" for name in names)
    (folder / "captions.csv").write_text(f"image,caption\n{lines}")
    rows = datasets.open_source("mine", SourceConfig(folder=str(folder))).rows
    return {row.path.name: row.split for row in rows}


def test_without_splits_a_tenth_is_val_and_a_tenth_test_and_stays_so(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(4000)]
    splits = splits_of(tmp_path, names)
    shares = {split: count / 4000 for split, count in Counter(splits.values()).items()}
    assert abs(shares["val"] - 0.1) < 0.02 and abs(shares["test"] - 0.1) < 0.02
    fewer = splits_of(tmp_path, names[::-3])
    assert all(splits[name] == split for name, split in fewer.items())
    source = datasets.open_source("mine", SourceConfig(folder=str(tmp_path)))
    assert any("no column 'split'" in note for note in source.notes)


def test_without_splits_each_gets_an_image_of_three_or_more(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(1, 30):
        names = [f"{name}.jpg" for name in generator.choice(10_000, number, replace=False)]
        splits = splits_of(tmp_path / str(number), names)
        expected = {"train", "val", "test"} if number >= 3 else {"train"}
        assert set(splits.values()) == expected and len(splits) == number
