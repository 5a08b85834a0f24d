"""Promotion: a run's best checkpoint becomes a version of the registered model, and the version that is served."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from setwise.pipelines import registry, trained_model
from setwise.pipelines.benchmarks import Outcome
from setwise.pipelines.evaluate import evaluate
from setwise.pipelines.references import Reference
from setwise.pipelines.registry import Version
from setwise.platform import checkpoint, gate, storage
from setwise.platform.errors import ConfigError, GateError
from setwise.platform.gate import Decision, Measured
from setwise.platform.tracking import Tracker

GATE_METRICS = ("rsum", "t2i_map_at_r")


@dataclass(frozen=True)
class Promotion:
    """What became of a promotion. `version` is the champion afterwards; None after a refused dry run of a first one."""

    decision: Decision
    version: Version | None
    changed: bool

    def describe(self, label: str) -> str:
        champion = f"{self.version.name} version {self.version.version}" if self.version else "none"
        if self.changed:
            return f"{label} is the champion now: {champion}. Reason: {self.decision.reason}"
        verdict = "would be promoted" if self.decision.promote else "would not be promoted"
        return f"{label} {verdict}: {self.decision.reason}. Champion: {champion}"


def promote(
    reference: Reference, store: Path, tracker: Tracker, dry_run: bool = False, override: str | None = None
) -> Promotion:
    """Evaluate, decide, register, and move the alias `champion`.

    The files are uploaded and the version registered before the alias moves, so that the alias always names a whole
    version. One promotion at a time; the champion that the decision was made against is the one that is replaced.

    Args:
        override: promote whatever the gate says, for this reason, which is written down.

    Raises:
        GateError: the gate refused; nothing was changed.
        ConfigError: the checkpoint belongs to no run of this store.
    """
    if reference.run is None:
        raise ConfigError(f"'{reference.label}' belongs to no run here, so its lineage cannot be recorded")
    outcomes = evaluate([reference], store)
    model = trained_model.load(reference.checkpoint)
    name = registry.model_name(model.recipe.data.name)
    with storage.lease(store / "registry" / f"{name}.lease", f"promotion of {name}"):
        current = registry.champion(tracker, name)
        if current is not None and current.tags.get("setwise.weights") == model.digest:
            same = Decision(False, "these weights are the champion already", _values(outcomes), _values(outcomes))
            return Promotion(same, current, changed=False)
        decision = gate.no_regression(_measured(outcomes), _stored(current) if current else None)
        if dry_run:
            return Promotion(decision, current, changed=False)
        if not decision.promote and override is None:
            raise GateError(
                f"Not promoting {reference.label}: {decision.reason}. Champion stays {name} version "
                f'{current.version if current else "none"}. To promote all the same: --override "the reason"'
            )
        version = _register(reference, tracker, name, model.digest, outcomes, decision, override)
        return Promotion(decision, version, changed=True)


def _register(
    reference: Reference,
    tracker: Tracker,
    name: str,
    digest: str,
    outcomes: list[Outcome],
    decision: Decision,
    override: str | None,
) -> Version:
    run = reference.run
    assert run is not None, "promote() has checked this"
    metadata = checkpoint.metadata(reference.checkpoint)
    tracker.deliver(run)
    run_id = tracker.run_id(run)
    into = f"checkpoints/{reference.checkpoint.name}"
    files = run.folder / "best" / reference.checkpoint.name
    checkpoint.copy_for_inference(reference.checkpoint, files)
    tracker.client.log_artifacts(run_id, str(files), into)
    tags = {
        registry.RUN_TAG: run.name,
        registry.HASH_TAG: storage.sha256(files / checkpoint.MANIFEST),
        "setwise.weights": digest,
        "setwise.decision": json.dumps(decision.to_json()),
        "setwise.promoted_at": str(int(time.time())),
        "setwise.data": metadata["data"]["fingerprint"],
        "setwise.measured": json.dumps({k: [m.value, m.protocol] for k, m in _measured(outcomes).items()}),
    }
    if override is not None:
        tags["setwise.override"] = override
    _create_model(tracker, name)
    source = f"{tracker.client.get_run(run_id).info.artifact_uri}/{into}"
    made = tracker.client.create_model_version(name, source, run_id=run_id, tags=tags)
    tracker.client.set_registered_model_alias(name, registry.CHAMPION, made.version)
    return registry.find(tracker, f"models:/{name}@{registry.CHAMPION}")


def _create_model(tracker: Tracker, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        tracker.client.get_registered_model(name)
    except MlflowException:
        tracker.client.create_registered_model(name)


def _measured(outcomes: list[Outcome]) -> dict[str, Measured]:
    """The gate's values, under the protocol without the similarity: each model is served with its own."""
    return {
        f"{outcome.benchmark}/{metric}": Measured(outcome.values[metric], outcome.task)
        for outcome in outcomes
        for metric in GATE_METRICS
        if metric in outcome.values
    }


def _values(outcomes: list[Outcome]) -> dict[str, float]:
    return {name: measured.value for name, measured in _measured(outcomes).items()}


def _stored(version: Version) -> dict[str, Measured]:
    """What the champion was promoted with."""
    return {name: Measured(*pair) for name, pair in json.loads(version.tags.get("setwise.measured", "{}")).items()}
