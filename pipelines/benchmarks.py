"""The benchmarks by name: which queries meet which gallery, what is true, and what is reported.

Each value comes with its protocol: everything that makes two numbers comparable or not. Values are compared only
where the fingerprints of their protocols are equal. All values are percentages, correlations too (papers print 61.9),
but ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from setwise.pipelines import crisscrossed, metrics, positives, protocol, query_ranks, ranking
from setwise.pipelines.positives import Integers, Truth
from setwise.pipelines.query_ranks import Ranked
from setwise.pipelines.ranking import Member, Ties
from setwise.platform import storage

FOLDS = 5
FOLD_IMAGES = 1000  # of the COCO 1K protocol
Kind = Literal["whole", "folds", "extended", "eccv", "cxc"]
FAMILIES: dict[str, dict[str, Kind]] = {
    "coco": {"coco_1k": "folds", "coco_5k": "whole", "eccv": "eccv", "cxc": "cxc"},
    "f30k": {"f30k": "whole"},
    "digits": {"digits_1k": "folds", "digits_5k": "whole", "digits_extended": "extended"},
}
"""The benchmarks of the data sets of the literature, and of the one that comes with us."""
PUBLISHED_IDS = ("coco", "f30k")


@dataclass(frozen=True)
class QueryRanks:
    """What was found of each query of a direction, for paired tests.

    ids (Q,) int64; images (Q,) int64, the image that each belongs to: a caption's, or itself; ranks (Q,) int32 of the
    best positive. Where the benchmark reports them, average_precision (Q,), its AP@R, and r_precision (Q,), as float32
    shares. Where it is an average over folds, fold (Q,) int8.
    """

    ids: Integers
    images: Integers
    ranks: NDArray[np.int32]
    average_precision: NDArray[np.float32] | None = None
    r_precision: NDArray[np.float32] | None = None
    fold: NDArray[np.int8] | None = None


@dataclass(frozen=True)
class Outcome:
    """The values of one benchmark, the protocol they were measured under, and each query's result by direction."""

    benchmark: str
    values: dict[str, float]
    protocol: dict[str, Any]
    ranks: dict[str, QueryRanks] = field(default_factory=dict, compare=False)

    @property
    def fingerprint(self) -> str:
        return storage.fingerprint(self.protocol)

    @property
    def task(self) -> str:
        """The fingerprint without the similarity: by it two models are compared that bring their own."""
        return storage.fingerprint({key: value for key, value in self.protocol.items() if key != "similarity"})

    def to_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "values": self.values,
            "protocol": self.protocol,
            "fingerprint": self.fingerprint,
        }


@dataclass(frozen=True)
class Encoded:
    """The sets of a split by one model or, as an ensemble, by several, and the ids that say which pairs match.

    members: rows are images, columns captions; owners (T,) index of each caption's image, ascending; image_ids (I,) and
    caption_ids (T,) as in the data set. texts stands for the captions' wording, where ids are no publisher's and so do
    not say which images they are of.
    """

    members: tuple[Member, ...]
    owners: Integers
    image_ids: Integers
    caption_ids: Integers
    texts: str | None = None

    def protocol(self, ties: Ties, **more: Any) -> dict[str, Any]:
        """What every benchmark shares, and `more`."""
        pairs = [self.image_ids.tolist(), self.caption_ids.tolist(), self.owners.tolist()]
        similarities = [protocol.of_similarity(member.similarity) for member in self.members]
        return {
            "images": len(self.image_ids),
            "captions": len(self.caption_ids),
            "ids": storage.fingerprint(pairs),
            "ties": ties,
            "members": len(self.members),
            "similarity": similarities[0] if len(similarities) == 1 else similarities,
            **({"texts": self.texts} if self.texts is not None else {}),
            **more,
        }


def family(dataset: str) -> str:
    """The data set of the literature that `dataset` is a form of, as coco_butd is of coco; else its own name."""
    start = dataset.partition("_")[0]
    return start if start in FAMILIES else dataset


def has_published_ids(dataset: str) -> bool:
    """Whether ids of images and captions mean the same wherever the data set is prepared."""
    return family(dataset) in PUBLISHED_IDS


def kinds(dataset: str) -> dict[str, Kind]:
    """The benchmarks that a data set may have, by name; `unavailable` says which of them a split lacks."""
    other: dict[str, Kind] = {dataset: "whole", f"{dataset}_folds": "folds", f"{dataset}_extended": "extended"}
    return FAMILIES.get(family(dataset), other)


def names(dataset: str) -> tuple[str, ...]:
    """The names of the benchmarks that a data set may have."""
    return tuple(kinds(dataset))


