"""Which pairs are true: the captions written for an image, and what people have found to be true besides.

Compressed rows instead of a matrix: at COCO's size one matrix of truth takes 125 MB, and its pairs take one.

Shape suffixes: P pairs, Q queries.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from setwise.platform import storage
from setwise.platform.errors import DataError

Integers = NDArray[np.int64]

TEST_CAPTIONS = "original_caption_to_image.json"
"""COCO's test captions (Karpathy split) with the image of each, as ECCV Caption's package has them."""

DENSE = 1 << 23
"""Ids below it, such as COCO's, are looked up in a table instead of by binary search."""


@dataclass(frozen=True)
class Positives:
    """One direction: what is true of each query.

    query (P,) and item (P,): the pairs whose item is in the gallery, as indices on the two sides, by query. rows (Q,):
    the queries that are asked, ascending. relevant (Q,): R, how many items are true of each; items that the gallery
    lacks count, and can never be found. named: how many queries the truth names, whether the split has them or not.
    """

    query: Integers
    item: Integers
    rows: Integers
    relevant: Integers
    named: int

    def row(self) -> Integers:
        """(P,) the place in `rows` of each pair's query."""
        return np.searchsorted(self.rows, self.query)


@dataclass(frozen=True)
class Truth:
    """Both directions, and the hash of each file that says so."""

    i2t: Positives
    t2i: Positives
    files: dict[str, str]


def from_pairs(query: Integers, item: Integers) -> Positives:
    """The positives that these pairs are, each of which may be given more than once."""
    width = int(item.max(initial=0)) + 1
    query, item = np.divmod(np.unique(query.astype(np.int64) * width + item), width)
    rows, relevant = np.unique(query, return_counts=True)
    return Positives(query, item, rows, relevant, len(rows))


def own_captions(owners: Integers) -> Truth:
    """Each caption is true of the image that it was written for, `owners` (T,), and of no other."""
    captions = np.arange(len(owners))
    return Truth(from_pairs(owners, captions), from_pairs(captions, owners), {})


def read(i2t: Path, t2i: Path, image_ids: Integers, caption_ids: Integers) -> Truth:
    """Truth from two JSON files as ECCV Caption has them, {query id: [ids of all that is true]}.

    Queries that the split lacks are not asked.

    Raises:
        DataError: a file is missing or is not of this form.
    """
    return Truth(
        i2t=_directed(i2t, image_ids, caption_ids),
        t2i=_directed(t2i, caption_ids, image_ids),
        files={"i2t": storage.sha256(i2t)[:16], "t2i": storage.sha256(t2i)[:16]},
    )


def extended(folder: Path, image_ids: Integers, caption_ids: Integers) -> Truth:
    """The extended positives that a data set brings along."""
    return read(folder / "image_to_caption.json", folder / "caption_to_image.json", image_ids, caption_ids)


def caption_benchmark(name: str, image_ids: Integers, caption_ids: Integers) -> Truth:
    """ECCV Caption, `eccv`, or CxC, `cxc`: real COCO ids, from the files of the package eccv-caption.

    CxC's are the pairs that people rated 3 or higher, of 0 to 5.
    """
    folder = package_data()
    i2t, t2i = folder / f"{name}_image_to_caption.json", folder / f"{name}_caption_to_image.json"
    return read(i2t, t2i, image_ids, caption_ids)


def package_data() -> Path:
    """The data folder of eccv-caption. The package is not imported: it wants packages that we do not need.

    Raises:
        DataError: it is not installed.
    """
    spec = importlib.util.find_spec("eccv_caption")
    if spec is None or spec.origin is None:
        raise DataError("the package eccv-caption, whose files say what is true, is not installed: make install")
    return Path(spec.origin).parent / "data"


def not_coco(image_ids: Integers, caption_ids: Integers, owners: Integers) -> str | None:
    """Why a split is not COCO's test split or a part of it; None if it is."""
    truth = json.loads((package_data() / TEST_CAPTIONS).read_bytes())
    image_of = {int(caption): int(images[0]) for caption, images in truth.items()}
    known = 0
    for caption, image in zip(caption_ids.tolist(), image_ids[owners].tolist(), strict=True):
        expected = image_of.get(caption)
        if expected is not None and expected != image:
            return f"caption id {caption} belongs to image {expected} in COCO, and here to {image}"
        known += expected is not None
    return None if known else "no caption has an id of COCO's test split"


def find(ids: Integers, wanted: Integers) -> Integers:
    """Index in `ids`, which are all different, of each of `wanted`; -1 where it is not there."""
    if not len(ids):
        return np.full(wanted.shape, -1)
    if ids.min() >= 0 and (largest := int(ids.max())) < DENSE:
        table = np.full(largest + 2, -1, dtype=np.int32)
        table[ids] = np.arange(len(ids))
        return table[np.where((wanted < 0) | (wanted > largest), largest + 1, wanted)].astype(np.int64)
    order = np.argsort(ids)
    place = order[np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)]
    return np.where(ids[place] == wanted, place, -1)


def _directed(file: Path, query_ids: Integers, item_ids: Integers) -> Positives:
    try:
        truth = json.loads(file.read_bytes())
        named = np.array([int(key) for key in truth], dtype=np.int64)
        sizes = [len(items) for items in truth.values() if isinstance(items, list)]
        place = np.repeat(np.arange(len(named)), sizes)
        items = np.fromiter(chain.from_iterable(truth.values()), dtype=np.int64, count=len(place))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(f"{file}: expected {{query id: [ids of what is true of it]}} ({error})") from error
    order = np.lexsort((items, place))
    place, items = place[order], items[order]
    new = np.append(True, (place[1:] != place[:-1]) | (items[1:] != items[:-1]))[: len(place)]
    place, items = place[new], items[new]
    relevant = np.bincount(place, minlength=len(named))

    row = find(query_ids, named)
    asked = np.flatnonzero((row >= 0) & (relevant > 0))
    asked = asked[np.argsort(row[asked])]
    query, item = row[place], find(item_ids, items)
    present = np.flatnonzero((query >= 0) & (item >= 0))
    present = present[np.argsort(query[present], kind="stable")]
    return Positives(query[present], item[present], row[asked], relevant[asked], int((relevant > 0).sum()))
