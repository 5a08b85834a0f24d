"""Population based training: copies are whole, and a population goes on, whatever is killed."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from commands import start
from populations import LAST_EPOCH, SPACE, study_file, values_of
from setwise.pipelines import recipe, references, train
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.workers import Worker
from setwise.platform import checkpoint, config, run, storage
from setwise.platform.errors import DataError
from setwise.platform.run import Run
from setwise.platform.tracking import Tracker
from setwise.sweeps import population, space
from setwise.sweeps.population import Copy

# Copies, of real trainings without Ray


class KilledError(BaseException):
    """Stands for the end of a process."""


def train_to(store: Path, training: Run, settings: Recipe, epoch: int) -> None:
    def report(values: dict[str, float]) -> None:
        if values["epoch"] == epoch:
            raise KilledError

    with contextlib.suppress(KilledError):
        train.train(settings, training, store, Worker(), report)


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    """A folder with the runs of a trial and of its donor, both at epoch 2; and the recipe of all trials."""
    folder = tmp_path_factory.mktemp("pair")
    spec, base = space.load(str(study_file(folder)))
    base = population.fitted(spec, base)
    for number in (0, 3):
        settings = space.with_values(base, values_of(number))
        training = run.create(folder / "runs", f"pair-{number:03d}", config.to_yaml(settings), "tests")
        train_to(store, training, settings, 2)
    return folder / "runs", base


AFTER = values_of(3) | {"optimizer.weight_decay": 0.0048, "similarity.alpha": 16.0}
COPY = Copy(2, 0, 3, values_of(0), AFTER)


def pair(trained: tuple[Path, Recipe], folder: Path) -> tuple[Run, Run]:
    """The two runs as they were, in a folder of a test's own."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    shutil.copytree(trained[0], folder / "runs")
    return Run(folder / "runs" / "pair-000"), Run(folder / "runs" / "pair-003")


def same_weights(one: Path, other: Path) -> bool:
    first, second = checkpoint.weights(one), checkpoint.weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def check_copied(training: Run, donor: Run, own: list[dict[str, float]]) -> None:
    copied, source = (one.checkpoints / "epoch_0002" for one in (training, donor))
    checkpoint.verify(copied)
    assert same_weights(copied, source)
    ours, theirs = (checkpoint.training_state(one)["optimizer"] for one in (copied, source))
    assert all(
        torch.equal(ours["state"][place][part], theirs["state"][place][part])
        for place in theirs["state"]
        for part in ("exp_avg", "exp_avg_sq")
    )
    assert {group["weight_decay"] for group in ours["param_groups"]} == {0.0048}
    metadata = checkpoint.metadata(copied)
    assert metadata["history"] == [own[0], checkpoint.metadata(source)["history"][1]]
    assert metadata["run"] == donor.name, "who made these weights"
    (parent,) = storage.read_json(training.folder / "lineage.json")["parents"]
    assert (parent["run"], parent["checkpoint"], parent["epoch"]) == (donor.name, "epoch_0002", 2)
    assert parent["weights_sha256"] == storage.sha256(source / "model.safetensors")
    assert parent["values"] == COPY.changes()
    tags = [event["values"] for event in run.read_events(training.events) if event["kind"] == "tags"]
    told = [values["population.epoch_0002"] for values in tags if "population.epoch_0002" in values]
    assert len(told) == 1 and told[0].startswith(f"from {donor.name}: optimizer.lr 0.001 -> 0.004")


def test_a_trial_goes_on_from_its_donors_weights_with_its_own_past(
    store: Path, trained: tuple[Path, Recipe], tmp_path: Path
) -> None:
    training, donor = pair(trained, tmp_path)
    own = checkpoint.metadata(training.checkpoints / "epoch_0002")["history"]
    population.take_over(training, donor, COPY)
    check_copied(training, donor, own)

    train_to(store, training, space.with_values(trained[1], AFTER), LAST_EPOCH)
    steps = [event["step"] for event in run.read_events(training.events) if event["kind"] == "metrics"]
    assert steps == list(range(1, LAST_EPOCH + 1))
    metadata = checkpoint.metadata(training.checkpoints / "epoch_0006")
    assert metadata["run"] == training.name and metadata["recipe"]["similarity"]["alpha"] == 16.0
    assert [parent["run"] for parent in metadata["lineage"]["parents"]] == [donor.name]
    best = max(metadata["history"], key=lambda values: values["val/rsum"])
    assert storage.read_json(training.folder / "best.json")["value"] == best["val/rsum"]
    assert checkpoint.metadata(training.best_checkpoint())["epoch"] == best["epoch"]
    state = checkpoint.training_state(training.checkpoints / "epoch_0006")
    assert {group["weight_decay"] for group in state["optimizer"]["param_groups"]} == {0.0048}

    before = (training.folder / "lineage.json").read_bytes()
    population.take_over(training, donor, COPY)  # a later start finds it done
    assert (training.folder / "lineage.json").read_bytes() == before
    assert checkpoint.newest(training.checkpoints) == training.checkpoints / "epoch_0006"


