"""Parquet shards: images as small JPEGs with the captions written for them, one row an image.

Columns: image_id int64, image binary (JPEG), caption_ids list<int64>, captions list<string>. The order of rows is the
order of the data set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setwise.pipelines.datasets import Caption, Row
from setwise.pipelines.images import BadImageError, encode_jpeg, read_rgb, resize_shorter_side
from setwise.platform import storage

if TYPE_CHECKING:
    import pyarrow

COLUMNS = ("image_id", "image", "caption_ids", "captions")
MAX_CAPTION_CHARACTERS = 5_000


@dataclass(frozen=True)
class Shard:
    """What was written, and what was left out with the reason."""

    file: str
    images: int
    captions: int
    bytes: int
    sha256: str
    quarantine: list[dict[str, Any]]

    def to_columns(self) -> dict[str, str]:
        return {"shard": json.dumps(asdict(self))}

    @classmethod
    def from_columns(cls, columns: Mapping[str, str]) -> Shard:
        return cls(**json.loads(columns["shard"]))


def dump_rows(rows: list[Row]) -> str:
    return json.dumps([[r.image_id, r.split, str(r.path), [[c.caption_id, c.text] for c in r.captions]] for r in rows])


def load_rows(text: str) -> list[Row]:
    return [
        Row(image_id, split, Path(path), tuple(Caption(*caption) for caption in captions))
        for image_id, split, path, captions in json.loads(text)
    ]


def write(path: Path, rows: list[Row], shorter_side: int, quality: int) -> Shard:
    """Check, decode, resize and store `rows` as one shard.

    An image that cannot be used, or a caption without text, is left out and listed with its reason; an image without
    any usable caption is left out too.
    """
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    quarantine: list[dict[str, Any]] = []

    def set_aside(row: Row, caption: Caption | None, reason: str) -> None:
        caption_id = None if caption is None else caption.caption_id
        quarantine.append({"image_id": row.image_id, "caption_id": caption_id, "path": str(row.path), "reason": reason})

    for row in rows:
        good = []
        for caption in row.captions:
            reason = _caption_problem(caption.text)
            if reason:
                set_aside(row, caption, reason)
            else:
                good.append(Caption(caption.caption_id, " ".join(caption.text.split())))
        if not good:
            set_aside(row, None, "no usable caption")
            continue
        try:
            jpeg = _stored_jpeg(row.path.read_bytes(), shorter_side, quality)
        except OSError as error:
            set_aside(row, None, f"cannot be read: {error.strerror}")
            continue
        except BadImageError as error:
            set_aside(row, None, str(error))
            continue
        columns["image_id"].append(row.image_id)
        columns["image"].append(jpeg)
        columns["caption_ids"].append([caption.caption_id for caption in good])
        columns["captions"].append([caption.text for caption in good])

    integers, strings = pyarrow.list_(pyarrow.int64()), pyarrow.list_(pyarrow.string())
    types = (pyarrow.int64(), pyarrow.binary(), integers, strings)
    table = pyarrow.table({name: pyarrow.array(columns[name], kind) for name, kind in zip(COLUMNS, types, strict=True)})
    # JPEG does not compress further; written in one row group, since a shard is read whole.
    pyarrow.parquet.write_table(table, path, compression="none")
    return Shard(
        file=path.name,
        images=table.num_rows,
        captions=sum(map(len, columns["captions"])),
        bytes=path.stat().st_size,
        sha256=storage.sha256(path),
        quarantine=quarantine,
    )


def _caption_problem(text: object) -> str | None:
    if not isinstance(text, str) or not text.strip():
        return "the caption is empty"
    if len(text) > MAX_CAPTION_CHARACTERS:
        return f"the caption has {len(text):,} characters; the limit is {MAX_CAPTION_CHARACTERS:,}"
    if "\x00" in text or "\ufffd" in text or any("\ud800" <= character <= "\udfff" for character in text):
        return "the caption holds bytes that are not text"
    return None


def _stored_jpeg(data: bytes, shorter_side: int, quality: int) -> bytes:
    """The JPEG to store: the original bytes where nothing has to be changed, since each encoding loses a little."""
    image = read_rgb(data)
    small = resize_shorter_side(image, shorter_side)
    is_plain_jpeg = data.startswith(b"\xff\xd8") and small is image and b"Exif\x00" not in data[:4096]
    return data if is_plain_jpeg else encode_jpeg(small, quality)


def read(folder: Path, split: Mapping[str, Any], columns: tuple[str, ...] = COLUMNS) -> pyarrow.Table:
    """All rows of a split of the manifest, in order; memory is that of the compressed images."""
    import pyarrow
    import pyarrow.parquet

    parts = [pyarrow.parquet.read_table(folder / shard["file"], columns=list(columns)) for shard in split["shards"]]
    return pyarrow.concat_tables(parts)


def captions(folder: Path, split: Mapping[str, Any]) -> Iterator[str]:
    """The captions of a split, in order."""
    for texts in read(folder, split, ("captions",)).column("captions"):
        yield from texts.as_py()
