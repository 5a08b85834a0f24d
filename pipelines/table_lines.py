"""The lines of a table of captions, as CSV, JSONL or Parquet, one after the other; what its columns mean says
caption_tables.py."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setwise.pipelines.datasets import listed
from setwise.platform.errors import DataError

REQUIRED = ("image", "caption")
OPTIONAL = ("split", "image_id", "caption_id")
READ_ROWS = 1024
READ_BYTES = 2**20
"""Of a Parquet file at once; a group of its rows may be all of them."""

Record = tuple[int, dict[str, Any] | str]
"""The line of a table, counted from one, and what it says, or why it says nothing."""


def read(file: Path) -> Iterator[Record]:
    """The lines of a table in the form that its suffix, one of SUFFIXES, says.

    Raises:
        DataError: the table is not of that form, or lacks a column.
        OSError: it cannot be read.
    """
    return FORMS[file.suffix](file)


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

    if has_extension_types(file):
        raise DataError(
            f"{file}: has columns of extension types, and reading such a type may run code. Write plain columns of text"
        )
    try:
        with pyarrow.parquet.ParquetFile(file, buffer_size=READ_BYTES) as parquet:
            found = parquet.schema_arrow.names
            _check_columns(file, found)
            columns = [name for name in (*REQUIRED, *OPTIONAL) if name in found]
            row = 0
            for batch in parquet.iter_batches(READ_ROWS, columns=columns):
                try:
                    contents: list[dict[str, Any]] | None = batch.to_pylist()
                except UnicodeDecodeError:
                    contents = None
                for index in range(batch.num_rows):
                    row += 1
                    try:
                        yield row, contents[index] if contents else {n: batch.column(n)[index].as_py() for n in columns}
                    except UnicodeDecodeError:
                        yield row, "the row is not UTF-8"
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{file}: not a whole Parquet file ({error})") from error


def has_extension_types(file: Path) -> bool:
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


FORMS = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
SUFFIXES = tuple(FORMS)
