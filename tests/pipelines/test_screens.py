"""Embeddings at the edges of float32, where a bound on an error is easily too small."""

import numpy as np
import pytest
import torch

from setwise.models.loss_config import SimilarityConfig
from setwise.models.similarity import Similarity
from setwise.pipelines import ranking, screens
from setwise.pipelines.ranking import Asked, Member


@pytest.mark.parametrize("kind", ["mil", "smooth_chamfer"])
@pytest.mark.parametrize("screen", ["int8", "bf16", "float32"])
def test_vectors_too_short_for_their_squares_are_ranked_too(kind: str, screen: ranking.Screen) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(1, 2, 64, generator=generator), dim=2) * 1e-25
    columns = torch.nn.functional.normalize(torch.randn(200, 2, 64, generator=generator), dim=2)
    member = Member(rows, columns, Similarity(SimilarityConfig(kind=kind)))  # type: ignore[arg-type]
    every = np.arange(200)
    asked = Asked(np.zeros(200, np.int64), every)
    answers, _ = ranking.count_ahead([member], asked, None, screen=screen)
    scores = ranking.pair_scores([member], np.zeros(200, np.int64), every)
    expected = [(scores >= score).sum() - 1 for score in scores]
    assert answers.ahead.tolist() == expected


@pytest.mark.parametrize("elements", [1, 2])
def test_a_side_of_zeros_or_of_next_to_nothing_ties_or_is_ranked(elements: int) -> None:
    for length in (0.0, 1e-10):
        for kind in ("chamfer", "smooth_chamfer", "cosine", "pcme", "csd"):
            rows = torch.full((2, elements, 4), length)
            member = Member(rows, rows.clone(), Similarity(SimilarityConfig(kind=kind, alpha=1)))  # type: ignore[arg-type]
            answers, _ = ranking.count_ahead([member], Asked(np.zeros(1, int), np.zeros(1, int)), None)
            assert answers.ahead.tolist() == [1]


@pytest.mark.parametrize("screen", ["int8", "bf16", "float32"])
def test_distributions_of_large_variance_are_ranked_by_their_means_too(screen: ranking.Screen) -> None:
    """The lengths of their vectors, and so all bounds, are thousands of times the differences that decide."""
    generator = torch.Generator().manual_seed(1)
    means = torch.nn.functional.normalize(torch.randn(90, 1, 16, generator=generator), dim=2)
    spread, nothing = torch.full((90, 1, 1), 1000.0), torch.zeros(90, 1, 1)
    rows, columns = torch.cat((means, spread, nothing), 2)[:30], torch.cat((means, nothing, spread), 2)[30:]
    member = Member(rows, columns, Similarity(SimilarityConfig(kind="csd")))
    squared = (rows.double()[:, None] - columns.double()).square().sum((2, 3))
    scores = (5 - 5 * squared).float()
    assert scores.unique(dim=1).shape == (30, 60), "rounding left no difference"
    query, item = (index.ravel() for index in np.indices((30, 60)))
    answers, _ = ranking.count_ahead([member], Asked(query, item), None, screen=screen)
    expected = (scores[:, None] >= scores[:, :, None]).sum(2) - 1
    assert answers.ahead.tolist() == expected.flatten().tolist()


def test_sums_of_many_equal_numbers_stay_within_the_bound() -> None:
    low = torch.tensor([0.5 + 64 * 2**-24, 0.5 + 63 * 2**-24])
    columns = low[:, None, None].expand(2, 256, 1).contiguous()
    member = Member(torch.ones(1, 256, 1), columns, Similarity(SimilarityConfig(kind="chamfer")))
    for screen in ("int8", "bf16", "float32"):
        answers, _ = ranking.count_ahead([member], Asked(np.zeros(1, int), np.ones(1, int)), None, screen=screen)  # type: ignore[arg-type]
        assert answers.ahead.tolist() == [1], screen


def test_choosing_a_screen_draws_from_no_training() -> None:
    before = torch.get_rng_state()
    screens.fastest.cache_clear()
    screens.fastest(torch.device("cpu"), 48)
    assert torch.equal(torch.get_rng_state(), before)
