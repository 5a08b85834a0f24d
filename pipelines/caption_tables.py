"""Any folder of images with a table of captions: `captions.csv`, `captions.jsonl` or `captions.parquet`.

    image        name of the file, relative to the folder, or to `images` in it
    caption      text; an image has as many rows as captions, in any order. JSONL and Parquet may have lists of texts
    split        optional: train, val (also dev, validation), test, or restval, which is training
    image_id     optional integers; else images are numbered in the order in which they come
    caption_id   optional integers, for tables of one caption a row; else captions are numbered

A line that cannot be used is set aside with its number and the reason; a table that contradicts itself is refused.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from setwise.pipelines import datasets
from setwise.pipelines.datasets import SPLITS, Caption, ImageFolder, Row, Source, as_id, listed
from setwise.platform.errors import DataError

SUFFIXES = (".csv", ".jsonl", ".parquet")
FILES = tuple(f"captions{suffix}" for suffix in SUFFIXES)
PLACES = (".", "images")
REQUIRED = ("image", "caption")
OPTIONAL = ("split", "image_id", "caption_id")
SPLIT_NAMES = {"train": "train", "restval": "train", "val": "val", "dev": "val", "validation": "val", "test": "test"}
HELD_OUT = 0.1
"""Share of the images that go to val, and to test, where the table has no splits."""

Record = tuple[int, dict[str, Any] | str]
"""The line of a table, counted from one, and what it says, or why it says nothing."""


@dataclass
class Listed:
    """An image as the table lists it."""

    image_id: int | None
    split: str | None
    captions: list[tuple[int | None, str]] = field(default_factory=list)


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
    records = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}[file.suffix]
    try:
        table, quarantine, notes = _collect(file, records(file))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error
    if not table:
        first = listed([f"{bad['path']}: {bad['reason']}" for bad in quarantine[:3]], "; ")
        raise DataError(f"{file}: no line can be used. {first or 'It has none'}")
    root = ImageFolder(datasets.find_images(folder, images, PLACES, list(table)))
    if all(image.split is None for image in table.values()):
        splits = _split_by_name(list(table))
        notes.append(
            f"{file.name} has no column 'split': {HELD_OUT:.0%} of the images are val and as many test, by a hash of "
            "their names"
        )
    else:
        splits = {image_name: str(image.split) for image_name, image in table.items()}
    rows = []
    next_caption = datasets.FIRST_NUMBER
    for number, (image_name, image) in enumerate(table.items(), datasets.FIRST_NUMBER):
        image_id = number if image.image_id is None else image.image_id
        captions = []
        for caption_id, text in image.captions:
            captions.append(Caption(next_caption if caption_id is None else caption_id, text))
            next_caption += 1
        try:
            path = root.path(image_name)
        except ValueError as error:
            bad = {"image_id": image_id, "caption_id": None, "path": f"{file}", "reason": f"it names {error}"}
            quarantine.append(bad)
            continue
        rows.append(Row(image_id, splits[image_name], path, tuple(captions)))
    return Source(name, "images", rows, (file,), quarantine, notes, None)


def _collect(file: Path, records: Iterator[Record]) -> tuple[dict[str, Listed], list[dict[str, Any]], list[str]]:
    """The images by name in the order in which they first come, what is set aside, and the notes."""
    table: dict[str, Listed] = {}
    quarantine: list[dict[str, Any]] = []
    wrong_splits: dict[str, int] = {}
    contradictions: dict[str, str] = {}
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
        image = table.setdefault(image_name, Listed(image_id, split))
        if image.split != split:
            contradictions[image_name] = f"'{image_name}' is in {image.split} and in {split} (line {line})"
        elif image.image_id != image_id:
            contradictions[image_name] = f"'{image_name}' has the ids {image.image_id} and {image_id} (line {line})"
        image.captions += captions
    if wrong_splits:
        found = listed([f"'{split}' (line {line})" for split, line in wrong_splits.items()])
        raise DataError(f"{file}: has the splits {found}; known are {', '.join(SPLIT_NAMES)}")
    if contradictions:
        raise DataError(f"{file}: {listed(contradictions.values(), '; ')}")
    for key, lines in lines_with.items():
        if len(lines) > 1:
            raise DataError(
                f"{file}: line {lines[True]} has a value of '{key}' and line {lines[False]} has none. Give one in "
                "every line, or in none"
            )
    notes = [f"{restval:,} lines of restval are used in training"] if restval else []
    return table, quarantine, notes


def _interpreted(content: dict[str, Any] | str) -> tuple[str, str | None, int | None, list[tuple[int | None, str]]]:
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


def _check_columns(file: Path, found: list[str]) -> None:
    if any(character == "\x00" or "\udc80" <= character <= "\udcff" for character in "".join(found)):
        raise DataError(f"{file}: is not UTF-8. Store it as UTF-8, as spreadsheets do when asked for 'CSV UTF-8'")
    repeated = sorted({column for column in found if found.count(column) > 1})
    if not set(REQUIRED) <= set(found) or repeated:
        twice = f" {listed(repeated)} more than once." if repeated else ""
        raise DataError(
            f"{file}: has the columns {listed(found) or 'none'}.{twice} Expected {' and '.join(REQUIRED)}, and if "
            f"wanted {', '.join(OPTIONAL)}"
        )


def _csv(file: Path) -> Iterator[Record]:
    """The lines of a CSV file, with quotes as in RFC 4180. Bytes that are not UTF-8 become lone surrogates."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = [column.strip() for column in next(reader, [])]
        except csv.Error as error:
            raise DataError(f"{file}: not a CSV file ({error})") from error
        _check_columns(file, header)
        line = reader.line_num
        while True:
            first, line = line + 1, line
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                line = reader.line_num
                through = f", through line {line}" if line > first else ""
                yield first, f"not CSV ({error}){through}"
                continue
            line = reader.line_num
            if not values:
                continue
            if len(values) != len(header):
                yield first, f"there are {len(values)} values for {len(header)} columns"
                continue
            content: dict[str, Any] = dict(zip(header, values, strict=True))
            try:
                for key in ("image_id", "caption_id"):
                    if content.get(key):
                        content[key] = int(content[key])
            except ValueError as error:
                yield first, str(error)
                continue
            yield first, content


