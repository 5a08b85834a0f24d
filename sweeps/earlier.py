"""What earlier studies and runs teach a new one: settings to try first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from setwise.pipelines import references
from setwise.pipelines.recipe import Recipe
from setwise.platform import config
from setwise.platform.errors import ConfigError
from setwise.platform.run import Run
from setwise.sweeps.space import Study, with_values

BEST = 3
"""Trials of an earlier study that are tried again."""


def settings(
    sources: Sequence[str], spec: Study, base: Recipe, store: Path, say: Callable[[str], None]
) -> list[tuple[dict[str, Any], str]]:
    """(values, run they come from) of the best trials of each study in `sources`, and of each run.

    What lies outside the space is left out, with a word; values are tried anew, since another recipe, other data or
    another number of epochs may stand behind them.

    Raises:
        ConfigError: there is no such study or run, or the study has variants.
    """
    if sources and spec.variants:
        raise ConfigError("a study of variants trains all of them, so there are no settings to try first")
    found: dict[str, dict[str, Any]] = {}
    for source in sources:
        for run in _best(source, store):
            flat = config.flatten(config.read_yaml(run.config).values)
            values = {name: flat[name] for name in spec.space if name in flat}
            outside = [name for name in spec.space if not spec.space[name].contains(values.get(name))]
            if outside:
                say(f"{run.name} is no start for this study: its {outside[0]} is {values.get(outside[0])}, outside")
                continue
            values = {name: value for name, value in values.items() if spec.varies(name, flat)}
            with_values(base, values)
            found.setdefault(run.name, values)
    if sources and not found:
        say("nothing of what was named to start from lies in this study's space")
    return [(values, name) for name, values in found.items()]


def distinct(settings: Sequence[tuple[dict[str, Any], str]]) -> list[tuple[dict[str, Any], str]]:
    """`settings` without those whose values stand before them: trained twice, they would give the same numbers."""
    found: list[tuple[dict[str, Any], str]] = []
    for values, source in settings:
        if all(values != before for before, _ in found):
            found.append((values, source))
    return found


def _best(source: str, store: Path) -> list[Run]:
    trials = references.trials_of(source, store)
    if not trials:
        return [references.find_run(source, store)]
    values = {run: references.best_value(run) for run in trials if run.status != "FAILED"}
    scored = sorted(((value, run) for run, value in values.items() if value is not None), key=lambda pair: -pair[0])
    return [run for _, run in scored[:BEST]]
