"""Set health against sets whose spread and use are known, and against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from setwise.pipelines import set_health
from setwise.pipelines.set_health import log_circular_variance, slot_usage

K, D = 4, 8


def units(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def test_orthogonal_elements_have_the_circular_variance_of_theory() -> None:
    sets = torch.eye(D)[:K].expand(5, K, D)
    assert log_circular_variance(sets) == pytest.approx(math.log(1 - 1 / math.sqrt(K)))


def test_opposite_elements_have_the_largest_circular_variance() -> None:
    one = units(5, 1, D)
    assert log_circular_variance(torch.cat([one, -one], 1)) == pytest.approx(0, abs=1e-6)


def test_equal_elements_have_the_smallest_circular_variance_and_it_is_finite() -> None:
    equal = units(5, 1, D).expand(5, K, D)
    assert log_circular_variance(equal) == pytest.approx(math.log(set_health.SMALLEST_VARIANCE))
    scaled = torch.nn.functional.normalize(equal * torch.tensor([1.0, 3.0, 0.7, 1e-3])[:, None], dim=2)  # by rounding
    assert log_circular_variance(scaled) == pytest.approx(math.log(set_health.SMALLEST_VARIANCE), abs=1)


@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-4, 1e-6])
def test_circular_variance_is_the_definition_in_double_precision_however_near_the_elements(distance: float) -> None:
    near = torch.nn.functional.normalize(units(50, 1, D) + distance * units(50, K, D, seed=1), dim=2)
    exact = near.double().numpy()
    exact /= np.linalg.norm(exact, axis=2, keepdims=True)
    expected = math.log((1 - np.linalg.norm(exact.mean(1), axis=1)).mean())
    assert log_circular_variance(near) == pytest.approx(expected, rel=1e-3)


def test_elements_that_match_equally_often_count_as_all_of_them() -> None:
    images, texts = torch.eye(D)[:K].expand(8, K, D), torch.zeros(8, 2, D)
    for number in range(8):
        texts[number, number % 2] = torch.eye(D)[number % K]
    assert slot_usage(images, texts, torch.arange(8)) == pytest.approx((K, 2))


def test_one_element_that_always_matches_counts_as_one() -> None:
    images, texts = units(6, K, D), units(12, K, D, seed=1)
    owners = torch.arange(12) // 2
    texts[:, 3] = images[owners, 1]
    assert slot_usage(images, texts, owners) == pytest.approx((1, 1))


def test_slot_usage_is_that_of_a_loop_over_pairs_in_any_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts, owners = units(20, K, D), units(100, 3, D, seed=1), torch.arange(100) // 5
    winners = [divmod(int((images[owners[t]] @ texts[t].T).argmax()), 3) for t in range(100)]
    expected = []
    for side in zip(*winners, strict=True):
        shares = np.unique(side, return_counts=True)[1] / 100
        expected.append(math.exp(-(shares * np.log(shares)).sum()))
    assert slot_usage(images, texts, owners) == pytest.approx(expected)
    monkeypatch.setattr(set_health, "PAIRS", 7)
    assert slot_usage(images, texts, owners) == pytest.approx(expected)


def test_sets_of_one_element_have_a_usage_and_no_variance() -> None:
    values = set_health.set_health(units(4, 1, D), units(8, 1, D), torch.arange(8) // 2)
    assert values == {"sets/image_slot_usage": 1, "sets/text_slot_usage": 1}


def test_only_directions_count() -> None:
    images, texts, owners = units(4, K, D), units(8, 2, D, seed=1), torch.arange(8) // 2
    expected = set_health.set_health(images, texts, owners)
    lengths = torch.rand(8, 2, 1, generator=torch.Generator().manual_seed(2)) + 0.5
    assert set_health.set_health(images, texts * lengths, owners) == pytest.approx(expected, rel=1e-4)
    assert set(expected) == {
        "sets/image_log_circular_variance",
        "sets/text_log_circular_variance",
        "sets/image_slot_usage",
        "sets/text_slot_usage",
    }
