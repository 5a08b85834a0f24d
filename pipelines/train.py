"""Training one recipe: the loop, to be read from top to bottom.

launch.py runs it in the workers of Ray Train; a sweep runs it in the process of the trial itself. Both may be killed at
any moment: the loop starts from the newest checkpoint that verifies (resume.py), wherever Ray believes it was. Asked to
stop, it writes one after its next step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setwise.pipelines import batches, lineage, optimizer, prepare, pretrained, records, resume, trained_model, workers
from setwise.pipelines.batches import Share, Split
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.resume import Progress
from setwise.pipelines.system import System
from setwise.pipelines.workers import Worker
from setwise.platform import checkpoint, seeding, storage
from setwise.platform.errors import DivergedError, StoppedError
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run

Report = Callable[[dict[str, float]], None]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_OVERFLOWS = 50
"""Updates in a row that fp16 may leave out: each halves the scale, which starts at 2^16."""
LOOK_EVERY = 50
"""Steps between two looks at whether the loss is finite, each of which waits for a GPU."""


def train(
    recipe: Recipe,
    run: Run,
    store: Path,
    worker: Worker,
    report: Report,
    notice: Callable[[], bool] = lambda: False,
    kept: Callable[[], None] = lambda: None,
) -> None:
    """Train `recipe` in `run`, from its newest checkpoint if it has one, to the last epoch.

    Args:
        store: where the prepared data set is.
        report: called by every worker at the end of each epoch, with the epoch's metrics and its number, `epoch`.
        notice: asked by the first worker after each step: whether a machine of the training is about to be taken away.
        kept: called by the first worker when a checkpoint is written, and when an epoch's is recorded.

    Raises:
        StoppedError: somebody asked for it (`run.stop`), or there was such a notice; a checkpoint is written.
        DivergedError: a loss that is not finite; the checkpoints before it stay.
        DataError: the data is not prepared, or is not that on which the run's checkpoint was trained.
        StorageError: a checkpoint cannot be written; those before it stay.
    """
    config = recipe.train
    torch.set_num_threads(config.threads)
    device = worker.device
    if device.type == "cuda":
        torch.cuda.set_device(device)

    # Data. What is in a batch, and how it is augmented, is a pure function of (seed, epoch, place).
    prepared = prepare.open_prepared(recipe.data.name, store)
    words = batches.open_words(recipe, prepared)
    training = Split(prepared, "train", recipe.data, words)
    validation = Split(prepared, "val", recipe.data, words)
    steps_per_epoch = batches.batches_per_epoch(len(training), config.batch_size, config.drop_last)
    total_steps = steps_per_epoch * config.epochs

    # Model and optimizer: the same initial weights on every worker.
    seeding.seed_everything(seeding.derive(config.seed, "weights"))
    system = trained_model.untrained(recipe, len(words))
    # One worker looks, since looking sets a damaged checkpoint aside.
    damaged: list[str] = []
    newest = workers.from_first(resume.newest(run, damaged.append) if worker.rank == 0 else None, worker)
    start_tags = {} if newest else pretrained.start(system, recipe, words, prepared, store)
    system.to(device)
    if device.type == "cuda":
        system.to(memory_format=torch.channels_last)  # in which tensor cores read images
    descent = optimizer.make(system, recipe.optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

    # Resume: 1. the newest checkpoint that verifies, at an epoch's end or within one; 2. else from the start.
    progress = Progress(overflows=torch.zeros((), device=device))
    if newest is not None:
        resume.check_data(newest, prepared, run)
        progress = resume.restore(newest, system, descent, scaler, device)
    workers.synchronize(worker)
    outbox = Outbox(run.events) if worker.rank == 0 else None
    if outbox is not None:
        records.begin(outbox, run, recipe, prepared, start_tags)
        for told in damaged:
            outbox.append({"kind": "tags", "values": {resume.DAMAGED: told}})
        for values in progress.history:  # a crash may have fallen between a checkpoint and its event
            outbox.metrics(int(values["epoch"]), _recorded(values))
        if progress.history:
            _point_to_best(run, recipe.metric, progress.history)
    for values in progress.history:  # whoever restarted us knows nothing of the epochs before
        report(values)

    def keep() -> None:
        metadata = _metadata(recipe, words.words, batches.dataset_identity(prepared), run, progress.history)
        resume.save(run, progress, metadata, system, {"optimizer": descent.state_dict(), "scaler": scaler.state_dict()})
        kept()

    if config.compile:
        for part in system.compiled():
            part.compile()
    encoder: nn.Module | None = None
    started = time.monotonic() - progress.seconds
    for epoch in range(len(progress.history) + 1, config.epochs + 1):
        system.train()
        if optimizer.freeze(system, recipe.optimizer, epoch) or encoder is None:
            encoder = workers.parallel(system.encoder, worker)
        sums = progress.sums
        failure = Failure(device)
        measured = [values[recipe.metric] for values in progress.history]

        shares = batches.training_batches(
            training,
            config.batch_size,
            config.seed,
            epoch,
            worker.rank,
            worker.world,
            config.drop_last,
            config.loader_threads,
            first=progress.step,
        )
        epoch_started = time.monotonic() - progress.epoch_seconds
        with contextlib.closing(shares):  # whatever is made ahead ends with the loop
            for number, share in enumerate(shares, progress.step):
                step = (epoch - 1) * steps_per_epoch + number
                rate = optimizer.learning_rate(recipe.optimizer, step, total_steps, steps_per_epoch, measured)
                optimizer.set_learning_rate(descent, rate)

                parts = global_loss(encoder, system, share.to(device), step / steps_per_epoch, worker)
                norm = update(parts["total"], system, descent, scaler, recipe.optimizer.clip_norm)

                # Numbers stay on the device: to look at one would wait for the GPU.
                updated = norm.isfinite()  # in fp16 a gradient may overflow
                progress.overflows = torch.where(updated, 0.0, progress.overflows + 1)
                may_overflow = progress.overflows <= (MAX_OVERFLOWS if scaler.is_enabled() else 0)
                failure.note(step, parts, norm, may_overflow)
                if device.type == "cpu" or number % LOOK_EVERY == LOOK_EVERY - 1:
                    failure.stop(steps_per_epoch)
                counted = {**parts, "gradient_norm": torch.where(updated, norm, 0.0), "updates": updated}
                for name, value in counted.items():
                    sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach()

                # Within an epoch the first worker alone writes: all have the same weights, so none has to wait for it.
                progress.step = number + 1
                if worker.rank == 0:
                    asked = run.stop.exists() or notice()
                    if asked or _is_due(progress.step, steps_per_epoch, config.checkpoint_steps):
                        failure.stop(steps_per_epoch)  # what is not finite is never kept
                        now = time.monotonic()
                        progress.epoch_seconds, progress.seconds = now - epoch_started, now - started
                        keep()
                    if asked:
                        raise StoppedError(f"stopped in epoch {epoch}, after step {progress.step} of {steps_per_epoch}")
        failure.stop(steps_per_epoch)  # which waits for a GPU, so that the clock is read after its last step
        epoch_seconds = time.monotonic() - epoch_started

        # The epoch's end: validate, checkpoint, then tell; in this order, so that what was told can be found again.
        last_step = epoch * steps_per_epoch - 1
        last = optimizer.learning_rate(recipe.optimizer, last_step, total_steps, steps_per_epoch, measured)
        values = {"epoch": float(epoch), "train/lr": last}
        updates = float(sums.pop("updates"))
        values |= {f"train/{name}": float(value) / steps_per_epoch for name, value in sums.items()}
        values["train/gradient_norm"] *= steps_per_epoch / max(updates, 1)
        images_seen = min(steps_per_epoch * config.batch_size, len(training))
        values["train/images_per_second"] = images_seen / epoch_seconds
        if worker.rank == 0:
            values |= system.validate(validation, config.eval_batch_size, device, config.loader_threads)
        values["train/seconds"] = time.monotonic() - started
        values = workers.from_first(values, worker)  # on which the learning rate may depend
        progress = Progress([*progress.history, values], overflows=progress.overflows, seconds=values["train/seconds"])
        if outbox is not None:
            keep()
            best = _point_to_best(run, recipe.metric, progress.history)
            newest_epochs = range(epoch, epoch - config.keep_checkpoints, -1)
            checkpoint.prune(run.checkpoints, keep={best, *map(resume.epoch_name, newest_epochs)})
            checkpoint.prune(run.steps, keep=())
            outbox.metrics(epoch, _recorded(values))
            kept()
            if run.stop.exists() and epoch < config.epochs:
                raise StoppedError(f"stopped after epoch {epoch}")
        workers.synchronize(worker)
        report(values)


def global_loss(encoder: nn.Module, system: System, share: Share, epoch: float, worker: Worker) -> dict[str, Tensor]:
    """The loss of one global batch by parts, the same on every worker, of which each differentiates its own share."""
    precision = system.recipe.train.precision
    with torch.autocast(worker.device.type, PRECISIONS[precision], enabled=precision != "fp32"):
        images, texts = system.encode(encoder, share)
    images = workers.gather(images, share.images, worker)
    texts = workers.gather(texts, share.captions, worker)
    return system.loss(images, texts, share.owners, epoch)


def update(
    loss: Tensor, module: nn.Module, descent: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_norm: float
) -> Tensor:
    """One update of the weights of `module`, by the gradient of `loss`, whose norm is returned and then limited.

    In fp16 nothing is updated where a gradient overflowed, and the scale is lowered.
    """
    descent.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    scaler.unscale_(descent)
    norm = nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
    scaler.step(descent)
    scaler.update()
    return norm


def _recorded(values: dict[str, float]) -> dict[str, float]:
    """Without the epoch, which is the step."""
    return {name: value for name, value in values.items() if name != "epoch"}


def _is_due(step: int, steps_per_epoch: int, checkpoint_steps: int | None) -> bool:
    """Whether a checkpoint within the epoch follows so many steps; after the last the epoch's own does."""
    return checkpoint_steps is not None and step % checkpoint_steps == 0 and step < steps_per_epoch


