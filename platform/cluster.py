"""The Ray cluster a command works on: one of its own on this machine, or the one at RAY_ADDRESS."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from setwise.platform.errors import UnreachableError

# Ray Train's report() returns at the controller's next look; at the default of 2 s each epoch would end in a pause.
CONNECT_S = 10
REPORT_INTERVAL_S = "0.1"


ACCELERATOR = "ray.io/accelerator-type"


@contextlib.contextmanager
def connect(cpus: int | None = None, object_store_bytes: int = 512 * 2**20) -> Iterator[None]:
    """Be connected to Ray while the block runs; a cluster that was started here is gone afterwards.

    Args:
        cpus: CPUs of an own cluster; None means those this process may use.
        object_store_bytes: shared memory of an own cluster. It holds shards in preparation, and no training data.

    Raises:
        UnreachableError: no cluster answers at RAY_ADDRESS.
    """
    environment = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": REPORT_INTERVAL_S,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray would run workers at nice 15, and any other load would starve them
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a task without a GPU leaves CUDA_VISIBLE_DEVICES alone
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a path in a recipe is relative to where the user is
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # tracking is ours; Tune would write CSV, JSON and TensorBoard too
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        _private_token()
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        if address:
            _check_answers(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                address="local",
                num_cpus=cpus or len(os.sched_getaffinity(0)),
                object_store_memory=object_store_bytes,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=os.environ.get("SETWISE_RAY_TEMP") or str(Path(tempfile.gettempdir()) / "ray"),
            )
    except (OSError, RuntimeError) as error:
        raise UnreachableError(f"no Ray cluster at {address or 'this machine'}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class Node:
    """A machine of the cluster we are connected to. `accelerator` is its label `ray.io/accelerator-type`."""

    address: str
    cpus: float
    gpus: float
    memory_gib: float
    accelerator: str | None


def nodes() -> list[Node]:
    """The machines that are alive, by address."""
    import ray

    found = []
    for one in ray.nodes():
        if one["Alive"]:
            has = one["Resources"]
            label = (one.get("Labels") or {}).get(ACCELERATOR)
            memory = has.get("memory", 0) / 2**30
            found.append(Node(one["NodeManagerAddress"], has.get("CPU", 0), has.get("GPU", 0), memory, label))
    return sorted(found, key=lambda node: node.address)


def gpus() -> int:
    """GPUs of the cluster we are connected to."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def cpus() -> int:
    """CPUs of the cluster we are connected to."""
    import ray

    return int(ray.cluster_resources().get("CPU", 1))


def _check_answers(address: str) -> None:
    """Raises OSError if nothing listens at HOST:PORT: Ray would try for minutes, and write to stderr."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()


def _private_token() -> None:
    """Make Ray's token file ourselves, readable by its owner alone: Ray would leave it readable by everybody."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as stream:
                stream.write(secrets.token_hex(32))
        elif path.stat().st_mode & 0o077 and path.owner() == Path.home().owner():
            path.chmod(0o600)
