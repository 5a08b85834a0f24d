"""The optimizer over named groups of parameters, and its schedule as a pure function of what is known at a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from setwise.pipelines.adamp import AdamP
from setwise.pipelines.lookahead import look_ahead
from setwise.pipelines.recipe import OptimizerConfig

BACKBONE = "image_encoder.backbone."
"""Of names within a model: the beginning of those of the image backbone."""


def make(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The recipe's, with weight decay on everything, as the authors of DivE use AdamW; each group has its own multiple
    of the rate. AdamW and AdamP decay weights apart from the gradient; to Adam and SGD decay is part of the gradient.

    Parameters are in the order of their names: optimizer state is stored by position, so that order must never depend
    on how a set happens to be iterated.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in sorted(module.named_parameters()):
        if parameter.requires_grad:
            groups.setdefault(_scale(name, config), []).append(parameter)
    on_gpu = all(parameter.is_cuda for parameters in groups.values() for parameter in parameters)
    fused = on_gpu and config.lookahead_steps is None
    parameters = [{"params": parameters, "scale": scale} for scale, parameters in groups.items()]
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    made: torch.optim.Optimizer
    match config.kind:
        case "adamw":
            made = torch.optim.AdamW(parameters, **common, amsgrad=config.amsgrad, fused=fused)
        case "adam":
            made = torch.optim.Adam(parameters, **common, amsgrad=config.amsgrad, fused=fused)
        case "adamp":
            made = AdamP(parameters, **common)
        case "sgd":
            made = torch.optim.SGD(parameters, **common, momentum=config.momentum, fused=fused)
    if config.lookahead_steps is not None:
        look_ahead(made, config.lookahead_steps, config.lookahead_alpha)
    return made


def _scale(name: str, config: OptimizerConfig) -> float:
    """Multiple of the learning rate for a parameter: of the four groups of the authors' code (method: section 4)."""
    if name.startswith("similarity."):  # which belongs to neither side
        return 1.0
    scales = {
        BACKBONE: config.backbone_scale,
        "image_": config.image_scale,
        "text_sets.": config.text_sets_scale,
        "text_encoder.": config.text_scale,
    }
    return next((scale for begin, scale in scales.items() if _within(name).startswith(begin)), 1.0)


def _within(name: str) -> str:
    """A parameter's name within its model, whatever the system calls that: `retriever.`, `captioner.`"""
    return name.partition(".")[2]


def freeze(module: nn.Module, config: OptimizerConfig, epoch: int) -> bool:
    """Let the image backbone stand still in the first `frozen_backbone_epochs`, statistics of its normalisations
    included, and learn from then on. To be called once `module` is in training mode.

    Returns:
        Whether other parameters learn now than before.
    """
    learns = epoch > config.frozen_backbone_epochs
    changed = False
    for name, parameter in module.named_parameters():
        if _within(name).startswith(BACKBONE) and parameter.requires_grad != learns:
            parameter.requires_grad_(learns)
            changed = True
    if not learns:
        for name, part in module.named_modules():
            if _within(name) == BACKBONE.removesuffix("."):
                part.eval()
    return changed


def learning_rate(
    config: OptimizerConfig, step: int, steps: int, steps_per_epoch: int, measured: Sequence[float] = ()
) -> float:
    """Learning rate of update `step` of `steps`, counted from 0, for a group of scale 1.

    Args:
        measured: the validation metric after each epoch; of those before this update at least.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    match config.schedule:
        case "constant":
            return config.lr
        case "step":
            return config.lr * float(config.step_factor ** (step // steps_per_epoch // config.step_epochs))
        case "cosine":
            progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
            return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        case "plateau":
            times = _plateaus(measured[: step // steps_per_epoch], config.plateau_patience)
            return config.lr * float(config.step_factor**times)


def _plateaus(measured: Sequence[float], patience: int) -> int:
    """How often more than `patience` epochs went by without a better value than all before; each time, the count of
    such epochs starts again, as torch's ReduceLROnPlateau has it. A value that is not a number is not better."""
    best, without, times = -math.inf, 0, 0
    for value in measured:
        if value > best:
            best, without = value, 0
        else:
            without += 1
        if without > patience:
            times, without = times + 1, 0
    return times


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value * group["scale"]
