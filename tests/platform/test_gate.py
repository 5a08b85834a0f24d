"""The gate's decisions, as a table."""

from __future__ import annotations

import pytest

from setwise.platform.gate import Measured, no_regression


def measured(**values: float) -> dict[str, Measured]:
    return {name: Measured(value, "p1") for name, value in values.items()}


@pytest.mark.parametrize(
    ("candidate", "champion", "promote", "reason"),
    [
        (measured(rsum=1), None, True, "no champion yet"),
        (measured(rsum=101), measured(rsum=100), True, "rsum 100.00 -> 101.00"),
        (measured(rsum=101, map=5), measured(rsum=100, map=5), True, "no metric is worse"),
        (measured(rsum=100), measured(rsum=100), False, "nothing is better"),
        (measured(rsum=99.9), measured(rsum=100), False, "rsum is 99.90, below the champion's 100.00"),
        (measured(rsum=200, map=4.9), measured(rsum=100, map=5), False, "map is 4.90"),
        (measured(rsum=101), measured(rsum=100, map=5), False, "map was not measured"),
        ({"rsum": Measured(101, "p2")}, measured(rsum=100), False, "another protocol"),
    ],
)
def test_decisions(
    candidate: dict[str, Measured], champion: dict[str, Measured] | None, promote: bool, reason: str
) -> None:
    decision = no_regression(candidate, champion)
    assert decision.promote is promote and reason in decision.reason
    assert decision.to_json()["candidate"] == {name: one.value for name, one in candidate.items()}


def test_a_tolerance_forgives_a_small_loss_but_something_must_still_be_better() -> None:
    champion = measured(rsum=100, map=5)
    assert no_regression(measured(rsum=101, map=4.95), champion, tolerance=0.1).promote
    assert not no_regression(measured(rsum=100, map=4.95), champion, tolerance=0.1).promote
