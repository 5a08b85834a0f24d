"""The train loop as a plain function: its numbers, and that stopping anywhere changes none of them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from setwise.pipelines import prepare, recipe, train
from setwise.pipelines.recipe import Recipe
from setwise.platform import checkpoint, config, run
from setwise.platform.errors import DataError
from setwise.platform.run import Run

GOLDEN = Path(__file__).parents[1] / "golden" / "training_step.json"


class StoppedError(Exception):
    """Stands for the end of a process at the end of an epoch."""


def start(store: Path, name: str, settings: Recipe) -> Run:
    return run.create(store / "runs", name, config.to_yaml(settings), experiment="tests")


def train_run(store: Path, training: Run, settings: Recipe, stop_after: int | None = None) -> list[dict[str, float]]:
    """Train; `stop_after` ends it as that epoch is reported for the first time."""
    seen: list[dict[str, float]] = []

    def report(values: dict[str, float]) -> None:
        seen.append(values)
        if values["epoch"] == stop_after:
            raise StoppedError

    train.train(settings, training, store, train.Worker(), report)
    return seen


def digest(folder: Path) -> str:
    weights = checkpoint.weights(folder)
    return hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()


def without_time(values: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in epoch.items() if name != "train/seconds"} for epoch in values]


def test_two_steps_give_the_golden_numbers(store: Path, tiny_recipe: Recipe) -> None:
    """One epoch of two steps from a fixed seed, so that an update lies between, against numbers in the repository."""
    settings = recipe.load("digits_cnn_bigru", [*_tiny(tiny_recipe), "train.epochs=1", "train.batch_size=40"])
    values = train_run(store, start(store, "golden", settings), settings)[0]
    measured = {name: values[name] for name in sorted(values) if name.startswith("train/") and name != "train/seconds"}
    if os.environ.get("SETWISE_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(measured, indent=1) + "\n")
    expected = json.loads(GOLDEN.read_text())
    assert measured == pytest.approx(expected, rel=1e-4), (
        "The loss parts of two training steps have changed. If you only meant to refactor, this is a bug. If it is "
        "meant, write them anew with SETWISE_WRITE_GOLDEN=1 and put old and new numbers into the commit message."
    )


def _tiny(settings: Recipe) -> list[str]:
    """The overrides that lead from the shipped recipe to `settings`."""
    base = config.flatten(recipe.load("digits_cnn_bigru"))
    changed = {name: value for name, value in config.flatten(settings).items() if base[name] != value}
    return [f"{name}={json.dumps(value)}" for name, value in changed.items()]


@pytest.mark.parametrize("stop_after", [1, 2])
def test_stopped_and_resumed_equals_trained_through(store: Path, tiny_recipe: Recipe, stop_after: int) -> None:
    through, stopped = (start(store, f"{name}-{stop_after}", tiny_recipe) for name in ("through", "stopped"))
    expected = train_run(store, through, tiny_recipe)
    with pytest.raises(StoppedError):
        train_run(store, stopped, tiny_recipe, stop_after)
    resumed = train_run(store, stopped, tiny_recipe)

    assert without_time(resumed) == without_time(expected)
    assert [values["epoch"] for values in resumed] == [1, 2, 3]
    assert digest(stopped.checkpoints / "epoch_0003") == digest(through.checkpoints / "epoch_0003")
    steps = [event["step"] for event in run.read_events(stopped.events) if event["kind"] == "metrics"]
    assert steps == [1, 2, 3]


def test_dropout_goes_on_where_it_was(store: Path, tiny_recipe: Recipe) -> None:
    """With dropout the random state matters: a resume that forgot it would part from the straight run."""
    settings = recipe.load("digits_cnn_bigru", [*_tiny(tiny_recipe), "model.set_prediction.dropout=0.3"])
    through, stopped = (start(store, f"dropout-{name}", settings) for name in ("through", "stopped"))
    expected = train_run(store, through, settings)
    with pytest.raises(StoppedError):
        train_run(store, stopped, settings, stop_after=1)
    torch.manual_seed(12345)
    assert without_time(train_run(store, stopped, settings)) == without_time(expected)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(store: Path, tiny_recipe: Recipe) -> None:
    training = start(store, "damaged", tiny_recipe)
    with pytest.raises(StoppedError):
        train_run(store, training, tiny_recipe, stop_after=2)
    weights = training.checkpoints / "epoch_0002" / checkpoint.WEIGHTS
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    epochs = [values["epoch"] for values in train_run(store, training, tiny_recipe)]
    assert epochs == [1, 2, 3]
    assert (training.checkpoints / "epoch_0002.damaged").is_dir()
    assert [e["step"] for e in run.read_events(training.events) if e["kind"] == "metrics"] == [1, 2, 3]


def test_a_run_does_not_go_on_with_other_data(
    store: Path, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = start(store, "other-data", tiny_recipe)
    with pytest.raises(StoppedError):
        train_run(store, training, tiny_recipe, stop_after=1)
    prepared = prepare.open_prepared("digits", store)
    other = prepare.Prepared(prepared.folder, {**prepared.manifest, "fingerprint": "another"})
    monkeypatch.setattr(prepare, "open_prepared", lambda name, folder: other)
    with pytest.raises(DataError, match="is another"):
        train_run(store, training, tiny_recipe)


def test_killed_in_the_middle_it_ends_on_the_same_weights(store: Path, tiny_recipe: Recipe) -> None:
    """SIGKILL of a real process within the second epoch, then the same command again."""
    through, killed = (start(store, f"kill-{name}", tiny_recipe) for name in ("through", "killed"))
    train_run(store, through, tiny_recipe)
    code = f"""