def unavailable(
    wanted: Mapping[str, Kind], image_ids: Integers, caption_ids: Integers, owners: Integers, extended: Path
) -> dict[str, str]:
    """Of the wanted benchmarks those that cannot be measured on a split, with the reason."""
    found = {}
    for name, kind in wanted.items():
        if kind == "folds" and len(image_ids) < FOLDS:
            found[name] = f"{len(image_ids)} images do not make {FOLDS} folds"
        elif kind == "extended" and not extended.is_dir():
            found[name] = "the data set has no extended positives"
        elif kind in ("eccv", "cxc") and (reason := positives.not_coco(image_ids, caption_ids, owners)):
            found[name] = f"its truth is about COCO's test split, and {reason}"
        elif kind in ("extended", "eccv", "cxc"):
            true = truth(kind, image_ids, caption_ids, owners, extended)
            if not len(true.i2t.rows) or not len(true.t2i.rows):
                found[name] = "of the images or of the captions that it asks about, the split has none"
    return found


def measure(
    wanted: Mapping[str, Kind],
    encoded: Encoded,
    *,
    extended: Path,
    cxc: Path | None = None,
    ties: Ties = "pessimistic",
    device: torch.device | None = None,
) -> list[Outcome]:
    """The wanted benchmarks, none of them `unavailable`, from one pass over the similarities.

    Args:
        extended: folder of the extended positives, where the data set has them.
        cxc: folder with CxC's ratings, for text-text and image-image retrieval, which take a pass each, and for the
            correlations; None leaves them out.
        ties: "official" ranks as the authors' code sorts: of equal scores the later index is ahead.

    Raises:
        DataError: a file of the truth is damaged.
        ValueError: a score is NaN.
    """
    true = truths(wanted, encoded.image_ids, encoded.caption_ids, encoded.owners, extended)
    rated = _Rated(crisscrossed.read(cxc), crisscrossed.fingerprints(cxc)) if cxc and "cxc" in wanted.values() else None
    in_folds = folds(len(encoded.image_ids), encoded.owners) if "folds" in wanted.values() else None
    asked = {kind: (what, kind in ("extended", "eccv")) for kind, what in true.items()}
    counted = query_ranks.count(encoded.members, asked, folds=in_folds, ties=ties, device=device)

    outcomes = []
    for name, kind in wanted.items():
        ranked = counted[asks(kind)]
        found = _Found(values={}, protocol={}, ranks={})
        if kind == "whole":
            found.values |= metrics.best_rank_metrics({direction: one.best for direction, one in ranked.items()})
            found.protocol |= {"grouping": "own captions", "folds": 1}
        elif kind == "folds":
            assert in_folds is not None
            _add_folds(found, ranked, in_folds)
        else:
            grouping = {"eccv": "ECCV Caption", "cxc": "CxC", "extended": "extended positives"}[kind]
            found.protocol |= {"grouping": grouping, **_queries(true[kind])}
            if kind == "cxc":
                found.values |= metrics.recalls({direction: one.best for direction, one in ranked.items()})
            else:
                _add_precisions(found, ranked)
        if not found.ranks:
            found.ranks |= {direction: (one.positives.rows, one.best) for direction, one in ranked.items()}
        if kind == "cxc" and rated is not None:
            _add_ratings(found, encoded, rated, ties, device)
        outcomes.append(found.outcome(name, encoded, ties))
    return outcomes


class _Rated(NamedTuple):
    """CxC's ratings by task, and the hash of each file."""

    ratings: dict[str, crisscrossed.Rated]
    files: dict[str, str]


@dataclass
class _Found:
    """A benchmark in the making: by direction, ranks as (rows, ranks), and what else QueryRanks keeps."""

    values: dict[str, float]
    protocol: dict[str, Any]
    ranks: dict[str, tuple[Integers, Integers]]
    more: dict[str, dict[str, NDArray[Any]]] = field(default_factory=dict)

    def outcome(self, name: str, encoded: Encoded, ties: Ties) -> Outcome:
        ranks = {}
        for direction, (rows, found) in self.ranks.items():
            by_image = direction.startswith("i")
            ids = (encoded.image_ids if by_image else encoded.caption_ids)[rows]
            images = ids if by_image else encoded.image_ids[encoded.owners[rows]]
            ranks[direction] = QueryRanks(ids, images, found.astype(np.int32), **self.more.get(direction, {}))
        return Outcome(name, self.values, encoded.protocol(ties, **self.protocol), ranks)


def truth(kind: Kind, image_ids: Integers, caption_ids: Integers, owners: Integers, extended: Path | None) -> Truth:
    """What is true in benchmarks of a kind.

    Raises:
        DataError: a file of the truth is missing or damaged.
    """
    if kind in ("eccv", "cxc"):
        return positives.caption_benchmark(kind, image_ids, caption_ids)
    if kind == "extended":
        assert extended is not None, "else the benchmark is unavailable"
        return positives.extended(extended, image_ids, caption_ids)
    return positives.own_captions(owners)


