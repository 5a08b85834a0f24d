"""References: how a user names a checkpoint after training, or a configuration with all of its seeds.

a folder                  a checkpoint, or a run
a run's name              or the beginning of it, or of its MLflow id, if only one run begins so
a configuration's name    its seeds are the runs NAME-seed0, NAME-seed1, ...; a trial is one more seed of itself
last                      the run that changed last
best:STUDY                the best trial of a study
STUDY:VARIANT             one variant of a study of variants, with all of its seeds
models:/NAME@ALIAS        a registered version, or models:/NAME/3

Where one checkpoint is wanted, a configuration stands for the run that has just its name, or else for the seed with the
best validation value, and the label says so; where systems are compared, it stands for all of its seeds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from setwise.pipelines import registry
from setwise.platform import checkpoint, config, storage
from setwise.platform.errors import ConfigError, DataError
from setwise.platform.run import Run, read_events
from setwise.platform.tracking import Tracker

SEED = re.compile(r"-seed(\d+)$")
VARIANT = "variant"
"""The parameter of a run that says which variant of its study it is."""


@dataclass(frozen=True)
class Reference:
    """A checkpoint, the run that made it if that is known, and the name to show."""

    label: str
    checkpoint: Path
    run: Run | None


def configuration(name: str) -> str:
    """The name that the seeds of one configuration share: that of a run, without -seedN."""
    return SEED.sub("", name)


def resolve(text: str, store: Path, tracker: Tracker) -> Reference:
    """The checkpoint that `text` names.

    Raises:
        ConfigError: nothing, or more than one thing, is called so.
        DataError: it is known but has no whole checkpoint.
    """
    if text.startswith("models:/"):
        version = registry.find(tracker, text)
        folder = registry.download(tracker, version, store)
        made_by = [run for run in all_runs(store) if run.name == version.run]
        return Reference(f"{version.name} version {version.version}", folder, made_by[0] if made_by else None)
    if (Path(text) / checkpoint.MANIFEST).is_file():
        checkpoint.verify(Path(text))
        owner = Run(Path(text).resolve().parent.parent)
        return Reference(text, Path(text), owner if owner.config.is_file() else None)
    seeds = find_seeds(text, store)
    found = _one_of(seeds)
    is_chosen = len(seeds) > 1 and _of_its_own_name(seeds) is None
    label = f"{found.name} (the best of {len(seeds)} seeds)" if is_chosen else found.name
    return Reference(label, found.best_checkpoint(), found)


def all_runs(store: Path) -> list[Run]:
    """The runs of a store, by name."""
    return [Run(path.parent) for path in sorted((store / "runs").glob("*/config.yaml"))]


def trials_of(study: str, store: Path) -> list[Run]:
    """The runs of a study's trials, in the order of their numbers."""
    runs = [run for run in all_runs(store) if re.fullmatch(re.escape(study) + r"-\d{3,}", run.name)]
    return sorted(runs, key=lambda run: int(run.name.rpartition("-")[2]))


def seeds_of(text: str, store: Path) -> list[Run]:
    """The runs of the configuration called `text`: the run of just this name, and then its NAME-seedN by their numbers;
    none if there is neither."""
    runs = [run for run in all_runs(store) if run.name == text or SEED.sub("", run.name) == text]
    return sorted(runs, key=lambda run: int(seed[1]) if run.name != text and (seed := SEED.search(run.name)) else -1)


def find_run(text: str, store: Path) -> Run:
    """The one run that `text` names.

    Raises:
        ConfigError: no run, or several.
    """
    return _one_of(find_seeds(text, store))


def find_seeds(text: str, store: Path) -> list[Run]:
    """The runs of the one configuration that `text` names, one for each seed that it was trained with.

    A study is named by best:STUDY; `last`, a folder and an MLflow id name one run.

    Raises:
        ConfigError: no run, or those of several configurations.
    """
    runs = all_runs(store)
    if not runs:
        raise ConfigError(f"there is no run in {store} yet. Begin with: setwise demo, or setwise train RECIPE")
    if text == "last":
        return [max(runs, key=lambda run: run.events.stat().st_mtime if run.events.is_file() else 0)]
    if text.startswith("best:"):
        best = best_of(study := text.removeprefix("best:"), store)
        if (variant := variant_of(best)) is not None:
            return _of_variant(f"{study}:{variant}", trials_of(study, store))
        return seeds_of(best.name, store)
    if trials := trials_of(text.partition(":")[0], store) if ":" in text else []:
        return _of_variant(text, trials)
    if (Path(text) / "config.yaml").is_file():
        return [Run(Path(text).resolve())]
    if seeds := seeds_of(text, store):
        return seeds
    begun = [run for run in runs if run.name.startswith(text) or _mlflow_id(run).startswith(text)]
    if len(begun) == 1:
        return begun
    names = {configuration(run.name) for run in begun}
    if len(names) == 1 and all(run.name.startswith(text) for run in begun):
        return seeds_of(names.pop(), store)
    if begun:
        raise ConfigError(f"'{text}' begins several runs: {', '.join(run.name for run in begun[:8])}")
    raise config.no_such("run", text, [run.name for run in runs])


