"""A Ray cluster of this process's own, on this machine: started, watched while it is used, gone afterwards."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # it comes without types

from setwise.platform.errors import UnreachableError

ATTEMPTS = 3
"""Ray gives up a node whose helpers need more than 15 s to start, as they may on a busy machine."""
UNANSWERED = 60
"""Looks of 13 s each after which Ray takes its node for lost. Ray's own 5 are for machines that are out of reach."""


@contextlib.contextmanager
def started(cpus: int | None, object_store_bytes: int) -> Iterator[None]:
    """Be connected to a new cluster while the block runs; should it die meanwhile, end this process and say so.

    Args:
        cpus: CPUs that tasks may use; None means those this process may use.
        object_store_bytes: shared memory of it.

    Raises:
        UnreachableError: it could not be started.
    """
    import ray

    _private_token()
    environment = {
        "RAY_health_check_failure_threshold": str(UNANSWERED),
        # Processes that take seconds to start, and that nothing here has a use for: a watcher for notice given to the
        # only node, and one worker a CPU in advance, of another environment than Ray Train asks for.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_prestart_worker_first_driver": "0",
    }
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    for attempt in range(ATTEMPTS):
        before = set(psutil.Process().children())
        try:
            with _on_loopback():
                ray.init(
                    address="local",
                    num_cpus=cpus or len(os.sched_getaffinity(0)),
                    object_store_memory=object_store_bytes,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=os.environ.get("SETWISE_RAY_TEMP") or str(Path(tempfile.gettempdir()) / "ray"),
                )
            break
        except Exception as error:  # Ray raises Exception itself where its node does not answer
            ray.shutdown()
            _end(set(psutil.Process().children()) - before)
            if isinstance(error, ValueError) or attempt == ATTEMPTS - 1:
                raise UnreachableError(f"Ray cannot be started on this machine: {error}") from error
    try:
        with _watched():
            yield
    finally:
        ray.shutdown()


def _end(processes: set[psutil.Process]) -> None:
    """Ray forgets the processes of a node that did not start."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """End this process, with a message and the exit code of UnreachableError, once the cluster's only node is dead.

    Ray would end it by itself at the next object that is read, with exit code 1 and without a word.
    """
    import ray
    from ray._private import worker

    node = worker._global_node
    raylet = node.all_processes["raylet"][0].process.pid
    ended = threading.Event()

    def watch() -> None:
        try:
            death = os.waitid(os.P_PID, raylet, os.WEXITED | os.WNOWAIT)  # Ray itself collects it
        except ChildProcessError:
            return
        if death is None or ended.is_set() or not ray.is_initialized():
            return
        how = f"exit code {death.si_status}"
        if death.si_code != os.CLD_EXITED:
            how = f"ended by signal {death.si_status}, {signal.strsignal(death.si_status)}"
        told = (
            f"Ray's node on this machine died ({how}; its logs are in {node.get_logs_dir_path()}). "
            "The same command goes on; what came after the newest checkpoint is done again"
        )
        print("error:", told, file=sys.stderr, flush=True)  # noqa: T201
        os._exit(UnreachableError.exit_code)

    threading.Thread(target=watch, name="node", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a cluster that is started now listen on loopback alone, as Ray's own switch does for Windows and macOS.

    A loopback `_node_ip_address` does not do it: Ray replaces it by the machine's address, and listens on all.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _private_token() -> None:
    """Make Ray's token file ourselves, readable by its owner alone: Ray would leave it readable by everybody."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    with contextlib.suppress(OSError, RuntimeError):  # no home, or none that can be written: Ray says so
        path = Path.home() / ".ray" / "auth_token"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():
            whole = path.with_name(f".{path.name}-{os.getpid()}")
            with os.fdopen(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
                stream.write(secrets.token_hex(32))
            try:
                os.link(whole, path)  # at once, and never over that of a command that was faster
            finally:
                whole.unlink()
        elif path.stat().st_mode & 0o077 and path.stat().st_uid == os.getuid():
            path.chmod(0o600)
