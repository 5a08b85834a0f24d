"""The gate's decisions, as tables."""

from __future__ import annotations

import json
from math import inf, nan
from typing import Any

import pytest

from setwise.platform import config
from setwise.platform.errors import ConfigError
from setwise.platform.gate import Gate, Measured, decide

NOWHERE_WORSE = {"metrics": {"*/rsum": {"max_drop": 0}, "*/map": {"max_drop": 0}}, "improve_any": True}
ABSOLUTE = {"metrics": {"a/rsum": {"at_least": 150}}}
IMPROVED = {"metrics": {"a/rsum": {"improve": True}}}
SIGNIFICANT = {"metrics": {"a/rsum": {"improve": True, "significantly": True}}}
NOT_INFERIOR = {"metrics": {"a/rsum": {"max_drop": 1, "significantly": True}}}
DROPPED = {"metrics": {"a/rsum": {"max_drop": 0.1}}}


def measured(protocol: str = "p1", **values: float) -> dict[str, Measured]:
    """`a_rsum=1` is metric rsum of benchmark a."""
    return {name.replace("_", "/", 1): Measured(value, protocol) for name, value in values.items()}


@pytest.mark.parametrize(
    ("gate", "candidate", "champion", "met", "reason"),
    [
        (NOWHERE_WORSE, measured(a_rsum=1), None, True, "there is no champion yet"),
        (NOWHERE_WORSE, measured(a_rsum=nan), None, False, "a/rsum is not a finite number"),
        (NOWHERE_WORSE, measured(a_loss=1), None, False, "nothing was measured of what the gate names (*/rsum, */map)"),
        (
            NOWHERE_WORSE,
            measured(a_rsum=101),
            measured(a_rsum=100),
            True,
            "every limit is kept; better: a/rsum 100.00 -> 101.00",
        ),
        (
            NOWHERE_WORSE,
            measured(a_rsum=101, a_map=5),
            measured(a_rsum=100, a_map=5),
            True,
            "every limit is kept; better: a/rsum 100.00 -> 101.00",
        ),
        (NOWHERE_WORSE, measured(a_rsum=100), measured(a_rsum=100), False, "nothing is better than the champion's"),
        (NOWHERE_WORSE, measured(a_rsum=1), {}, False, "nothing is better than the champion's"),
        (
            NOWHERE_WORSE,
            measured(a_rsum=99.9),
            measured(a_rsum=100),
            False,
            "a/rsum is 99.90, below the champion's 100.00",
        ),
        (
            NOWHERE_WORSE,
            measured(a_rsum=99, a_map=4.9),
            measured(a_rsum=100, a_map=5),
            False,
            "a/rsum is 99.00, below the champion's 100.00; a/map is 4.90, below the champion's 5.00",
        ),
        (
            NOWHERE_WORSE,
            measured(a_rsum=101),
            measured(a_rsum=100, b_rsum=5),
            False,
            "b/rsum was not measured of the candidate (measured: a)",
        ),
        (NOWHERE_WORSE, measured(a_rsum=101, b_rsum=1), measured(a_rsum=100), True, "every limit is kept"),
        (
            NOWHERE_WORSE,
            measured("p2", a_rsum=101),
            measured(a_rsum=100),
            False,
            "a/rsum was measured under another protocol (p2, not p1)",
        ),
        (NOWHERE_WORSE, measured(a_rsum=inf), measured(a_rsum=100), False, "a/rsum is not a finite number"),
        (NOWHERE_WORSE, measured(a_rsum=1), measured(a_rsum=nan), True, "better: a/rsum nan -> 1.00"),
        (ABSOLUTE, measured(a_rsum=150), None, True, "there is no champion yet"),
        (ABSOLUTE, measured(a_rsum=149.5), None, False, "a/rsum is 149.50, below the 150.00 that the gate asks for"),
        (ABSOLUTE, measured(a_rsum=nan), None, False, "a/rsum is not a finite number"),
        (ABSOLUTE, measured(b_rsum=200), None, False, "a/rsum was not measured of the candidate (measured: b)"),
        (ABSOLUTE, measured(a_rsum=151), measured(a_rsum=160), True, "every limit is kept; better: nothing"),
        (ABSOLUTE, measured(a_rsum=151), measured("p2", a_rsum=160), True, "every limit is kept; better: nothing"),
        (ABSOLUTE, measured(a_rsum=151), measured(b_rsum=1), True, "every limit is kept; better: nothing"),
        (IMPROVED, measured(a_rsum=101), measured(a_rsum=100), True, "better: a/rsum 100.00 -> 101.00"),
        (
            IMPROVED,
            measured(a_rsum=100),
            measured(a_rsum=100),
            False,
            "a/rsum is 100.00, not above the champion's 100.00",
        ),
        (IMPROVED, measured(a_rsum=100), measured(b_rsum=1), False, "a/rsum was not measured of the champion"),
        (DROPPED, measured(a_rsum=100.3), measured(a_rsum=100.4), True, "every limit is kept; better: nothing"),
        (
            DROPPED,
            measured(a_rsum=100.2),
            measured(a_rsum=100.4),
            False,
            "a/rsum is 100.20, below the champion's 100.40 by more than 0.10",
        ),
    ],
)
def test_decisions(
    gate: dict[str, Any],
    candidate: dict[str, Measured],
    champion: dict[str, Measured] | None,
    met: bool,
    reason: str,
) -> None:
    decision = decide(Gate.model_validate(gate), candidate, champion)
    assert (decision.met, decision.promote) == (met, met)
    assert decision.reason == reason or (met and decision.reason.endswith(reason)) or decision.reason.startswith(reason)
    by_hand = decide(Gate.model_validate(gate), candidate, champion, override="for the demonstration")
    assert (by_hand.met, by_hand.promote, by_hand.reason) == (met, True, decision.reason)
    assert json.loads(json.dumps(by_hand.to_json()))["override"] == "for the demonstration"


