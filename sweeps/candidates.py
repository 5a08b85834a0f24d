"""Trials of a study that were trained again with other seeds: their means, and whether the first is better than the
second by more than seeds differ.

A study tries many settings once each, and the highest of many values is in part luck: its own value, by which a trial
was chosen, is among its seeds and is too high on average. The new seeds alone do not have that bias, so how far they
fall behind the chosen values is told too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from setwise.pipelines import records, references
from setwise.platform import run
from setwise.platform.run import Run

CONFIDENCE = 0.95
FEW_SEEDS = 5
"""Below it, an interval rests on a standard deviation that is hardly known."""


@dataclass(frozen=True)
class Candidate:
    """A trial and its best validation RSUM under each seed that has ended, the trial's own first.

    `missing`: runs of other seeds that failed or have not ended, with the reason.
    """

    trial: str
    values: tuple[float, ...]
    missing: dict[str, str]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """The standard deviation over seeds; of two at least."""
        return statistics.stdev(self.values)

    def in_words(self) -> str:
        if len(self.values) == 1:
            return f"{self.mean:.1f}, one seed"
        return f"{self.mean:.1f} ± {self.deviation:.1f} over {len(self.values)} seeds"


def of_trial(trial: Run, seeds: Sequence[Run]) -> Candidate:
    """A trial, which has a checkpoint, and the trainings of its settings with other `seeds`."""
    values, missing = [references.best_value(trial) or 0.0], {}
    for training in seeds:
        statuses = [event["value"] for event in run.read_events(training.events) if event["kind"] == "status"]
        value = references.best_value(training)
        if not statuses:
            missing[training.name] = "not finished"
        elif statuses[-1] == "FAILED" or value is None:
            missing[training.name] = records.reason(training)
        else:
            values.append(value)
    return Candidate(trial.name, tuple(values), missing)


def welch(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the difference of two means with unequal variances (Welch 1947), each of two values or more.

    Values without any spread give an interval without any width.
    """
    from scipy import stats

    shares = [statistics.variance(side) / len(side) for side in (first, second)]
    difference = statistics.fmean(first) - statistics.fmean(second)
    if sum(shares) == 0:
        return difference, difference
    degrees = sum(shares) ** 2 / sum(
        share**2 / (len(side) - 1) for share, side in zip(shares, (first, second), strict=True)
    )
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees)) * math.sqrt(sum(shares))
    return difference - half, difference + half


@dataclass(frozen=True)
class Confirmation:
    """The candidates of a study that have several seeds, the highest mean first."""

    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate:
        """The one that had won with one seed."""
        return max(self.candidates, key=lambda one: one.values[0])

    def sentences(self) -> list[str]:
        """What they show."""
        first = self.candidates[0]
        told = [f"{first.trial} is first: {first.in_words()} (mean and standard deviation of val RSUM)."]
        if self.chosen is not first:
            place = self.candidates.index(self.chosen) + 1
            told.append(
                f"{self.chosen.trial}, which was best with one seed ({self.chosen.values[0]:.1f}), did not hold: it is "
                f"number {place} of {len(self.candidates)}, at {self.chosen.in_words()}."
            )
        if len(self.candidates) > 1:
            told.append(self._ahead())
        fewest = min(len(one.values) for one in self.candidates)
        if fewest < FEW_SEEDS:
            told.append(f"{fewest} seeds tell only roughly how much seeds differ; more of them narrow the interval.")
        fall = statistics.fmean(one.values[0] - statistics.fmean(one.values[1:]) for one in self.candidates)
        told.append(
            f"With new seeds these settings reach {abs(fall):.1f} {'less' if fall > 0 else 'more'} on average than the "
            "values they were chosen by."
        )
        return told

    def _ahead(self) -> str:
        first, second = self.candidates[:2]
        low, high = welch(first.values, second.values)
        verdict = "more than seeds differ by" if low > 0 else "no more than seeds differ by, so either may be better"
        return (
            f"{first.trial} is ahead of {second.trial} by {first.mean - second.mean:.1f} (95 % interval {low:.1f} to "
            f"{high:.1f}, Welch): {verdict}."
        )

    def table(self) -> RenderableType:
        """All of it for a terminal."""
        table = Table("trial", "val RSUM", "seeds", "by seed, the trial's own first")
        for one in self.candidates:
            table.add_row(one.trial, f"{one.mean:.1f} ± {one.deviation:.1f}", str(len(one.values)), by_seed(one.values))
        missing = [f"{run}: {reason}" for one in self.candidates for run, reason in one.missing.items()]
        return Group(table, *map(Text, [*missing, *self.sentences()]))

    def to_json(self) -> dict[str, Any]:
        rows = [
            {
                "trial": one.trial,
                "mean": one.mean,
                "deviation": one.deviation,
                "values": one.values,
                "missing": one.missing,
            }
            for one in self.candidates
        ]
        interval = welch(*(one.values for one in self.candidates[:2])) if len(self.candidates) > 1 else None
        return {"candidates": rows, "chosen": self.chosen.trial, "first_minus_second_95": interval}


def by_seed(values: Sequence[float]) -> str:
    return "  ".join(f"{value:.1f}" for value in values)


def read(study: str, store: Path) -> Confirmation | None:
    """What is known of a study's trials with several seeds; None while there is none."""
    seeds: dict[str, list[Run]] = {}
    for training in references.all_runs(store):
        if (of := references.configuration(training.name)) != training.name:
            seeds.setdefault(of, []).append(training)
    again = [trial for trial in references.trials_of(study, store) if trial.name in seeds] if seeds else []
    found = [of_trial(one, seeds[one.name]) for one in again if references.best_value(one) is not None]
    several = [one for one in found if len(one.values) > 1]
    return Confirmation(tuple(sorted(several, key=lambda one: -one.mean))) if several else None
