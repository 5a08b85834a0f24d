"""The best trials of a study trained again with other seeds, before anything is called best.

They are runs beside the trials (`STUDY-007-seed1`), children of the study's run, and no part of the Optuna study: what
it learns from is one value for each of its settings. Which are done is read from their own records, so the same command
goes on where it was killed.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import OutOfMemoryError
from ray.tune import Callback

from setwise.pipelines import prepare, pretrained, records, worker_group
from setwise.pipelines.recipe import Recipe
from setwise.platform import cluster, config, run, storage
from setwise.platform.errors import ConfigError, DataError, SetwiseError, StorageError
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run
from setwise.platform.tracking import Courier, Tracker
from setwise.sweeps import analysis, candidates
from setwise.sweeps import run as sweeps
from setwise.sweeps import study as studies
from setwise.sweeps.analysis import Row
from setwise.sweeps.limits import Stopped, forget_stop
from setwise.sweeps.space import Study, with_values
from setwise.sweeps.study import FAILURE, METRIC, NUMBER, RETURNED_VALUES, STUDY_FAILURE, TIME
from setwise.sweeps.trial import ended_for_memory, settings_of, train_trial
from setwise.sweeps.watch import last_words

Say = Callable[[str], None]
CONFIRMS = "setwise.confirms"
AGAIN = "again"
"""In Tune's configuration: what train_trial is given."""
SEED = "train.seed"


@dataclass(frozen=True)
class Again:
    """A trial to be trained with another seed."""

    row: Row
    seed: int
    training: Run

    def to_config(self) -> dict[str, Any]:
        return {NUMBER: self.row.number, RETURNED_VALUES: self.row.settings, "seed": self.seed}


def confirm(name: str, store: Path, tracker: Tracker, say: Say, best: int, seeds: int) -> dict[str, str]:
    """Train the `best` trials of study `name` until each has so many `seeds`, its own among them.

    Returns:
        Why trainings failed, by run; one that failed is not tried again.

    Raises:
        ConfigError: there is no such study, or no trial of it can be trained again.
        DataError: the data is not that on which the study was trained.
        LeaseHeldError: another process is at work on the study.
    """
    spec, base, data = analysis.recorded(name, store)
    if spec.population is not None:
        raise ConfigError(
            f"study '{name}' changed settings in the middle of its trainings, so that there is none to repeat. "
            "Train a recipe with the settings it ended with: setwise train RECIPE a.b=v... --seeds 3"
        )
    if spec.variants:
        seeds = spec.seeds + 2
        raise ConfigError(
            f"study '{name}' trains each of its variants with several seeds already. For more of them, run it under "
            "another name with more, and with as many trials: "
            f"setwise sweep STUDY seeds={seeds} --trials {seeds * len(spec.variants)} --name NAME"
        )
    prepared = prepare.open_prepared(base.data.name, store)
    if prepared.fingerprint != data:
        raise DataError(
            f"study '{name}' was trained on data {data}, and what is prepared now is {prepared.fingerprint}. "
            "Its values and new ones could not be compared; prepare the same data again, or sweep again."
        )
    pretrained.locate(base, store / "weights")
    folder = store / "studies" / name
    with storage.lease(folder / "lease", f"study '{name}'"):
        forget_stop(folder)
        found = analysis.of(studies.load(folder, name), spec, name, store)
        chosen = to_confirm(found, best)
        trainings = [with_seed(row, number, base, name, store) for number in range(1, seeds) for row in chosen]
        left = [one for one in trainings if not records.ended(one.training)]
        count = "1 training" if len(trainings) == 1 else f"{len(trainings)} trainings"
        say(
            f"{', '.join(row.name for row in chosen)} with {seeds} seeds each: {count} of "
            f"{base.train.epochs} epochs, {len(trainings) - len(left)} of them done already"
        )
        if left:
            with cluster.connect(), worker_group.interruptible(), Courier(tracker) as courier:
                for one in trainings:
                    courier.add(one.training)
                try:
                    deaths: Counter[str] = Counter()
                    while left := [one for one in left if not records.ended(one.training)]:
                        progress = Progress(left, base.train.epochs, courier, folder, say)
                        _train(left, spec, base, name, store, progress)
                        deaths.update(progress.died)
                        for one in left:  # a process that dies is replaced
                            if deaths[one.training.name] > studies.MAX_DEATHS:
                                records.end(one.training, "FAILED", "its process died again and again")
                except Stopped as reason:
                    say(f"stopped: {reason}. Nothing is lost, and the same command goes on")
            shutil.rmtree(folder / "tune", ignore_errors=True)
        _record(name, store)
    failed = (one.training for one in trainings if records.reason(one.training) != "unknown")
    return {training.name: records.reason(training) for training in failed}


