"""Image encoders: pixels, or what a detector made of them, to local features and a global feature.

Shape suffixes: B images, N regions or grid cells, H height, W width, C channels of a feature map, F width of a region
feature, X width of a local feature, D width of an embedding.
"""

import zlib
from collections import OrderedDict
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from setwise.models.config import ConvNetConfig, GridConfig, RegionsConfig
from setwise.models.dropout import sample_uniform
from setwise.models.image_head import ImageHead, pool
from setwise.models.set_prediction import Features, padding_after, sine_code_2d

GROUPS = 8
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LEFT_OUT = zlib.crc32(b"region_drop")
"""Salt of what decides which regions or cells are left out in training."""


def image_encoder(config: ConvNetConfig | RegionsConfig | GridConfig, embed_size: int) -> nn.Module:
    """The encoder that `config` describes, without weights.

    Whichever it is, it is called with images, lengths or None, and keys or None, and returns Features.
    """
    match config:
        case ConvNetConfig():
            return ConvNet(config, embed_size)
        case RegionsConfig():
            return Regions(config, embed_size)
        case GridConfig():
            return Grid(config, embed_size)


def with_left_out(is_padding: Tensor | None, x: Tensor, keys: Tensor | None, share: float) -> Tensor:
    """Padding (B,N) bool of local features `x` (B,N,F), of which each is left out with probability `share` besides, as
    its sample's key says. A sample that would lose all it has keeps all."""
    batch, num, device = *x.shape[:2], x.device
    chance_BN = torch.rand(batch, num, device=device) if keys is None else sample_uniform(keys, (num,), LEFT_OUT)
    if is_padding is None:
        is_padding = torch.zeros(batch, num, dtype=torch.bool, device=device)
    left_out_BN = is_padding | (chance_BN < share)
    return torch.where(left_out_BN.all(1, keepdim=True), is_padding, left_out_BN)


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
    few pixels can still be told apart; then the maximum over squares of `cell` positions leaves as few local features
    as slots can read cheaply, and the other layers work on those. As in the paper, each cell is then projected to the
    width of an embedding, which is `local_dim`.

    A caption speaks of places, and slot attention's position code enters keys only, so a slot could look at a place
    without being able to say which. A position code is therefore added to the features themselves, ahead of a layer
    that can tie what is seen to where.

    In training, each cell is left out with probability `cell_drop`, as `Regions` leaves out regions.
    """

    def __init__(self, config: ConvNetConfig, embed_size: int) -> None:
        super().__init__()
        self.local_dim = embed_size
        self.cell_drop = config.cell_drop
        layers: list[nn.Module] = []
        width = 3
        for depth, channels in enumerate(config.channels):
            layers += conv_norm_relu(width, channels, kernel=5 if depth == 0 else 3, stride=2 if depth < 2 else 1)
            width = channels
            if depth == min(2, len(config.channels) - 1):
                layers.append(nn.MaxPool2d(config.cell))
        self.layers = nn.Sequential(*layers)
        self.place = nn.Linear(width, width)
        self.project = nn.Linear(width, embed_size)
        self.refine = nn.Sequential(
            nn.LayerNorm(embed_size), nn.Linear(embed_size, embed_size), nn.ReLU(), nn.Linear(embed_size, embed_size)
        )

    def forward(self, images: Tensor, lengths: Tensor | None = None, keys: Tensor | None = None) -> Features:
        """`images` (B,3,H,W): uint8 0..255, or floats already normalised. N = H/8 * W/8 where `cell` is 2, row by row.

        uint8 is normalised here, so that a batch stays a quarter of the size until it is on the device. `keys` (B,)
        int64 decide which cells are left out in training. Raises ValueError for `lengths`: a grid has no padding.
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
        is_padding_BN = None
        if self.training and self.cell_drop > 0:
            is_padding_BN = with_left_out(None, local_BND, keys, self.cell_drop)
        # The maximum, as in the paper's setting for regions: something is in the picture if it is anywhere in it.
        return Features(local_BND, pool(local_BND, is_padding_BN, "max"), is_padding_BN, grid=(rows, columns))


