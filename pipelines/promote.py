"""Promotion: a run's best checkpoint becomes a version of the registered model, and the version that is served.

The order of the steps is what makes it safe to be killed anywhere, and to be run by many at once: files, version, entry
in the ledger, alias. Until the entry is written nothing that anybody reads has changed; of two that write it at once
one is told that it was overtaken and decides again, against the new champion; and from the entry on, whoever comes next
moves the alias (promotion_ledger.settle).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from setwise.pipelines import crisscrossed, promotion_ledger, references, registry, trained_model
from setwise.pipelines.benchmarks import Outcome
from setwise.pipelines.evaluate import evaluate
from setwise.pipelines.promotion_ledger import Entry, Ledger, OvertakenError
from setwise.pipelines.references import Reference
from setwise.pipelines.registry import Version
from setwise.pipelines.trained_model import TrainedModel
from setwise.platform import checkpoint, config, gate, storage
from setwise.platform.errors import ConfigError, DataError, GateError
from setwise.platform.gate import Decision, Gate, Measured
from setwise.platform.run import Run
from setwise.platform.tracking import Tracker

DEFAULT_GATE = Path(__file__).parent / "gates" / "default.yaml"
LEASE_WAIT_S = 60
METRICS = (
    "rsum",
    *(f"{d}_{m}" for d in ("i2t", "t2i", "t2t", "i2i") for m in ("R1", "R5", "R10", "map_at_r", "r_precision")),
    *(f"{task}_spearman" for task in crisscrossed.TASKS),
)
"""What a gate can ask for: metrics of which more is better."""


@dataclass(frozen=True)
class Promotion:
    """What became of a promotion. `version` is the champion afterwards; None after a dry run of a first one."""

    decision: Decision
    version: Version | None
    changed: bool

    def describe(self, label: str) -> str:
        champion = f"{self.version.name} version {self.version.version}" if self.version else "none yet"
        if self.changed:
            by_hand = "" if self.decision.met else f", against the gate, because: {self.decision.override}"
            return f"{label} is the champion now: {champion}{by_hand}. Reason: {self.decision.reason}"
        verdict = "would be promoted" if self.decision.promote else "would not be promoted"
        return f"{label} {verdict}: {self.decision.reason}. Champion: {champion}"

    def to_json(self, label: str) -> dict[str, Any]:
        version = self.version and {"name": self.version.name, "version": self.version.version}
        return {"reference": label, "changed": self.changed, "champion": version, "decision": self.decision.to_json()}


class RefusedError(GateError):
    """The gate was not met; `promotion` has the numbers."""

    def __init__(self, message: str, promotion: Promotion) -> None:
        super().__init__(message)
        self.promotion = promotion


def load_gate(path: Path = DEFAULT_GATE) -> Gate:
    """A gate file.

    Raises:
        ConfigError: it has mistakes; each with its place.
    """
    layer = config.load_layers(path)
    loaded = config.build(Gate, layer)
    problems = []
    for name in loaded.metrics:
        benchmark, slash, metric = name.partition("/")
        if slash and benchmark and metric in METRICS:
            continue
        nearest = config.nearest_name(metric, METRICS)
        hint = f" Did you mean '{benchmark}/{nearest}'?" if slash and benchmark and nearest else ""
        known = f"Write BENCHMARK/METRIC or '{gate.ANY}METRIC', with one of {', '.join(METRICS)}."
        problems.append(f"{config.place_of(layer, ('metrics', name))}: '{name}' cannot be asked for.{hint} {known}")
    if problems:
        raise ConfigError("\n".join(problems))
    return loaded


def promote(
    reference: Reference,
    store: Path,
    tracker: Tracker,
    dry_run: bool = False,
    override: str | None = None,
    asked: Gate | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Promotion:
    """Evaluate, decide, register, and move the alias `champion`.

    Args:
        override: promote whatever the gate says, for this reason, which is written down.
        asked: the gate; None for the default one.

    Raises:
        RefusedError: the gate refused; nothing was changed.
        ConfigError: the checkpoint belongs to no run of this store, or `override` gives no reason.
    """
    if override is not None and not override.strip():
        raise ConfigError('--override needs the reason, which is written down: --override "the reason"')
    promotion_ledger.check_reason(override or "")
    run = reference.run
    if run is None:
        raise ConfigError(f"'{reference.label}' belongs to no run here, so its lineage cannot be recorded")
    asked = asked or load_gate()
    model = trained_model.load(reference.checkpoint)
    name = registry.model_name(model.recipe.data.name)
    say(f"evaluating {reference.label} on the test split")
    outcomes = evaluate([reference], store)

    def between(champion: Version) -> dict[str, tuple[float, float]]:
        try:
            return _intervals(asked, outcomes, champion, store, tracker)
        except DataError as error:
            say(f"the difference to the champion cannot be judged: {error}")
            return {}

    lease = storage.lease(store / "registry" / f"{name}.lease", f"promotion of {name}", wait_s=LEASE_WAIT_S)
    with lease, registry.reaching(tracker):
        source = made = None
        while True:
            seen = promotion_ledger.read(tracker, name)
            current = _champion(tracker, seen, finish=not dry_run, say=say)
            same = current is not None and current.tags.get("setwise.weights") == model.digest
            decision = _decide(asked, outcomes, seen, current, same, override, between)
            if dry_run or same or not decision.promote:
                if made is not None:  # overtaken; nobody has heard of this version
                    tracker.client.delete_model_version(name, str(made.version))
                if dry_run or same:
                    return Promotion(decision, current, changed=False)
                refused = Promotion(decision, current, changed=False)
                raise RefusedError(_refusal(reference.label, name, decision, current), refused)
            if source is None:  # takes a while
                source, manifest = _upload(run, reference, tracker)
                if promotion_ledger.read(tracker, name) != seen:
                    continue
            tags = _tags(run, manifest, model, outcomes, decision, asked)
            if made is None:
                promotion_ledger.begin(tracker, name)
                number = tracker.client.create_model_version(name, source, tracker.run_id(run), tags=tags).version
                made = registry.find(tracker, f"models:/{name}/{number}")
            else:
                for key, value in tags.items():
                    tracker.client.set_model_version_tag(name, str(made.version), key, value)
            try:
                promotion_ledger.append(tracker, seen, _entry(made, seen, current, decision))
            except OvertakenError as error:
                say(f"{error} Deciding again, against the new champion.")
                continue
            promotion_ledger.settle(tracker, name)
            return Promotion(decision, registry.version(tracker, name, made.version), changed=True)


def _champion(tracker: Tracker, seen: Ledger, finish: bool, say: Callable[[str], None]) -> Version | None:
    """The version that the ledger says is served; with `finish`, the alias is moved where a crash came between."""
    if seen.head is None:  # also a model that was promoted before there were ledgers
        return registry.champion(tracker, seen.name)
    current = registry.version(tracker, seen.name, seen.head.version)
    if current is not None and finish and promotion_ledger.settle(tracker, seen.name):
        say(f"the alias of {seen.name} was not at version {current.version}, the end of its ledger; it is now")
    return current


def _decide(
    asked: Gate,
    outcomes: Sequence[Outcome],
    seen: Ledger,
    current: Version | None,
    same: bool,
    override: str | None,
    intervals: Callable[[Version], dict[str, tuple[float, float]]],
) -> Decision:
    candidate = _measured(outcomes)
    if same:
        values = gate.decide(asked, candidate, candidate)
        return replace(values, met=False, reason="these weights are the champion already")
    if current is None and seen.head is not None:
        found = gate.decide(asked, candidate, None, override=override)
        problem = f"version {seen.head.version} is the champion, but gone from the registry"
        return replace(found, met=False, reason=f"{problem} (to go back to the one before it: setwise rollback)")
    old = _stored(current) if current else None
    return gate.decide(asked, candidate, old, intervals(current) if current else {}, override)


def _refusal(label: str, name: str, decision: Decision, current: Version | None) -> str:
    stays = f"Champion stays {name} version {current.version}" if current else f"{name} has no champion yet"
    return f'Not promoting {label}: {decision.reason}. {stays}. To promote all the same: --override "the reason"'


def _intervals(
    asked: Gate, outcomes: Sequence[Outcome], current: Version, store: Path, tracker: Tracker
) -> dict[str, tuple[float, float]]:
    """The 95 % interval of each difference to the champion that the gate judges by it.

    The champion's ranks are those that its run recorded, if it is here and they are of these weights; else it is
    measured again.
    """
    wanted = {
        outcome.benchmark: outcome
        for outcome in outcomes
        if any((limit := asked.limit_of(f"{outcome.benchmark}/{m}")) and limit.significantly for m in outcome.values)
    }
    if not wanted:
        return {}
    from setwise.pipelines import statistics

    folder = registry.download(tracker, current, store)
    digest = current.tags.get("setwise.weights")
    runs = [run for run in references.all_runs(store) if run.name == current.run and digest in _evaluated(run)]
    champion = Reference(f"{current.name} version {current.version}", folder, runs[0] if runs else None)
    found = {}
    for baseline in evaluate([champion], store, names=list(wanted)):
        candidate = wanted[baseline.benchmark]
        if candidate.task == baseline.task:
            for metric, one in statistics.differences([candidate], [baseline]).items():
                found[f"{baseline.benchmark}/{metric}"] = one.low, one.high
    return found


def _evaluated(run: Run) -> set[str]:
    """The weights that the recorded values of a run are of."""
    found = set()
    for file in run.evaluation.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.add(str(storage.read_json(file)["weights"]))
    return found


def _upload(run: Run, reference: Reference, tracker: Tracker) -> tuple[str, str]:
    """Bring a checkpoint, without its training state, to the run in MLflow: where it is then, its manifest's hash."""
    tracker.deliver(run)
    run_id = tracker.run_id(run)
    into = f"checkpoints/{reference.checkpoint.name}"
    files = run.folder / "best" / reference.checkpoint.name
    checkpoint.copy_for_inference(reference.checkpoint, files)
    tracker.client.log_artifacts(run_id, str(files), into)
    source = f"{tracker.client.get_run(run_id).info.artifact_uri}/{into}"
    return source, storage.sha256(files / checkpoint.MANIFEST)


