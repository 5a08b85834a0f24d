"""What was claimed of variants, judged by what was measured: it held, it did not hold, or it is not decided.

A difference is decided where its 95 % interval leaves out none: of RSUM, over test images and seeds (statistics.py); of
circular variance, over seeds (Welch); of search time, over repetitions. Where a side has one seed, how much trainings
vary is not known, so neither of the first two is decided. Each claim is judged for itself: of twenty that are false,
one would be decided by chance.
"""

from __future__ import annotations

import statistics as plain_statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from setwise.pipelines import statistics
from setwise.sweeps import candidates
from setwise.sweeps.deck_measure import Measured
from setwise.sweeps.deck_speed import Speed
from setwise.sweeps.variants import Claim

Verdict = Literal["held", "did not hold", "not decided", "not measured"]
RESAMPLES = 2000
LAST_PART = 0.25
"""Of a training, in which it is asked whether it still became better."""


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict and the numbers behind it, in words. value: the difference, or for search the factor;
    None, as its interval, where there is none."""

    claim: Claim
    verdict: Verdict
    numbers: str
    value: float | None = None
    interval: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "claim": self.claim.model_dump()}


def judge(claim: Claim, measured: Mapping[str, Sequence[Measured]], speed: Speed | None) -> Judged:
    """One claim, by the trainings of each variant that were measured."""
    lacking = [name for name in (claim.better, claim.than) if not measured.get(name)]
    if lacking and claim.of != "search":
        return Judged(claim, "not measured", f"no training of {' and '.join(lacking)} was measured")
    match claim.of:
        case "rsum":
            return _by_rsum(claim, measured[claim.better], measured[claim.than])
        case "spread":
            return _by_spread(claim, measured[claim.better], measured[claim.than])
        case "search":
            return _by_search(claim, speed)


def _by_rsum(claim: Claim, better: Sequence[Measured], than: Sequence[Measured]) -> Judged:
    found = statistics.differences([one.outcome for one in better], [one.outcome for one in than], resamples=RESAMPLES)[
        "rsum"
    ]
    numbers = (
        f"test RSUM {_rsum(better):.1f} of {claim.better} ({_seeds(better)}), {_rsum(than):.1f} of {claim.than} "
        f"({_seeds(than)}): {found.value:+.1f}, 95 % interval {found.low:+.1f} to {found.high:+.1f}"
    )
    verdict = _verdict(found.low, found.high)
    if min(len(better), len(than)) < 2:
        verdict = "not decided"
        numbers += ", but one seed of a side does not tell how much trainings vary"
    gains = [_gain(side) for side in (better, than)]
    if verdict != "held" and None not in gains:  # whether longer training might change it
        numbers += (
            f". In the last quarter of training {claim.better} still gained {gains[0]:.1f} in val RSUM, {claim.than} "
            f"{gains[1]:.1f}"
        )
    return Judged(claim, verdict, numbers, found.value, (found.low, found.high))


def _by_spread(claim: Claim, better: Sequence[Measured], than: Sequence[Measured]) -> Judged:
    name = "sets/image_log_circular_variance"
    sides = [[one.health[name] for one in side if name in one.health] for side in (better, than)]
    if not all(sides):
        without = [variant for variant, side in zip((claim.better, claim.than), sides, strict=True) if not side]
        return Judged(claim, "not measured", f"{' and '.join(without)} has no sets of several elements")
    means = [plain_statistics.fmean(side) for side in sides]
    numbers = f"log circular variance {means[0]:.2f} of {claim.better}, {means[1]:.2f} of {claim.than}"
    difference = means[0] - means[1]
    if min(map(len, sides)) < 2:
        return Judged(claim, "not decided", f"{numbers}: {difference:+.2f}, of one seed a side", difference)
    low, high = candidates.welch(*sides)
    numbers += f": {difference:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}"
    return Judged(claim, _verdict(low, high), numbers, difference, (low, high))


def _by_search(claim: Claim, speed: Speed | None) -> Judged:
    lacking = [one for one in (claim.better, claim.than) if speed is None or one not in speed.search]
    if speed is None or lacking:
        return Judged(claim, "not measured", f"queries of {' and '.join(lacking)} were not timed")
    factor, low, high = speed.factor(claim.than, claim.better)
    size = speed.sizes[-1]
    numbers = (
        f"a search among {size:,} images takes {speed.median(claim.better, size):.3g} ms by {claim.better} and "
        f"{speed.median(claim.than, size):.3g} ms by {claim.than}, {factor:.1f} times as long (95 % interval "
        f"{low:.1f} to {high:.1f})"
    )
    return Judged(claim, _verdict(low - 1, high - 1), numbers, factor, (low, high))


def _verdict(low: float, high: float) -> Verdict:
    return "held" if low > 0 else "did not hold" if high < 0 else "not decided"


def _rsum(side: Sequence[Measured]) -> float:
    return plain_statistics.fmean(one.outcome.values["rsum"] for one in side)


def _seeds(side: Sequence[Measured]) -> str:
    return "1 seed" if len(side) == 1 else f"{len(side)} seeds"


def _gain(side: Sequence[Measured]) -> float | None:
    """By how much the best val/rsum rose in the last part of training, on average; None of trainings too short."""
    gains = []
    for one in side:
        last = max(one.curve)
        before = [value for epoch, value in one.curve.items() if epoch <= last - LAST_PART * last]
        if before:
            gains.append(max(one.curve.values()) - max(before))
    return plain_statistics.fmean(gains) if gains else None
