"""Ranks by scores that were computed one by one are those of a count over the whole matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

import reference.cross_attention as naive
from setwise.models.cross_attention import CrossAttention
from setwise.models.loss_config import SimilarityConfig
from setwise.models.similarity import Similarity
from setwise.pipelines import query_ranks, ranking, score_matrices
from setwise.pipelines.ranking import Answers, Asked, Member, Ties

Integers = NDArray[np.int64]
ROWS, COLUMNS, DIM = 7, 19, 6
OWNERS = np.sort(np.random.default_rng(0).integers(ROWS, size=COLUMNS))
FOLDS = np.array([-1, -1, 0, 0, 1, 1, 2]), np.array([-1, -1, -1] + [0] * 6 + [1] * 4 + [2] * 6)
each_rule = pytest.mark.parametrize("ties", ["pessimistic", "official"])


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a gallery that is larger than what is looked at at once."""
    monkeypatch.setattr(score_matrices, "CELLS", 50)


def units(seed: int, *shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def attention() -> Member:
    torch.manual_seed(0)
    similarity = CrossAttention(SimilarityConfig(kind="cross_attention"), DIM)
    return ranking.member(units(1, ROWS, 3, DIM), units(2, COLUMNS, 2, DIM), similarity)


def decomposable() -> Member:
    return ranking.member(units(3, ROWS, 2, 9), units(4, COLUMNS, 1, 9), Similarity(SimilarityConfig(kind="chamfer")))


def given(scores: NDArray[np.float32]) -> Member:
    """A member whose scores are made up."""
    one = attention()
    return Member(one.rows, one.columns, one.similarity, torch.from_numpy(scores))


def asked(queries: int, items: int, seed: int) -> Asked:
    """Pairs in no order; some queries several times, some never."""
    rng = np.random.default_rng(seed)
    return Asked(rng.integers(queries, size=2 * queries), rng.integers(items, size=2 * queries))


def counted(scores: NDArray[np.float32], questions: Asked, ties: Ties, folds: tuple[Integers, Integers]) -> Answers:
    """One item after another, of the gallery in the columns."""
    ahead, inside = [], []
    for query, item in zip(questions.query.tolist(), questions.item.tolist(), strict=True):
        own, number, in_fold = scores[query, item], 0, 0
        for other, score in enumerate(scores[query].tolist()):
            equal_counts = other > item if ties == "official" else other != item
            if score > own or (score == own and equal_counts):
                number += 1
                in_fold += bool(folds[0][query] >= 0 and folds[0][query] == folds[1][other])
        ahead.append(number)
        inside.append(in_fold)
    return Answers(scores[questions.query, questions.item], np.array(ahead), np.array(inside))


def check(members: list[Member], scores: NDArray[np.float32], ties: Ties) -> None:
    by_rows, by_columns = asked(ROWS, COLUMNS, 5), asked(COLUMNS, ROWS, 6)
    found = ranking.count_ahead(members, by_rows, by_columns, folds=FOLDS, ties=ties)
    expected = counted(scores, by_rows, ties, FOLDS), counted(scores.T, by_columns, ties, FOLDS[::-1])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None and ours.ahead_in_fold is not None
        np.testing.assert_array_equal(ours.scores, theirs.scores)
        np.testing.assert_array_equal(ours.ahead, theirs.ahead)
        np.testing.assert_array_equal(ours.ahead_in_fold, theirs.ahead_in_fold)
        assert ours.ahead.any() and ours.ahead_in_fold.any()
    without, nobody = ranking.count_ahead(members, by_rows, None, ties=ties)
    np.testing.assert_array_equal(without.ahead, expected[0].ahead)
    assert nobody is None and without.ahead_in_fold is None


@each_rule
def test_ranks_are_those_of_the_whole_matrix(ties: Ties) -> None:
    one = attention()
    assert one.scores is not None
    expected = naive.scores(one.similarity, one.rows, one.columns).detach()  # type: ignore[arg-type]
    torch.testing.assert_close(one.scores, expected, rtol=0, atol=1e-6)
    check([one], one.scores.numpy(), ties)
    np.testing.assert_array_equal(ranking.score_matrix([one]), one.scores)
    np.testing.assert_array_equal(
        ranking.pair_scores([one], OWNERS, np.arange(COLUMNS)), one.scores[OWNERS, range(COLUMNS)]
    )


@each_rule
def test_equal_scores_are_counted_by_the_rule(ties: Ties) -> None:
    coarse = np.random.default_rng(7).integers(3, size=(ROWS, COLUMNS)).astype(np.float32)
    check([given(coarse)], coarse, ties)
    check([given(np.zeros_like(coarse))], np.zeros_like(coarse), ties)


@each_rule
def test_an_ensemble_averages_members_of_both_kinds(ties: Ties) -> None:
    one, other = attention(), decomposable()
    assert one.scores is not None and other.scores is None
    mean = (one.scores.double() + torch.from_numpy(ranking.score_matrix([other])).double()) / 2
    for members in ([one, other], [other, one]):
        check(members, mean.float().numpy(), ties)
    check([one, given(-one.scores.numpy())], np.zeros((ROWS, COLUMNS), np.float32), ties)


def test_what_is_known_exactly_satisfies_any_limit() -> None:
    one, questions = attention(), asked(ROWS, COLUMNS, 5)
    limited = Asked(questions.query, questions.item, np.full(len(questions.query), 2))
    found, expected = (ranking.count_ahead([one], each, None)[0].ahead for each in (limited, questions))
    np.testing.assert_array_equal(found, expected)


def test_members_of_other_sets_are_refused() -> None:
    one, other = attention(), decomposable()
    fewer = Member(other.rows[1:], other.columns, other.similarity)
    for members in ([one, fewer], [fewer, one]):
        with pytest.raises(ValueError, match="scores can be averaged only over the same ones"):
            ranking.count_ahead(members, asked(ROWS, COLUMNS, 5), None)


def test_a_score_that_is_no_number_is_refused() -> None:
    scores = np.zeros((ROWS, COLUMNS), np.float32)
    scores[3, 4] = np.nan
    for by_columns in (None, asked(COLUMNS, ROWS, 6)):
        with pytest.raises(ValueError, match="NaN"):
            ranking.count_ahead([given(scores)], asked(ROWS, COLUMNS, 5), by_columns)


def test_the_metrics_of_a_split_are_those_of_ranks_counted_by_hand() -> None:
    one = attention()
    assert one.scores is not None
    scores = one.scores.numpy()
    found = query_ranks.own_metrics([one], OWNERS)
    captions = [int((scores[:, t] >= scores[OWNERS[t], t]).sum()) for t in range(COLUMNS)]
    images = [
        min(int((scores[i] >= scores[i, t]).sum()) for t in np.flatnonzero(i == OWNERS)) for i in np.unique(OWNERS)
    ]
    for direction, ranks in (("i2t", images), ("t2i", captions)):
        for k in (1, 5, 10):
            assert found[f"{direction}_R{k}"] == pytest.approx(100 * np.mean(np.array(ranks) <= k))
