"""`setwise sweep`: run a study, see where it stands, stop it, look into what it found."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from setwise.pipelines.terminal import (
    JsonOption,
    OnOption,
    Overrides,
    StoreOption,
    check_port,
    emit,
    open_store,
    open_tracker,
    repeated,
    results,
    say,
)
from setwise.platform.errors import ConfigError, TrialsFailedError


class StudyOrVerb(TyperGroup):
    """`setwise sweep digits` means `setwise sweep run digits`: what is no verb is a study."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help",):
            _not_a_verb_mistyped(args[0], list(self.commands))
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=StudyOrVerb,
    help="Sweeps with Ray Tune and Optuna: setwise sweep STUDY, and what to do with them.",
    no_args_is_help=True,
)


def _not_a_verb_mistyped(word: str, verbs: list[str]) -> None:
    """Raises ConfigError: `word` is no study, and nearly one of `verbs`."""
    from setwise.platform import config

    if (nearest := config.nearest_name(word, verbs)) is None:
        return
    from setwise.sweeps import space

    if not Path(word).is_file() and config.nearest_name(word, space.names()) is None:
        raise ConfigError(f"no verb and no study is called '{word}'. Did you mean: setwise sweep {nearest}")


Name = Annotated[str, typer.Argument(metavar="STUDY", help="name of a study that was started")]


