"""Comparison of runs: which settings differ, and what was measured of each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from setwise.pipelines import evaluate, protocol, references
from setwise.platform import config, run
from setwise.platform.run import Run

VALIDATION = "val/rsum"


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
            "runs": [
                {"name": r.name, "status": r.status, "epochs": r.epochs, "settings": r.settings, "values": r.values}
                for r in self.rows
            ],
            "not_comparable": self.mixed,
            "own_similarity": self.own_similarity,
        }


def compare(runs: list[Run]) -> Comparison:
    """Runs beside each other. Values under different protocols are left out, and the differences named."""
    flat = {training: config.flatten(config.read_yaml(training.config).values) for training in runs}
    names = sorted({name for settings in flat.values() for name in settings})
    differing = [name for name in names if len({json.dumps(s.get(name)) for s in flat.values()}) > 1]
    differences = _differing_protocols(runs)
    own = {name: found for name, found in differences.items() if all(one.startswith("similarity") for one in found)}
    mixed = {name: found for name, found in differences.items() if name not in own}
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


def _status(events: list[dict[str, Any]]) -> str:
    """How a run ended, in the words of its record; `unfinished` if it did not."""
    statuses = [
        e["values"]["setwise.status"] for e in events if e["kind"] == "tags" and "setwise.status" in e["values"]
    ]
    return str(statuses[-1]).lower() if statuses else "unfinished"


def _differing_protocols(runs: list[Run]) -> dict[str, list[str]]:
    """Benchmarks that were not measured under one protocol, with what differs from the first that was met."""
    found: dict[str, dict[str, Any]] = {}
    differing: dict[str, list[str]] = {}
    for training in runs:
        for outcome in evaluate.recorded(training):
            first = found.setdefault(outcome.benchmark, outcome.protocol)
            for difference in protocol.describe_difference(first, outcome.protocol):
                if difference not in (known := differing.setdefault(outcome.benchmark, [])):
                    known.append(difference)
    return dict(sorted(differing.items()))