def _jsonl(file: Path) -> Iterator[Record]:
    """The lines of a file of JSON objects, in which `captions` may be a list."""
    with file.open("rb") as stream:
        for line, data in enumerate(stream, 1):
            data = data.removeprefix(b"\xef\xbb\xbf") if line == 1 else data
            if not data.strip():
                continue
            try:
                content = json.loads(data.decode())
            except UnicodeDecodeError:
                yield line, "the line is not UTF-8"
                continue
            except (ValueError, RecursionError) as error:
                yield line, f"not JSON ({error})"
                continue
            if not isinstance(content, dict):
                yield line, "not an object {...}"
                continue
            if "captions" in content:
                content["caption"] = content.pop("captions")
            yield line, content


def _parquet(file: Path) -> Iterator[Record]:
    """The rows of a Parquet file of plain columns."""
    import pyarrow
    import pyarrow.parquet

    if _has_extension_types(file):
        raise DataError(
            f"{file}: has columns of extension types, and reading such a type may run code. Write plain columns of text"
        )
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            found = parquet.schema_arrow.names
            _check_columns(file, found)
            columns = [name for name in (*REQUIRED, *OPTIONAL) if name in found]
            row = 0
            for batch in parquet.iter_batches(4096, columns=columns):
                for index in range(batch.num_rows):
                    row += 1
                    try:
                        yield row, {name: batch.column(name)[index].as_py() for name in columns}
                    except UnicodeDecodeError:
                        yield row, "the row is not UTF-8"
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{file}: not a whole Parquet file ({error})") from error


def _has_extension_types(file: Path) -> bool:
    """Whether the footer names an Arrow extension type.

    Arrow's schema stands in the footer in base64; opening the file would hand it to whoever registered the type, Ray
    among them.
    """
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - 8))
        footer = int.from_bytes(stream.read(4), "little")
        if footer > size:  # it will not be read at all
            return False
        stream.seek(max(0, size - 8 - footer))
        content = stream.read(footer)
    # In base64 a text looks in three ways, by where it begins; its ends depend on what stands beside it.
    ways = (base64.b64encode(b"\0" * shift + b"ARROW:extension:name")[4:-4] for shift in range(3))
    return any(way in content for way in ways)


def _split_by_name(names: list[str]) -> dict[str, str]:
    """A split for each image by a hash of its name, so that it stays there when others are added.

    Of three images or more, each split gets one at least.
    """
    share = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 for name in names}
    if len(names) < len(SPLITS):
        return dict.fromkeys(names, "train")
    splits = {
        name: "val" if value < HELD_OUT else "test" if value < 2 * HELD_OUT else "train"
        for name, value in share.items()
    }
    for split in SPLITS:
        members = {other: [name for name in names if splits[name] == other] for other in SPLITS}
        if not members[split]:
            largest = max(members.values(), key=len)
            splits[min(largest, key=share.__getitem__)] = split
    return splits
