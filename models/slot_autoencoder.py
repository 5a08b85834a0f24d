"""Object discovery: slots compete for the parts of an image, and a decoder draws what each has found (Locatello et al.,
"Object-Centric Learning with Slot Attention", NeurIPS 2020).

The competition, and how first slots are drawn, are shared with set prediction (slot_attention.py), which has no GRU and
several heads.

Shape suffixes: B images, H height, W width, N inputs of the slots, X width of an input, K slots, D width of a slot, C
channels.
"""

import math
import zlib
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setwise.models.micro_batches import in_micro_batches
from setwise.models.pretext_config import SlotAutoencoderConfig
from setwise.models.slot_attention import compete, draw_slots

FIRST_SLOTS = zlib.crc32(b"first_slots")
KERNEL = 5


class Errors(NamedTuple):
    """How well images are drawn again, a row an image."""

    squared: Tensor
    """(B,) mean squared error over pixels and channels, of values from -1 to 1."""


class Decomposition(NamedTuple):
    """An image as the sum of what its slots draw."""

    drawn: Tensor
    """(B,3,H,W): the parts, weighted by their masks and added up; from about -1 to 1, as images are compared."""
    parts: Tensor
    """(B,K,3,H,W): what each slot draws."""
    masks: Tensor
    """(B,K,H,W): how much of each pixel each slot claims; sums to 1 over the slots."""
    attention: Tensor
    """(B,K,N) of the last iteration; sums to 1 over the inputs."""


