"""Region features where their publishers left them: `.npy` files, memory-mapped and never copied.

Shape suffixes: R rows of a file, N regions of an image, F width of a feature.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from setwise.platform.errors import DataError

TYPES = ("float16", "float32", "float64")
SAMPLED_ROWS = 16
"""Rows that a file is known again by; all 34 GB of COCO's would take minutes."""


def open_features(path: Path) -> np.memmap[Any, Any]:
    """The features (R, N, F) of a file, memory-mapped and read-only; what is not looked at is not read.

    Raises:
        DataError: the file is missing, cut short or pickled, or holds something else.
    """
    try:
        features = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError, OverflowError, SyntaxError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not a whole .npy file of numbers ({error})") from error
    if not isinstance(features, np.memmap) or features.ndim != 3 or features.dtype.name not in TYPES:
        found = f"{features.dtype} {features.shape}" if isinstance(features, np.ndarray) else "an archive"
        raise DataError(f"{path}: expected features (rows, regions, width) of {' or '.join(TYPES)}, found {found}")
    if not features.size:
        raise DataError(f"{path}: holds no feature; its shape is {features.shape}")
    if not features.flags.c_contiguous:
        raise DataError(
            f"{path}: is stored in Fortran's order, in which the features of one image lie all over the file. Write it "
            "anew with numpy.ascontiguousarray."
        )
    return features


def describe(path: Path) -> dict[str, Any]:
    """What a manifest says of a file of features; raises DataError as `open_features` does."""
    features = open_features(path)
    rows, regions, width = features.shape
    return {
        "file": str(path),
        "rows": rows,
        "regions": regions,
        "width": width,
        "dtype": features.dtype.name,
        "digest": _digest(path, features),
    }


def _digest(path: Path, features: np.memmap[Any, Any]) -> str:
    """SHA-256 of length and header of the file and of some evenly spaced rows."""
    content = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb") as stream:
        content.update(stream.read(features.offset))
    rows = len(features)
    for row in np.unique(np.linspace(0, rows - 1, min(rows, SAMPLED_ROWS)).round().astype(int)):
        content.update(features[row].tobytes())
    return content.hexdigest()


def change(described: dict[str, Any]) -> str | None:
    """What is wrong with a file that was described before: it is gone, or another one; None if it is the same."""
    try:
        now = describe(Path(described["file"]))
    except DataError as error:
        return str(error)
    differing = [name for name in described if now[name] != described[name]]
    return f"{described['file']}: is another file now ({', '.join(differing)} changed)" if differing else None


def problem(features: np.memmap[Any, Any], place: int) -> str | None:
    """Why the features of a row cannot be used, if they cannot."""
    if not 0 <= place < len(features):
        return f"row {place:,} is not in the file, which has {len(features):,} rows"
    if not np.isfinite(features[place]).all():
        return f"the features in row {place:,} are not finite numbers"
    return None
