"""The aggregation block: the steps as written, competition over slots, and padding that takes no part."""

import math

import pytest
import torch
from torch import Tensor

from reference.slot_attention import attend
from setwise.models.dropout import name_layers
from setwise.models.slot_attention import Padding, SlotAttention


def block(padding: Padding = "exact") -> SlotAttention:
    torch.manual_seed(0)
    attention = SlotAttention(6, 8, heads=2, head_dim=5, ff_mult=2, dropout=0.3, padding=padding)
    name_layers(attention)
    return attention.double().eval()


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SLOTS, INPUTS, POSITIONS = random(1, 2, 3, 6), random(2, 2, 7, 8), random(3, 7, 8)
IS_PADDING = torch.tensor([[0, 1, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize("per_sample", [True, False])
def test_agrees_with_the_steps_written_out_in_output_and_gradients(per_sample: bool) -> None:
    attention = block()
    positions = torch.stack((POSITIONS, POSITIONS.flip(0))) if per_sample else POSITIONS
    leaves = [x.clone().requires_grad_() for x in (SLOTS, INPUTS, positions)]
    wanted = [*leaves, *attention.parameters()]

    slots, _ = attention(leaves[0], attention.read(leaves[1], leaves[2], IS_PADDING))
    found = torch.autograd.grad(slots, wanted, random(5, 2, 3, 6))
    real = [~row for row in IS_PADDING]
    steps = [
        attend(attention, leaves[0][b], leaves[1][b][real[b]], leaves[2].expand(2, 7, 8)[b][real[b]]) for b in (0, 1)
    ]
    expected = torch.autograd.grad(torch.stack(steps), wanted, random(5, 2, 3, 6))

    torch.testing.assert_close(slots, torch.stack(steps), rtol=0, atol=1e-12)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_slots_that_all_samples_begin_with_need_not_be_repeated() -> None:
    attention = block()
    results = []
    for slots in (SLOTS[:1], SLOTS[:1].repeat(2, 1, 1)):
        slots = slots.clone().requires_grad_()
        result, maps = attention(slots, attention.read(INPUTS, POSITIONS, IS_PADDING))
        gradients = torch.autograd.grad(result, [slots, *attention.parameters()], random(5, 2, 3, 6))
        results.append([result, maps, gradients[0].sum(0), *gradients[1:]])
    for once, repeated in zip(*results, strict=True):
        torch.testing.assert_close(once, repeated, rtol=0, atol=1e-12)


def test_attention_sums_to_one_over_the_inputs_and_skips_padding() -> None:
    attention = block()
    _, maps = attention(SLOTS, attention.read(INPUTS, is_padding=IS_PADDING))
    assert maps.shape == (2, 2, 3, 7)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 3, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(maps[0] == 0, IS_PADDING[0].expand(2, 3, 7)) and maps[1].all()


@pytest.mark.parametrize("garbage", [100.0, math.inf, -math.inf, math.nan])
def test_what_stands_at_padding_has_no_influence_and_gets_no_gradient(garbage: float) -> None:
    attention = block()
    results = []
    for value in (0.0, garbage):
        inputs = INPUTS.masked_fill(IS_PADDING[..., None], value).requires_grad_()
        slots, maps = attention(SLOTS, attention.read(inputs, POSITIONS, IS_PADDING))
        gradients = torch.autograd.grad(slots, [inputs, *attention.parameters()], random(5, 2, 3, 6))
        assert torch.equal(gradients[0].any(-1), ~IS_PADDING)
        results.append([slots, maps, *gradients])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_official_padding_takes_the_same_attention_from_every_slot() -> None:
    official = block("official")
    slots, maps = official(SLOTS, official.read(INPUTS, is_padding=IS_PADDING))
    exact, exact_maps = block()(SLOTS, block().read(INPUTS, is_padding=IS_PADDING))
    shares = maps[0, :, :, IS_PADDING[0]]
    assert torch.equal(shares, shares[..., :1].expand_as(shares)) and shares.all()
    # Before it was normalised, that share was 1/3 of each of three slots; what is left is as in exact padding.
    mass = 1 / (3 * shares[..., 0])
    for n in (0, 2, 3, 5):
        ratio = maps[0, :, :, n] * mass / exact_maps[0, :, :, n]
        torch.testing.assert_close(ratio, mass - 1, rtol=1e-5, atol=0)
    assert (slots[0] - exact[0]).abs().max() > 1e-3
    torch.testing.assert_close(slots[1], exact[1], rtol=0, atol=1e-12)


def test_positions_enter_the_keys_only() -> None:
    attention = block()
    with_code, plain = attention.read(INPUTS, POSITIONS), attention.read(INPUTS)
    torch.testing.assert_close(with_code.keys, plain.keys + POSITIONS, rtol=0, atol=1e-12)
    assert torch.equal(with_code.values, plain.values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_exact_shares_and_is_finite_where_everything_is_padding(dtype: torch.dtype) -> None:
    attention = block().to(dtype)
    slots, maps = attention(SLOTS.to(dtype), attention.read(INPUTS.to(dtype), POSITIONS))
    assert slots.dtype == dtype and maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 3), rtol=0, atol=1e-6)
    expected, _ = block()(SLOTS, block().read(INPUTS, POSITIONS))
    torch.testing.assert_close(slots.double(), expected, rtol=0, atol=0.1)
    everything = torch.ones(2, 7, dtype=torch.bool)
    slots, maps = attention(SLOTS.to(dtype), attention.read(INPUTS.to(dtype), is_padding=everything))
    assert slots.isfinite().all() and not maps.any()


def test_autocast_multiplies_in_half_precision_and_attends_in_single() -> None:
    attention, slots, inputs = block().float(), SLOTS.float(), INPUTS.float()
    expected, _ = attention(slots, attention.read(inputs, POSITIONS.float(), IS_PADDING))
    with torch.autocast("cpu", torch.bfloat16):
        read = attention.read(inputs, POSITIONS.float(), IS_PADDING)
        found, maps = attention(slots, read)
    assert read.keys.dtype == read.values.dtype == torch.bfloat16
    assert found.dtype == maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("layer", ["update_dropout", "feed_forward.dropout"])
def test_each_dropout_is_a_function_of_key_and_iteration(layer: str) -> None:
    attention, keys = block().train(), torch.tensor([11, 12])
    for name in {"update_dropout", "feed_forward.dropout"} - {layer}:
        attention.get_submodule(name).p = 0.0  # type: ignore[assignment]

    def run(keys: Tensor, iteration: int, rows: slice = slice(None)) -> Tensor:
        slots: Tensor = attention(SLOTS[rows], attention.read(INPUTS[rows]), keys, iteration)[0]
        return slots

    first = run(keys, 0)
    assert torch.equal(first, run(keys, 0))
    torch.testing.assert_close(first[1:], run(keys[1:], 0, slice(1, 2)), rtol=0, atol=1e-12)
    for other in (run(keys, 1), run(keys + 1, 0), attention.eval()(SLOTS, attention.read(INPUTS))[0]):
        assert (first - other).abs().amax((1, 2)).min() > 1e-3


def test_dropout_of_the_update_leaves_out_whole_entries_and_scales_the_rest() -> None:
    attention, keys = block().train(), torch.tensor([11, 12])
    attention.feed_forward.dropout.p = 0.0
    torch.nn.init.zeros_(attention.feed_forward.output.weight)
    torch.nn.init.zeros_(attention.feed_forward.output.bias)
    dropped = attention(SLOTS, attention.read(INPUTS), keys)[0] - SLOTS
    whole = attention.eval()(SLOTS, attention.read(INPUTS))[0] - SLOTS
    kept = dropped.abs() > 1e-9
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.7, rtol=0, atol=1e-12)
