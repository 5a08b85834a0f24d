"""Ranks are those of the exact scores, whatever they are computed with."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

import reference.similarity as naive
from reference import official_evaluation
from setwise.models.loss_config import SimilarityConfig
from setwise.models.similarity import Similarity
from setwise.pipelines import block_scores, ranking, screens
from setwise.pipelines.pooling import Pooling
from setwise.pipelines.ranking import Answers, Asked, Member, Ties, count_ahead, pair_scores, score_matrix

KINDS = ("smooth_chamfer", "chamfer", "mil", "match_probability", "cosine", "pcme", "csd")
SCREENS: tuple[screens.Screen, ...] = ("int8", "bf16", "float32")
TIES: tuple[Ties, ...] = ("pessimistic", "official")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_screen = pytest.mark.parametrize("screen", SCREENS)


@pytest.fixture(autouse=True)
def many_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of tests fit in one block; so there are as many as of a large split."""
    monkeypatch.setattr(block_scores, "VECTORS", {"cpu": (27, 32)})
    monkeypatch.setattr(block_scores, "PAIRS", {"cpu": 5})
    monkeypatch.setattr(ranking, "MANY", 9)


def similarity(kind: str, alpha: float = 16) -> Similarity:
    made = Similarity(SimilarityConfig.model_validate({"kind": kind, "alpha": alpha}))
    if kind == "match_probability":
        made.load_state_dict({"scale": torch.tensor(9.0), "shift": torch.tensor(-2.5)})
    return made


