"""The Optuna study as the truth of a sweep, and the searcher that lets Ray Tune work it off.

Whatever was running when a sweep was killed is still RUNNING in the study. The next start hands out those very trials
again, with their numbers and values, before it asks for new ones; their runs go on from their checkpoints. So every
trial number is one row in Optuna, one run folder and one MLflow run, whatever happened in between.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, Trial, TrialState
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from setwise.platform import seeding
from setwise.platform.errors import ConfigError, UnreachableError
from setwise.sweeps.objectives import directions
from setwise.sweeps.space import Pruning, Study

METRIC = "rsum"
"""In Tune's results: the validation RSUM of an epoch. The other objectives have their own names."""
BEST = "val/rsum"
"""In Tune's results: the best RSUM up to an epoch."""
TIME = "epoch"
FAILURE = "failure"
"""In the last result of a trial that failed: why."""
STUDY_FAILURE = "study_failure"
"""The same where every other trial would fail too: the study stops, and the trial goes on at its next start."""
NUMBER = "trial"
RETURNED_VALUES = "values"
REASON = "reason"
DEATHS = "deaths"
MAX_DEATHS = 3
"""How often a trial's process may die and be replaced; a training that fails by itself is not tried again."""
URL = "SETWISE_OPTUNA_URL"
PATIENCE_S = 60
T = TypeVar("T")


def open_study(
    folder: Path, name: str, study: Study, identity: str, first: Sequence[tuple[Mapping[str, Any], str]]
) -> optuna.Study:
    """The study `name`: in `folder`/study.db, or in the database that the environment names in SETWISE_OPTUNA_URL.

    Args:
        identity: stands for the study and its store; a database of many stores may hold another one of this name.
        first: what a new study tries first, and where that comes from; (the recipe's own values, "recipe") is trial 0.

    Raises:
        ConfigError: the database holds another study of this name.
        UnreachableError: the database cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        made = optuna.create_study(
            storage=storage(folder),
            study_name=name,
            directions=directions(study.objectives),
            load_if_exists=True,
            sampler=make_sampler(study, 0),
        )
    except Exception as error:
        raise UnreachableError(f"study '{name}' cannot be opened in {where(folder)}: {error}") from error
    if os.environ.get(URL) and made.user_attrs.get("setwise.identity", identity) != identity:
        raise ConfigError(f"{where(folder)} holds another study called '{name}'. Give this one a name: --name NAME")
    if "setwise.identity" not in made.user_attrs:
        made.set_user_attr("setwise.identity", identity)
    begun = made.get_trials(deepcopy=False)
    if all(trial.state == TrialState.WAITING for trial in begun):  # it is new, or was killed while they were written
        there = [trial.system_attrs.get("fixed_params") for trial in begun]
        for values, source in first:
            if dict(values) not in there:
                made.enqueue_trial(dict(values), user_attrs={"source": source})
    return made


def where(folder: Path) -> str:
    """The database of a study as it may be shown: without its password."""
    from sqlalchemy.engine import make_url

    return make_url(os.environ.get(URL) or f"sqlite:///{folder / 'study.db'}").render_as_string(hide_password=True)


def storage(folder: Path) -> optuna.storages.RDBStorage:
    """The database of a study. A lease keeps other sweeps away, so no heartbeat is needed to tell the dead."""
    url = os.environ.get(URL)
    if url:
        return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    return optuna.storages.RDBStorage(
        f"sqlite:///{folder / 'study.db'}", engine_kwargs={"connect_args": {"timeout": PATIENCE_S}}
    )


def load(folder: Path, name: str) -> optuna.Study:
    """The study as it is, to be read. Raises ConfigError if there is none, UnreachableError as open_study does."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if not os.environ.get(URL) and not (folder / "study.db").is_file():
        raise ConfigError(f"study '{name}' has not begun: {folder} holds no study.db")
    try:
        return optuna.load_study(storage=storage(folder), study_name=name)
    except KeyError as error:
        raise ConfigError(f"{where(folder)} holds no study called '{name}'") from error
    except Exception as error:
        raise UnreachableError(f"study '{name}' cannot be opened in {where(folder)}: {error}") from error


def make_sampler(study: Study, begun: int) -> optuna.samplers.BaseSampler:
    """TPE over all settings together; where some vary only under a condition, over those that vary together.

    After a restart, with so many trials `begun`, it has a seed of its own: the first would draw the same values again.
    """
    seed = study.seed if begun == 0 else seeding.derive(study.seed, "sampler", begun) % 2**31
    if study.sampler != "tpe" or study.population is not None:  # all of a grid is enqueued
        return optuna.samplers.RandomSampler(seed=seed)
    conditional = any(domain.when is not None for domain in study.space.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of groups, and of several at a time
        return optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=study.startup_trials,
            multivariate=True,
            group=conditional,
            constant_liar=True,
        )


def draw(trial: Trial, study: Study, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a trial: those it has, and what is missing drawn; where a condition does not hold, none."""
    values: dict[str, Any] = {}
    for name, domain in study.space.items():
        if not study.varies(name, {**defaults, **values}):
            continue
        if domain.choice is not None:
            values[name] = trial.suggest_categorical(name, domain.choice)
        elif domain.int is not None:
            values[name] = trial.suggest_int(name, *domain.int)
        else:
            low, high = domain.uniform or domain.loguniform or (0.0, 1.0)
            values[name] = trial.suggest_float(name, low, high, log=domain.loguniform is not None)
    return values


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that have ended, in the order of their numbers."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]


def recorded(study: optuna.Study, number: int) -> FrozenTrial:
    """One trial as the study has it. It is asked for alone: a study may have very many."""
    database = study._storage
    return database.get_trial(database.get_trial_id_from_study_id_trial_number(study._study_id, number))


def left_running(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that were running when the sweep was last interrupted."""
    return list(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))