def _metadata(
    recipe: Recipe, words: tuple[str, ...], data: dict[str, Any], run: Run, history: list[dict[str, float]]
) -> dict[str, Any]:
    return {
        "schema": 3,
        "run": run.name,
        "lineage": lineage.of(run, recipe),
        "epoch": len(history),
        "metric": recipe.metric,
        "recipe": recipe.model_dump(mode="json"),
        "vocabulary": words,
        "data": data,
        "history": history,
    }


def _point_to_best(run: Run, metric: str, history: list[dict[str, float]]) -> str:
    """Name the best checkpoint in `best.json`; of equals, the earlier."""
    best = max(history, key=lambda values: values[metric])
    name = resume.epoch_name(int(best["epoch"]))
    storage.write_json(run.folder / "best.json", {"checkpoint": name, "metric": metric, "value": best[metric]})
    return name


class Failure:
    """The first step of an epoch whose loss or gradient was not finite, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self.names: list[str] = []
        self.first = torch.full((), -1.0, device=device)
        self.values = self.first.new_empty(0)

    def note(self, step: int, parts: dict[str, Tensor], norm: Tensor, may_overflow: Tensor) -> None:
        """The parts of the loss have to be finite, and the gradient norm unless it `may_overflow`."""
        values = torch.stack([value.detach().float() for value in (*parts.values(), norm)])
        if not self.names:
            self.names, self.values = [*parts, "gradient norm"], values
        finite = values[:-1].isfinite().all() & (norm.isfinite() | may_overflow)
        known = (self.first >= 0) | finite
        self.values = torch.where(known, self.values, values)
        self.first = torch.where(known, self.first, float(step))

    def stop(self, steps_per_epoch: int) -> None:
        """Raises DivergedError if there was such a step; on a GPU this waits."""
        step = int(self.first)
        if step < 0:
            return
        told = ", ".join(f"{name} {value:g}" for name, value in zip(self.names, self.values.tolist(), strict=True))
        raise DivergedError(
            "the loss or its gradient is not finite any more at step "
            f"{step} (epoch {step // steps_per_epoch + 1}): {told}. "
            "The checkpoints before it are kept. Try a lower optimizer.lr or optimizer.clip_norm."
        )
