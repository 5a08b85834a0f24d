"""A Ray cluster of several nodes on this machine, started as deploy/README.md has it for a few machines by hand.

Each node is a `ray start --block` of its own, with CPUs as declared, ports of its own and a token. Nodes come and are
killed while the cluster runs, and it ends by the ids of what it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commands import SETWISE, alive, descendants, wait_for
from servers import free_port

TOKEN = "0123456789abcdef" * 4
START_S = 120
NODE = "setwise-test-node"  # the label by which Ray's list of nodes says which of ours is meant
TRAINS = re.compile(rb"ray::(RayTrainWorker|ImplicitFunc)")
AS_DEPLOYED = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
}
"""What deploy/README.md exports in every shell that starts Ray or setwise."""


@dataclass
class Node:
    """One `ray start`, with all that it started."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def processes(self) -> set[int]:
        if self.process.poll() is not None:
            return set()
        return {self.process.pid, *descendants(self.process.pid)}

    def trains(self) -> bool:
        """Whether a worker of Ray Train runs on it, or a trial of Ray Tune."""
        return any(TRAINS.search(_command(one)) for one in descendants(self.process.pid))


@dataclass
class Cluster:
    """The nodes that run. The first is the head, at `gcs` for RAY_ADDRESS and `url` for jobs.

    Args:
        folder: HOME of all of it, with the nodes' logs.
        temporary: for Ray's sessions; short, since sockets lie in it.
    """

    folder: Path
    temporary: Path
    port: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    nodes: list[Node] = field(default_factory=list)

    @property
    def gcs(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    @property
    def environment(self) -> dict[str, str]:
        """Of everything that runs on the cluster or speaks to it."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**inherited, **AS_DEPLOYED, "PATH": path, "HOME": str(self.folder), "CUDA_VISIBLE_DEVICES": ""}

    def start(self, cpus: int) -> Node:
        """The head; again, after it was killed, at the same addresses."""
        ports = {"--port": self.port, "--dashboard-port": self.dashboard, "--ray-client-server-port": free_port()}
        words = [word for name, value in ports.items() for word in (name, str(value))]
        return self._run("head", cpus, ["--head", "--dashboard-host", "127.0.0.1", *words])

    def add(self, name: str, cpus: int = 1) -> Node:
        """One more machine."""
        return self._run(name, cpus, ["--address", self.gcs, "--include-log-monitor", "false"])

    def _run(self, name: str, cpus: int, words: Sequence[str]) -> Node:
        command = [str(SETWISE.parent / "ray"), "start", "--block", "--num-cpus", str(cpus), "--num-gpus", "0", *words]
        command += ["--object-store-memory", str(100 * 2**20), "--labels", f"{NODE}={name}"]
        command += ["--temp-dir", str(self.temporary / name), "--min-worker-port", "0", "--max-worker-port", "0"]
        command += ["--dashboard-agent-listen-port", str(free_port())]
        log = self.folder / f"{name}.log"
        with log.open("ab") as stream:
            process = subprocess.Popen(
                command, env=self.environment, stdout=stream, stderr=stream, cwd=self.folder, start_new_session=True
            )
        node = Node(name, process, log)
        self.nodes.append(node)
        self._wait_for(node)
        return node

    def _wait_for(self, node: Node) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and node.process.poll() is None:
            with contextlib.suppress(OSError):
                if node.name in self.listed() and self.asked("/api/jobs/") is not None:
                    return
            time.sleep(0.2)
        raise AssertionError(f"no node '{node.name}' at {self.url}:\n{node.log.read_text()[-3000:]}")

    def listed(self) -> dict[str, str]:
        """Ids of the nodes that Ray believes alive, by our names."""
        rows = self.asked("/api/v0/nodes?detail=true")["data"]["result"]["result"]
        return {row["labels"][NODE]: row["node_id"] for row in rows if row["state"] == "ALIVE"}

    def asked(self, path: str) -> Any:
        """What the head's dashboard answers."""
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def kill(self, node: Node) -> None:
        """As if its plug were pulled: SIGKILL to all that runs on it."""
        _kill(node.processes())
        node.process.wait()
        self.nodes.remove(node)

    def stop(self) -> None:
        """End all that runs."""
        started = {one for node in self.nodes for one in node.processes()}
        for node in list(self.nodes):
            self.kill(node)
        wait_for(lambda: not any(map(alive, started)), "the end of what the cluster had started", 15)


def _kill(processes: set[int]) -> None:
    for one in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def _command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


@contextlib.contextmanager
def cluster(folder: Path, cpus: int) -> Iterator[Cluster]:
    """A head with `cpus` CPUs, and the nodes that are added, for as long as the block takes."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        made = Cluster(folder, Path(temporary))
        try:
            made.start(cpus)
            yield made
        finally:
            made.stop()
