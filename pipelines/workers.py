"""Processes that train one model together, so that they compute what one process would.

Each worker encodes its share of the batch. The sets of all are gathered, each worker computes the loss of the whole
batch from them, and differentiates it to the sets of its own share; the gradients of the weights are then summed over
workers. Shares may differ in size.
"""

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from setwise.models import batch_norm

Rows = TypeVar("Rows", bound=tuple[Any, ...] | None)


@dataclass(frozen=True)
class Worker:
    """This process among those that train together."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def parallel(module: nn.Module, worker: Worker) -> nn.Module:
    """`module` with its gradients averaged over all workers, and batch normalisation over the batches of all.

    The average is of gradients that `gather` made larger by the number of workers, so it is their sum. To be called
    again when other parameters learn than before.
    """
    batch_norm.synchronize(module)  # alone too, so that any number of workers runs the same code
    if worker.world == 1:
        return module
    # Without device_ids: with them, lengths of captions would be moved to the GPU, and the host would wait for them.
    return nn.parallel.DistributedDataParallel(module)


def gather(rows: Rows, counts: tuple[int, ...], worker: Worker) -> Rows:
    """What all workers made of their samples, in the order of ranks; only one's own rows have a gradient.

    Args:
        rows: a named tuple, whose tensors have a row a sample; what is no tensor stays one's own. Or None.
        counts: how many samples each worker has.
    """
    if worker.world == 1 or rows is None:
        return rows
    return type(rows)(*(_gather(one, counts, worker) if isinstance(one, Tensor) else one for one in rows))


def _gather(rows: Tensor, counts: tuple[int, ...], worker: Worker) -> Tensor:
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(parts, padded)
    parts = [part[:count] for part, count in zip(parts, counts, strict=True)]
    parts[worker.rank] = own = rows.view_as(rows)  # of its own, since slots have a gradient by way of the sets too
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient * worker.world)  # type: ignore[no-untyped-call]
    return torch.cat(parts)


def synchronize(worker: Worker) -> None:
    """Wait for all."""
    if worker.world > 1:
        torch.distributed.barrier()


def from_first(value: Any, worker: Worker) -> Any:
    """The first worker's `value`, on every worker."""
    if worker.world == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, device=worker.device)
    return values[0]
