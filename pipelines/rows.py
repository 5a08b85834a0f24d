"""Rows of a data set in columns: of a million images, some 60 bytes each beside names and captions.

As objects they take ten times as much and more. A `Row` is made of the columns when it is asked for, and what is
selected shares them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

from setwise.pipelines.datasets import SPLITS, Caption, Row

if TYPE_CHECKING:
    import pyarrow

NO_PLACE = -1


class Texts(Sequence[str]):
    """Many texts as one run of UTF-8, in which lone surrogates may stand, as in JSON.

    Args:
        content: the texts one after the other.
        offsets: where each begins, and where the last ends, (texts + 1,) int64.
    """

    def __init__(self, content: bytearray | pyarrow.Buffer, offsets: array[int] | np.ndarray) -> None:
        self._content = content
        self._view = memoryview(b"") if isinstance(content, bytearray) else memoryview(content)
        self._offsets = offsets

    @classmethod
    def none(cls) -> Texts:
        """No text yet; others are appended."""
        return cls(bytearray(), array("q", [0]))

    def append(self, text: str) -> None:
        assert isinstance(self._content, bytearray) and isinstance(self._offsets, array)
        self._content += text.encode("utf-8", "surrogatepass")
        self._offsets.append(len(self._content))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def encoded(self, place: int) -> bytes:
        """Text number `place`, as it is stored."""
        content = self._content if isinstance(self._content, bytearray) else self._view
        return bytes(content[self._offsets[place] : self._offsets[place + 1]])

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        return self.encoded(range(len(self))[place]).decode("utf-8", "surrogatepass")

    def take(self, places: Iterable[int]) -> Texts:
        """The texts at `places`, copied."""
        content, offsets = bytearray(), array("q", [0])
        for place in places:
            content += self.encoded(place)
            offsets.append(len(content))
        return Texts(content, offsets)

    def distinct(self) -> tuple[np.ndarray, Texts]:
        """Of each text its number, (texts,) int32, and the texts that differ, in the order in which they first come."""
        import pyarrow

        buffers = [None, pyarrow.py_buffer(self._offsets), pyarrow.py_buffer(self._content)]
        encoded = pyarrow.Array.from_buffers(pyarrow.large_binary(), len(self), buffers).dictionary_encode()
        _, offsets, content = encoded.dictionary.buffers()
        number = len(encoded.dictionary) + 1
        return np.asarray(encoded.indices), Texts(content, np.frombuffer(offsets, np.int64, number))


@dataclass(frozen=True)
class Columns:
    """What rows are made of; R rows, C captions. A row's captions follow each other."""

    prefix: str
    """How all paths begin."""
    names: Texts
    """(R,): how they go on."""
    image_ids: np.ndarray
    """(R,) int64."""
    splits: np.ndarray
    """(R,) int8: numbers in SPLITS."""
    places: np.ndarray | None
    """(R,) int64, NO_PLACE for images; None where all are."""
    first_caption: np.ndarray
    """(R + 1,) int64: where the captions of each row begin, and where the last's end."""
    caption_ids: np.ndarray
    """(C,) int64."""
    captions: Texts
    """(C,)."""


