"""Rows in columns: the same rows as objects would be, in few bytes each, and handed to Ray Data some at a time."""

from __future__ import annotations

import json
import random
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from setwise.pipelines import datasets, identity, prepare, shard_tasks, shards
from setwise.pipelines.datasets import FIRST_NUMBER, SPLITS, Caption, Row, Source, SourceConfig
from setwise.pipelines.rows import Rows, Texts
from setwise.platform import cluster

BEYOND_TEXT_BYTES = 200
"""A row may take so much in the driver, at the most and all at once, beside its name and caption."""
TEXTS = ("", "a red three", "ü 三 🙂", "half \ud800 pair", "a\x00b", " two  words ")


def some_rows(generator: random.Random, folder: Path, places: bool = False) -> list[Row]:
    rows = []
    for number in range(generator.randrange(30)):
        captions = tuple(
            Caption(1000 * number + other, generator.choice(TEXTS)) for other in range(generator.randrange(4))
        )
        name = generator.choice(("a.jpg", "b/c.jpg", "b/ü 三.jpg", "bc.jpg"))
        place = generator.randrange(50) if places else None
        rows.append(Row(generator.randrange(-9, 9), generator.choice(SPLITS), folder / name, captions, place))
    return rows


@pytest.mark.parametrize("folder", [Path("/data/images"), Path("/"), Path(), Path("relative")])
@pytest.mark.parametrize("places", [False, True])
def test_rows_in_columns_are_those_that_were_given(folder: Path, places: bool) -> None:
    generator = random.Random(0)
    for _ in range(40):
        given = some_rows(generator, folder, places)
        rows = Rows.of(given)
        assert list(rows) == given and rows == given and len(rows) == len(given) and Rows.of(rows) is rows
        assert rows != [*given, Row(0, "train", folder, ())]
        assert [rows[place] for place in range(-len(given), len(given))] == given * 2
        assert rows.has_places == any(row.place is not None for row in given)


def test_what_is_selected_is_what_lists_would_have(tmp_path: Path) -> None:
    generator = random.Random(1)
    for _ in range(60):
        given = some_rows(generator, tmp_path)
        rows, limit = Rows.of(given), generator.randrange(1, 4)
        begin, end = generator.randrange(10), generator.randrange(40)
        assert rows[begin:end] == given[begin:end]
        for split in SPLITS:
            own = [row for row in given if row.split == split]
            assert rows.of_split(split) == own and rows.of_split(split)[::-2] == own[::-2]
        fewer = [replace(row, captions=row.captions[:limit]) for row in given][begin:]
        cut = rows[begin:].with_captions(limit)
        assert cut == fewer and cut.with_captions(9) == fewer
        assert cut.image_ids.tolist() == [row.image_id for row in fewer]
        assert cut.caption_numbers.tolist() == [len(row.captions) for row in fewer]
        assert cut.caption_ids.tolist() == [caption.caption_id for row in fewer for caption in row.captions]
        ids = [row.image_id for row in given]
        assert rows.with_repeated_id() == [row for row in given if ids.count(row.image_id) > 1]


def test_texts_that_differ_are_numbered_as_they_first_come() -> None:
    texts = Texts.none()
    for text in ("b", "a", "", "b", "ü", "", "a"):
        texts.append(text)
    numbers, distinct = texts.distinct()
    assert numbers.tolist() == [0, 1, 2, 0, 3, 2, 1] and list(distinct) == ["b", "a", "", "ü"]
    assert list(texts.take([4, 0])) == ["ü", "b"] and texts[-3:] == ["ü", "", "a"]
    with pytest.raises(IndexError):
        texts[7]


