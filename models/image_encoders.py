"""Image encoders: pixels to local features, one a grid cell, and a global feature.

Shape suffixes: B images, H height, W width, X width of a local feature, D width of an embedding.
"""

import torch
from torch import Tensor, nn

from setwise.models.config import ConvNetConfig
from setwise.models.set_prediction import Features, sine_code_2d

GROUPS = 4


class ResidualBlock(nn.Module):
    """x + 1x1(3x3(1x1(x))) at half the width, which costs a quarter of a plain 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = max(channels // 2, GROUPS)
        self.branch = nn.Sequential(
            *conv_norm_relu(channels, half, kernel=1),
            *conv_norm_relu(half, half, kernel=3, padding=1),
            nn.Conv2d(half, channels, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B,channels,H,W) to the same."""
        residual: Tensor = self.branch(x)
        return x + residual


def conv_norm_relu(inputs: int, outputs: int, *, kernel: int, stride: int = 1, padding: int = 0) -> list[nn.Module]:
    """GroupNorm, not BatchNorm: an image's features do not depend on its batch, so that any number of workers gives
    the same result, training and evaluation compute the same function, and nothing needs synchronising."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
        nn.GroupNorm(GROUPS, outputs),
        nn.ReLU(inplace=True),
    ]


class ConvNet(nn.Module):
    """A small residual network for small images, trained from scratch: 64x64 pixels become 8x8 local features.

    Each stage halves height and width and then, but for the first, has a residual block: at full width a block of the
    first stage would cost as much as all the rest. `local_dim` is the width of the last stage.

    A caption speaks of places, and slot attention's position code enters keys only, so a slot could look at a place
    without being able to say which. A position code is therefore added to the features themselves, ahead of the last
    block, which can tie what is seen to where.
    """

    def __init__(self, config: ConvNetConfig, embed_size: int) -> None:
        super().__init__()
        self.local_dim = config.channels[-1]
        first, *others = config.channels
        self.stem = nn.Sequential(*conv_norm_relu(3, first, kernel=4, stride=2, padding=1))
        self.downs = nn.ModuleList()
        self.blocks = nn.ModuleList()
        for inputs, outputs in zip(config.channels, others, strict=False):
            self.downs.append(nn.Sequential(*conv_norm_relu(inputs, outputs, kernel=2, stride=2)))
            self.blocks.append(ResidualBlock(outputs))
        self.place = nn.Linear(self.local_dim, self.local_dim)
        self.to_global = nn.Linear(self.local_dim, embed_size)

    def forward(self, images: Tensor, lengths: Tensor | None = None) -> Features:
        """`images` (B,3,H,W): uint8 0..255, or floats already normalised. N = HW / 4^stages, row by row.

        uint8 is normalised here, so that a batch stays a quarter of the size until it is on the device. Raises
        ValueError for `lengths`: a grid has no padding.
        """
        if lengths is not None:
            raise ValueError("a grid of pixels has no padding: call the convolutional encoder without lengths")
        dtype = self.to_global.weight.dtype
        x = (images.to(dtype) / 255 - 0.5) / 0.25 if images.dtype == torch.uint8 else images.to(dtype)
        x = self.stem(x)
        for down, block in zip(self.downs[:-1], self.blocks[:-1], strict=True):
            x = block(down(x))
        x = self.downs[-1](x)
        rows, columns = x.shape[-2:]
        code_NX = self.place(sine_code_2d(rows, columns, self.local_dim, x.device).to(dtype))
        x = self.blocks[-1](x + code_NX.T.reshape(self.local_dim, rows, columns))
        local_BNX = x.flatten(2).transpose(1, 2)
        # The maximum, as the authors' script pools regions: something is in the picture if it is anywhere in it.
        return Features(local_BNX, self.to_global(local_BNX.amax(1)), grid=(rows, columns))
