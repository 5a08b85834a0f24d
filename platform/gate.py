"""Promotion gates: the decision whether a candidate may replace the champion, as a value with its numbers.

Of every metric more is better. A gate is limits by metric:

metrics:
  digits_1k/rsum: {at_least: 150, max_drop: 1.0, improve: true, significantly: true}
  "*/t2i_map_at_r": {max_drop: 0}       # of every benchmark that has it
improve_any: true
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field, model_validator

from setwise.platform.config import Settings

ANY = "*/"
"""Begins a name that stands for this metric of every benchmark that has it."""
MAX_METRICS = 40  # with its numbers a decision has to fit into one entry of the ledger
ROUNDING = 1e-9  # 100.3 - 100.4 is a little less than -0.1

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Limit(Settings):
    """What is asked of one metric; what is left out is not asked."""

    at_least: Finite | None = Field(None, description="lowest value, with or without a champion")
    max_drop: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="how far below the champion's value it may be"
    )
    improve: bool = Field(False, description="it must be above the champion's value")
    significantly: bool = Field(
        False, description="judge max_drop and improve by the low end of the difference's 95 % interval"
    )

    @model_validator(mode="after")
    def _asks_something(self) -> Limit:
        if self.at_least is None and self.max_drop is None and not self.improve:
            raise ValueError("asks for nothing; give at_least, max_drop or improve")
        if self.significantly and self.max_drop is None and not self.improve:
            raise ValueError("significantly says how max_drop or improve is judged; give one of them")
        return self


class Gate(Settings):
    """All that is asked of a candidate."""

    metrics: dict[str, Limit] = Field(min_length=1, max_length=MAX_METRICS, description="limits by metric")
    improve_any: bool = Field(False, description="at least one of the metrics must be above the champion's")

    def limit_of(self, name: str) -> Limit | None:
        """What is asked of BENCHMARK/METRIC: what stands under its full name, else under that with `ANY`."""
        return self.metrics.get(name) or self.metrics.get(ANY + name.partition("/")[2])


@dataclass(frozen=True)
class Measured:
    """One value, and the fingerprint of the protocol it was measured under."""

    value: float
    protocol: str


@dataclass(frozen=True)
class Decision:
    """What a gate said of a candidate, and why; `override` is the reason of somebody who promotes all the same."""

    met: bool
    reason: str
    candidate: dict[str, float]
    champion: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    override: str | None = None

    @property
    def promote(self) -> bool:
        return self.met or self.override is not None

    def to_json(self) -> dict[str, Any]:
        return {"promote": self.promote, **asdict(self)}


def decide(
    gate: Gate,
    candidate: Mapping[str, Measured],
    champion: Mapping[str, Measured] | None,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    override: str | None = None,
) -> Decision:
    """Hold a candidate against the gate. Every limit that it misses is named in the reason.

    Values are compared only under equal protocols. Whatever is not there to be judged counts as missed: a metric that
    was not measured, an interval that is not known. What the champion has as no finite number, any number improves.

    Args:
        champion: None if there is none yet: then only `at_least` is judged.
        intervals: of the difference, candidate minus champion, with 95 %: (low, high) by metric.
    """
    known = intervals or {}
    judged = list(_limits(gate, candidate, champion))
    missed: list[str] = []
    better: list[str] = []
    for name, limit, old in judged:
        if name not in candidate:
            there = ", ".join(dict.fromkeys(one.partition("/")[0] for one in candidate)) or "nothing"
            missed.append(f"{name} was not measured of the candidate (measured: {there})")
            continue
        value = candidate[name].value
        if not math.isfinite(value):
            missed.append(f"{name} is not a finite number")
            continue
        if limit.at_least is not None and value < limit.at_least:
            missed.append(f"{name} is {value:.2f}, below the {limit.at_least:.2f} that the gate asks for")
        if champion is not None and (old is not None or name in gate.metrics):
            complaints, is_better = _against(name, limit, candidate[name], old, known.get(name))
            missed += complaints
            better += [name] * is_better
    if not judged:
        missed.append(f"nothing was measured of what the gate names ({', '.join(gate.metrics)})")
    elif champion is not None and gate.improve_any and not better and not missed:
        missed.append("nothing is better than the champion's")
    new = {name: candidate[name].value for name, _, _ in judged if name in candidate}
    before = {name: old.value for name, _, old in judged if old is not None}
    if missed:
        reason = "; ".join(missed)
    elif champion is None:
        reason = "there is no champion yet"
    else:
        gains = ", ".join(f"{name} {before[name]:.2f} -> {new[name]:.2f}" for name in better)
        reason = f"every limit is kept; better: {gains or 'nothing'}"
    return Decision(not missed, reason, new, before, {k: v for k, v in known.items() if k in new}, override)


def _limits(
    gate: Gate, candidate: Mapping[str, Measured], champion: Mapping[str, Measured] | None
) -> Iterator[tuple[str, Limit, Measured | None]]:
    """Each metric that the gate names or that has a limit by `ANY`, with its limit and the champion's value."""
    old = champion or {}
    named = [name for name in gate.metrics if not name.startswith(ANY)]
    for name in dict.fromkeys([*named, *old, *candidate]):
        limit = gate.limit_of(name)
        if limit is not None:
            yield name, limit, old.get(name)


def _against(
    name: str, limit: Limit, new: Measured, old: Measured | None, interval: tuple[float, float] | None
) -> tuple[list[str], bool]:
    """What of a limit is missed against the champion, and whether the metric is above the champion's."""
    asked = limit.max_drop is not None or limit.improve
    if old is None:
        return [f"{name} was not measured of the champion"] * asked, False
    if new.protocol != old.protocol:
        problem = f"{name} was measured under another protocol ({new.protocol}, not {old.protocol})"
        return [problem] * asked, False
    if not math.isfinite(old.value):
        return [], True
    gain, found = new.value - old.value, f"{new.value:.2f}"
    if limit.significantly:
        if interval is None or not all(map(math.isfinite, interval)):
            return [f"of the difference in {name} no interval is known"], False
        gain = interval[0]
        found += f", the difference with 95 % in [{interval[0]:+.2f}, {interval[1]:+.2f}]"
    missed = []
    if limit.max_drop is not None and gain < -limit.max_drop - ROUNDING:
        allowed = f" by more than {limit.max_drop:.2f}" if limit.max_drop else ""
        missed.append(f"{name} is {found}, below the champion's {old.value:.2f}{allowed}")
    if limit.improve and gain <= 0:
        missed.append(f"{name} is {found}, not above the champion's {old.value:.2f}")
    return missed, gain > 0
