"""Set prediction agrees with the authors' numbers and formulation; padding, neighbours and chance have no influence."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from reference.official_set_prediction import official_sets
from setwise.models import dropout
from setwise.models.config import Positions, SetPredictionConfig
from setwise.models.dropout import name_layers
from setwise.models.set_prediction import (
    Features,
    GridPositions,
    SequencePositions,
    SetPrediction,
    padding_after,
    sine_code_1d,
    sine_code_2d,
)
from setwise.models.slot_attention import Padding

GOLDEN = Path(__file__).parent.parent / "golden"
# The authors' names of the weights, by ours.
OFFICIAL_NAMES = {
    "slots": "latents",
    "block.slot_norm": "layers.0.0.norm",
    "block.input_norm": "layers.0.0.norm_context",
    "block.to_query": "layers.0.0.fn.to_q",
    "block.to_key": "layers.0.0.fn.to_k",
    "block.to_value": "layers.0.0.fn.to_v",
    "block.to_update": "layers.0.0.fn.to_out.0",
    "block.feed_forward.norm": "layers.0.2.norm",
    "block.feed_forward.hidden": "layers.0.2.fn.net.0",
    "block.feed_forward.output": "layers.0.2.fn.net.3",
    "slot_norm": "last_layer.0",
}


def golden_slots(side: str, padding: Padding) -> tuple[Tensor, Tensor]:
    """Our slot outputs and the authors', (3,4,24) each."""
    with np.load(GOLDEN / f"dive_block_{side}.npz", allow_pickle=False) as file:
        golden = {key.removeprefix(f"agg_{side}."): torch.from_numpy(file[key]) for key in file}
    positions: Positions = "sine" if side == "txt" else "none"
    module = SetPrediction(SetPredictionConfig(), 24, 24, positions, padding)
    weights = dict(module.state_dict())
    for name in weights:
        parent, _, leaf = name.rpartition(".")
        if name in OFFICIAL_NAMES:
            weights[name] = golden[f"sd.{OFFICIAL_NAMES[name]}"]
        elif parent in OFFICIAL_NAMES:
            weights[name] = golden[f"sd.{OFFICIAL_NAMES[parent]}.{leaf}"]
        else:
            assert parent == "global_norm", name  # the authors' block ends before the global feature is added
    module.load_state_dict(weights)
    features = Features(golden["x"], torch.zeros(3, 24, dtype=torch.float64), golden["mask"])
    return module.double().eval()(features).slots, golden["y"]


@pytest.mark.parametrize(("side", "tolerance"), [("img", 1e-9), ("txt", 1e-6)])  # their position code is in float32
def test_agrees_with_the_authors_code(side: str, tolerance: float) -> None:
    slots, expected = golden_slots(side, "official")
    torch.testing.assert_close(slots, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("side", "tolerance"), [("img", 1e-9), ("txt", 1e-6)])
def test_exact_padding_agrees_where_there_is_none_and_differs_elsewhere(side: str, tolerance: float) -> None:
    slots, expected = golden_slots(side, "exact")
    torch.testing.assert_close(slots[1], expected[1], rtol=0, atol=tolerance)
    assert (slots - expected).abs().amax((1, 2))[[0, 2]].min() > 0.1


def module(
    positions: Positions = "sine", padding: Padding = "exact", grid: bool = False, **settings: Any
) -> SetPrediction:
    torch.manual_seed(0)
    config = {"heads": 2, "head_dim": 4, "iterations": 3, "num_slots": 3, "dropout": 0.3} | settings
    predict = SetPrediction(SetPredictionConfig.model_validate(config), 8, 12, positions, padding, grid=grid)
    name_layers(predict)
    return predict.eval()


def random_features(is_padding: Tensor | None = None, grid: tuple[int, int] | None = None) -> Features:
    generator = torch.Generator().manual_seed(1)
    local = torch.randn(4, 6, 12, generator=generator)
    return Features(local, torch.randn(4, 8, generator=generator), is_padding, grid)


KEYS = torch.tensor([5, 7, 11, 13])
SCATTERED = torch.tensor([[1, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 1]]).bool()


