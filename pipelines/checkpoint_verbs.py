"""`setwise ckpt VERB`: checkpoints: which there are, where one comes from, which may go, and one for others to run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from setwise.pipelines.terminal import JsonOption, Ref, StoreOption, emit, open_store, open_tracker, results, say
from setwise.platform.errors import UnreachableError

if TYPE_CHECKING:
    from rich.table import Table

    from setwise.pipelines.lineage import Stored
    from setwise.platform.run import Run

app = typer.Typer(help="Checkpoints: list, show, clean up, export.", no_args_is_help=True)

RunsArgument = Annotated[list[str] | None, typer.Argument(metavar="[STUDY|RUN]...", help="studies or runs; else all")]
MB = 1e6


@app.command("ls")
def checkpoint_list(references: RunsArgument = None, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Checkpoints of runs: epoch, validation RSUM, size; which is the best, the latest, or registered."""
    from setwise.pipelines import lineage, retention

    folder = open_store(store)
    runs = _runs(references, folder)
    try:
        registered = retention.Registered.read(open_tracker(folder), runs)
    except UnreachableError as error:
        say(f"which of them are registered is not known: {error}")
        registered = None
    rows: list[tuple[Stored, list[str]]] = []
    for run in runs:
        found, best = lineage.stored(run), lineage.best_name(run)
        latest = max((one.epoch for one in found), default=0)
        titles = registered.single(run) if registered else {}
        for one in found:
            marks = ["best"] if one.name == best else []
            marks += ["latest"] if one.epoch == latest else []
            marks += [titles[one.name]] if one.name in titles else []
            rows.append((one, marks if one.value is not None else ["damaged or unreadable"]))
    if as_json:
        listed = [{**one.to_json(), "marks": marks} for one, marks in rows]
        size = sum(one.bytes for one, _ in rows)
        emit({"checkpoints": listed, "bytes": size, "registered_known": registered is not None})
    else:
        results.print(_table("marks", [(one, ", ".join(marks)) for one, marks in rows]))


@app.command("show")
def checkpoint_show(reference: Ref, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Where a checkpoint comes from: run, study and trial, recipe, data, code, and what it started from."""
    from setwise.pipelines import lineage
    from setwise.pipelines import references as refs

    folder = open_store(store)
    found = refs.resolve(reference, folder, open_tracker(folder))
    known = lineage.describe(found.checkpoint, found.run)
    one = lineage.read_stored(found.checkpoint, known["run"] or "")
    value = {"folder": str(found.checkpoint), lineage.METRIC: one.value, "bytes": one.bytes, **known}
    if as_json:
        emit(value)
    else:
        value_text = "-" if one.value is None else f"{one.value:.1f}"
        head = ("checkpoint", f"{found.checkpoint} (val RSUM {value_text}, {one.bytes / MB:.1f} MB)")
        for title, text in (head, *lineage.lines(known)):
            results.print(f"{title:<12} {text}", markup=False, soft_wrap=True)


@app.command("gc")
def checkpoint_gc(
    references: RunsArgument = None,
    best_of_study: Annotated[int, typer.Option(min=0, help="keep this many, the best of each study")] = 1,
    best: Annotated[int, typer.Option(min=0, help="keep this many, the best of each run")] = 1,
    latest: Annotated[int, typer.Option(min=0, help="keep this many, the latest of each run")] = 1,
    apply: Annotated[bool, typer.Option("--apply", help="remove what goes; without it, it is only said")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove checkpoints that no rule keeps. What is registered, in use or unfinished always stays.

    Kept is what any of the three numbers keeps, and the checkpoint that best.json names.
    """
    from setwise.pipelines import retention

    folder = open_store(store)
    runs = _runs(references, folder)
    decisions = retention.plan(folder, open_tracker(folder), retention.Keep(best_of_study, best, latest), runs)
    going = [one for one in decisions if not one.reasons]
    size = sum(one.checkpoint.bytes for one in going)
    if not as_json:
        verdicts = [f"stays: {'; '.join(one.reasons)}" if one.reasons else "goes" for one in decisions]
        pairs = zip((one.checkpoint for one in decisions), verdicts, strict=True)
        results.print(_table("verdict", list(pairs)))
        results.print(f"{len(going)} of {len(decisions)} checkpoints go, {size / MB:.1f} MB; the others stay")
    freed = retention.apply(folder, decisions, runs, say) if apply else 0
    if as_json:
        keep = {"best_of_study": best_of_study, "best": best, "latest": latest}
        rows = [one.to_json() for one in decisions]
        emit({"keep": keep, "checkpoints": rows, "bytes": size, "applied": apply, "freed_bytes": freed})
    elif apply:
        results.print(f"freed {freed:,} bytes")
    elif going:
        say("nothing was removed. To remove them: the same command with --apply")


@app.command("export")
def checkpoint_export(
    reference: Ref,
    target: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="a new folder")],
    form: Annotated[str, typer.Option("--format", help="torch (.pt2 programs), onnx, or safetensors (weights)")] = (
        "torch"
    ),
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the two encoders for others to run, read them again, and measure how far they are from the model."""
    from setwise.pipelines import export as exports
    from setwise.pipelines import references as refs

    folder = open_store(store)
    found = refs.resolve(reference, folder, open_tracker(folder))
    say(f"exporting {found.label} as {form}")
    done = exports.export(found, target.expanduser().resolve(), form, folder)
    if as_json:
        emit(done.to_json())
    else:
        results.print(done.describe(), soft_wrap=True, markup=False)


def _runs(references: list[str] | None, store: Path) -> list[Run]:
    """All runs of a store, or those of the studies, configurations and runs that are named."""
    from setwise.pipelines import lineage
    from setwise.pipelines import references as refs

    if not references:
        return refs.all_runs(store)
    runs: list[Run] = []
    for text in references:
        of_study = [run for run in refs.all_runs(store) if lineage.place(run)[0] == text]
        runs += of_study or refs.find_seeds(text, store)
    return list(dict.fromkeys(runs))


def _table(title: str, rows: list[tuple[Stored, str]]) -> Table:
    """Checkpoints with a column about them."""
    from rich.table import Table

    table = Table()
    for name in ("run", "checkpoint", title):
        table.add_column(name, overflow="fold")
    for name in ("val RSUM", "MB"):
        table.add_column(name, justify="right")
    for one, said in rows:
        value = "-" if one.value is None else f"{one.value:.1f}"
        table.add_row(one.run, one.name, said, value, f"{one.bytes / MB:.1f}")
    return table
