"""AdamW over named parameters, and its schedule as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from setwise.pipelines.recipe import OptimizerConfig


def make(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on everything, as the authors use it.

    Parameters are in the order of their names: optimizer state is stored by position, so that order must never depend
    on how a set happens to be iterated.
    """
    parameters = [parameter for _, parameter in sorted(module.named_parameters()) if parameter.requires_grad]
    on_gpu = all(parameter.is_cuda for parameter in parameters)
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=on_gpu)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of update `step` of `steps`, counted from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