@pytest.mark.parametrize("is_padding", [None, SCATTERED])
@pytest.mark.parametrize("positions", ["none", "sine"])
@pytest.mark.parametrize("padding", ["exact", "official"])
def test_agrees_with_the_authors_formulation_in_output_and_gradients(
    padding: Padding, positions: Positions, is_padding: Tensor | None
) -> None:
    predict = module(positions, padding).double()
    local, pooled, *_ = random_features()
    features = Features(local.double().requires_grad_(), pooled.double().requires_grad_(), is_padding)
    code = None
    if positions == "sine":
        code = sine_code_1d(6, 12, is_padding=is_padding if padding == "exact" else None).double()
    wanted = [features.local, features.pooled, *predict.parameters()]
    random = torch.randn(2, 4, 3, 8, dtype=torch.float64)
    outputs = [predict(features)[:2], official_sets(predict, features, code)]
    gradients = [torch.autograd.grad(output, wanted, tuple(random)) for output in outputs]
    for found, expected in zip((*outputs[0], *gradients[0]), (*outputs[1], *gradients[1]), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_sets_are_unit_vectors_made_of_slots_and_global_feature() -> None:
    predict, features = module(), random_features()
    result = predict(features)
    assert result.sets.shape == result.slots.shape == (4, 3, 8)
    torch.testing.assert_close(result.sets.norm(dim=-1), torch.ones(4, 3))
    expected = predict.global_norm(features.pooled)[:, None] + result.slots
    torch.testing.assert_close(result.sets * expected.norm(dim=-1, keepdim=True), expected)


def test_attention_and_slots_are_returned_for_every_iteration_when_asked_for() -> None:
    plain = module()(random_features())
    assert plain.attention == plain.slot_iterations == ()
    predict = module()
    result = predict(random_features(), keep_attention=True)
    assert [tuple(maps.shape) for maps in result.attention] == [(4, 2, 3, 6)] * 3
    assert [tuple(slots.shape) for slots in result.slot_iterations] == [(4, 3, 8)] * 3
    assert not torch.equal(result.attention[0], result.attention[2])
    assert torch.equal(predict.slot_norm(result.slot_iterations[-1]), result.slots)
    assert not any(x.requires_grad for x in result.attention + result.slot_iterations)
    for iterations in (1, 2):
        shorter = module(iterations=iterations)(random_features(), keep_attention=True)
        torch.testing.assert_close(shorter.slot_iterations[-1], result.slot_iterations[iterations - 1])


@pytest.mark.parametrize("positions", ["none", "sine", "learned"])
def test_padding_and_neighbours_have_no_influence(positions: Positions) -> None:
    features, predict = random_features(SCATTERED), module(positions)
    together = predict(features).sets
    for b, is_padding in enumerate(SCATTERED):
        alone = Features(features.local[b : b + 1, ~is_padding], features.pooled[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], predict(alone).sets, rtol=0, atol=1e-6)


@pytest.mark.parametrize("positions", ["none", "sine", "learned"])
@pytest.mark.parametrize("garbage", [math.inf, math.nan])
def test_garbage_at_padding_reaches_neither_result_nor_gradients(positions: Positions, garbage: float) -> None:
    predict, everything = module(positions).train(), torch.ones(4, 6, dtype=torch.bool)
    for is_padding in (SCATTERED, everything):
        results = []
        for value in (0.0, garbage):
            clean = random_features(is_padding)
            features = clean._replace(local=clean.local.masked_fill(is_padding[..., None], value))
            sets = predict(features, KEYS).sets
            gradients = torch.autograd.grad(sets.sum(), list(predict.parameters()))
            assert all(x.isfinite().all() for x in (sets, *gradients))
            results.append([sets, *gradients])
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_order_of_the_inputs_matters_only_through_the_position_code() -> None:
    features = random_features()
    shuffled = features._replace(local=features.local[:, [3, 1, 5, 0, 2, 4]])
    torch.testing.assert_close(module("none")(features).sets, module("none")(shuffled).sets, rtol=0, atol=1e-6)
    for positions in ("sine", "learned"):
        predict = module(positions)
        assert (predict(features).sets - predict(shuffled).sets).abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["sine", "learned"])
