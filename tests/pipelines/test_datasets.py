"""Annotation files as they should not be: each is refused by name, none is a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from setwise.pipelines import datasets
from setwise.pipelines.datasets import read_karpathy
from setwise.platform.errors import DataError

GOOD: dict[str, Any] = {
    "filename": "1.jpg",
    "split": "train",
    "imgid": 1,
    "sentences": [{"raw": "a", "sentid": 1}],
}


def read(folder: Path, content: Any) -> list[datasets.Row]:
    file = folder / "dataset.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_karpathy(file, folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"{",
        {},
        [],
        "images",
        None,
        {"images": 5},
        {"images": None},
        {"images": True},
        {"images": "text"},
        {"images": {"a": 1}},
        {"images": [5]},
        {"images": [None]},
        {"images": [[]]},
        {"images": ["text"]},
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
        ("imgid", float("inf")),
        ("imgid", float("nan")),
        ("imgid", 2**70),  # does not fit the shards' int64
        ("imgid", [1]),
        ("cocoid", None),
        ("filename", None),
        ("filename", 3),
        ("filename", "nul\x00.jpg"),
        ("filename", "../1.jpg"),
        ("filename", "/etc/hostname"),
        ("filepath", "../.."),
        ("filepath", 3),
        ("sentences", None),
        ("sentences", 3),
        ("sentences", [3]),
        ("sentences", [{}]),
        ("sentences", [{"raw": "a"}]),
        ("sentences", [{"sentid": 1}]),
        ("sentences", [{"raw": "a", "sentid": "x"}]),
        ("sentences", [{"raw": "a", "sentid": 1}, {"raw": "b", "sentid": 1}]),
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
    assert row == datasets.Row(42, "train", tmp_path / "sub" / "1.jpg", (datasets.Caption(1, "a"),))
