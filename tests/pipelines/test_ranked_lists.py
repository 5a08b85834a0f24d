"""Our numbers against those of the package eccv_caption, from ranks and from lists, and lists that are too short.

Coordinates are multiples of 1/2048, so that every score is exact in whatever order it is summed, and ties are ties.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from setwise.models.loss_config import SimilarityConfig
from setwise.models.similarity import Similarity
from setwise.pipelines import benchmarks, positives, ranked_lists
from setwise.pipelines.benchmarks import Encoded
from setwise.pipelines.ranking import Member

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about faster readers of JSON
    from eccv_caption import Metrics

Ids = NDArray[np.int64]
ALL = ("coco_1k_recalls", "coco_5k_recalls", "cxc_recalls", "eccv_map_at_r", "eccv_rprecision", "eccv_r1")


@dataclass(frozen=True)
class Coco:
    """The first images of COCO's test split with their captions; lists of ids by descending score."""

    encoded: Encoded
    i2t: Ids
    t2i: Ids


def coco(images: int, correlation: float, depth: int | None = None, seed: int = 0) -> Coco:
    test = np.load(positives.package_data() / "coco_test_ids.npy", allow_pickle=False)[: 5 * images]
    truth = json.loads((positives.package_data() / positives.TEST_CAPTIONS).read_bytes())
    image_ids = np.array([truth[str(caption)][0] for caption in test[::5]])
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(images, 8))
    columns = correlation * rows.repeat(5, axis=0) + (1 - correlation) * rng.normal(size=(5 * images, 8))
    exact = [np.round(side / np.linalg.norm(side, axis=1, keepdims=True) * 2047) / 2048 for side in (rows, columns)]
    image_sets, text_sets = (torch.from_numpy(side.astype(np.float32))[:, None] for side in exact)
    member = Member(image_sets, text_sets, Similarity(SimilarityConfig(kind="mil")))
    encoded = Encoded((member,), np.arange(5 * images) // 5, image_ids, test)
    scores = (image_sets[:, 0] @ text_sets[:, 0].T).numpy()
    return Coco(encoded, test[ordered(scores, depth)], image_ids[ordered(scores.T, depth)])


def ordered(scores: NDArray[np.float32], depth: int | None) -> Ids:
    """Indices by descending score, of equals the later first; only the first `depth`."""
    found = []
    for row in scores:
        kept = np.arange(len(row))
        if depth is not None and depth < len(row):
            kept = np.flatnonzero(row >= np.partition(row, -depth)[-depth])
        found.append(kept[np.lexsort((-kept, -row[kept]))][:depth])
    return np.stack(found)


def theirs(case: Coco, wanted: tuple[str, ...] = ALL) -> dict[str, float]:
    """The package's own numbers, of the part of its truth that asks about these images and captions."""
    package = Metrics()
    images, captions = set(case.encoded.image_ids.tolist()), set(case.encoded.caption_ids.tolist())
    for truth in (package.coco_gts, package.cxc_gts, package.eccv_gts):
        truth["i2t"] = {query: true for query, true in truth["i2t"].items() if query in images}
        truth["t2i"] = {query: true for query, true in truth["t2i"].items() if query in captions}
    package.coco_ids = package.coco_ids[: len(captions)]
    shared = {i: i for i in (*images, *captions)}  # one object for each id, whatever it is listed in

    def lists(ids: Ids, table: Ids) -> dict[int, list[int]]:
        return {int(query): [shared[i] for i in line.tolist()] for query, line in zip(ids, table, strict=True)}

    found = package.compute_all_metrics(
        lists(case.encoded.image_ids, case.i2t), lists(case.encoded.caption_ids, case.t2i), wanted, (1, 5, 10)
    )
    return {f"{name} {direction}": value for name, both in found.items() for direction, value in both.items()}


def ours(values: dict[str, dict[str, float]]) -> dict[str, float]:
    """Our values under their names, as shares."""
    named = {
        f"coco_{size}_r{k} {d}": ("coco_" + size, f"{d}_R{k}")
        for size in ("1k", "5k")
        for k in (1, 5, 10)
        for d in ("i2t", "t2i")
    }
    for d in ("i2t", "t2i"):
        named |= {f"cxc_r{k} {d}": ("cxc", f"{d}_R{k}") for k in (1, 5, 10)}
        named |= {
            f"eccv_{one} {d}": ("eccv", f"{d}_{two}")
            for one, two in (("map_at_r", "map_at_r"), ("rprecision", "r_precision"), ("r1", "R1"))
        }
    return {name: values[benchmark][key] / 100 for name, (benchmark, key) in named.items()}


def from_ranks(case: Coco) -> dict[str, dict[str, float]]:
    measured = benchmarks.measure(benchmarks.kinds("coco"), case.encoded, extended=Path("none"), ties="official")
    return {one.benchmark: one.values for one in measured}


def from_lists(case: Coco) -> dict[str, dict[str, float]]:
    split = case.encoded
    return ranked_lists.measure(
        benchmarks.kinds("coco"), case.i2t, case.t2i, split.image_ids, split.caption_ids, split.owners
    )


@pytest.mark.parametrize(
    ("images", "depth", "correlation"),
    [(150, None, 0), (150, None, 0.6), (150, None, 1), (5_000, 400, 0), (5_000, 400, 1)],
    ids=["part-random", "part-trained", "part-oracle", "coco-random", "coco-oracle"],
)
def test_numbers_are_those_of_the_package(images: int, depth: int | None, correlation: float) -> None:
    """Whole rankings of a part of the split, and of all of it as deep as the folds take for their first ten."""
    case = coco(images, correlation, depth)
    expected = theirs(case)
    assert len(expected) == 24
    assert ours(from_lists(case)) == pytest.approx(expected, rel=0, abs=1e-15)
    assert ours(from_ranks(case)) == pytest.approx(expected, rel=0, abs=1e-15)
    if correlation == 1:
        assert expected["coco_5k_r1 i2t"] == 1


def test_lists_that_end_too_early_are_refused_with_the_length_they_need() -> None:
    case, split = coco(150, 0.6), benchmarks.kinds("coco")

    def cut(name: str, depth: int) -> None:
        shorter = Coco(case.encoded, case.i2t[:, :depth], case.t2i)
        ranked_lists.measure({name: split[name]}, shorter.i2t, shorter.t2i, *ids, case.encoded.owners)

    ids = case.encoded.image_ids, case.encoded.caption_ids
    deepest = benchmarks.truth("eccv", *ids, case.encoded.owners, None).i2t.relevant.max()
    cut("coco_5k", 10)
    cut("eccv", int(deepest))
    for name, depth, expected in (
        ("coco_5k", 9, "the lists have 9 places; at least 10 are needed"),
        ("cxc", 9, "at least 10 are needed"),
        ("eccv", int(deepest) - 1, f"at least {deepest} are needed"),
        ("coco_1k", 12, "of the query's fold, and 10 are needed: give whole lists, 750 places"),
    ):
        with pytest.raises(ValueError, match=expected):
            cut(name, depth)
    with pytest.raises(ValueError, match=r"i2t: .* is not a list for each of 150 queries"):
        ranked_lists.measure(split, case.i2t[1:], case.t2i, *ids, case.encoded.owners)


def test_ids_may_be_any_numbers() -> None:
    """Ids too large for a table are found by search."""
    case = coco(40, 0.6)
    far = 2**40
    split, kinds = case.encoded, benchmarks.kinds("birds") | {"birds_extended": "whole"}
    near = ranked_lists.measure(kinds, case.i2t, case.t2i, split.image_ids, split.caption_ids, split.owners)
    moved = (case.i2t + far, case.t2i - far, split.image_ids - far, split.caption_ids + far)
    assert ranked_lists.measure(kinds, *moved, split.owners) == near
    assert near["birds_folds"]["rsum"] > near["birds"]["rsum"] > 0
