"""`setwise submit -- VERB ...` and `setwise jobs VERB`: any verb as a job on a Ray cluster."""

from __future__ import annotations

import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from setwise.pipelines.terminal import JsonOption, emit, progress, repeated, results, say

if TYPE_CHECKING:
    from setwise.platform.jobs import Job, Jobs

FRONT_DOOR = "setwise.pipelines.cli"
app = typer.Typer(help="Jobs on a Ray cluster: list, read, stop them.", no_args_is_help=True)

AddressOption = Annotated[
    str | None, typer.Option("--address", metavar="URL", help="http://HOST:8265 of the cluster; else RAY_ADDRESS")
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="of a job, as jobs ls shows it")]


def submit(
    verb: Annotated[list[str], typer.Argument(metavar="-- VERB ...", help="what would be typed after 'setwise'")],
    address: AddressOption = None,
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", metavar="PATH", help="a file or folder below this one to send along; may be repeated"),
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="ID", help="id of the job; else Ray chooses one")] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="show what it writes and end with its exit code, or print its id")
    ] = True,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME", help="environment variable to send along, no secret; may be repeated"),
    ] = None,
) -> None:
    """Run a verb on a cluster: send this setwise and the files given, show what it writes, end with its exit code."""
    from setwise.pipelines import package

    environment = variables(env or [])
    sent = package.collect(file or [], Path.cwd(), say)
    cluster = _open(address)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "setwise.zip"
        sent.write(archive)
        own = f", {len(sent.files)} files, {sent.size / 2**20:.1f} MiB unpacked"
        say(f"sending {archive.stat().st_size / 2**20:.1f} MiB{own} to {cluster.url}")
        job = cluster.submit([FRONT_DOOR, *verb], archive, environment, name)
    if "SETWISE_STORE" not in environment and not any(word.startswith("--store") for word in verb):
        say(
            "SETWISE_STORE is not set here: the job writes where the nodes set it, or else to a folder that Ray removes"
        )
    if not wait:
        results.print(job, markup=False)
        return
    say(f"job {job}; Ctrl-C leaves it running")
    _follow(cluster, job, address)


@app.command("ls")
def jobs_list(address: AddressOption = None, as_json: JsonOption = False) -> None:
    """Every job that was submitted to a cluster, the oldest first."""
    from rich.table import Table
    from rich.text import Text

    found = _open(address).all()
    if as_json:
        emit({"jobs": [{**job.__dict__, "exit_code": job.exit_code} for job in found]})
        return
    table = Table("job", "status", "exit code", "started", "command")
    for job in found:
        started = f"{datetime.fromtimestamp(job.started, UTC):%Y-%m-%d %H:%M:%S} UTC" if job.started else ""
        code = "" if job.exit_code is None else str(job.exit_code)
        table.add_row(job.id, job.status, code, started, Text(typed(job)))
    results.print(table)


@app.command("logs")
def jobs_logs(
    job: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="go on until it is over, and end with its exit code")
    ] = False,
    address: AddressOption = None,
) -> None:
    """What a job has written."""
    cluster = _open(address)
    if follow:
        _follow(cluster, job, address)
    else:
        write(cluster.logs(job))


@app.command("stop")
def jobs_stop(job: JobId, address: AddressOption = None) -> None:
    """End a job. What it trains goes on from its newest checkpoint when the same verb is submitted again."""
    cluster = _open(address)
    results.print(f"{job}: {'stopping' if cluster.stop(job) else 'was over already'}", markup=False)


def variables(names: list[str]) -> dict[str, str]:
    """The environment of a job: where store and tracking are, if that is set here, and what `names` asks for.

    A folder as a store is made absolute, since the job is in a folder of its own.
    """
    from setwise.platform import jobs

    own = [name for name in ("SETWISE_STORE", "SETWISE_MIRROR", "MLFLOW_TRACKING_URI") if os.environ.get(name)]
    found = jobs.public_environment([*own, *names])
    store = found.get("SETWISE_STORE", "")
    if store and "://" not in store:
        found["SETWISE_STORE"] = str(Path(store).expanduser().absolute())
    return found


def typed(job: Job) -> str:
    """The command of a job as its user typed it, where it is one of ours."""
    _, ours, words = job.command.partition(f" -m {FRONT_DOOR}")
    return f"setwise{words}" if ours else job.command


def write(text: str) -> None:
    """What a job wrote, as it is, to stdout."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _open(address: str | None) -> Jobs:
    from setwise.platform import jobs

    cluster = jobs.connect(address)
    if cluster.warning:
        progress.print(f"warning: {cluster.warning}", markup=False, style="yellow")
    return cluster


def _follow(cluster: Jobs, job: str, address: str | None) -> None:
    """Show what a job writes, and end as it does."""
    try:
        state = cluster.follow(job, write)
    except BaseException:
        at = {"--address": address}
        say(f"\njob {job} is left as it is. To follow it: {repeated(['jobs', 'logs', job, '--follow'], at)}")
        say(f"to stop it: {repeated(['jobs', 'stop', job], at)}")
        raise
    if state.status == "STOPPED":
        say(f"job {job} was stopped")
    elif state.driver_code is None and state.exit_code:
        say(f"job {job} did not begin: {state.message}")
    raise typer.Exit(state.exit_code or 0)
