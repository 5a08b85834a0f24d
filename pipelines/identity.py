"""What the files of a data set are known again by, so that what was prepared of them is used again or made anew; and
what stands for the content of what was prepared."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from setwise.pipelines import feature_files
from setwise.pipelines.datasets import Source
from setwise.pipelines.rows import Rows
from setwise.platform import storage
from setwise.platform.errors import DataError

SAMPLED_BYTES = 256
THREADS = 16  # they wait for files most of the time
EACH = 64
"""Images that a thread takes at once: to hand over each by itself would cost more than to read it."""


def features(source: Source) -> dict[str, dict[str, Any]]:
    """The file of region features of each split, as `feature_files.describe` does; nothing for images.

    Raises:
        DataError: a file cannot be used, or a split has several.
    """
    rows = Rows.of(source.rows)
    if source.kind == "images":
        if rows.has_places:
            raise ValueError(f"'{source.name}' is of images, and has rows of features")
        return {}
    files: dict[str, set[Path]] = {}
    for row in rows:
        if row.place is None:
            raise ValueError(f"image {row.image_id} of a source of regions has no place")
        files.setdefault(row.split, set()).add(row.path)
    described = {}
    for split, paths in files.items():
        if len(paths) > 1:
            raise DataError(f"the features of split '{split}' are in several files: {sorted(map(str, paths))}")
        described[split] = feature_files.describe(paths.pop().resolve())
    return described


def of(source: Source, features: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Annotations, what was read of them, and extended positives by their content; images by size and a sample of each;
    features by samples of them.

    Where the files are does not count: moved or copied, they are the same.
    """
    described = {each["file"] for each in features.values()}
    files = [file for file in source.files if str(file.resolve()) not in described]
    if source.extended_positives is not None:
        files += sorted(path for path in source.extended_positives.rglob("*") if path.is_file())
    images = (row.path for row in source.rows) if source.kind == "images" else iter(())
    # Of the same annotations, settings such as source.captions_per_image make other rows.
    rows = ([row.image_id, row.split, row.place, [[c.caption_id, c.text] for c in row.captions]] for row in source.rows)
    return {
        "files": [storage.sha256(file) for file in files],
        "rows": _fingerprint(json.dumps(row) for row in rows),
        "features": features,
        "images": _fingerprint(_samples(images)),
    }


def of_prepared(folder: Path, splits: Mapping[str, Any], features: Mapping[str, Mapping[str, Any]]) -> str:
    """The fingerprint of what was prepared in `folder`: its shards as the manifest lists them, the features that they
    point to, the words, and the extended positives."""
    digests = {split: described["digest"] for split, described in features.items()}
    beside = [folder / "vocabulary.json", *sorted((folder / "extended_positives").rglob("*.json"))]
    return storage.fingerprint([splits, digests, [storage.sha256(file) for file in beside]])


def _samples(images: Iterator[Path]) -> Iterator[str]:
    """A sample of each; in memory are those of a few thousand."""
    with ThreadPoolExecutor(THREADS) as pool:
        while some := list(islice(images, 2 * THREADS * EACH)):
            for samples in pool.map(_samples_of, (some[start : start + EACH] for start in range(0, len(some), EACH))):
                yield from samples


def _samples_of(images: list[Path]) -> list[str]:
    return [_sample(path) for path in images]


def _sample(path: Path) -> str:
    """Size and middle of an image, by which it is noticed that another was put in its place, at little cost."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return "no file"
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(file, SAMPLED_BYTES, max(0, status.st_size - SAMPLED_BYTES) // 2)
        finally:
            os.close(file)
    except OSError as error:
        return f"cannot be read: {error.errno}"
    return f"{status.st_size} {data.hex()}"


def _fingerprint(lines: Iterable[str]) -> str:
    """Of many lines, which are not kept."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()[:16]