def vectors(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def member(
    kind: str = "smooth_chamfer", alpha: float = 16, K: int = 3, J: int = 2, D: int = 20, seed: int = 0
) -> Member:
    """23 images of 1 to 4 captions that resemble them; of pcme and csd the vectors are of any length."""
    rows = vectors(seed, 23, K, D)
    columns = rows[torch.from_numpy(owners())].repeat(1, -(-J // K), 1)[:, :J] + 2 * vectors(seed + 1, 57, J, D)
    if kind in ("pcme", "csd"):
        return Member(rows / D**0.5, columns / D**0.5, similarity(kind))
    return Member(F.normalize(rows, dim=-1), F.normalize(columns, dim=-1), similarity(kind, alpha))


def owners() -> NDArray[np.int64]:
    return np.repeat(np.arange(23), [1, 2, 3, 4] * 5 + [2, 3, 2])


def asked(queries: int, items: int, seed: int = 2, limit: int | None = None) -> Asked:
    """Pairs in no order; some queries several times, some never."""
    rng = np.random.default_rng(seed)
    query, item = rng.integers(queries, size=2 * queries), rng.integers(items, size=2 * queries)
    return Asked(query, item, None if limit is None else rng.integers(1, limit, size=len(query)))


def oracle_scores(members: list[Member]) -> NDArray[np.float32]:
    """One pair after another, one element after another."""
    each = []
    for one in members:
        config, rows, columns = one.similarity.config, one.rows.double().numpy(), one.columns.double().numpy()
        if config.kind == "pcme":
            each.append(np.array([[probability(x, y, 15, 15) for y in columns] for x in rows]))
            continue
        if config.kind == "csd":
            each.append(np.array([[closed_form(x, y, 5, 5) for y in columns] for x in rows]))
            continue
        pooled = {
            "smooth_chamfer": lambda cosines, alpha=config.alpha: safe_smooth_chamfer(cosines, alpha),
            "chamfer": naive.chamfer,
            "mil": naive.mil,
            "match_probability": lambda cosines: naive.match_probability(cosines, 9.0, -2.5),
            "cosine": lambda cosines: float(cosines.mean()),
        }
        each.append(naive.each_pair(rows, columns, pooled[config.kind]))
    return np.mean(each, axis=0).astype(np.float32)


def safe_smooth_chamfer(cosines: NDArray[np.float64], alpha: float) -> float:
    """Where exponentials of alpha times a cosine are no numbers."""

    def mean_of_logs(rows: NDArray[np.float64]) -> float:
        each = [alpha * max(row) + math.log(sum(math.exp(alpha * (c - max(row))) for c in row)) for row in rows]
        return sum(each) / len(each)

    return (mean_of_logs(cosines) + mean_of_logs(cosines.T)) / (2 * alpha)


def probability(x: NDArray[np.float64], y: NDArray[np.float64], scale: float, shift: float) -> float:
    distances = [math.dist(a, b) for a, b in itertools.product(x, y)]
    return sum(1 / (1 + math.exp(scale * distance - shift)) for distance in distances) / len(distances)


def closed_form(x: NDArray[np.float64], y: NDArray[np.float64], scale: float, shift: float) -> float:
    squares = [sum((c - d) ** 2 for c, d in zip(a, b, strict=True)) for a, b in itertools.product(x, y)]
    return sum(shift - scale * square for square in squares) / len(squares)


def oracle(scores: NDArray[np.float32], questions: Asked, ties: Ties, folds: tuple[NDArray[np.int64], ...]) -> Answers:
    found, ahead, inside = [], [], []
    for query, item in zip(questions.query.tolist(), questions.item.tolist(), strict=True):
        better = [
            other
            for other, score in enumerate(scores[query])
            if score > scores[query, item]
            or (score == scores[query, item] and (other > item if ties == "official" else other != item))
        ]
        fold = folds[0][query]
        found.append(scores[query, item])
        ahead.append(len(better))
        inside.append(sum(1 for other in better if folds[1][other] == fold >= 0))
    return Answers(np.array(found, np.float32), np.array(ahead, int), np.array(inside, int))


def assert_same(found: Answers | None, expected: Answers) -> None:
    assert found is not None
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.ahead, expected.ahead)
    if found.ahead_in_fold is not None:
        np.testing.assert_array_equal(found.ahead_in_fold, expected.ahead_in_fold)


def check(members: list[Member], screen: screens.Screen) -> None:
    """Both directions, both rules for ties and uneven folds against the oracle."""
    rows, columns = len(members[0].rows), len(members[0].columns)
    by_rows, by_columns = asked(rows, columns), asked(columns, rows, seed=3)
    folds = np.arange(rows) * 4 // rows - 1, np.arange(columns) * 4 // columns - 1
    scores = oracle_scores(members)
    for ties in TIES:
        found = count_ahead(members, by_rows, by_columns, folds=folds, ties=ties, screen=screen)
        assert_same(found[0], oracle(scores, by_rows, ties, folds))
        assert_same(found[1], oracle(scores.T, by_columns, ties, folds[::-1]))


@each_kind
@each_screen
def test_ranks_are_those_of_the_whole_matrix(kind: str, screen: screens.Screen) -> None:
    check([member(kind)], screen)
    check([member(kind, K=1, J=1, seed=4)], screen)


@each_kind
@each_screen
def test_equal_sets_tie_wherever_they_stand(kind: str, screen: screens.Screen) -> None:
    one, rng = member(kind), np.random.default_rng(5)
    few = Member(one.rows[rng.integers(3, size=23)], one.columns[rng.integers(4, size=57)], one.similarity)
    check([few], screen)


@each_kind
@each_screen
@pytest.mark.parametrize("noise", [0, 1e-7, 1e-4, 1e-2])
def test_collapsed_embeddings_are_ranked_all_the_same(kind: str, screen: screens.Screen, noise: float) -> None:
    direction = F.normalize(vectors(6, 20), dim=0)
    sides = [F.normalize(direction + noise * vectors(seed, size, 2, 20), dim=-1) for seed, size in ((7, 23), (8, 57))]
    check([Member(*sides, similarity(kind))], screen)


@each_kind
@each_screen
def test_opposite_embeddings_are_ranked(kind: str, screen: screens.Screen) -> None:
    one = member(kind)
    check([Member(one.rows, -one.rows[torch.from_numpy(owners())] + 1e-3 * one.columns[:, :1], one.similarity)], screen)


@each_screen
@pytest.mark.parametrize("alpha", [0.01, 1, 5, 20, 50, 100, 200, 1024])
def test_any_alpha_is_computed_safely(alpha: float, screen: screens.Screen) -> None:
    one = member(alpha=alpha)
    check([one], screen)
    check([Member(one.rows, torch.cat([one.rows, -one.rows])[:, :2], one.similarity)], screen)  # cosines of 1 and -1


@each_screen
def test_members_of_an_ensemble_are_averaged(screen: screens.Screen) -> None:
    others = [member("pcme", K=1, J=4, D=9, seed=9), member("match_probability", K=2, J=1, D=33, seed=11)]
    check([member(), *others], screen)
    check([member("csd", K=1, J=1, D=22, seed=10), member("csd", seed=13), member()], screen)
    check([member("cosine"), member("mil", seed=12)], screen)


@each_screen
@pytest.mark.parametrize(("rows", "columns"), [(1, 57), (23, 1), (1, 1)])
def test_a_side_may_have_one_set(rows: int, columns: int, screen: screens.Screen) -> None:
    one = member()
    check([Member(one.rows[:rows], one.columns[:columns], one.similarity)], screen)


def test_nothing_may_be_asked() -> None:
    nothing = Asked(np.empty(0, int), np.empty(0, int))
    rows, columns = count_ahead([member()], nothing, nothing, screen="int8")
    assert columns is not None and len(rows.ahead) == len(columns.ahead) == len(rows.scores) == 0
    assert count_ahead([member()], asked(23, 57), None)[1] is None
    assert len(pair_scores([member()], np.empty(0, int), np.empty(0, int))) == 0


@each_kind
@each_screen
def test_one_side_against_itself_takes_half_of_the_blocks(
    kind: str, screen: screens.Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = torch.cat([member(kind).columns, member(kind).columns[:5]])
    among, questions = [Member(captions, captions, similarity(kind))], asked(62, 62, seed=4)
    compared, scores = 0, block_scores.Comparison.scores

    def counted(self: block_scores.Comparison, block: block_scores.Block, precision: screens.Precision) -> object:
        nonlocal compared
        compared += (block.rows.stop - block.rows.start) * (block.columns.stop - block.columns.start)
        return scores(self, block, precision)

    monkeypatch.setattr(block_scores.Comparison, "scores", counted)
    monkeypatch.setattr(ranking, "SHARE", 1)  # so that no block is computed twice
    folds = np.arange(62) // 20, np.arange(62) // 20
    for ties in TIES:
        compared = 0
        found, other = count_ahead(among, questions, None, folds=folds, ties=ties, screen=screen)
        assert other is None and compared < 0.7 * 62 * 62
        assert_same(found, oracle(oracle_scores(among), questions, ties, folds))


@each_screen
def test_counts_are_exact_up_to_the_limit_and_reach_it(screen: screens.Screen) -> None:
    one, questions = member(), (asked(23, 57, limit=9), asked(57, 23, seed=3, limit=9))
    exact = count_ahead([one], *(Asked(question.query, question.item) for question in questions), screen=screen)
    limited = count_ahead([one], *questions, screen=screen)
    for question, found, true in zip(questions, limited, exact, strict=True):
        assert found is not None and true is not None and question.limit is not None
        assert (found.ahead[true.ahead < question.limit] == true.ahead[true.ahead < question.limit]).all()
        assert (found.ahead[true.ahead >= question.limit] >= question.limit[true.ahead >= question.limit]).all()
        assert (found.ahead < true.ahead).any(), "no pair was dropped"


@each_kind
def test_the_score_of_a_pair_does_not_depend_on_its_company(kind: str) -> None:
    members = [member(kind, D=300), member(seed=13)]
    row, column = (index.ravel() for index in np.indices((23, 57)))
    scores = pair_scores(members, row, column)
    order = np.random.default_rng(14).permutation(len(row))
    assert np.array_equal(pair_scores(members, row[order], column[order]), scores[order])
    alone = [pair_scores(members, row[i : i + 1], column[i : i + 1]) for i in range(9)]
    assert np.array_equal(np.concatenate(alone), scores[:9])
    assert np.array_equal(score_matrix(members).ravel(), scores)
    assert np.array_equal(scores.reshape(23, 57), oracle_scores(members))


def test_a_score_halfway_between_two_floats_is_rounded_to_even() -> None:
    """So no bound on its error says which of them it is, and the pair is computed alone."""
    x, y = torch.tensor([[[1, 1.5 * 2**-24]]]), torch.tensor([[[0.5, 1.0]]])
    one = Member(x, y, similarity("mil"))
    assert score_matrix([one]) == pair_scores([one], np.array([0]), np.array([0])) == np.float32(0.5 + 2**-23)


def test_embeddings_stay_as_they_are() -> None:
    one = member(K=1, J=1)
    before = one.rows.clone(), one.columns.clone()
    for screen in SCREENS:
        count_ahead([one], asked(23, 57), None, screen=screen)
    score_matrix([one])
    assert torch.equal(one.rows, before[0]) and torch.equal(one.columns, before[1])


@each_screen
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e10])
def test_embeddings_that_are_no_numbers_are_refused(bad: float, screen: screens.Screen) -> None:
    one = member()
    one.columns[40, 1, 3] = bad
    first = np.array([0])
    counted = partial(count_ahead, [one], asked(23, 57), None, screen=screen)
    for call in (counted, partial(pair_scores, [one], first, first), partial(score_matrix, [one])):
        with pytest.raises(ValueError, match="NaN, infinite or longer than 1e\\+09"):
            call()


def test_what_does_not_fit_is_refused() -> None:
    one, other = member(), member()
    with pytest.raises(ValueError, match="23 x 57 and 22 x 57"):
        count_ahead([one, Member(other.rows[1:], other.columns, other.similarity)], asked(23, 57), None)
    for folds in ((np.zeros(22, int), np.zeros(57, int)), (np.arange(23)[::-1], np.zeros(57, int))):
        with pytest.raises(ValueError, match="23 rows and 57 columns"):
            count_ahead([one], asked(23, 57), None, folds=folds)
    with pytest.raises(ValueError, match="57 sets have indices"):
        count_ahead([one], Asked(np.array([0]), np.array([57])), None)


def test_low_precision_allowed_for_training_is_not_used_here() -> None:
    one, questions = member(), asked(23, 57)
    expected = count_ahead([one], questions, None, screen="float32")[0]
    torch.set_float32_matmul_precision("medium")
    try:
        assert_same(count_ahead([one], questions, None, screen="float32")[0], expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "csd"])
