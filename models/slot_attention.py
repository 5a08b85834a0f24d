"""Slots that compete for the inputs: the aggregation block of set prediction (Kim, Kim, Kwak, CVPR 2023; in several
heads and pre-norm, as the authors' published code has it).

Shape suffixes: B samples, N inputs, X width of an input, K slots, D width of a slot, H heads, C width of a head.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setwise.models.dropout import SampleDropout, sample_normal

Padding = Literal["exact", "official"]


class Inputs(NamedTuple):
    """What every iteration reads, made once by `SlotAttention.read`."""

    keys: Tensor
    """(B,N,X): normalised inputs and their position code, which the key projection is meant for."""
    values: Tensor
    """(B,N,X): normalised inputs, which the value projection is meant for."""
    is_padding: Tensor | None
    """(B,N) bool, True where there is no input."""


def compete(
    logits: Tensor,
    is_padding: Tensor | None = None,
    *,
    padded_share: float = 0.0,
    added: float = 0.0,
    floor: float = 1e-7,
) -> Tensor:
    """The attention (...,K,N) of slots that compete for inputs, of its `logits`: shares of each input, by a softmax
    over the K slots, and then divided by their sum over the N inputs, which is 1 in the end.

    Args:
        is_padding: bool, broadcast to the logits, True where there is no input.
        padded_share: what every slot has of padding, before the division.
        added: to the share of each input that is there, as Locatello et al. do, for a slot that nothing is left to.
        floor: added to the sum, as Kim et al. do, for the same reason.
    """
    attention = logits.softmax(-2)
    if added:
        attention = attention + added
    if is_padding is not None:
        attention = attention.masked_fill(is_padding, padded_share)
    return attention / (attention.sum(-1, keepdim=True) + floor)


def draw_slots(
    mu: Tensor, log_sigma: Tensor, fixed: Tensor, drawn: tuple[int, Tensor | None] | None, salt: int
) -> Tensor:
    """First slots from one normal distribution (Locatello et al., NeurIPS 2020): `mu` and `log_sigma` (1,1,D).

    Args:
        fixed: (K,D), the draws of evaluation.
        drawn: in training, of how many samples B, and their keys (B,) as in `SampleDropout`; None in evaluation.
        salt: tells them, and with it `salt + 1`, from other random numbers of the same samples.

    Returns:
        (B,K,D) in training, (1,K,D) in evaluation: all samples begin with the same.
    """
    noise = fixed[None]
    if drawn is not None:
        batch, keys = drawn
        if keys is None:
            noise = torch.randn(batch, *fixed.shape, device=fixed.device)
        else:
            noise = sample_normal(keys, tuple(fixed.shape), salt)
    return mu + log_sigma.exp() * noise.to(mu.dtype)


class FeedForward(nn.Module):
    """Layer normalisation and an MLP with one hidden layer, over the last dimension."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, hidden)
        self.dropout = SampleDropout(dropout)
        self.output = nn.Linear(hidden, width)

    def forward(self, x: Tensor, keys: Tensor | None = None, call: int = 0) -> Tensor:
        """(B,...,width) to the same; `keys` (B,) and `call` as in `SampleDropout`."""
        hidden = F.gelu(self.hidden(self.norm(x)))
        return self.output(self.dropout(hidden, keys, call))  # type: ignore[no-any-return]


class SlotAttention(nn.Module):
    """One block, applied again and again with the same weights: slots attend to the inputs, then pass through an MLP.

    The softmax runs over the slots, so that they compete for every input; afterwards each slot's attention is
    normalised over the inputs.

    Keys and values of the inputs are never formed. Slots are few and inputs many, so each head's key projection is
    applied to the slots' queries, q (W x) = (q W) x, and its value projection to the attention's sums,
    sum_n a_n (V x_n) = V sum_n a_n x_n: the same function with a fraction of the multiplications.

    `padding` says what padded inputs receive. "exact": nothing, so that a sample's result does not depend on how far it
    was padded, nor on what stands there. "official": 1/K from every slot, as in that code, which masks before the
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
        self.head_dim = head_dim
        self.padding = padding
        self.slot_norm = nn.LayerNorm(slot_dim)
        self.input_norm = nn.LayerNorm(input_dim)
        self.to_query = nn.Linear(slot_dim, inner_dim, bias=False)
        self.to_key = nn.Linear(input_dim, inner_dim, bias=False)
        self.to_value = nn.Linear(input_dim, inner_dim, bias=False)
        self.to_update = nn.Linear(inner_dim, slot_dim)
        self.update_dropout = SampleDropout(dropout)
        self.feed_forward = FeedForward(slot_dim, ff_mult * slot_dim, dropout)

    def read(self, inputs: Tensor, positions: Tensor | None = None, is_padding: Tensor | None = None) -> Inputs:
        """Prepare `inputs` (B,N,X) for all iterations; a position code (B,N,X) or (N,X) enters the keys only."""
        if is_padding is not None and self.padding == "exact":
            inputs = inputs.masked_fill(is_padding[..., None], 0)  # or a NaN there would pass through 0 * NaN
        values_BNX = self.input_norm(inputs)
        device = values_BNX.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            # Once: autocast would make a copy in every iteration, and autograd would keep them all.
            values_BNX = values_BNX.to(torch.get_autocast_dtype(device))
        # Adding the code to the inputs takes as long as adding its logits to theirs in every iteration, and is simpler.
        keys_BNX = values_BNX if positions is None else values_BNX + positions.to(values_BNX.dtype)
        return Inputs(keys_BNX, values_BNX, is_padding)

    def forward(
        self, slots: Tensor, inputs: Inputs, keys: Tensor | None = None, call: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The next `slots` (B,K,D) and the attention (B,H,K,N) that made them, which sums to 1 over the inputs.

        `slots` (B,K,D), or (1,K,D) where all samples begin with the same: their queries are then computed once.
        `inputs` come from `read`. `keys` (B,) are the samples' own for dropout, and `call` says which iteration this
        is, as in `SampleDropout`.
        """
        batch, num_inputs, width = inputs.values.shape
        num_slots, by_head = slots.shape[1], (self.heads, self.head_dim, width)
        query_BKHC = self.to_query(self.slot_norm(slots)).view(slots.shape[0], num_slots, *by_head[:2])
        query_BHKX = torch.einsum("bkhc,hcx->bhkx", query_BKHC * self.head_dim**-0.5, self.to_key.weight.view(by_head))
        logits = query_BHKX.flatten(1, 2) @ inputs.keys.transpose(1, 2)
        logits_BHKN = logits.view(batch, self.heads, num_slots, num_inputs)
        precise = torch.promote_types(logits_BHKN.dtype, torch.float32)  # sums to 1 in half precision too
        is_padding = None if inputs.is_padding is None else inputs.is_padding[:, None, None, :]
        share = 0.0 if self.padding == "exact" else 1 / num_slots
        attention_BHKN = compete(logits_BHKN.to(precise), is_padding, padded_share=share)
        sums = attention_BHKN.flatten(1, 2).to(inputs.values.dtype) @ inputs.values
        sums = sums.view(batch, self.heads, num_slots, width).transpose(0, 1).reshape(self.heads, -1, width)
        update = self.to_value.weight.view(by_head) @ sums.transpose(1, 2)
        update_BKHC = update.view(self.heads, self.head_dim, batch, num_slots).permute(2, 3, 0, 1)
        slots = slots + self.update_dropout(self.to_update(update_BKHC.flatten(2)), keys, call)
        return slots + self.feed_forward(slots, keys, call), attention_BHKN
