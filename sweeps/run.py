"""Running a study: Ray Tune works off the Optuna study, trial by trial, and may be killed at any moment.

Each start makes a fresh Tuner; what is done, running or still to do is read from the study (study.py). A trial with one
worker trains in its own process, which is reused for the next trial; one with several starts Ray Train inside.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setwise.pipelines import prepare, pretrained, records, references
from setwise.pipelines.recipe import Recipe
from setwise.platform import cluster, config, run, storage
from setwise.platform.errors import ConfigError
from setwise.platform.run import Run
from setwise.platform.outbox import Outbox
from setwise.platform.tracking import Courier, Tracker
from setwise.sweeps.report import Outcome, TrialTable, importance
from setwise.sweeps.space import Study, default_values, with_values

if TYPE_CHECKING:
    import optuna

Say = Callable[[str], None]


def run_study(spec: Study, base: Recipe, name: str, store: Path, tracker: Tracker, say: Say) -> Outcome:
    """Run `spec` until it has its number of trials; what an earlier start left is taken up where it stopped.

    Raises:
        ConfigError: a study of this name exists and is another one.
        DataError: the data is not prepared, or weights to start from are not there.
        LeaseHeldError: another process runs this study.
    """
    from setwise.sweeps import study as studies

    folder = store / "studies" / run.check_name(name)
    prepared = prepare.open_prepared(base.data.name, store)
    pretrained.locate(base, store / "weights")
    with storage.lease(folder / "lease", f"study '{name}'"), cluster.connect(), _interruptible():
        parent = _parent_run(spec, base, name, store, prepared)
        study = studies.open_study(folder / "study.db", name, spec, default_values(spec, base))
        _reconcile(study, name, store)
        with Courier(tracker) as courier:
            courier.add(parent)
            done = studies.finished(study)
            for trial in done:
                courier.add(references.trial_run(name, trial.number, store))
            if interrupted := len(studies.left_running(study)):
                say(f"study '{name}' goes on: {len(done)} trials are done, {interrupted} were interrupted and resume")
            elif done:
                say(f"study '{name}': {len(done)} of {spec.trials} trials are done already")
            failures = _tune(spec, base, name, store, study, courier) if len(done) < spec.trials else {}
            _reconcile(study, name, store)
            outcome = _outcome(study, name, store, failures)
            _end_parent(parent, outcome)
        shutil.rmtree(folder / "tune", ignore_errors=True)
    return outcome


def _parent_run(spec: Study, base: Recipe, name: str, store: Path, prepared: prepare.Prepared) -> Run:
    """The run of the study itself, of which the trials are children. The number of trials may grow later."""
    identity = spec.model_copy(update={"trials": 1})
    text = (
        f"# study\n{config.to_yaml(identity)}# recipe of trial 0\n{config.to_yaml(base)}# data {prepared.fingerprint}\n"
    )
    try:
        parent = run.create(store / "studies", name, text, experiment=name)
    except ConfigError as error:
        raise ConfigError(
            f"a study called '{name}' exists and is another one than this. Give this one a name: --name NAME\n({error})"
        ) from error
    if not parent.events.is_file():
        params = {
            "recipe": spec.recipe,
            "sampler": "TPE",
            "seed": str(spec.seed),
            **{f"space.{key}": str(domain.model_dump(exclude_none=True)) for key, domain in spec.space.items()},
        }
        Outbox(parent.events).append(
            {"kind": "params", "values": params},
            {"kind": "tags", "values": {"setwise.study": name, "setwise.data": prepared.fingerprint}},
            *({"kind": "artifact", "path": file, "into": ""} for file in ("config.yaml", "environment.json")),
        )
    return parent


def _tune(spec: Study, base: Recipe, name: str, store: Path, study: optuna.Study, courier: Courier) -> dict[int, str]:
    """Work off what the study lacks; why trials failed, by number."""
    from ray import tune

    from setwise.sweeps import study as studies
    from setwise.sweeps.watch import Watch

    done = studies.finished(study)
    epochs, workers = base.train.epochs, base.train.workers
    gpus, cpus = cluster.gpus(), cluster.cpus()
    if workers > 1:
        # The trial itself only waits for its workers; were it to hold a CPU, trials could take all and wait for ever.
        resources, at_once = {"cpu": 0.01}, max(1, (gpus or cpus) // workers)
    elif gpus:
        resources, at_once = {"cpu": 1, "gpu": 1 / spec.trials_per_gpu}, gpus * spec.trials_per_gpu
    else:
        resources, at_once = {"cpu": base.train.threads}, max(1, cpus // base.train.threads)

    table = TrialTable(name, spec.trials, epochs)
    for trial in done:
        best = max(trial.intermediate_values.values(), default=None)
        state = {"COMPLETE": "complete", "PRUNED": "pruned"}.get(trial.state.name, "failed")
        table.update(trial.number, trial.params, state, len(trial.intermediate_values), best)
    settings = {"recipe": base.model_dump(mode="json"), "study": name, "store": str(store)}
    watch = Watch(table, courier, name, store)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, settings=settings), resources),
        tune_config=tune.TuneConfig(
            search_alg=studies.StudySearch(study, spec, epochs),
            scheduler=studies.make_scheduler(spec.pruning, study, epochs),
            num_samples=spec.trials - len(done),
            max_concurrent_trials=at_once,
            reuse_actors=workers == 1,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=f"start-{os.getpid()}",
            storage_path=str(store / "studies" / name / "tune"),
            callbacks=[watch],
            failure_config=tune.FailureConfig(max_failures=0),
            verbose=0,
        ),
    )
    with table:
        tuner.fit()
    return watch.failures


def _trial(config: dict[str, Any], settings: dict[str, Any]) -> None:
    """One trial, in the process that Ray Tune gave it."""
    from ray import tune

    from setwise.pipelines import launch, train, trained_model
    from setwise.pipelines.workers import Worker
    from setwise.platform import config as configuration

    store = Path(settings["store"])
    recipe = with_values(Recipe.model_validate(settings["recipe"]), config["values"])
    name = references.trial_run(settings["study"], config["trial"], store).name
    parent = Run(store / "studies" / settings["study"])
    training = run.create(store / "runs", name, configuration.to_yaml(recipe), settings["study"], parent)

    def report(values: dict[str, float]) -> None:
        tune.report({"epoch": int(values["epoch"]), "rsum": values[train.METRIC], "trial": config["trial"]})

    if recipe.train.workers == 1:
        with run.writing(training):
            train.train(recipe, training, store, Worker(device=trained_model.default_device()), report)
    else:
        launch.train_with_ray(recipe, training, store, on_epoch=report)


def _reconcile(study: optuna.Study, name: str, store: Path) -> None:
    """Close the record of each trial that ended without it: the driver died between the two."""
    from setwise.sweeps import study as studies

    statuses = {"COMPLETE": "FINISHED", "PRUNED": "PRUNED", "FAIL": "FAILED"}
    for trial in studies.finished(study):
        training = references.trial_run(name, trial.number, store)
        if (training.folder / "run.json").is_file() and training.experiment == name:
            records.end(training, statuses[trial.state.name])


def _outcome(study: optuna.Study, name: str, store: Path, failures: dict[int, str]) -> Outcome:
    from setwise.sweeps import study as studies

    trials = studies.finished(study)
    states = [trial.state.name for trial in trials]
    failed = {
        trial.number: failures.get(trial.number) or records.reason(references.trial_run(name, trial.number, store))
        for trial in trials
        if trial.state.name == "FAIL"
    }
    best = references.best_of(name, store) if len(failed) < len(trials) else None
    return Outcome(name, states.count("COMPLETE"), states.count("PRUNED"), failed, best, importance(study))


def _end_parent(parent: Run, outcome: Outcome) -> None:
    """Record the study's result with its run; each time that more trials were added."""
    number = outcome.complete + outcome.pruned + len(outcome.failed)
    outbox = Outbox(parent.events)
    if outcome.best is not None:
        value = references.best_value(outcome.best) or 0.0
        outbox.metrics(number, {"best/val/rsum": value, "trials": float(number)}, series="study")
        tags = {"setwise.best_run": outcome.best.name, "setwise.importance": outcome.importance.sentence()}
        outbox.append({"kind": "tags", "values": tags}, {"kind": "status", "value": "FINISHED"})


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM reach us as KeyboardInterrupt instead of Tune, which would wait for its trials."""
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
