"""Crisscrossed Captions (Parekh et al., EACL 2021): pairs of COCO's test split that people rated from 0 to 5.

    sts_test.csv   caption1,caption2,agg_score,sampling_method    text against text
    sis_test.csv   image1,image2,agg_score,sampling_method        image against image
    sits_test.csv  caption,image,agg_score,sampling_method        image against text

each as published or gzipped (`.csv.gz`). Two uses: which captions are true of a caption and which images of an image,
and how far a model's similarities are ordered as the ratings.

Shape suffixes: P rated pairs, Q query items.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from setwise.pipelines import positives
from setwise.pipelines.positives import Integers, Positives
from setwise.platform import seeding, storage
from setwise.platform.errors import DataError

TEXT_THRESHOLD = 3.0
"""Captions rated at least so are true of each other. CxC publishes no positives, but at this value its image-text
ratings give exactly the pairs that ECCV Caption's package holds as CxC's."""
IMAGE_THRESHOLD = 2.5
"""Images rated at least so are true of each other: the value of VSE-infinity's processing of CxC (Chen et al.,
CVPR 2021), whose numbers others compare with."""
DRAWS = 1000
FEWEST_QUERIES = 20
"""With fewer query items a half of them says nothing about a correlation."""

CAPTION = re.compile(r"COCO_val2014:sentid:(\d{1,12})")
IMAGE = re.compile(r"COCO_val2014_(\d{12})\.jpg")


@dataclass(frozen=True)
class Task:
    """One file: what its columns hold, and how many ratings were published."""

    columns: tuple[str, str]
    ids: tuple[re.Pattern[str], re.Pattern[str]]
    published: int


TASKS = {
    "sts": Task(("caption1", "caption2"), (CAPTION, CAPTION), 44_045),
    "sis": Task(("image1", "image2"), (IMAGE, IMAGE), 46_719),
    "sits": Task(("caption", "image"), (CAPTION, IMAGE), 44_833),
}


@dataclass(frozen=True)
class Rated:
    """Rated pairs: first (P,) and second (P,) are the ids of the file's two columns, rating (P,) from 0 to 5."""

    first: Integers
    second: Integers
    rating: NDArray[np.float64]


def fingerprints(folder: Path) -> dict[str, str]:
    """The hash of each file, by task.

    Raises:
        DataError: one is missing.
    """
    return {task: storage.sha256(_file(folder, task))[:16] for task in TASKS}


def read(folder: Path) -> dict[str, Rated]:
    """The ratings of the folder, by task.

    Raises:
        DataError: a file is missing, damaged, cut short or not of this form; names file and line.
    """
    return {task: _read(_file(folder, task), TASKS[task]) for task in TASKS}


def text_positives(sts: Rated, caption_ids: Integers, owners: Integers) -> Positives:
    """What is true of each caption among all others: the captions of its image, and those rated TEXT_THRESHOLD.

    owners (T,): index of each caption's image, ascending.
    """
    size = np.bincount(owners)[owners]  # of each caption's image, the caption itself included
    start = np.repeat(np.searchsorted(owners, owners) - (np.cumsum(size) - size), size)
    own_query, own_item = np.repeat(np.arange(len(owners)), size), start + np.arange(size.sum())
    rated_query, rated_item = _both_ways(sts, TEXT_THRESHOLD, caption_ids)
    return _without_itself(np.concatenate([own_query, rated_query]), np.concatenate([own_item, rated_item]))


def image_positives(sis: Rated, image_ids: Integers) -> Positives:
    """What is true of each image among all others: those rated IMAGE_THRESHOLD. Most images have none: not asked."""
    return _without_itself(*_both_ways(sis, IMAGE_THRESHOLD, image_ids))


def _without_itself(query: Integers, item: Integers) -> Positives:
    return positives.from_pairs(query[query != item], item[query != item])


def _both_ways(rated: Rated, threshold: float, ids: Integers) -> tuple[Integers, Integers]:
    """A rating holds both ways; of a pair that was rated twice, the higher counts."""
    first, second = positives.find(ids, rated.first), positives.find(ids, rated.second)
    kept = (rated.rating >= threshold) & (first >= 0) & (second >= 0)
    return np.concatenate([first[kept], second[kept]]), np.concatenate([second[kept], first[kept]])


def correlation(
    query_P: Integers, similarity_P: NDArray[np.floating], rating_P: NDArray[np.float64], draws: int = DRAWS
) -> tuple[float, float] | None:
    """Spearman's correlation of similarity and rating, by the bootstrap of the paper.

    Each of `draws` times, half of the query items are drawn without replacement and for each one of its rated partners,
    so that items with many ratings do not weigh more; drawn alike at every call.

    Args:
        query_P: the query item of each pair: what the file's first column names.

    Returns:
        Mean and standard deviation over the draws, times 100 as papers print them; None with fewer than
        FEWEST_QUERIES query items. A model that gives all pairs one similarity correlates by 0.
    """
    order = np.argsort(query_P, kind="stable")
    queries, first, partners = np.unique(query_P[order], return_index=True, return_counts=True)
    if len(queries) < FEWEST_QUERIES:
        return None
    # Where each pair stands among all that differ: ranks within a draw are then counted instead of sorted.
    levels = [np.unique(values[order], return_inverse=True)[1] for values in (similarity_P, rating_P)]
    random = np.random.default_rng(seeding.derive(0, "cxc", "bootstrap"))
    found = np.empty(draws)
    for draw in range(draws):
        drawn = random.permutation(len(queries))[: len(queries) // 2]
        pair = first[drawn] + (random.random(len(drawn)) * partners[drawn]).astype(np.int64)
        found[draw] = _pearson(*(_ranks(level[pair]) for level in levels))
    return float(found.mean() * 100), float(found.std() * 100)


def _ranks(levels: Integers) -> NDArray[np.float64]:
    """Ranks of values given as small integers; equal values share the mean of their ranks."""
    counts = np.bincount(levels)
    return (np.cumsum(counts) - (counts - 1) / 2)[levels]


def _pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0


def _file(folder: Path, task: str) -> Path:
    names = [f"{task}_test.csv", f"{task}_test.csv.gz"]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise DataError(
            f"{folder}: neither {names[0]} nor {names[1]} is there. Crisscrossed Captions has three files: "
            f"{', '.join(f'{task}_test.csv' for task in TASKS)}"
        )
    return found[0]


def _read(file: Path, task: Task) -> Rated:
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{file}: damaged, or cut short ({error}); fetch it again") from error
    lines = csv.reader(io.StringIO(text, newline=""))
    header = next(lines, [])
    if header[:3] != [*task.columns, "agg_score"]:
        raise DataError(f"{file}:1: expected the columns {', '.join(task.columns)}, agg_score, ..., not {header}")
    first, second, rating = [], [], []
    try:
        for line in lines:
            one, two = (_id(pattern, value) for pattern, value in zip(task.ids, line[:2], strict=True))
            first.append(one)
            second.append(two)
            rating.append(_rating(line[2]))
    except (ValueError, IndexError, csv.Error) as error:
        raise DataError(f"{file}:{lines.line_num}: not a rating ({error})") from error
    if len(rating) < task.published or not text.endswith("\n"):
        raise DataError(
            f"{file}:{lines.line_num}: ends after {len(rating):,} ratings of {task.published:,}; fetch it again"
        )
    return Rated(np.array(first), np.array(second), np.array(rating))


def _id(pattern: re.Pattern[str], text: str) -> int:
    match = pattern.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is not of the form {pattern.pattern}")
    return int(match[1])


def _rating(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 5:
        raise ValueError(f"a rating is 0 to 5, not {text}")
    return value
