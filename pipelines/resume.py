"""Going on where a training stopped, as if it never had: what is kept of it, and where.

A checkpoint at an epoch's end lies in `checkpoints/`, one within an epoch in `steps/`, until the epoch ends. The names
of both sort by age together: epoch_0002, epoch_0002_step_000150 (150 steps after it), epoch_0003. No random state is
kept, since all that is random is drawn by key; the position in the data is the number of the step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from setwise.pipelines import batches
from setwise.pipelines.prepare import Prepared
from setwise.pipelines.system import System
from setwise.platform import checkpoint
from setwise.platform.errors import DataError
from setwise.platform.run import Run

log = logging.getLogger(__name__)

DAMAGED = "setwise.damaged_checkpoint"
"""The tag of a run that says which of its checkpoints was found to be damaged."""
KEEP_STEPS = 2
"""Newest checkpoints within an epoch that are kept: one to go on from, one to fall back to."""


@dataclass
class Progress:
    """How far a training has come: whole epochs, and what the epoch that is being trained has added up."""

    history: list[dict[str, float]] = field(default_factory=list)
    """The metrics of each whole epoch."""
    step: int = 0
    """Steps done of the next epoch."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Of those steps, by metric; scalars on the device."""
    overflows: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Steps without an update up to here, in a row."""
    epoch_seconds: float = 0.0
    """That these steps took."""
    seconds: float = 0.0
    """That all took, over all starts."""

    @property
    def name(self) -> str:
        """Of a checkpoint made now."""
        whole = epoch_name(len(self.history))
        return f"{whole}_step_{self.step:06d}" if self.step else whole


def epoch_name(epoch: int) -> str:
    """Of the checkpoint at an epoch's end."""
    return f"epoch_{epoch:04d}"


def newest(run: Run, say: Callable[[str], None] = log.warning) -> Path | None:
    """The newest checkpoint that verifies, at an epoch's end or within one; `say` is told of those that do not.

    Raises:
        DataError: there are some, and all are damaged.
    """
    return checkpoint.newest(run.checkpoints, run.steps, say=say)


def save(
    run: Run, progress: Progress, metadata: Mapping[str, Any], system: System, training: Mapping[str, Any]
) -> Path:
    """Publish a checkpoint of this moment; `training` holds the states of optimizer and scaler."""
    within = {"step": progress.step, "epoch_seconds": progress.epoch_seconds, "seconds": progress.seconds}
    tensors = {"sums": progress.sums, "overflows": progress.overflows}
    folder = (run.steps if progress.step else run.checkpoints) / progress.name
    checkpoint.save(folder, system.state_dict(), metadata, {**training, "within": within | tensors})
    if progress.step:
        names = sorted(path.name for path in run.steps.glob("epoch_*"))
        checkpoint.prune(run.steps, keep=names[-KEEP_STEPS:])
    return folder


def restore(
    folder: Path,
    system: System,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
) -> Progress:
    """Load weights and the states of optimizer and scaler from a checkpoint, and say how far it had come."""
    system.load_state_dict(checkpoint.weights(folder))
    saved = checkpoint.training_state(folder)
    load_optimizer(optimizer, saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    within = saved["within"]
    return Progress(
        history=checkpoint.metadata(folder)["history"],
        step=within["step"],
        sums={name: value.to(device) for name, value in within["sums"].items()},
        overflows=within["overflows"].to(device),
        epoch_seconds=within["epoch_seconds"],
        seconds=within["seconds"],
    )


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load its state as this device has it, wherever the run began: a fused kernel wants the count of steps beside the
    weights, and all that it keeps of a weight in that weight's memory format."""
    if "fused" in optimizer.defaults:
        for group in saved["param_groups"]:
            group["fused"] = optimizer.defaults["fused"]
    optimizer.load_state_dict(saved)
    for weight, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                kept[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def check_data(folder: Path, prepared: Prepared, run: Run) -> None:
    """Raises DataError if a checkpoint was trained on other data than is prepared now."""
    trained_on = checkpoint.metadata(folder)["data"]
    if trained_on != batches.dataset_identity(prepared):
        raise DataError(
            f"run '{run.name}' was trained on data {trained_on}, and what is prepared now is another: "
            f"{batches.dataset_identity(prepared)}. Prepare the same data again, or start a new run."
        )
