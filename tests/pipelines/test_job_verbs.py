"""`setwise submit` and `setwise jobs` as they are typed, on a cluster that is made up."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from setwise.pipelines import cli, job_verbs
from setwise.platform import jobs
from setwise.platform.errors import ConfigError, SetwiseError, UnreachableError
from setwise.platform.jobs import Job


class Cluster:
    """One that ends every job at once, as `job` says."""

    url, warning = "http://10.0.0.7:8265", "no token"

    def __init__(self) -> None:
        self.job = Job("j1", "SUCCEEDED", f"exec python -m {job_verbs.FRONT_DOOR} data ls", "", 0, 1.0, 2.0)
        self.submitted: list[tuple[list[str], list[str], dict[str, str], str | None]] = []
        self.failure: BaseException | None = None

    def submit(self, words: Sequence[str], archive: Path, environment: Mapping[str, str], name: str | None) -> str:
        self.submitted.append((list(words), zipfile.ZipFile(archive).namelist(), dict(environment), name))
        return name or "j1"

    def follow(self, job: str, write: Callable[[str], None]) -> Job:
        write("written by the job\n")
        if self.failure is not None:
            raise self.failure
        return self.job

    def all(self) -> list[Job]:
        return [self.job]

    def logs(self, job: str) -> str:
        return "[all] that it wrote"

    def stop(self, job: str) -> bool:
        return not self.job.is_over


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    monkeypatch.setattr(jobs, "connect", lambda address: made)
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed for people, results and progress."""
    text = io.StringIO()
    monkeypatch.setattr(job_verbs, "results", Console(file=text, width=200))
    monkeypatch.setattr(job_verbs, "progress", Console(file=text, width=200))
    monkeypatch.setattr(job_verbs, "say", lambda message: text.write(f"{message}\n"))
    return text


def typed(*words: str) -> Any:
    return CliRunner().invoke(cli.app, list(words))


def test_a_verb_goes_with_its_files_and_its_surroundings(
    cluster: Cluster, said: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text("extends: digits_cnn_bigru\n")
    monkeypatch.setenv("SETWISE_STORE", "shared")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SOMETHING_ELSE", "1")
    done = typed(
        *("submit", "--file", "mine.yaml", "--env", "OMP_NUM_THREADS", "--name", "night"),
        *("--", "train", "mine.yaml", "--name", "mine", "--seeds", "3"),
    )
    assert (done.exit_code, done.stdout) == (0, "written by the job\n")
    ((words, names, environment, name),) = cluster.submitted
    assert words == [job_verbs.FRONT_DOOR, "train", "mine.yaml", "--name", "mine", "--seeds", "3"]
    assert {"mine.yaml", "setwise/pipelines/cli.py", "setwise/pipelines/recipes/digits_cnn_bigru.yaml"} <= set(names)
    store = {"SETWISE_STORE": str(tmp_path / "shared"), "MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    assert (environment, name) == ({**store, "OMP_NUM_THREADS": "1"}, "night")
    assert "MiB unpacked to http://10.0.0.7:8265" in said.getvalue()
    assert "warning: no token" in said.getvalue() and "SETWISE_STORE is not set" not in said.getvalue()


def test_without_a_store_it_is_said_where_the_job_writes(cluster: Cluster, said: io.StringIO) -> None:
    assert typed("submit", "--no-wait", "--", "train", "digits_cnn_bigru").exit_code == 0
    assert "SETWISE_STORE is not set here" in said.getvalue()
    assert said.getvalue().endswith("\nj1\n"), "the id is the only result"
    assert cluster.submitted[0][2] == {}


@pytest.mark.parametrize(
    ("job", "code", "told"),
    [
        (Job("j1", "SUCCEEDED", "", "", 0, 1.0, 2.0), 0, ""),
        (Job("j1", "FAILED", "", "", 4, 1.0, 2.0), 4, ""),
        (Job("j1", "FAILED", "", "no python", None, None, 2.0), 1, "job j1 did not begin: no python"),
        (Job("j1", "STOPPED", "", "", None, 1.0, 2.0), 130, "job j1 was stopped"),
    ],
)
@pytest.mark.parametrize("words", [("submit", "--", "eval", "x"), ("jobs", "logs", "j1", "--follow")])
def test_the_exit_code_is_that_of_the_job(
    cluster: Cluster, said: io.StringIO, job: Job, code: int, told: str, words: tuple[str, ...]
) -> None:
    cluster.job = job
    done = typed(*words)
    assert (done.exit_code, done.stdout) == (code, "written by the job\n")
    assert told in said.getvalue()


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), UnreachableError("gone")])
def test_whoever_goes_is_told_how_to_come_back(
    cluster: Cluster, said: io.StringIO, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.failure = failure
    done = typed("submit", "--address", cluster.url, "--", "train", "digits_cnn_bigru")
    assert done.exit_code != 0
    assert "To follow it: setwise jobs logs j1 --follow --address http://10.0.0.7:8265" in said.getvalue()
    assert "to stop it: setwise jobs stop j1 --address http://10.0.0.7:8265" in said.getvalue()


def test_nothing_is_sent_after_a_mistake(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DB_PASSWORD", "canary")
    with (tmp_path / "weights.pt").open("wb") as stream:
        stream.truncate(101 * 2**20)
    for words, reason in [
        (("--env", "DB_PASSWORD"), "DB_PASSWORD looks like a secret"),
        (("--env", "NOT_THERE"), "NOT_THERE is not set"),
        (("--file", "gone.yaml"), "no such file"),
        (("--file", "weights.pt"), "101.0 MiB  weights.pt"),
    ]:
        error = typed("submit", *words, "--", "data", "ls").exception
        assert isinstance(error, ConfigError) and reason in str(error) and "canary" not in str(error)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:canary@mlflow")
    assert isinstance(typed("submit", "--", "data", "ls").exception, SetwiseError)
    assert typed("submit").exit_code == 2
    assert cluster.submitted == []


def test_jobs_are_listed_read_and_stopped(cluster: Cluster, said: io.StringIO) -> None:
    (row,) = json.loads(typed("jobs", "ls", "--json").stdout)["jobs"]
    assert (row["id"], row["status"], row["exit_code"], row["started"]) == ("j1", "SUCCEEDED", 0, 1.0)
    assert typed("jobs", "ls").exit_code == 0
    assert "setwise data ls" in said.getvalue() and "1970-01-01 00:00:01 UTC" in said.getvalue()
    assert typed("jobs", "logs", "j1").stdout == "[all] that it wrote"
    assert typed("jobs", "stop", "j1").exit_code == 0
    cluster.job = Job("j1", "RUNNING", "", "", None, 1.0, None)
    assert typed("jobs", "stop", "j1").exit_code == 0
    told = [line for line in said.getvalue().splitlines() if line.startswith("j1:")]
    assert told == ["j1: was over already", "j1: stopping"]
