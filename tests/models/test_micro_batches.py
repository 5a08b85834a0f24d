"""Micro-batches: the same numbers, less memory, what is random drawn again alike."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from setwise.models.micro_batches import in_micro_batches


class Pair(NamedTuple):
    first: Tensor
    nothing: None
    shape: tuple[int, int]
    inner: tuple[Tensor, ...]


def test_pieces_are_put_together_as_they_came_and_what_is_no_tensor_is_kept() -> None:
    x, y = torch.arange(14.0).view(7, 2), torch.arange(7)

    def function(x: Tensor, y: Tensor, absent: Tensor | None) -> Pair:
        assert absent is None and len(x) == len(y) <= 3
        return Pair(2 * x, None, (4, 5), ())

    found = in_micro_batches(function, 3, x, y, None)
    assert torch.equal(found.first, 2 * x) and found[1:] == (None, (4, 5), ())


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_global_random_numbers_are_drawn_again_alike_in_the_backward_pass(size: int) -> None:
    """Without keys a mask depends on the micro-batches, but the gradient is of the mask that the outputs had."""
    torch.manual_seed(3)
    layer = nn.Linear(4, 4).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    masks = []

    def function(x: Tensor) -> Tensor:
        mask = torch.rand(len(x), 4, dtype=torch.float64) < 0.5
        masks.append(mask)
        return layer(x) * mask

    out = in_micro_batches(function, size, x)
    (out * x).sum().backward()
    forward = torch.cat(masks[: -(-7 // size)])
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, (x * forward).T @ x, rtol=0, atol=1e-12)


def test_between_forward_and_backward_only_outputs_are_kept() -> None:
    """Bytes saved in the forward pass: not of the wide layer in the middle."""
    wide = nn.Sequential(nn.Linear(4, 1000), nn.Tanh(), nn.Linear(1000, 4))
    x = torch.randn(64, 4)

    def saved(size: int | None) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = wide(x) if size is None else in_micro_batches(wide, size, x)
        assert out.requires_grad
        return sum(sizes.values())

    assert saved(None) > 64 * 1000 * 4
    assert saved(8) < 64 * 1000 * 4 / 8