def to_confirm(found: analysis.Analysis, best: int) -> list[Row]:
    """The `best` trials that trained to their end; of several objectives, those on the Pareto front.

    A pruned trial is left out: with other seeds it would train longer than it has.
    """
    complete = [row for row in found.rows if row.state == "complete" and (not found.front or row.number in found.front)]
    if not complete:
        raise ConfigError(f"no trial of study '{found.name}' is complete, so there is none to train again")
    return sorted(complete, key=lambda row: -(row.value or 0.0))[:best]


def with_seed(row: Row, number: int, base: Recipe, name: str, store: Path) -> Again:
    """The trial in `row` with the `number`-th seed after its own; its run is made, and says what it confirms."""
    seed = row.settings.get(SEED, base.train.seed) + number
    recipe = with_values(base, {**row.settings, SEED: seed})
    parent = analysis.parent(name, store)
    training = run.create(store / "runs", f"{row.name}-seed{seed}", config.to_yaml(recipe), name, parent)
    events = run.read_events(training.events)
    if not any(CONFIRMS in event["values"] for event in events if event["kind"] == "tags"):
        Outbox(training.events).append({"kind": "tags", "values": {CONFIRMS: row.name}})
    return Again(row, seed, training)


def _train(left: list[Again], spec: Study, base: Recipe, name: str, store: Path, progress: Progress) -> None:
    """Train what is left, as many at once as a sweep would. Raises Stopped where somebody asked for it."""
    share = sweeps.share_of(base.train, spec.trials_per_gpu)
    objectives = ("val/rsum",)  # the others are as they were: no seed changes them
    settings = settings_of(name, base, store, objectives, population=False)
    tuner = sweeps.make_tuner(
        tune.with_parameters(_train_again, settings=settings),
        share,
        base.train,
        store / "studies" / name,
        progress,
        param_space={AGAIN: tune.grid_search([one.to_config() for one in left])},
        max_concurrent_trials=share.at_once,
    )
    try:
        tuner.fit()
    except KeyboardInterrupt:
        progress.stop_trainings()
        raise
    except RuntimeError as error:
        if not isinstance(error.__cause__, OutOfMemoryError):  # Ray ended one of the processes; the others go on
            raise
        ended = ended_for_memory(error.__cause__, [one.training for one in left if not records.ended(one.training)])
        if not ended:
            raise SetwiseError("the machine runs low on memory. Run fewer trainings at a time") from error
        progress.died |= {training.name for training in ended}
        progress.say(f"the machine ran low on memory: {str(error.__cause__).splitlines()[0]}")


def _train_again(config: dict[str, Any], settings: dict[str, Any]) -> None:
    train_trial(config[AGAIN], settings)


class Progress(Callback):  # type: ignore[misc]  # Ray leaves its classes untyped
    """What the driver does as trainings go on: tell of them, deliver their metrics, close their records."""

    def __init__(self, left: list[Again], epochs: int, courier: Courier, folder: Path, say: Say) -> None:
        self._runs = {(one.row.number, one.seed): one.training for one in left}
        self._epochs = epochs
        self._courier = courier
        self._stop = folder / "stop"
        self.say = say
        self._running: list[Any] = []
        self.died: set[str] = set()
        """Runs whose process died."""

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._running = [trial for trial in trials if trial.status == "RUNNING"]
        if self._stop.exists():
            self.stop_trainings()
            raise Stopped("setwise sweep stop was asked for")

    def stop_trainings(self) -> None:
        """Let those that are running write a checkpoint after their next step."""
        worker_group.stop([self._run(trial) for trial in self._running])

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if STUDY_FAILURE in result:
            raise StorageError(result[STUDY_FAILURE])
        if FAILURE not in result:
            said = f"{self._run(trial).name}  epoch {result[TIME]}/{self._epochs}  val RSUM {result[METRIC]:.1f}"
            self.say(said)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, trial.last_result.get(FAILURE))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.died.add(self._run(trial).name)
        self.say(f"{self._run(trial).name}: its process died ({last_words(trial)}); it goes on")

    def _end(self, trial: Any, failure: str | None) -> None:
        training = self._run(trial)
        records.end(training, "FINISHED" if failure is None else "FAILED", failure)
        if failure is not None:
            self.say(f"{training.name} failed: {failure}")

    def _run(self, trial: Any) -> Run:
        return self._runs[trial.config[AGAIN][NUMBER], trial.config[AGAIN]["seed"]]

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks for a restore that is never made here


def _record(name: str, store: Path) -> None:
    """Let the study's run say which trial is best now; once for each result."""
    confirmed = candidates.read(name, store)
    if confirmed is None:
        return
    parent = analysis.parent(name, store)
    first = confirmed.candidates[0]
    tags = {"setwise.best_run": first.trial, "setwise.confirmed": f"{first.trial}: {first.in_words()}"}
    known: dict[str, str] = {}
    for event in run.read_events(parent.events):
        known |= event["values"] if event["kind"] == "tags" else {}
    if any(known.get(key) != value for key, value in tags.items()):
        Outbox(parent.events).append({"kind": "tags", "values": tags})
