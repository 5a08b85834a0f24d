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
from setwise.models.slot_attention import Padding, SlotAttention, draw_slots

MAX_GRID, MAX_SEQUENCE = 50, 100
"""Sizes of the learned position tables, as in the authors' code: rows and columns, and positions in a row."""


class Features(NamedTuple):
    """What an encoder hands over for a batch."""

    local: Tensor
    """(B,N,X): regions, grid cells or words; what stands at padding is ignored."""
    pooled: Tensor
    """(B,D): the global feature."""
    is_padding: Tensor | None = None
    """(B,N) bool, True where there is no input; None where all are real."""
    grid: tuple[int, int] | None = None
    """Rows and columns, where the N lie on a grid."""


class SetEmbedding(NamedTuple):
    """The sets of a batch, and how they came about."""

    sets: Tensor
    """(B,K,D) unit vectors, but for probabilistic embeddings and the fragments of cross-attention."""
    slots: Tensor
    """(B,K,D) slots after the last layer normalisation, before the global feature is added; diversity reads them."""
    attention: tuple[Tensor, ...] = ()
    """(B,H,K,N) of each iteration, if asked for."""
    slot_iterations: tuple[Tensor, ...] = ()
    """(B,K,D) slots after each iteration, before the last layer normalisation, if attention is asked for."""
    log_sigma: Tensor | None = None
    """(B,1,D) logarithm of the standard deviation, of probabilistic embeddings, whose mean `slots` (B,1,D) are."""


class SetPrediction(nn.Module):
    """out_k = normalise(LN(global) + LN(slot_k after T iterations)).

    The first slots are "learned", K vectors that all samples begin with, or "sampled" from one learned normal
    distribution (Slot Attention; Locatello et al., NeurIPS 2020): in training anew for each sample, in evaluation
    always the same K draws, which were made with the module and are part of its state. With new draws in evaluation,
    a sample's set would depend on chance and on the samples computed before it: an index could not be computed again,
    and no two evaluations would agree.

    `grid` says whether learned positions are those of grid cells; a sine code learns it from the features. Raises
    ValueError where a position code does not fit the width of the features.
    """

    noise: Tensor

    def __init__(
        self,
        config: SetPredictionConfig,
        embed_size: int,
        input_dim: int,
        positions: Positions,
        padding: Padding = "exact",
        *,
        grid: bool = False,
    ) -> None:
        super().__init__()
        self.iterations = config.iterations
        self.positions = positions
        self.padding = padding
        self.sampled = config.slots == "sampled"
        if self.sampled:
            self.slots_mu = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, embed_size))[None])
            self.slots_log_sigma = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, embed_size))[None])
            self.register_buffer("noise", torch.randn(config.num_slots, embed_size))
        else:
            self.slots = nn.Parameter(torch.randn(config.num_slots, embed_size))
        if positions == "learned":
            self.position_table = GridPositions(input_dim) if grid else SequencePositions(input_dim)
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

    def forward(self, features: Features, keys: Tensor | None = None, keep_attention: bool = False) -> SetEmbedding:
        """The sets of `features`; with `keep_attention` also the attention and the slots of every iteration.

        In training, dropout and sampled slots are functions of the samples' `keys` (B,), as in `SampleDropout`; without
        keys they come from torch's generator. Raises ValueError where there are more inputs than learned positions.
        """
        inputs = self.block.read(features.local, self._position_code(features), features.is_padding)
        slots_BKD = self._first_slots(features.local, keys)
        maps, iterations = [], []
        for iteration in range(self.iterations):
            slots_BKD, attention_BHKN = self.block(slots_BKD, inputs, keys, iteration)
            if keep_attention:
                maps.append(attention_BHKN.detach())
                iterations.append(slots_BKD.detach())
        slots_BKD = self.slot_norm(slots_BKD)
        sets_BKD = F.normalize(self.global_norm(features.pooled)[:, None] + slots_BKD, dim=-1)
        return SetEmbedding(sets_BKD, slots_BKD, tuple(maps), tuple(iterations))

    def _first_slots(self, local: Tensor, keys: Tensor | None) -> Tensor:
        """(B,K,D), or (1,K,D) where all samples begin with the same."""
        if not self.sampled:
            return self.slots[None]
        drawn = (len(local), keys) if self.training else None
        # Normal numbers take two salts; these two precede those of the block's dropout.
        salt = self.block.update_dropout.salt - 2
        return draw_slots(self.slots_mu, self.slots_log_sigma, self.noise, drawn, salt)

    def _position_code(self, features: Features) -> Tensor | None:
        if self.positions == "none":
            return None
        local, grid = features.local, features.grid
        # "official": padding is counted, and is part of the length, as in the authors' code.
        is_padding = features.is_padding if self.padding == "exact" else None
        if self.positions == "learned":
            if isinstance(self.position_table, GridPositions) != (grid is not None):
                raise ValueError(
                    f"learned positions were made for {'sequences' if grid else 'grids'}, but the features come as a "
                    f"{'grid' if grid else 'sequence'}: make SetPrediction with grid={grid is not None}"
                )
            return self.position_table(*grid) if grid else self.position_table(local.shape[1], is_padding)  # type: ignore[no-any-return]
        if grid is not None:
            return sine_code_2d(*grid, local.shape[-1], local.device)
        return sine_code_1d(local.shape[1], local.shape[-1], local.device, is_padding)


