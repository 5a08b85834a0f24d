"""The study as the truth of a sweep: what is handed out again, what counts as pruned, what ASHA remembers."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from rich.console import Console

from setwise.platform import config
from setwise.platform.errors import ConfigError, UnreachableError
from setwise.platform.run import Run
from setwise.platform.tracking import Courier
from setwise.sweeps import report, space, status, study, study_run
from setwise.sweeps.space import Pruning

LAST_EPOCH = 4


@pytest.fixture
def opened(tmp_path: Path) -> tuple[optuna.Study, space.Study]:
    spec, base = space.load("digits")
    return study.open_study(tmp_path, "tests", spec, "identity", [(space.default_values(spec, base), "recipe")]), spec


def result(epoch: int, rsum: float, best: float | None = None) -> dict[str, float]:
    return {"epoch": epoch, "rsum": rsum, "val/rsum": rsum if best is None else best}


def searcher(made: optuna.Study, spec: space.Study) -> study.StudySearch:
    return study.StudySearch(made, spec, {}, LAST_EPOCH)


def test_the_first_trial_is_the_recipe_itself(opened: tuple[optuna.Study, space.Study]) -> None:
    made, spec = opened
    suggested = searcher(made, spec).suggest("a")
    assert suggested is not None
    assert suggested["trial"] == 0
    assert suggested["values"]["similarity.alpha"] == 16 and suggested["values"]["model.set_prediction.num_slots"] == 4


def test_what_was_running_is_handed_out_again_with_its_number_and_values(
    opened: tuple[optuna.Study, space.Study],
) -> None:
    made, spec = opened
    before = searcher(made, spec)
    first = [before.suggest(name) for name in ("a", "b", "c")]
    before.on_trial_complete("b", result(LAST_EPOCH, 50.0))
    before.on_trial_result("c", result(1, 20.0))

    after = searcher(made, spec)  # the driver was killed here
    second = [after.suggest(name) for name in ("x", "y", "z")]
    assert second[:2] == [first[0], first[2]]
    assert second[2] is not None and second[2]["trial"] == 3
    after.on_trial_result("y", result(1, 20.0))  # a resumed trial tells its earlier epochs again
    after.on_trial_complete("y", result(LAST_EPOCH, 60.0))
    assert made.trials[2].state == TrialState.COMPLETE and made.trials[2].value == 60.0
    assert made.trials[2].intermediate_values == {1: 20.0, 4: 60.0}


def test_the_value_is_the_best_epoch_and_an_early_end_is_pruned(opened: tuple[optuna.Study, space.Study]) -> None:
    made, spec = opened
    search = searcher(made, spec)
    for name in ("a", "b", "c", "d"):
        search.suggest(name)
    for epoch, rsum in ((1, 10.0), (2, 40.0), (3, 30.0)):
        search.on_trial_result("a", result(epoch, rsum))
    search.on_trial_complete("a", result(4, 35.0, best=40.0))
    search.on_trial_complete("b", result(2, 12.0))
    search.on_trial_complete("c", {"epoch": 0, "failure": "no memory"})
    states = [(trial.state.name, trial.value) for trial in made.trials]
    assert states == [("COMPLETE", 40.0), ("PRUNED", 12.0), ("FAIL", None), ("RUNNING", None)]
    assert [trial.number for trial in study.finished(made)] == [0, 1, 2]


def test_a_trial_that_tune_gave_up_is_handed_out_again_and_not_for_ever(
    opened: tuple[optuna.Study, space.Study],
) -> None:
    made, spec = opened
    search = searcher(made, spec)
    first = search.suggest("a")
    search.on_trial_result("a", result(1, 10.0))
    for death, name in enumerate("abcd", start=1):
        search.on_trial_complete(name, result(1, 10.0) if death == 2 else None, error=True)
        if death <= study.MAX_DEATHS:
            assert made.trials[0].state == TrialState.RUNNING
            assert search.suggest(chr(ord(name) + 1)) == first
    assert made.trials[0].state == TrialState.FAIL
    assert made.trials[0].user_attrs["reason"] == "its process died 4 times"
    after = search.suggest("e")
    assert after is not None and after["trial"] == 1


def test_a_failure_is_a_result_with_its_reason(opened: tuple[optuna.Study, space.Study]) -> None:
    made, spec = opened
    search = searcher(made, spec)
    for name in ("a", "b"):
        search.suggest(name)
    search.on_trial_result("a", result(1, 10.0))
    nothing = {"epoch": 0, "rsum": math.nan, "val/rsum": math.nan, "failure": "the loss is not finite"}
    search.on_trial_result("a", nothing)
    search.on_trial_complete("a", nothing)
    search.on_trial_complete("b", None)
    first, second = made.trials
    assert first.state == second.state == TrialState.FAIL
    assert first.user_attrs["reason"] == "the loss is not finite" and first.intermediate_values == {1: 10.0}
    assert second.user_attrs["reason"] == "it ended before its first epoch"


def test_settings_under_a_condition_are_drawn_where_it_holds(tmp_path: Path) -> None:
    spec, base = space.load("paper")
    flat = config.flatten(base)
    made = study.open_study(tmp_path, "tests", spec, "identity", [(space.default_values(spec, base), "recipe")])
    search = study.StudySearch(made, spec, flat, LAST_EPOCH)
    seen = set()
    for number in range(16):
        suggested = search.suggest(str(number))
        assert suggested is not None
        values = suggested["values"]
        slots = values["model.set_prediction.num_slots"]
        assert ("loss.diversity_weight" in values) == (slots > 1)
        seen.add(slots > 1)
        search.on_trial_complete(str(number), result(LAST_EPOCH, 10.0 * slots))
    assert seen == {True, False}
    resumed = study.StudySearch(made, spec, flat, LAST_EPOCH)
    made.ask()  # a trial that was asked for when the driver died, before its values were drawn
    resumed._left_running = [trial.number for trial in study.left_running(made)]
    assert resumed.suggest("again") is not None


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_no_restart_draws_the_same_values_again(tmp_path: Path, sampler: str) -> None:
    spec, base = space.load("digits", [f"sampler={sampler}", "startup_trials=20"])
    made = study.open_study(tmp_path, "tests", spec, "identity", [(space.default_values(spec, base), "recipe")])
    alphas = []
    for start in range(4):
        search = searcher(made, spec)  # the driver was killed before this
        for number in range(3):
            suggested = search.suggest(f"{start}-{number}")
            assert suggested is not None
            alphas.append(suggested["values"]["similarity.alpha"])
            search.on_trial_complete(f"{start}-{number}", result(LAST_EPOCH, 1.0))
    assert len(set(alphas)) == len(alphas) == 12


def test_several_objectives_have_a_front(tmp_path: Path) -> None:
    spec, base = space.load("digits", ["objectives=[val/rsum, embedding_size]", "pruning=null"])
    made = study.open_study(tmp_path, "tests", spec, "identity", [(space.default_values(spec, base), "recipe")])
    search = searcher(made, spec)
    for name, best, size in (("a", 90.0, 512.0), ("b", 70.0, 128.0), ("c", 80.0, 512.0)):
        search.suggest(name)
        search.on_trial_result(name, {**result(1, 5.0), "embedding_size": size})
        search.on_trial_complete(name, {**result(LAST_EPOCH, 1.0, best=best), "embedding_size": size})
    assert sorted(trial.number for trial in made.best_trials) == [0, 1]
    front = report.front_of(made, spec, "tests")
    assert [point.run for point in front] == ["tests-000", "tests-001"]
    assert front[0].values == {"val/rsum": 90.0, "embedding_size": 512.0}


def test_a_database_that_holds_another_study_of_this_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, base = space.load("digits")
    first = [(space.default_values(spec, base), "recipe")]
    monkeypatch.setenv(study.URL, f"sqlite:///{tmp_path}/shared.db")
    study.open_study(tmp_path / "one", "tests", spec, "this", first)
    study.open_study(tmp_path / "one", "tests", spec, "this", first)
    with pytest.raises(ConfigError, match="another study called 'tests'"):
        study.open_study(tmp_path / "two", "tests", spec, "that", first)
    monkeypatch.setenv(study.URL, "postgresql://somebody:secret@127.0.0.1:1/none")
    with pytest.raises(UnreachableError) as caught:
        study.open_study(tmp_path, "tests", spec, "this", first)
    assert "secret" not in str(caught.value)


def test_two_stores_have_two_studies_in_one_database_though_they_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, base = space.load("digits")
    first = [(space.default_values(spec, base), "recipe")]
    monkeypatch.setenv(study.URL, f"sqlite:///{tmp_path}/shared.db")
    one, two = (
        study_run.begin(spec, base, "tests", tmp_path / store, SimpleNamespace(fingerprint="data"))  # type: ignore[arg-type]
        for store in ("one", "two")
    )
    for _ in range(2):
        study.open_study(one.folder, "tests", spec, study_run.identity_of(one), first)
    with pytest.raises(ConfigError, match="another study called 'tests'"):
        study.open_study(two.folder, "tests", spec, study_run.identity_of(two), first)


@pytest.mark.parametrize("written", range(5))
def test_what_is_tried_first_is_there_once_though_its_writing_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    spec, base = space.load("digits")
    default = space.default_values(spec, base)
    first = [(default, "recipe"), *(({**default, "similarity.alpha": alpha}, "grid") for alpha in (4.0, 8.0, 12.5))]
    enqueue, left = optuna.Study.enqueue_trial, [None] * written

    def killed_after_some(made: optuna.Study, *args: Any, **named: Any) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        enqueue(made, *args, **named)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(optuna.Study, "enqueue_trial", killed_after_some)
        study.open_study(tmp_path, "tests", spec, "identity", first)
    for _ in range(2):
        made = study.open_study(tmp_path, "tests", spec, "identity", first)
    drawn = [searcher(made, spec).suggest(str(number)) for number in range(1)]
    assert drawn[0] is not None and drawn[0]["values"] == default
    made = study.open_study(tmp_path, "tests", spec, "identity", first)
    assert [trial.system_attrs["fixed_params"] for trial in made.trials] == [values for values, _ in first]


def test_a_study_that_has_only_failed_trials_ends_as_failed(tmp_path: Path) -> None:
    spec, base = space.load("digits")
    parent = study_run.begin(spec, base, "tests", tmp_path, SimpleNamespace(fingerprint="data"))  # type: ignore[arg-type]
    outcome = report.Outcome("tests", 0, 0, {0: "no memory"}, None, report.Importance({}, 0, 0, "none"))
    study_run.end(parent, spec, replace(outcome, stopped="max_hours=1 is used up"))
    assert parent.status is None
    study_run.end(parent, spec, outcome)
    assert parent.status == "FAILED"


def test_a_study_that_has_not_begun_is_listed_among_the_others(tmp_path: Path) -> None:
    spec, base = space.load("digits")
    for name in ("begun", "killed"):
        parent = study_run.begin(spec, base, name, tmp_path, SimpleNamespace(fingerprint="data"))  # type: ignore[arg-type]
        if name == "begun":
            made = study.open_study(parent.folder, name, spec, "identity", [({}, "recipe")])
            searcher(made, spec).suggest("a")
    found, _ = status.overview(tmp_path)
    assert [(one.name, one.count("interrupted")) for one in found] == [("begun", 1), ("killed", 0)]
    assert [one.epochs for one in found] == [base.train.epochs] * 2


def test_a_result_waits_for_a_database_that_is_away(
    opened: tuple[optuna.Study, space.Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, spec = opened
    search = searcher(made, spec)
    search.suggest("a")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    backend, away = type(made._storage), [None] * 2
    read = backend.get_trial

    def at_times(*args: Any, **named: Any) -> Any:
        if away:
            away.pop()
            raise StorageInternalError("away")
        return read(*args, **named)

    monkeypatch.setattr(backend, "get_trial", at_times)
    search.on_trial_result("a", result(1, 10.0))
    assert made.trials[0].intermediate_values == {1: 10.0}


def test_a_call_waits_for_a_database_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    answers = iter([StorageInternalError("away"), StorageInternalError("away"), 3])

    def call() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert study.patiently(call) == 3


def test_asha_judges_by_the_trials_of_earlier_starts(opened: tuple[optuna.Study, space.Study]) -> None:
    made, spec = opened
    search = searcher(made, spec)
    for number, name in enumerate(("a", "b", "c")):
        search.suggest(name)
        search.on_trial_result(name, result(1, 50.0 + number))
        search.on_trial_complete(name, result(LAST_EPOCH, 90.0))
    pruning = Pruning(grace_epochs=1, reduction=2)
    newcomer = SimpleNamespace(trial_id="new")
    verdicts = {}
    for rsum in (10.0, 80.0):
        scheduler = study.make_scheduler(pruning, made, LAST_EPOCH)
        assert scheduler is not None
        scheduler.on_trial_add(None, newcomer)
        verdicts[rsum] = scheduler.on_trial_result(None, newcomer, result(1, rsum))
    assert verdicts == {10.0: "STOP", 80.0: "CONTINUE"}
    assert study.make_scheduler(None, made, LAST_EPOCH) is None


def test_importance_compares_trials_at_the_last_epoch_that_all_reached() -> None:
    spec, _ = space.load("digits")
    distributions = {name: domain.distribution() for name, domain in spec.space.items()}
    made = optuna.create_study(direction="maximize")
    for number in range(12):
        alpha = 4.0 + 5 * number
        params = {
            "model.set_prediction.num_slots": (1, 2, 4)[number % 3],
            "similarity.alpha": alpha,
            "loss.mmd_weight": 0.01 + 0.001 * ((number * 7) % 5),
            "loss.diversity_weight": 0.01 + 0.001 * ((number * 5) % 7),
        }
        values = {1: alpha, 2: 300.0 - alpha} if number % 2 else {1: alpha}
        state = TrialState.COMPLETE if number % 2 else TrialState.PRUNED
        made.add_trial(
            optuna.trial.create_trial(
                params=params, distributions=distributions, intermediate_values=values, value=alpha, state=state
            )
        )
    found = report.importance(made)
    assert (found.trials, found.epoch) == (12, 1)
    assert max(found.shares, key=lambda name: found.shares[name]) == "similarity.alpha"
    assert "epoch 1 over 12 trials" in found.sentence() and "hint" in found.sentence()
    assert "takes 4 trials" in report.importance(optuna.create_study()).sentence()
    apart = optuna.create_study(direction="maximize")
    for number in range(8):  # a condition held of none of them
        apart.add_trial(optuna.trial.create_trial(value=float(number)))
    assert "cannot be said: no setting was varied in enough of them" in report.importance(apart).sentence()


def cost_of_a_trial(folder: Path, ended: int, waiting: int) -> dict[str, int]:
    """Statements that one more trial sends to its database and trials that it reads there, call by call."""
    spec, base = space.load("digits")
    default = space.default_values(spec, base)
    folder.mkdir()
    made = study.open_study(folder, "tests", spec, "identity", [(default, "recipe")] * (waiting + 1))
    distributions = {name: domain.distribution() for name, domain in spec.space.items()}
    for number in range(ended):
        params = {**default, "similarity.alpha": 4.0 + number / 10}
        made.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=float(number)))
    search = searcher(made, spec)
    search.suggest("first")  # it reads what was there before, once in the life of a driver
    search.on_trial_complete("first", result(LAST_EPOCH, 1.0))
    cost = Counter[str]()
    with listening(made, lambda *_: cost.update([call])):
        call = "suggest"
        search.suggest("second")
        call = "result"
        search.on_trial_result("second", result(1, 1.0))
        call = "end"
        search.on_trial_complete("second", result(LAST_EPOCH, 2.0))
    assert not search._ot_trials  # nor does the driver keep them
    return dict(cost)


@contextlib.contextmanager
def listening(made: optuna.Study, loaded: Callable[..., None]) -> Iterator[None]:
    """Call `loaded` for every statement that the study's database gets, and for every trial that is read from it."""
    database: Any = made._storage._backend  # type: ignore[attr-defined]
    build = database._build_frozen_trial_from_trial_model

    def built(*args: Any) -> Any:
        loaded()
        return build(*args)

    sqlalchemy.event.listen(database.engine, "before_cursor_execute", loaded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "_build_frozen_trial_from_trial_model", built)
        yield
    sqlalchemy.event.remove(database.engine, "before_cursor_execute", loaded)