def test_agrees_with_the_authors_loop(kind: str) -> None:
    one = member(kind, seed=15)
    if kind == "match_probability":
        one.similarity.load_state_dict({"scale": torch.tensor(1.0), "shift": torch.tensor(0.0)})
    own = Asked(owners(), np.arange(57)), Asked(np.arange(57), owners())
    by_rows, by_columns = count_ahead([one], *own, ties="official")
    assert by_columns is not None
    if kind == "pcme":
        scores = [official_evaluation.sampled_match_probabilities(x, one.columns, 15, 15).numpy() for x in one.rows]
        np.testing.assert_allclose(np.stack(scores), score_matrix([one]), rtol=1e-5)
        return
    best = [by_rows.ahead[owners() == image].min() for image in range(23)]
    sides = one.rows, one.columns, owners(), one.similarity.config, range(23)
    assert np.array_equal(official_evaluation.image_ranks(*sides), best)
    assert np.array_equal(official_evaluation.caption_ranks(*sides), by_columns.ahead)


def misjudged(D: int = 64) -> Tensor:
    """A vector of which int8 keeps nothing but the first component, as the others are just below half a step."""
    return torch.cat([torch.ones(1), torch.full((D - 1,), 0.499 / 127)])[None, None]


def test_the_bound_of_int8_is_kept_and_needed() -> None:
    vector, ones = misjudged(), torch.ones(1, 1, 64) / 8
    ones[..., 0] = 0  # the direction of what is lost
    a, b = screens.encode(vector, "int8"), screens.encode(ones, "int8")
    error = float((screens.dots(a, b, 1.0).double() - (vector.double() * ones.double()).sum()).abs())
    bound = float(screens.errors(*a.of(None), *b.of(None), screens.rounding("int8", 64)))
    assert 0.97 * bound < error <= bound


