"""One trial, in the process that Ray Tune gave it; the process is reused for the next.

A training that fails ends with a result that says why, and is not tried again: what failed would fail again. A process
that dies is replaced, and the trial goes on from its newest checkpoint; so is one that finds another still at work.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setwise.pipelines import references
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.references import VARIANT
from setwise.platform import config as configuration
from setwise.platform import run, run_mirror, storage
from setwise.platform.errors import SetwiseError, StoppedError, StorageError
from setwise.platform.masking import masked
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run
from setwise.platform.storage import LeaseHeldError
from setwise.sweeps.space import with_values
from setwise.sweeps.variants import Variant

if TYPE_CHECKING:
    from setwise.sweeps.population import Copy

log = logging.getLogger(__name__)

MAX_REASON = 600
PROCESS = "process"
"""The file of a run that says which process its trial is in."""


def settings_of(
    study: str,
    base: Recipe,
    store: Path,
    objectives: tuple[str, ...],
    population: bool,
    variants: Mapping[str, Variant] | None = None,
) -> dict[str, Any]:
    """What all trials of a study share, as plain values."""
    recipe = base.model_dump(mode="json")
    shared = {"study": study, "recipe": recipe, "store": str(store), "objectives": objectives}
    return shared | {
        "population": population,
        "variants": {name: one.settings for name, one in (variants or {}).items()},
    }


def train_trial(config: dict[str, Any], settings: dict[str, Any]) -> None:
    """Train what Tune's `config` says: `trial`, a number, with `values`; with `seed` the trial again under this seed.

    Reports after each epoch `rsum` of the validation split, the study's objectives, and the `epoch`.
    """
    from ray import tune

    from setwise.sweeps import study_run
    from setwise.sweeps.study import BEST, FAILURE, METRIC, NUMBER, RETURNED_VALUES, STUDY_FAILURE, TIME

    store = Path(settings["store"])
    values, seed = config[RETURNED_VALUES], config.get("seed")
    number = {NUMBER: config[NUMBER]}
    training = references.trial_run(settings["study"], config[NUMBER], store)
    if seed is not None:
        training = Run(training.folder.with_name(f"{training.name}-seed{seed}"))
        values = {**values, "train.seed": seed}
    objectives: dict[str, float] = {}
    course = None
    if settings["population"] and seed is None:
        from setwise.sweeps import population

        course = population.course_of(store / "studies" / settings["study"], config[NUMBER])

    def report(told: dict[str, float]) -> None:
        if costs := {key: value for key, value in objectives.items() if key != BEST}:
            Outbox(training.events).metrics(0, {f"cost/{key}": value for key, value in costs.items()}, series="cost")
        objectives[BEST] = max(objectives.get(BEST, -math.inf), told["val/rsum"])
        result = {TIME: int(told["epoch"]), METRIC: told["val/rsum"], **objectives, **number}
        if course is None:
            tune.report(result)
        elif result[TIME] > course.decided:  # what was before, the driver was told
            with population.pointer(training, result[TIME]) as checkpoint:
                tune.report(result, checkpoint=checkpoint)

    try:
        own = {name: value for name, value in values.items() if name != VARIANT}
        whole = settings["variants"][values[VARIANT]] if VARIANT in values else settings["recipe"]
        recipe = with_values(Recipe.model_validate(whole), own)
        parent = Run(store / "studies" / settings["study"])
        copy = course.copy if course is not None else None
        if copy is None:  # else it has a run, whose configuration stays the one it began with
            run.create(store / "runs", training.name, configuration.to_yaml(recipe), settings["study"], parent)
            if not training.events.is_file():
                note = study_run.trial_note(settings["study"], config[NUMBER], config[RETURNED_VALUES], seed)
                variant = [{"kind": "params", "values": {VARIANT: values[VARIANT]}}] if VARIANT in values else []
                Outbox(training.events).append({"kind": "tags", "values": {study_run.NOTE: note}}, *variant)
        storage.write_bytes(training.folder / PROCESS, str(os.getpid()).encode())
        objectives |= _costs(training, recipe, store, tuple(settings["objectives"]))
        _train(recipe, training, store, report, copy)
    except (LeaseHeldError, StoppedError):
        raise  # what a killed driver left behind still writes into the run, and Tune tries again, until it has gone
    except Exception as error:
        nothing = dict.fromkeys(settings["objectives"], math.nan)
        # A full disk is no property of the trial: the study stops, and the trial goes on with it.
        if isinstance(error, OSError) and error.errno in storage.NOT_WRITABLE:
            error = storage.not_writable(store, error.strerror)
        kind = STUDY_FAILURE if isinstance(error, StorageError) else FAILURE
        tune.report({TIME: 0, METRIC: math.nan, **nothing, **number, kind: _reason(error, training)})


def ended_for_memory(error: Exception, trainings: Sequence[Run]) -> list[Run]:
    """Those of `trainings` whose trial's process Ray's memory monitor ended, by the text of its OutOfMemoryError.

    A process may have served several trials: it was at work for the one that it began last.
    """
    began = [(path.stat().st_mtime_ns, one) for one in trainings if (path := one.folder / PROCESS).is_file()]
    at_work = {(one.folder / PROCESS).read_text(): one for _, one in sorted(began, key=lambda pair: pair[0])}
    ended = re.findall(r"Selected to kill:.*?pid=(\d+)", str(error))
    return [at_work[process] for process in ended if process in at_work]


def _train(recipe: Recipe, training: Run, store: Path, report: Any, copy: Copy | None) -> None:
    training.stop.unlink(missing_ok=True)
    with run.writing(training):  # for whose end a sweep waits that is stopped
        _pretrain(recipe, training, store)
    _loop(recipe, training, store, report, copy)


def _pretrain(recipe: Recipe, training: Run, store: Path) -> None:
    """Train what comes before `recipe`, if anything does, unless another trial has; one that is at it is waited for."""
    from setwise.pipelines import prepare, pretraining, records

    first = pretraining.recipe_before(recipe)
    before = pretraining.run_before(recipe, prepare.open_prepared(recipe.data.name, store), store)
    if first is None or before is None or recipe.pretraining is None or pretraining.is_behind(training):
        return
    pretraining.brought(before, store)
    experiment = Path(recipe.pretraining.recipe).stem
    run.create(store / "runs", before.name, pretraining.written(before, first), experiment)
    with pretraining.turn(before, log.warning, training.stop.exists):
        if not records.ended(before):
            with pretraining.stopping_with(training, before):
                _loop(first, before, store, lambda values: None)
            records.end(before, "FINISHED")
            run_mirror.send(before, store)
    pretraining.adopt(training, before)


def _loop(recipe: Recipe, training: Run, store: Path, report: Any, copy: Copy | None = None) -> None:
    from setwise.pipelines import train, trained_model, worker_group
    from setwise.pipelines.workers import Worker
    from setwise.sweeps import population

    if recipe.train.workers == 1:
        with worker_group.recording(training, store) as kept:
            if copy is not None:
                population.take_over(training, references.trial_run(training.experiment, copy.donor, store), copy)
            worker = Worker(device=trained_model.default_device())
            train.train(recipe, training, store, worker, report, kept=kept)
    else:
        worker_group.train_with_ray(recipe, training, store, on_epoch=report)


def _costs(training: Run, recipe: Recipe, store: Path, objectives: tuple[Any, ...]) -> dict[str, float]:
    """The objectives that are no result of training; what an earlier start of the trial measured stays."""
    if len(objectives) == 1:
        return {}
    from setwise.pipelines import batches, prepare, trained_model
    from setwise.sweeps import objectives as measures

    for event in run.read_events(training.events):
        if event.get("series") == "cost":
            return {name.removeprefix("cost/"): value for name, value in event["values"].items()}
    words = batches.open_words(recipe, prepare.open_prepared(recipe.data.name, store))
    return measures.costs(recipe, len(words), objectives, trained_model.default_device())


def _reason(error: Exception, training: Run) -> str:
    """Why a training failed, in a line or two; the whole traceback of what nobody foresaw lies in its folder."""
    if isinstance(error, SetwiseError):
        return masked(str(error))[:MAX_REASON]
    if (training.folder / "run.json").is_file():
        with contextlib.suppress(OSError):
            storage.write_bytes(training.folder / "error.txt", masked(traceback.format_exc()).encode())
    kind = "out of memory" if "OutOfMemory" in type(error).__name__ else type(error).__name__
    return masked(f"{kind}: {str(error).strip()}")[:MAX_REASON]
