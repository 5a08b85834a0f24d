"""The Ray cluster a command works on: one of its own on this machine, or the one at RAY_ADDRESS."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from setwise.platform import local_cluster
from setwise.platform.errors import UnreachableError

# Ray Train's report() returns at the controller's next look; at the default of 2 s each epoch would end in a pause.
CONNECT_S = 10
LOOK_S = 0.5  # between two looks at whether the head is there
AWAY_S = 30  # for which it may not answer
ANSWER_S = 30
"""An autoscaler looks every 5 s."""
REPORT_INTERVAL_S = "0.1"


WHERE_A_TOKEN_GOES = "Put the cluster's into ~/.ray/auth_token (chmod 600), or name its file in RAY_AUTH_TOKEN_PATH"
ACCELERATOR = "ray.io/accelerator-type"
GROUP = "ray.io/node-group"


@contextlib.contextmanager
def connect(cpus: int | None = None, object_store_bytes: int = 512 * 2**20) -> Iterator[None]:
    """Be connected to Ray while the block runs; a cluster that was started here is gone afterwards.

    Args:
        cpus: CPUs of an own cluster; None means those this process may use.
        object_store_bytes: shared memory of an own cluster. It holds shards in preparation, and no training data.

    Raises:
        UnreachableError: no cluster answers at RAY_ADDRESS, or none can be started here.
    """
    environment = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": REPORT_INTERVAL_S,
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # Ray's 5 s are long where a machine gives 30 s of notice
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray would run workers at nice 15, and any other load would starve them
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a task without a GPU leaves CUDA_VISIBLE_DEVICES alone
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a path in a recipe is relative to where the user is
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # tracking is ours; Tune would write CSV, JSON and TensorBoard too
        "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # snapshots that nobody reads, and that keep all trials in memory
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    import ray
    from ray.exceptions import AuthenticationError

    if ray.is_initialized():
        yield
        return
    if not address:
        with local_cluster.started(cpus, object_store_bytes):
            yield
        return
    try:
        _check_answers(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except AuthenticationError as error:
        raise UnreachableError(
            f"the Ray cluster at {address} asks for a token that is not here. {WHERE_A_TOKEN_GOES}"
        ) from error
    except (OSError, RuntimeError) as error:
        raise UnreachableError(f"no Ray cluster at {address}: {error}") from error
    try:
        with _watched(address):
            yield
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class Node:
    """A machine of the cluster. `accelerator` and `group`, an autoscaler's, are Ray's labels of it."""

    address: str
    cpus: float
    gpus: float
    memory_gib: float
    accelerator: str | None
    group: str | None = None


@dataclass(frozen=True)
class Capacity:
    """What machines of some kinds have together or, where an autoscaler says how far it goes, can have.

    `grows` says that an autoscaler may start more of them and tells nobody how many.
    """

    gpus: int
    cpus: int
    grows: bool


def nodes() -> list[Node]:
    """The machines that are alive, by address."""
    import ray

    found = []
    for one in ray.nodes():
        if one["Alive"]:
            has, labels = one["Resources"], one.get("Labels") or {}
            memory = has.get("memory", 0) / 2**30
            kind, group = labels.get(ACCELERATOR), labels.get(GROUP)
            found.append(Node(one["NodeManagerAddress"], has.get("CPU", 0), has.get("GPU", 0), memory, kind, group))
    return sorted(found, key=lambda node: node.address)


def fitting(accelerators: Sequence[str], among: Sequence[Node]) -> list[Node]:
    """Machines with one of these labels; without any, all."""
    return [node for node in among if not accelerators or node.accelerator in accelerators]


def selector(accelerators: Sequence[str]) -> dict[str, str]:
    """Ray's label selector for machines with one of these labels; without any, for all."""
    return {ACCELERATOR: f"in({','.join(accelerators)})"} if accelerators else {}


