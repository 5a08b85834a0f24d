"""Slot Attention's original module as its algorithm reads: one slot and input after another; padding is cut off before.

Only layers' weights are taken from the module; the GRU cell is written out.
"""

import math

import torch
from torch import Tensor

from setwise.models.slot_autoencoder import RecurrentSlotAttention


def read(module: RecurrentSlotAttention, slots_KD: Tensor, inputs_NX: Tensor) -> Tensor:
    """The slots (K,D) of one sample after all iterations, from the first ones."""
    normed_NX = module.input_norm(inputs_NX)
    key_ND, value_ND = module.to_key(normed_NX), module.to_value(normed_NX)
    for _ in range(module.iterations):
        query_KD = module.to_query(module.slot_norm(slots_KD))
        columns = []  # one input's attention from each of the slots that compete for it
        for key in key_ND:
            logits = [(query * key).sum() / math.sqrt(len(key)) for query in query_KD]
            total = sum(logit.exp() for logit in logits)
            columns.append([logit.exp() / total + 1e-8 for logit in logits])
        slots = []
        for k, slot in enumerate(slots_KD):
            mass = sum(column[k] for column in columns)
            update = sum(column[k] / mass * value for column, value in zip(columns, value_ND, strict=True))
            slots.append(gated(module.gru, update, slot))
        slots_KD = torch.stack(slots)
        slots_KD = slots_KD + module.output(module.hidden(module.mlp_norm(slots_KD)).clamp(min=0))
    return slots_KD


def gated(cell: torch.nn.GRUCell, update_D: Tensor, state_D: Tensor) -> Tensor:
    """The next state of a GRU."""
    from_update = (cell.weight_ih @ update_D + cell.bias_ih).chunk(3)
    from_state = (cell.weight_hh @ state_D + cell.bias_hh).chunk(3)
    reset, keep = ((from_update[gate] + from_state[gate]).sigmoid() for gate in (0, 1))
    candidate = (from_update[2] + reset * from_state[2]).tanh()
    return (1 - keep) * candidate + keep * state_D
