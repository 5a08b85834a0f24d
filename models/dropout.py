"""Dropout whose mask is a function of the sample, not of its place in a batch.

Each sample carries a key, made from the run's seed, the epoch and the sample's number in the data set. Its random
numbers are a hash of that key, of the layer and of the element, so that a sample is dropped in the same way whichever
samples share its batch, however the batch is divided among workers or cut into micro-batches, and whenever a training
is resumed. No state has to be saved for it.

Shape suffixes: B samples, E elements of a sample.
"""

import math
import zlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sample_uniform(keys: Tensor, shape: tuple[int, ...], salt: int) -> Tensor:
    """Uniform numbers in [0, 1), (B,*shape), float32: a function of each of the `keys` (B,) int64, of `salt` and of
    the place in `shape`, counted row by row.

    More rows leave the numbers of the first ones as they are, so padding has no influence either.
    """
    return _hash(keys, shape, salt).bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0**-24)


def sample_normal(keys: Tensor, shape: tuple[int, ...], salt: int) -> Tensor:
    """Normal numbers, (B,*shape), float32, as `sample_uniform` (by the transform of Box and Muller)."""
    radius = (-2 * (1 - sample_uniform(keys, shape, salt)).log()).sqrt()
    return radius * (2 * math.pi * sample_uniform(keys, shape, salt + 1)).cos()


def _hash(keys_B: Tensor, shape: tuple[int, ...], salt: int) -> Tensor:
    """31 well mixed bits for each element, (B,*shape) int32, by the finaliser that C. Wellons calls lowbias32."""
    mixed_B = (keys_B ^ (salt * 0x9E3779B1 & 0x7FFFFFFFFFFF)) * 0x5851F42D4C957F2D  # wraps, as is meant
    mixed_B = (mixed_B >> 29).to(torch.int32)
    # In 64 bits, and cut afterwards: torch.compile would take a product that overflows for an index.
    element_E = (torch.arange(math.prod(shape), device=keys_B.device) * 0x9E3779B9 & 0xFFFFFFFF).to(torch.int32)
    x = mixed_B[:, None] ^ element_E
    x ^= (x >> 16) & 0xFFFF  # >> keeps the sign of an int32; the mask takes it away
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= -2073254261
    x ^= (x >> 16) & 0xFFFF
    return x.bitwise_and_(0x7FFFFFFF).view(len(keys_B), *shape)


class SampleDropout(nn.Module):
    """Dropout by sample: of `x` (B,...) each sample loses the elements that its key says.

    Without keys it is torch's dropout. `salt` tells layers apart (`name_layers` sets it), `call` the calls of one
    layer for the same sample.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.salt = 0

    def forward(self, x: Tensor, keys: Tensor | None = None, call: int = 0) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if keys is None:
            return F.dropout(x, self.p)
        keep = _hash(keys, tuple(x.shape[1:]), self.salt + 2 * call) >= int(self.p * 2**31)
        return torch.where(keep, x / (1 - self.p), 0.0)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def name_layers(module: nn.Module) -> None:
    """Give every SampleDropout inside `module` a salt made from its name, so that no two layers drop alike."""
    for name, layer in module.named_modules():
        if isinstance(layer, SampleDropout):
            layer.salt = zlib.crc32(name.encode())
