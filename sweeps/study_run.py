"""The run of a study itself, of which its trials are children: what it records at its beginning and at its end.

MLflow shows of a list of runs what its experiment's saved view names (runs_view.py), and above it a description.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from setwise.pipelines import records, references
from setwise.pipelines.prepare import Prepared
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.references import VARIANT
from setwise.pipelines.tables import plain
from setwise.platform import config, run, storage
from setwise.platform.errors import ConfigError
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run
from setwise.sweeps import runs_view
from setwise.sweeps.report import Outcome, short
from setwise.sweeps.space import Study

NOTE = "mlflow.note.content"
COLUMNS = ("best/val/rsum", "val/i2t_R1", "val/t2i_R1")


def begin(spec: Study, base: Recipe, name: str, store: Path, prepared: Prepared) -> Run:
    """The study's run, made if it is new. The number of trials and its budgets may change later.

    Raises:
        ConfigError: a study of this name exists and is another one.
    """
    parts = {"study": config.to_yaml(spec.identity), "recipe of trial 0": config.to_yaml(base)}
    text = "".join(f"# {what}\n{part}" for what, part in parts.items()) + f"# data {prepared.fingerprint}\n"
    try:
        parent = run.create(store / "studies", name, text, experiment=name)
    except ConfigError as error:
        raise ConfigError(
            f"a study called '{name}' exists and is another one than this. Give this one a name: --name NAME\n({error})"
        ) from error
    if parent.events.is_file():
        return parent
    params = {
        "recipe": spec.recipe,
        "sampler": spec.sampler if spec.population is None else "PBT",
        "objectives": ", ".join(spec.objectives),
        "seed": str(spec.seed),
        **{f"space.{key}": str(domain.model_dump(exclude_none=True)) for key, domain in spec.space.items()},
    }
    note = f"{_swept(spec)}\n\nIt has not ended yet."
    tags = {"setwise.study": name, "setwise.data": prepared.fingerprint, NOTE: note, **records.origin(parent)}
    view = runs_view.saved_view(list(spec.space), COLUMNS, curve="val/rsum")
    Outbox(parent.events).append(
        {"kind": "params", "values": params},
        {"kind": "tags", "values": tags},
        {"kind": "experiment_tags", "values": {runs_view.TAG: view, NOTE: note}},
        *({"kind": "artifact", "path": file, "into": ""} for file in ("config.yaml", "environment.json")),
    )
    return parent


def end(parent: Run, spec: Study, outcome: Outcome) -> None:
    """Record the study's result; each time that more trials were added."""
    number = outcome.complete + outcome.pruned + len(outcome.failed)
    outbox = Outbox(parent.events)
    if outcome.best is None:
        if outcome.stopped is None:
            note = f"{_swept(spec)}\n\nAll {number} of them failed."
            outbox.append({"kind": "tags", "values": {NOTE: note}}, {"kind": "status", "value": "FAILED"})
        return
    value = references.best_value(outcome.best) or 0.0
    outbox.metrics(number, {"best/val/rsum": value, "trials": float(number)}, series="study")
    note = description(spec, outcome)
    tags = {"setwise.best_run": outcome.best.name, "setwise.importance": outcome.importance.sentence(), NOTE: note}
    events: list[dict[str, Any]] = [
        {"kind": "tags", "values": tags},
        {"kind": "experiment_tags", "values": {NOTE: note}},
    ]
    if outcome.stopped is None:
        events.append({"kind": "status", "value": "FINISHED"})
    outbox.append(*events)


def description(spec: Study, outcome: Outcome) -> str:
    """The result first, in Markdown: MLflow folds what comes after some lines."""
    best = outcome.best
    assert best is not None, "end() has checked this"
    values = config.flatten(config.read_yaml(best.config).values)
    if spec.variants:
        values |= {VARIANT: references.variant_of(best)}  # of which a recipe knows nothing
    shares = outcome.importance.shares
    rows = [
        f"| `{setting}` | {_domain(spec, setting)} | {plain(values.get(setting))} "
        f"| {f'{shares[setting]:.0%}' if setting in shares else ''} |"
        for setting in spec.space
    ]
    return "\n".join(
        [
            f"**{best.name}** is the best of {outcome.complete + outcome.pruned} trials, with val RSUM "
            f"**{references.best_value(best) or 0.0:.1f}**. {_swept(spec)}",
            "",
            "| setting | swept over | best | importance |",
            "|---|---|---|---|",
            *rows,
            "",
            outcome.importance.sentence(),
        ]
    )


def trial_note(study: str, number: int, values: dict[str, Any], seed: int | None) -> str:
    """One line for a trial's page."""
    settings = ", ".join(f"`{short(name)}` {plain(value)}" for name, value in values.items())
    again = f", again with seed {seed}" if seed is not None else ""
    return f"Trial {number} of `{study}`{again}: {settings}"


def identity_of(parent: Run) -> str:
    """Stands for what makes it this study, and for the store that it is in: another store may have the same one, and
    a database in common."""
    key = parent.folder / "study_key"
    if not key.is_file():
        storage.write_bytes(key, secrets.token_hex(16).encode())
    return storage.fingerprint([parent.config.read_text(), key.read_text()])


def _swept(spec: Study) -> str:
    drawn = {"tpe": "drawn by TPE", "grid": "over a grid", "random": "drawn at random"}[spec.sampler]
    if spec.variants:
        return f"{len(spec.variants)} variants, with {'1 seed' if spec.seeds == 1 else f'{spec.seeds} seeds'} each."
    return f"Trials of `{spec.recipe}`, {drawn if spec.population is None else 'a population (PBT)'}."


def _domain(spec: Study, setting: str) -> str:
    given = spec.space[setting].model_dump(exclude_none=True, mode="json").items()
    return ", ".join(f"{form} {value}" for form, value in given)