def test_an_item_that_int8_misjudges_by_its_whole_bound_is_ranked_rightly() -> None:
    """The first item is truly ahead of the second by 0.001, and in int8 behind by nearly the bound."""
    query = torch.cat([misjudged(), torch.zeros(1, 1, 64)], 2)
    length = float(torch.linalg.vector_norm(query))
    query /= length
    first, second = torch.zeros(1, 1, 128), torch.zeros(1, 1, 128)
    first[..., 1:64] = 1 / 63**0.5
    second[..., 0] = 63**0.5 * 0.499 / 127 - 0.001
    second[..., 64] = (1 - second[..., 0] ** 2) ** 0.5
    one = Member(query, torch.cat([first, second]), similarity("mil"))
    for screen in SCREENS:
        assert count_ahead([one], Asked(np.array([0]), np.array([1])), None, screen=screen)[0].ahead == [1]


@each_screen
@pytest.mark.parametrize("spread", [0, 1, 3])
def test_products_keep_their_bounds(screen: screens.Screen, spread: int) -> None:
    a, b = (vectors(seed, 40, 3, 50) * torch.exp(spread * vectors(seed + 1, 40, 3, 50)) for seed in (16, 18))
    x, y = screens.encode(a, screen), screens.encode(b, screen)
    every = torch.arange(40)
    bounds = screens.errors(*x.of(every[:, None]), *y.of(every), screens.rounding(screen, 50))
    errors = (screens.dots(x, y, 2.0).double() / 2 - torch.einsum("rkd,cjd->krjc", a.double(), b.double())).abs()
    assert (errors.amax((0, 2)) <= bounds).all()
    assert (screens.errors(*x.of(every), *y.of(None), screens.rounding(screen, 50))[:, None] >= bounds).all()


