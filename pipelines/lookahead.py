"""Lookahead (Zhang et al., 2019, "Lookahead Optimizer: k steps forward, 1 step back", algorithm 1).

Beside the weights that an optimizer moves, the fast ones, there are slow ones. After every k updates the slow weights
go a part of the way to the fast ones, and the fast ones go on from there; the optimizer keeps what it remembers.

Slow weights start as the initial weights, as in the paper. Packages that have Lookahead start them as the fast weights
of the k-th update, so that the first of the steps back is none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SLOW = "slow"
"""The name of a weight's slow counterpart among what an optimizer remembers of it."""
COUNT = "lookahead_count"
"""The name of the number of updates in a group's settings."""


def look_ahead(optimizer: torch.optim.Optimizer, steps: int, alpha: float) -> None:
    """From now on let slow weights go the part `alpha` of the way to those of `optimizer` after every `steps` updates.

    Slow weights and the count are part of the optimizer's state, and so are kept and restored with it. An update that
    is left out (fp16) does not count, so a fused optimizer will not do: that one leaves out updates unseen.
    """
    initial: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        group[COUNT] = 0

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Not yet in the state: an optimizer sets up what it remembers of a weight where that is still empty.
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and SLOW not in optimizer.state[weight]:
                    initial[weight] = weight.detach().clone()

    @torch.no_grad()
    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for weight, value in initial.items():
            optimizer.state[weight][SLOW] = value
        initial.clear()
        for group in optimizer.param_groups:
            group[COUNT] += 1
            if group[COUNT] % steps == 0:
                for weight in group["params"]:
                    if (slow := optimizer.state[weight].get(SLOW)) is not None:
                        weight.copy_(slow.lerp_(weight, alpha))

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
