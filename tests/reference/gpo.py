"""Generalised pooling as it reads: one sample without padding, one GRU step, place and channel after another."""

import math

import torch
from torch import Tensor, nn

from setwise.models.gpo import SortedPooling


def pool(operator: SortedPooling, inputs_ND: Tensor) -> Tensor:
    """The pooled vector (D,) of one sample's inputs."""
    weights = place_weights(operator, len(inputs_ND))
    channels = []
    for d in range(inputs_ND.shape[1]):
        values = sorted((inputs_ND[n, d] for n in range(len(inputs_ND))), key=lambda value: value.item(), reverse=True)
        channels.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
    return torch.stack(channels)


def place_weights(operator: SortedPooling, count: int) -> list[Tensor]:
    """The weights of the largest, the next, ... of `count` values."""
    codes = []
    for place in range(count):
        code = []
        for pair in range(operator.position_dim // 2):
            angle = place / 10_000 ** (2 * pair / operator.position_dim)
            code += [math.sin(angle), math.cos(angle)]
        codes.append(torch.tensor(code, dtype=torch.float64))
    ahead, back = states(operator.ahead, codes), states(operator.back, codes[::-1])[::-1]
    row_H = operator.logit.weight[0]
    logits = [(row_H * (a + b) / 2).sum() / operator.temperature for a, b in zip(ahead, back, strict=True)]
    total = sum(logit.exp() for logit in logits)
    return [logit.exp() / total for logit in logits]


def states(gru: nn.GRU, inputs: list[Tensor]) -> list[Tensor]:
    """Of a GRU that reads `inputs` in their order: reset, update and new gates in the order of torch's weights."""
    hidden = torch.zeros(gru.hidden_size, dtype=torch.float64)
    found = []
    for x in inputs:
        of_input = (gru.weight_ih_l0 @ x + gru.bias_ih_l0).chunk(3)
        of_state = (gru.weight_hh_l0 @ hidden + gru.bias_hh_l0).chunk(3)
        reset, update = (1 / (1 + (-a - b).exp()) for a, b in list(zip(of_input, of_state, strict=True))[:2])
        new = (of_input[2] + reset * of_state[2]).tanh()
        hidden = (1 - update) * new + update * hidden
        found.append(hidden)
    return found
