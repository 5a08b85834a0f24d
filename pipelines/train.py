"""Training one recipe: the loop, to be read from top to bottom.

launch.py runs it in the workers of Ray Train; a sweep runs it in the process of the trial itself. Both may be killed at
any moment: the loop starts from the newest checkpoint that verifies, wherever Ray believes it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.distributed.nn.functional
from torch import Tensor, nn

from setwise.models.losses import LossParts, set_embedding_loss
from setwise.models.set_prediction import SetEmbedding
from setwise.pipelines import batches, metrics, optimizer, prepare, records, trained_model
from setwise.pipelines.batches import Batch, Split
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.trained_model import Retrieval
from setwise.platform import checkpoint, seeding, storage
from setwise.platform.errors import DataError, SetwiseError
from setwise.platform.run import Run
from setwise.platform.tracking import Outbox

Report = Callable[[dict[str, float]], None]
METRIC = "val/rsum"


class DivergedError(SetwiseError):
    """The loss is not a finite number any more."""


@dataclass(frozen=True)
class Worker:
    """This process among those that train together."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def train(recipe: Recipe, run: Run, store: Path, worker: Worker, report: Report) -> None:
    """Train `recipe` in `run`, from its newest checkpoint if it has one, to the last epoch.

    Args:
        store: where the prepared data set is.
        report: called by every worker at the end of each epoch, with the epoch's metrics and its number, `epoch`.

    Raises:
        DivergedError: a loss that is not finite; the checkpoints before it stay.
        DataError: the data is not prepared, or is not that on which the run's checkpoint was trained.
    """
    config = recipe.train
    torch.set_num_threads(config.threads)
    device = worker.device

    # Data. The order of each epoch is a pure function of (seed, epoch).
    prepared = prepare.open_prepared(recipe.data.name, store)
    words = batches.open_vocabulary(prepared)
    training = Split(prepared, "train", recipe.data.image_size, words)
    validation = Split(prepared, "val", recipe.data.image_size, words)
    steps_per_epoch = batches.batches_per_epoch(len(training), config.batch_size)
    total_steps = steps_per_epoch * config.epochs

    # Model and optimizer: the same initial weights on every worker.
    seeding.seed_everything(seeding.derive(config.seed, "weights"))
    retrieval = Retrieval(recipe, len(words)).to(device)
    adamw = optimizer.make(retrieval, recipe.optimizer)
    forward: nn.Module = retrieval.retriever
    if worker.world > 1:
        forward = nn.parallel.DistributedDataParallel(forward, device_ids=[device] if device.type == "cuda" else None)

    # Resume: 1. the newest checkpoint that verifies; 2. else from the start. Random state last.
    seeding.seed_everything(seeding.derive(config.seed, "training", worker.rank))
    history: list[dict[str, float]] = []
    seconds_before = 0.0
    if (folder := checkpoint.newest(run.checkpoints)) is not None:
        _check_data(checkpoint.metadata(folder)["data"], prepared, run)
        retrieval.load_state_dict(checkpoint.weights(folder))
        saved = checkpoint.training_state(folder)
        adamw.load_state_dict(saved["optimizer"])
        history = checkpoint.metadata(folder)["history"]
        seconds_before = history[-1]["train/seconds"]
        seeding.restore_global_state(saved["random"][str(worker.rank)])
    _synchronize(worker)
    outbox = Outbox(run.events) if worker.rank == 0 else None
    if outbox is not None:
        records.begin(outbox, run, recipe, prepared)
        for values in history:  # a crash may have fallen between a checkpoint and its event
            outbox.metrics(int(values["epoch"]), values)
        if history:
            _point_to_best(run, history)
    for values in history:  # whoever restarted us knows nothing of the epochs before
        report(values)

    started = time.monotonic()
    for epoch in range(len(history) + 1, config.epochs + 1):
        retrieval.train()
        sums: dict[str, Tensor] = {}

        for number, batch in enumerate(_share(training, config.batch_size, config.seed, epoch, worker)):
            step = (epoch - 1) * steps_per_epoch + number
            optimizer.set_learning_rate(adamw, optimizer.learning_rate(recipe.optimizer, step, total_steps))

            parts = batch_loss(forward, retrieval, batch.to(device), recipe, step / steps_per_epoch, worker)
            adamw.zero_grad(set_to_none=True)
            parts.total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            norm = nn.utils.clip_grad_norm_(retrieval.parameters(), recipe.optimizer.clip_norm)
            if not torch.isfinite(norm):
                raise DivergedError(_divergence(step, epoch, parts, norm))
            adamw.step()

            for name, value in {**parts._asdict(), "gradient_norm": norm}.items():
                sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach()

        # The epoch's end: validate, checkpoint, then tell; in this order, so that what was told can be found again.
        values = {"epoch": float(epoch), "train/lr": adamw.param_groups[0]["lr"]}
        values |= {f"train/{name}": float(value) / steps_per_epoch for name, value in sums.items()}
        random_states = _gather_random_states(worker)
        if worker.rank == 0:
            values |= validate(retrieval, validation, config.eval_batch_size, device)
        values["train/seconds"] = seconds_before + time.monotonic() - started
        history = [*history, values]
        if outbox is not None:
            metadata = _metadata(recipe, words.words, batches.dataset_identity(prepared), run, history)
            state = {"optimizer": adamw.state_dict(), "random": random_states}
            checkpoint.save(run.checkpoints / _name(epoch), retrieval.state_dict(), metadata, state)
            best = _point_to_best(run, history)
            newest = [_name(kept) for kept in range(epoch, epoch - config.keep_checkpoints, -1)]
            checkpoint.prune(run.checkpoints, keep={best, *newest})
            outbox.metrics(epoch, values)
        _synchronize(worker)
        report(values)


