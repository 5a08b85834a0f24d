"""A batch encoded piece by piece, and still one batch: gradient caching (Gao et al., "Scaling Deep Contrastive Learning
Batch Size under Memory Limited Setup", 2021), by recomputation.

The pieces go forward one after another and keep nothing but their outputs, from which the loss of the whole batch is
computed. As the gradient comes back, each piece is computed again, differentiated and let go. So the activations of one
piece are in memory at a time, one forward more is paid, and loss and gradients are those of the whole batch. What is
drawn at random in a piece is drawn again alike: with keys by nature (dropout.py), else because the generators are set
back.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def in_micro_batches(function: Callable[..., T], size: int, *inputs: Tensor | None) -> T:
    """`function(*inputs)`, computed for `size` samples at a time.

    Args:
        function: must treat each sample by itself; a batch normalisation by the batch's statistics does not.
        size: samples in a piece, at least 1.
        inputs: tensors (B,...), or None, which is passed on.

    Returns:
        What `function` returns, a tensor (B,...) or a named tuple of such, put together from the pieces.
    """
    batch = max(len(x) for x in inputs if x is not None)
    pieces = [
        checkpoint(function, *(None if x is None else x[start : start + size] for x in inputs), use_reentrant=False)
        for start in range(0, max(batch, 1), size)
    ]
    joined: T = _joined(pieces)
    return joined


def _joined(pieces: list[Any]) -> Any:
    first = pieces[0]
    if isinstance(first, Tensor):
        return torch.cat(pieces)
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(_joined([piece[field] for piece in pieces]) for field in range(len(first))))
    return first  # what is no tensor, such as the shape of a grid, is the same for every piece
