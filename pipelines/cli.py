"""The front door: `setwise VERB ...`.

Results go to stdout, as a table or with --json as one object; progress and hints go to stderr. Exit codes are those of
setwise.platform.errors. Nothing heavy is imported before a verb needs it, so that help and mistakes answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from setwise.pipelines import (
    checkpoint_verbs,
    cluster_verbs,
    comparison_verbs,
    data_verbs,
    job_verbs,
    model_verbs,
    run_verbs,
    store_verbs,
)
from setwise.pipelines.terminal import (
    JsonOption,
    OnOption,
    Overrides,
    Ref,
    StoreOption,
    check_port,
    emit,
    offer,
    open_store,
    open_tracker,
    progress,
    repeated,
    results,
    say,
)
from setwise.platform import masking, storage
from setwise.platform.errors import INTERRUPTED, ConfigError, SetwiseError
from setwise.sweeps import verbs as sweep_verbs

app = typer.Typer(
    name="setwise",
    help="Set-embedding image-text retrieval: prepare, train, sweep, evaluate, compare, promote, search.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Recipes and studies: show, check and explain them.", no_args_is_help=True)
app.add_typer(data_verbs.app, name="data")
app.add_typer(config_app, name="config")
app.add_typer(checkpoint_verbs.app, name="ckpt")
app.add_typer(cluster_verbs.app, name="cluster")
app.add_typer(job_verbs.app, name="jobs")
app.add_typer(model_verbs.app, name="models")
app.add_typer(run_verbs.app, name="runs")
app.add_typer(store_verbs.app, name="store")
app.add_typer(sweep_verbs.app, name="sweep")


@app.command()
def demo(
    store: StoreOption = None,
    size: Annotated[str, typer.Option(help="'full', or 'tiny' to see every step in about a minute")] = "full",
) -> None:
    """The main job on embedded data: prepare, sweep, evaluate, compare, promote, search."""
    from setwise.sweeps import demo as demonstration

    folder = open_store(store)
    demonstration.run_demo(folder, open_tracker(folder), size, say, results)


@app.command()
def doctor(as_json: JsonOption = False, store: StoreOption = None) -> None:
    """Versions, processors and stores: what is here and what is missing."""
    from setwise.pipelines import doctor as checks

    folder = open_store(store)
    found = checks.examine(folder, open_tracker(folder))
    if as_json:
        emit({"checks": [check.__dict__ for check in found]})
    else:
        results.print(checks.table(found))
    if any(not check.ok for check in found):
        raise typer.Exit(1)


@config_app.command("show")
def config_show(
    name: Annotated[str, typer.Argument(help="recipe")], overrides: Overrides = None, on: OnOption = None
) -> None:
    """A recipe with everything it inherits and defaults to, and what a hardware preset sets."""
    from setwise.pipelines import hardware
    from setwise.platform import config

    results.out(config.to_yaml(hardware.load_recipe(name, overrides, on)), end="", highlight=False)
    if on is not None:
        say(f"how many images are encoded at a time is settled by the plan: setwise train {name} --on {on} --dry-run")


@config_app.command("check")
def config_check(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME... [A.B=V...]", help="recipes or studies, by name or file; overrides")
    ],
) -> None:
    """Check recipes and studies, with overrides of them if there are any; every mistake is shown with its place."""
    from setwise.pipelines import recipe
    from setwise.sweeps import space

    overrides = [name for name in names if "=" in name]
    checked = [name for name in names if "=" not in name]
    if not checked:
        raise ConfigError("name a recipe or a study whose overrides these are: setwise config check RECIPE A.B=V")
    for name in checked:
        if name in space.names() or (Path(name).is_file() and space.is_study(Path(name))):
            space.load(name, overrides)
        else:
            recipe.load(name, overrides)
        results.print(f"{name}: ok")


@config_app.command("schema")
def config_schema() -> None:
    """The JSON schema of a recipe: every setting with its bounds and meaning."""
    from setwise.pipelines.recipe import Recipe

    emit(Recipe.model_json_schema())


@config_app.command("diff")
def config_diff(first: str, second: str) -> None:
    """Settings in which two recipes or runs' config.yaml differ."""
    from setwise.pipelines import recipe
    from setwise.platform import config

    left, right = (config.flatten(recipe.load(name)) for name in (first, second))
    for name in left | right:
        if name not in left or name not in right or left[name] != right[name]:
            results.print(f"{name}: {left.get(name, '-')} | {right.get(name, '-')}", markup=False)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="recipe, by name or file")],
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option(help="name of the run; else the recipe's and a hash of its settings")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="train it so often, as NAME-seed0, ..., from train.seed on")
    ] = None,
    on: OnOption = None,
    store: StoreOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what it would take, here and on every preset, and train nothing")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe with Ray Train. The same command again goes on where it stopped."""
    from setwise.pipelines import hardware

    loaded = hardware.load_recipe(recipe, overrides, on)
    from setwise.pipelines import estimate, launch, references

    folder = open_store(store)
    launch.check_trainable(loaded)
    if dry_run:
        from setwise.pipelines import plan as plans

        dry = plans.make(recipe, overrides, on, folder)
        if as_json:
            emit(dry.to_json())
        else:
            results.print(dry.table())
        return
    if on is not None:
        loaded = estimate.settled(loaded, on, folder)
    planned = launch.plans(recipe, loaded, name, seeds, folder)
    say(planned[0].describe() + (f"; {seeds} seeds" if seeds is not None else ""))
    options: dict[str, object] = {"--on": on, "--name": launch.title_of(planned), "--seeds": seeds, "--store": store}
    try:
        runs = launch.execute(planned, open_tracker(folder), say)
    except KeyboardInterrupt:
        say(f"interrupted; nothing is lost. To go on: {repeated(['train', recipe, *(overrides or [])], options)}")
        raise
    best = {run.name: references.best_value(run) for run in runs}
    retrieves = loaded.metric == "val/rsum"
    if as_json:
        emit({"runs": [{"run": run.name, "folder": str(run.folder), loaded.metric: best[run.name]} for run in runs]})
    else:
        for run in runs:
            value = f"{best[run.name]:.{1 if retrieves else 3}f}"
            results.print(f"{run.name}: best {loaded.metric} {value}\n{run.folder}", soft_wrap=True)
    title = launch.title_of(planned)
    ranked = f"    setwise compare {title} ...    setwise promote {title}" if retrieves else ""
    say(f"next: setwise eval {runs[0].name}{ranked}    setwise ui")