def test_a_grid_is_coded_by_row_and_column(positions: Positions) -> None:
    wide, tall = (module(positions, grid=True)(random_features(grid=grid)).sets for grid in ((2, 3), (3, 2)))
    assert (wide - tall).abs().max() > 1e-4


def test_sine_code_of_a_grid_is_that_of_the_row_and_then_that_of_the_column() -> None:
    code = sine_code_2d(2, 3, 12)
    assert code.shape == (6, 12)
    torch.testing.assert_close(code[4, :6], sine_code_1d(2, 6)[1])  # row by row: the fifth is row 1, column 1
    torch.testing.assert_close(code[4, 6:], sine_code_1d(3, 6)[1])


def test_sine_code_is_the_formula_and_counts_in_shares_of_the_own_inputs() -> None:
    code = sine_code_1d(5, 6)
    for n in range(5):
        for pair in range(3):
            angle = 2 * math.pi * (n + 1) / 5 / 10_000 ** (2 * pair / 6)
            expected = torch.tensor([math.sin(angle), math.cos(angle)])
            torch.testing.assert_close(code[n, 2 * pair : 2 * pair + 2], expected, rtol=0, atol=1e-6)
    is_padding = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0]]).bool()
    by_sample = sine_code_1d(7, 6, is_padding=is_padding)
    torch.testing.assert_close(by_sample[0, :5], code)
    torch.testing.assert_close(by_sample[1], sine_code_1d(7, 6))
    torch.testing.assert_close(by_sample[2, ~is_padding[2]], code)


def test_learned_code_of_a_grid_is_that_of_the_column_and_then_that_of_the_row() -> None:
    table = module("learned", grid=True).position_table
    assert isinstance(table, GridPositions)
    assert {name: tuple(p.shape) for name, p in table.named_parameters()} == {"columns": (50, 6), "rows": (50, 6)}
    code = table(2, 3)
    assert code.shape == (6, 12)
    for row in range(2):
        for column in range(3):
            assert torch.equal(code[3 * row + column], torch.cat((table.columns[column], table.rows[row])))


def test_learned_code_of_a_sequence_counts_inputs_from_zero() -> None:
    table = module("learned").position_table
    assert isinstance(table, SequencePositions)
    assert {name: tuple(p.shape) for name, p in table.named_parameters()} == {"table": (100, 12)}
    assert torch.equal(table(6), table.table[:6])
    assert torch.equal(table(100), table.table)
    assert torch.equal(table(6, SCATTERED)[0, [1, 2, 4]], table.table[:3])


def test_learned_tables_are_uniform_at_first() -> None:
    for grid in (True, False):
        for table in module("learned", grid=grid).position_table.parameters():
            assert 0 <= table.min() < 0.02 and 0.98 < table.max() < 1
            assert abs(table.mean() - 0.5) < 0.05 and abs(table.std() - 12**-0.5) < 0.02


@pytest.mark.parametrize(
    ("features", "grid", "message"),
    [
        (Features(torch.zeros(1, 101, 12), torch.zeros(1, 8)), False, "end at 100, got a sequence of 101"),
        (Features(torch.zeros(1, 102, 12), torch.zeros(1, 8), grid=(51, 2)), True, "50 rows and 50 columns.*51 x 2"),
        (Features(torch.zeros(1, 102, 12), torch.zeros(1, 8), grid=(2, 51)), True, "50 rows and 50 columns.*2 x 51"),
        (Features(torch.zeros(1, 6, 12), torch.zeros(1, 8), grid=(2, 3)), False, "grid=True"),
        (Features(torch.zeros(1, 6, 12), torch.zeros(1, 8)), True, "grid=False"),
    ],
)
def test_inputs_that_learned_positions_do_not_fit_are_refused(features: Features, grid: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module("learned", grid=grid)(features)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sine_code_1d(3, 5),
        lambda: sine_code_2d(3, 3, 6),
        lambda: SetPrediction(SetPredictionConfig(), 8, 5, "learned", grid=True),
    ],
)
def test_a_width_that_cannot_be_halved_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="even width"):
        make()


