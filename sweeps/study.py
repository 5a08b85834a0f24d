"""The Optuna study as the truth of a sweep, and the searcher that lets Ray Tune work it off.

Whatever was running when a sweep was killed is still RUNNING in the study. The next start hands out those very trials
again, with their numbers and values, before it asks for new ones; their runs go on from their checkpoints. So every
trial number is one row in Optuna, one run folder and one MLflow run, whatever happened in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from setwise.sweeps.space import Pruning, Study

METRIC = "rsum"
TIME = "epoch"
NUMBER = "trial"
RETURNED_VALUES = "values"
REASON = "reason"


def open_study(path: Path, name: str, study: Study, defaults: Mapping[str, Any]) -> optuna.Study:
    """The study in the sqlite file `path`; a new one gets `defaults` as its trial 0."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}}, heartbeat_interval=None
    )
    made = optuna.create_study(
        storage=storage, study_name=name, direction="maximize", load_if_exists=True, sampler=make_sampler(study)
    )
    if not made.get_trials(deepcopy=False):
        made.enqueue_trial(dict(defaults))
    return made


def make_sampler(study: Study) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(
        seed=study.seed, n_startup_trials=study.startup_trials, multivariate=True, constant_liar=True
    )


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that have ended, in the order of their numbers."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]


def left_running(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that were running when the sweep was last interrupted."""
    return list(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))


class StudySearch(OptunaSearch):  # type: ignore[misc]  # Ray leaves its classes untyped
    """OptunaSearch that first hands out the trials an interrupted sweep left running, and tells pruned from complete.

    Args:
        study: the study to work off; no other sweep may use it (the caller holds its lease).
        last_epoch: a trial that ended before it, without an error, was pruned.
    """

    def __init__(self, study: optuna.Study, spec: Study, last_epoch: int) -> None:
        self._left_running = [trial.number for trial in left_running(study)]
        self._last_epoch = last_epoch
        super().__init__(
            space={name: domain.distribution() for name, domain in spec.space.items()},
            metric=METRIC,
            mode="max",
            sampler=make_sampler(spec),
            storage=study._storage,
            study_name=study.study_name,
        )

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if self._left_running and trial_id not in self._ot_trials:
            number = self._left_running.pop(0)
            frozen = self._ot_study.get_trials(deepcopy=False)[number]
            trial = Trial(self._ot_study, frozen._trial_id)
            for name, distribution in self._space.items():  # a crash may have come before all values were drawn
                trial._suggest(name, distribution)
            self._ot_trials[trial_id] = trial
        suggested: dict[str, Any] = super().suggest(trial_id)
        return {NUMBER: self._ot_trials[trial_id].number, RETURNED_VALUES: suggested}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        trial = self._ot_trials[trial_id]
        step = int(result[TIME])
        if step not in self._ot_study.get_trials(deepcopy=False)[trial.number].intermediate_values:
            trial.report(float(result[METRIC]), step)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self._ot_trials[trial_id]
        if result and METRIC in result:
            self.on_trial_result(trial_id, result)  # Tune hands the last result of a stopped trial to this call alone
        values = self._ot_study.get_trials(deepcopy=False)[trial.number].intermediate_values
        if error or not values:
            self._ot_study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        elif max(values) < self._last_epoch:
            self._ot_study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        else:
            self._ot_study.tell(trial, max(values.values()), skip_if_finished=True)


def make_scheduler(pruning: Pruning | None, study: optuna.Study, last_epoch: int) -> ASHAScheduler | None:
    """ASHA that remembers the rungs of the trials that ended before this start."""
    if pruning is None:
        return None
    scheduler = ASHAScheduler(
        time_attr=TIME,
        metric=METRIC,
        mode="max",
        max_t=last_epoch,
        grace_period=min(pruning.grace_epochs, last_epoch),
        reduction_factor=pruning.reduction,
    )
    for trial in finished(study):
        if trial.intermediate_values:
            earlier: Any = SimpleNamespace(trial_id=f"earlier-{trial.number}")
            scheduler.on_trial_add(None, earlier)
            for step, value in sorted(trial.intermediate_values.items()):
                scheduler.on_trial_result(None, earlier, {TIME: step, METRIC: value})
    return scheduler
