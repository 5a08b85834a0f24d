"""Ranks of what is true, query by query: several truths asked in one pass over the similarities.

The scores of the true pairs come first, so that of a query with many captions only the best has to be counted.

Shape suffixes: P pairs, Q queries, A pairs that are asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from setwise.pipelines import metrics, ranking
from setwise.pipelines.positives import Integers, Positives, Truth, own_captions
from setwise.pipelines.ranking import Asked, Member, Ties
from setwise.platform.errors import DivergedError

Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class Ranked:
    """One direction of one truth, counted.

    best (Q,): rank of the best positive of each of `positives.rows`; one more than the gallery holds where it holds
    none. best_in_fold (Q,): the same among the items of the query's fold, where folds were given. every (P,): rank of
    each pair, exact up to R, where all were asked for.
    """

    positives: Positives
    best: Integers
    best_in_fold: Integers | None
    every: Integers | None


def check_finite(members: Sequence[Member], whose: str) -> None:
    """Raises DivergedError where an embedding, a parameter of a similarity, or a score that was computed beforehand is
    not a finite number."""
    for member in members:
        if not all(bool(x.isfinite().all()) for x in (member.rows, member.columns, *member.similarity.parameters())):
            raise DivergedError(
                f"{whose}: an embedding is NaN or infinite. The model has diverged, and no ranking of it means anything"
            )
        if member.scores is not None and not bool(member.scores.isfinite().all()):
            raise DivergedError(
                f"{whose}: a score is NaN or infinite. The model has diverged, and no ranking of it means anything"
            )


def count(
    members: Sequence[Member],
    truths: Mapping[Name, tuple[Truth, bool]],
    *,
    folds: tuple[Integers, Integers] | None = None,
    ties: Ties = "pessimistic",
    device: torch.device | None = None,
) -> dict[Name, dict[str, Ranked]]:
    """Count all truths in one pass.

    Args:
        members: the models whose scores are averaged.
        truths: by name, and whether the ranks of all positives are asked for, or only the best.
        folds: fold of each image and of each caption, ascending.

    Returns:
        By name and direction.

    Raises:
        ValueError: a score is NaN.
    """
    gallery = {"i2t": len(members[0].columns), "t2i": len(members[0].rows)}
    directed = [side for truth, _ in truths.values() for side in ((truth.i2t, False), (truth.t2i, True))]
    scores = _scores(members, directed, device)
    questions: dict[str, list[_Question]] = {direction: [] for direction in metrics.DIRECTIONS}
    for number, (truth, every) in enumerate(truths.values()):
        for place, (direction, true) in enumerate((("i2t", truth.i2t), ("t2i", truth.t2i))):
            question = _Question.of(true, scores[2 * number + place], every, ties, gallery[direction])
            questions[direction].append(question)
    by_rows, by_columns = (_asked(questions[direction]) for direction in metrics.DIRECTIONS)
    answers = ranking.count_ahead(members, by_rows, by_columns, folds=folds, ties=ties, device=device)
    ranked: dict[Name, dict[str, Ranked]] = {name: {} for name in truths}
    for direction, answer in zip(metrics.DIRECTIONS, answers, strict=True):
        assert answer is not None, "both sides were asked"
        start = 0
        for name, question in zip(truths, questions[direction], strict=True):
            asked = slice(start, start + len(question.asked))
            in_fold = None if answer.ahead_in_fold is None else answer.ahead_in_fold[asked]
            ranked[name][direction] = question.ranked(answer.ahead[asked], in_fold)
            start = asked.stop
    return ranked


def count_among_themselves(
    members: Sequence[Member], positives: Positives, *, ties: Ties, device: torch.device | None = None
) -> Ranked:
    """One side against itself: rank of each query's best positive among all the others, itself left out.

    Args:
        members: `rows` is `columns`.
    """
    scores = ranking.pair_scores(members, positives.query, positives.item, device)
    question = _Question.of(positives, scores, False, ties, len(members[0].rows))
    answers, _ = ranking.count_ahead(members, _asked([question]), None, ties=ties, device=device)
    query, item = positives.query[question.asked], positives.item[question.asked]
    itself, other = ranking.pair_scores(members, query, query, device), scores[question.asked]
    counted = itself >= other if ties == "pessimistic" else (itself > other) | ((itself == other) & (query > item))
    return question.ranked(answers.ahead - counted, None)


def own_metrics(members: Sequence[Member], owners: Integers, device: torch.device | None = None) -> dict[str, float]:
    """R@K, median and mean rank and RSUM of all images against all captions; owners (T,), each caption's image."""
    ranked = count(members, {"own": (own_captions(owners), False)}, device=device)["own"]
    return metrics.best_rank_metrics({direction: one.best for direction, one in ranked.items()})


@dataclass(frozen=True)
class _Question:
    """What is asked of one direction of one truth: `asked` (A,) indices of its pairs, `limit` (A,)."""

    positives: Positives
    asked: Integers
    limit: Integers
    place: Integers
    counted: Integers
    every: bool
    gallery: int

    @classmethod
    def of(cls, positives: Positives, scores: NDArray[np.float32], every: bool, ties: Ties, gallery: int) -> _Question:
        place, counted = metrics.places(positives.query, positives.item, scores, ties)
        asked = np.flatnonzero((place == 0) | every)
        # Of all but the best, a rank beyond R is of no interest. R positives may tie and count as ahead of each other.
        enough = 2 * positives.relevant[positives.row()[asked]]
        limit = np.where(place[asked] == 0, gallery, enough)
        return cls(positives, asked, limit, place[asked], counted[asked], every, gallery)

    def ranked(self, ahead: Integers, ahead_in_fold: Integers | None) -> Ranked:
        ranks = ahead - self.counted + self.place + 1
        best = self.place == 0
        row = self.positives.row()[self.asked[best]]

        def by_row(values: Integers) -> Integers:
            filled = np.full(len(self.positives.rows), self.gallery + 1)
            filled[row] = values
            return filled

        in_fold = None if ahead_in_fold is None else by_row((ahead_in_fold - self.counted + 1)[best])
        return Ranked(self.positives, by_row(ranks[best]), in_fold, ranks if self.every else None)


def _scores(
    members: Sequence[Member], directed: Sequence[tuple[Positives, bool]], device: torch.device | None
) -> list[NDArray[np.float32]]:
    """Scores of the pairs of each, whose queries are columns if it says so. What several hold is computed once."""
    rows = [true.item if by_columns else true.query for true, by_columns in directed]
    columns = [true.query if by_columns else true.item for true, by_columns in directed]
    width = len(members[0].columns)
    pairs, place = np.unique(np.concatenate(rows) * width + np.concatenate(columns), return_inverse=True)
    scores = ranking.pair_scores(members, pairs // width, pairs % width, device)[place]
    return np.split(scores, np.cumsum([len(row) for row in rows])[:-1])


def _asked(questions: Sequence[_Question]) -> Asked:
    return Asked(
        query=np.concatenate([one.positives.query[one.asked] for one in questions]),
        item=np.concatenate([one.positives.item[one.asked] for one in questions]),
        limit=np.concatenate([one.limit for one in questions]),
    )
