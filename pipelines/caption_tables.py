"""Any folder of images with a table of captions: `captions.csv`, `captions.jsonl` or `captions.parquet`.

    image        name of the file, relative to the folder, or to `images` in it
    caption      text; an image has as many rows as captions, in any order. JSONL and Parquet may have lists of texts
    split        optional: train, val (also dev, validation), test, or restval, which is training
    image_id     optional integers; else images are numbered in the order in which they come
    caption_id   optional integers, for tables of one caption a row; else captions are numbered

A line that cannot be used is set aside with its number and the reason; a table that contradicts itself is refused.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from setwise.pipelines import datasets, table_lines
from setwise.pipelines.datasets import SPLITS, ImageFolder, Source, as_id, listed
from setwise.pipelines.rows import Columns, Rows, Texts
from setwise.pipelines.table_lines import OPTIONAL, SUFFIXES, Record
from setwise.platform.errors import DataError

FILES = tuple(f"captions{suffix}" for suffix in SUFFIXES)
PLACES = (".", "images")
SPLIT_NAMES = {"train": "train", "restval": "train", "val": "val", "dev": "val", "validation": "val", "test": "test"}
HELD_OUT = 0.1
"""Share of the images that go to val, and to test, where the table has no splits."""

NO_SPLIT = -1

Numbered = tuple[int | None, str]
"""The id of a caption, where the table has them, and its text."""


class Table:
    """The lines of a table that can be used, in columns: L lines, C captions."""

    def __init__(self) -> None:
        self.lines = array("q")
        """(L,): their numbers."""
        self.names = Texts.none()
        self.splits = array("b")
        """(L,): numbers in SPLITS, NO_SPLIT where the table has none."""
        self.image_ids = array("q")
        """(L,): 0 where the table has none."""
        self.captions_of_line = array("q")
        """(L,): how many there are."""
        self.caption_ids = array("q")
        """(C,): 0 where the table has none."""
        self.captions = Texts.none()
        self.has_splits = self.has_image_ids = self.has_caption_ids = False

    def append(self, line: int, name: str, split: str | None, image_id: int | None, captions: list[Numbered]) -> None:
        self.lines.append(line)
        self.names.append(name)
        self.splits.append(NO_SPLIT if split is None else SPLITS.index(split))
        self.image_ids.append(image_id or 0)
        self.captions_of_line.append(len(captions))
        for caption_id, text in captions:
            self.caption_ids.append(caption_id or 0)
            self.captions.append(text)


def find(folder: Path) -> Path | None:
    """The table in the folder; None if there is none. Raises DataError if there are several."""
    found = [folder / file for file in FILES if (folder / file).is_file()]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{folder}: holds {names}. Say which it is: source.annotations=FILE")
    return found[0] if found else None


def read(name: str, file: Path, folder: Path, images: str | None) -> Source:
    """The data set of a table.

    Args:
        folder: the data set's, in which the images are looked for.
        images: the folder that image names are relative to, where it is known.

    Raises:
        DataError: the table is missing, lacks a column, has no usable line, or contradicts itself.
    """
    try:
        table, quarantine, notes = _collect(file, table_lines.read(file))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error
    if not table.lines:
        first = listed([f"{bad['path']}: {bad['reason']}" for bad in quarantine[:3]], "; ")
        raise DataError(f"{file}: no line can be used. {first or 'It has none'}")
    numbers, names = table.names.distinct()
    _check_agreement(file, table, numbers, names)
    first_line = _first_lines(numbers)
    root = ImageFolder(datasets.find_images(folder, images, PLACES, names))
    if table.has_splits:
        splits = np.asarray(table.splits)[first_line]
    else:
        splits = _split_by_name(names)
        notes.append(
            f"{file.name} has no column 'split': {HELD_OUT:.0%} of the images are val and as many test, by a hash of "
            "their names"
        )
    image_ids = np.asarray(table.image_ids)[first_line]
    if not table.has_image_ids:
        image_ids = datasets.FIRST_NUMBER + np.arange(len(names))
    first_caption, caption_ids, captions = _by_image(table, numbers)
    usable = np.ones(len(names), bool)
    for place, image_name in enumerate(names):
        try:
            root.path(image_name)
        except ValueError as error:
            bad = {"image_id": int(image_ids[place]), "caption_id": None, "path": f"{file}"}
            quarantine.append({**bad, "reason": f"it names {error}"})
            usable[place] = False
    prefix = str(root.folder / "x")[:-1]
    rows = Rows(Columns(prefix, names, image_ids, splits, None, first_caption, caption_ids, captions)).where(usable)
    return Source(name, "images", rows, (file,), quarantine, notes, None)


def _collect(file: Path, records: Iterator[Record]) -> tuple[Table, list[dict[str, Any]], list[str]]:
    """The lines that can be used, what is set aside, and the notes."""
    table = Table()
    quarantine: list[dict[str, Any]] = []
    wrong_splits: dict[str, int] = {}
    lines_with: dict[str, dict[bool, int]] = {key: {} for key in OPTIONAL}  # and without: the first of each
    restval = 0
    for line, content in records:
        try:
            image_name, split, image_id, captions = _interpreted(content)
        except (TypeError, ValueError) as error:
            bad = {"image_id": None, "caption_id": None, "path": f"{file}:{line}", "reason": str(error)}
            quarantine.append(bad)
            continue
        if split is not None and split not in SPLIT_NAMES:
            wrong_splits.setdefault(split, line)
            continue
        restval += split == "restval"
        split = SPLIT_NAMES[split] if split is not None else None
        for key, value in zip(OPTIONAL, (split, image_id, captions[0][0]), strict=True):
            lines_with[key].setdefault(value is not None, line)
        table.append(line, image_name, split, image_id, captions)
    if wrong_splits:
        found = listed([f"'{split}' (line {line})" for split, line in wrong_splits.items()])
        raise DataError(f"{file}: has the splits {found}; known are {', '.join(SPLIT_NAMES)}")
    for key, lines in lines_with.items():
        if len(lines) > 1:
            raise DataError(
                f"{file}: line {lines[True]} has a value of '{key}' and line {lines[False]} has none. Give one in "
                "every line, or in none"
            )
    table.has_splits, table.has_image_ids, table.has_caption_ids = (True in lines_with[key] for key in OPTIONAL)
    notes = [f"{restval:,} lines of restval are used in training"] if restval else []
    return table, quarantine, notes


def _first_lines(numbers: np.ndarray) -> np.ndarray:
    """Of each image the place of its first line. `numbers`, (L,), are the images' numbers as they first come."""
    first = np.empty(int(numbers.max()) + 1, np.int64)
    first[numbers[::-1]] = np.arange(len(numbers))[::-1]  # of several, the last that is written stays
    return first


