"""The workers of Ray Train that run the loop of train.py together, and what happens when some of them end early.

A process that dies, or a node, is replaced, up to MAX_FAILURES times in a row; the loop then finds the newest
checkpoint by itself. A machine whose end is announced costs none of these. An error that setwise itself raised would
come again, and ends the training. Ray's own record of a training goes to a new folder each time, and is never read.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from setwise.pipelines import hardware, resume
from setwise.pipelines.recipe import Recipe
from setwise.platform import cluster, run, run_mirror, storage, system_metrics
from setwise.platform.errors import (
    ConfigError,
    DataError,
    DivergedError,
    SetwiseError,
    StoppedError,
    StorageError,
    UnreachableError,
)
from setwise.platform.mirror import open_mirror
from setwise.platform.outbox import Reader
from setwise.platform.run import Run
from setwise.platform.run_mirror import Uploader
from setwise.platform.storage import LeaseHeldError

log = logging.getLogger(__name__)

OnEpoch = Callable[[dict[str, Any]], None]
MAX_FAILURES = 3
"""Deaths in a row, without an epoch or a checkpoint between them, after which nothing is tried again."""
POLL_S = 0.3
GRACE_S = 20
"""How long a training that is asked to stop may take to its next step and checkpoint: what sends SIGTERM follows with
SIGKILL, often after 30 s."""
STOPPING = "stopping: a checkpoint is written after the next step. Ctrl-C again ends at once"
PATIENCE_S = 60
"""After which it is said that a training waits for its workers."""
RESIZE_S = 30
"""How often a training with `train.min_workers` looks whether there is room for more."""
WORKER_CPUS = 0.99
"""Of a worker without a GPU: whole ones would leave no room for a sweep's trial, which waits for them with 0.01."""


def train_with_ray(recipe: Recipe, training: Run, store: Path, on_epoch: OnEpoch | None = None) -> None:
    """Train in the workers of Ray Train, on GPUs where the cluster has enough of them.

    Args:
        on_epoch: called here, in this thread, with each epoch's metrics as they appear in the run's record.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the training has been asked to write a checkpoint, and had GRACE_S for it.
        StoppedError: somebody else asked the training to stop.
    """
    from ray.exceptions import RayActorError
    from ray.train import WorkerGroupError

    training.stop.unlink(missing_ok=True)
    record = Reader(training.events)
    most, use_gpu = room(recipe)  # once: after a loss there may be too little room for a while, which is waited for
    failures, standing = 0, checkpoints(training)
    while True:
        error = _attempt(recipe, training, store, most, use_gpu, record, on_epoch)
        if error is None:
            return
        told = _explained(error, training)
        if isinstance(told, StoppedError) and not training.stop.exists():
            continue  # a machine is to be taken away, and Ray gives it no new work
        final = isinstance(told, SetwiseError) and not isinstance(told, LeaseHeldError)  # a dying process may hold it
        if final or not isinstance(error, WorkerGroupError | RayActorError):
            raise told from error
        before, standing = standing, checkpoints(training)
        failures = failures + 1 if standing == before else 1
        if failures >= MAX_FAILURES:
            raise told from error