@app.command("run")
def run(
    study: Annotated[str, typer.Argument(help="study, by name or file")],
    overrides: Overrides = None,
    trials: Annotated[int | None, typer.Option(min=1, help="how many trials in all")] = None,
    budget: Annotated[str | None, typer.Option(help="stop after so long, all starts together: 8h, 45m, 2d")] = None,
    max_gpu_hours: Annotated[float | None, typer.Option(help="stop after so many GPU-hours of all trials")] = None,
    warm_start: Annotated[
        list[str] | None, typer.Option(metavar="REF", help="study or run whose settings are tried first; repeatable")
    ] = None,
    name: Annotated[str | None, typer.Option(help="name of the study; else its file's")] = None,
    on: OnOption = None,
    store: StoreOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be swept, and sweep nothing")] = False,
) -> None:
    """Run a study. The same command again goes on where it stopped, whatever stopped it."""
    from setwise.platform import run as run_folder
    from setwise.sweeps import limits, space

    given = list(overrides or [])
    given += [f"trials={trials}"] if trials is not None else []
    given += [f"max_gpu_hours={max_gpu_hours}"] if max_gpu_hours is not None else []
    if budget is not None:
        try:
            given.append(f"max_hours={limits.parse_hours(budget)!r}")
        except ValueError as error:
            raise ConfigError(f"--budget {error}") from error
    spec, base = space.load(study, given, on)
    title = run_folder.check_name(name or Path(study).stem)
    varied = ", ".join(spec.space)
    if not dry_run:
        trial_count = "1 trial" if spec.trials == 1 else f"{spec.trials} trials"
        what = f"{len(spec.variants)} variants" if spec.variants else spec.recipe
        say(f"study '{title}': {trial_count} of {what}, {base.train.epochs} epochs, over {varied}")
    folder = open_store(store)
    if on is not None:
        from setwise.pipelines import estimate

        base = estimate.settled(base, on, folder, spec.trials_per_gpu)
        spec = spec.changed(lambda recipe: estimate.settled(recipe, on, folder, spec.trials_per_gpu))
    if spec.population is not None:
        from setwise.sweeps import population

        base = population.fitted(spec, base)
    if dry_run:
        from setwise.sweeps import earlier, plan

        earlier.settings(warm_start or [], spec, base, folder, say)
        results.print(plan.describe(spec, base, title, folder, on), soft_wrap=True)
        return
    from setwise.sweeps import report
    from setwise.sweeps import run as sweeps

    options: dict[str, object] = {"--trials": trials, "--budget": budget, "--max-gpu-hours": max_gpu_hours}
    options |= {"--warm-start": warm_start, "--name": name, "--on": on, "--store": store}
    again = repeated(["sweep", study, *(overrides or [])], options)
    try:
        outcome = sweeps.run_study(spec, base, title, folder, open_tracker(folder), say, warm_start or [])
    except KeyboardInterrupt:
        say(f"interrupted; nothing is lost. To go on: {again}")
        raise
    report.show_outcome(outcome, results)
    if outcome.stopped is not None:
        more = ", with a larger limit" if outcome.stopped.endswith(limits.USED_UP) else ""
        say(f"stopped: {outcome.stopped}. Nothing is lost. To go on{more}: {again}")
    if outcome.best is not None:
        say(f"next: setwise sweep analyze {title}    setwise eval best:{title}    setwise promote best:{title}")
    if outcome.failed:
        reasons = "; ".join(f"trial {number}: {reason}" for number, reason in outcome.failed.items())
        count = "1 trial" if len(outcome.failed) == 1 else f"{len(outcome.failed)} trials"
        raise TrialsFailedError(f"{count} failed: {reasons}")


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(metavar="[STUDY]", help="a study; else all are listed")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Where a study stands: its trials, its time, and whether a process is at work on it."""
    from setwise.sweeps import status as standing

    folder = open_store(store)
    if name is None:
        found, table = standing.overview(folder)
        if as_json:
            emit({"studies": [one.to_json() for one in found]})
        else:
            results.print(table)
        return
    one = standing.of(name, folder)
    if as_json:
        emit(one.to_json())
    else:
        results.print(one.table())


@app.command()
def stop(name: Name, store: StoreOption = None) -> None:
    """Stop a study that runs, here or on another machine with the same store. It goes on when it is started again."""
    from setwise.sweeps import status as standing

    owner = standing.stop(name, open_store(store))
    results.print(f"study '{name}' was stopped ({owner}); its running trials go on when it is started again")


@app.command()
def analyze(
    name: Name,
    confirm: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="first train the best N trials again with other seeds")
    ] = None,
    seeds: Annotated[int, typer.Option(min=2, help="with --confirm: seeds of each, the trial's own included")] = 3,
    to: Annotated[Path | None, typer.Option(help="write a copy of the page, or of the deck, to this file")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a study found: importance, best trials, failures, and a page of plots, which is logged to its run too.

    Of a study of variants the deck is written as well: its table on the test split, and which claims held.
    """
    from setwise.pipelines import references
    from setwise.platform import storage
    from setwise.platform.tracking import Courier
    from setwise.sweeps import analysis
    from setwise.sweeps import study as studies

    folder = open_store(store)
    tracker = open_tracker(folder)
    spec = analysis.recorded(name, folder).spec
    failed: dict[str, str] = {}
    if confirm is not None:
        from setwise.sweeps import confirm as confirmation

        try:
            failed = confirmation.confirm(name, folder, tracker, say, confirm, seeds)
        except KeyboardInterrupt:
            say("interrupted; nothing is lost, and the same command goes on")
            raise
    study = studies.load(folder / "studies" / name, name)
    found = analysis.of(study, spec, name, folder)
    page = analysis.publish(found, folder)
    pages = {"page": str(page)}
    if spec.variants:
        from setwise.sweeps import deck

        page = deck.write(study, spec, name, folder, say)
        pages |= {"deck": str(page), "deck_json": str(page.with_name(deck.DATA))}
    if to is not None:
        storage.write_bytes(to, page.read_bytes())
    with Courier(tracker) as courier:
        courier.add(analysis.parent(name, folder))
        for trial in references.trials_of(name, folder) if spec.variants else ():  # the deck has measured them
            courier.add(trial, ended=True)
    if as_json:
        emit({**found.to_json(), **pages})
    else:
        results.print(found.table())
    say(f"the page: {to or page}")
    if failed:
        reasons = "; ".join(f"{run}: {reason}" for run, reason in failed.items())
        raise TrialsFailedError(f"{len(failed)} trainings with other seeds failed: {reasons}")


@app.command()
def dashboard(
    name: Annotated[str | None, typer.Argument(metavar="[STUDY]", help="a study; not needed with a database")] = None,
    port: Annotated[int, typer.Option(help="port on this machine")] = 8080,
    store: StoreOption = None,
) -> None:
    """Open Optuna's dashboard on a study, on this machine only."""
    from importlib.util import find_spec

    from setwise.sweeps import status as standing
    from setwise.sweeps import study as studies

    if find_spec("optuna_dashboard") is None:
        raise ConfigError("the dashboard is not installed. Install it with: pip install 'setwise[dashboard]'")
    url = os.environ.get(studies.URL)
    if url is None:
        if name is None:
            raise ConfigError("name a study: setwise sweep dashboard STUDY")
        url = f"sqlite:///{standing.find(name, open_store(store)) / 'study.db'}"
    check_port(port)
    say(f"Optuna's dashboard on http://127.0.0.1:{port}; Ctrl-C ends it")
    code = "from optuna_dashboard import run_server; import os; "
    code += f"run_server(os.environ['SETWISE_DASHBOARD_URL'], host='127.0.0.1', port={port})"
    os.environ["SETWISE_DASHBOARD_URL"] = url  # not in the arguments, where everybody would read a password
    os.execv(sys.executable, [sys.executable, "-c", code])
