"""What a study found: what mattered, which trials were best, what failed; in a terminal, as JSON and as one page.

The page opens offline and alone: plotly.js lies inside it. It is written for what there is, be it one trial or only
failed ones, and the same study gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from setwise.pipelines import page, references
from setwise.pipelines.recipe import Recipe
from setwise.platform import config, storage
from setwise.platform.errors import ConfigError
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run
from setwise.sweeps import candidates, plots, report
from setwise.sweeps.candidates import Confirmation
from setwise.sweeps.domain import Domain
from setwise.sweeps.report import Importance
from setwise.sweeps.space import Study

if TYPE_CHECKING:
    import optuna

PAGES = Path(__file__).parent / "pages"
PAGE = "analysis.html"
BEST = 5
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "unfinished"}


@dataclass(frozen=True)
class Row:
    """One trial. `value` is its best validation RSUM, `costs` its other objectives, `epochs` how many it is known to
    have ended, `source` where its settings came from if they were not drawn."""

    number: int
    name: str
    state: str
    epochs: int | None
    value: float | None
    costs: dict[str, float]
    settings: dict[str, Any]
    source: str | None
    reason: str | None

    @property
    def ended_well(self) -> bool:
        """Whether it came to a value: complete or pruned."""
        return self.value is not None and self.state in ("complete", "pruned")


@dataclass(frozen=True)
class Analysis:
    """A study as it is now. `front`: the numbers of the trials on the Pareto front, if there are several objectives."""

    name: str
    spec: Study
    rows: tuple[Row, ...]
    importance: Importance
    front: tuple[int, ...]
    confirmation: Confirmation | None

    @property
    def best(self) -> list[Row]:
        """The trials with the highest values, one seed each."""
        ended = (row for row in self.rows if row.ended_well)
        return sorted(ended, key=lambda row: -(row.value or 0.0))[:BEST]

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.state == "failed"]

    @property
    def advice(self) -> str:
        """What is to be done before one of them is called the best; nothing where it was done, or cannot be."""
        complete = any(row.state == "complete" for row in self.rows)
        can_be = complete and self.confirmation is None and self.spec.population is None and not self.spec.variants
        return report.to_confirm(self.name) if can_be else ""

    def counts(self) -> str:
        numbers = {state: sum(row.state == state for row in self.rows) for state in STATES.values()}
        return ", ".join(f"{number} {state}" for state, number in numbers.items() if number) or "no trial yet"

    def to_json(self) -> dict[str, Any]:
        return {
            "study": self.name,
            "objectives": self.spec.objectives,
            "importance": {"evaluator": "PED-ANOVA", "few": self.importance.few, **asdict(self.importance)},
            "best": [row.name for row in self.best],
            "front": [row.name for row in self.rows if row.number in self.front],
            "confirmation": self.confirmation.to_json() if self.confirmation else None,
            "trials": [asdict(row) for row in self.rows],
        }

    def table(self) -> RenderableType:
        """What matters of it for a terminal; the rest stands in the page."""
        parts: list[RenderableType] = [Text(f"study '{self.name}': {self.counts()}"), Text(self.importance.sentence())]
        if self.best:
            parts += [Text("\nbest trials, one seed each:"), _trial_table(self.best, self.spec)]
        if self.front:
            on_front = [row for row in self.rows if row.number in self.front]
            parts += [Text("\nPareto front:"), _trial_table(on_front, self.spec)]
        if self.confirmation is not None:
            parts += [Text("\ntrained again with other seeds:"), self.confirmation.table()]
        elif self.advice:
            parts.append(Text(self.advice))
        if self.failed:
            parts += [Text("\nfailed:"), *(Text(f"  {row.name}: {row.reason}") for row in self.failed)]
        return Group(*parts)


class Recorded(NamedTuple):
    """What a study was begun with. `data` is the fingerprint of its data; how many trials it wants is not recorded."""

    spec: Study
    base: Recipe
    data: str


def parent(name: str, store: Path) -> Run:
    """The run of the study itself."""
    return Run(store / "studies" / name)


def recorded(name: str, store: Path) -> Recorded:
    """What the study `name` was begun with, from its own record: its file may have changed since.

    Raises:
        ConfigError: there is no such study, or another version of setwise has recorded it.
    """
    path = parent(name, store).config
    if not path.is_file():
        known = sorted(found.parent.name for found in (store / "studies").glob("*/config.yaml"))
        raise config.no_such("study", name, known)
    head, found, rest = path.read_text().partition("# recipe of trial 0\n")
    recipe, found_data, data = rest.rpartition("# data ")
    if not (found and found_data):
        raise ConfigError(f"{path} does not tell what the study was; another version of setwise has written it")
    layer = config.parse_yaml(head.encode(), str(path))
    fewest = ["trials=4"] if layer.values.get("population") is not None else []  # it is recorded as 1, for any number
    spec = config.build(Study, layer, fewest)
    return Recorded(spec, config.build(Recipe, config.parse_yaml(recipe.encode(), str(path))), data.strip())


def of(study: optuna.Study, spec: Study, name: str, store: Path) -> Analysis:
    """What `study` found until now."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name in STATES]
    rows = tuple(_row(trial, spec, references.trial_run(name, trial.number, store).name) for trial in trials)
    front: tuple[int, ...] = ()
    if len(spec.objectives) > 1 and any(trial.state.name == "COMPLETE" for trial in trials):
        front = tuple(sorted(trial.number for trial in study.best_trials))
    return Analysis(name, spec, rows, report.importance(study), front, candidates.read(name, store))


