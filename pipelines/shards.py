"""Parquet shards: images as JPEGs, or rows of region features, with the captions written for them, one row an image.

    train-00000.parquet       image_id int64, image binary (JPEG) or place int64, caption_ids list<int64>,
                              captions list<string>, in the order of the data set
    train-00000.offsets.npy   for JPEGs: where each begins in the Parquet file and how long it is, (images, 2) int64
    train-00000.json          counts, hashes, and what was left out with the reason; written last of the three

JPEGs stand uncompressed and unbroken in the file, so that whoever reads them maps the file into memory and takes
slices. Region features stay in the `.npy` file that they came in; `place` is a row of it.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from setwise.pipelines import feature_files, table_lines
from setwise.pipelines.datasets import Caption, Row, Source
from setwise.pipelines.images import BadImageError, encode_jpeg, may_stay, read_file, read_rgb, resize_shorter_side
from setwise.pipelines.rows import Rows
from setwise.platform import storage
from setwise.platform.errors import DataError

if TYPE_CHECKING:
    import pyarrow

MAX_CAPTION_CHARACTERS = 5_000


@dataclass(frozen=True)
class Shard:
    """What was written, and what was left out with the reason."""

    file: str
    images: int
    captions: int
    bytes: int
    sha256: str
    offsets_sha256: str | None
    """None for region features."""
    quarantine: list[dict[str, Any]]


def dump_rows(rows: Iterable[Row]) -> str:
    return json.dumps(
        [[r.image_id, r.split, str(r.path), [[c.caption_id, c.text] for c in r.captions], r.place] for r in rows]
    )


def load_rows(text: str) -> list[Row]:
    return [
        Row(image_id, split, Path(path), tuple(Caption(*caption) for caption in captions), place)
        for image_id, split, path, captions, place in json.loads(text)
    ]


def write(path: Path, rows: list[Row], shorter_side: int | None, quality: int, halved_colour: bool = False) -> Shard:
    """Check `rows`, decode, resize and store their images as one shard, or store where their features are.

    An image that cannot be used, features that are no numbers, and a caption without text are left out and listed with
    the reason; an image without any usable caption is left out too. The bytes depend on nothing but the arguments and
    the images. A process that is killed meanwhile leaves no shard.

    Raises:
        DataError: a file of features that cannot be used at all.
    """
    import pyarrow
    import pyarrow.parquet

    has_features = bool(rows) and rows[0].place is not None
    stored = "place" if has_features else "image"
    columns: dict[str, list[Any]] = {name: [] for name in ("image_id", stored, "caption_ids", "captions")}
    quarantine: list[dict[str, Any]] = []

    def set_aside(row: Row, caption: Caption | None, reason: str) -> None:
        caption_id = None if caption is None else caption.caption_id
        quarantine.append({"image_id": row.image_id, "caption_id": caption_id, "path": str(row.path), "reason": reason})

    features = feature_files.open_features(rows[0].path) if has_features else None
    for row in rows:
        good = []
        for caption in row.captions:
            reason = caption_problem(caption.text)
            if reason:
                set_aside(row, caption, reason)
            else:
                good.append(Caption(caption.caption_id, " ".join(caption.text.split())))
        if not good:
            set_aside(row, None, "no usable caption")
            continue
        if features is not None:
            assert row.place is not None and row.path == rows[0].path, "the features of a shard are in one file"
            if reason := feature_files.problem(features, row.place):
                set_aside(row, None, reason)
                continue
            columns[stored].append(row.place)
        else:
            try:
                columns[stored].append(_stored_jpeg(read_file(row.path), shorter_side, quality, halved_colour))
            except OSError as error:
                set_aside(row, None, f"cannot be read: {error.strerror}")
                continue
            except BadImageError as error:
                set_aside(row, None, str(error))
                continue
        columns["image_id"].append(row.image_id)
        columns["caption_ids"].append([caption.caption_id for caption in good])
        columns["captions"].append([caption.text for caption in good])

    integers, strings = pyarrow.list_(pyarrow.int64()), pyarrow.list_(pyarrow.string())
    types = (pyarrow.int64(), pyarrow.int64() if has_features else pyarrow.binary(), integers, strings)
    table = pyarrow.table(
        {name: pyarrow.array(values, kind) for (name, values), kind in zip(columns.items(), types, strict=True)}
    )
    stream = io.BytesIO()
    pyarrow.parquet.write_table(
        table,
        stream,
        row_group_size=max(len(rows), 1),
        compression={name: "none" if name == "image" else "zstd" for name in _leaves(stored)},
        use_dictionary=False,  # a dictionary of images would be cut where it grows too large
    )
    content = stream.getvalue()
    offsets = None if has_features else _offsets(content, columns[stored])
    storage.write_bytes(path, content)
    if offsets is not None:
        storage.write_bytes(_beside(path, ".offsets.npy"), offsets)
    shard = Shard(
        file=path.name,
        images=table.num_rows,
        captions=sum(map(len, columns["captions"])),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        offsets_sha256=None if offsets is None else hashlib.sha256(offsets).hexdigest(),
        quarantine=quarantine,
    )
    storage.write_json(_beside(path, ".json"), asdict(shard))
    return shard


def written(path: Path) -> Shard | None:
    """The shard at `path`, if it was written to its end."""
    try:
        shard = Shard(**storage.read_json(_beside(path, ".json")))
    except (OSError, ValueError, TypeError):
        return None
    return shard if is_whole(path.parent, asdict(shard)) else None


def is_whole(folder: Path, shard: Mapping[str, Any]) -> bool:
    """Whether the files of a shard, as a manifest lists it, are there and as long as they were written."""
    path = folder / str(shard["file"])
    if not path.is_file() or path.stat().st_size != shard["bytes"]:
        return False
    return shard["offsets_sha256"] is None or _beside(path, ".offsets.npy").is_file()


def check_losses(
    source: Source, splits: Mapping[str, Any], quarantine: list[dict[str, Any]], allowed: float
) -> list[str]:
    """What val and test lack, a sentence each, of the splits that were written.

    Args:
        quarantine: all that was left out, by the reader and here. Of what names no image it is not known how many
            images it is of, so it counts among the captions.
        allowed: share of the images, and of the captions, that may be left out.

    Raises:
        DataError: more was left out, or all of a split.
    """
    lines = [bad for bad in quarantine if bad["image_id"] is None]
    rows = Rows.of(source.rows)
    captions = int(rows.caption_numbers.sum()) + len(lines)
    images = [bad for bad in quarantine if bad["image_id"] is not None and bad["caption_id"] is None]
    total = len(np.union1d(rows.image_ids, np.array([bad["image_id"] for bad in images], np.int64)))
    lost = total - sum(split["images"] for split in splits.values())
    for bad, number, of, what in ((lines, len(lines), captions, "captions"), (images, lost, total, "images")):
        if number > allowed * of:
            raise DataError(
                f"{number:,} of {of:,} {what} cannot be used, more than the {allowed:.1%} that prepare.max_bad_share "
                f"allows. The first: {_reasons(bad)}"
            )
    lacking = []
    for name, split in splits.items():
        wanted = np.unique(rows.of_split(name).image_ids)
        if not split["images"]:
            own = set(wanted.tolist())
            why = _reasons([bad for bad in images if bad["image_id"] in own])
            raise DataError(f"none of the {len(wanted):,} images of {name} can be used. The first: {why}")
        if name != "train" and (fewer := len(wanted) - split["images"]):
            lacking.append(
                f"{name} lacks {fewer:,} of {len(wanted):,} images, which cannot be used: numbers will be of another "
                f"{name} than with all of them"
            )
    return lacking


def _reasons(quarantine: list[dict[str, Any]]) -> str:
    return "; ".join(f"{bad['path']}: {bad['reason']}" for bad in quarantine[:3])


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.stem + suffix)


def _leaves(stored: str) -> tuple[str, ...]:
    """The columns as Parquet names them, lists by their elements."""
    return "image_id", stored, "caption_ids.list.element", "captions.list.element"


def caption_problem(text: object) -> str | None:
    if not isinstance(text, str) or not text.strip():
        return "the caption is empty"
    if len(text) > MAX_CAPTION_CHARACTERS:
        return f"the caption has {len(text):,} characters; the limit is {MAX_CAPTION_CHARACTERS:,}"
    if "\x00" in text or "\ufffd" in text or any("\ud800" <= character <= "\udfff" for character in text):
        return "the caption holds bytes that are not text"
    return None


def _stored_jpeg(data: bytes, shorter_side: int | None, quality: int, halved_colour: bool) -> bytes:
    """The JPEG to store: the original bytes where nothing has to be changed, since each encoding loses a little."""
    if may_stay(data, shorter_side):
        return data
    image = read_rgb(data)
    small = image if shorter_side is None else resize_shorter_side(image, shorter_side)
    return encode_jpeg(small, quality, halved_colour)


def _offsets(content: bytes, jpegs: list[bytes]) -> bytes:
    """Where each JPEG begins in the Parquet file and how long it is, as the content of an `.npy` file.

    Plain encoding writes a value's length, in four bytes, and the value; between some of them stands a page's header.
    """
    places = np.zeros((len(jpegs), 2), np.int64)
    end = 0
    for row, jpeg in enumerate(jpegs):
        begin = content.index(struct.pack("<I", len(jpeg)) + jpeg, end) + 4
        end = begin + len(jpeg)
        places[row] = begin, len(jpeg)
    array = io.BytesIO()
    np.save(array, places, allow_pickle=False)
    return array.getvalue()


def read(folder: Path, split: Mapping[str, Any], columns: tuple[str, ...]) -> pyarrow.Table:
    """Columns of a split of the manifest, in order. Raises DataError if a shard is damaged."""
    import pyarrow
    import pyarrow.parquet

    parts = []
    for shard in split["shards"]:
        path = folder / str(shard["file"])
        try:
            if table_lines.has_extension_types(path):  # Ray's own among them are pickles
                raise DataError(f"{path} has columns of extension types, and reading such a type may run code")
            parts.append(pyarrow.parquet.read_table(path, columns=list(columns)))
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise DataError(f"{path} is damaged ({error}). Remove {folder} and prepare the data set again") from error
    return pyarrow.concat_tables(parts)


def captions(folder: Path, split: Mapping[str, Any]) -> Iterator[str]:
    """The captions of a split, in order; in memory are those of one shard."""
    for shard in split["shards"]:
        for texts in read(folder, {"shards": [shard]}, ("captions",)).column("captions"):
            yield from texts.as_py()


class Jpegs:
    """The JPEGs of a split, in order: slices of its shards, which are mapped into memory and not read before.

    Raises:
        DataError: the offsets of a shard are not those that were written with it.
    """

    def __init__(self, folder: Path, split: Mapping[str, Any]) -> None:
        import torch

        self._first: list[int] = [0, *accumulate(shard["images"] for shard in split["shards"])]
        self._shards: list[tuple[np.ndarray, np.ndarray]] = []
        for shard in split["shards"]:
            path = folder / str(shard["file"])
            offsets = _beside(path, ".offsets.npy").read_bytes()
            if hashlib.sha256(offsets).hexdigest() != shard["offsets_sha256"]:
                raise DataError(f"{_beside(path, '.offsets.npy')} is damaged. Prepare the data set again.")
            # By torch, since Python's own maps keep a file open each, and a process may have a thousand at most.
            content = torch.from_file(str(path), shared=False, size=shard["bytes"], dtype=torch.uint8)
            self._shards.append((content.numpy(), np.load(io.BytesIO(offsets), allow_pickle=False)))

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        """The bytes of JPEG `index`, (length,) uint8."""
        if not 0 <= index < len(self):
            raise IndexError(f"JPEG {index} of {len(self)}")
        number = bisect_right(self._first, index) - 1
        content, offsets = self._shards[number]
        begin, length = offsets[index - self._first[number]]
        return content[begin : begin + length]
