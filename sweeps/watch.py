"""What the driver of a sweep does as its trials go on: show them, deliver their metrics, close their records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.tune import Callback

from setwise.pipelines import records
from setwise.pipelines.references import trial_run
from setwise.platform.run import Run
from setwise.platform.tracking import Courier
from setwise.sweeps.report import TrialTable


class Watch(Callback):  # type: ignore[misc]  # Ray leaves its classes untyped
    """Ray Tune calls it in the driver's process, in order of events."""

    def __init__(self, table: TrialTable, courier: Courier, study: str, store: Path) -> None:
        self._table = table
        self._courier = courier
        self._study = study
        self._store = store
        self.failures: dict[int, str] = {}
        """Why trials of this start failed, by number."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show(trial, "running", 0, None)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self._courier.add(self._run(trial))
        self._show(trial, "running", int(result["epoch"]), float(result["rsum"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        epoch = int(trial.last_result.get("epoch", 0))
        pruned = epoch < self._table.epochs
        records.end(self._run(trial), "PRUNED" if pruned else "FINISHED")
        self._show(trial, "pruned" if pruned else "complete", epoch, None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        run, reason = self._run(trial), _reason(trial)
        self.failures[trial.config["trial"]] = reason
        if (run.folder / "run.json").is_file() and run.experiment == self._study:  # else the name was another's
            records.end(run, "FAILED", reason)
            self._courier.add(run)
        self._show(trial, "failed", 0, None)

    def _run(self, trial: Any) -> Run:
        return trial_run(self._study, trial.config["trial"], self._store)

    def _show(self, trial: Any, state: str, epoch: int, value: float | None) -> None:
        self._table.update(trial.config["trial"], trial.config["values"], state, epoch, value)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks for a restore that is never made here


def _reason(trial: Any) -> str:
    """The last line of what a trial died of."""
    lines = [line for line in str(trial.get_error() or "the process died").splitlines() if line.strip()]
    return lines[-1] if lines else "unknown"