def _row(trial: optuna.trial.FrozenTrial, spec: Study, name: str) -> Row:
    values = dict(zip(spec.objectives, trial.values, strict=True)) if trial.values else {}
    told = trial.intermediate_values
    value = max(told.values()) if told else values.get("val/rsum")
    return Row(
        number=trial.number,
        name=name,
        state=STATES[trial.state.name],
        epochs=max(told) if told else None,
        value=None if value is None else float(value),
        costs={key: float(cost) for key, cost in values.items() if key != "val/rsum"},
        settings={key: trial.params[key] for key in spec.space if key in trial.params},
        source=trial.user_attrs.get("source"),
        reason=trial.user_attrs.get("reason", "unknown") if trial.state.name == "FAIL" else None,
    )


def write(study: optuna.Study, spec: Study, name: str, store: Path) -> Path:
    """Write the page of a study as it is now, and note it for its run in MLflow; the page's file."""
    return publish(of(study, spec, name, store), store)


def publish(found: Analysis, store: Path) -> Path:
    """As `write`. A page that is there already is neither written nor delivered again."""
    run = parent(found.name, store)
    path = run.folder / PAGE
    content = render(found).encode()
    if not path.is_file() or path.read_bytes() != content:
        storage.write_bytes(path, content)
        Outbox(run.events).append({"kind": "artifact", "path": PAGE, "into": ""})
    return path


def render(found: Analysis) -> str:
    """The page."""
    from plotly.offline import get_plotlyjs

    slices = plots.slices(found.rows, found.spec.space)
    fronts = plots.fronts(found.rows, found.front, [one for one in found.spec.objectives if one != "val/rsum"])
    figures: dict[str, plots.Figure] = {}
    if found.best:
        figures |= {"history": plots.history(found.rows), "parallel": plots.parallel(found.rows, found.spec)}
    if found.importance.shares:
        figures["importance"] = plots.importance(found.importance.shares)
    figures |= {f"slice-{place}": figure for place, figure in enumerate(slices.values())}
    figures |= {f"front-{place}": figure for place, figure in enumerate(fronts.values())}
    return page.render(
        PAGE,
        folder=PAGES,
        found=found,
        space={name: in_words(domain) for name, domain in found.spec.space.items()},
        way=_way(found.spec),
        figures=figures,
        names=list(found.spec.space),
        labels=plots.labels(list(found.spec.space)),
        costs={one: plots.TITLES[one] for one in found.spec.objectives if one != "val/rsum"},
        said=plots.said,
        by_seed=candidates.by_seed,
        drawn=json.dumps(figures, allow_nan=False).replace("<", "\\u003c"),
        plotly=get_plotlyjs(),
    )


def in_words(domain: Domain) -> str:
    """The values that a setting may take, and when it varies."""
    if domain.choice is not None:
        told = "one of " + ", ".join(plots.said(value) for value in domain.choice)
    else:
        low, high = domain.uniform or domain.loguniform or domain.int or (0, 0)
        form = ", in whole numbers" if domain.int else ", by its logarithm" if domain.loguniform else ""
        told = f"{plots.said(low)} to {plots.said(high)}{form}"
    return told if domain.when is None else f"{told}; only when {domain.when}"


def _way(spec: Study) -> str:
    """How settings were drawn and trials stopped."""
    if spec.population is not None:
        return f"population based training, every {spec.population.perturb_epochs} epochs; settings as they began"
    drawn = {"tpe": "TPE", "grid": "a grid", "random": "at random"}[spec.sampler]
    stopped = f"ASHA from epoch {spec.pruning.grace_epochs}" if spec.pruning is not None else "no trial stopped early"
    return f"{drawn}; {stopped}"


def _trial_table(rows: Sequence[Row], spec: Study) -> Table:
    """Trials with their objectives and settings."""
    names = [name for name in spec.space if any(name in row.settings for row in rows)]
    called = plots.labels(names)
    table = Table("trial", "state")
    costs = [name for name in spec.objectives if name != "val/rsum"]
    for head in ("val RSUM", *costs, *(called[name] for name in names)):
        table.add_column(head, justify="right", overflow="fold")
    for row in rows:
        value = "" if row.value is None else f"{row.value:.1f}"
        paid = [f"{row.costs[name]:.4g}" if name in row.costs else "" for name in costs]
        settings = [plots.said(row.settings[name]) if name in row.settings else "" for name in names]
        table.add_row(row.name, row.state, value, *paid, *settings)
    return table
