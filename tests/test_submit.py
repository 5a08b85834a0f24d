"""Jobs on a real cluster: a head started as an administrator does, with a token, and commands typed as a user does.

One test, since the head takes most of its time.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from commands import SETWISE, alive, descendants
from servers import free_port
from setwise.pipelines import package
from setwise.platform import jobs

TOKEN = "0123456789abcdef" * 4
START_S = 90
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


@dataclass(frozen=True)
class Head:
    url: str
    gcs: str
    temporary: Path


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """A cluster of one node, for as long as the test takes; ended by the ids of what it started."""
    port, dashboard = free_port(), free_port()
    ports = {
        "--port": port,
        "--dashboard-port": dashboard,
        "--dashboard-agent-listen-port": free_port(),
        "--ray-client-server-port": free_port(),
    }
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        command = [str(SETWISE.parent / "ray"), "start", "--head", "--block", "--temp-dir", temporary]
        command += ["--min-worker-port", "0", "--max-worker-port", "0"]  # any that are free
        command += ["--num-cpus", "2", "--object-store-memory", str(100 * 2**20), "--dashboard-host", "127.0.0.1"]
        command += [word for name, value in ports.items() for word in (name, str(value))]
        with (tmp_path / "head.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
            )
        started: set[int] = set()
        try:
            url = f"http://127.0.0.1:{dashboard}"
            wait_until_it_takes_jobs(url, process, tmp_path / "head.log")
            yield Head(url, f"127.0.0.1:{port}", Path(temporary))
        finally:
            started = {process.pid, *descendants(process.pid)}
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            for one in started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
            process.wait(15)
    assert not [one for one in started if alive(one)]


def wait_until_it_takes_jobs(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError(f"no cluster at {url}:\n{log.read_text()[-3000:]}")


def typed(folder: Path, *words: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [SETWISE, *words],
        env={**surroundings, "HOME": str(folder), "RAY_AUTH_TOKEN": TOKEN, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert TOKEN not in done.stdout + done.stderr
    return done


@pytest.mark.ray
@pytest.mark.end_to_end
def test_verbs_run_as_jobs_on_a_cluster_with_a_token(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, store = tmp_path / "here", str(tmp_path / "store")
    here.mkdir()
    (here / "mine.yaml").write_text("extends: digits_cnn_bigru\ntrain: {epochs: 2}\n")
    (here / "probe.py").write_text(PROBE)
    (here / "endless.py").write_text(ENDLESS)
    at = ("--address", head.url)

    # What no verb shows: whose code runs in the job and in a task that it starts, and on which cluster.
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    cluster = jobs.connect(head.url)
    given = [Path("mine.yaml"), Path("probe.py"), Path("endless.py")]
    package.collect(given, here, say=lambda message: None).write(tmp_path / "sent.zip")
    cluster.submit(["endless"], tmp_path / "sent.zip", {}, "endless")
    cluster.submit(["probe"], tmp_path / "sent.zip", {"SETWISE_PROBE": "1"}, "probe")

    done = typed(here, "submit", *at, "--file", "mine.yaml", "--name", "check", "--", "config", "check", "mine.yaml")
    assert "mine.yaml: ok" in done.stdout.splitlines()
    assert "MiB unpacked to" in done.stderr and "Traceback" not in done.stdout + done.stderr
    surroundings = {"RAY_ADDRESS": head.gcs, "SETWISE_STORE": store}
    failed = typed(here, "submit", "--name", "missing", "--", "eval", "nothing", code=2, **surroundings)
    assert "nothing" in failed.stdout and Path(store).is_dir()

    assert typed(here, "jobs", "stop", "endless", *at).stdout == "endless: stopping\n"
    stopped: list[str] = []
    assert cluster.follow("endless", stopped.append).status == "STOPPED"
    assert "all is written" in "".join(stopped), "a job that is stopped has longer than Ray's three seconds"
    written: list[str] = []
    assert cluster.follow("probe", written.append).exit_code == 0, "".join(written)
    found = dict(
        line.split(" ", 1) for line in "".join(written).splitlines() if line.startswith(("head", "code", "task"))
    )
    address, given, nodes = found["head"].split()
    assert address == given and address.endswith(head.gcs.removeprefix("127.0.0.1")) and nodes == "1"
    assert found["code"].startswith(f"{head.temporary}/") and found["task"] == f"{found['code']} 1 extends:"

    listed = {job["id"]: job for job in json.loads(typed(here, "jobs", "ls", *at, "--json").stdout)["jobs"]}
    assert {name: (job["status"], job["exit_code"]) for name, job in listed.items()} == {
        "endless": ("STOPPED", 1),
        "probe": ("SUCCEEDED", 0),
        "check": ("SUCCEEDED", 0),
        "missing": ("FAILED", 2),
    }
    assert "mine.yaml: ok" in typed(here, "jobs", "logs", "check", *at).stdout
    assert "choose another --name" in typed(here, "submit", *at, "--name", "check", "--", "data", "ls", code=2).stderr
    assert "no such job" in typed(here, "jobs", "stop", "unknown", *at, code=2).stderr
    wrong = typed(here, "submit", *at, "--", "data", "ls", code=6, RAY_AUTH_TOKEN="f" * 64)
    assert "the token is not the cluster's" in wrong.stderr
    assert len(cluster.all()) == len(listed)