def capacity(accelerators: Sequence[str] = ()) -> Capacity:
    """What the cluster we are connected to has, on machines with one of these labels.

    Some autoscalers tell Ray their groups: they count with as many machines as they may have, unless one of them is
    alive and has another label. KubeRay's does not (Ray 2.60); it is known to be there, and no more.
    """
    import ray

    alive = nodes()
    there = fitting(accelerators, alive)
    gpus, cpus = (int(sum(getattr(node, what) for node in there)) for what in ("gpus", "cpus"))
    told = ray._private.state.state.get_cluster_config()
    if told is None or not told.node_group_configs:
        return Capacity(gpus, cpus, _has_autoscaler())
    labels = {node.group: node.accelerator for node in alive}
    groups = [
        group
        for group in told.node_group_configs
        if not accelerators or group.name not in labels or labels[group.name] in accelerators
    ]
    most = {"GPU": gpus, "CPU": cpus}
    for name, now in most.items():
        could = sum(group.max_count * group.resources.get(name, 0) for group in groups)
        most[name] = max(now, min(could, told.max_resources.get(name, could)))
    endless = any(group.max_count < 0 for group in groups)
    return Capacity(most["GPU"], most["CPU"], endless)


def most_workers(accelerators: Sequence[str], wanted: int) -> int:
    """Upper end of an elastic range of workers with one GPU each.

    Ray Train counts how many there is room for over all machines, whatever their labels. Where some have other labels,
    it would start workers that find no place, so there are no more than fit now; but one, for which an autoscaler may
    start a machine.
    """
    alive = nodes()
    there = fitting(accelerators, alive)
    if sum(node.gpus for node in alive) == sum(node.gpus for node in there):
        return wanted
    return min(wanted, max(1, sum(int(node.gpus) for node in there)))


def can_start(accelerators: Sequence[str]) -> bool:
    """Whether the autoscaler has machines with a GPU and one of these labels, or does not say so in ANSWER_S.

    It is asked for a GPU, and reports what it can never give. Where it can, it may have begun to start a machine.
    """
    import ray
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    client = ray.experimental.internal_kv.internal_kv_get_gcs_client()
    request = ray.util.placement_group([{"GPU": 1}], bundle_label_selector=[selector(accelerators)])
    asked, deadline = None, time.monotonic() + ANSWER_S
    try:
        while time.monotonic() < deadline:
            status = GetClusterStatusReply.FromString(client.get_cluster_status())
            state = status.autoscaling_state
            if any(one.details.startswith(request.id.hex()) for one in state.infeasible_gang_resource_requests):
                return False
            if asked is None:
                asked = status.cluster_resource_state.cluster_resource_state_version
            if state.last_seen_cluster_resource_state_version > asked:  # it has looked since, and knows a group
                return True
            time.sleep(0.2)
        return True
    finally:
        ray.util.remove_placement_group(request)


def _has_autoscaler() -> bool:
    """Whether Ray's autoscaler v2 runs, as it does on KubeRay and with `ray up`."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return bool(is_autoscaler_v2(fetch_from_server=True))


def gpus() -> int:
    """GPUs of the cluster we are connected to."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def cpus() -> int:
    """CPUs of the cluster we are connected to."""
    import ray

    return int(ray.cluster_resources().get("CPU", 1))


@contextlib.contextmanager
def _watched(address: str) -> Iterator[None]:
    """End this process, with a message and the exit code of UnreachableError, once the cluster's head is gone.

    Ray's client would wait for a minute, and then end the process itself, without an exception; or at once, without a
    word, where the node beside it dies too. Nothing is lost by it: all that is done is on disk.
    """
    ended = threading.Event()

    def watch() -> None:
        refused, answered = 0, time.monotonic()
        while not ended.wait(LOOK_S):
            try:
                _check_answers(address)
                refused, answered = 0, time.monotonic()
            except ConnectionRefusedError:  # the machine is there, and the head on it is not
                refused += 1
            except OSError:
                refused = 0
            if (refused >= 2 or time.monotonic() - answered > AWAY_S) and not ended.is_set():
                told = "the head of the Ray cluster at {} is gone. When it is back, the same command goes on"
                print("error:", told.format(address), file=sys.stderr, flush=True)  # noqa: T201
                os._exit(UnreachableError.exit_code)

    threading.Thread(target=watch, name="head", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _check_answers(address: str) -> None:
    """Raises OSError if nothing listens at HOST:PORT: Ray would try for minutes, and write to stderr."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
