"""Where the studies of a store stand, and the request that one stop."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from setwise.pipelines import references
from setwise.pipelines.plan import duration
from setwise.platform import config, run, storage
from setwise.platform.errors import ConfigError
from setwise.sweeps import analysis, limits
from setwise.sweeps.report import TrialRow, TrialTable

STOP_WAIT_S = 120


@dataclass(frozen=True)
class Trial:
    """One trial: `state` is complete, pruned, failed, running or, where no process is at work, interrupted."""

    number: int
    state: str
    epoch: int
    best: float | None
    settings: dict[str, Any]
    reason: str | None


@dataclass(frozen=True)
class Status:
    """A study as it is now. `owner` is the process at work on it, None if there is none; `epochs` those of a trial."""

    name: str
    epochs: int
    owner: str | None
    hours: float
    gpu_hours: float
    trials: list[Trial]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def count(self, state: str) -> int:
        return sum(trial.state == state for trial in self.trials)

    def in_words(self) -> str:
        counts = {state: self.count(state) for state in ("complete", "pruned", "failed", "running", "interrupted")}
        said = ", ".join(f"{number} {state}" for state, number in counts.items() if number) or "no trial yet"
        at_work = f"{self.owner} is at work on it" if self.owner else "nobody is at work on it"
        gpus = f", {self.gpu_hours:.1f} GPU-hours" if self.gpu_hours else ""
        return f"study '{self.name}': {said}; {duration(3600 * self.hours)}{gpus} so far; {at_work}"

    def table(self) -> RenderableType:
        """All of it for a terminal."""
        shown = TrialTable(self.name, len(self.trials), self.epochs)
        for trial in self.trials:
            shown.rows[trial.number] = TrialRow(trial.number, trial.settings, trial.state, trial.epoch, trial.best)
        reasons = [f"trial {trial.number}: {trial.reason}" for trial in self.trials if trial.reason]
        table = shown.render()
        table.title = None  # the line above says more
        return Group(Text(self.in_words()), table, *map(Text, reasons))


def names(store: Path) -> list[str]:
    """The studies of a store."""
    return sorted(path.name for path in (store / "studies").glob("*") if (path / "run.json").is_file())


def find(name: str, store: Path) -> Path:
    """The folder of a study. Raises ConfigError if there is none."""
    if name not in names(store):
        raise config.no_such("study", name, names(store))
    return store / "studies" / name


def of(name: str, store: Path) -> Status:
    """Where a study stands. Raises ConfigError: there is no such study; UnreachableError: its database is away."""
    from setwise.sweeps import study as studies

    folder = find(name, store)
    owner = storage.lease_owner(folder / "lease")
    words = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    try:
        recorded = studies.load(folder, name).get_trials(deepcopy=False)
    except ConfigError:  # it is only just beginning, or was killed then
        recorded = []
    trials = []
    for trial in recorded:
        state = words.get(trial.state.name)
        if state is None:
            if trial.state.name == "WAITING":
                continue
            state = "running" if owner else "interrupted"
        training = references.trial_run(name, trial.number, store)
        steps = [e["step"] for e in run.read_events(training.events) if e.get("series") == "train"]
        best = references.best_value(training)
        reason = trial.user_attrs.get(studies.REASON)
        trials.append(Trial(trial.number, state, max(steps, default=0), best, dict(trial.params), reason))
    used = limits.used_hours(folder)
    epochs = analysis.recorded(name, store).base.train.epochs
    return Status(name, epochs, owner, used["hours"], used["gpu_hours"], trials)


def overview(store: Path) -> tuple[list[Status], Table]:
    """All studies of a store."""
    found = [of(name, store) for name in names(store)]
    table = Table("study", "complete", "pruned", "failed", "to go on", "time", "at work")
    for one in found:
        running = one.count("running") + one.count("interrupted")
        counts = (one.count("complete"), one.count("pruned"), one.count("failed"), running)
        table.add_row(one.name, *map(str, counts), duration(3600 * one.hours), one.owner or "")
    return found, table


def stop(name: str, store: Path) -> str:
    """Ask the process at work on a study to stop, and wait until it has; what it was.

    Raises:
        ConfigError: there is no such study, nobody is at work on it, or it did not stop in two minutes.
    """
    folder = find(name, store)
    owner = storage.lease_owner(folder / "lease")
    if owner is None:
        raise ConfigError(f"nobody is at work on study '{name}', so there is nothing to stop")
    limits.ask_to_stop(folder)
    deadline = time.monotonic() + STOP_WAIT_S
    while storage.lease_owner(folder / "lease") is not None:
        if time.monotonic() > deadline:
            raise ConfigError(f"{owner} was asked to stop '{name}' and has not within {STOP_WAIT_S} s; it still may")
        time.sleep(0.2)
    return owner