@pytest.mark.parametrize("has_ids", [False, True])
def test_lines_in_any_order_are_grouped_as_a_dictionary_would(tmp_path: Path, has_ids: bool) -> None:
    generator = random.Random(2)
    for trial in range(20):
        folder = tmp_path / f"{trial}"
        folder.mkdir()
        (folder / "0.jpg").touch()
        lines: list[dict[str, Any]] = []
        for number in range(40):
            image = generator.randrange(number // 2 + 1)
            line: dict[str, Any] = {"image": f"{image}.jpg", "split": SPLITS[image % 3]}
            if has_ids:
                lines.append(line | {"image_id": image + 70, "caption_id": 900 - number, "caption": f"text {number}"})
            else:
                lines.append(line | {"captions": [f"text {number}, {each}" for each in range(1 + number % 3)]})
        (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
        grouped: dict[str, list[dict[str, Any]]] = {}
        for line in lines:
            grouped.setdefault(line["image"], []).append(line)
        expected, following = [], FIRST_NUMBER
        for place, (name, own) in enumerate(grouped.items()):
            captions = []
            for line in own:
                for text in line.get("captions", [line.get("caption")]):
                    captions.append(Caption(line.get("caption_id", following), text))
                    following += 1
            image_id = own[0].get("image_id", FIRST_NUMBER + place)
            expected.append(Row(image_id, own[0]["split"], folder / name, tuple(captions)))
        assert datasets.open_source("mine", SourceConfig(folder=str(folder))).rows == expected


def table(folder: Path, rows: int, form: str) -> SourceConfig:
    """A data set of which one image is there; those that are not have to be counted all the same."""
    folder.mkdir()
    (folder / "000000000.jpg").touch()
    lines = [{"image": f"{number:09}.jpg", "caption": f"caption number {number:09}"} for number in range(rows)]
    if form == "jsonl":
        (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), folder / "captions.parquet")
    return SourceConfig(folder=str(folder))


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that Python and numpy held at once, and Arrow at the end, more than before."""
    arrow = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    try:
        kept = work()
        held_by_arrow = pyarrow.total_allocated_bytes() - arrow
        peak = tracemalloc.get_traced_memory()[1]
        del kept
    finally:
        tracemalloc.stop()
    return peak + held_by_arrow


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_row_takes_few_bytes_of_the_driver(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that is done with rows there: reading, knowing them again, tasks, counting what was lost."""
    monkeypatch.setattr(sys, "intern", str)  # pathlib fills the table of the process with it, which grows in leaps
    monkeypatch.setattr(identity, "EACH", 2)  # so that what is under way at once, always as much, counts little

    def work(config: SourceConfig) -> object:
        source = datasets.open_source("many", config)
        known = identity.of(source, identity.features(source))
        tasks = list(prepare._tasks(Rows.of(source.rows), 50))
        for _, rows in tasks:
            shards.dump_rows(rows)
        counts = {split: {"images": len(Rows.of(source.rows).of_split(split))} for split in SPLITS}
        return source, known, tasks, shards.check_losses(source, counts, [], 0)

    few, many = table(tmp_path / "few", 3_000, form), table(tmp_path / "many", 9_000, form)
    work(few)  # what is imported and kept at the first time is no row's
    growth = (peak_bytes(lambda: work(many)) - peak_bytes(lambda: work(few))) / 6_000
    text = len("000000000.jpg" + "caption number 000000000")
    assert text < growth < text + BEYOND_TEXT_BYTES


def test_ray_data_is_given_some_tasks_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[dict[str, str]]] = []

    class Dataset:
        def __init__(self, items: list[dict[str, str]], override_num_blocks: int) -> None:
            assert override_num_blocks == len(items)
            given.append(items)

        def map(self, write: Callable[[dict[str, str]], dict[str, str]], concurrency: int) -> Dataset:
            assert concurrency == 2
            return self

        def iter_rows(self) -> Iterator[dict[str, str]]:
            return ({"file": item["file"], "wrong": "", "unwritable": ""} for item in given[-1])

    import ray.data

    monkeypatch.setattr(ray.data, "from_items", Dataset)
    monkeypatch.setattr(cluster, "cpus", lambda: 3)
    rows = [Row(number, "train", tmp_path / f"{number}.jpg", (Caption(number, "words"),)) for number in range(300)]
    tasks = list(prepare._tasks(Rows.of(rows), 2))
    shard_tasks.run(tasks, tmp_path, None, 90, False)
    assert [len(items) for items in given] == [64, 64, 22]
    assert [item["file"] for items in given for item in items] == [file for file, _ in tasks]
    assert [row for items in given for item in items for row in shards.load_rows(item["rows"])] == rows


def test_a_source_that_says_images_and_has_features_is_refused(tmp_path: Path) -> None:
    for kind, place, message in (("images", 3, "has rows of features"), ("regions", None, "image 1 .* has no place")):
        rows = [Row(1, "train", tmp_path / "x", (Caption(1, "words"),), place)]
        with pytest.raises(ValueError, match=message):
            identity.features(Source("mixed", kind, rows, (), [], [], None))  # type: ignore[arg-type]