def test_a_trial_costs_its_database_the_same_however_many_have_ended(tmp_path: Path) -> None:
    few = cost_of_a_trial(tmp_path / "few", ended=10, waiting=0)
    assert few == cost_of_a_trial(tmp_path / "many", ended=120, waiting=0)
    assert set(few) == {"suggest", "result", "end"}


def test_a_result_costs_the_database_the_same_however_many_trials_wait(tmp_path: Path) -> None:
    few, many = (cost_of_a_trial(tmp_path / str(waiting), ended=0, waiting=waiting) for waiting in (5, 60))
    assert [few[call] for call in ("result", "end")] == [many[call] for call in ("result", "end")]


def test_a_table_of_many_trials_fits_a_terminal() -> None:
    table = report.TrialTable("tests", 1000, LAST_EPOCH, Console(file=io.StringIO(), width=100, height=24))
    for number in range(1000):
        state = "running" if number in (7, 999) else "complete"
        table.update(number, {"alpha": number}, state, 1, 50.0 if number == 500 else 10.0)
    shown = Console(file=io.StringIO(), width=100, height=24, record=True)
    shown.print(table._render_live())
    lines = shown.export_text().splitlines()
    numbers = [int(found[0]) for line in lines if (found := re.findall(r"^│ +(\d+) ", line))]
    assert len(lines) <= 24 and "998 of 1000 trials" in lines[0] and "more" in lines[-1]
    assert {7, 500, 999} < set(numbers) and numbers == sorted(numbers)


