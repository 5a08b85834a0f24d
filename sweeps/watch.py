"""What the driver of a sweep does as its trials go on: show them, deliver their metrics, close their records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
from ray.tune import Callback

from setwise.pipelines import records, worker_group
from setwise.pipelines.references import trial_run
from setwise.platform.errors import StorageError
from setwise.platform.run import Run
from setwise.platform.tracking import Courier
from setwise.sweeps.limits import Limits, Stopped
from setwise.sweeps.report import TrialTable
from setwise.sweeps.study import (
    FAILURE,
    METRIC,
    NUMBER,
    RETURNED_VALUES,
    STUDY_FAILURE,
    TIME,
    patiently,
    recorded,
)


class Watch(Callback):  # type: ignore[misc]  # Ray leaves its classes untyped
    """Ray Tune calls it in the driver's process, in order of events."""

    def __init__(
        self, table: TrialTable, courier: Courier, study: str, store: Path, limits: Limits, record: optuna.Study
    ) -> None:
        self._record = record
        self._table = table
        self._courier = courier
        self._study = study
        self._store = store
        self._limits = limits
        self.failures: dict[int, str] = {}
        """Why trials of this start failed, by number."""
        self._running: list[Any] = []

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._running = [trial for trial in trials if trial.status == "RUNNING"]
        try:
            self._limits.check(running=len(self._running))
        except Stopped:
            self.stop_trainings()
            raise

    def stop_trainings(self) -> None:
        """Let the trials that are running write a checkpoint after their next step."""
        worker_group.stop([self._run(trial) for trial in self._running])

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show(trial, "running", 0, None)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if STUDY_FAILURE in result:
            raise StorageError(result[STUDY_FAILURE])
        if FAILURE in result:
            return
        self._courier.add(self._run(trial))
        self._show(trial, "running", int(result[TIME]), float(result[METRIC]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if (failure := trial.last_result.get(FAILURE)) is not None:
            self._failed(trial, str(failure))
            return
        epoch = int(trial.last_result.get(TIME, 0))
        pruned = epoch < self._table.epochs
        run = self._run(trial)
        records.end(run, "PRUNED" if pruned else "FINISHED")
        self._courier.add(run, ended=True)
        self._show(trial, "pruned" if pruned else "complete", epoch, None)
        self._limits.ended(None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if patiently(lambda: recorded(self._record, trial.config[NUMBER])).state.is_finished():
            self._failed(trial, last_words(trial))
        else:  # the searcher, which is asked first, hands it out again
            self._show(trial, "died", 0, None)

    def _failed(self, trial: Any, reason: str) -> None:
        run = self._run(trial)
        self.failures[trial.config[NUMBER]] = reason
        if (run.folder / "run.json").is_file() and run.experiment == self._study:  # else the name was another's
            records.end(run, "FAILED", reason)
            self._courier.add(run, ended=True)
        self._show(trial, "failed", 0, None)
        self._limits.ended(reason)

    def _run(self, trial: Any) -> Run:
        return trial_run(self._study, trial.config[NUMBER], self._store)

    def _show(self, trial: Any, state: str, epoch: int, value: float | None) -> None:
        self._table.update(trial.config[NUMBER], trial.config[RETURNED_VALUES], state, epoch, value)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks for a restore that is never made here


def last_words(trial: Any) -> str:
    """The last line of what a trial's process died of."""
    lines = [line for line in str(trial.get_error() or "its process died").splitlines() if line.strip()]
    return lines[-1] if lines else "unknown"
