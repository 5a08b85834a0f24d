"""Dropout by sample: the numbers are as good as random, and nothing but sample, layer, call and place decides them.

Every statistic is of fixed keys, so no test fails by chance; bounds are five standard errors of independent numbers.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from setwise.models import dropout
from setwise.models.dropout import SampleDropout, name_layers, sample_normal, sample_uniform

# As different kinds as callers may make: counted, counted from a hash, far apart, random.
GENERATOR = torch.Generator().manual_seed(0)
KEYS = {
    "counted": torch.arange(64),
    "counted from a hash": 0x1234_5678_9ABC_DEF0 + torch.arange(64),
    "far apart": torch.arange(64) << 40,
    "random": torch.randint(2**61, (64,), generator=GENERATOR),
}
ALL_KEYS = pytest.mark.parametrize("keys", KEYS.values(), ids=list(KEYS))


def layer(p: float = 0.3, salt: int = 0) -> SampleDropout:
    made = SampleDropout(p)
    made.salt = salt
    return made


def kept(keys: Tensor, shape: tuple[int, ...], p: float = 0.3, salt: int = 0, call: int = 0) -> Tensor:
    result: Tensor = layer(p, salt)(torch.ones(len(keys), *shape), keys, call) != 0
    return result


def assert_uncorrelated(rows: Tensor) -> None:
    """No two of the `rows` (R,E), by the largest of their R(R-1)/2 correlations and by all of them together."""
    rows_RE = rows.double().flatten(1)
    pairs = torch.corrcoef(rows_RE).triu(1) * math.sqrt(rows_RE.shape[1])  # standard normal where there is no relation
    num = len(rows_RE) * (len(rows_RE) - 1) // 2
    assert pairs.abs().max() < 5
    assert abs(pairs.square().sum() - num) < 5 * math.sqrt(2 * num)


def by_hand(key: int, salt: int, element: int) -> int:
    """The 31 bits of one element, in integers that do not overflow."""
    product = (key ^ (salt * 0x9E3779B1 & 0x7FFFFFFFFFFF)) * 0x5851F42D4C957F2D
    x = (product >> 29 ^ element * 0x9E3779B9) & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return (x ^ x >> 16) & 0x7FFFFFFF


def test_the_numbers_stay_as_they_are_now() -> None:
    keys = [0, 1, -1, 2**62 + 12345, -(2**63), 987654321987654321]
    for salt in (0, 1, -2, 2**32 - 1):
        found = sample_uniform(torch.tensor(keys), (2, 5), salt)
        expected = [[(by_hand(key, salt, e) & 0xFFFFFF) / 2**24 for e in range(10)] for key in keys]
        assert torch.equal(found, torch.tensor(expected).view(6, 2, 5))
        mask = kept(torch.tensor(keys), (10,), p=0.4, salt=salt, call=3)
        assert mask.tolist() == [[by_hand(key, salt + 6, e) >= 0.4 * 2**31 for e in range(10)] for key in keys]


@ALL_KEYS
def test_uniform_numbers_fill_the_unit_interval_evenly(keys: Tensor) -> None:
    x = sample_uniform(keys, (40, 100), salt=9).double()
    assert x.dtype == torch.float64 and x.shape == (64, 40, 100)
    assert x.min() >= 0 and x.max() < 1
    num = x.numel()
    assert abs(x.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / num)
    assert abs(x.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / num)
    counts = torch.histc(x, 256, 0, 1)
    assert abs(((counts - num / 256) ** 2 / (num / 256)).sum() - 255) < 5 * math.sqrt(2 * 255)
    for axis, others in ((0, 4000), (1, 6400), (2, 2560)):  # no sample, row or column is above or below the others
        means = x.transpose(0, axis).flatten(1).mean(1)
        assert ((means - 1 / 2).abs() < 5 * math.sqrt(1 / 12 / others)).all()


@ALL_KEYS
def test_normal_numbers_have_the_moments_and_the_quantiles_of_a_normal(keys: Tensor) -> None:
    x = sample_normal(keys, (4000,), salt=9).double()
    num = x.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean() - moment) < 5 * math.sqrt(variance / num)
    for z in (-3.0, -2.0, -1.0, 0.0, 0.5, 1.5, 2.5):
        below = (1 + math.erf(z / math.sqrt(2))) / 2
        assert abs((x < z).double().mean() - below) < 5 * math.sqrt(below * (1 - below) / num)


@pytest.mark.parametrize("bits", [0, 0x7FFFFFFF])
def test_the_outermost_bits_give_numbers_within_range(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    monkeypatch.setattr(dropout, "_hash", lambda keys, shape, salt: torch.full((1, *shape), bits, dtype=torch.int32))
    keys = torch.tensor([0])
    assert 0 <= sample_uniform(keys, (1,), 0).item() < 1
    assert sample_normal(keys, (1,), 0).isfinite().all()


@ALL_KEYS
@pytest.mark.parametrize("draw", [sample_uniform, sample_normal, lambda *to: kept(to[0], to[1], salt=to[2])])
def test_samples_are_independent(keys: Tensor, draw: Callable[[Tensor, tuple[int, ...], int], Tensor]) -> None:
    assert_uncorrelated(draw(keys, (4096,), 9))


@ALL_KEYS
def test_layers_and_calls_are_independent(keys: Tensor) -> None:
    named = nn.ModuleDict({side: nn.ModuleList(SampleDropout(0.3) for _ in range(3)) for side in ("image", "text")})
    name_layers(named)
    salts = [drop.salt for side in named.values() for drop in side]  # type: ignore[attr-defined]
    masks = [kept(keys, (256,), salt=salt, call=call) for salt in (*salts, 0, 1, 8) for call in range(4)]
    assert_uncorrelated(torch.stack(masks).flatten(1))


@ALL_KEYS
def test_neighbouring_elements_and_rows_are_independent(keys: Tensor) -> None:
    mask = kept(keys, (64, 64)).double()
    assert_uncorrelated(mask.transpose(0, 1))
    assert_uncorrelated(mask.transpose(0, 2))
    flat = mask.flatten(1)
    for distance in (1, 2, 3, 7, 16, 512):
        assert_uncorrelated(torch.stack((flat[:, :-distance], flat[:, distance:])))


@ALL_KEYS
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_p_is_dropped_and_the_rest_scaled_so_that_the_mean_stays(keys: Tensor, p: float) -> None:
    x = layer(p)(torch.full((64, 4000), 3.0), keys)
    assert sorted(x.unique().tolist()) == pytest.approx([0, 3 / (1 - p)])
    deviation = math.sqrt(p * (1 - p))
    assert abs((x == 0).double().mean() - p) < 5 * deviation / math.sqrt(x.numel())
    assert ((x == 0).double().mean(1) - p).abs().max() < 5 * deviation / math.sqrt(4000)
    assert abs(x.double().mean() - 3) < 5 * 3 * deviation / (1 - p) / math.sqrt(x.numel())


def test_a_sample_is_dropped_alike_in_any_batch() -> None:
    keys, x, drop = KEYS["random"], torch.randn(64, 3, 5, generator=GENERATOR), layer()
    together = drop(x, keys, call=2)
    order = torch.randperm(64, generator=GENERATOR)
    assert torch.equal(drop(x[order], keys[order], call=2), together[order])
    assert torch.equal(torch.cat([drop(x[i : i + 7], keys[i : i + 7], call=2) for i in range(0, 64, 7)]), together)
    assert torch.equal(drop(x[5:6], keys[5:6], call=2), together[5:6])
    twice = drop(x[:1].repeat(2, 1, 1), keys[:1].repeat(2))
    assert torch.equal(twice[0], twice[1])


def test_padding_behind_a_sample_leaves_it_as_it_is() -> None:
    keys, x = KEYS["random"], torch.randn(64, 6, 5, generator=GENERATOR)
    assert torch.equal(layer()(x[:, :4], keys), layer()(x, keys)[:, :4])
    for draw in (sample_uniform, sample_normal):
        assert torch.equal(draw(keys, (4, 5), 9), draw(keys, (6, 5), 9)[:, :4])


def test_generators_and_memory_layout_have_no_influence() -> None:
    keys, x = KEYS["random"], torch.randn(64, 6, 5, generator=GENERATOR)
    expected = layer()(x, keys)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(layer()(x.transpose(1, 2).contiguous().transpose(1, 2), keys), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_key_layer_call_and_place_each_matter() -> None:
    keys = KEYS["counted"]
    mask = kept(keys, (256,))
    for other in (kept(keys + 64, (256,)), kept(keys, (256,), salt=1), kept(keys, (256,), call=1), mask.roll(1, 1)):
        # Of independent masks 2 p (1-p) = 42 % differ.
        assert abs((mask != other).double().mean() - 0.42) < 5 * math.sqrt(0.42 * 0.58 / mask.numel())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_has_no_influence_on_what_is_dropped(dtype: torch.dtype) -> None:
    keys, x = KEYS["random"], torch.randn(64, 30, generator=GENERATOR)
    found = layer()(x.to(dtype), keys)
    assert found.dtype == dtype
    assert torch.equal(found != 0, layer()(x, keys) != 0)


def test_the_gradient_passes_where_the_input_did() -> None:
    keys = KEYS["random"]
    x = torch.randn(64, 30, generator=GENERATOR, dtype=torch.float64).requires_grad_()
    y = layer(0.4)(x, keys)
    upstream = torch.randn(64, 30, generator=GENERATOR, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(gradient, torch.where(y != 0, upstream / 0.6, 0.0))


def test_what_is_dropped_is_gone_even_if_it_is_not_finite() -> None:
    keys = KEYS["random"]
    mask = kept(keys, (30,))
    x = torch.where(mask, 1.0, math.nan).requires_grad_()
    y = layer()(x, keys)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all() and gradient.isfinite().all()


def test_evaluation_and_a_share_of_nothing_change_nothing() -> None:
    keys, x = KEYS["random"], torch.randn(64, 30)
    assert layer().eval()(x, keys) is x
    assert layer(0)(x, keys) is x


def test_without_keys_it_is_the_dropout_of_torch() -> None:
    x = torch.randn(64, 30)
    torch.manual_seed(5)
    found = layer()(x)
    torch.manual_seed(5)
    assert torch.equal(found, nn.functional.dropout(x, 0.3))


def test_salts_are_made_of_names_alone_and_none_is_there_twice() -> None:
    def model(first: str) -> nn.ModuleDict:
        made = nn.ModuleDict({first: nn.Sequential(nn.ReLU(), SampleDropout(0.1)), "other": SampleDropout(0.2)})
        name_layers(made)
        return made

    def salts(made: nn.Module) -> dict[str, int]:
        return {name: drop.salt for name, drop in made.named_modules() if isinstance(drop, SampleDropout)}

    assert salts(model("one")) == salts(model("one"))
    assert salts(model("one"))["other"] == salts(model("two"))["other"]
    together = salts(model("one")) | salts(model("two"))
    assert set(together) == {"one.1", "two.1", "other"}
    assert len(set(together.values())) == 3


def test_it_says_what_share_it_drops() -> None:
    assert repr(SampleDropout(0.25)) == "SampleDropout(p=0.25)"
