"""Slots that compete for the inputs: the aggregation block of set prediction (Kim, Kim, Kwak, CVPR 2023; in several
heads and pre-norm, as the authors' published code has it).

Shape suffixes: B samples, N inputs, X width of an input, K slots, D width of a slot, H heads, C width of a head.
"""

from typing import Literal

import torch
from torch import Tensor, nn

Padding = Literal["exact", "official"]


class SlotAttention(nn.Module):
    """One block, applied again and again with the same weights: slots attend to the inputs, then pass through an MLP.

    The softmax runs over the slots, so that they compete for every input; afterwards each slot's attention is
    normalised over the inputs. `read` makes keys and values, which do not depend on the slots, once for all iterations.

    `padding` says what padded inputs receive. "exact": nothing, so that a sample's result does not depend on how far it
    was padded. "official": 1/K from every slot, as in that code, which masks before the
    softmax over slots instead of after it; only for reproducing the numbers of weights trained that way.
    """

    def __init__(
        self,
        slot_dim: int,
        input_dim: int,
        *,
        heads: int,
        head_dim: int,
        ff_mult: int,
        dropout: float,
        padding: Padding = "exact",
    ) -> None:
        super().__init__()
        inner_dim = heads * head_dim
        self.heads = heads
        self.padding = padding
        self.slot_norm = nn.LayerNorm(slot_dim)
        self.input_norm = nn.LayerNorm(input_dim)
        self.to_query = nn.Linear(slot_dim, inner_dim, bias=False)
        self.to_key = nn.Linear(input_dim, inner_dim, bias=False)
        self.to_value = nn.Linear(input_dim, inner_dim, bias=False)
        self.to_update = nn.Sequential(nn.Linear(inner_dim, slot_dim), nn.Dropout(dropout))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(slot_dim),
            nn.Linear(slot_dim, ff_mult * slot_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(ff_mult * slot_dim, slot_dim),
        )

    def read(self, inputs: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values (B,H,N,C) of `inputs` (B,N,X); a position code (B,N,X) or (N,X) enters the keys only."""
        normed_BNX = self.input_norm(inputs)
        key_BNX = normed_BNX if positions is None else normed_BNX + positions
        return self._split_heads(self.to_key(key_BNX)), self._split_heads(self.to_value(normed_BNX))

    def forward(
        self, slots: Tensor, keys: Tensor, values: Tensor, is_padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The next `slots` (B,K,D) and the attention (B,H,K,N) that made them, which sums to 1 over the inputs.

        `keys` and `values` come from `read`; `is_padding` (B,N) bool is True where there is no input.
        """
        query_BHKC = self._split_heads(self.to_query(self.slot_norm(slots)))
        logits_BHKN = query_BHKC @ keys.transpose(-1, -2) * query_BHKC.shape[-1] ** -0.5
        precise = torch.promote_types(logits_BHKN.dtype, torch.float32)  # sums to 1 in half precision too
        attention_BHKN = logits_BHKN.softmax(dim=2, dtype=precise)
        if is_padding is not None:
            share = 0.0 if self.padding == "exact" else 1 / slots.shape[1]
            attention_BHKN = attention_BHKN.masked_fill(is_padding[:, None, None, :], share)
        attention_BHKN = attention_BHKN / (attention_BHKN.sum(-1, keepdim=True) + 1e-7)
        update_BHKC = attention_BHKN.to(values.dtype) @ values
        slots = slots + self.to_update(update_BHKC.transpose(1, 2).flatten(2))
        return slots + self.feed_forward(slots), attention_BHKN

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)
