"""AdamW over named groups of parameters, and its schedule as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from setwise.pipelines.recipe import OptimizerConfig

BACKBONE = "retriever.image_encoder.backbone."


def make(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on everything, as the authors use it; each group has its own multiple of the rate.

    Parameters are in the order of their names: optimizer state is stored by position, so that order must never depend
    on how a set happens to be iterated.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in sorted(module.named_parameters()):
        if parameter.requires_grad:
            groups.setdefault(_scale(name, config), []).append(parameter)
    on_gpu = all(parameter.is_cuda for parameters in groups.values() for parameter in parameters)
    return torch.optim.AdamW(
        [{"params": parameters, "scale": scale} for scale, parameters in groups.items()],
        lr=config.lr,
        weight_decay=config.weight_decay,
        fused=on_gpu,
    )


def _scale(name: str, config: OptimizerConfig) -> float:
    """Multiple of the learning rate for a parameter: of the four groups of the authors' code (method: section 4)."""
    scales = {
        BACKBONE: config.backbone_scale,
        "retriever.image_": config.image_scale,
        "retriever.text_sets.": config.text_sets_scale,
        "retriever.text_encoder.": config.text_scale,
    }
    return next((scale for begin, scale in scales.items() if name.startswith(begin)), 1.0)


def freeze(module: nn.Module, config: OptimizerConfig, epoch: int) -> bool:
    """Let the image backbone stand still in the first `frozen_backbone_epochs`, statistics of its normalisations
    included, and learn from then on. To be called once `module` is in training mode.

    Returns:
        Whether other parameters learn now than before.
    """
    learns = epoch > config.frozen_backbone_epochs
    changed = False
    for name, parameter in module.named_parameters():
        if name.startswith(BACKBONE) and parameter.requires_grad != learns:
            parameter.requires_grad_(learns)
            changed = True
    if not learns and any(name.startswith(BACKBONE) for name, _ in module.named_parameters()):
        module.get_submodule(BACKBONE.removesuffix(".")).eval()
    return changed


def learning_rate(config: OptimizerConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """Learning rate of update `step` of `steps`, counted from 0, for a group of scale 1."""
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


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value * group["scale"]