def _tags(
    run: Run, manifest: str, model: TrainedModel, outcomes: Sequence[Outcome], decision: Decision, asked: Gate
) -> dict[str, str]:
    """What a version says of itself."""
    tags = {
        registry.RUN_TAG: run.name,
        registry.HASH_TAG: manifest,
        "setwise.weights": model.digest,
        "setwise.decision": json.dumps(decision.to_json()),
        "setwise.gate": asked.model_dump_json(exclude_defaults=True),
        "setwise.promoted_at": str(int(time.time())),
        "setwise.data": model.metadata["data"]["fingerprint"],
        "setwise.measured": json.dumps({k: [m.value, m.protocol] for k, m in _measured(outcomes).items()}),
    }
    if decision.override is not None:
        tags["setwise.override"] = decision.override
    return tags


def _entry(made: Version, seen: Ledger, current: Version | None, decision: Decision) -> Entry:
    replaced = seen.head.version if seen.head else current.version if current else None
    return Entry(
        kind="promotion" if decision.met else "override",
        version=made.version,
        replaces=replaced,
        run=made.run,
        reason=promotion_ledger.shortened(decision.reason),
        override=decision.override,
        numbers=promotion_ledger.numbers(decision.candidate, decision.champion),
    )


def _measured(outcomes: Sequence[Outcome]) -> dict[str, Measured]:
    """All values that a gate can ask for, under the protocol without the similarity: each model brings its own."""
    return {
        f"{outcome.benchmark}/{metric}": Measured(outcome.values[metric], outcome.task)
        for outcome in outcomes
        for metric in METRICS
        if metric in outcome.values
    }


def _stored(version: Version) -> dict[str, Measured]:
    """What the champion was promoted with."""
    return {name: Measured(*pair) for name, pair in json.loads(version.tags.get("setwise.measured", "{}")).items()}