def test_killed_at_any_write_it_is_done_again(trained: tuple[Path, Recipe], tmp_path: Path) -> None:
    """Whatever is written is synced, so a kill at each sync is a kill at each step."""
    real, left = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal left
        if left == 0:
            raise KilledError
        left -= 1
        real(descriptor)

    for writes in itertools.count():
        training, donor = pair(trained, tmp_path)
        own = checkpoint.metadata(training.checkpoints / "epoch_0002")["history"]
        left = writes
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with contextlib.suppress(KilledError):
                population.take_over(training, donor, COPY)
                break
        population.take_over(training, donor, COPY)
        check_copied(training, donor, own)
    assert writes >= 9, "four files, their folder, its name, the tag, the lineage and its name"


def test_a_damaged_donor_is_not_copied(trained: tuple[Path, Recipe], tmp_path: Path) -> None:
    training, donor = pair(trained, tmp_path)
    before = storage.sha256(training.checkpoints / "epoch_0002" / "model.safetensors")
    weights = donor.checkpoints / "epoch_0002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="damaged"):
        population.take_over(training, donor, COPY)
    assert storage.sha256(training.checkpoints / "epoch_0002" / "model.safetensors") == before
    assert not (training.folder / "lineage.json").exists()


# The whole, with Ray


@contextlib.contextmanager
def sweep(store: Path, spec: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    with start(store, "sweep", str(spec), "--name", name) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + 200
    while not (found := condition()):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    return found


@pytest.mark.ray
def test_a_population_whose_driver_and_workers_are_killed_goes_on(store: Path, tmp_path: Path) -> None:
    """The driver as soon as a decision is written, when no trial has begun to copy; then the first trial at work."""
    name, spec = "population", study_file(tmp_path)
    folder = store / "studies" / name
    trials = [references.trial_run(name, number, store) for number in range(4)]
    with sweep(store, spec, name) as first:
        wait_for(lambda: population.read(folder), first)
        first.send_signal(signal.SIGKILL)
    decided = population.read(folder)
    copies = [Copy(**copy) for copy in decided[0]["copies"]]
    assert [meeting["epoch"] for meeting in decided] == [2] and len(copies) == 1

    with sweep(store, spec, name) as second:

        def at_work() -> list[int]:
            owners = [storage.lease_owner(trial.folder / "writer.lease") or "" for trial in trials]
            return [int(owner.split()[1]) for owner in owners if owner.startswith("process ")]

        wait_for(lambda: f"start-{second.pid}" in [path.name for path in (folder / "tune").glob("*")], second)
        victim = wait_for(at_work, second)[0]
        os.kill(victim, signal.SIGKILL)
        printed = second.communicate(timeout=300)[0]
        assert second.returncode == 0, printed
    assert "goes on: 0 trials are done, 4 were interrupted" in printed and "4 complete, 0 pruned, 0 failed" in printed

    meetings = population.read(folder)
    assert [meeting["epoch"] for meeting in meetings] == [2, 4] and meetings[0] == decided[0]
    assert all(meeting["members"] == [0, 1, 2, 3] and len(meeting["copies"]) == 1 for meeting in meetings)
    database = optuna.load_study(study_name=name, storage=f"sqlite:///{folder}/study.db")
    assert [(one.number, one.state.name) for one in database.trials] == [(n, "COMPLETE") for n in range(4)]
    for one, trial in zip(database.trials, trials, strict=True):
        steps = [event["step"] for event in run.read_events(trial.events) if event.get("series") == "train"]
        assert steps == sorted(one.intermediate_values) == list(range(1, LAST_EPOCH + 1))
        assert one.value == references.best_value(trial)
        first_values = config.flatten(recipe.load(str(trial.config)))
        assert one.params == {setting: first_values[setting] for setting in SPACE}
        checkpoint.verify(trial.best_checkpoint())

    tracked = {
        one.data.tags["mlflow.runName"]: one
        for one in Tracker(store).client.search_runs([Tracker(store).client.get_experiment_by_name(name).experiment_id])
    }
    for meeting in meetings:
        for copy in (Copy(**one) for one in meeting["copies"]):
            copier, donor = trials[copy.trial], trials[copy.donor]
            rsum = {one.number: one.intermediate_values[copy.epoch] for one in database.trials}
            assert rsum[copy.trial] == min(rsum.values()) and rsum[copy.donor] == max(rsum.values())
            parents = storage.read_json(copier.folder / "lineage.json")["parents"]
            (parent,) = [one for one in parents if one["epoch"] == copy.epoch]
            assert parent["run"] == donor.name and parent["values"] == copy.changes()
            tag = f"population.epoch_{copy.epoch:04d}"
            assert tracked[copier.name].data.tags[tag].startswith(f"from {donor.name}: ")
            if copy.epoch == 4:  # which both still keep
                assert same_weights(copier.checkpoints / "epoch_0004", donor.checkpoints / "epoch_0004")
                trained = checkpoint.metadata(copier.checkpoints / "epoch_0006")
                used = config.flatten(Recipe.model_validate(trained["recipe"]))
                assert {setting: used[setting] for setting in SPACE} == copy.after
    assert asdict(copies[0]) == decided[0]["copies"][0]