@pytest.mark.parametrize("slots", ["learned", "sampled"])
@pytest.mark.parametrize(("positions", "grid"), [("sine", None), ("learned", None), ("learned", (2, 3))])
def test_every_parameter_learns_that_can(slots: str, positions: Positions, grid: tuple[int, int] | None) -> None:
    predict = module(positions, grid=grid is not None, slots=slots).train()
    features = random_features(SCATTERED, grid)
    predict(features, KEYS).sets.square().mul(torch.arange(8)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in predict.named_parameters()}
    assert ({"slots"} if slots == "learned" else {"slots_mu", "slots_log_sigma"}) <= set(gradients)
    unmoved = [name for name, gradient in gradients.items() if gradient is None or gradient.abs().max() < 1e-6]
    # What is added to the queries of all slots alike changes nothing about their competition for an input.
    assert unmoved == ["block.slot_norm.bias"]


@pytest.mark.parametrize("slots", ["learned", "sampled"])
def test_slots_start_apart_and_stay_apart(slots: str) -> None:
    sets = module(slots=slots)(random_features()).sets
    assert (sets[:, 0] - sets[:, 1]).norm(dim=-1).min() > 0.05


def first_slots(predict: SetPrediction, keys: Tensor | None) -> Tensor:
    """(B,3,8) of a module whose one iteration changes nothing."""
    for layer in (predict.block.to_update, predict.block.feed_forward.output):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return predict(random_features(), keys, keep_attention=True).slot_iterations[0].expand(4, -1, -1)  # type: ignore[no-any-return]


def test_sampled_slots_are_draws_from_the_learned_distribution() -> None:
    predict = module("none", slots="sampled", num_slots=256, iterations=1).train()
    torch.nn.init.constant_(predict.slots_log_sigma, math.log(3))
    for keys in (KEYS, None):
        standardised = (first_slots(predict, keys) - predict.slots_mu) / 3
        assert (standardised.mean((0, 1)).abs() < 5 / 32).all()  # 1024 draws: five standard errors
        assert ((standardised.std((0, 1)) - 1).abs() < 5 / 32 / 2**0.5).all()
        assert torch.corrcoef(standardised.flatten(1)).sub(torch.eye(4)).abs().max() < 5 / 2048**0.5


def test_sampled_slots_are_a_function_of_the_key_in_training_and_fixed_in_evaluation() -> None:
    predict = module("none", slots="sampled", iterations=1).train()
    drawn = first_slots(predict, KEYS)
    assert torch.equal(drawn, first_slots(predict, KEYS))
    assert torch.equal(drawn[[2, 0, 1, 3]], first_slots(predict, KEYS[[2, 0, 1, 3]]))
    assert not torch.equal(first_slots(predict, None), first_slots(predict, None))
    fixed = first_slots(predict.eval(), KEYS)
    assert torch.equal(fixed, first_slots(predict, None))
    expected = predict.slots_mu[0] + predict.slots_log_sigma[0].exp() * predict.noise
    torch.testing.assert_close(fixed, expected.expand(4, -1, -1))
    assert (fixed - drawn).abs().amax((1, 2)).min() > 0.1


def test_the_fixed_draw_travels_with_the_weights() -> None:
    first = module(slots="sampled")
    second = SetPrediction(
        SetPredictionConfig(num_slots=3, heads=2, head_dim=4, iterations=3, slots="sampled"), 8, 12, "sine"
    )
    assert first.state_dict()["noise"].shape == (3, 8)
    assert not torch.equal(first(random_features()).sets, second.eval()(random_features()).sets)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(random_features()).sets, second(random_features()).sets)


def test_no_two_draws_for_a_sample_share_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = torch.nn.ModuleDict({side: module(slots="sampled").train() for side in ("image", "text")})
    name_layers(sides)
    salts: list[int] = []
    numbers = dropout._hash

    def recorded(keys: Tensor, shape: tuple[int, ...], salt: int) -> Tensor:
        salts.append(salt)
        return numbers(keys, shape, salt)

    monkeypatch.setattr(dropout, "_hash", recorded)
    for side in sides.values():
        side(random_features(), KEYS)
    assert len(salts) == len(set(salts)) == 2 * (2 + 3 * 2)  # two of a normal number, two dropouts an iteration