def value_of(trial: FrozenTrial) -> float | None:
    """The best RSUM of a trial so far."""
    if trial.intermediate_values and trial.state != TrialState.COMPLETE:  # else its value, which may be from a copy
        return float(max(trial.intermediate_values.values()))
    return float(trial.values[0]) if trial.values else None


def patiently(call: Callable[[], T]) -> T:
    """The result of `call`, tried again for a minute while the database is away."""
    deadline, pause = time.monotonic() + PATIENCE_S, 0.5
    while True:
        try:
            return call()
        except StorageInternalError:
            if time.monotonic() > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 10)


def may_die_again(study: optuna.Study, number: int) -> bool:
    """Count the death of a running trial's process; whether it is handed out again."""
    frozen = recorded(study, number)
    deaths = frozen.user_attrs.get(DEATHS, 0) + 1
    patiently(lambda: study._storage.set_trial_user_attr(frozen._trial_id, DEATHS, deaths))
    return bool(deaths <= MAX_DEATHS)


def fail(study: optuna.Study, number: int, reason: str) -> None:
    """End a running trial as failed."""
    frozen = recorded(study, number)
    patiently(lambda: study._storage.set_trial_user_attr(frozen._trial_id, REASON, reason))
    patiently(lambda: study.tell(number, state=TrialState.FAIL, skip_if_finished=True))


class StudySearch(OptunaSearch):  # type: ignore[misc]  # Ray leaves its classes untyped
    """OptunaSearch that first hands out the trials an interrupted sweep left running, draws settings under their
    conditions, and tells pruned from complete and failed.

    Args:
        study: the study to work off; no other sweep may use it (the caller holds its lease).
        defaults: the recipe's own settings, by dotted name, which conditions may ask for.
        last_epoch: a trial that ended before it, without an error, was pruned.
    """

    def __init__(self, study: optuna.Study, spec: Study, defaults: Mapping[str, Any], last_epoch: int) -> None:
        self._left_running = [trial.number for trial in left_running(study)]
        self._spec = spec
        self._defaults = dict(defaults)
        self._last_epoch = last_epoch
        several = len(spec.objectives) > 1
        begun = sum(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False))
        modes = [direction[:3] for direction in directions(spec.objectives)]
        super().__init__(
            space=self._values,
            metric=list(spec.objectives) if several else METRIC,
            mode=modes if several else "max",
            sampler=make_sampler(spec, begun),
            storage=study._storage,
            study_name=study.study_name,
        )

    def _values(self, trial: Trial) -> dict[str, Any]:
        return draw(trial, self._spec, self._defaults)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if trial_id not in self._ot_trials:
            if self._left_running:
                number = self._left_running.pop(0)
                frozen = self._frozen(number)
                self._ot_trials[trial_id] = patiently(lambda: Trial(self._ot_study, frozen._trial_id))
            else:
                self._ot_trials[trial_id] = patiently(self._ot_study.ask)
        trial = self._ot_trials[trial_id]
        return {NUMBER: trial.number, RETURNED_VALUES: patiently(lambda: self._values(trial))}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._note(self._ot_trials[trial_id], result)

    def _note(self, trial: Trial, result: dict[str, Any]) -> None:
        if len(self._spec.objectives) > 1 or FAILURE in result or STUDY_FAILURE in result:
            return  # Optuna keeps values on the way of one objective alone
        step = int(result[TIME])
        if step not in self._frozen(trial.number).intermediate_values:
            patiently(lambda: trial.report(float(result[METRIC]), step))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self._ot_trials.pop(trial_id)  # else the values of all trials would be kept once more
        if result and METRIC in result:
            self._note(trial, result)  # Tune hands the last result of a stopped trial to this call alone
        epoch = int(result[TIME]) if result and TIME in result else 0
        failure = (result or {}).get(FAILURE)
        if failure is None and error:
            if self._hand_out_again(trial):
                return
            failure = f"its process died {MAX_DEATHS + 1} times"
        if failure is not None or epoch == 0:
            patiently(lambda: trial.set_user_attr(REASON, failure or "it ended before its first epoch"))
            self._tell(trial, None, TrialState.FAIL)
        elif epoch < self._last_epoch:
            self._tell(trial, None, TrialState.PRUNED)
        elif result is not None:
            self._tell(trial, [float(result[name]) for name in self._spec.objectives], None)

    def _hand_out_again(self, trial: Trial) -> bool:
        """Whether a trial whose process died stays running, to be handed out anew: Tune replaces most processes
        itself, but gives a trial up whose process dies while it is being set up."""
        if not may_die_again(self._ot_study, trial.number):
            return False
        if self._spec.population is None:  # there the next start does it: a meeting counts its trials
            self._left_running.append(trial.number)
        return True

    def _frozen(self, number: int) -> FrozenTrial:
        return patiently(lambda: recorded(self._ot_study, number))

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: a start goes on from the study, and Tune would pickle all of it every few seconds."""

    def _tell(self, trial: Trial, values: list[float] | None, state: TrialState | None) -> None:
        patiently(lambda: self._ot_study.tell(trial, values, state=state, skip_if_finished=True))


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
