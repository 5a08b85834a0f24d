"""Whether images can be decoded and features are numbers: all of them, or their headers and a sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from setwise.pipelines import feature_files
from setwise.pipelines.datasets import Row, listed
from setwise.pipelines.findings import Finding, Severity
from setwise.pipelines.images import FORMATS, MAX_ASPECT, MAX_BYTES, MAX_PIXELS, BadImageError, read_file, read_rgb
from setwise.pipelines.prepare import PrepareConfig

Say = Callable[[str], None]

SAMPLE = 1000
"""Images that are decoded, or whose features are read, where not all are."""
THREADS = 16  # they wait for files most of the time
CHUNK = 1024
BLOCK_BYTES = 32 * 2**20
SAY_EVERY_S = 5.0


class Progress:
    """A line every few seconds about how far something is."""

    def __init__(self, say: Say, what: str, total: int) -> None:
        self._say, self._what, self._total = say, what, total
        self._said = time.monotonic()

    def at(self, done: int) -> None:
        if time.monotonic() - self._said >= SAY_EVERY_S:
            self._said = time.monotonic()
            self._say(f"checked {done:,} of {self._total:,} {self._what}")


def check_images(rows: Sequence[Row], deep: bool, say: Say) -> list[Finding]:
    """What is wrong with the image files of `rows`, and how closely they were looked at."""
    problems, decoded = _bad_images([row.path for row in rows], deep, say)
    held_out = [f"{rows[place].path}: {why}" for place, why in problems if rows[place].split != "train"]
    training = [f"{rows[place].path}: {why}" for place, why in problems if rows[place].split == "train"]
    findings = []
    if held_out:
        findings.append(
            Finding(
                "error",
                f"{len(held_out):,} images of val and test are missing or damaged",
                listed(held_out, "; "),
                "get them again: without them, numbers are of another test",
            )
        )
    if training:
        share = len(training) / len(rows)
        findings.append(
            Finding(
                "error" if share > PrepareConfig().max_bad_share else "warning",
                f"{len(training):,} training images ({share:.2%} of all images) are missing or damaged",
                listed(training, "; "),
                "get them again, or go without: preparation leaves them out, up to prepare.max_bad_share",
            )
        )
    return [
        *findings,
        *_shared_files(rows),
        _how_much(f"headers of {len(rows):,} images read", decoded, len(rows), "decoded"),
    ]


def _shared_files(rows: Sequence[Row]) -> list[Finding]:
    splits: dict[Path, list[str]] = {}
    for row in rows:
        splits.setdefault(row.path, []).append(row.split)
    leaked = [str(path) for path, own in splits.items() if len(set(own)) > 1]
    twice = [str(path) for path, own in splits.items() if len(own) > len(set(own))]
    findings = []
    if leaked:
        what = f"{len(leaked):,} files are images of several splits"
        findings.append(Finding("error", what, listed(leaked), "put each into one split"))
    if twice:
        what = f"{len(twice):,} files are several images of their split"
        findings.append(Finding("warning", what, listed(twice), "is the data set what it should be?"))
    return findings


def _how_much(read: str, number: int, total: int, what: str, where: str = "") -> Finding:
    return Finding("information", f"{read}, {number:,} {what}", where, "--deep: all of them" if number < total else "")


def check_features(rows: Sequence[Row], deep: bool, say: Say) -> list[Finding]:
    """What is wrong with the region features of `rows`, and how many of them were read.

    Raises:
        DataError: a file cannot be used at all.
    """
    findings = []
    for path in dict.fromkeys(row.path for row in rows):
        places = [row.place for row in rows if row.path == path and row.place is not None]
        checked = _read_features(path, places, deep, say)
        wrong: list[tuple[Severity, str, list[int]]] = [
            ("error", "hold values that are not finite numbers", checked.not_finite),
            ("error", "differ from the other copies of their image's", checked.not_repeated),
            ("warning", "are nothing but zeros", checked.zero),
        ]
        findings += [
            Finding(
                severity,
                f"{len(bad):,} of {checked.images:,} images' features {what}",
                f"{path}, row {listed(bad)}",
                "get them again, or extract them: setwise data regions",
            )
            for severity, what, bad in wrong
            if bad
        ]
        described = f"{checked.regions} regions of width {checked.width}, {checked.dtype}, of {len(places):,} images"
        findings.append(_how_much(described, checked.images, len(places), "of them read", str(path)))
    return findings


def _bad_images(paths: list[Path], deep: bool, say: Say) -> tuple[list[tuple[int, str]], int]:
    """Look at all images, and decode all of them, a sample, or those that do not look whole.

    Returns:
        the places of bad images with the reason, and how many were to be decoded.
    """
    decoded = set(range(len(paths))) if deep else set(_sample(len(paths)))
    progress = Progress(say, "images", len(paths))
    problems = []
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(paths), CHUNK):
            places = range(start, min(start + CHUNK, len(paths)))
            found = pool.map(lambda place: image_problem(paths[place], place in decoded), places)
            problems += [(place, problem) for place, problem in zip(places, found, strict=True) if problem is not None]
            progress.at(places.stop)
    return problems, len(decoded)


def image_problem(path: Path, decode: bool) -> str | None:
    """Why an image cannot be used, if it cannot. Without `decode`, one that looks whole is taken for whole."""
    try:
        if decode or not _looks_whole(path):
            read_rgb(read_file(path))
    except FileNotFoundError:
        return "there is no such file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except BadImageError as error:
        return str(error)
    return None


def _looks_whole(path: Path) -> bool:
    """Whether header and end of a file are those of an image of a usable size."""
    from PIL import Image

    if not path.is_file():  # opening a pipe would wait for ever
        return False
    try:
        with path.open("rb") as stream:
            length = stream.seek(0, 2)
            stream.seek(-min(length, 12), 2)
            end = stream.read()
            stream.seek(0)
            begin = stream.read(12)
            with Image.open(stream, formats=FORMATS) as image:
                width, height = image.size
                kind = image.format
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,  # where warnings are errors
    ):
        return False
    is_ended = {
        "JPEG": end.endswith(b"\xff\xd9"),
        "PNG": end.endswith(b"IEND\xae\x42\x60\x82"),
        "WEBP": int.from_bytes(begin[4:8], "little") + 8 <= length,
    }
    is_usable = width * height <= MAX_PIXELS and max(width, height) <= MAX_ASPECT * min(width, height)
    return is_usable and length <= MAX_BYTES and is_ended.get(kind or "", False)


@dataclass(frozen=True)
class _Features:
    """What was found in a file: how many images' features were read, and rows of which something is wrong."""

    images: int
    regions: int
    width: int
    dtype: str
    not_finite: list[int]
    not_repeated: list[int]
    zero: list[int]


