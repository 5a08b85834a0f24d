"""The aggregation block: the steps as written, competition over slots, and padding that takes no part."""

import pytest
import torch
from torch import Tensor

from reference.slot_attention import attend
from setwise.models.slot_attention import Padding, SlotAttention


def block(padding: Padding = "exact") -> SlotAttention:
    torch.manual_seed(0)
    attention = SlotAttention(6, 8, heads=2, head_dim=5, ff_mult=2, dropout=0.3, padding=padding)
    return attention.double().eval()


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SLOTS, INPUTS, POSITIONS = random(1, 2, 3, 6), random(2, 2, 7, 8), random(3, 7, 8)
IS_PADDING = torch.arange(7) >= torch.tensor([4, 7])[:, None]


def test_agrees_with_the_steps_written_out() -> None:
    attention = block()
    slots, _ = attention(SLOTS, *attention.read(INPUTS, POSITIONS), IS_PADDING)
    for b, length in enumerate((4, 7)):
        expected = attend(attention, SLOTS[b], INPUTS[b, :length], POSITIONS[:length])
        torch.testing.assert_close(slots[b], expected, rtol=0, atol=1e-12)


def test_attention_sums_to_one_over_the_inputs_and_skips_padding() -> None:
    attention = block()
    _, maps = attention(SLOTS, *attention.read(INPUTS), IS_PADDING)
    assert maps.shape == (2, 2, 3, 7)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 3, dtype=torch.float64), rtol=0, atol=1e-6)
    assert not maps[0, :, :, 4:].any() and maps[0, :, :, :4].all()


def test_what_stands_at_padding_has_no_influence_and_gets_no_gradient() -> None:
    attention = block()
    inputs = INPUTS.clone().requires_grad_()
    slots, _ = attention(SLOTS, *attention.read(inputs), IS_PADDING)
    other = torch.where(IS_PADDING[..., None], 100 * random(4, 2, 7, 8), INPUTS)
    assert torch.equal(slots, attention(SLOTS, *attention.read(other), IS_PADDING)[0])
    slots.sum().backward()
    assert inputs.grad is not None
    assert torch.equal(inputs.grad.any(-1), ~IS_PADDING)


def test_official_padding_takes_attention() -> None:
    slots, maps = block("official")(SLOTS, *block("official").read(INPUTS), IS_PADDING)
    assert maps[0, :, :, 4:].all()
    exact, _ = block()(SLOTS, *block().read(INPUTS), IS_PADDING)
    assert (slots[0] - exact[0]).abs().max() > 1e-3
    assert torch.equal(slots[1], exact[1])


def test_positions_enter_the_keys_only() -> None:
    attention = block()
    keys, values = attention.read(INPUTS, POSITIONS)
    plain_keys, plain_values = attention.read(INPUTS)
    assert not torch.equal(keys, plain_keys) and torch.equal(values, plain_values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_exact_shares_and_is_finite_where_everything_is_padding(dtype: torch.dtype) -> None:
    attention = block().to(dtype)
    keys, values = attention.read(INPUTS.to(dtype))
    slots, maps = attention(SLOTS.to(dtype), keys, values)
    assert slots.dtype == dtype
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 3), rtol=0, atol=1e-6)
    slots, maps = attention(SLOTS.to(dtype), keys, values, torch.ones(2, 7, dtype=torch.bool))
    assert slots.isfinite().all() and not maps.any()
