"""Set prediction agrees with the authors' numbers; position codes do not depend on how far a sample was padded."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from setwise.models.config import Positions, SetPredictionConfig
from setwise.models.set_prediction import Features, SetPrediction, sine_code_1d, sine_code_2d
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
    "block.to_update.0": "layers.0.0.fn.to_out.0",
    "block.feed_forward.0": "layers.0.2.norm",
    "block.feed_forward.1": "layers.0.2.fn.net.0",
    "block.feed_forward.4": "layers.0.2.fn.net.3",
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
    lengths = (~golden["mask"]).sum(1)
    features = Features(golden["x"], torch.zeros(3, 24, dtype=torch.float64), lengths)
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


def module(positions: Positions = "sine", **settings: int) -> SetPrediction:
    torch.manual_seed(0)
    config = SetPredictionConfig.model_validate({"heads": 2, "head_dim": 4, "iterations": 3, "num_slots": 3} | settings)
    return SetPrediction(config, 8, 12, positions).eval()


def random_features(lengths: Tensor | None = None, grid: tuple[int, int] | None = None) -> Features:
    generator = torch.Generator().manual_seed(1)
    return Features(torch.randn(4, 6, 12, generator=generator), torch.randn(4, 8, generator=generator), lengths, grid)


def test_sets_are_unit_vectors_made_of_slots_and_global_feature() -> None:
    predict, features = module(), random_features()
    result = predict(features)
    assert result.sets.shape == result.slots.shape == (4, 3, 8)
    torch.testing.assert_close(result.sets.norm(dim=-1), torch.ones(4, 3))
    expected = predict.global_norm(features.pooled)[:, None] + result.slots
    torch.testing.assert_close(result.sets * expected.norm(dim=-1, keepdim=True), expected)


def test_attention_is_returned_for_every_iteration_when_asked_for() -> None:
    assert module()(random_features()).attention == ()
    maps = module()(random_features(), keep_attention=True).attention
    assert [tuple(map_.shape) for map_ in maps] == [(4, 2, 3, 6)] * 3
    assert not torch.equal(maps[0], maps[2])


def test_padding_and_neighbours_have_no_influence() -> None:
    features = random_features(lengths=torch.tensor([2, 6, 4, 1]))
    together = module()(features).sets
    for b, length in enumerate((2, 6, 4, 1)):
        alone = Features(features.local[b : b + 1, :length], features.pooled[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], module()(alone).sets, rtol=0, atol=1e-6)


def test_order_of_the_inputs_matters_only_through_the_position_code() -> None:
    features = random_features()
    shuffled = features._replace(local=features.local[:, [3, 1, 5, 0, 2, 4]])
    torch.testing.assert_close(module("none")(features).sets, module("none")(shuffled).sets, rtol=0, atol=1e-6)
    assert (module("sine")(features).sets - module("sine")(shuffled).sets).abs().max() > 1e-3


def test_a_grid_is_coded_by_row_and_column() -> None:
    wide, tall = (module()(random_features(grid=grid)).sets for grid in ((2, 3), (3, 2)))
    assert (wide - tall).abs().max() > 1e-4
    code = sine_code_2d(2, 3, 12)
    assert code.shape == (6, 12)
    torch.testing.assert_close(code[4, :6], sine_code_1d(2, 6)[1])  # row by row: the fifth is row 1, column 1
    torch.testing.assert_close(code[4, 6:], sine_code_1d(3, 6)[1])


def test_sine_code_is_the_formula_and_counts_in_shares_of_the_own_length() -> None:
    code = sine_code_1d(5, 6)
    for n in range(5):
        for pair in range(3):
            angle = 2 * math.pi * (n + 1) / 5 / 10_000 ** (2 * pair / 6)
            expected = torch.tensor([math.sin(angle), math.cos(angle)])
            torch.testing.assert_close(code[n, 2 * pair : 2 * pair + 2], expected, rtol=0, atol=1e-6)
    by_length = sine_code_1d(7, 6, lengths=torch.tensor([5, 7]))
    torch.testing.assert_close(by_length[0, :5], code)
    torch.testing.assert_close(by_length[1], sine_code_1d(7, 6))


@pytest.mark.parametrize("make", [lambda: sine_code_1d(3, 5), lambda: sine_code_2d(3, 3, 6)])
def test_a_width_without_pairs_is_refused(make: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match="even width"):
        make()


def test_every_parameter_learns_slots_included() -> None:
    predict = module()
    features = random_features(lengths=torch.tensor([2, 6, 4, 1]))
    predict(features).sets.square().mul(torch.arange(8)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in predict.named_parameters()}
    assert "slots" in gradients
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []


def test_slots_start_apart_and_stay_apart() -> None:
    sets = module()(random_features()).sets
    assert (sets[:, 0] - sets[:, 1]).norm(dim=-1).min() > 0.05
