"""`setwise promote`, `setwise rollback` and `setwise models VERB`: which model is served, and how that came about."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from setwise.pipelines.terminal import JsonOption, Ref, StoreOption, emit, open_store, open_tracker, results, say

if TYPE_CHECKING:
    from setwise.pipelines.promotion_ledger import Entry

app = typer.Typer(help="Registered models: list them, their history, and repair.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="registered model: setwise-digits, or just digits")]


def promote(
    reference: Ref,
    gate: Annotated[
        Path | None, typer.Option("--gate", metavar="FILE", help="YAML: limits by metric; else nowhere worse")
    ] = None,
    store: StoreOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="decide, and change nothing")] = False,
    override: Annotated[str | None, typer.Option(help="promote whatever the gate says, for this reason")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a run's best checkpoint the champion, if the gate lets it pass. Exit code 3 if not."""
    from setwise.pipelines import promote as promotion
    from setwise.pipelines import references

    asked = promotion.load_gate(gate) if gate is not None else None
    folder = open_store(store)
    tracker = open_tracker(folder)
    resolved = references.resolve(reference, folder, tracker)
    try:
        done = promotion.promote(resolved, folder, tracker, dry_run, override, asked, say)
    except promotion.RefusedError as refused:
        if as_json:
            emit(refused.promotion.to_json(resolved.label))
        raise
    if as_json:
        emit(done.to_json(resolved.label))
    else:
        results.print(done.describe(resolved.label), soft_wrap=True, markup=False)
    if done.changed and done.version is not None:
        say(f"next: setwise models history {done.version.name}    setwise rollback {done.version.name}")


def rollback(
    model: Model,
    to: Annotated[int | None, typer.Option("--to", metavar="VERSION", help="a former champion")] = None,
    reason: Annotated[str, typer.Option(help="why; it is written down")] = "",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the previous champion the champion again."""
    from setwise.pipelines import promotion_ledger, registry

    tracker = open_tracker(open_store(store))
    name = registry.full_name(model, tracker)
    entry = promotion_ledger.rollback(tracker, name, to, reason)
    if as_json:
        emit({"name": name, **entry.to_json()})
    else:
        text = f"{name} version {entry.version} ({entry.run}) is the champion again, in place of version"
        results.print(f"{text} {entry.replaces}", soft_wrap=True, markup=False)


@app.command("ls")
def models_list(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Registered models, their champions, and whether the alias is where the ledger says."""
    from setwise.pipelines import promotion_ledger, registry

    tracker = open_tracker(open_store(store))
    rows = []
    for name in registry.names(tracker):
        ledger = promotion_ledger.read(tracker, name)
        champion = registry.champion(tracker, name)
        rows.append(
            {
                "name": name,
                "champion": champion.version if champion else None,
                "run": champion.run if champion else None,
                "versions": registry.versions(tracker, name),
                "entries": len(ledger.entries),
                "problem": promotion_ledger.problem(ledger, champion),
            }
        )
    if as_json:
        emit({"models": rows})
        return
    if not rows:
        say("no model is registered yet. Promote a run: setwise promote REF")
        return
    results.print(_models_table(rows))


@app.command("history")
def models_history(model: Model, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Every promotion, override and rollback of a model, the oldest first."""
    from setwise.pipelines import promotion_ledger, registry

    tracker = open_tracker(open_store(store))
    ledger = promotion_ledger.read(tracker, registry.full_name(model, tracker))
    if as_json:
        emit({"name": ledger.name, "entries": [entry.to_json() for entry in ledger.entries]})
    else:
        for number, entry in enumerate(ledger.entries, start=1):
            results.print(_entry(number, entry), soft_wrap=True, markup=False)


@app.command("repair")
def models_repair(model: Model, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Put the alias `champion` where the ledger ends, where a crash or a hand in MLflow's pages came between."""
    from setwise.pipelines import promotion_ledger, registry

    tracker = open_tracker(open_store(store))
    name = registry.full_name(model, tracker)
    repaired = promotion_ledger.repair(tracker, name)
    champion = registry.champion(tracker, name)
    version = champion.version if champion else None
    if as_json:
        emit({"name": name, "repaired": repaired, "champion": version})
    else:
        found = "repaired" if repaired else "nothing to repair"
        results.print(f"{name}: {found}; the champion is version {version}", markup=False)


def _models_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("model", "champion", "run", "versions", "state")
    for row in rows:
        champion = "none" if row["champion"] is None else f"version {row['champion']}"
        cells = [row["name"], champion, row["run"] or "", str(len(row["versions"])), row["problem"] or "ok"]
        table.add_row(*(Text(cell, overflow="fold") for cell in cells))
    return table


def _entry(number: int, entry: Entry) -> str:
    """One entry of a ledger in some lines."""
    when = f"{datetime.fromtimestamp(entry.time, UTC):%Y-%m-%d %H:%M:%S} UTC"
    replaces = "" if entry.replaces is None else f" in place of version {entry.replaces}"
    lines = [f"{number:>3}  {when}  {entry.kind}: version {entry.version} ({entry.run}){replaces}, by {entry.who}"]
    if entry.override is not None:
        lines += [f"     reason: {entry.override}", f"     gate: {entry.reason}"]
    elif entry.reason:
        lines.append(f"     reason: {entry.reason}")
    for metric, (new, old) in entry.numbers.items():
        lines.append(f"     {metric} {_number(new)}" + (f", before {_number(old)}" if old is not None else ""))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
