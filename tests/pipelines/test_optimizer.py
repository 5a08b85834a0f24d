"""The schedule as a function of what is known at a step, and optimizers whose state can be found again.

AdamP and Lookahead against their papers, number by number (reference/optimizers.py).
"""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference.optimizers import AdamP, lookahead_of_momentum
from setwise.pipelines import optimizer
from setwise.pipelines.recipe import OptimizerConfig

KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw, amsgrad": {"amsgrad": True},
    "adam": {"kind": "adam"},
    "adam, amsgrad": {"kind": "adam", "amsgrad": True},
    "adamp": {"kind": "adamp"},
    "sgd": {"kind": "sgd"},
    "sgd without momentum": {"kind": "sgd", "momentum": 0},
    "sgd in lookahead": {"kind": "sgd", "lookahead_steps": 3},
    "adam in lookahead": {"kind": "adam", "lookahead_steps": 2, "lookahead_alpha": 0.8},
    "adamp in lookahead": {"kind": "adamp", "lookahead_steps": 3},
}


def rates(steps: int = 100, **settings: object) -> list[float]:
    config = OptimizerConfig.model_validate({"lr": 0.1, **settings})
    return [optimizer.learning_rate(config, step, steps, steps_per_epoch=10) for step in range(steps)]


def test_cosine_falls_from_the_peak_to_nothing_half_way_through_half() -> None:
    values = rates()
    assert values[0] == 0.1
    assert values[50] == pytest.approx(0.05)
    assert values[25] + values[75] == pytest.approx(0.1)
    assert 0 < values[-1] < 0.001
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "step"])
def test_warm_up_rises_evenly_to_the_peak_and_never_starts_at_nothing(schedule: str) -> None:
    values = rates(warmup_steps=10, schedule=schedule)
    steps = [after - before for before, after in itertools.pairwise(values[:11])]
    assert steps == pytest.approx([0.1 / 11] * 10)
    assert values[0] == pytest.approx(0.1 / 11)
    assert values[10] == max(values) == 0.1
    assert values[10:] == sorted(values[10:], reverse=True)


def test_constant_stays() -> None:
    assert set(rates(schedule="constant")) == {0.1}


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 5), (5, 5), (10, 200), (2, 1)])
def test_short_trainings_get_rates_that_are_possible(steps: int, warmup: int) -> None:
    assert all(0 < rate <= 0.1 for rate in rates(steps, warmup_steps=warmup))


