"""Running a study: Ray Tune works off the Optuna study, trial by trial, and may be killed at any moment.

Each start makes a fresh Tuner; what is done, running or still to do is read from the study (study.py). A trial with one
worker trains in its own process, which is reused for the next trial; one with several starts Ray Train inside.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setwise.pipelines import hardware, lineage, prepare, pretrained, records, references, worker_group
from setwise.pipelines.recipe import Recipe, TrainConfig
from setwise.platform import cluster, config, run, storage
from setwise.platform.errors import SetwiseError
from setwise.platform.run import Run
from setwise.platform.tracking import Courier, Tracker
from setwise.sweeps import analysis, deck, earlier, report, study_run
from setwise.sweeps.limits import USED_UP, Limits, Stopped, forget_stop
from setwise.sweeps.report import Outcome, TrialTable
from setwise.sweeps.space import Study, default_values
from setwise.sweeps.trial import ended_for_memory, settings_of, train_trial

if TYPE_CHECKING:
    import optuna

Say = Callable[[str], None]


def run_study(
    spec: Study, base: Recipe, name: str, store: Path, tracker: Tracker, say: Say, warm_start: Sequence[str] = ()
) -> Outcome:
    """Run `spec` until it has its number of trials; what an earlier start left is taken up where it stopped.

    Args:
        warm_start: studies, whose best trials' settings, and runs, whose settings a new study tries after trial 0.

    Raises:
        ConfigError: a study of this name exists and is another one, or there is nothing to start from.
        DataError: the data is not prepared, or weights to start from are not there.
        LeaseHeldError: another process runs this study.
        UnreachableError: the study's database, or the cluster, does not answer.
    """
    from setwise.sweeps import population
    from setwise.sweeps import study as studies

    base = population.fitted(spec, base)
    folder = store / "studies" / run.check_name(name)
    run.check_name(f"{name}-000-seed1")  # as its runs will be called
    prepared = prepare.open_prepared(base.data.name, store)
    for recipe in spec.each_recipe(base):
        pretrained.locate(recipe, store / "weights")
    default = default_values(spec, base)
    grid = [(values, "grid") for values in spec.grid()] if spec.sampler == "grid" else []
    first = earlier.distinct([(default, "recipe"), *earlier.settings(warm_start, spec, base, store, say), *grid])
    with storage.lease(folder / "lease", f"study '{name}'"):
        forget_stop(folder)
        parent = study_run.begin(spec, base, name, store, prepared)
        if spec.variants:
            deck.keep(spec, name, store)  # now, so that the page can be written of a study that never ends
        study = studies.open_study(folder, name, spec, study_run.identity_of(parent), first)
        _reconcile(study, name, store)
        done = studies.finished(study)
        to_do = len(done) < spec.trials or bool(studies.left_running(study))
        if to_do:
            say("Ray starts, which takes some seconds")
        with (
            cluster.connect() if to_do else contextlib.nullcontext(),
            worker_group.interruptible(),
            Courier(tracker) as courier,
        ):
            courier.add(parent)
            for trial in done:
                courier.add(references.trial_run(name, trial.number, store), ended=True)
            if interrupted := len(studies.left_running(study)):
                say(f"study '{name}' goes on: {len(done)} trials are done, {interrupted} were interrupted and resume")
            elif done:
                say(f"study '{name}': {len(done)} of {spec.trials} trials are done already")
            failures: dict[int, str] = {}
            stopped = None
            while stopped is None and (len(done) < spec.trials or studies.left_running(study)):
                stopped = _tune(spec, base, name, store, study, courier, failures)
                done = studies.finished(study)
            _reconcile(study, name, store)
            trials = [references.trial_run(name, trial.number, store) for trial in done]
            for before in {one["run"] for trial in trials for one in lineage.parents(trial)}:
                courier.add(Run(store / "runs" / before), ended=True)  # a pre-training, which is nobody's trial
            outcome = report.outcome_of(study, spec, name, store, failures, stopped)
            study_run.end(parent, spec, outcome)
            try:
                analysis.write(study, spec, name, store)
                if spec.variants and (stopped is None or stopped.endswith(USED_UP)):
                    say(f"the deck of the study: {deck.write(study, spec, name, store, say)}")
                elif spec.variants:  # measuring takes its time, and somebody wants it to stop, or it only fails
                    say(f"the deck of what there is: setwise sweep analyze {name}")
            except Exception as error:  # a page that cannot be written takes no result away
                say(f"the page of the study was not written: {error}")
        shutil.rmtree(folder / "tune", ignore_errors=True)
    return outcome


def _tune(
    spec: Study, base: Recipe, name: str, store: Path, study: optuna.Study, courier: Courier, failures: dict[int, str]
) -> str | None:
    """Work off what the study lacks; `failures` gets why trials failed. Returns why it stopped before that, if so."""
    from ray import tune
    from ray.exceptions import OutOfMemoryError

    from setwise.sweeps import population
    from setwise.sweeps import study as studies
    from setwise.sweeps.watch import Watch

    done = studies.finished(study)
    share = share_of(base.train, spec.trials_per_gpu)
    table = TrialTable(name, spec.trials, base.train.epochs)
    for trial in done:
        state = {"COMPLETE": "complete", "PRUNED": "pruned"}.get(trial.state.name, "failed")
        epochs = len(trial.intermediate_values) or base.train.epochs
        table.update(trial.number, trial.params, state, epochs, studies.value_of(trial))
    folder = store / "studies" / name
    watch = Watch(table, courier, name, store, Limits(folder, spec, share.gpus), study)
    settings = settings_of(name, base, store, spec.objectives, spec.population is not None, spec.variants)
    tuner = make_tuner(
        tune.with_parameters(train_trial, settings=settings),
        share,
        base.train,
        folder,
        watch,
        search_alg=studies.StudySearch(study, spec, config.flatten(base), base.train.epochs),
        scheduler=population.make_scheduler(spec, study, folder, base.train.epochs)
        or studies.make_scheduler(spec.pruning, study, base.train.epochs),
        num_samples=max(spec.trials - len(done), len(studies.left_running(study))),
        # Else the searcher counts deaths, over all starts; but a meeting of a population waits for its trials.
        replaced=studies.MAX_DEATHS if spec.population is not None else 0,
        # A population is there as a whole, and its trials take turns.
        max_concurrent_trials=spec.trials if spec.population is not None else share.at_once,
    )
    stopped = None
    with table:
        try:
            tuner.fit()
        except Stopped as reason:
            stopped = str(reason)
        except RuntimeError as error:
            # Tune ends where Ray's memory monitor ends one of its processes; the study goes on with the next Tuner.
            if not isinstance(error.__cause__, OutOfMemoryError):
                raise
            failures |= _killed_for_memory(error.__cause__, name, store, study)
        except KeyboardInterrupt:
            watch.stop_trainings()
            raise
    failures |= watch.failures
    return stopped


def _killed_for_memory(error: Exception, name: str, store: Path, study: optuna.Study) -> dict[int, str]:
    """Count the death of the trials whose processes Ray ended since the machine ran low on memory. It need not have
    been their fault, so that only those that died too often fail; why, by number.

    Raises:
        SetwiseError: it was none of the trials.
    """
    from setwise.sweeps import study as studies

    trials = {references.trial_run(name, trial.number, store): trial.number for trial in studies.left_running(study)}
    victims = ended_for_memory(error, list(trials))
    if not victims:
        raise SetwiseError(f"the machine runs low on memory: {str(error).splitlines()[0]}. Run fewer trials at a time")
    failed: dict[int, str] = {}
    for training in victims:
        number = trials[training]
        if not studies.may_die_again(study, number):
            failed[number] = f"out of memory: the machine ran low while it trained, {studies.MAX_DEATHS + 1} times"
            studies.fail(study, number, failed[number])
            records.end(training, "FAILED", failed[number])
    return failed


def make_tuner(
    trainable: Any,
    share: Share,
    train: TrainConfig,
    folder: Path,
    callback: Any,
    param_space: dict[str, Any] | None = None,
    replaced: int = 0,
    **tuned: Any,
) -> Any:
    """A Tuner over trainings for the study in `folder`; it is made anew at each start, and its files are never read.

    Args:
        replaced: how often Tune itself replaces a process that dies.
    """
    from ray import tune

    resources = tune.PlacementGroupFactory([share.resources], bundle_label_selector=[share.labels])
    return tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space=param_space,
        tune_config=tune.TuneConfig(
            reuse_actors=train.workers == 1, trial_dirname_creator=lambda trial: trial.trial_id, **tuned
        ),
        run_config=tune.RunConfig(
            name=f"start-{os.getpid()}",
            storage_path=str(folder / "tune"),
            callbacks=[callback],
            failure_config=tune.FailureConfig(max_failures=replaced),
            verbose=0,
        ),
    )


@dataclass(frozen=True)
class Share:
    """What the process of a trial holds of the cluster, and on which machines."""

    resources: dict[str, float]
    at_once: int | None
    """Trials. None where the cluster grows and nobody knows how far: one more than there is room for makes it grow."""
    gpus: float
    """That one trial uses."""
    labels: dict[str, str]
    """Of machines that it may be on, as Ray selects by them."""


def share_of(train: TrainConfig, trials_per_gpu: int) -> Share:
    """As many trials at once as the cluster has room for, on machines of the kinds that `train.accelerators` names.

    Raises:
        ConfigError, UnreachableError: there is no room for one.
    """
    found = cluster.capacity(train.accelerators)
    labels = cluster.selector(train.accelerators)
    on_gpus = hardware.on_gpus(train, found)
    if train.workers > 1:
        # The trial itself only waits for its workers; were it to hold a CPU, trials could take all and wait for ever.
        at_once = max(1, (found.gpus if on_gpus else found.cpus) // train.workers)
        return Share({"CPU": 0.01}, at_once, train.workers if on_gpus else 0, labels)
    if on_gpus:
        part = 1 / trials_per_gpu
        return Share({"CPU": 1, "GPU": part}, None if found.grows else found.gpus * trials_per_gpu, part, labels)
    return Share({"CPU": train.threads}, None if found.grows else max(1, found.cpus // train.threads), 0, labels)


def _reconcile(study: optuna.Study, name: str, store: Path) -> None:
    """Close the record of each trial that ended without it: the driver died between the two."""
    from setwise.sweeps import study as studies

    statuses = {"COMPLETE": "FINISHED", "PRUNED": "PRUNED", "FAIL": "FAILED"}
    for trial in studies.finished(study):
        training = references.trial_run(name, trial.number, store)
        if (training.folder / "run.json").is_file() and training.experiment == name:
            records.end(training, statuses[trial.state.name], trial.user_attrs.get(studies.REASON))
