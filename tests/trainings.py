"""Trainings by the loop as a plain function, in this process, and what is compared of two."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from setwise.pipelines import recipe, train
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.workers import Worker
from setwise.platform import checkpoint, config, run
from setwise.platform.run import Run

TIMES = ("train/seconds", "train/images_per_second")
"""What no two trainings have in common."""


class KilledError(Exception):
    """Stands for the end of a process."""


def start(store: Path, name: str, settings: Recipe) -> Run:
    return run.create(store / "runs", name, config.to_yaml(settings), experiment="tests")


def train_run(
    store: Path,
    training: Run,
    settings: Recipe,
    stop_after: int | None = None,
    notice: Callable[[], bool] = lambda: False,
) -> list[dict[str, float]]:
    """Train; `stop_after` ends it as that epoch is reported for the first time."""
    seen: list[dict[str, float]] = []

    def report(values: dict[str, float]) -> None:
        seen.append(values)
        if values["epoch"] == stop_after:
            raise KilledError

    train.train(settings, training, store, Worker(), report, notice)
    return seen


def digest(folder: Path) -> str:
    """Of the weights in a checkpoint."""
    weights = checkpoint.weights(folder)
    return hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()


def without_time(values: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in epoch.items() if name not in TIMES} for epoch in values]


def overrides_of(settings: Recipe) -> list[str]:
    """The overrides that lead from the shipped recipe to `settings`."""
    base = config.flatten(recipe.load("digits_cnn_bigru"))
    changed = {name: value for name, value in config.flatten(settings).items() if base[name] != value}
    return [f"{name}={json.dumps(value)}" for name, value in changed.items()]