def test_steps_come_between_epochs() -> None:
    values = rates(schedule="step", step_epochs=3, step_factor=0.5)
    assert values == [0.1] * 30 + [0.05] * 30 + [0.025] * 30 + [0.0125] * 10


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_a_plateau_is_what_torch_takes_for_one(patience: int) -> None:
    generator = torch.Generator().manual_seed(patience)
    measured = (torch.randint(0, 8, (40,), generator=generator) + torch.arange(40) / 8).floor().tolist()
    measured[5] = math.nan
    weight = torch.zeros(1, requires_grad=True)
    sgd = torch.optim.SGD([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(sgd, "max", 0.5, patience, threshold=0, eps=0)
    config = OptimizerConfig(lr=0.1, schedule="plateau", step_factor=0.5, plateau_patience=patience)
    expected = []
    for value in measured:
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step(value)
    for epoch, rate in enumerate(expected):
        for step in (10 * epoch, 10 * epoch + 9):  # whether more is known by then or not
            assert optimizer.learning_rate(config, step, 400, 10, measured[:epoch]) == pytest.approx(rate)
            assert optimizer.learning_rate(config, step, 400, 10, measured) == pytest.approx(rate)
    assert len(set(expected)) > 3


def test_before_anything_is_measured_a_plateau_is_none_and_warm_up_goes_first() -> None:
    values = rates(30, schedule="plateau", plateau_patience=0, warmup_steps=5)
    assert values[:5] == pytest.approx([0.1 * step / 6 for step in range(1, 6)]) and set(values[5:]) == {0.1}


class Small(nn.Module):
    def __init__(self, names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Parameter(torch.full((ord(name) - 95,), 1.0)))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)


def test_state_is_found_again_whatever_the_order_of_construction() -> None:
    """Optimizer state is stored by position; a module built in another order must read it in the right places."""
    first, second = Small("abc"), Small("cba")
    one = optimizer.make(first, OptimizerConfig())
    first_loss = sum((parameter**2).sum() for parameter in first.parameters())
    assert isinstance(first_loss, torch.Tensor)
    first_loss.backward()  # type: ignore[no-untyped-call]
    one.step()
    other = optimizer.make(second, OptimizerConfig())
    other.load_state_dict(one.state_dict())
    for name in "abc":
        before, after = getattr(first, name), getattr(second, name)
        assert torch.equal(one.state[before]["exp_avg"], other.state[after]["exp_avg"])


def test_every_trained_parameter_decays_and_no_frozen_one() -> None:
    module = Small("ab")
    made = optimizer.make(module, OptimizerConfig(lr=0.5, weight_decay=0.1))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.set_learning_rate(made, 0.25)
    made.step()
    assert module.frozen.item() == 1.0
    for name in "ab":
        assert torch.allclose(getattr(module, name), torch.tensor(1 - 0.25 * 0.1))


def path(config: OptimizerConfig, updates: int, resumed_after: int = 0) -> tuple[Tensor, torch.optim.Optimizer]:
    """A matrix and a vector, moved by gradients that depend on them, flattened; the optimizer is made anew on the way.

    Gradients of half of the updates are orthogonal to the matrix, as those of a weight before a normalisation.
    """
    torch.manual_seed(0)
    module = nn.ModuleDict({"sets": nn.Linear(5, 3)}).double()
    made = optimizer.make(module, config)
    for number in range(updates):
        if number == resumed_after > 0:
            file = io.BytesIO()
            torch.save([module.state_dict(), made.state_dict()], file)
            file.seek(0)
            weights, state = torch.load(file, weights_only=True)
            module = nn.ModuleDict({"sets": nn.Linear(5, 3)}).double()
            module.load_state_dict(weights)
            made = optimizer.make(module, config)
            made.load_state_dict(state)
        optimizer.set_learning_rate(made, config.lr / (number + 1))
        made.zero_grad(set_to_none=True)
        matrix, vector = module["sets"].weight, module["sets"].bias
        if number % 2:
            matrix = matrix / matrix.norm(dim=1, keepdim=True)
        goal = torch.arange(15.0).reshape(3, 5).sin() + number / 7
        ((matrix - goal) ** 2).sum().add((vector**4).sum()).backward()  # type: ignore[no-untyped-call]
        made.step()
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]), made


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_optimizer_remembers_is_all_it_needs_to_go_on(kind: str) -> None:
    config = OptimizerConfig(lr=0.1, weight_decay=0.02, **KINDS[kind])
    through, _ = path(config, 8)
    for updates in range(1, 8):
        assert torch.equal(path(config, 8, resumed_after=updates)[0], through)


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_remembers_as_many_numbers_as_an_estimate_takes_it_to(kind: str) -> None:
    config = OptimizerConfig(**KINDS[kind])
    weights, made = path(config, 3)
    kept = sum(
        value.numel()
        for state in made.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.dim()
    )
    assert kept == config.numbers_per_weight * weights.numel()


def test_every_kind_is_one_of_its_own() -> None:
    ends = [tuple(path(OptimizerConfig(lr=0.1, weight_decay=0.02, **KINDS[kind]), 8)[0].tolist()) for kind in KINDS]
    assert len(set(ends)) == len(KINDS)


def test_unless_a_recipe_names_another_it_is_adamw() -> None:
    torch.manual_seed(0)
    module = nn.ModuleDict({"sets": nn.Linear(5, 3)})
    twin = nn.Linear(5, 3)
    twin.load_state_dict(module["sets"].state_dict())
    made = optimizer.make(module, OptimizerConfig(lr=0.1, weight_decay=0.3))
    plain = torch.optim.AdamW([twin.bias, twin.weight], lr=0.1, weight_decay=0.3)
    for number in range(5):
        for one in (module["sets"], twin):
            one.zero_grad()
            one(torch.arange(10.0).reshape(2, 5) - number).square().sum().backward()
        made.step()
        plain.step()
    assert torch.equal(module["sets"].weight, twin.weight) and torch.equal(module["sets"].bias, twin.bias)


