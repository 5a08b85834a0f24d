"""The aggregation block as its steps read: one head, slot and input after another, padding cut off beforehand."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from setwise.models.slot_attention import SlotAttention


def attend(block: SlotAttention, slots_KD: Tensor, inputs_NX: Tensor, positions_NX: Tensor) -> Tensor:
    """The next slots (K,D) of one sample, whose inputs (N,X) hold no padding; without dropout."""
    normed_NX = block.input_norm(inputs_NX)
    query, key = block.to_query(block.slot_norm(slots_KD)), block.to_key(normed_NX + positions_NX)
    value = block.to_value(normed_NX)
    width = query.shape[1] // block.heads
    heads = []
    for head in range(block.heads):
        part = slice(head * width, (head + 1) * width)
        columns = []  # one input's attention from each of the slots that compete for it
        for n in range(len(inputs_NX)):
            logits = [(query[k, part] * key[n, part]).sum() / math.sqrt(width) for k in range(len(slots_KD))]
            total = sum(logit.exp() for logit in logits)
            columns.append([logit.exp() / total for logit in logits])
        updates = []
        for k in range(len(slots_KD)):
            mass = sum(column[k] for column in columns) + 1e-7
            updates.append(sum(column[k] / mass * value[n, part] for n, column in enumerate(columns)))
        heads.append(torch.stack(updates))
    slots_KD = slots_KD + block.to_update(torch.cat(heads, dim=1))
    forward = block.feed_forward
    change: Tensor = forward.output(F.gelu(forward.hidden(forward.norm(slots_KD))))
    return slots_KD + change