def _check_agreement(file: Path, table: Table, numbers: np.ndarray, names: Texts) -> None:
    """Raises DataError if two lines of an image have another split or another id of it."""
    first = _first_lines(numbers)[numbers]
    differs = [column[first] != column for column in map(np.asarray, (table.splits, table.image_ids))]
    contradictions: dict[str, str] = {}
    for place in np.flatnonzero(differs[0] | differs[1]).tolist():
        name, before, line = names[int(numbers[place])], int(first[place]), table.lines[place]
        if differs[0][place]:
            splits = SPLITS[table.splits[before]], SPLITS[table.splits[place]]
            contradictions[name] = f"'{name}' is in {splits[0]} and in {splits[1]} (line {line})"
        else:
            ids = table.image_ids[before], table.image_ids[place]
            contradictions[name] = f"'{name}' has the ids {ids[0]} and {ids[1]} (line {line})"
    if contradictions:
        raise DataError(f"{file}: {listed(contradictions.values(), '; ')}")


def _by_image(table: Table, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, Texts]:
    """Where the captions of each image begin, their ids, and the captions, image by image."""
    owners = np.repeat(numbers, np.asarray(table.captions_of_line))
    first_caption = np.concatenate(([0], np.cumsum(np.bincount(owners))))
    caption_ids, captions = np.asarray(table.caption_ids), table.captions
    if (np.diff(owners) < 0).any():
        order = np.argsort(owners, kind="stable")
        caption_ids, captions = caption_ids[order], captions.take(order.tolist())
    if not table.has_caption_ids:
        caption_ids = datasets.FIRST_NUMBER + np.arange(len(caption_ids))
    return first_caption, caption_ids, captions


def _interpreted(content: dict[str, Any] | str) -> tuple[str, str | None, int | None, list[Numbered]]:
    """Image, split, image id and captions of a line. Raises TypeError or ValueError with the reason if it has none."""
    if isinstance(content, str):
        raise ValueError(content)  # noqa: TRY004 - the reader's reason
    name, caption, split = content.get("image"), content.get("caption"), content.get("split")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"there is no name of an image; there are {listed(content) or 'no values'}")
    given = caption if isinstance(caption, list) else [caption]
    texts = [text for text in given if isinstance(text, str)]
    if not texts or len(texts) < len(given):
        raise ValueError(f"there is no caption; there are {listed(content)}")
    if any("\udc80" <= character <= "\udcff" for text in (name, *texts) for character in text):
        raise ValueError("the line is not UTF-8")
    if split is not None and not isinstance(split, str):
        raise ValueError(f"the split {split!r} is no text")
    ids = [None if content.get(key) in (None, "") else as_id(content[key]) for key in ("image_id", "caption_id")]
    if ids[1] is not None and len(texts) > 1:
        raise ValueError("one caption_id stands beside several captions")
    try:
        datasets.check_name(name)
    except ValueError as error:
        raise ValueError(f"it names {error}") from error
    captions = [(ids[1], text) for text in texts]
    return str(PurePosixPath(name)), (split or "").strip() or None, ids[0], captions


def _split_by_name(names: Texts) -> np.ndarray:
    """A split for each image, as its number, by a hash of its name, so that it stays there when others are added.

    Of three images or more, each split gets one at least.
    """
    if len(names) < len(SPLITS):
        return np.zeros(len(names), np.int8)
    digests = (hashlib.sha256(names.encoded(place)).digest() for place in range(len(names)))
    shares = (int.from_bytes(digest[:8], "big") / 2**64 for digest in digests)
    share = np.fromiter(shares, np.float64, len(names))
    train, val, test = range(len(SPLITS))
    splits = np.where(share < HELD_OUT, val, np.where(share < 2 * HELD_OUT, test, train)).astype(np.int8)
    for split in (train, val, test):
        numbers = np.bincount(splits, minlength=len(SPLITS))
        if not numbers[split]:
            largest = np.flatnonzero(splits == numbers.argmax())
            splits[largest[share[largest].argmin()]] = split
    return splits