class RecurrentSlotAttention(nn.Module):
    """The original module: one head, a GRU cell and a residual MLP; the same weights in every iteration.

    First slots are drawn from one learned normal distribution: in training anew for each sample, by its key, and in
    evaluation always the same, which were drawn with the module and are part of its state.
    """

    noise: Tensor

    def __init__(self, num_slots: int, slot_dim: int, input_dim: int, mlp_hidden: int, iterations: int) -> None:
        super().__init__()
        self.iterations = iterations
        self.slots_mu = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, slot_dim))[None])
        self.slots_log_sigma = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, slot_dim))[None])
        self.register_buffer("noise", torch.randn(num_slots, slot_dim))
        self.input_norm = nn.LayerNorm(input_dim)
        self.slot_norm = nn.LayerNorm(slot_dim)
        self.mlp_norm = nn.LayerNorm(slot_dim)
        self.to_query = nn.Linear(slot_dim, slot_dim, bias=False)
        self.to_key = nn.Linear(input_dim, slot_dim, bias=False)
        self.to_value = nn.Linear(input_dim, slot_dim, bias=False)
        self.gru = nn.GRUCell(slot_dim, slot_dim)
        self.hidden = nn.Linear(slot_dim, mlp_hidden)
        self.output = nn.Linear(mlp_hidden, slot_dim)

    def forward(
        self, inputs: Tensor, is_padding: Tensor | None = None, keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Slots (B,K,D) and the attention (B,K,N) of the last iteration, of `inputs` (B,N,X).

        `is_padding` (B,N) bool is True where there is no input: what stands there has no influence. `keys` (B,) int64
        decide the first slots in training; without them torch's generator does.
        """
        if is_padding is not None:
            inputs = inputs.masked_fill(is_padding[..., None], 0)  # or a NaN there would pass through 0 * NaN
            is_padding = is_padding[:, None]
        batch = len(inputs)
        read_BNX = self.input_norm(inputs)
        key_BND, value_BND = self.to_key(read_BNX), self.to_value(read_BNX)
        drawn = (batch, keys) if self.training else None
        first = draw_slots(self.slots_mu, self.slots_log_sigma, self.noise, drawn, FIRST_SLOTS)
        slots_BKD = first.expand(batch, -1, -1)
        for _ in range(self.iterations):
            query_BKD = self.to_query(self.slot_norm(slots_BKD)) * slots_BKD.shape[-1] ** -0.5
            logits_BKN = query_BKD @ key_BND.transpose(1, 2)
            precise = torch.promote_types(logits_BKN.dtype, torch.float32)
            attention_BKN = compete(logits_BKN.to(precise), is_padding, added=1e-8, floor=0.0)
            update_BKD = attention_BKN.to(value_BND.dtype) @ value_BND
            before = slots_BKD.reshape(-1, slots_BKD.shape[-1])
            slots_BKD = self.gru(update_BKD.flatten(0, 1), before.to(update_BKD.dtype)).view_as(slots_BKD)
            slots_BKD = slots_BKD + self.output(F.relu(self.hidden(self.mlp_norm(slots_BKD))))
        return slots_BKD, attention_BKN


class SoftPositions(nn.Module):
    """Adds to a map (B,C,H,W) a linear function of how far each place is from the four edges."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = nn.Linear(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (torch.linspace(0, 1, size, device=x.device, dtype=x.dtype) for size in x.shape[-2:])
        y_HW, x_HW = torch.meshgrid(rows, columns, indexing="ij")
        grid_HW4 = torch.stack((x_HW, y_HW, 1 - x_HW, 1 - y_HW), dim=-1)
        return x + self.project(grid_HW4).permute(2, 0, 1)  # type: ignore[no-any-return]


class SlotAutoencoder(nn.Module):
    """Four convolutions and a soft position code, slots, and a spatial broadcast decoder whose masks compete.

    Published are 128 pixels a side, which the encoder keeps, and the decoder reaches from 8 by four doublings; here it
    doubles as often as an image of `image_size` takes, and the encoder may halve the sides (`encoder_stride`).

    Raises ValueError for an `image_size` that the decoder does not reach.
    """

    def __init__(self, config: SlotAutoencoderConfig, image_size: int) -> None:
        super().__init__()
        channels, dim = config.channels, config.slot_dim
        self.image_size = image_size
        self.broadcast_size = config.broadcast_size
        doublings = config.doublings(image_size)
        halvings = int(math.log2(config.encoder_stride))
        layers: list[nn.Module] = []
        for depth in range(4):
            stride = 2 if depth < halvings else 1
            layers += [
                nn.Conv2d(channels if depth else 3, channels, KERNEL, stride, padding=KERNEL // 2),
                nn.ReLU(inplace=True),
            ]
        self.encoder = nn.Sequential(*layers)
        self.encoder_positions = SoftPositions(channels)
        self.mix = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels)
        )
        self.slots = RecurrentSlotAttention(config.num_slots, dim, channels, config.mlp_hidden, config.iterations)
        self.decoder_positions = SoftPositions(dim)
        layers = []
        for depth in range(doublings):
            up = nn.ConvTranspose2d(channels if depth else dim, channels, KERNEL, 2, padding=2, output_padding=1)
            layers += [up, nn.ReLU(inplace=True)]
        layers += [
            nn.Conv2d(channels if doublings else dim, channels, KERNEL, padding=KERNEL // 2),
            nn.ReLU(inplace=True),
        ]
        layers += [nn.Conv2d(channels, 4, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)

    def forward(self, images: Tensor, keys: Tensor | None = None, micro_batch: int | None = None) -> Errors:
        """The error of drawing each of `images` (B,3,H,W) again, uint8 0..255 or floats from -1 to 1.

        `keys` (B,) int64 decide the first slots in training. `micro_batch` images go forward at a time; the numbers are
        the same. Raises ValueError for images of another size.
        """
        if micro_batch is not None:
            return in_micro_batches(self.forward, micro_batch, images, keys)
        drawn = self.decompose(images, keys).drawn
        precise = torch.promote_types(drawn.dtype, torch.float32)
        return Errors((drawn.to(precise) - self._scaled(images).to(precise)).square().flatten(1).mean(1))

    def decompose(self, images: Tensor, keys: Tensor | None = None) -> Decomposition:
        """What the slots find in `images`, which are as in `forward`."""
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"expected images (B,3,{self.image_size},{self.image_size}), got {tuple(images.shape)}: the decoder is "
                "made for one size"
            )
        seen_BCHW = self.encoder_positions(self.encoder(self._scaled(images)))
        slots_BKD, attention_BKN = self.slots(self.mix(seen_BCHW.flatten(2).transpose(1, 2)), None, keys)
        batch, num_slots, dim = slots_BKD.shape
        spread = slots_BKD.reshape(-1, dim, 1, 1).expand(-1, -1, self.broadcast_size, self.broadcast_size)
        drawn = self.decoder(self.decoder_positions(spread)).view(batch, num_slots, 4, self.image_size, self.image_size)
        parts_BK3HW, alpha_BKHW = drawn[:, :, :3], drawn[:, :, 3]
        masks_BKHW = alpha_BKHW.softmax(1, dtype=torch.promote_types(alpha_BKHW.dtype, torch.float32))
        whole_B3HW = (masks_BKHW[:, :, None] * parts_BK3HW).sum(1)
        return Decomposition(whole_B3HW, parts_BK3HW, masks_BKHW, attention_BKN)

    def _scaled(self, images: Tensor) -> Tensor:
        dtype = self.slots.slots_mu.dtype
        return images.to(dtype) / 127.5 - 1 if images.dtype == torch.uint8 else images.to(dtype)
