"""Randomness by named streams: each use draws from its own stream, all derived from the run's one seed.

So the order of the data does not change when the model draws one number more, and a stream's numbers are a pure
function of (seed, name): nothing has to be restored to find them again.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names`."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A torch generator at the start of the stream called `names`."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *names))


def seed_everything(seed: int) -> None:
    """Seed the global generators, which initialisation draws from."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
