"""What arrays instead of sets and lists save: COCO 1K and 5K, CxC and ECCV Caption by the package eccv_caption and by
ours, CPU time of one thread.

    PYTHONPATH=tests python -m benchmarks.caption_metrics [--repeats N]

5,000 images and 25,000 captions with COCO's real ids, lists of a thousand places, as deep as the package's 1K recalls
are used. "Lists" is from ranked lists of ids, and like the package's time holds the reading of the truth; "ranks" is
from the ranks that our one pass leaves. The dictionaries of lists of numbers that the package takes are made before its
time is taken. Medians of interleaved repetitions; the exit status says whether the requirements are met.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from setwise.pipelines import benchmarks, metrics, positives, ranked_lists
from setwise.pipelines.positives import Positives

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about faster readers of JSON
    from eccv_caption import Metrics

TIMES_FASTER, DIFFERENCE = 25, 1e-15
DEPTH = 1_000
WANTED = ("coco_1k_recalls", "coco_5k_recalls", "cxc_recalls", "eccv_map_at_r", "eccv_rprecision", "eccv_r1")
KINDS = benchmarks.kinds("coco")
Ids = NDArray[np.int64]


def lists_of(true: Positives, item_ids: Ids, rng: np.random.Generator) -> Ids:
    """For each query of the split some of its positives near the beginning of a random list."""
    gallery = len(item_ids)
    # A walk over the shuffled gallery whose step has no divisor in common with its size meets each item once.
    steps = np.array([step for step in range(1, gallery) if np.gcd(step, gallery) == 1])
    queries = int(true.rows.max()) + 1
    start, step = rng.integers(0, gallery, (queries, 1)), rng.choice(steps, (queries, 1))
    items = rng.permutation(gallery)[(start + step * np.arange(DEPTH)) % gallery]
    for query, item, place in zip(true.query, true.item, rng.geometric(0.05, len(true.item)), strict=True):
        where = np.flatnonzero(items[query] == item)
        other = min(int(place) - 1, DEPTH - 1)
        if len(where):
            items[query, where[0]] = items[query, other]
        items[query, other] = item
    return item_ids[items]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    arguments.add_argument("--repeats", type=int, default=5)
    repeats = arguments.parse_args().repeats

    package = Metrics()
    caption_ids = package.coco_ids
    image_ids = np.array([package.coco_gts["t2i"][caption][0] for caption in caption_ids[::5].tolist()])
    owners = np.arange(len(caption_ids)) // 5
    truth = positives.caption_benchmark("cxc", image_ids, caption_ids)
    rng = np.random.default_rng(0)
    i2t, t2i = lists_of(truth.i2t, caption_ids, rng), lists_of(truth.t2i, image_ids, rng)
    shared = np.arange(int(max(caption_ids.max(), image_ids.max())) + 1).astype(object)  # one object an id

    def as_lists(ids: Ids, table: Ids) -> dict[int, list[int]]:
        return dict(zip(ids.tolist(), shared[table].tolist(), strict=True))

    their_i2t, their_t2i = as_lists(image_ids, i2t), as_lists(caption_ids, t2i)

    def theirs() -> dict[str, float]:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            found = Metrics().compute_all_metrics(their_i2t, their_t2i, WANTED, metrics.KS)
        return {f"{name} {direction}": value for name, both in found.items() for direction, value in both.items()}

    def from_lists() -> dict[str, float]:
        return named(ranked_lists.measure(KINDS, i2t, t2i, image_ids, caption_ids, owners))

    kept = ranks_of(i2t, t2i, image_ids, caption_ids, owners)
    runs: dict[str, Callable[[], dict[str, float]]] = {
        "eccv_caption": theirs,
        "lists": from_lists,
        "ranks": lambda: named(from_ranks(kept)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    values: dict[str, dict[str, float]] = {}
    for _ in range(repeats):
        for name, run in runs.items():
            before = time.process_time()
            values[name] = run()
            seconds[name].append(time.process_time() - before)

    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    ok = True
    print(f"{len(values['eccv_caption'])} numbers, {repeats} repetitions")
    print(f"{'from':<14}{'CPU s':>10}{'times faster':>14}{'difference':>13}")
    for name, taken in median.items():
        faster = median["eccv_caption"] / taken
        difference = max(abs(values[name][key] - value) for key, value in values["eccv_caption"].items())
        met = name == "eccv_caption" or (faster >= TIMES_FASTER and difference <= DIFFERENCE)
        ok &= met
        print(f"{name:<14}{taken:>10.4f}{faster:>14.1f}{difference:>13.1e}{'' if met else '   NOT MET'}")
    print(f"required: {TIMES_FASTER} times faster, differences of at most {DIFFERENCE:.0e}")
    return 0 if ok else 1


def named(values: dict[str, dict[str, float]]) -> dict[str, float]:
    """Our values under the package's names, as shares."""
    theirs = {"map_at_r": "map_at_r", "r_precision": "rprecision", "R1": "r1", "R5": "r5", "R10": "r10"}
    found = {}
    for benchmark, measured in values.items():
        for key, value in measured.items():
            direction, _, end = key.partition("_")
            if end in theirs:
                found[f"{benchmark}_{theirs[end]} {direction}"] = value / 100
    return found


def ranks_of(
    i2t: Ids, t2i: Ids, image_ids: Ids, caption_ids: Ids, owners: Ids
) -> dict[str, dict[str, tuple[Positives, Ids, Ids]]]:
    """By benchmark and direction: what is true, its ranks, and the fold of each query."""
    folds = benchmarks.folds(len(image_ids), owners)
    sides = {
        "i2t": ranked_lists.Side(i2t, caption_ids, folds[0], folds[1]),
        "t2i": ranked_lists.Side(t2i, image_ids, folds[1], folds[0]),
    }
    kept: dict[str, dict[str, tuple[Positives, Ids, Ids]]] = {}
    for name, kind in KINDS.items():
        truth = benchmarks.truth(kind, image_ids, caption_ids, owners, None)
        kept[name] = {}
        for direction, true in (("i2t", truth.i2t), ("t2i", truth.t2i)):
            side = sides[direction]
            if kind == "eccv":
                ranks = ranked_lists.ranks_in(side.lists, true, side.item_ids, int(true.relevant.max()))
            else:
                lists = ranked_lists.within_folds(side, max(metrics.KS)) if kind == "folds" else side.lists
                ranks = ranked_lists.best_in(lists, true, side.item_ids)
            kept[name][direction] = true, ranks, side.fold
    return kept


def from_ranks(kept: dict[str, dict[str, tuple[Positives, Ids, Ids]]]) -> dict[str, dict[str, float]]:
    values: dict[str, dict[str, float]] = {}
    for name, sides in kept.items():
        if KINDS[name] == "eccv":
            values[name] = {}
            for direction, (true, ranks, _) in sides.items():
                found = metrics.precisions(ranks, true.row(), true.relevant)
                values[name] |= {f"{direction}_{key}": value for key, value in found.items()}
        elif KINDS[name] == "folds":
            each = [
                metrics.recalls({d: ranks[fold == number] for d, (_, ranks, fold) in sides.items()})
                for number in range(benchmarks.FOLDS)
            ]
            values[name] = {key: float(np.mean([one[key] for one in each])) for key in each[0]}
        else:
            values[name] = metrics.recalls({direction: ranks for direction, (_, ranks, _) in sides.items()})
    return values


if __name__ == "__main__":
    sys.exit(main())
