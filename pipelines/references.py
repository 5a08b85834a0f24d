"""References: how a user names a checkpoint after training.

a folder                  a checkpoint, or a run
a run's name              or the beginning of it, or of its MLflow id, if only one run begins so
last                      the run that changed last
best:STUDY                the best trial of a study
models:/NAME@ALIAS        a registered version, or models:/NAME/3
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from setwise.pipelines import registry
from setwise.platform import checkpoint, config, storage
from setwise.platform.errors import ConfigError, DataError
from setwise.platform.run import Run
from setwise.platform.tracking import Tracker


@dataclass(frozen=True)
class Reference:
    """A checkpoint, the run that made it if that is known, and the name to show."""

    label: str
    checkpoint: Path
    run: Run | None


def resolve(text: str, store: Path, tracker: Tracker) -> Reference:
    """The checkpoint that `text` names.

    Raises:
        ConfigError: nothing, or more than one thing, is called so.
        DataError: it is known but has no whole checkpoint.
    """
    if text.startswith("models:/"):
        version = registry.find(tracker, text)
        folder = registry.download(tracker, version, store)
        made_by = [one for one in all_runs(store) if one.name == version.run]
        return Reference(f"{version.name} version {version.version}", folder, made_by[0] if made_by else None)
    if (Path(text) / checkpoint.MANIFEST).is_file():
        checkpoint.verify(Path(text))
        owner = Run(Path(text).resolve().parent.parent)
        return Reference(text, Path(text), owner if owner.config.is_file() else None)
    found = find_run(text, store)
    return Reference(found.name, found.best_checkpoint(), found)


def all_runs(store: Path) -> list[Run]:
    """The runs of a store, by name."""
    return [Run(path.parent) for path in sorted((store / "runs").glob("*/config.yaml"))]


def trials_of(study: str, store: Path) -> list[Run]:
    """The runs of a study's trials, in the order of their numbers."""
    runs = [run for run in all_runs(store) if re.fullmatch(re.escape(study) + r"-\d{3,}", run.name)]
    return sorted(runs, key=lambda run: int(run.name.rpartition("-")[2]))


def find_run(text: str, store: Path) -> Run:
    """The run that `text` names.

    Raises:
        ConfigError: no run, or several.
    """
    runs = all_runs(store)
    if not runs:
        raise ConfigError(f"there is no run in {store} yet. Begin with: setwise demo, or setwise train RECIPE")
    if text == "last":
        return max(runs, key=lambda run: run.events.stat().st_mtime if run.events.is_file() else 0)
    if text.startswith("best:"):
        return best_of(text.removeprefix("best:"), store)
    if (Path(text) / "config.yaml").is_file():
        return Run(Path(text).resolve())
    exact = [run for run in runs if run.name == text]
    begun = [run for run in runs if run.name.startswith(text) or _mlflow_id(run).startswith(text)]
    if len(matches := exact or begun) == 1:
        return matches[0]
    if matches:
        raise ConfigError(f"'{text}' begins several runs: {', '.join(run.name for run in matches[:8])}")
    raise config.no_such("run", text, [run.name for run in runs])


def trial_run(name: str, number: int, store: Path) -> Run:
    """The run of a trial, whether it exists yet or not."""
    return Run(store / "runs" / f"{name}-{number:03d}")


def find_runs(text: str, store: Path) -> list[Run]:
    """The trials of the study that `text` names, or else the one run."""
    return trials_of(text, store) or [find_run(text, store)]


def best_of(study: str, store: Path) -> Run:
    """The trial of a study whose best validation value is the highest.

    Raises:
        ConfigError: there is no such study.
        DataError: none of its trials has a checkpoint.
    """
    trials = trials_of(study, store)
    if not trials:
        known = sorted(path.name for path in (store / "studies").glob("*") if path.is_dir())
        raise config.no_such("study", study, known)
    values = {run: best_value(run) for run in trials}
    scored = {run: value for run, value in values.items() if value is not None}
    if not scored:
        raise DataError(f"no trial of study '{study}' has a checkpoint yet")
    return max(scored, key=lambda run: scored[run])


def best_value(run: Run) -> float | None:
    """The best validation value of a run, None before its first epoch ends."""
    path = run.folder / "best.json"
    return float(storage.read_json(path)["value"]) if path.is_file() else None


def _mlflow_id(run: Run) -> str:
    path = run.folder / "delivered.json"
    return str(storage.read_json(path)["run_id"]) if path.is_file() else ""
