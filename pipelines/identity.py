"""What the files of a data set are known again by, so that what was prepared of them is used again or made anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from setwise.pipelines import feature_files
from setwise.pipelines.datasets import Source
from setwise.platform import storage
from setwise.platform.errors import DataError


def features(source: Source) -> dict[str, dict[str, Any]]:
    """The file of region features of each split, as `feature_files.describe` does; nothing for images.

    Raises:
        DataError: a file cannot be used, or a split has several.
    """
    files: dict[str, set[Path]] = {}
    for row in source.rows:
        if (row.place is not None) != (source.kind == "regions"):
            raise ValueError(f"image {row.image_id} of a source of {source.kind} has place {row.place}")
        if row.place is not None:
            files.setdefault(row.split, set()).add(row.path)
    described = {}
    for split, paths in files.items():
        if len(paths) > 1:
            raise DataError(f"the features of split '{split}' are in several files: {sorted(map(str, paths))}")
        described[split] = feature_files.describe(paths.pop().resolve())
    return described


def of(source: Source, features: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Annotations and extended positives by their content, images by their sizes, features by samples of them."""
    described = {each["file"] for each in features.values()}
    files = [file for file in source.files if str(file.resolve()) not in described]
    if source.extended_positives is not None:
        files += sorted(path for path in source.extended_positives.rglob("*") if path.is_file())
    images = source.rows if source.kind == "images" else []
    return {
        "files": [storage.sha256(file) for file in files],
        "features": features,
        "sizes": storage.fingerprint([_size(row.path) for row in images]),
    }


def _size(path: Path) -> int:
    """Enough to notice that an image was replaced, at no cost. A missing file counts as -1."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