class Rows(Sequence[Row]):
    """Some of the rows that stand in columns, in order.

    Args:
        members: which of them, (rows,) of integers; None: all.
        limit: only so many captions of each, the first ones; None: all.
    """

    def __init__(self, columns: Columns, members: np.ndarray | None = None, limit: int | None = None) -> None:
        self._columns = columns
        self._members = np.arange(len(columns.image_ids)) if members is None else members
        self._limit = limit

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Rows:
        """The same rows in columns; those that are already stay as they are."""
        if isinstance(rows, Rows):
            return rows
        first = min((str(row.path) for row in rows), default="")
        last = max((str(row.path) for row in rows), default="")
        # In order, what the first and the last begin with, all begin with.
        prefix = first
        while not last.startswith(prefix):
            prefix = prefix[:-1]
        names, captions = Texts.none(), Texts.none()
        image_ids, places, first_caption, caption_ids = array("q"), array("q"), array("q", [0]), array("q")
        splits = array("b")
        for row in rows:
            names.append(str(row.path)[len(prefix) :])
            image_ids.append(row.image_id)
            splits.append(SPLITS.index(row.split))
            places.append(NO_PLACE if row.place is None else row.place)
            for caption in row.captions:
                caption_ids.append(caption.caption_id)
                captions.append(caption.text)
            first_caption.append(len(captions))
        columns = Columns(
            prefix=prefix,
            names=names,
            image_ids=np.asarray(image_ids),
            splits=np.asarray(splits),
            places=np.asarray(places),
            first_caption=np.asarray(first_caption),
            caption_ids=np.asarray(caption_ids),
            captions=captions,
        )
        return cls(columns)

    def __len__(self) -> int:
        return len(self._members)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> Rows: ...
    def __getitem__(self, place: int | slice) -> Row | Rows:
        return self._select(self._members[place]) if isinstance(place, slice) else self._row(int(self._members[place]))

    def __iter__(self) -> Iterator[Row]:
        return map(self._row, map(int, self._members))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # like a list's

    def __repr__(self) -> str:
        return f"Rows({len(self):,} rows)"

    @property
    def image_ids(self) -> np.ndarray:
        """(rows,) int64."""
        ids: np.ndarray = self._columns.image_ids[self._members]
        return ids

    @property
    def caption_numbers(self) -> np.ndarray:
        """How many captions each row has, (rows,) int64."""
        numbers: np.ndarray = np.diff(self._columns.first_caption)[self._members]
        return numbers if self._limit is None else np.minimum(numbers, self._limit)

    @property
    def caption_ids(self) -> np.ndarray:
        """Of all captions, in order, (captions,) int64."""
        numbers = self.caption_numbers
        before = np.cumsum(numbers) - numbers
        begin = self._columns.first_caption[self._members]
        ids: np.ndarray = self._columns.caption_ids[np.repeat(begin - before, numbers) + np.arange(numbers.sum())]
        return ids

    @property
    def has_places(self) -> bool:
        """Whether a row points to region features."""
        places = self._columns.places
        return places is not None and bool((places[self._members] != NO_PLACE).any())

    def of_split(self, split: str) -> Rows:
        return self._select(self._members[self._columns.splits[self._members] == SPLITS.index(split)])

    def where(self, wanted: np.ndarray) -> Rows:
        """The rows at which `wanted`, (rows,) bool, is true."""
        return self._select(self._members[wanted])

    def with_repeated_id(self) -> Rows:
        """The rows whose image id another has too."""
        return self.where(_repeated(self.image_ids))

    def with_repeated_caption_id(self) -> Rows:
        """The rows of which a caption's id stands elsewhere too."""
        owners = np.repeat(np.arange(len(self)), self.caption_numbers)[_repeated(self.caption_ids)]
        return self.where(np.isin(np.arange(len(self)), owners))

    def with_captions(self, limit: int) -> Rows:
        """The same rows with the first `limit` captions of each."""
        return Rows(self._columns, self._members, limit if self._limit is None else min(limit, self._limit))

    def _select(self, members: np.ndarray) -> Rows:
        return Rows(self._columns, members, self._limit)

    def _row(self, member: int) -> Row:
        columns = self._columns
        begin, end = int(columns.first_caption[member]), int(columns.first_caption[member + 1])
        if self._limit is not None:
            end = min(end, begin + self._limit)
        captions = tuple(Caption(int(columns.caption_ids[each]), columns.captions[each]) for each in range(begin, end))
        place = NO_PLACE if columns.places is None else int(columns.places[member])
        return Row(
            int(columns.image_ids[member]),
            SPLITS[columns.splits[member]],
            Path(columns.prefix + columns.names[member]),
            captions,
            None if place == NO_PLACE else place,
        )


def _repeated(ids: np.ndarray) -> np.ndarray:
    """At which places an id stands that stands elsewhere too, (ids,) bool."""
    ordered = np.sort(ids)
    return np.isin(ids, ordered[1:][ordered[1:] == ordered[:-1]])