import os, signal, torch
from pathlib import Path
from setwise.pipelines import train
from setwise.pipelines.recipe import Recipe
from setwise.platform.errors import DataError
from setwise.platform.run import Run
recipe = Recipe.model_validate_json({tiny_recipe.model_dump_json()!r})
real, calls = train.batch_loss, []
def batch_loss(*arguments):
    calls.append(1)
    if len(calls) == 6:  # four steps an epoch
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
train.batch_loss = batch_loss
train.train(recipe, Run(Path({str(killed.folder)!r})), Path({str(store)!r}), train.Worker(), print)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(path.name for path in killed.checkpoints.iterdir()) == ["epoch_0001"]
    train_run(store, killed, tiny_recipe)
    assert digest(killed.checkpoints / "epoch_0003") == digest(through.checkpoints / "epoch_0003")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_good(
    store: Path, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = start(store, "diverged", tiny_recipe)
    real = train.batch_loss
    calls: list[int] = []

    def poisoned(*arguments: object) -> object:
        calls.append(1)
        parts = real(*arguments)  # type: ignore[arg-type]
        return parts._replace(total=parts.total * math.nan) if len(calls) == 6 else parts

    monkeypatch.setattr(train, "batch_loss", poisoned)
    with pytest.raises(train.DivergedError, match=r"step 5 \(epoch 2\).*gradient norm nan"):
        train_run(store, training, tiny_recipe)
    assert training.best_checkpoint().name == "epoch_0001"


def test_best_and_newest_checkpoints_are_kept_and_no_others(store: Path, tiny_recipe: Recipe) -> None:
    settings = recipe.load("digits_cnn_bigru", [*_tiny(tiny_recipe), "train.epochs=5", "optimizer.lr=0.01"])
    training = start(store, "kept", settings)
    values = train_run(store, training, settings)
    best = max(values, key=lambda epoch: epoch["val/rsum"])
    kept = {path.name for path in training.checkpoints.iterdir()}
    assert kept == {"epoch_0004", "epoch_0005", f"epoch_{int(best['epoch']):04d}"}
    assert checkpoint.metadata(training.best_checkpoint())["history"][-1]["val/rsum"] == best["val/rsum"]


def test_it_learns(store: Path) -> None:
    """Forty steps on eighty images: the training loss falls, and the training images are told apart."""
    prepared = prepare.open_prepared("digits", store)
    assert prepared.manifest["splits"]["train"]["images"] == 80
    overrides = ["model.embed_size=32", "model.image_encoder.channels=[16, 16, 32]", "train.batch_size=20"]
    settings = recipe.load("digits_cnn_bigru", [*overrides, "train.epochs=10", "optimizer.lr=0.003"])
    values = train_run(store, start(store, "learns", settings), settings)
    assert values[-1]["train/total"] < 0.9 * values[0]["train/total"]
    assert values[-1]["val/rsum"] > 2 * 62  # chance among 30 images is about 62 (metrics.chance_rsum)
