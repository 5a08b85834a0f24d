"""Population based training: who copies whom is decided once, and copies are whole, whatever is killed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch

from setwise.pipelines import recipe, references, train
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.workers import Worker
from setwise.platform import checkpoint, config, run, storage
from setwise.platform.errors import ConfigError, DataError
from setwise.platform.run import Run
from setwise.platform.tracking import Tracker
from setwise.sweeps import population, space
from setwise.sweeps.domain import Domain
from setwise.sweeps.population import Copy
from setwise.sweeps.space import Study
from tiny import TINY_MODEL

LAST_EPOCH = 6
SPACE = {
    "optimizer.lr": {"loguniform": [0.0004, 0.01]},
    "optimizer.weight_decay": {"uniform": [0.0, 0.01]},
    "optimizer.warmup_steps": {"int": [0, 9]},
    "similarity.alpha": {"choice": [4.0, 8.0, 16.0, 32.0]},
}


def study_file(folder: Path, **changes: Any) -> Path:
    content = {
        "recipe": "digits_cnn_bigru",
        "overrides": {
            **{name: json.loads(value) for name, _, value in (text.partition("=") for text in TINY_MODEL)},
            "train.epochs": LAST_EPOCH,
            "optimizer.warmup_steps": 1,
        },
        "trials": 4,
        "seed": 5,
        "population": {"perturb_epochs": 2, "share": 0.25, "resample": 0.25},
        "space": SPACE,
    }
    path = folder / "population.yaml"
    path.write_text(json.dumps(content | changes))
    return path


@pytest.fixture
def study(tmp_path: Path) -> tuple[Study, Recipe]:
    spec, base = space.load(str(study_file(tmp_path)))
    return spec, population.fitted(spec, base)


def values_of(number: int) -> dict[str, Any]:
    return {
        "optimizer.lr": 0.001 * (number + 1),
        "optimizer.weight_decay": 0.001 * (number + 1),
        "optimizer.warmup_steps": number,
        "similarity.alpha": [4.0, 8.0, 16.0, 32.0][number],
    }


# Settings


def test_a_donor_keeps_its_checkpoint_until_the_next_meeting(study: tuple[Study, Recipe]) -> None:
    assert study[1].train.keep_checkpoints == 3, "at epoch 4 it keeps 4, 3 and 2"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("population.perturb_epochs=6", "Allowed: 1 to 5"),
        ("train.workers=2", "train.workers=1, not 2"),
        ('space={"optimizer.text_scale": {"uniform": [0.1, 2.0]}}', "space.optimizer.text_scale: a population cannot"),
    ],
)
def test_what_no_population_can_train_is_refused(tmp_path: Path, override: str, expected: str) -> None:
    spec, base = space.load(str(study_file(tmp_path)), [override])
    with pytest.raises(ConfigError, match=expected):
        population.fitted(spec, base)


def test_values_move_a_little_or_are_drawn_anew_and_never_leave_their_domain() -> None:
    domains = {name: Domain.model_validate(domain) for name, domain in SPACE.items()}
    values = {
        "optimizer.lr": 0.009,
        "optimizer.weight_decay": 0.0,
        "optimizer.warmup_steps": 1,
        "similarity.alpha": 8.0,
    }
    moved = [population.vary(domains, values, 0, random.Random(seed)) for seed in range(60)]
    assert {one["optimizer.lr"] for one in moved} == {0.009 * 0.8, 0.01}, "1.2 times it lies outside"
    assert {one["optimizer.weight_decay"] for one in moved} == {0.0}
    assert {one["optimizer.warmup_steps"] for one in moved} == {0, 2}, "a whole number moves by 1 at least"
    assert {one["similarity.alpha"] for one in moved} == {4.0, 16.0}, "a choice moves to a neighbour"

    drawn = [population.vary(domains, values, 1, random.Random(seed)) for seed in range(400)]
    assert all(domain.contains(one[name]) for one in drawn for name, domain in domains.items())
    assert {one["optimizer.warmup_steps"] for one in drawn} == set(range(10))
    assert {one["similarity.alpha"] for one in drawn} == {4.0, 8.0, 16.0, 32.0}
    below = sum(one["optimizer.lr"] < 0.002 for one in drawn)  # the middle of the logarithms
    assert 160 < below < 240
    ends = population.vary(
        domains, values | {"similarity.alpha": 32.0, "optimizer.warmup_steps": 9}, 0, random.Random(1)
    )
    assert ends["similarity.alpha"] == 16.0 and ends["optimizer.warmup_steps"] in (7, 9)


# Decisions, by Ray Tune's scheduler in the hands of a small stand-in for its controller


class FakeTrial:
    """As much of a trial of Tune as its scheduler looks at."""

    def __init__(self, number: int, values: dict[str, Any]) -> None:
        self.trial_id, self.experiment_tag = f"t{number}", ""
        self.config: dict[str, Any] = {"trial": number, "values": values}
        self.status, self.checkpoint = "RUNNING", f"pointer of {number}"
        self.temporary_state = SimpleNamespace(saving_to=None)
        manager = SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None), _latest_checkpoint_result=None)
        self.run_metadata = SimpleNamespace(checkpoint_manager=manager)

    def is_finished(self) -> bool:
        return self.status in ("TERMINATED", "ERROR")

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config

    def set_experiment_tag(self, tag: str) -> None:
        self.experiment_tag = tag


class Tuning:
    """A study in `folder` with some trials, as far as Tune has come with them."""

    def __init__(self, spec: Study, folder: Path, numbers: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        self.optuna = optuna.create_study(direction="maximize")
        for _ in range(4):
            self.optuna.ask()
        self.trials = [FakeTrial(number, values_of(number)) for number in numbers]
        self.scheduler: Any = population.make_scheduler(spec, self.optuna, folder, LAST_EPOCH)
        self.controller = SimpleNamespace(get_trials=lambda: self.trials, get_live_trials=lambda: self.trials)
        for trial in self.trials:
            self.scheduler.on_trial_add(self.controller, trial)

    def result(self, trial: FakeTrial, epoch: int, rsum: float) -> str:
        decision = str(self.scheduler.on_trial_result(self.controller, trial, {"epoch": epoch, "rsum": rsum}))
        if decision == "PAUSE":
            trial.status = "PAUSED"
        return decision

    def meet(self, epoch: int) -> Any:
        """All come to `epoch`, trial n with an RSUM of 10 n; returns what Tune would run next."""
        for trial in self.trials:
            if not trial.is_finished():
                assert self.result(trial, epoch, 10 * trial.config["trial"]) == "PAUSE"
        return self.scheduler.choose_trial_to_run(self.controller)


def test_the_worst_copies_the_best_and_stays_the_trial_it_was(study: tuple[Study, Recipe], tmp_path: Path) -> None:
    tuning = Tuning(study[0], tmp_path)
    worst, best = tuning.trials[0], tuning.trials[3]
    assert tuning.result(worst, 1, 0.0) == "CONTINUE"
    assert tuning.meet(2) is not None
    assert worst.config["trial"] == 0 and worst.config["values"] != values_of(0)
    assert worst.run_metadata.checkpoint_manager._latest_checkpoint_result.checkpoint == best.checkpoint
    assert [trial.config for trial in tuning.trials[1:]] == [{"trial": n, "values": values_of(n)} for n in (1, 2, 3)]

    copy = population.course_of(tmp_path, 0).copy
    assert copy == Copy(2, 0, 3, values_of(0), worst.config["values"])
    assert copy.changes()["optimizer.lr"] == [0.001, worst.config["values"]["optimizer.lr"]]
    assert population.course_of(tmp_path, 3) == population.Course(2, None)
    tuning.scheduler.choose_trial_to_run(tuning.controller)
    assert len(population.read(tmp_path)) == 1, "Tune asks at every step"


def test_no_trial_goes_on_before_all_have_come(study: tuple[Study, Recipe], tmp_path: Path) -> None:
    tuning = Tuning(study[0], tmp_path)
    for trial in tuning.trials[:3]:
        tuning.result(trial, 2, 1.0)
    assert tuning.scheduler.choose_trial_to_run(tuning.controller) is None
    assert population.read(tmp_path) == []


@pytest.mark.parametrize("end", ["ERROR", "TERMINATED"])
def test_nobody_waits_for_a_trial_that_has_failed(study: tuple[Study, Recipe], tmp_path: Path, end: str) -> None:
    tuning = Tuning(study[0], tmp_path)
    for trial in tuning.trials[:3]:
        tuning.result(trial, 2, float(trial.config["trial"]))
    assert tuning.result(tuning.trials[3], 0, float("nan")) == "CONTINUE", "the result of a training that failed"
    tuning.trials[3].status = end
    assert tuning.scheduler.choose_trial_to_run(tuning.controller) is not None
    (meeting,) = population.read(tmp_path)
    assert meeting["members"] == [0, 1, 2]
    assert [(copy["trial"], copy["donor"]) for copy in meeting["copies"]] == [(0, 2)]


def test_after_the_last_epoch_nothing_is_copied(study: tuple[Study, Recipe], tmp_path: Path) -> None:
    tuning = Tuning(study[0], tmp_path)
    for epoch in (2, 4):
        tuning.meet(epoch)
        for trial in tuning.trials:
            trial.status = "RUNNING"
    assert [tuning.result(trial, LAST_EPOCH, 1.0) for trial in tuning.trials] == ["CONTINUE"] * 4
    assert [meeting["epoch"] for meeting in population.read(tmp_path)] == [2, 4]


def test_the_next_start_goes_on_after_the_last_decision(study: tuple[Study, Recipe], tmp_path: Path) -> None:
    before = Tuning(study[0], tmp_path)
    before.meet(2)
    after = Tuning(study[0], tmp_path)  # the driver was killed, and the study hands out the first values again
    assert [trial.config for trial in after.trials] == [trial.config for trial in before.trials]
    assert [after.result(after.trials[0], epoch, 1.0) for epoch in (1, 2, 3)] == ["CONTINUE"] * 3
    after.meet(4)
    assert [meeting["epoch"] for meeting in population.read(tmp_path)] == [2, 4]


def test_a_trial_whose_process_died_does_not_meet_twice(study: tuple[Study, Recipe], tmp_path: Path) -> None:
    tuning = Tuning(study[0], tmp_path)
    tuning.meet(2)
    died = tuning.trials[0]
    values = died.config["values"]
    tuning.scheduler.on_trial_add(tuning.controller, died)  # as Tune does when it replaces the process
    died.status = "RUNNING"
    assert tuning.result(died, 2, 1.0) == "CONTINUE" and died.config["values"] == values


def test_a_decision_that_was_not_written_is_taken_again_as_it_was(tmp_path: Path) -> None:
    spec, _ = space.load(str(study_file(tmp_path)), ["population.share=0.5"])
    for seed, start in enumerate(("a", "b", "c", "d")):
        random.seed(seed)
        Tuning(spec, tmp_path / start).meet(2)
    decisions = [population.read(tmp_path / start) for start in ("a", "b", "c", "d")]
    assert len(decisions[0][0]["copies"]) == 2 and decisions == [decisions[0]] * 4


def test_trials_that_are_added_to_a_finished_population_are_one_of_their_own(
    study: tuple[Study, Recipe], tmp_path: Path
) -> None:
    population.record(tmp_path, 2, [10, 11, 12, 13], [])
    population.record(tmp_path, 4, [10, 11, 12, 13], [])
    Tuning(study[0], tmp_path).meet(2)
    assert [meeting["epoch"] for meeting in population.read(tmp_path)] == [2, 4, 2]


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


SETWISE = Path(sys.executable).parent / "setwise"


@contextlib.contextmanager
def sweep(store: Path, spec: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    command = [SETWISE, "sweep", str(spec), "--name", name]
    environment = {**os.environ, "SETWISE_STORE": str(store), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
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
