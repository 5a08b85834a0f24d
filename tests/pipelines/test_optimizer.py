"""The schedule as a function of the step, and an optimizer whose state can be found again."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from setwise.pipelines import optimizer
from setwise.pipelines.recipe import OptimizerConfig


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
