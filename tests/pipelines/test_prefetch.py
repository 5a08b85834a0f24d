"""Work ahead: the same results in the same order, errors where their turn comes, and no thread left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import pytest

from setwise.pipelines import prefetch


def slow_square(number: int) -> int:
    time.sleep(0.002 * (number % 3))  # so that later ones would be done first
    return number * number


def workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]


@pytest.mark.parametrize("threads", [0, 1, 2, 5, 40])
def test_results_come_in_order_whatever_the_number_of_threads(threads: int) -> None:
    assert list(prefetch.ahead((partial(slow_square, n) for n in range(20)), threads)) == [n * n for n in range(20)]
    assert list(prefetch.ahead([], threads)) == []
    assert not workers()


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_an_error_is_raised_at_its_turn_and_ends_all(threads: int) -> None:
    def fail() -> int:
        raise ValueError("damaged")

    makers: list[Callable[[], int]] = [partial(slow_square, 1), partial(slow_square, 2), fail, partial(slow_square, 4)]
    results = prefetch.ahead(makers, threads)
    assert [next(results), next(results)] == [1, 4]
    with pytest.raises(ValueError, match="damaged"):
        next(results)
    assert not workers()


def test_no_more_is_made_ahead_than_threads_and_one() -> None:
    begun: list[int] = []
    results = prefetch.ahead((partial(begun.append, n) for n in range(100)), threads=3)
    for taken in range(1, 6):
        next(results)
        time.sleep(0.02)
        assert len(begun) <= taken + 3
    results.close()


def test_a_loop_that_ends_early_leaves_no_thread() -> None:
    asked: list[int] = []

    def make(number: int) -> int:
        asked.append(number)
        return number

    results = prefetch.ahead((partial(make, n) for n in range(1000)), threads=2)
    assert next(results) == 0 and workers()
    results.close()
    assert not workers() and len(asked) <= 4