def test_decay_is_apart_from_the_gradient_or_part_of_it() -> None:
    """Without a gradient from elsewhere, Adam takes a whole step of lr by the decay alone."""
    moved = {}
    for kind in ("adamw", "adamp", "sgd", "adam"):
        module = Small("b")
        made = optimizer.make(module, OptimizerConfig.model_validate({"kind": kind, "lr": 0.5, "weight_decay": 0.1}))
        module.get_parameter("b").grad = torch.zeros(3)
        made.step()
        moved[kind] = 1 - module.get_parameter("b")[0].item()
    assert moved == pytest.approx({"adamw": 0.05, "adamp": 0.05, "sgd": 0.05, "adam": 0.5})


@pytest.mark.parametrize("kind", ["sgd", "adamp"])
def test_amsgrad_has_to_be_of_a_kind_that_has_it(kind: str) -> None:
    with pytest.raises(ValueError, match=f"not of '{kind}'"):
        OptimizerConfig.model_validate({"kind": kind, "amsgrad": True})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_adamp_is_that_of_the_paper(dtype: torch.dtype, tolerance: float) -> None:
    """With gradients orthogonal to each row, to all rows together, and to neither."""
    generator = torch.Generator().manual_seed(0)
    module = nn.ModuleDict({"sets": nn.Linear(4, 3, bias=False)}).to(dtype)
    weight = module["sets"].weight
    with torch.no_grad():
        weight.copy_(torch.randn(3, 4, generator=generator, dtype=torch.float64))
    made = optimizer.make(module, OptimizerConfig(kind="adamp", lr=0.05, weight_decay=0.4))
    oracle = AdamP(0.05, 0.4)
    for number in range(12):
        gradient = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        now = weight.detach().double()
        if number % 3 == 0:
            gradient -= now * ((gradient * now).sum(1) / (now * now).sum(1))[:, None]
        elif number % 3 == 1:
            gradient -= now * (gradient * now).sum() / (now * now).sum()
        else:
            gradient += now
        weight.grad = gradient.to(dtype)
        expected = oracle.step(now.tolist(), gradient.to(dtype).tolist())
        made.step()
        torch.testing.assert_close(
            weight.detach().double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
        )
    assert oracle.seen == ["rows", "whole", "not"] * 4


def test_adamp_never_looks_at_a_number() -> None:
    """That would make the host wait for a GPU. Tensors without data have none that could be looked at."""
    module = nn.ModuleDict({"sets": nn.Conv2d(3, 8, 3, device="meta")})
    made = optimizer.make(module, OptimizerConfig(kind="adamp"))
    for parameter in module.parameters():
        parameter.grad = torch.empty_like(parameter)
    made.step()
    assert all(made.state[parameter]["step"] == 1 for parameter in module.parameters())


@pytest.mark.parametrize(("steps", "alpha"), [(1, 0.5), (5, 0.5), (3, 0.8), (2, 1.0)])
def test_lookahead_is_that_of_the_paper(steps: int, alpha: float) -> None:
    slopes = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    module = nn.ParameterDict({"a": nn.Parameter(torch.full((1,), 0.7, dtype=torch.float64))})
    settings = {"kind": "sgd", "lr": 0.1, "weight_decay": 0, "lookahead_steps": steps, "lookahead_alpha": alpha}
    made = optimizer.make(module, OptimizerConfig.model_validate(settings))
    expected = lookahead_of_momentum(0.7, slopes.tolist(), 0.1, 0.9, steps, alpha)
    for slope, value in zip(slopes, expected, strict=True):
        module["a"].grad = slope[None]
        made.step()
        assert float(module["a"].detach()) == pytest.approx(value, rel=1e-12)


def test_lookahead_takes_weights_as_they_are_when_they_begin_to_learn() -> None:
    """The backbone, which stands still at first; and what gets no gradient in the update of all others follows too."""
    module = nn.ParameterDict({name: nn.Parameter(torch.zeros(1)) for name in "ab"})
    settings = {"kind": "sgd", "lr": 1.0, "momentum": 0, "weight_decay": 0, "lookahead_steps": 4}
    made = optimizer.make(module, OptimizerConfig.model_validate(settings))
    for gradients in ("a", "a", "ab", "a"):
        made.zero_grad(set_to_none=True)
        for name in gradients:
            module[name].grad = -torch.ones(1)
        made.step()
    assert (module["a"].item(), module["b"].item()) == (2.0, 0.5)


