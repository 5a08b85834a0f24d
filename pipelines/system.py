"""What can be trained: a model, its loss on a batch, and what it is measured by. The training loop knows no more of it.

Shape suffixes: B images, T captions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from setwise.pipelines.batches import Share, Split
from setwise.pipelines.recipe import Recipe

Rows = tuple[Any, ...] | None
"""A named tuple of tensors with a row a sample, or nothing."""


class System(nn.Module, ABC):
    """What is trained, saved and evaluated as one."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    @property
    @abstractmethod
    def encoder(self) -> nn.Module:
        """The part that sees samples, each by itself; DistributedDataParallel wraps it."""

    @abstractmethod
    def encode(self, encoder: nn.Module, share: Share) -> tuple[Rows, Rows]:
        """What `encoder`, wrapped or not, makes of a worker's share of a batch: of its images and of its captions."""

    @abstractmethod
    def loss(self, images: Rows, texts: Rows, owners: Tensor, epoch: float) -> dict[str, Tensor]:
        """Named parts of the loss of a whole batch, scalars, with `total`, which is minimised.

        Args:
            images, texts: what `encode` made of all workers' shares.
            owners: (T,) int64: the index of the image that each caption belongs to.
            epoch: how many epochs (fractions count) the training is old.
        """

    @abstractmethod
    def validate(self, split: Split, batch_size: int, device: torch.device, threads: int = 0) -> dict[str, float]:
        """What the model is worth on a split: `val/...`, the recipe's metric among them. Draws no random number.

        Raises:
            DivergedError: an embedding is not finite.
        """

    def compiled(self) -> tuple[nn.Module, ...]:
        """The parts that torch.compile makes faster."""
        return ()
