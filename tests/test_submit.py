"""Jobs on a real cluster: two nodes, started as an administrator does, with a token, and typed commands."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusters import TOKEN, Cluster, cluster
from commands import SETWISE, epochs_logged, wait_for
from setwise.pipelines import package, references
from setwise.platform import jobs
from setwise.platform.tracking import Tracker
from tiny import TINY_MODEL

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
PROBE = """
import os
from pathlib import Path

import ray

from setwise.platform import cluster


@ray.remote
def task():
    from setwise.platform import cluster

    return cluster.__file__, os.environ["SETWISE_PROBE"], Path("mine.yaml").read_text().split()[0]


with cluster.connect():
    print("head", ray.get_runtime_context().gcs_address, os.environ["RAY_ADDRESS"], len(ray.nodes()))
    print("code", cluster.__file__)
    print("task", *ray.get(task.remote()))
"""
ENDLESS = """
import signal
import time


def ask(*_):
    raise KeyboardInterrupt


signal.signal(signal.SIGTERM, ask)
print("began")
try:
    time.sleep(600)
finally:
    time.sleep(4)
    print("all is written")
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of two nodes, of one CPU each."""
    with cluster(tmp_path_factory.mktemp("cluster"), cpus=1) as made:
        made.add("second")
        yield made


def surroundings(home: Path, **more: str) -> dict[str, str]:
    """Of a user who knows the token, and nothing else of the cluster."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**inherited, "HOME": str(home), "RAY_AUTH_TOKEN": TOKEN, **more}


def typed(folder: Path, *words: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [SETWISE, *words],
        env=surroundings(folder, **environment),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert TOKEN not in done.stdout + done.stderr
    return done


def test_verbs_run_as_jobs_on_a_cluster_with_a_token(
    head: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, store = tmp_path / "here", str(tmp_path / "store")
    here.mkdir()
    (here / "mine.yaml").write_text("extends: digits_cnn_bigru\ntrain: {epochs: 2}\n")
    (here / "probe.py").write_text(PROBE)
    (here / "endless.py").write_text(ENDLESS)
    at = ("--address", head.url)

    # What no verb shows: whose code runs in the job and in a task that it starts, and on which cluster.
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    there = jobs.connect(head.url)
    given = [Path("mine.yaml"), Path("probe.py"), Path("endless.py")]
    package.collect(given, here, say=lambda message: None).write(tmp_path / "sent.zip")
    there.submit(["endless"], tmp_path / "sent.zip", {}, "endless")
    there.submit(["probe"], tmp_path / "sent.zip", {"SETWISE_PROBE": "1"}, "probe")

    done = typed(here, "submit", *at, "--file", "mine.yaml", "--name", "check", "--", "config", "check", "mine.yaml")
    assert "mine.yaml: ok" in done.stdout.splitlines()
    assert "MiB unpacked to" in done.stderr and "Traceback" not in done.stdout + done.stderr
    places = {"RAY_ADDRESS": head.gcs, "SETWISE_STORE": store}
    failed = typed(here, "submit", "--name", "missing", "--", "eval", "nothing", code=2, **places)
    assert "nothing" in failed.stdout and Path(store).is_dir()

    assert typed(here, "jobs", "stop", "endless", *at).stdout == "endless: stopping\n"
    stopped: list[str] = []
    assert there.follow("endless", stopped.append).status == "STOPPED"
    assert "all is written" in "".join(stopped), "a job that is stopped has longer than Ray's three seconds"
    written: list[str] = []
    assert there.follow("probe", written.append).exit_code == 0, "".join(written)
    found = dict(
        line.split(" ", 1) for line in "".join(written).splitlines() if line.startswith(("head", "code", "task"))
    )
    address, given, nodes = found["head"].split()
    assert address == given and address.endswith(head.gcs.removeprefix("127.0.0.1")) and nodes == "2"
    code, (where, *told) = Path(found["code"]), found["task"].split()
    assert code.is_relative_to(head.temporary / "head") and told == ["1", "extends:"]
    assert Path(where).parts[-4:] == code.parts[-4:], "the same package, wherever the task ran"

    listed = {job["id"]: job for job in json.loads(typed(here, "jobs", "ls", *at, "--json").stdout)["jobs"]}
    assert {name: (job["status"], job["exit_code"]) for name, job in listed.items()} == {
        "endless": ("STOPPED", 130),
        "probe": ("SUCCEEDED", 0),
        "check": ("SUCCEEDED", 0),
        "missing": ("FAILED", 2),
    }
    assert "mine.yaml: ok" in typed(here, "jobs", "logs", "check", *at).stdout
    assert "choose another --name" in typed(here, "submit", *at, "--name", "check", "--", "data", "ls", code=2).stderr
    assert "no such job" in typed(here, "jobs", "stop", "unknown", *at, code=2).stderr
    wrong = typed(here, "submit", *at, "--", "data", "ls", code=6, RAY_AUTH_TOKEN="f" * 64)
    assert "the token is not the cluster's" in wrong.stderr
    assert len(there.all()) == len(listed)


def test_the_demo_study_runs_on_both_nodes_as_one_job(head: Cluster, store: Path, tmp_path: Path) -> None:
    small = [setting for setting in TINY_MODEL if not setting.startswith("train.epochs")]
    sweep = ("sweep", "digits", *small, "train.epochs=1", "--trials", "4", "--name", "on-two-nodes")
    submit = ("submit", "--address", head.url, "--name", "demo", "--", *sweep)
    refused = typed(tmp_path, *submit, code=6, SETWISE_STORE=str(store), RAY_AUTH_TOKEN="f" * 64)
    assert "the token is not the cluster's" in refused.stderr and not (store / "studies" / "on-two-nodes").exists()

    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen(
            [SETWISE, *submit],
            env=surroundings(tmp_path, SETWISE_STORE=str(store)),
            cwd=tmp_path,
            stdout=log,
            stderr=log,
        )
        busy: set[str] = set()

        def both() -> bool:
            busy.update(node.name for node in head.nodes if node.trains())
            return len(busy) == 2 or job.poll() is not None

        wait_for(both, "a trial on each node", 240)
        code = job.wait(240)
    written = (tmp_path / "log").read_text()
    assert code == 0, written
    assert busy == {"head", "second"}, written
    assert TOKEN not in written

    trials = references.trials_of("on-two-nodes", store)
    assert [(trial.name, trial.status) for trial in trials] == [(f"on-two-nodes-{n:03d}", "FINISHED") for n in range(4)]
    assert all(epochs_logged(trial) == [1] for trial in trials)
    client = Tracker(store).client
    found = client.search_runs([client.get_experiment_by_name("on-two-nodes").experiment_id])
    names = {one.data.tags["mlflow.runName"]: one.info.status for one in found}
    assert names == dict.fromkeys(("on-two-nodes", *(trial.name for trial in trials)), "FINISHED")
    logs = typed(tmp_path, "jobs", "logs", "demo", "--address", head.url).stdout
    assert "on-two-nodes" in logs and logs.strip() in written
