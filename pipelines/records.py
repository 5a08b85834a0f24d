"""What a training leaves in its record, beside its metrics: at its beginning and at its end.

The record is the run's outbox; it reaches MLflow from there.
"""

from __future__ import annotations

import getpass
import platform  # the standard library's
import re
from typing import Any

from setwise.pipelines import references
from setwise.pipelines.prepare import Prepared
from setwise.pipelines.recipe import Recipe
from setwise.platform import checkpoint, config, run, storage
from setwise.platform.errors import DataError
from setwise.platform.masking import masked
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run


def begin(outbox: Outbox, training: Run, recipe: Recipe, prepared: Prepared, start_tags: dict[str, str]) -> None:
    """Parameters, data, configuration, environment, commit and diff, and from which published weights it started
    (`start_tags`); once in the life of a run."""
    if any(event["kind"] == "dataset" for event in run.read_events(outbox.path)):
        return
    identity = storage.read_json(training.folder / "run.json")
    flat = config.flatten(recipe)
    tags = {
        "setwise.recipe": recipe.title,
        "setwise.data": prepared.fingerprint,
        "setwise.host": platform.node(),
        "mlflow.source.git.commit": str(identity["commit"]),
        "setwise.code_changed": str(identity["dirty"]),
        **_place(training),
        **origin(training),
        **start_tags,
    }
    files = ("config.yaml", "environment.json", "run.json", "code.diff")
    outbox.append(
        {"kind": "params", "values": {name: str(value) for name, value in flat.items()}},
        {"kind": "tags", "values": tags},
        {"kind": "dataset", "name": recipe.data.name, "digest": prepared.fingerprint, "source": str(prepared.folder)},
        *({"kind": "artifact", "path": file, "into": ""} for file in files if (training.folder / file).is_file()),
    )


def origin(training: Run) -> dict[str, str]:
    """Tags that MLflow's lists show as Source and Created by."""
    study = training.parent or (training if training.folder.parent.name == "studies" else None)
    command = f"setwise sweep {study.name}" if study is not None else f"setwise train {training.experiment}"
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container without one
        user = "unknown"
    return {"mlflow.source.name": command, "mlflow.source.type": "LOCAL", "mlflow.user": user}


def _place(training: Run) -> dict[str, str]:
    """Tags that say to what a run belongs: runs that differ in nothing but their seed have one configuration; a child
    belongs to a study, of which it is a trial if it is called `STUDY-007`."""
    tags = {"setwise.configuration": references.configuration(training.name)}
    if training.parent is not None:
        study = training.parent.name
        tags["setwise.study"] = study
        if trial := re.fullmatch(re.escape(study) + r"-(\d{3,})", training.name):
            tags["setwise.trial"] = str(int(trial[1]))
    return tags


def end(training: Run, status: str, reason: str | None = None) -> None:
    """The best checkpoint and how it ended: MLflow's FINISHED or FAILED, or PRUNED for a trial that was stopped early.

    Said once; a second end of the same run is ignored.
    """
    if ended(training):
        return
    outbox = Outbox(training.events)
    events: list[dict[str, Any]] = []
    tags = {"setwise.status": status} | ({"setwise.reason": masked(reason)[:4000]} if reason else {})
    try:
        best = training.best_checkpoint()
    except DataError:
        pass  # it ended before its first epoch did
    else:
        files = training.folder / "best" / best.name
        checkpoint.copy_for_inference(best, files)
        path = str(files.relative_to(training.folder))
        tags["setwise.best_checkpoint"] = f"checkpoints/{best.name}"
        events.append({"kind": "artifact", "path": path, "into": tags["setwise.best_checkpoint"]})
        known = storage.read_json(training.folder / "best.json")
        epoch = int(checkpoint.metadata(best)["epoch"])
        outbox.metrics(epoch, {f"best/{known['metric']}": float(known["value"])}, series="best")
    checkpoint.prune(training.steps, keep=())  # nobody goes on from there any more
    events.append({"kind": "tags", "values": tags})
    events.append({"kind": "status", "value": "FAILED" if status == "FAILED" else "FINISHED"})
    outbox.append(*events)


def ended(training: Run) -> bool:
    return training.status is not None


def reason(training: Run) -> str:
    """Why a run failed, as `end` was told."""
    tags = [event["values"] for event in run.read_events(training.events) if event["kind"] == "tags"]
    return next((values["setwise.reason"] for values in reversed(tags) if "setwise.reason" in values), "unknown")
