"""A cluster of this process's own, when it does not start at once and when it dies."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pytest
import ray

from setwise.platform.errors import UnreachableError
from setwise.platform.local_cluster import ATTEMPTS, started  # before conftest.py hides it from tests

DYING = """
import os, signal, sys, time
from setwise.platform import cluster
with cluster.connect(cpus=1, object_store_bytes=80 * 2**20):
    from ray._private import worker
    os.kill(worker._global_node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    time.sleep(60)
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ray-") as made:
        monkeypatch.setenv("SETWISE_RAY_TEMP", made)
        yield made


@pytest.mark.ray
def test_a_node_that_dies_ends_the_command_which_says_so(folder: str) -> None:
    ended = subprocess.run([sys.executable, "-c", DYING], capture_output=True, text=True, timeout=120)
    assert ended.returncode == UnreachableError.exit_code == 6
    told = f"error: Ray's node on this machine died (ended by signal 9, Killed; its logs are in {folder}"
    assert told in ended.stderr
    assert "The same command goes on" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("failures", [2, 3])
def test_a_node_that_does_not_start_is_tried_again_and_leaves_no_process(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[subprocess.Popen[bytes]] = []

    def init(**_: object) -> None:
        tried.append(subprocess.Popen(["sleep", "60"]))
        if len(tried) <= failures:
            raise Exception("The current node timed out during startup")  # noqa: TRY002  # as Ray does

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    process = SimpleNamespace(process=psutil.Process())
    monkeypatch.setattr(ray._private.worker, "_global_node", SimpleNamespace(all_processes={"raylet": [process]}))
    try:
        if failures < ATTEMPTS:
            with started(1, 80 * 2**20):
                assert [one.poll() is None for one in tried] == [False] * failures + [True]
        else:
            with pytest.raises(UnreachableError, match="cannot be started on this machine: The current node timed out"):
                started(1, 80 * 2**20).__enter__()
            assert len(tried) == failures and all(one.poll() is not None for one in tried)
    finally:
        for one in tried:
            one.kill()
            one.wait()
