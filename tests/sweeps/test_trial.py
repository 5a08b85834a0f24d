"""One trial in this process: what it reports, and that its failure is a result with a reason."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import tune

from setwise.pipelines import train
from setwise.pipelines.recipe import Recipe
from setwise.platform import run, storage
from setwise.platform.errors import DivergedError
from setwise.sweeps import trial

ALPHA = "similarity.alpha"


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", results.append)
    return results


@pytest.fixture
def own(store: Path, tmp_path: Path) -> Path:
    """A store of its own with the data of the others, and a study in it."""
    (tmp_path / "data").symlink_to(store / "data")
    run.create(tmp_path / "studies", "mine", "a study\n", "mine")
    return tmp_path


def go(store: Path, recipe: Recipe, objectives: tuple[str, ...] = ("val/rsum",), **config: Any) -> run.Run:
    settings = trial.settings_of("mine", recipe, store, objectives, population=False)
    trial.train_trial({"trial": 3, "values": {ALPHA: 8.0}, **config}, settings)
    seed = f"-seed{config['seed']}" if "seed" in config else ""
    return run.Run(store / "runs" / f"mine-003{seed}")


def test_each_epoch_is_reported_with_the_best_so_far(
    own: Path, tiny_recipe: Recipe, reported: list[dict[str, Any]]
) -> None:
    trained = go(own, tiny_recipe, ("val/rsum", "embedding_size", "query_ms"))
    assert [one["epoch"] for one in reported] == list(range(1, tiny_recipe.train.epochs + 1))
    best = -math.inf
    for one in reported:
        best = max(best, one["rsum"])
        assert (one["val/rsum"], one["trial"]) == (best, 3)
        size = tiny_recipe.model.set_prediction.num_slots * tiny_recipe.model.embed_size
        assert one["embedding_size"] == size and one["query_ms"] > 0
    costs = [event["values"] for event in run.read_events(trained.events) if event.get("series") == "cost"]
    assert costs == [{"cost/embedding_size": size, "cost/query_ms": reported[0]["query_ms"]}]
    go(own, tiny_recipe, ("val/rsum", "embedding_size", "query_ms"))  # it was killed after its last epoch
    again = reported[tiny_recipe.train.epochs :]
    assert [one["query_ms"] for one in again] == [reported[0]["query_ms"]] * tiny_recipe.train.epochs


def test_another_seed_is_another_run_beside_the_trial(
    own: Path, tiny_recipe: Recipe, reported: list[dict[str, Any]]
) -> None:
    first, second = go(own, tiny_recipe), go(own, tiny_recipe, seed=5)
    assert first.parent is not None and second.parent is not None
    assert first.parent.name == second.parent.name == "mine" and second.name == "mine-003-seed5"
    assert "seed: 5" in second.config.read_text() and "alpha: 8.0" in second.config.read_text()
    half = len(reported) // 2
    assert [one["rsum"] for one in reported[:half]] != [one["rsum"] for one in reported[half:]]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DivergedError("the loss is not finite any more at step 7"), "the loss is not finite any more at step 7"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), "out of memory: CUDA out of memory"),
        (KeyError("x"), "KeyError: 'x'"),
    ],
)
def test_a_failure_is_the_last_result(
    own: Path,
    tiny_recipe: Recipe,
    reported: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    reason: str,
) -> None:
    real = train.train

    def fails_after_an_epoch(
        recipe: Recipe, training: run.Run, store: Path, worker: Any, report: Any, **more: Any
    ) -> None:
        def then(values: dict[str, float]) -> None:
            report(values)
            raise error

        real(recipe, training, store, worker, then, **more)

    monkeypatch.setattr(train, "train", fails_after_an_epoch)
    failed = go(own, tiny_recipe)
    assert [one["epoch"] for one in reported] == [1, 0]
    assert reported[1]["failure"].startswith(reason)
    assert math.isnan(reported[1]["rsum"]) and math.isnan(reported[1]["val/rsum"])
    assert (failed.folder / "error.txt").is_file() == (not isinstance(error, DivergedError))


def test_a_run_that_another_process_still_writes_is_no_failure_of_the_training(
    own: Path, tiny_recipe: Recipe, reported: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "WRITER_WAIT_S", 0)
    left_behind = storage.lease(own / "runs" / "mine-003" / "writer.lease", "run 'mine-003'")
    with left_behind, pytest.raises(storage.LeaseHeldError):
        go(own, tiny_recipe)
    assert not reported
    go(own, tiny_recipe)
    assert [one["epoch"] for one in reported] == list(range(1, tiny_recipe.train.epochs + 1))


def test_a_name_that_is_taken_is_a_failure_that_touches_nothing(
    own: Path, tiny_recipe: Recipe, reported: list[dict[str, Any]]
) -> None:
    other = run.create(own / "runs", "mine-003", "data: {}\n", "another")
    go(own, tiny_recipe)
    assert "exists with another configuration" in reported[0]["failure"]
    assert not other.events.exists()


def test_of_several_trials_in_one_process_the_last_one_was_ended_for_memory(tmp_path: Path) -> None:
    said = "Considered workers: [(A, pid=11), (B, pid=22)]\nSelected to kill: (Actor(x), pid=11, memory used=9GB)\n"
    trainings = [run.Run(tmp_path / name) for name in ("stands-still", "at-work", "elsewhere", "never-began")]
    for number, (training, process) in enumerate(zip(trainings[:3], ("11", "11", "22"), strict=True)):
        storage.write_bytes(training.folder / trial.PROCESS, process.encode())
        os.utime(training.folder / trial.PROCESS, ns=(number, number))
    assert trial.ended_for_memory(Exception(said), trainings) == [trainings[1]]
    assert trial.ended_for_memory(Exception("pid=33"), trainings) == []


@pytest.mark.parametrize("file", ["run.json", "config.yaml", "events.jsonl"])
def test_a_disk_that_is_full_as_a_trial_begins_is_no_failure_of_the_trial(
    own: Path, tiny_recipe: Recipe, reported: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    real = Path.open

    def full(path: Path, *arguments: Any, **named: Any) -> Any:
        if file in path.name and arguments and arguments[0] != "rb":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", full)
    go(own, tiny_recipe)
    assert "cannot be written (No space left on device" in reported[-1]["study_failure"]
    assert "failure" not in reported[-1]