def test_lookahead_does_not_count_an_update_that_fp16_leaves_out() -> None:
    module = nn.ParameterDict({"a": nn.Parameter(torch.zeros(1))})
    settings = {"kind": "sgd", "lr": 1.0, "momentum": 0, "weight_decay": 0, "lookahead_steps": 2}
    made = optimizer.make(module, OptimizerConfig.model_validate(settings))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    path = []
    for slope in (-1.0, math.inf, -1.0, -1.0):
        made.zero_grad(set_to_none=True)
        scaler.scale(module["a"].sum() * slope).backward()  # type: ignore[no-untyped-call]
        scaler.step(made)
        scaler.update()
        path.append(module["a"].item())
    assert path == [1.0, 1.0, 1.0, 2.0]  # the third goes to 2 and half the way back


class Parts(nn.Module):
    """Named as the parts of a model are."""

    def __init__(self) -> None:
        super().__init__()
        self.retriever = nn.ModuleDict(
            {
                "image_encoder": nn.ModuleDict({"backbone": nn.Linear(1, 1), "head": nn.Linear(1, 1)}),
                "image_sets": nn.Linear(1, 1),
                "text_encoder": nn.Linear(1, 1),
                "text_sets": nn.Linear(1, 1),
            }
        )
        self.similarity = nn.ParameterDict({"scale": nn.Parameter(torch.ones(()))})


SCALES = {"backbone_scale": 0.01, "image_scale": 10.0, "text_scale": 2.0, "text_sets_scale": 0.1}


def test_each_part_has_the_scale_of_its_group() -> None:
    module = Parts()
    made = optimizer.make(module, OptimizerConfig(lr=0.5, **SCALES))
    optimizer.set_learning_rate(made, 0.25)
    rate = {id(parameter): group["lr"] / 0.25 for group in made.param_groups for parameter in group["params"]}
    found = {name.removesuffix(".weight"): rate[id(parameter)] for name, parameter in module.named_parameters()}
    assert {name: value for name, value in found.items() if not name.endswith("bias")} == pytest.approx(
        {
            "retriever.image_encoder.backbone": 0.01,
            "retriever.image_encoder.head": 10.0,
            "retriever.image_sets": 10.0,
            "retriever.text_encoder": 2.0,
            "retriever.text_sets": 0.1,
            "similarity.scale": 1.0,
        }
    )


def test_the_backbone_stands_still_at_first_and_moves_afterwards() -> None:
    module, config = Parts(), OptimizerConfig(frozen_backbone_epochs=2)
    made = optimizer.make(module, config)

    def moved(epoch: int) -> set[str]:
        before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        made.zero_grad(set_to_none=True)
        sum((p * 3).sum() for p in module.parameters() if p.requires_grad).backward()  # type: ignore[union-attr]
        made.step()
        return {name for name, parameter in module.named_parameters() if not torch.equal(before[name], parameter)}

    everything = {name for name, _ in module.named_parameters()}
    backbone = {name for name in everything if "backbone" in name}
    assert [optimizer.freeze(module, config, epoch) for epoch in (1, 2)] == [True, False]
    assert moved(2) == everything - backbone
    assert optimizer.freeze(module, config, 3)
    assert moved(3) == everything
    assert not optimizer.freeze(module, config, 4)
    assert not optimizer.freeze(Parts(), OptimizerConfig(), 1)


def test_scales_and_standing_still_are_of_a_captioners_backbone_too() -> None:
    module = nn.ModuleDict(
        {"captioner": nn.ModuleDict({"image_encoder": nn.ModuleDict({"backbone": nn.Linear(1, 1)})})}
    )
    config = OptimizerConfig(lr=1e-3, backbone_scale=200, frozen_backbone_epochs=1)
    made = optimizer.make(module, config)
    optimizer.set_learning_rate(made, config.lr)
    assert [group["lr"] for group in made.param_groups] == pytest.approx([0.2])
    assert optimizer.freeze(module, config, 1)
    backbone = module.get_submodule("captioner.image_encoder.backbone")
    assert not backbone.training and module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert optimizer.freeze(module, config, 2) and all(parameter.requires_grad for parameter in module.parameters())


def test_a_similarity_belongs_to_no_side() -> None:
    """The weights of cross-attention have names that begin with image_ too."""
    config = OptimizerConfig(image_scale=0.1, text_scale=0.5)
    assert optimizer._scale("similarity.image_within.weight", config) == 1
    assert optimizer._scale("retriever.image_sets.slots", config) == 0.1
