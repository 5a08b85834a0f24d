"""What a sweep shows: a live table of its trials, and at its end which were best and what mattered."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from setwise.pipelines import references
from setwise.pipelines.tables import plain
from setwise.platform.run import Run
from setwise.sweeps import candidates

if TYPE_CHECKING:
    import optuna

    from setwise.sweeps.space import Study

MIN_TRIALS_FOR_IMPORTANCE = 4
FEW_TRIALS = 20
DONE = ("complete", "pruned", "failed")
FRAME_LINES = 7
"""Of a terminal, those around the rows of a table: its title, head, borders and what it leaves out."""


@dataclass
class TrialRow:
    """One trial as the table shows it."""

    number: int
    values: Mapping[str, Any]
    state: str = "waiting"
    epoch: int = 0
    best: float | None = None


@dataclass
class TrialTable:
    """The trials of a sweep, redrawn in place in a terminal; elsewhere one line an event.

    Use it as a context manager around the sweep.
    """

    name: str
    trials: int
    epochs: int
    console: Console = field(default_factory=lambda: Console(file=sys.stderr))
    rows: dict[int, TrialRow] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._started = time.monotonic()
        self._live = Live(get_renderable=self._render_live, console=self.console, refresh_per_second=2, transient=True)

    def __enter__(self) -> TrialTable:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.stop()
            self.console.print(self.render())

    def update(self, number: int, values: Mapping[str, Any], state: str, epoch: int, value: float | None) -> None:
        """A trial has done something: started, ended an epoch, or ended."""
        row = self.rows.setdefault(number, TrialRow(number, values))
        row.values, row.state = values, state
        row.epoch = max(row.epoch, epoch)
        row.best = max((one for one in (row.best, value) if one is not None), default=None)
        if not self.console.is_terminal:
            seconds = time.monotonic() - self._started
            shown = "" if row.best is None else f"  best RSUM {row.best:.1f}"
            settings = "  ".join(f"{short(name)}={plain(value)}" for name, value in row.values.items())
            self.console.print(
                f"{seconds:6.0f} s  trial {number:>3} {state:<8} epoch {row.epoch}/{self.epochs}{shown}  {settings}",
                soft_wrap=True,
                highlight=False,
            )

    def _render_live(self) -> Table:
        return self.render(most=max(1, self.console.height - FRAME_LINES))

    def render(self, most: int | None = None) -> Table:
        """The trials by number; where they are more than `most`, those at work, the best one and the newest."""
        rows = sorted(self.rows.values(), key=lambda row: row.number)
        done = sum(row.state in DONE for row in rows)
        leader = max((row.best for row in rows if row.best is not None), default=None)
        if most is not None and len(rows) > most:
            rows.sort(key=lambda row: (row.state in DONE, row.best is None or row.best != leader, -row.number))
            rows = sorted(rows[:most], key=lambda row: row.number)
        seconds = int(time.monotonic() - self._started)
        names = list(dict.fromkeys(name for row in rows for name in row.values))
        title = f"{self.name}: {done} of {self.trials} trials, {seconds // 60}:{seconds % 60:02d}"
        table = Table(title=title, title_justify="left")
        table.add_column("trial", justify="right")
        table.add_column("state")
        table.add_column("epoch", justify="right")
        table.add_column("best RSUM", justify="right")
        for name in names:
            table.add_column(short(name), justify="right")
        for row in rows:
            best = "" if row.best is None else f"{row.best:.1f}" + (" *" if row.best == leader else "")
            cells = [plain(row.values[name]) if name in row.values else "" for name in names]
            table.add_row(str(row.number), row.state, f"{row.epoch}/{self.epochs}", best, *cells)
        if len(rows) < len(self.rows):
            table.caption = f"and {len(self.rows) - len(rows)} more"
        return table


def short(name: str) -> str:
    """The last part of a dotted name."""
    return name.rpartition(".")[2]


@dataclass(frozen=True)
class Importance:
    """What mattered: PED-ANOVA's share of each setting, over so many trials at one epoch; or why it cannot be said."""

    shares: dict[str, float]
    trials: int
    epoch: int
    reason: str = ""

    @property
    def few(self) -> bool:
        """Whether it is no more than a hint."""
        return self.trials < FEW_TRIALS

    def sentence(self) -> str:
        if not self.shares:
            return f"What mattered cannot be said: {self.reason}."
        listed = ", ".join(f"{short(name)} {share:.0%}" for name, share in self.shares.items())
        rough = ", which is few: take it as a hint" if self.few else ""
        when = f"at epoch {self.epoch}" if self.epoch else "at the end"
        return f"What mattered (PED-ANOVA {when} over {self.trials} trials{rough}): {listed}."


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended."""

    name: str
    complete: int
    pruned: int
    failed: dict[int, str]
    best: Run | None
    importance: Importance
    running: int = 0
    stopped: str | None = None
    front: tuple[Point, ...] = ()
    repeatable: bool = True
    """Whether to train the best again with other seeds: not where settings changed in the middle, or all have been."""


@dataclass(frozen=True)
class Point:
    """A trial of the Pareto front: no other is better in one objective and no worse in the others."""

    run: str
    values: dict[str, float]


def outcome_of(
    study: optuna.Study, spec: Study, name: str, store: Path, failures: Mapping[int, str], stopped: str | None
) -> Outcome:
    """Where a study stands; `failures` are reasons that this start has seen."""
    trials = study.get_trials(deepcopy=False)
    states = [trial.state.name for trial in trials]
    failed = {
        trial.number: failures.get(trial.number) or str(trial.user_attrs.get("reason", "unknown"))
        for trial in trials
        if trial.state.name == "FAIL"
    }
    complete, pruned, running = (states.count(state) for state in ("COMPLETE", "PRUNED", "RUNNING"))
    best = references.best_of(name, store) if complete + pruned else None
    return Outcome(
        name,
        complete,
        pruned,
        failed,
        best,
        importance(study),
        running,
        stopped,
        front_of(study, spec, name),
        repeatable=spec.population is None and not spec.variants,
    )


def front_of(study: optuna.Study, spec: Study, name: str) -> tuple[Point, ...]:
    """The Pareto front of a study with several objectives, by trial number."""
    if len(spec.objectives) == 1:
        return ()
    trials = sorted(study.best_trials, key=lambda trial: trial.number)
    return tuple(
        Point(
            references.trial_run(name, trial.number, Path()).name, dict(zip(spec.objectives, trial.values, strict=True))
        )
        for trial in trials
    )


def importance(study: optuna.Study) -> Importance:
    """Importance of each setting for the validation RSUM at the last epoch that all trials reached.

    At that epoch pruned and complete trials can be compared; over the complete ones alone there would be fewer, and
    only good ones. Failed and unfinished ones say where they stopped and not how good they are.
    """
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.study import StudyDirection
    from optuna.trial import TrialState

    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    trials = [trial for trial in ended if trial.intermediate_values or trial.values]
    if len(trials) < MIN_TRIALS_FOR_IMPORTANCE:
        reason = f"it takes {MIN_TRIALS_FOR_IMPORTANCE} trials, there are {len(trials)}"
        return Importance({}, len(trials), 0, reason)
    if all(trial.intermediate_values for trial in trials):
        epoch = min(max(trial.intermediate_values) for trial in trials)
        values = [trial.intermediate_values[epoch] for trial in trials]
    else:  # of several objectives, Optuna keeps the last values alone; RSUM is the one of which more is better
        epoch = 0
        rsum = study.directions.index(StudyDirection.MAXIMIZE)
        values = [trial.values[rsum] for trial in trials]
    if len(set(values)) == 1:
        return Importance({}, len(trials), epoch, "all trials have the same value")
    at_epoch = optuna.create_study(direction="maximize")
    for trial, value in zip(trials, values, strict=True):
        params, distributions = trial.params, trial.distributions
        at_epoch.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    with warnings.catch_warnings():  # that trials are few, our sentence says
        warnings.simplefilter("ignore")
        shares = get_param_importances(at_epoch, evaluator=PedAnovaImportanceEvaluator())
    in_order = sorted(shares.items(), key=lambda share: (-share[1], share[0]))
    reason = "" if shares else "no setting was varied in enough of them"
    return Importance(dict(in_order), len(trials), epoch, reason)


def show_outcome(outcome: Outcome, results: Console) -> None:
    """The end of a sweep: how many trials ended how, the best one, and what mattered."""
    counts = f"{outcome.complete} complete, {outcome.pruned} pruned, {len(outcome.failed)} failed"
    if outcome.running:
        counts += f", {outcome.running} to go on"
    results.print(f"study '{outcome.name}': {counts}", soft_wrap=True)
    if outcome.front:
        results.print("Pareto front:", soft_wrap=True)
        for point in outcome.front:
            shown = ", ".join(f"{objective} {value:.4g}" for objective, value in point.values.items())
            results.print(f"  {point.run}: {shown}", soft_wrap=True)
    if outcome.best is not None:
        seeds = references.seeds_of(outcome.best.name, outcome.best.folder.parents[1])
        best = candidates.of_trial(outcome.best, [run for run in seeds if run != outcome.best])
        results.print(f"best trial: {best.trial}, val RSUM {best.in_words()}", soft_wrap=True)
        if len(best.values) == 1 and outcome.repeatable:
            results.print(to_confirm(outcome.name), soft_wrap=True)
    results.print(outcome.importance.sentence(), soft_wrap=True)


def to_confirm(study: str) -> str:
    """What is to be done before a trial with one seed is called the best."""
    return (
        "One seed each: the highest of many is in part luck. "
        f"Confirm it: setwise sweep analyze {study} --confirm 3 --seeds 3"
    )
