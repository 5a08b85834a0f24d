"""Stopped anywhere, also within an epoch, a training ends on the numbers that it would have had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from setwise.pipelines import recipe, resume, train
from setwise.pipelines.recipe import Recipe
from setwise.platform import checkpoint, run
from setwise.platform.errors import DataError, DivergedError, StoppedError
from setwise.platform.run import Run
from trainings import KilledError, digest, overrides_of, start, train_run, without_time

STEPS = 4
"""In an epoch: 80 images, 20 a batch."""
EPOCHS = 3
RANDOM = ["model.set_prediction.dropout=0.3", "data.word_drop=0.2", "data.crop_scale=[0.5, 1]"]


def after(steps: int) -> Callable[[], bool]:
    """A notice that comes after so many steps of one start."""
    seen: list[int] = []

    def notice() -> bool:
        seen.append(1)
        return len(seen) == steps

    return notice


def dies_before(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process end, as it seems, before it does its `step`-th step, counted from 1, once."""
    real, calls = train.global_loss, []

    def global_loss(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == step:
            raise KilledError
        return real(*arguments)

    monkeypatch.setattr(train, "global_loss", global_loss)


def state_of(folder: Path) -> list[Any]:
    """Everything that a checkpoint keeps to go on from, as plain values, without times."""
    saved = checkpoint.training_state(folder)
    saved["within"] = {name: value for name, value in saved["within"].items() if "seconds" not in name}
    return list(_leaves(saved))


def _leaves(value: Any) -> Any:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield key
            yield from _leaves(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value.tolist() if isinstance(value, torch.Tensor) else value


@pytest.fixture(scope="module")
def through(store: Path, tiny_recipe: Recipe) -> tuple[Recipe, Run, list[dict[str, float]]]:
    """A training with all that is random switched on, which nobody disturbs."""
    settings = recipe.load("digits_cnn_bigru", [*overrides_of(tiny_recipe), *RANDOM])
    training = start(store, "through-all", settings)
    return settings, training, train_run(store, training, settings)


@pytest.mark.parametrize("steps", range(1, STEPS * EPOCHS + 1))
def test_stopped_after_any_step_it_goes_on_with_the_next(
    store: Path, through: tuple[Recipe, Run, list[dict[str, float]]], steps: int
) -> None:
    settings, whole, expected = through
    training = start(store, f"after-{steps}", settings)
    with pytest.raises(StoppedError, match=f"epoch {(steps - 1) // STEPS + 1}, after step"):
        train_run(store, training, settings, notice=after(steps))
    done = (steps - 1) // STEPS
    assert [path.name for path in training.steps.iterdir()] == [f"epoch_{done:04d}_step_{steps - done * STEPS:06d}"]

    torch.manual_seed(steps)  # whatever a process has done before
    count = 0

    def notice() -> bool:
        nonlocal count
        count += 1
        return False

    values = train_run(store, training, settings, notice=notice)
    assert count == STEPS * EPOCHS - steps
    assert without_time(values) == without_time(expected)
    last = f"epoch_{EPOCHS:04d}"
    assert digest(training.checkpoints / last) == digest(whole.checkpoints / last)
    assert state_of(training.checkpoints / last) == state_of(whole.checkpoints / last)
    assert not list(training.steps.glob("epoch*"))
    epochs = [event["step"] for event in run.read_events(training.events) if event.get("series") == "train"]
    assert epochs == [1, 2, 3]


OPTIMIZERS = {
    "amsgrad": ("optimizer.kind=adam", "optimizer.amsgrad=true"),
    "adamp": ("optimizer.kind=adamp",),
    "sgd": ("optimizer.kind=sgd", "optimizer.lr=0.1", "optimizer.lookahead_steps=3"),
    "plateau": ("optimizer.schedule=plateau", "optimizer.plateau_patience=0", "optimizer.lr=1e-12"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whatever_the_optimizer_it_goes_on_within_an_epoch_as_if_nothing_had_been(
    store: Path, tiny_recipe: Recipe, name: str
) -> None:
    """Stopped three times: amid the steps of Lookahead, amid an epoch, and after an epoch that lowered the rate."""
    settings = recipe.load("digits_cnn_bigru", [*overrides_of(tiny_recipe), *RANDOM, *OPTIMIZERS[name]])
    whole = start(store, f"optimizer-{name}-whole", settings)
    expected = train_run(store, whole, settings)
    training = start(store, f"optimizer-{name}-stopped", settings)
    for steps in (1, 1, 7):
        with pytest.raises(StoppedError):
            train_run(store, training, settings, notice=after(steps))
    assert without_time(train_run(store, training, settings)) == without_time(expected)
    last = f"epoch_{EPOCHS:04d}"
    assert digest(training.checkpoints / last) == digest(whole.checkpoints / last)
    assert state_of(training.checkpoints / last) == state_of(whole.checkpoints / last)
    if name == "plateau":  # a rate so low that nothing changes, so that no epoch is better than the first
        first = settings.optimizer.lr
        factor = settings.optimizer.step_factor
        assert [values["train/lr"] for values in expected] == pytest.approx([first, first, first * factor])
    else:
        assert expected[-1]["train/total"] < expected[0]["train/total"]


@pytest.mark.parametrize("death", [2, 4, 5, 8, 12])
def test_a_death_costs_as_many_steps_as_the_recipe_says(
    store: Path, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, death: int
) -> None:
    settings = recipe.load("digits_cnn_bigru", [*overrides_of(tiny_recipe), "train.checkpoint_steps=2"])
    training = start(store, f"dies-{death}", settings)
    with monkeypatch.context() as patched:
        dies_before(death, patched)
        with pytest.raises(KilledError):
            train_run(store, training, settings)
    done = 0

    def notice() -> bool:
        nonlocal done
        done += 1
        return False

    train_run(store, training, settings, notice=notice)
    again = done - (STEPS * EPOCHS - (death - 1))
    assert 0 <= again < 2


def test_the_wish_to_stop_is_heard_at_an_epochs_end_and_forgotten_by_nobody_but_the_next_start(
    store: Path, tiny_recipe: Recipe
) -> None:
    training = start(store, "asked", tiny_recipe)

    def ask() -> bool:
        training.stop.touch()
        return False

    with pytest.raises(StoppedError):
        train_run(store, training, tiny_recipe, notice=ask)  # heard in the second step
    with pytest.raises(StoppedError, match="after step 3"):
        train_run(store, training, tiny_recipe)


def test_a_damaged_checkpoint_within_an_epoch_gives_way_to_the_one_before_it(
    store: Path, through: tuple[Recipe, Run, list[dict[str, float]]]
) -> None:
    settings, _, expected = through
    training = start(store, "damaged-steps", settings)
    for steps in (5, 1):  # in the second epoch: after its first step, and after its second
        with pytest.raises(StoppedError):
            train_run(store, training, settings, notice=after(steps))
    newest = training.steps / "epoch_0001_step_000002"
    for folder, fallback in ((newest, "epoch_0001_step_000001"), (None, "epoch_0001")):
        damaged = folder or training.steps / "epoch_0001_step_000001"
        state = damaged / checkpoint.TRAINING_STATE
        data = bytearray(state.read_bytes())
        data[len(data) // 3] ^= 4
        state.write_bytes(data)
        found = resume.newest(training)
        assert found is not None and found.name == fallback
    assert without_time(train_run(store, training, settings)) == without_time(expected)


def test_where_all_are_damaged_it_does_not_begin_anew_without_a_word(store: Path, tiny_recipe: Recipe) -> None:
    training = start(store, "all-damaged", tiny_recipe)
    with pytest.raises(StoppedError):
        train_run(store, training, tiny_recipe, notice=after(2))
    (training.steps / "epoch_0000_step_000002" / checkpoint.WEIGHTS).unlink()
    with pytest.raises(DataError, match="every checkpoint is damaged"):
        train_run(store, training, tiny_recipe)


def test_a_loss_that_is_not_finite_is_kept_by_no_checkpoint(
    store: Path, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the step after which one is due, or asked for, is the one that went wrong."""
    settings = recipe.load("digits_cnn_bigru", [*overrides_of(tiny_recipe), "train.checkpoint_steps=1"])
    training = start(store, "poisoned", settings)
    real, calls = train.global_loss, []

    def poisoned(*arguments: Any) -> Any:
        calls.append(1)
        parts = real(*arguments)
        return parts | {"total": parts["total"] * float("nan")} if len(calls) == 3 else parts

    monkeypatch.setattr(train, "global_loss", poisoned)
    with pytest.raises(DivergedError, match="step 2"):
        train_run(store, training, settings, notice=after(3))
    assert sorted(path.name for path in training.steps.iterdir()) == [
        "epoch_0000_step_000001",
        "epoch_0000_step_000002",
    ]


def test_an_optimizer_s_state_goes_to_another_kind_of_device_in_the_form_that_is_wanted_there() -> None:
    """As a run that was begun on a CPU has it on a GPU: channels last, with a fused kernel."""
    here = torch.nn.Parameter(torch.randn(4, 3, 2, 2))
    first = torch.optim.AdamW([here])
    here.grad = torch.randn_like(here)
    first.step()
    there = torch.nn.Parameter(here.detach().clone(memory_format=torch.channels_last))
    second = torch.optim.AdamW([there])
    resume.load_optimizer(second, first.state_dict())
    assert second.state[there]["exp_avg"].stride() == there.stride() != here.stride()
    assert torch.equal(second.state[there]["exp_avg"], first.state[here]["exp_avg"])

    far = torch.nn.Parameter(torch.empty(4, 3, 2, 2, device="meta"))
    fused = torch.optim.AdamW([far])
    fused.defaults["fused"] = True  # which torch allows on devices that have such a kernel
    resume.load_optimizer(fused, first.state_dict())
    assert fused.param_groups[0]["fused"] is True
    assert {value.device.type for value in fused.state[far].values()} == {"meta"}
