"""Population based training: what varies, and who copies whom, which is decided once."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from populations import LAST_EPOCH, SPACE, study_file, values_of
from setwise.pipelines.recipe import Recipe
from setwise.platform.errors import ConfigError
from setwise.sweeps import population, space
from setwise.sweeps.domain import Domain
from setwise.sweeps.population import Copy
from setwise.sweeps.space import Study


@pytest.fixture
def study(tmp_path: Path) -> tuple[Study, Recipe]:
    spec, base = space.load(str(study_file(tmp_path)))
    return spec, population.fitted(spec, base)


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