def _read_features(path: Path, places: list[int], deep: bool, say: Say) -> _Features:
    """Read the features of the images at rows `places`, all of them or a sample, in blocks.

    Rows between two places repeat the first of them, and are compared with it.

    Raises:
        DataError: the file cannot be used at all.
    """
    features = feature_files.open_features(path)
    rows, regions, width = features.shape
    times = min((after - before for before, after in pairwise(places)), default=rows)
    chosen = places if deep else [places[place] for place in _sample(len(places))]
    image_bytes = times * regions * width * features.dtype.itemsize
    progress = Progress(say, f"images' features in {path.name}", len(chosen))
    not_finite, not_repeated, zero = [], [], []
    for done, run in enumerate(_runs(chosen, times, max(1, BLOCK_BYTES // image_bytes))):
        # From the file and not from the map, whose pages would stay in memory.
        block = np.fromfile(
            path,
            features.dtype,
            len(run) * times * regions * width,
            offset=features.offset + run[0] * regions * width * features.dtype.itemsize,
        ).reshape(len(run), times, regions * width)
        first = block[:, 0]
        same = (block.view(np.uint8) == first[:, None].view(np.uint8)).all((1, 2))
        not_finite += [run[place] for place in np.flatnonzero(~np.isfinite(first).all(1))]
        not_repeated += [run[place] for place in np.flatnonzero(~same)]
        zero += [run[place] for place in np.flatnonzero(~first.any(1))]
        progress.at(done)
    return _Features(len(chosen), regions, width, features.dtype.name, not_finite, not_repeated, zero)


def _runs(places: list[int], times: int, longest: int) -> list[list[int]]:
    """`places` in runs that follow each other in the file, `times` rows apart."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + times and len(runs[-1]) < longest:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _sample(total: int) -> list[int]:
    return np.unique(np.linspace(0, total - 1, min(total, SAMPLE)).round().astype(int)).tolist() if total else []
