"""Promotion gates: the decision whether a candidate may replace the champion, as a value with its numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Measured:
    """One value, and the fingerprint of the protocol it was measured under."""

    value: float
    protocol: str


@dataclass(frozen=True)
class Decision:
    """Whether to promote, and why."""

    promote: bool
    reason: str
    candidate: dict[str, float]
    champion: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def no_regression(
    candidate: dict[str, Measured], champion: dict[str, Measured] | None, tolerance: float = 0.0
) -> Decision:
    """Promote what is nowhere worse than the champion by more than `tolerance`, and somewhere better.

    Values are compared only under equal protocols: a metric of the champion that the candidate lacks, or measured
    otherwise, refuses the promotion.
    """
    new = {name: measured.value for name, measured in candidate.items()}
    if broken := [name for name, value in new.items() if not math.isfinite(value)]:
        return Decision(False, f"{broken[0]} is not a finite number", new, {})
    if champion is None:
        return Decision(True, "there is no champion yet", new, {})
    old = {name: measured.value for name, measured in champion.items()}
    for name, measured in champion.items():
        if name not in candidate:
            return Decision(False, f"{name} was not measured of the candidate", new, old)
        if candidate[name].protocol != measured.protocol:
            reason = f"{name} was measured under another protocol ({candidate[name].protocol}, not {measured.protocol})"
            return Decision(False, reason, new, old)
        if new[name] < old[name] - tolerance:
            return Decision(False, f"{name} is {new[name]:.2f}, below the champion's {old[name]:.2f}", new, old)
    better = [name for name in old if new[name] > old[name]]
    if not better:
        return Decision(False, "nothing is better than the champion's", new, old)
    gains = ", ".join(f"{name} {old[name]:.2f} -> {new[name]:.2f}" for name in better)
    return Decision(True, f"no metric is worse and {gains}", new, old)