def truths(
    wanted: Mapping[str, Kind], image_ids: Integers, caption_ids: Integers, owners: Integers, extended: Path | None
) -> dict[Kind, Truth]:
    """The truth of each kind of benchmark that is wanted, once; see `asks`."""
    kinds = dict.fromkeys(asks(kind) for kind in wanted.values())
    return {kind: truth(kind, image_ids, caption_ids, owners, extended) for kind in kinds}


def asks(kind: Kind) -> Kind:
    """The kind whose truth it shares: folds ask for the same as the whole split, only of fewer items."""
    return "whole" if kind == "folds" else kind


def _queries(true: Truth) -> dict[str, Any]:
    """How many queries were measured, and of how many that the truth names."""
    return {
        "truth": dict(true.files),
        "queries": {"i2t": len(true.i2t.rows), "t2i": len(true.t2i.rows)},
        "queries_named": {"i2t": true.i2t.named, "t2i": true.t2i.named},
    }


def folds(images: int, owners: Integers) -> tuple[Integers, Integers]:
    """The fold of each image and caption: five consecutive ones of 1,000 images, or of a fifth of a smaller split;
    what comes after the last is numbered FOLDS, and belongs to none."""
    size = min(FOLD_IMAGES, images // FOLDS)
    fold = np.minimum(np.arange(images) // max(size, 1), FOLDS)
    return fold, fold[owners]


def _add_folds(found: _Found, ranked: Mapping[str, Ranked], sides: tuple[Integers, Integers]) -> None:
    """R@K within each fold, averaged: the COCO 1K protocol."""
    in_folds: list[dict[str, Integers]] = [{} for _ in range(FOLDS)]
    for (direction, one), fold in zip(ranked.items(), sides, strict=True):
        assert one.best_in_fold is not None, "folds were given"
        inside = fold[one.positives.rows]
        for number in range(FOLDS):
            in_folds[number][direction] = one.best_in_fold[inside == number]
        kept = inside < FOLDS
        found.ranks[direction] = one.positives.rows[kept], one.best_in_fold[kept]
        found.more[direction] = {"fold": inside[kept].astype(np.int8)}
    each = [metrics.best_rank_metrics(ranks) for ranks in in_folds]
    found.values.update({key: float(np.mean([values[key] for values in each])) for key in each[0]})
    size = int((sides[0] == 0).sum())
    found.protocol.update({"grouping": "own captions", "folds": FOLDS, "images_per_fold": size})


def _add_precisions(found: _Found, ranked: Mapping[str, Ranked]) -> None:
    """mAP@R, R-Precision and R@1 where all that is true counts, and not only what was written. The gallery is whole."""
    for direction, one in ranked.items():
        assert one.every is not None, "all ranks were asked for"
        precise = metrics.query_precisions(one.every, one.positives.row(), one.positives.relevant)
        found.values |= {f"{direction}_{key}": value for key, value in precise.means().items()}
        found.more[direction] = {
            "average_precision": precise.average.astype(np.float32),
            "r_precision": precise.precision.astype(np.float32),
        }


def _add_ratings(found: _Found, encoded: Encoded, given: _Rated, ties: Ties, device: torch.device | None) -> None:
    """Retrieval among captions and among images, and correlations, as far as the split has what was rated."""
    ratings = given.ratings
    found.protocol["truth"] |= given.files
    texts = tuple(Member(one.columns, one.columns, one.similarity) for one in encoded.members)
    pictures = tuple(Member(one.rows, one.rows, one.similarity) for one in encoded.members)
    image_ids, caption_ids = encoded.image_ids, encoded.caption_ids
    if not all(one.similarity.of_dot_products for one in encoded.members):
        return  # cross-attention compares an image with a caption, and nothing else
    among = {
        "t2t": (texts, crisscrossed.text_positives(ratings["sts"], caption_ids, encoded.owners)),
        "i2i": (pictures, crisscrossed.image_positives(ratings["sis"], image_ids)),
    }
    for direction, (members, true) in among.items():
        if len(true.rows):
            one = query_ranks.count_among_themselves(members, true, ties=ties, device=device)
            found.values.update(metrics.recalls({direction: one.best}))
            found.ranks[direction] = true.rows, one.best
            found.protocol["queries"][direction] = len(true.rows)
    sides = {"sts": (texts, caption_ids, caption_ids), "sis": (pictures, image_ids, image_ids)}
    for task, (members, firsts, seconds) in (sides | {"sits": (encoded.members, caption_ids, image_ids)}).items():
        rated = ratings[task]
        first, second = positives.find(firsts, rated.first), positives.find(seconds, rated.second)
        here = (first >= 0) & (second >= 0)
        row, column = (second, first) if task == "sits" else (first, second)
        similarity = ranking.pair_scores(members, row[here], column[here], device)
        correlated = crisscrossed.correlation(first[here], similarity, rated.rating[here])
        if correlated is not None:
            found.values.update({f"{task}_spearman": correlated[0], f"{task}_spearman_std": correlated[1]})
            found.protocol["queries"][task] = len(np.unique(first[here]))
