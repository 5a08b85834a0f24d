"""Comparison: the trials of a study in one overview, and systems side by side with what their differences are worth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from setwise.pipelines import benchmarks, evaluate, protocol, references, statistics
from setwise.pipelines.benchmarks import Outcome
from setwise.pipelines.statistics import Difference
from setwise.platform import config, run
from setwise.platform.errors import ConfigError, DataError
from setwise.platform.run import Run

VALIDATION = "val/rsum"
MAIN = ("rsum", "R1", "map_at_r")
"""The metrics that are shown unless others are asked for."""
ALPHA = 0.05
RESAMPLES = 10_000
"""Enough that after Holm's correction for 100 tests p may still be 0.02."""
Verdict = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class Row:
    """One run: the settings in which the compared runs differ, and its values."""

    name: str
    status: str
    epochs: int
    settings: dict[str, Any]
    values: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other, the best validation value first.

    `mixed`: benchmarks that were measured under several protocols, with the fields in which these differ; their values
    are left out. `own_similarity`: benchmarks whose protocols differ in nothing but the similarity and its parameters.
    That is a setting of the models, as sweeps of alpha vary it, and each is measured with its own; so values stay.
    """

    rows: list[Row]
    mixed: dict[str, list[str]]
    own_similarity: dict[str, list[str]]

    def to_json(self) -> dict[str, Any]:
        return {
            "runs": [asdict(row) for row in self.rows],
            "not_comparable": self.mixed,
            "own_similarity": self.own_similarity,
        }


@dataclass(frozen=True)
class System:
    """What is compared: one configuration, trained with one seed or several."""

    name: str
    runs: list[Run]
    validation: list[float]

    @classmethod
    def of(cls, reference: str, store: Path) -> System:
        """The seeds of the configuration that a reference names; of a study, those of its best trial."""
        study = bool(references.trials_of(reference, store))
        runs = references.find_seeds(f"best:{reference}" if study else reference, store)
        name = references.configuration(runs[0].name) if len(runs) > 1 else runs[0].name
        if (variant := references.variant_of(runs[0])) is not None and len(runs) > 1:
            name = f"{runs[0].experiment}:{variant}"
        return cls(name, runs, [value for one in runs if (value := references.best_value(one)) is not None])


@dataclass(frozen=True)
class Cell:
    """One system on one metric: over its measured seeds mean and standard deviation (None of one seed), and against the
    baseline the difference, with its p-value as corrected for all that are shown."""

    system: str
    seeds: int
    mean: float
    deviation: float | None
    difference: Difference | None
    corrected: float | None = None

    @property
    def verdict(self) -> Verdict | None:
        """Which way it differs from the baseline, if that is more than chance."""
        if self.difference is None or self.corrected is None:
            return None
        if self.corrected >= ALPHA:
            return "undecided"
        return "better" if self.difference.value > 0 else "worse"


@dataclass(frozen=True)
class Line:
    """One metric of one benchmark, of those systems that were measured, in their order."""

    benchmark: str
    metric: str
    cells: list[Cell]


@dataclass(frozen=True)
class SideBySide:
    """Systems side by side, the first of them the baseline; `mixed` and `own_similarity` as in Comparison.

    protocols: by benchmark, in words, and the fingerprints. settings: those in which the systems differ, a value for
    each system. uneven: by system, settings other than the seed in which its own runs differ. unmeasured: by run, the
    benchmarks that were measured of others. unfinished: runs whose training has not ended.
    """

    systems: list[System]
    lines: list[Line]
    protocols: dict[str, tuple[str, list[str]]]
    settings: dict[str, list[Any]]
    uneven: dict[str, list[str]]
    unmeasured: dict[str, list[str]]
    unfinished: list[str]
    mixed: dict[str, list[str]]
    own_similarity: dict[str, list[str]]

    @property
    def tests(self) -> int:
        """How many differences are shown, for which p-values are corrected."""
        return sum(cell.difference is not None for line in self.lines for cell in line.cells)

    def to_json(self) -> dict[str, Any]:
        lines = [
            {
                "benchmark": line.benchmark,
                "metric": line.metric,
                "systems": [asdict(cell) | {"verdict": cell.verdict} for cell in line.cells],
            }
            for line in self.lines
        ]
        return {
            "baseline": self.systems[0].name,
            "systems": [
                {"name": one.name, "runs": [run.name for run in one.runs], VALIDATION: one.validation}
                for one in self.systems
            ],
            "lines": lines,
            "test": {"resamples": RESAMPLES, "confidence": statistics.CONFIDENCE, "alpha": ALPHA, "tests": self.tests},
            "protocols": {name: {"words": words, "fingerprints": of} for name, (words, of) in self.protocols.items()},
            "settings": self.settings,
            "uneven": self.uneven,
            "unmeasured": self.unmeasured,
            "unfinished": self.unfinished,
            "not_comparable": self.mixed,
            "own_similarity": self.own_similarity,
        }


def compare(runs: list[Run]) -> Comparison:
    """Runs beside each other. Values under different protocols are left out, and the differences named."""
    flat = {training: _told(training) for training in runs}
    differing = _differing(list(flat.values()))
    mixed, own = _protocol_differences(runs)
    rows = []
    for training, settings in flat.items():
        values = {}
        best = references.best_value(training)
        if best is not None:
            values[VALIDATION] = best
        for outcome in evaluate.recorded(training):
            if outcome.benchmark not in mixed:
                values |= {f"{outcome.benchmark}/{metric}": value for metric, value in outcome.values.items()}
        events = run.read_events(training.events)
        epochs = max((e["step"] for e in events if e["kind"] == "metrics" and e["series"] == "train"), default=0)
        shown = {name: settings.get(name) for name in differing}
        rows.append(Row(training.name, _status(events), epochs, shown, values))
    rows.sort(key=lambda row: (-row.values.get(VALIDATION, float("-inf")), row.name))
    return Comparison(rows, mixed, own)


def side_by_side(systems: list[System], metrics: Sequence[str] | None = MAIN) -> SideBySide:
    """Systems on all benchmarks that were measured of any of them; each but the first is tested against the first.

    Args:
        metrics: names such as rsum or i2t_R1, or ends such as R1, which mean all directions; None for all there are.

    Raises:
        ConfigError: two references mean the same system, or no metric is called so.
        DataError: a recorded evaluation is damaged.
    """
    for place, system in enumerate(systems):
        if system.name in [other.name for other in systems[:place]]:
            raise ConfigError(f"two references mean '{system.name}'; give different ones")
    ends = statistics.ENDS
    known = ["rsum", *ends, *(f"{direction}_{end}" for direction in statistics.DIRECTIONS for end in ends)]
    for name in metrics or ():
        if name not in known:
            raise config.no_such("metric", name, known)

    runs = [one for system in systems for one in system.runs]
    mixed, own = _protocol_differences(runs)
    measured, unmeasured = _measured(runs, mixed)
    lines = []
    for name, outcomes in measured.items():
        sides = [[outcomes[one] for one in system.runs if one in outcomes] for system in systems]
        shown = [
            metric
            for metric in statistics.metrics_of(next(iter(outcomes.values())))
            if metrics is None or metric in metrics or metric.partition("_")[2] in metrics
        ]
        found = [
            statistics.differences(side, sides[0], resamples=RESAMPLES) if side and sides[0] and place else {}
            for place, side in enumerate(sides)
        ]
        for metric in shown:
            cells = [
                _cell(system.name, [one.values[metric] for one in side], differences.get(metric))
                for system, side, differences in zip(systems, sides, found, strict=True)
                if side
            ]
            lines.append(Line(name, metric, cells))
    flat = [[_settings(one, but="train.seed") for one in system.runs] for system in systems]
    uneven = {system.name: _differing(own) for system, own in zip(systems, flat, strict=True)}
    return SideBySide(
        systems=systems,
        lines=_corrected(lines),
        protocols={
            name: _protocol(list(outcomes.values()))
            for name, outcomes in measured.items()
            if any(line.benchmark == name for line in lines)
        },
        settings={name: [own[0].get(name) for own in flat] for name in _differing([own[0] for own in flat])},
        uneven={name: differing for name, differing in uneven.items() if differing},
        unmeasured=unmeasured,
        unfinished=[one.name for one in runs if _status(run.read_events(one.events)) == "unfinished"],
        mixed=mixed,
        own_similarity={name: fields for name, fields in own.items() if name in measured},
    )


def _measured(
    runs: list[Run], mixed: dict[str, list[str]]
) -> tuple[dict[str, dict[Run, Outcome]], dict[str, list[str]]]:
    """By benchmark and run what was found of each query; and by run the benchmarks that only others have."""
    measured: dict[str, dict[Run, Outcome]] = {}
    for one in runs:
        for outcome in evaluate.recorded(one):
            if outcome.benchmark in mixed:
                continue
            of_benchmark = measured.setdefault(outcome.benchmark, {})
            try:
                of_benchmark[one] = evaluate.with_queries(one, outcome)
            except DataError:  # as after an older version: to be measured again
                continue
    unmeasured = {}
    for one in runs:
        possible = benchmarks.names(str(_settings(one).get("data.name")))
        lacking = [name for name, outcomes in measured.items() if one not in outcomes and _plain(name) in possible]
        if lacking or not evaluate.recorded(one):
            unmeasured[one.name] = lacking
    return {name: measured[name] for name in sorted(measured) if measured[name]}, unmeasured


def _plain(benchmark: str) -> str:
    return benchmark.removesuffix(evaluate.OFFICIAL)


def _cell(system: str, values: list[float], difference: Difference | None) -> Cell:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Cell(system, len(values), float(np.mean(values)), deviation, difference)


def _corrected(lines: list[Line]) -> list[Line]:
    """The lines with p-values corrected for all of their tests."""
    tested = [cell.difference.p for line in lines for cell in line.cells if cell.difference is not None]
    corrected = iter(statistics.holm(tested))
    return [
        replace(
            line,
            cells=[
                cell if cell.difference is None else replace(cell, corrected=next(corrected)) for cell in line.cells
            ],
        )
        for line in lines
    ]


def _protocol(outcomes: list[Outcome]) -> tuple[str, list[str]]:
    return protocol.in_words(outcomes[0].protocol), list(dict.fromkeys(one.fingerprint for one in outcomes))


def _settings(training: Run, but: str = "") -> dict[str, Any]:
    settings = config.flatten(config.read_yaml(training.config).values)
    return {name: value for name, value in settings.items() if name != but}


def _told(training: Run) -> dict[str, Any]:
    """Its settings; of a variant of a study, which may differ in everything, its name and its seed instead."""
    settings, variant = _settings(training), references.variant_of(training)
    if variant is None:
        return settings
    return {references.VARIANT: variant, "train.seed": settings.get("train.seed")}


def _differing(settings: list[dict[str, Any]]) -> list[str]:
    """The names of what differs, in order."""
    names = sorted({name for one in settings for name in one})
    return [name for name in names if len({json.dumps(one.get(name)) for one in settings}) > 1]


def _status(events: list[dict[str, Any]]) -> str:
    """How a run ended, in the words of its record; `unfinished` if it did not."""
    statuses = [
        e["values"]["setwise.status"] for e in events if e["kind"] == "tags" and "setwise.status" in e["values"]
    ]
    return str(statuses[-1]).lower() if statuses else "unfinished"


def _protocol_differences(runs: list[Run]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Benchmarks that were not measured under one protocol, with what differs from the first that was met: those that
    cannot be compared, and those that differ in the models' own similarity alone."""
    first: dict[str, dict[str, Any]] = {}
    differing: dict[str, list[str]] = {}
    for training in runs:
        for outcome in evaluate.recorded(training):
            met = first.setdefault(outcome.benchmark, outcome.protocol)
            for difference in protocol.describe_difference(met, outcome.protocol):
                if difference not in (known := differing.setdefault(outcome.benchmark, [])):
                    known.append(difference)
    own = {name: found for name, found in differing.items() if all(one.startswith("similarity") for one in found)}
    return {name: found for name, found in sorted(differing.items()) if name not in own}, own
