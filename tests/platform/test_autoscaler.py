"""A real autoscaler of Ray, which starts nodes on this machine from none: what is known of it, and what it can give."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from servers import free_port
from setwise.platform import cluster

HEAD = "f" * 51 + "00000"
"""The node that the provider of this machine takes for the head."""
START_S = 90
GROUPS = {
    kind.lower(): {
        "resources": {"CPU": 1, "GPU": 1},
        "labels": {cluster.ACCELERATOR: kind},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 2,
    }
    for kind in ("RTX3090", "A100")
}
PROBE = """
import json
from dataclasses import asdict

from setwise.platform import cluster

with cluster.connect():
    labelled, unlabelled = cluster.capacity(("A100",)), cluster.capacity()
    can = [cluster.can_start(kinds) for kinds in (("H200",), ("A100", "A100-80G"))]
    print(json.dumps({"labelled": asdict(labelled), "unlabelled": asdict(unlabelled), "can": can}))
"""


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """For who works on a cluster of a head that computes nothing, which grows; it ends with the test."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        address = f"{ray.util.get_node_ip_address()}:{port}"
        provider = {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": HEAD,
            "launch_multiple": True,
        }
        head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        described = {
            "cluster_name": "this-machine",
            "max_workers": 4,
            "idle_timeout_minutes": 5,
            "provider": provider,
            "head_node_type": "ray.head.default",
            "available_node_types": {"ray.head.default": head, **GROUPS},
            **{f"{name}_commands": [] for name in ("setup", "head_setup", "worker_setup", "initialization")},
            **{f"{name}_start_ray_commands": [] for name in ("head", "worker")},
            **{"auth": {}, "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False},
        }
        config = tmp_path / "cluster.json"
        config.write_text(json.dumps(described))
        user = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "HOME": str(tmp_path),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
            "RAY_USAGE_STATS_ENABLED": "0",
            "CUDA_VISIBLE_DEVICES": "",
        }
        administrator = {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
            "RAY_worker_niceness": "0",
        }
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--temp-dir={folder}"]
        command += [f"--port={port}", f"--autoscaling-config={config}", "--num-cpus=0", "--include-dashboard=false"]
        command += ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
        command += [f"--object-store-memory={100 * 2**20}"]
        with (tmp_path / "head.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=user | administrator, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
            )
        try:
            deadline = time.monotonic() + START_S
            while "Ray runtime started" not in (said := (tmp_path / "head.log").read_text()):
                assert process.poll() is None and time.monotonic() < deadline, said
                time.sleep(0.2)
            yield user | {"RAY_ADDRESS": address}
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.ray
def test_an_autoscaler_that_stands_at_zero_is_asked_for_what_it_could_start(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["labelled"] == told["unlabelled"] == {"gpus": 0, "cpus": 0, "grows": True}
    assert told["can"] == [False, True], "no group has an H200"