@pytest.mark.parametrize("slots", ["learned", "sampled"])
def test_training_is_a_function_of_the_keys_whatever_the_batch(slots: str) -> None:
    predict, features = module(slots=slots).train(), random_features(SCATTERED)
    together = predict(features, KEYS).sets
    order = torch.tensor([2, 0, 3])
    part = Features(features.local[order], features.pooled[order], SCATTERED[order])
    torch.testing.assert_close(together[order], predict(part, KEYS[order]).sets, rtol=0, atol=1e-6)
    longer = features._replace(
        local=torch.nn.functional.pad(features.local, (0, 0, 0, 2)),
        is_padding=torch.nn.functional.pad(SCATTERED, (0, 2), value=True),
    )
    torch.testing.assert_close(together, predict(longer, KEYS).sets, rtol=0, atol=1e-6)
    for other in (predict(features, KEYS + 1).sets, predict(features).sets, predict.eval()(features, KEYS).sets):
        assert (together - other).abs().amax((1, 2)).min() > 1e-3


def test_iterations_drop_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    predict = module(iterations=3).train()
    found = predict(random_features(), KEYS).sets
    forward = type(predict.block.update_dropout).forward
    monkeypatch.setattr(
        type(predict.block.update_dropout), "forward", lambda self, x, keys, call: forward(self, x, keys, 0)
    )
    assert (found - predict(random_features(), KEYS).sets).abs().amax((1, 2)).min() > 1e-3


@pytest.mark.parametrize("slots", ["learned", "sampled"])
@pytest.mark.parametrize("positions", ["sine", "learned"])
def test_a_checkpointed_pass_gives_the_same_gradients(slots: str, positions: Positions) -> None:
    predict, features = module(positions, slots=slots).train(), random_features(SCATTERED)
    for keys in (KEYS, None):
        results = []
        for run in (predict, lambda *inputs: checkpoint(predict, *inputs, use_reentrant=False)):
            torch.manual_seed(3)
            sets = run(features, keys).sets
            results.append(
                [sets, *torch.autograd.grad(sets.square().mul(torch.arange(8)).sum(), list(predict.parameters()))]
            )
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("slots", ["learned", "sampled"])
@pytest.mark.parametrize(
    ("positions", "grid"), [("sine", None), ("learned", None), ("learned", (2, 3)), ("sine", (1, 6))]
)
def test_the_meta_device_gives_shapes(slots: str, positions: Positions, grid: tuple[int, int] | None) -> None:
    with torch.device("meta"):
        predict = SetPrediction(SetPredictionConfig(slots=slots), 8, 12, positions, grid=grid is not None)
        features = Features(torch.empty(4, 6, 12), torch.empty(4, 8), torch.empty(4, 6, dtype=torch.bool), grid)
        keys = torch.empty(4, dtype=torch.int64)
    result = predict(features, keys)
    assert result.sets.is_meta and result.sets.shape == (4, 4, 8)


@pytest.mark.parametrize("slots", ["learned", "sampled"])
@pytest.mark.parametrize("positions", ["sine", "learned"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_are_close_to_single(dtype: torch.dtype, positions: Positions, slots: str) -> None:
    features = random_features(SCATTERED)
    expected = module(positions, slots=slots)(features).sets
    half = Features(features.local.to(dtype), features.pooled.to(dtype), SCATTERED)
    found = module(positions, slots=slots).to(dtype)(half).sets
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)
    with torch.autocast("cpu", dtype):
        predict = module(positions, slots=slots).train()
        sets = predict(features, KEYS).sets
        evaluated = predict.eval()(features).sets
    torch.testing.assert_close(evaluated.float(), expected, rtol=0, atol=0.05)
    gradients = torch.autograd.grad(sets.sum(), list(predict.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("slots", ["learned", "sampled"])
def test_an_empty_batch_gives_no_sets(slots: str) -> None:
    features = Features(torch.empty(0, 6, 12), torch.empty(0, 8), torch.empty(0, 6, dtype=torch.bool))
    for predict in (module(slots=slots), module(slots=slots).train()):
        assert predict(features, torch.empty(0, dtype=torch.int64)).sets.shape == (0, 3, 8)


def test_padding_begins_after_the_length() -> None:
    expected = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 0, 0]]).bool()
    assert torch.equal(padding_after(torch.tensor([2, 0, 3]), 3, torch.device("cpu")), expected)
