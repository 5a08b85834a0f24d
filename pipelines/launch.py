"""Launching a training: its name, its record, and the command that trains it, or goes on with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from setwise.pipelines import batches, prepare, pretrained, records, worker_group
from setwise.pipelines.recipe import Recipe
from setwise.platform import cluster, config, run, run_mirror, storage
from setwise.platform.errors import ConfigError, DataError
from setwise.platform.run import Run
from setwise.platform.tracking import Courier, Tracker

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """A training before it starts: what it is called, where it is kept, how long it is."""

    name: str
    recipe: Recipe
    store: Path
    experiment: str
    steps_per_epoch: int

    def describe(self) -> str:
        train = self.recipe.train
        return (
            f"run '{self.name}': {train.epochs} epochs of {self.steps_per_epoch} steps, {train.batch_size} images a "
            f"step over {train.workers} worker{'s' if train.workers > 1 else ''}, {train.precision}, "
            f"{'' if train.micro_batch is None else f'{train.micro_batch} images at a time, '}"
            f"K = {self.recipe.model.set_prediction.num_slots}, D = {self.recipe.model.embed_size}"
        )


def plan(recipe_name: str, recipe: Recipe, name: str | None, store: Path) -> Plan:
    """The training of `recipe`, called `name`, or after the recipe and a hash of its settings.

    The same settings give the same name, so the same command finds its run again.

    Raises:
        ConfigError: the name cannot be one, or the recipe is not for training.
        DataError: the data is not prepared, or weights to start from are not there.
        UnreachableError: weights have to be downloaded, and the network does not answer.
    """
    check_trainable(recipe)
    title = Path(recipe_name).stem
    prepared = prepare.open_prepared(recipe.data.name, store)
    prepare.check_fits(prepared, recipe)
    pretrained.locate(recipe, store / "weights")
    digest = storage.fingerprint([recipe.model_dump(mode="json"), prepared.fingerprint])[:6]
    missing = [split for split in ("train", "val") if split not in prepared.manifest["splits"]]
    if missing:
        raise DataError(
            f"'{recipe.data.name}' has no split {' and no split '.join(missing)}, and a training reads both"
        )
    images = prepared.manifest["splits"]["train"]["images"]
    steps = batches.batches_per_epoch(images, recipe.train.batch_size, recipe.train.drop_last)
    return Plan(run.check_name(name or f"{title}-{digest}"), recipe, store, title, steps)


def plans(recipe_name: str, recipe: Recipe, name: str | None, seeds: int | None, store: Path) -> list[Plan]:
    """One training, or the same under several seeds, counted from the recipe's own: NAME-seed0, NAME-seed1, ..."""
    first = plan(recipe_name, recipe, name, store)
    if seeds is None:
        return [first]
    made = []
    for number in range(recipe.train.seed, recipe.train.seed + seeds):
        train = recipe.train.model_copy(update={"seed": number})
        seeded = recipe.model_copy(update={"train": train})
        made.append(replace(first, name=run.check_name(f"{first.name}-seed{number}"), recipe=seeded))
    return made


def title_of(planned: Sequence[Plan]) -> str:
    """What a user calls them all."""
    return planned[0].name if len(planned) == 1 else planned[0].name.rpartition("-seed")[0]


def check_trainable(recipe: Recipe) -> None:
    """Raises ConfigError for a model that is only there to load weights."""
    if recipe.model.padding == "official":
        raise ConfigError(
            "model.padding=official is for weights that the authors' code trained, so that they give the same numbers: "
            "padding takes attention there, and a caption's set depends on its batch. Train with model.padding=exact."
        )


def execute(planned: Sequence[Plan], tracker: Tracker, say: Say) -> list[Run]:
    """Train as planned, one after the other, each from where an earlier start of it stopped; deliver to MLflow.

    Ctrl-C or SIGTERM lets the training write a checkpoint after its next step.
    """
    runs = []
    with contextlib.ExitStack() as cluster_at_need:
        connected = False
        for plan in planned:
            written = config.to_yaml(plan.recipe)
            if run_mirror.restore_record(Run(plan.store / "runs" / plan.name), plan.store, written):
                say(f"run '{plan.name}' was begun elsewhere, and goes on with what the mirror has of it")
            training = run.create(plan.store / "runs", plan.name, written, plan.experiment)
            runs.append(training)
            with storage.lease(training.folder / "lease", f"run '{plan.name}'"), Courier(tracker) as courier:
                courier.add(training)
                if records.ended(training):
                    say(f"run '{plan.name}' is complete already")
                    continue
                storage.check_writable(training.folder)
                if not connected:
                    cluster_at_need.enter_context(cluster.connect())
                    cluster_at_need.enter_context(worker_group.interruptible())
                    connected = True
                newest = max(worker_group.checkpoints(training), default=None)
                onward = f", from {newest} on" if newest is not None else ""
                say(f"run '{plan.name}': training on {_processors(plan.recipe)}{onward}")
                worker_group.train_with_ray(plan.recipe, training, plan.store, on_epoch=_told(plan, say))
                records.end(training, "FINISHED")
                run_mirror.send(training, plan.store)
    return runs


def _told(plan: Plan, say: Say) -> Callable[[dict[str, Any]], None]:
    return lambda values: say(epoch_line(values, plan.recipe.train.epochs))


def _processors(recipe: Recipe) -> str:
    workers, use_gpu = worker_group.room(recipe)
    at_most = "at most " if recipe.train.min_workers is not None else ""
    return f"{at_most}{workers} {'GPU' if use_gpu else 'CPU'}{'s' if workers > 1 else ''}"


def epoch_line(values: dict[str, Any], epochs: int) -> str:
    """One epoch as a line of progress."""
    return (
        f"epoch {values['epoch']:.0f}/{epochs}  {values['train/seconds']:.0f} s  loss {values['train/total']:.4f}  "
        f"val RSUM {values['val/rsum']:.1f}  i2t R@1 {values['val/i2t_R1']:.1f}  t2i R@1 {values['val/t2i_R1']:.1f}"
    )
