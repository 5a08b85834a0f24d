"""Image encoders: pixels to local features, one a grid cell, and a global feature.

Shape suffixes: B images, H height, W width, X width of a local feature, D width of an embedding.
"""

import torch
from torch import Tensor, nn

from setwise.models.config import ConvNetConfig
from setwise.models.set_prediction import Features, sine_code_2d

GROUPS = 8


def conv_norm_relu(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """GroupNorm, not BatchNorm: an image's features do not depend on its batch, so that any number of workers gives
    the same result, training and evaluation compute the same function, and nothing needs synchronising."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.GroupNorm(GROUPS, outputs),
        nn.ReLU(inplace=True),
    ]


class ConvNet(nn.Module):
    """A small convolutional network for small images, trained from scratch: 64x64 pixels become 8x8 local features.

    The first two layers halve height and width, and the third keeps a quarter of the resolution, at which strokes of a
    few pixels can still be told apart; then the maximum over 2x2 cells leaves as few local features as slots can read
    cheaply, and the other layers work on those. As in the paper, each cell is then projected to the width of an
    embedding, which is `local_dim`.

    A caption speaks of places, and slot attention's position code enters keys only, so a slot could look at a place
    without being able to say which. A position code is therefore added to the features themselves, ahead of a layer
    that can tie what is seen to where.
    """

    def __init__(self, config: ConvNetConfig, embed_size: int) -> None:
        super().__init__()
        self.local_dim = embed_size
        layers: list[nn.Module] = []
        width = 3
        for depth, channels in enumerate(config.channels):
            layers += conv_norm_relu(width, channels, kernel=5 if depth == 0 else 3, stride=2 if depth < 2 else 1)
            width = channels
            if depth == min(2, len(config.channels) - 1):
                layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.place = nn.Linear(width, width)
        self.project = nn.Linear(width, embed_size)
        self.refine = nn.Sequential(
            nn.LayerNorm(embed_size), nn.Linear(embed_size, embed_size), nn.ReLU(), nn.Linear(embed_size, embed_size)
        )

    def forward(self, images: Tensor, lengths: Tensor | None = None) -> Features:
        """`images` (B,3,H,W): uint8 0..255, or floats already normalised. N = H/8 * W/8, row by row.

        uint8 is normalised here, so that a batch stays a quarter of the size until it is on the device. Raises
        ValueError for `lengths`: a grid has no padding.
        """
        if lengths is not None:
            raise ValueError("a grid of pixels has no padding: call the convolutional encoder without lengths")
        dtype = self.project.weight.dtype
        x = (images.to(dtype) / 255 - 0.5) / 0.25 if images.dtype == torch.uint8 else images.to(dtype)
        x = self.layers(x)
        rows, columns = x.shape[-2:]
        seen_BNX = x.flatten(2).transpose(1, 2)
        code_NX = self.place(sine_code_2d(rows, columns, seen_BNX.shape[-1], x.device).to(dtype))
        projected_BND = self.project(seen_BNX + code_NX)
        local_BND = projected_BND + self.refine(projected_BND)
        # The maximum, as in the paper's setting for regions: something is in the picture if it is anywhere in it.
        return Features(local_BND, local_BND.amax(1), grid=(rows, columns))