def _of_variant(text: str, trials: list[Run]) -> list[Run]:
    """Those of a study's trials that trained the variant that `text` names behind its colon; of those that failed none,
    unless all did."""
    by_variant: dict[str, list[Run]] = {}
    for trial in trials:
        if (variant := variant_of(trial)) is not None:
            by_variant.setdefault(variant, []).append(trial)
    study, _, name = text.partition(":")
    if name not in by_variant:
        raise config.no_such("variant", name, list(by_variant), f" in study '{study}'")
    return [trial for trial in by_variant[name] if trial.status != "FAILED"] or by_variant[name]


def variant_of(training: Run) -> str | None:
    """The variant that a trial of a study of variants trained; None of another run."""
    variant = None
    for event in read_events(training.events):
        if event["kind"] == "params":
            variant = event["values"].get(VARIANT, variant)
    return None if variant is None else str(variant)


def trial_run(name: str, number: int, store: Path) -> Run:
    """The run of a trial, whether it exists yet or not."""
    return Run(store / "runs" / f"{name}-{number:03d}")


def find_runs(text: str, store: Path) -> list[Run]:
    """All that `text` names: the trials of a study, or else the seeds of one configuration."""
    return trials_of(text, store) or find_seeds(text, store)


def best_of(study: str, store: Path) -> Run:
    """The best trial of a study by validation.

    Once trials have been trained again with other seeds (`STUDY-007-seed1`) to their end, those alone are candidates,
    each with the mean over its seeds: of many single values the highest is in part luck. Before that, it is the highest
    value. A trial that failed is never the best, however high it came before. Of a study of variants it is the variant
    with the highest mean over its seeds, and of these the highest.

    Raises:
        ConfigError: there is no such study.
        DataError: none of its trials has a checkpoint, but perhaps some that failed.
    """
    trials = trials_of(study, store)
    if not trials:
        known = sorted(path.name for path in (store / "studies").glob("*") if path.is_dir())
        raise config.no_such("study", study, known)
    valued = {trial: [value] for trial in trials if (value := best_value(trial)) is not None}
    values = {trial: found for trial, found in valued.items() if trial.status != "FAILED"}
    if not values:
        failed = f", but for {len(valued)} that failed" if valued else ""
        raise DataError(f"no trial of study '{study}' has a checkpoint yet{failed}")
    if variant_of(trials[0]) is not None:
        return _best_of_variants({trial: found[0] for trial, found in values.items()})
    by_name = {trial.name: found for trial, found in values.items()}
    for run in all_runs(store):
        first = by_name.get(configuration(run.name))
        if first is None or run.name in by_name or run.status != "FINISHED":
            continue
        if (value := best_value(run)) is not None:
            first.append(value)
    confirmed = {trial: found for trial, found in values.items() if len(found) > 1} or values
    return max(confirmed, key=lambda trial: sum(confirmed[trial]) / len(confirmed[trial]))


def _best_of_variants(values: dict[Run, float]) -> Run:
    """Those of several seeds alone are candidates, if there are any: a single seed may be lucky."""
    by_variant: dict[str | None, list[Run]] = {}
    for trial in values:
        by_variant.setdefault(variant_of(trial), []).append(trial)
    candidates = [seeds for seeds in by_variant.values() if len(seeds) > 1] or list(by_variant.values())
    best = max(candidates, key=lambda seeds: sum(values[trial] for trial in seeds) / len(seeds))
    return max(best, key=lambda trial: values[trial])


def best_value(run: Run) -> float | None:
    """The best validation value of a run, None before its first epoch ends."""
    path = run.folder / "best.json"
    return float(storage.read_json(path)["value"]) if path.is_file() else None


def _one_of(seeds: list[Run]) -> Run:
    """Where one is wanted: the run that has the configuration's own name, or else the best by validation, of those that
    have ended if any has."""
    ended = [run for run in seeds if run.status == "FINISHED"] or seeds
    best = max(ended, key=lambda run: -1 if (value := best_value(run)) is None else value)
    return _of_its_own_name(seeds) or best


def _of_its_own_name(seeds: list[Run]) -> Run | None:
    """The one run that is called as its configuration is; trials of one variant all are."""
    own = [run for run in seeds if run.name == configuration(run.name)]
    return own[0] if len(own) == 1 else None


def _mlflow_id(run: Run) -> str:
    path = run.folder / "delivered.json"
    return str(storage.read_json(path)["run_id"]) if path.is_file() else ""
