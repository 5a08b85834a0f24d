"""Launching a training: its name, its record, and the workers of Ray Train that run the loop of train.py."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from setwise.pipelines import batches, prepare, pretrained, records
from setwise.pipelines.recipe import Recipe
from setwise.platform import cluster, config, run, storage, system_metrics
from setwise.platform.errors import ConfigError, DataError, DivergedError, SetwiseError, UnreachableError
from setwise.platform.outbox import Reader
from setwise.platform.run import Run
from setwise.platform.tracking import Courier, Tracker

Say = Callable[[str], None]
POLL_S = 0.3
WORKER_CPUS = 0.99
"""Of a worker without a GPU: whole ones would leave no room for a sweep's trial, which waits for them with 0.01."""


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
    """Train as planned, one after the other, each from where an earlier start of it stopped; deliver to MLflow."""
    runs = []
    with contextlib.ExitStack() as cluster_at_need:
        connected = False
        for plan in planned:
            training = run.create(plan.store / "runs", plan.name, config.to_yaml(plan.recipe), plan.experiment)
            runs.append(training)
            with storage.lease(training.folder / "lease", f"run '{plan.name}'"), Courier(tracker) as courier:
                courier.add(training)
                if records.ended(training):
                    say(f"run '{plan.name}' is complete already")
                    continue
                if not connected:
                    cluster_at_need.enter_context(cluster.connect())
                    connected = True
                say(f"run '{plan.name}': training on {_processors(plan.recipe)}")
                train_with_ray(plan.recipe, training, plan.store, on_epoch=_told(plan, say))
                records.end(training, "FINISHED")
    return runs


def _told(plan: Plan, say: Say) -> Callable[[dict[str, Any]], None]:
    return lambda values: say(epoch_line(values, plan.recipe.train.epochs))


def _processors(recipe: Recipe) -> str:
    return "GPUs" if cluster.gpus() >= recipe.train.workers else "CPUs"


def epoch_line(values: dict[str, Any], epochs: int) -> str:
    """One epoch as a line of progress."""
    return (
        f"epoch {values['epoch']:.0f}/{epochs}  {values['train/seconds']:.0f} s  loss {values['train/total']:.4f}  "
        f"val RSUM {values['val/rsum']:.1f}  i2t R@1 {values['val/i2t_R1']:.1f}  t2i R@1 {values['val/t2i_R1']:.1f}"
    )


def train_with_ray(
    recipe: Recipe,
    training: Run,
    store: Path,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    max_failures: int = 2,
) -> None:
    """Train in the workers of Ray Train, on GPUs where the cluster has enough of them.

    A worker that dies is replaced, up to `max_failures` times; the loop then finds the newest checkpoint by itself.
    Ray's own record of the run is written to a new folder each time, and never read.

    Args:
        on_epoch: called here, in this thread, with each epoch's metrics as they appear in the run's record.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers = recipe.train.workers
    gpus, cpus = cluster.gpus(), cluster.cpus()
    use_gpu = gpus >= workers
    if not use_gpu and (gpus or cpus < workers):  # Ray would wait for ever, or train on CPUs beside idle GPUs
        raise ConfigError(
            f"train.workers={workers}, but the cluster has {gpus} GPUs and {cpus} CPUs: set it to what there is"
        )
    attempts = training.folder / "ray"
    attempt = f"attempt_{len(list(attempts.glob('*'))) if attempts.exists() else 0:03d}"
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"recipe": recipe.model_dump(mode="json"), "run": str(training.folder), "store": str(store)},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker=None if use_gpu else {"CPU": WORKER_CPUS}
        ),
        run_config=RunConfig(
            name=attempt,
            storage_path=str(attempts),
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    )
    # Ray Train's callbacks run in a process of Ray's; the record is read instead, while fit() waits in a thread.
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    record = Reader(training.events)
    while True:
        alive = thread.is_alive()  # asked before reading: what came in between is read in the next turn
        for event in (event for events, _ in record.new() for event in events):
            if on_epoch is not None and event.get("series") == "train":
                on_epoch({"epoch": float(event["step"]), **event["values"]})
        if not alive:
            break
        thread.join(POLL_S)
    if failure:
        raise _explained(failure[0], training) from failure[0]


def _explained(error: BaseException, training: Run) -> BaseException:
    """An error of Ray Train as a user reads it: what the worker said, not how Ray carried it here."""
    for line in reversed(str(error).splitlines()):
        for kind in (DivergedError, ConfigError, DataError, UnreachableError, SetwiseError):
            before, found, message = line.strip().partition(f"{kind.__name__}: ")
            if found and (not before or before.endswith(".")):
                return kind(f"{message} (run {training.folder})")
    return error


@contextlib.contextmanager
def recording(training: Run) -> Iterator[None]:
    """Be the one process that writes the record of `training`, and sample how busy the machine is."""
    with run.writing(training), system_metrics.sampled(training):
        yield


def _ray_worker(settings: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    from setwise.pipelines.train import train
    from setwise.pipelines.workers import Worker

    context = ray.train.get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    recipe = Recipe.model_validate(settings["recipe"])
    training = Run(Path(settings["run"]))
    with recording(training) if worker.rank == 0 else contextlib.nullcontext():
        train(recipe, training, Path(settings["store"]), worker, ray.train.report)
