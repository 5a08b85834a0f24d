"""AdamP (Heo et al., 2021, "AdamP: Slowing down the slowdown for momentum optimizers on scale-invariant weights").

Where a normalisation follows, the length of a weight has no effect, and an update along the weight only makes later
updates smaller. Gradients of such weights are orthogonal to them, which is how they are noticed; from an update of
theirs the part along the weight is taken away. Other weights learn as in AdamW.

It is written here since the packages that have it decide this for one weight at a time on the host, which waits for a
GPU up to twice a weight; here nothing is read back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

ORTHOGONAL = 0.1
"""Cosine of weight and gradient, in multiples of 1/sqrt(dimension), below which they count as orthogonal."""
DECAY_SHARE = 0.1
"""Of the weight decay, that weights keep whose length has no effect."""


class AdamP(torch.optim.Optimizer):
    """Adam with projected updates; weight decay apart from the gradient, as in AdamW.

    A weight of two dimensions or more is looked at row by row (as the channels of a layer are normalised), then as one
    vector; all rows have to be orthogonal to their gradients. Biases and gains are never projected.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient. No `closure` is called, so there must be none."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    _update(weight, weight.grad, self.state[weight], group)


def _update(weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state |= {"step": 0, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
    state["step"] += 1
    first, second = group["betas"]
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(gradient, 1 - first)
    square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    root = (square / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
    update = mean / root
    decay = group["lr"] * group["weight_decay"]
    if weight.dim() > 1:
        part, projected = _part_along(weight, gradient, update, group["eps"])
        update.sub_(part * weight)
        weight.mul_(1 - decay * (1 - (1 - DECAY_SHARE) * projected))
    else:
        weight.mul_(1 - decay)
    weight.add_(update, alpha=-group["lr"] / (1 - first ** state["step"]))


def _part_along(weight: Tensor, gradient: Tensor, update: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What is to be taken away from `update`, in multiples of `weight`: one for each row, 0 where a gradient is not
    orthogonal; and whether anything is, a scalar, 1 or 0 in the type of `weight`."""
    w, g, u = (tensor.reshape(len(weight), -1) for tensor in (weight, gradient, update))
    w_lengths, g_lengths = w.norm(dim=1), g.norm(dim=1)
    wg, wu = (w * g).sum(1), (w * u).sum(1)

    def orthogonal(products: Tensor, lengths: Tensor, others: Tensor, dimension: int) -> Tensor:
        cosines = products.abs() / (lengths.clamp(min=eps) * others.clamp(min=eps))
        return cosines.max() < ORTHOGONAL / math.sqrt(dimension)

    w_length = w_lengths.norm()
    rows = orthogonal(wg, w_lengths, g_lengths, w.shape[1])
    whole = orthogonal(wg.sum(), w_length, g_lengths.norm(), w.numel())
    of_rows = wu / w_lengths.clamp(min=eps).square()
    of_whole = wu.sum() / w_length.clamp(min=eps).square()
    none = torch.zeros_like(of_whole)
    parts = torch.where(rows, of_rows, torch.where(whole, of_whole, none))
    return parts.reshape(-1, *[1] * (weight.dim() - 1)), (rows | whole).to(weight.dtype)
