"""Launching a training: its name, its record, and the command that trains it, or goes on with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from setwise.models.config import ModelConfig
from setwise.pipelines import batches, prepare, pretrained, pretraining, records, worker_group
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
    before: Plan | None = None
    """The training that comes first, and that others may want too."""

    def describe(self) -> str:
        train = self.recipe.train
        return (
            f"run '{self.name}': {train.epochs} epochs of {self.steps_per_epoch} steps, {train.batch_size} images a "
            f"step over {train.workers} worker{'s' if train.workers > 1 else ''}, {train.precision}, "
            f"{'' if train.micro_batch is None else f'{train.micro_batch} images at a time, '}"
            f"{_size(self.recipe)}{'' if self.before is None else f'. First, {self.before.describe()}'}"
        )


def _size(recipe: Recipe) -> str:
    if isinstance(recipe.model, ModelConfig):
        return f"K = {recipe.model.set_prediction.num_slots}, D = {recipe.model.embed_size}"
    return f"a model of kind '{recipe.model.kind}'"


def plan(recipe_name: str, recipe: Recipe, name: str | None, store: Path) -> Plan:
    """The training of `recipe`, called `name`, or after the recipe and a hash of its settings.

    The same settings give the same name, so the same command finds its run again.

    Raises:
        ConfigError: the name cannot be one, or the recipe, or that of its pre-training, is not for training.
        DataError: the data is not prepared, or weights to start from are not there.
        UnreachableError: weights have to be downloaded, and the network does not answer.
    """
    check_trainable(recipe)
    title = Path(recipe_name).stem
    prepared = prepare.open_prepared(recipe.data.name, store)
    prepare.check_fits(prepared, recipe)
    pretrained.locate(recipe, store / "weights")
    missing = [split for split in ("train", "val") if split not in prepared.manifest["splits"]]
    if missing:
        raise DataError(
            f"'{recipe.data.name}' has no split {' and no split '.join(missing)}, and a training reads both"
        )
    images = prepared.manifest["splits"]["train"]["images"]
    steps = batches.batches_per_epoch(images, recipe.train.batch_size, recipe.train.drop_last)
    named = run.check_name(name or pretraining.run_name(title, recipe, prepared))
    return Plan(named, recipe, store, title, steps, _before(recipe, store))


def _before(recipe: Recipe, store: Path) -> Plan | None:
    """The pre-training of `recipe`. Its name follows from its settings, so that others find it."""
    first = pretraining.recipe_before(recipe)
    if first is None or recipe.pretraining is None:
        return None
    return plan(recipe.pretraining.recipe, first, None, store)


def plans(recipe_name: str, recipe: Recipe, name: str | None, seeds: int | None, store: Path) -> list[Plan]:
    """One training, or the same under several seeds, counted from the recipe's own: NAME-seed0, NAME-seed1, ..."""
    first = plan(recipe_name, recipe, name, store)
    if seeds is None:
        return [first]
    made = []
    for number in range(recipe.train.seed, recipe.train.seed + seeds):
        train = recipe.train.model_copy(update={"seed": number})
        seeded = recipe.model_copy(update={"train": train})
        named = run.check_name(f"{first.name}-seed{number}")
        made.append(replace(first, name=named, recipe=seeded, before=_before(seeded, store)))
    return made


def title_of(planned: Sequence[Plan]) -> str:
    """What a user calls them all."""
    return planned[0].name if len(planned) == 1 else planned[0].name.rpartition("-seed")[0]


def check_trainable(recipe: Recipe) -> None:
    """Raises ConfigError for a model that is only there to load weights, or whose pre-training does not fit it."""
    pretraining.recipe_before(recipe)
    if isinstance(recipe.model, ModelConfig) and recipe.model.padding == "official":
        raise ConfigError(
            "model.padding=official is for weights that the authors' code trained, so that they give the same numbers: "
            "padding takes attention there, and a caption's set depends on its batch. Train with model.padding=exact."
        )


def execute(planned: Sequence[Plan], tracker: Tracker, say: Say) -> list[Run]:
    """Train as planned, one after the other, each from where an earlier start of it stopped; deliver to MLflow.

    Ctrl-C or SIGTERM lets the training write a checkpoint after its next step.
    """
    with contextlib.ExitStack() as cluster_at_need:
        connected = False

        def connect() -> None:
            nonlocal connected
            if not connected:
                cluster_at_need.enter_context(cluster.connect())
                cluster_at_need.enter_context(worker_group.interruptible())
                connected = True

        return [_train(plan, tracker, connect, say) for plan in planned]


def _train(plan: Plan, tracker: Tracker, connect: Callable[[], None], say: Say, shared: bool = False) -> Run:
    """One training, after the one that comes before it. Where it is `shared`, whoever else is at work on it is waited
    for."""
    what, training = f"run '{plan.name}'", Run(plan.store / "runs" / plan.name)
    written = config.to_yaml(plan.recipe)
    if shared:
        restored = pretraining.brought(training, plan.store)
        written = pretraining.written(training, plan.recipe)
    else:
        restored = run_mirror.restore_record(training, plan.store, written)
    if restored:
        say(f"{what} was begun elsewhere, and goes on with what the mirror has of it")
    training = run.create(plan.store / "runs", plan.name, written, plan.experiment)
    own = pretraining.turn(training, say) if shared else storage.lease(training.folder / "lease", what)
    with own, Courier(tracker) as courier:
        if plan.before is not None and not pretraining.is_behind(training):
            pretraining.adopt(training, _train(plan.before, tracker, connect, say, shared=True))
        courier.add(training)
        if records.ended(training):
            say(f"{what} is complete already")
            return training
        storage.check_writable(training.folder)
        connect()
        newest = max(worker_group.checkpoints(training), default=None)
        onward = f", from {newest} on" if newest is not None else ""
        say(f"{what}: training on {_processors(plan.recipe)}{onward}")
        worker_group.train_with_ray(plan.recipe, training, plan.store, on_epoch=_told(plan, say))
        records.end(training, "FINISHED")
        run_mirror.send(training, plan.store)
    return training


def _told(plan: Plan, say: Say) -> Callable[[dict[str, Any]], None]:
    return lambda values: say(epoch_line(values, plan.recipe))


def _processors(recipe: Recipe) -> str:
    workers, use_gpu = worker_group.room(recipe)
    at_most = "at most " if recipe.train.min_workers is not None else ""
    return f"{at_most}{workers} {'GPU' if use_gpu else 'CPU'}{'s' if workers > 1 else ''}"


def epoch_line(values: dict[str, Any], recipe: Recipe) -> str:
    """One epoch as a line of progress."""
    done = (
        f"epoch {values['epoch']:.0f}/{recipe.train.epochs}  {values['train/seconds']:.0f} s  "
        f"loss {values['train/total']:.4f}  "
    )
    if recipe.metric != "val/rsum":
        return done + f"{recipe.metric} {values[recipe.metric]:.3f}"
    recalls = f"i2t R@1 {values['val/i2t_R1']:.1f}  t2i R@1 {values['val/t2i_R1']:.1f}"
    return f"{done}val RSUM {values['val/rsum']:.1f}  {recalls}"
