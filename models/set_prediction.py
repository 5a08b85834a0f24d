"""Set prediction: K slots read the local features T times, the global feature is added, and K unit vectors come out
(Kim, Kim, Kwak, "Improving Cross-Modal Retrieval with Set of Diverse Embeddings", CVPR 2023).

Shape suffixes: B samples, N inputs, X width of an input, K slots, D width of an embedding, H heads.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setwise.models.config import Positions, SetPredictionConfig
from setwise.models.slot_attention import Padding, SlotAttention


class Features(NamedTuple):
    """What an encoder hands over for a batch."""

    local: Tensor
    """(B,N,X): regions, grid cells or words; what stands at padding is ignored."""
    pooled: Tensor
    """(B,D): the global feature."""
    lengths: Tensor | None = None
    """(B,) how many of the N are real, on the device of `local`; None where all are."""
    grid: tuple[int, int] | None = None
    """Rows and columns, where the N lie on a grid."""


class SetEmbedding(NamedTuple):
    """The sets of a batch, and how they came about."""

    sets: Tensor
    """(B,K,D) unit vectors."""
    slots: Tensor
    """(B,K,D) slots after the last layer normalisation, before the global feature is added; diversity reads them."""
    attention: tuple[Tensor, ...] = ()
    """(B,H,K,N) of each iteration, if asked for."""


class SetPrediction(nn.Module):
    """out_k = normalise(LN(global) + LN(slot_k after T iterations)). Raises ValueError where a position code does not
    fit the width of the features."""

    def __init__(
        self,
        config: SetPredictionConfig,
        embed_size: int,
        input_dim: int,
        positions: Positions,
        padding: Padding = "exact",
    ) -> None:
        super().__init__()
        self.iterations = config.iterations
        self.positions = positions
        self.padding = padding
        self.slots = nn.Parameter(torch.randn(config.num_slots, embed_size))
        self.block = SlotAttention(
            embed_size,
            input_dim,
            heads=config.heads,
            head_dim=config.head_dim,
            ff_mult=config.ff_mult,
            dropout=config.dropout,
            padding=padding,
        )
        self.slot_norm = nn.LayerNorm(embed_size)
        self.global_norm = nn.LayerNorm(embed_size)

    def forward(self, features: Features, keep_attention: bool = False) -> SetEmbedding:
        """The sets of `features`; with `keep_attention` also the attention of every iteration, for looking at."""
        num_inputs = features.local.shape[1]
        is_padding_BN = None
        if features.lengths is not None:
            is_padding_BN = torch.arange(num_inputs, device=features.local.device) >= features.lengths[:, None]
        keys, values = self.block.read(features.local, self._position_code(features))
        slots_BKD = self.slots.expand(len(features.local), -1, -1)
        maps = []
        for _ in range(self.iterations):
            slots_BKD, attention_BHKN = self.block(slots_BKD, keys, values, is_padding_BN)
            if keep_attention:
                maps.append(attention_BHKN.detach())
        slots_BKD = self.slot_norm(slots_BKD)
        sets_BKD = F.normalize(self.global_norm(features.pooled)[:, None] + slots_BKD, dim=-1)
        return SetEmbedding(sets_BKD, slots_BKD, tuple(maps))

    def _position_code(self, features: Features) -> Tensor | None:
        if self.positions == "none":
            return None
        local = features.local
        if features.grid is not None:
            code = sine_code_2d(*features.grid, local.shape[-1], local.device)
        else:
            # "official": every position counts as a share of the padded length, as in the authors' code.
            lengths = None if self.padding == "official" else features.lengths
            code = sine_code_1d(local.shape[1], local.shape[-1], local.device, lengths)
        return code.to(local.dtype)


def sine_code_1d(num: int, width: int, device: torch.device | None = None, lengths: Tensor | None = None) -> Tensor:
    """Sine code of positions 1..num as shares of `num`, (num,width), or of each sample's `lengths` (B,): (B,num,width).

    The code of the DETR detector: an angle of 2 pi for the last position, divided channel by channel by up to
    10,000; sines in even channels, cosines in odd ones.
    """
    positions_N = torch.arange(1, num + 1, dtype=torch.float32, device=device)
    if lengths is None:
        return _sine_code(positions_N / num, width)
    return _sine_code(positions_N / lengths[:, None].clamp(min=1), width)


def sine_code_2d(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Sine code of a grid, row by row, (rows * columns, width): the first half of the channels says which row, the
    second which column."""
    row_code = sine_code_1d(rows, width // 2, device)[:, None].expand(-1, columns, -1)
    column_code = sine_code_1d(columns, width // 2, device)[None].expand(rows, -1, -1)
    return torch.cat((row_code, column_code), dim=-1).flatten(0, 1)


def _sine_code(share: Tensor, width: int) -> Tensor:
    """`share` (...) of the way, 0..1, to (...,width)."""
    if width % 2:
        raise ValueError(f"a sine code is made of pairs and needs an even width along each axis, got {width}")
    wavelength = 10_000 ** (torch.arange(0, width, 2, dtype=share.dtype, device=share.device) / width)
    angle = 2 * math.pi * share[..., None] / wavelength
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)