@pytest.mark.parametrize(
    ("gate", "value", "interval", "met", "reason"),
    [
        (SIGNIFICANT, 105, (0.5, 9.5), True, "every limit is kept; better: a/rsum 100.00 -> 105.00"),
        (
            SIGNIFICANT,
            105,
            (-0.5, 10.5),
            False,
            "a/rsum is 105.00, the difference with 95 % in [-0.50, +10.50], not above the champion's 100.00",
        ),
        (SIGNIFICANT, 105, (0.0, 10.0), False, "a/rsum is 105.00, the difference with 95 % in [+0.00, +10.00]"),
        (SIGNIFICANT, 105, None, False, "of the difference in a/rsum no interval is known"),
        (SIGNIFICANT, 105, (nan, nan), False, "of the difference in a/rsum no interval is known"),
        (NOT_INFERIOR, 100, (-0.9, 0.9), True, "every limit is kept; better: nothing"),
        (NOT_INFERIOR, 100, (-1.0, 1.0), True, "every limit is kept; better: nothing"),
        (
            NOT_INFERIOR,
            100,
            (-1.1, 1.1),
            False,
            "a/rsum is 100.00, the difference with 95 % in [-1.10, +1.10], below the champion's 100.00 by more than",
        ),
        (NOT_INFERIOR, 103, (0.1, 6.0), True, "every limit is kept; better: a/rsum 100.00 -> 103.00"),
        (IMPROVED, 100.1, (-5.0, 5.0), True, "every limit is kept; better: a/rsum 100.00 -> 100.10"),
    ],
)
def test_decisions_by_an_interval(
    gate: dict[str, Any], value: float, interval: tuple[float, float] | None, met: bool, reason: str
) -> None:
    known = {} if interval is None else {"a/rsum": interval}
    decision = decide(Gate.model_validate(gate), measured(a_rsum=value), measured(a_rsum=100), known)
    assert decision.met is met and decision.reason.startswith(reason)
    assert decision.intervals == known and decision.candidate == {"a/rsum": value}
    assert decide(Gate.model_validate(gate), measured(a_rsum=value), None).reason == "there is no champion yet"


def test_a_full_name_goes_before_one_for_every_benchmark() -> None:
    gate = Gate.model_validate({"metrics": {"*/rsum": {"max_drop": 0}, "b/rsum": {"max_drop": 9}}})
    assert decide(gate, measured(a_rsum=1, b_rsum=1), measured(a_rsum=1, b_rsum=9)).met
    assert not decide(gate, measured(a_rsum=1, b_rsum=1), measured(a_rsum=9, b_rsum=1)).met


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "metrics:\n  a/rsum: {at_lest: 1}",
            r"gate.yaml:2:12: 'metrics.a/rsum.at_lest' is not a setting. Did you mean",
        ),
        ("metrics:\n  a/rsum: {}", r"gate.yaml:2:3: metrics.a/rsum: asks for nothing; give at_least"),
        ("metrics:\n  a/rsum: {at_least: 1, significantly: true}", "significantly says how max_drop or improve"),
        ("metrics:\n  a/rsum: {max_drop: -1}", r"gate.yaml:2:12: metrics.a/rsum.max_drop: .* greater than or equal"),
        ("metrics:\n  a/rsum: {at_least: .nan}", "finite number"),
        ("metrics: {}", "at least 1 item"),
        ("improve_any: true", "'metrics' is required"),
    ],
)
def test_mistakes_in_a_gate_have_their_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.build(Gate, config.parse_yaml(text.encode(), "gate.yaml"))