def pooled(pooling: Pooling, dots: Tensor) -> Tensor:
    """(R,C) of dot products (K,R,J,C) of unit vectors."""
    ones = torch.ones(())
    return pooling.scores(dots * pooling.factor, ones, ones)[0]


@each_kind
@pytest.mark.parametrize("alpha", [0.01, 1, 16, 64, 200, 1024])
def test_rounding_and_errors_of_dot_products_move_scores_no_further_than_said(kind: str, alpha: float) -> None:
    pooling = Pooling(similarity(kind, alpha), (1.0, 1.0), (4, 3))
    cosines = torch.cat(
        [torch.rand(4, 50, 3, 9) * 2 - 1, torch.rand(4, 50, 3, 9) * 0.02 - 1, torch.ones(4, 9, 3, 9)], 1
    )
    exact = pooled(pooling, cosines.double())
    for error in (0, 1e-5, 0.02, 0.3):
        for signs in (1, -1, torch.rand(cosines.shape) * 2 - 1):
            moved = cosines + error * signs
            _, smallest = pooling.scores(moved * pooling.factor, torch.ones(()), torch.ones(()))
            reach = pooling.reach(torch.tensor(error), smallest, torch.float32)
            low, high = pooling.edges(exact, exact, reach, torch.float32)
            found = pooled(pooling, moved).double()
            assert ((low <= found) & (found <= high)).all()
            width = pooling.width(reach, torch.float32)
            assert ((found - exact).abs() <= width).all()


@pytest.mark.parametrize("kind", ["smooth_chamfer", "chamfer", "mil", "match_probability", "cosine", "csd"])
def test_the_bounds_of_scores_are_needed(kind: str) -> None:
    pooling = Pooling(similarity(kind), (1.0, 1.0), (4, 3))
    cosines = torch.full((4, 1, 3, 1), 0.3)
    exact = pooled(pooling, cosines.double())
    low, high = pooling.edges(exact, exact, pooling.reach(torch.tensor(0.1), None, torch.float32), torch.float32)
    assert pooled(pooling, cosines + 0.099).double() > exact + 0.95 * (high - exact)
    assert pooled(pooling, cosines - 0.099).double() < exact - 0.95 * (exact - low)


def test_a_screen_that_breaks_its_bound_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: product(a, b).clamp(-(2**15), 2**15 - 1))
    screens.fastest.cache_clear()
    assert screens.fastest(torch.device("cpu"), 256) != "int8"
    screens.fastest.cache_clear()