class Deliveries:
    """Stands for an MLflow store: which runs it was asked to take, in which rounds of a courier."""

    address, store, deadline = "stand-in", Path("store"), 0.0

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.away = False

    def deliver(self, run: Run) -> None:
        self.asked.append(run.name)
        if self.away:
            raise UnreachableError("away")


def test_a_courier_looks_at_a_run_that_has_ended_once_and_again_as_it_closes() -> None:
    """Else each round of a long study would look at all of its trials."""
    deliveries = Deliveries()
    courier = Courier(deliveries, interval=3600)  # type: ignore[arg-type]  # it asks for nothing but what this has
    ended, goes_on = Run(Path("ended")), Run(Path("goes_on"))
    courier.add(ended, ended=True)
    courier.add(goes_on)
    for _ in range(3):
        assert courier._round() is None
    assert Counter(deliveries.asked) == {"goes_on": 3, "ended": 1}
    courier.add(ended)  # as one that was told of before its end, and trains again
    for _ in range(2):
        courier._round()
    assert Counter(deliveries.asked) == {"goes_on": 5, "ended": 3}
    courier.add(ended, ended=True)
    deliveries.away = True
    courier._round()
    courier._round()
    deliveries.away, deliveries.asked = False, []
    courier._round()
    courier._round()
    assert Counter(deliveries.asked) == {"goes_on": 2, "ended": 1}
    deliveries.asked = []
    assert courier.close()
    assert Counter(deliveries.asked) == {"goes_on": 1, "ended": 1}