class Regions(nn.Module):
    """Region features of a detector, as SCAN's files hold them ("bottom-up attention"), through an `ImageHead`.

    In training, each region is left out with probability `region_drop`, as in the authors' code: here by declaring it
    padding, which has no influence. Regions have no order, so the padding need not come last. An image that would lose
    all its regions keeps them all.
    """

    def __init__(self, config: RegionsConfig, embed_size: int) -> None:
        super().__init__()
        self.feature_dim = config.feature_dim
        self.region_drop = config.region_drop
        self.head = ImageHead(config.head, config.feature_dim, embed_size)
        self.local_dim = self.head.local_dim

    def forward(self, features: Tensor, lengths: Tensor | None = None, keys: Tensor | None = None) -> Features:
        """`features` (B,N,F) floats, `lengths` (B,) at least 1 each (None: all N are real), `keys` (B,) int64.

        A backbone's feature map (B,F,h,w) is taken too: its cells, row by row, are regions in places that say nothing.
        Raises ValueError for another width than F.
        """
        grid = None
        if features.ndim == 4:
            grid = (features.shape[2], features.shape[3])
            features = features.flatten(2).transpose(1, 2)
        if features.ndim != 3 or features.shape[2] != self.feature_dim:
            raise ValueError(f"expected region features (B,N,{self.feature_dim}), got {tuple(features.shape)}")
        num = features.shape[1]
        is_padding_BN = None if lengths is None else padding_after(lengths, num, features.device)
        if self.training and self.region_drop > 0:
            is_padding_BN = with_left_out(is_padding_BN, features, keys, self.region_drop)
        local_BNX, pooled_BD = self.head(features, is_padding_BN, keys)
        return Features(local_BNX, pooled_BD, is_padding_BN, grid)


class Backbone(nn.Sequential):
    """A torchvision network up to its last feature map; parameters and buffers are named as torchvision's.

    `width` is C of the map. Weights are random: whoever wants others loads them.
    """

    def __init__(self, architecture: str) -> None:
        # Here, because it takes as long to import as all else that a model without a backbone needs.
        from torchvision.models import get_model

        network = get_model(architecture, weights=None)
        kept = OrderedDict((name, part) for name, part in network.named_children() if name not in ("avgpool", "fc"))
        super().__init__(kept)
        self.width: int = network.fc.in_features

    def forward(self, images: Tensor) -> Tensor:
        """The map (B,C,H/32,W/32), rounded up, of `images` (B,3,H,W): uint8 0..255, or floats already normalised."""
        dtype = next(self.parameters()).dtype
        x = images.to(dtype)
        if images.dtype == torch.uint8:
            # By plain numbers, channel by channel: a tensor of means would have to be moved to the device, and the
            # host would wait for it.
            for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)):
                x[:, channel].sub_(255 * mean).div_(255 * std)
        for layer in self:
            x = layer(x)
        return x


class Grid(nn.Module):
    """The last feature map of a network trained on ImageNet, one local feature a cell, through an `ImageHead`.

    With `frozen_batch_norm` the backbone always normalises by the statistics that came with its weights, in training
    too; scales and shifts of its batch normalisations learn on. In training, each cell is left out with probability
    `cell_drop`, as `Regions` leaves out regions.
    """

    def __init__(self, config: GridConfig, embed_size: int) -> None:
        super().__init__()
        self.frozen_batch_norm = config.frozen_batch_norm
        self.cell_drop = config.cell_drop
        self.backbone = Backbone(config.architecture)
        self.head = ImageHead(config.head, self.backbone.width, embed_size)
        self.local_dim = self.head.local_dim
        self.train()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen_batch_norm:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Tensor, lengths: Tensor | None = None, keys: Tensor | None = None) -> Features:
        """`images` (B,3,H,W) as `backbone` reads them, or what it made of them, (B,C,h,w). N = h * w, row by row.

        Raises ValueError for `lengths`, since a grid has no padding, and for another number of channels.
        """
        if lengths is not None:
            raise ValueError("a grid of cells has no padding: call the grid encoder without lengths")
        width = self.backbone.width
        if images.ndim != 4 or images.shape[1] not in (3, width):
            raise ValueError(f"expected images (B,3,H,W) or a feature map (B,{width},h,w), got {tuple(images.shape)}")
        map_BCHW = self.backbone(images) if images.shape[1] == 3 else images
        # In channels_last format these are the cells as they lie in memory, and nothing is copied.
        cells_BNC = map_BCHW.permute(0, 2, 3, 1).flatten(1, 2)
        is_padding_BN = None
        if self.training and self.cell_drop > 0:
            is_padding_BN = with_left_out(None, cells_BNC, keys, self.cell_drop)
        local_BNX, pooled_BD = self.head(cells_BNC, is_padding_BN, keys)
        return Features(local_BNX, pooled_BD, is_padding_BN, (map_BCHW.shape[2], map_BCHW.shape[3]))