class GridPositions(nn.Module):
    """Learned position code of a grid: the first half of the channels says which column, the second which row, as in
    the authors' code. Raises ValueError for an odd width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"learned positions of a grid need features of even width, got {width}")
        self.columns = nn.Parameter(torch.rand(MAX_GRID, width // 2))
        self.rows = nn.Parameter(torch.rand(MAX_GRID, width // 2))

    def forward(self, rows: int, columns: int) -> Tensor:
        """(rows * columns, width), row by row. Raises ValueError for a grid larger than the tables."""
        if max(rows, columns) > MAX_GRID:
            raise ValueError(
                f"learned positions end at {MAX_GRID} rows and {MAX_GRID} columns, got a grid of {rows} x {columns}: "
                f"use smaller images or positions 'sine'"
            )
        column_code = self.columns[:columns][None].expand(rows, -1, -1)
        row_code = self.rows[:rows][:, None].expand(-1, columns, -1)
        return torch.cat((column_code, row_code), dim=-1).flatten(0, 1)


class SequencePositions(nn.Module):
    """Learned position code of a sequence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.rand(MAX_SEQUENCE, width))

    def forward(self, num: int, is_padding: Tensor | None = None) -> Tensor:
        """(num,width), or with `is_padding` (B,num), which is not counted, (B,num,width). Raises ValueError where
        `num` is larger than the table."""
        if num > MAX_SEQUENCE:
            raise ValueError(
                f"learned positions end at {MAX_SEQUENCE}, got a sequence of {num}: shorten it or use positions 'sine'"
            )
        if is_padding is None:
            return self.table[:num]
        return F.embedding((_count(is_padding) - 1).clamp(min=0), self.table)


def padding_after(lengths: Tensor, num: int, device: torch.device) -> Tensor:
    """(B,num) bool, True from each of the `lengths` (B,) on."""
    return torch.arange(num, device=device) >= on_device(lengths, device)[:, None]


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on the device; to a GPU from pinned memory, from which alone it comes while the host goes on."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def sine_code_1d(num: int, width: int, device: torch.device | None = None, is_padding: Tensor | None = None) -> Tensor:
    """Sine code of positions 1..num as shares of `num`, (num,width), or, with `is_padding` (B,num), of each sample's
    inputs as shares of how many it has, (B,num,width), so that padding is not counted wherever it stands.

    The code of the DETR detector: an angle of 2 pi for the last position, divided channel by channel by up to
    10,000; sines in even channels, cosines in odd ones.
    """
    if is_padding is None:
        return _sine_code(torch.arange(1, num + 1, dtype=torch.float32, device=device) / num, width)
    positions_BN = _count(is_padding)
    return _sine_code(positions_BN / positions_BN[:, -1:].clamp(min=1), width)


def sine_code_2d(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Sine code of a grid, row by row, (rows * columns, width): the first half of the channels says which row, the
    second which column."""
    row_code = sine_code_1d(rows, width // 2, device)[:, None].expand(-1, columns, -1)
    column_code = sine_code_1d(columns, width // 2, device)[None].expand(rows, -1, -1)
    return torch.cat((row_code, column_code), dim=-1).flatten(0, 1)


def _count(is_padding: Tensor) -> Tensor:
    """(B,N): the how manieth of its sample's inputs each one is, from 1."""
    return (~is_padding).cumsum(1)


def _sine_code(share: Tensor, width: int) -> Tensor:
    """`share` (...) of the way, 0..1, to (...,width)."""
    if width % 2:
        raise ValueError(f"a sine code is made of pairs and needs an even width along each axis, got {width}")
    wavelength = 10_000 ** (torch.arange(0, width, 2, dtype=share.dtype, device=share.device) / width)
    angle = 2 * math.pi * share[..., None] / wavelength
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)