def batch_loss(
    forward: nn.Module, retrieval: Retrieval, batch: Batch, recipe: Recipe, epoch: float, worker: Worker
) -> LossParts:
    """The loss of one global batch.

    Sets and slots are gathered from all workers with their gradients, so that every worker sees the negatives of all.
    Each then computes the same loss, and the sum over workers that gathering's backward takes is undone by the mean
    that DistributedDataParallel takes.
    """
    images, texts = forward(batch.images, batch.tokens, batch.lengths)
    owners = batch.owners
    if worker.world > 1:
        owners = _gather_owners(owners, len(batch.images), worker)
        images = SetEmbedding(sets=_gather(images.sets, worker), slots=_gather(images.slots, worker))
        texts = SetEmbedding(sets=_gather(texts.sets, worker), slots=_gather(texts.slots, worker))
    scores = retrieval.similarity(images.sets, texts.sets)
    positives = owners[None, :] == torch.arange(len(images.sets), device=owners.device)[:, None]
    return set_embedding_loss(scores, positives, images, texts, recipe.loss, negatives=recipe.loss.negatives_at(epoch))


def validate(retrieval: Retrieval, split: Split, batch_size: int, device: torch.device) -> dict[str, float]:
    """R@K and RSUM on the validation split, as `val/...`; draws no random number."""
    sets = trained_model.embed(retrieval.retriever, split, batch_size, device)
    with torch.inference_mode():
        scores = retrieval.similarity(sets.image_sets.to(device), sets.text_sets.to(device)).float().cpu().numpy()
    positives = (sets.owners[None, :] == torch.arange(len(split))[:, None]).numpy()
    return {f"val/{name}": value for name, value in metrics.retrieval_metrics(scores, positives).items()}


def _share(split: Split, batch_size: int, seed: int, epoch: int, worker: Worker) -> Any:
    return batches.training_batches(split, batch_size, seed, epoch, worker.rank, worker.world)


def _name(epoch: int) -> str:
    return f"epoch_{epoch:04d}"


def _metadata(
    recipe: Recipe, words: tuple[str, ...], data: dict[str, Any], run: Run, history: list[dict[str, float]]
) -> dict[str, Any]:
    return {
        "schema": 1,
        "run": run.name,
        "epoch": len(history),
        "recipe": recipe.model_dump(mode="json"),
        "vocabulary": words,
        "data": data,
        "history": history,
    }


def _check_data(trained_on: dict[str, Any], prepared: prepare.Prepared, run: Run) -> None:
    if trained_on != batches.dataset_identity(prepared):
        raise DataError(
            f"run '{run.name}' was trained on data {trained_on}, and what is prepared now is another: "
            f"{batches.dataset_identity(prepared)}. Prepare the same data again, or start a new run."
        )


def _point_to_best(run: Run, history: list[dict[str, float]]) -> str:
    """Name the best checkpoint in `best.json`; of equals, the earlier."""
    best = max(history, key=lambda values: values[METRIC])
    name = _name(int(best["epoch"]))
    storage.write_json(run.folder / "best.json", {"checkpoint": name, "metric": METRIC, "value": best[METRIC]})
    return name


def _divergence(step: int, epoch: int, parts: LossParts, norm: Tensor) -> str:
    values = ", ".join(f"{name} {float(value.detach()):g}" for name, value in parts._asdict().items())
    return (
        f"the loss is not finite any more at step {step} (epoch {epoch}): {values}, gradient norm {float(norm):g}. "
        "The checkpoints before it are kept. Try a lower optimizer.lr or optimizer.clip_norm."
    )


def _synchronize(worker: Worker) -> None:
    if worker.world > 1:
        torch.distributed.barrier()


def _gather(rows: Tensor, worker: Worker) -> Tensor:
    """The rows of all workers in the order of ranks, with gradients. Shares may differ: they are padded, then cut."""
    counts = _counts(len(rows), rows.device, worker)
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    parts = torch.distributed.nn.functional.all_gather(padded)  # type: ignore[no-untyped-call]
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _gather_owners(owners: Tensor, images: int, worker: Worker) -> Tensor:
    """Indices of owners in the gathered images: each worker's are moved by the images of those before it."""
    before = sum(_counts(images, owners.device, worker)[: worker.rank])
    counts = _counts(len(owners), owners.device, worker)
    padded = torch.cat([owners + before, owners.new_zeros(max(counts) - len(owners))])
    parts = [torch.empty_like(padded) for _ in range(worker.world)]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _counts(rows: int, device: torch.device, worker: Worker) -> list[int]:
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(worker.world)]
    torch.distributed.all_gather(counts, torch.tensor([rows], device=device))
    return [int(count) for count in counts]


def _gather_random_states(worker: Worker) -> dict[str, Any]:
    """Random states of all workers by rank, so that each goes on with its own dropout."""
    states: list[Any] = [None] * worker.world
    if worker.world == 1:
        states = [seeding.global_state()]
    else:
        torch.distributed.all_gather_object(states, seeding.global_state())
    return {str(rank): state for rank, state in enumerate(states)}
