"""`setwise runs VERB`: what was trained in a store, and what the tracking store does not know of it yet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from setwise.pipelines.terminal import JsonOption, StoreOption, emit, open_store, open_tracker, results, say
from setwise.platform.errors import SetwiseError, UnreachableError

if TYPE_CHECKING:
    from setwise.platform.run import Run
    from setwise.platform.tracking import Tracker

app = typer.Typer(help="Runs and studies: list them, deliver what they did to MLflow.", no_args_is_help=True)


@app.command("ls")
def runs_list(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Every study and run: how far it is, its best validation value, and what MLflow lacks of it."""
    from rich.table import Table

    folder = open_store(store)
    tracker = open_tracker(folder)
    found = [describe(run, tracker) for run in parents_first(folder)]
    if as_json:
        emit({"runs": found})
        return
    table = Table("run", "experiment", "status", "epochs", "best val RSUM", "undelivered events")
    for column in table.columns[3:]:
        column.justify = "right"
    for row in found:
        of = f"/{row['epochs_planned']}" if row["epochs_planned"] is not None else ""
        best = "" if row["best_val_rsum"] is None else f"{row['best_val_rsum']:.1f}"
        epochs = "" if row["kind"] == "study" else f"{row['epochs']}{of}"
        table.add_row(row["name"], row["experiment"], row["status"], epochs, best, str(row["undelivered"] or ""))
    results.print(table)
    if any(row["undelivered"] for row in found):
        say("next: setwise runs sync")


@app.command("sync")
def runs_sync(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Deliver to MLflow what it lacks of every study and run, studies first. Exit code 6 if it does not answer."""
    folder = open_store(store)
    tracker = open_tracker(folder)
    delivered: dict[str, int] = {}
    refused: dict[str, str] = {}
    try:
        for run in parents_first(folder):
            try:
                sent = tracker.deliver(run)
            except UnreachableError:
                raise
            except Exception as error:  # of one run, as one that was deleted in the browser: the others go on
                refused[run.name] = str(error).strip().partition("\n")[0]
                continue
            if sent:
                delivered[run.name] = sent
                say(f"{run.name}: {sent} events")
    finally:
        if as_json:
            emit({"store": tracker.address, "delivered": delivered, "refused": refused})
        else:
            results.print(f"{sum(delivered.values())} events of {len(delivered)} runs delivered to {tracker.address}")
    if refused:
        told = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise SetwiseError(f"{tracker.address} refused {len(refused)} runs: {told}")


def parents_first(store: Path) -> list[Run]:
    """The studies of a store and then its runs, by name."""
    from setwise.platform.run import Run

    return [Run(path.parent) for kind in ("studies", "runs") for path in sorted((store / kind).glob("*/config.yaml"))]


def describe(run: Run, tracker: Tracker) -> dict[str, Any]:
    """A run or study in numbers, from its folder alone: MLflow is not asked.

    Its status is `running` while a process holds it, then finished, pruned or failed as its record says, or unfinished.
    """
    from setwise.pipelines import references
    from setwise.platform import storage
    from setwise.platform.run import read_events

    epochs, planned, status = 0, None, "unfinished"
    for event in read_events(run.events):
        values = event.get("values", {})
        if event.get("series") == "train":
            epochs = max(epochs, int(event["step"]))
        elif event["kind"] == "params" and "train.epochs" in values:
            planned = int(values["train.epochs"])
        elif event["kind"] == "tags":
            status = str(values.get("setwise.status", status)).lower()
        elif event["kind"] == "status" and status == "unfinished":  # a study's, which has no tag of its own
            status = str(event["value"]).lower()
    if any(storage.lease_owner(run.folder / name) for name in ("lease", "writer.lease")):
        status = "running"
    return {
        "name": run.name,
        "kind": "study" if run.folder.parent.name == "studies" else "run",
        "experiment": run.experiment,
        "status": status,
        "epochs": epochs,
        "epochs_planned": planned,
        "best_val_rsum": references.best_value(run),
        "undelivered": tracker.undelivered(run),
    }