@app.command("eval")
def evaluate(
    references: Annotated[
        list[str], typer.Argument(metavar="REF...", help="a checkpoint, as everywhere; several are one ensemble")
    ],
    bench: Annotated[
        str, typer.Option("--bench", metavar="NAME,...", help="benchmarks of the data set, or 'all'")
    ] = "all",
    ties: Annotated[
        str, typer.Option(help="'pessimistic': equal scores count against the model; 'official': as the authors sort")
    ] = "pessimistic",
    cxc: Annotated[
        Path | None, typer.Option(help="folder with CxC's sts_test.csv, sis_test.csv, sits_test.csv, or .csv.gz")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a checkpoint, or the averaged scores of several, on the benchmarks of its data set."""
    from setwise.pipelines import evaluate as evaluation
    from setwise.pipelines import references as refs
    from setwise.pipelines import tables
    from setwise.pipelines.protocol import TIES

    if ties not in TIES:
        raise ConfigError(f"--ties is '{ties}'; it can be {' or '.join(TIES)}")
    folder = open_store(store)
    tracker = open_tracker(folder)
    resolved = [refs.resolve(text, folder, tracker) for text in references]
    label = " + ".join(one.label for one in resolved)
    say(f"evaluating {label} on the test split")
    names = None if bench == "all" else [name.strip() for name in bench.split(",")]
    outcomes = evaluation.evaluate(
        resolved, folder, names=names, ties=cast(Literal["pessimistic", "official"], ties), cxc=cxc, say=say
    )
    if as_json:
        emit({"reference": label, "benchmarks": [outcome.to_json() for outcome in outcomes]})
    else:
        for outcome in outcomes:
            results.print(tables.outcome(outcome))
    offer(tracker, [one.run for one in resolved if one.run is not None])


app.command("compare")(comparison_verbs.compare)


@app.command()
def gallery(
    reference: Ref,
    versus: Annotated[
        str | None, typer.Option("--vs", metavar="REF", help="another model: what it has right and REF wrong, and back")
    ] = None,
    queries: Annotated[
        int, typer.Option(min=0, max=500, help="how many, half of them wrong and half of them captions")
    ] = 24,
    worst: Annotated[bool, typer.Option("--worst", help="wrong ones alone")] = False,
    query: Annotated[
        list[str] | None, typer.Option(metavar="TEXT|IMAGE", help="one of your own, shown first; may be repeated")
    ] = None,
    to: Annotated[Path | None, typer.Option(metavar="FILE", help="write the page here too")] = None,
    store: StoreOption = None,
) -> None:
    """A page of what a model finds on the test split, failures first, and of what each of its slots sees."""
    from setwise.pipelines import gallery as galleries
    from setwise.pipelines import references

    folder = open_store(store)
    tracker = open_tracker(folder)
    resolved = references.resolve(reference, folder, tracker)
    other = references.resolve(versus, folder, tracker) if versus else None
    if resolved.run is None and to is None:
        raise ConfigError(f"{resolved.label} belongs to no run here, which would keep the page. Say where: --to FILE")
    page = galleries.make(resolved, folder, versus=other, queries=queries, worst=worst, asked=query or (), say=say)
    if to is not None:
        galleries.write(page, to)
    if resolved.run is not None:
        kept = galleries.publish(page, resolved.run, other)
        to = to or kept
    results.print(str(to), soft_wrap=True)
    offer(tracker, [one.run for one in (resolved, other) if one is not None and one.run is not None])


app.command("promote")(model_verbs.promote)
app.command("rollback")(model_verbs.rollback)
app.command("submit")(job_verbs.submit)


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="a caption in quotes, or the path of an image")],
    reference: Annotated[str | None, typer.Option("--model", help="REF of the model; else the champion")] = None,
    top: Annotated[int, typer.Option("-k", "--top", min=1, max=1000)] = 5,
    save: Annotated[Path | None, typer.Option(help="write the images found to this folder")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find images for a caption, or captions for an image, with the champion."""
    from setwise.pipelines import references, tables
    from setwise.pipelines import search as searching

    folder = open_store(store)
    resolved = references.resolve(reference or "models:/setwise-digits@champion", folder, open_tracker(folder))
    answer = searching.search(query, resolved, folder, top)
    if answer.unknown_words:
        say(f"the model has never read: {', '.join(answer.unknown_words)}")
    if as_json:
        emit(answer.to_json())
    else:
        results.print(tables.answer(query, answer))
    if save is not None:
        say(f"wrote {len(searching.export_images(answer, folder, save))} images to {save}")


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="port on this machine")] = 5000,
    store: StoreOption = None,
) -> None:
    """Open the MLflow pages on the store, on this machine only."""
    from setwise.sweeps import runs_view, status

    folder = open_store(store)
    tracker = open_tracker(folder)
    if tracker.uri.startswith("http"):
        say("these pages are on a server already; open its address in a browser")
        results.print(tracker.address, soft_wrap=True, markup=False)
        return
    check_port(port)
    say(f"MLflow on http://127.0.0.1:{port}, showing {tracker.address}; Ctrl-C ends it")
    for title in status.names(folder):
        if (experiment := tracker.client.get_experiment_by_name(title)) is not None:
            say(f"  study {title}: {runs_view.address(f'http://127.0.0.1:{port}', experiment.experiment_id)}")
    server = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # Not in the arguments, where everybody would read a password.
    os.environ["MLFLOW_BACKEND_STORE_URI"] = os.environ["MLFLOW_REGISTRY_STORE_URI"] = tracker.uri
    os.environ["MLFLOW_DEFAULT_ARTIFACT_ROOT"] = tracker.artifacts.as_uri()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of MLflow's own parts, which a user cannot change
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # nobody runs jobs through these pages
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.execv(sys.executable, [sys.executable, *server])


def main() -> None:
    """Run a verb; a user's mistake is one message and an exit code, a defect of ours keeps its traceback."""
    stderr = logging.StreamHandler()
    stderr.setFormatter(masking.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[stderr])
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except SetwiseError as error:
        progress.print(masking.masked(f"error: {error}"), markup=False, style="red")
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in storage.NOT_WRITABLE:
            raise
        told = storage.not_writable(Path(error.filename or "."), error.strerror)
        progress.print(f"error: {told}", markup=False, style="red")
        sys.exit(told.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not hasattr(error, "show"):  # typer's usage errors can show themselves; their base class is private
            sys.stderr.write(masking.masked(traceback.format_exc()))
            sys.exit(SetwiseError.exit_code)
        error.show()
        sys.exit(ConfigError.exit_code)


if __name__ == "__main__":
    main()
