"""Set prediction as the authors formulate it: every iteration normalises the inputs and projects all of them to keys
and values again. The yardstick of the faster formulation, with the weights of a module of ours.

Shape suffixes: B samples, N inputs, X width of an input, K slots, D width of an embedding, H heads, C width of a head.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from setwise.models.set_prediction import Features, SetPrediction


def official_sets(module: SetPrediction, features: Features, code: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sets and the slots, (B,K,D) each, that `module` makes of `features` without dropout.

    `code` (N,X) or (B,N,X) is the position code. Padding is treated as the module's setting says.
    """
    block, heads = module.block, module.block.heads

    def split(x: Tensor) -> Tensor:  # (B,·,H*C) to (B,H,·,C)
        return x.view(*x.shape[:2], heads, block.head_dim).transpose(1, 2)

    slots_BKD = module.slots.repeat(len(features.local), 1, 1)
    for _ in range(module.iterations):
        normed_BNX = block.input_norm(features.local)
        query_BHKC = split(block.to_query(block.slot_norm(slots_BKD)))
        key_BHNC = split(block.to_key(normed_BNX if code is None else normed_BNX + code))
        value_BHNC = split(block.to_value(normed_BNX))
        logits_BHKN = torch.einsum("bhkc,bhnc->bhkn", query_BHKC, key_BHNC) * query_BHKC.shape[-1] ** -0.5
        attention_BHKN = logits_BHKN.softmax(dim=2)
        if features.is_padding is not None:
            share = 0.0 if module.padding == "exact" else 1 / slots_BKD.shape[1]
            attention_BHKN = attention_BHKN.masked_fill(features.is_padding[:, None, None], share)
        attention_BHKN = attention_BHKN / (attention_BHKN.sum(-1, keepdim=True) + 1e-7)
        update_BHKC = torch.einsum("bhkn,bhnc->bhkc", attention_BHKN, value_BHNC)
        slots_BKD = slots_BKD + block.to_update(update_BHKC.transpose(1, 2).flatten(2))
        hidden = F.gelu(block.feed_forward.hidden(block.feed_forward.norm(slots_BKD)))
        slots_BKD = slots_BKD + block.feed_forward.output(hidden)
    slots_BKD = module.slot_norm(slots_BKD)
    return F.normalize(module.global_norm(features.pooled)[:, None] + slots_BKD, dim=-1), slots_BKD