def _attempt(
    recipe: Recipe,
    training: Run,
    store: Path,
    most: int,
    use_gpu: bool,
    record: Reader,
    on_epoch: OnEpoch | None,
) -> BaseException | None:
    """One group of workers, to the training's end or to its own: what it ended of."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    least = min(recipe.train.min_workers or most, most)
    attempts = training.folder / "ray"
    attempt = f"attempt_{len(list(attempts.glob('*'))) if attempts.exists() else 0:03d}"
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"recipe": recipe.model_dump(mode="json"), "run": str(training.folder), "store": str(store)},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(least, most) if least < most else most,
            elastic_resize_monitor_interval_s=RESIZE_S,
            use_gpu=use_gpu,
            resources_per_worker=None if use_gpu else {"CPU": WORKER_CPUS},
            label_selector=cluster.selector(recipe.train.accelerators) if use_gpu else None,
        ),
        run_config=RunConfig(name=attempt, storage_path=str(attempts), failure_config=FailureConfig(max_failures=0)),
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
    begun = time.monotonic()
    waits = True
    try:
        while True:
            alive = thread.is_alive()  # asked before reading: what came in between is read in the next turn
            waits = waits and storage.lease_owner(training.folder / "writer.lease") is None
            if waits and time.monotonic() - begun > PATIENCE_S:
                waits = False
                log.warning(
                    "run '%s' waits for room in the cluster: %s", training.name, _wanted(recipe, least, use_gpu)
                )
            for event in (event for events, _ in record.new() for event in events):
                if on_epoch is not None and event.get("series") == "train":
                    on_epoch({"epoch": float(event["step"]), **event["values"]})
                if event["kind"] == "tags" and resume.DAMAGED in event["values"]:
                    log.warning(event["values"][resume.DAMAGED])
            if not alive:
                return failure[0] if failure else None
            thread.join(POLL_S)
    except KeyboardInterrupt:
        before = checkpoints(training)
        log.warning(STOPPING)
        training.stop.touch()
        thread.join(GRACE_S)  # a second Ctrl-C ends this
        if checkpoints(training) == before:
            log.warning("no checkpoint was written in time: what came after the newest one is done again")
        raise


def stop(trainings: Sequence[Run]) -> None:
    """Ask trainings to write a checkpoint after their next step, and wait until they have, GRACE_S at most."""
    asked = [training for training in trainings if training.folder.is_dir()]
    for training in asked:
        training.stop.touch()
    if asked:
        log.warning(STOPPING)
    deadline = time.monotonic() + GRACE_S
    while any(storage.lease_owner(one.folder / "writer.lease") for one in asked) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def room(recipe: Recipe) -> tuple[int, bool]:
    """How many workers a training may have here at most, and whether they have GPUs.

    Raises:
        ConfigError: there is no room for as few as the recipe allows.
        UnreachableError: there is no GPU of the kinds that it asks for.
    """
    train = recipe.train
    use_gpu = hardware.on_gpus(train, cluster.capacity(train.accelerators))
    if train.min_workers is None or not use_gpu:
        return train.workers, use_gpu
    return max(train.min_workers, cluster.most_workers(train.accelerators, train.workers)), use_gpu


def _wanted(recipe: Recipe, least: int, use_gpu: bool) -> str:
    kinds = f" of kind {' or '.join(recipe.train.accelerators)}" if use_gpu and recipe.train.accelerators else ""
    return f"{least} {'GPU' if use_gpu else 'CPU'}{'s' if least > 1 else ''}{kinds}, free at the same time"


def checkpoints(training: Run) -> list[str]:
    """The names of a training's checkpoints, by age. They change whenever it comes further."""
    return sorted(path.name for parent in (training.checkpoints, training.steps) for path in parent.glob("epoch_*"))


def _explained(error: BaseException, training: Run) -> BaseException:
    """An error of Ray Train as a user reads it: what the worker said, not how Ray carried it here."""
    kinds = (StoppedError, StorageError, DivergedError, ConfigError, DataError, UnreachableError, LeaseHeldError)
    for line in reversed(str(error).splitlines()):
        for kind in (*kinds, SetwiseError):
            before, found, message = line.strip().partition(f"{kind.__name__}: ")
            if found and (not before or before.endswith(".")):
                return kind(f"{message} (run {training.folder})")
    return error


@contextlib.contextmanager
def recording(training: Run, store: Path) -> Iterator[Callable[[], None]]:
    """Be the one process that writes the record of `training`, sample how busy the machine is, and send what is new to
    the store's mirror, if it has one; yields what to call when something is.

    A run whose checkpoints are in the mirror alone gets them from there.
    """
    with storage.writing_to(training.folder), run.writing(training), system_metrics.sampled(training):
        run_mirror.restore(training, store)
        uploader = Uploader(open_mirror(store), training)
        try:
            yield uploader.publish
        finally:
            uploader.close(limit_s=GRACE_S / 2)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM reach us as Ctrl-C does, and both instead of Tune, which would wait for its trials."""
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ray_worker(settings: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch
    from ray.train.v2._internal.execution.context import get_train_context

    from setwise.pipelines.train import train
    from setwise.pipelines.workers import Worker

    context = ray.train.get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    recipe = Recipe.model_validate(settings["recipe"])
    training = Run(Path(settings["run"]))
    noticed = get_train_context().preemption_context

    def notice() -> bool:
        # ray.train.get_preemption_info() says the same, but has to be asked by all workers at once, in each step.
        return noticed.preemption_info is not None

    store = Path(settings["store"])
    with recording(training, store) if worker.rank == 0 else contextlib.nullcontext(lambda: None) as kept:
        train(recipe, training, store, worker, ray.train.report, notice, kept)
