"""Delivering what runs did to MLflow: exactly once, in order, and never in the way of training.

A training appends events to `events.jsonl` in its run folder (the outbox) and knows nothing of MLflow. A courier, in
one place, delivers them. Where it died in the middle it delivers again: MLflow stores a metric once per (key, step,
time, value), and every event carries the time at which it happened. A run folder's `mlflow_key` makes it one run there,
even if the store answered the making of it too late.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shlex
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setwise.platform import mlflow_store, storage
from setwise.platform import run as runs
from setwise.platform.errors import UnreachableError
from setwise.platform.masking import masked
from setwise.platform.outbox import Event, Reader

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

RUN_TAG = "setwise.run"
KEY_TAG = "setwise.key"
MAX_PARAM_LENGTH = 6000  # MLflow's limit for a parameter's value
MAX_TAG_LENGTH = 8000  # of a run's tag
MAX_EXPERIMENT_TAG_LENGTH = 20_000  # of an experiment's, beyond which it is refused
BATCH = 1000  # MLflow's limit for metrics in one call
PATIENCE_S = 30  # until a call hangs: MLflow itself waits up to 20 s for a locked sqlite
OPENING_S = 180  # the same for importing MLflow and creating its tables
SLOWEST_UPLOAD = 1e6  # bytes a second
OUTAGE_S = 60  # until a user is told


class Tracker:
    """An MLflow store, and the delivery of runs into it.

    Args:
        uri: MLflow tracking URI; None means MLFLOW_TRACKING_URI or a sqlite file in `store`.
        store: folder for the default database and for artifacts.

    Attributes:
        address: the URI without its password.
        deadline: time.monotonic() after which the call in progress counts as hanging.

    Raises:
        UnreachableError: the store cannot be opened.
    """

    def __init__(self, store: Path, uri: str | None = None) -> None:
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store / 'mlflow.db'}"
        if "://" not in self.uri or self.uri.startswith("file:"):
            raise UnreachableError(
                f"tracking URI '{self.uri}' is a file store, which MLflow no longer writes. "
                "Use sqlite:///FOLDER/mlflow.db, postgresql://... or the address of a server."
            )
        self.address = masked(self.uri)
        self.store = store
        self.artifacts = store / "artifacts"
        self.deadline = 0.0
        self._client: MlflowClient | None = None
        mlflow_store.limit_calls()

    @property
    def client(self) -> MlflowClient:
        """The MLflow client, made at first use."""
        if self._client is None:
            self._may_take(OPENING_S)
            self._client = mlflow_store.open_client(self.uri)
        return self._client

    def _may_take(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    def experiment_id(self, name: str) -> str:
        """Id of an experiment, created with its artifacts beside the store if it is new."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            location = (self.artifacts / name).as_uri() if mlflow_store.is_database(self.uri) else None
            try:
                return str(self.client.create_experiment(name, artifact_location=location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self.client.get_experiment_by_name(name)  # another process was quicker
        return str(found.experiment_id)

    def run_id(self, run: runs.Run) -> str:
        """MLflow's id of a run, which is created, after its parent, if it is not there yet."""
        state = self._delivered(run)
        if state:
            return str(state["run_id"])
        with self._delivering(run):
            return self._run_id(run)

    def _run_id(self, run: runs.Run) -> str:
        state = self._delivered(run)
        if state:
            return str(state["run_id"])
        self._may_take(PATIENCE_S)
        experiment = self.experiment_id(run.experiment)
        key = run.folder / "mlflow_key"
        if key.is_file():  # else nobody asked for it yet
            found = self._all_with(key.read_text(), experiment)
        else:
            found = []
            storage.write_bytes(key, secrets.token_hex(16).encode())
        if found:
            run_id = found[0]
        else:
            tags = {RUN_TAG: run.name, KEY_TAG: key.read_text(), "mlflow.runName": run.name}
            if run.parent is not None:
                tags["mlflow.parentRunId"] = self.run_id(run.parent)
            first = next((events[0]["time"] for events, _ in Reader(run.events).new()), None)
            self._may_take(PATIENCE_S)
            run_id = str(self.client.create_run(experiment, start_time=first, tags=tags).info.run_id)
        self._note(run, run_id, 0)
        return run_id

    def _all_with(self, key: str, experiment: str) -> list[str]:
        """MLflow's runs with this key, the first made first. There are two if the making of one timed out and was
        done all the same, later."""
        found = self.client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{key}'")
        return [str(one.info.run_id) for one in sorted(found, key=lambda one: (one.info.start_time, one.info.run_id))]

    def _delivering(self, run: runs.Run) -> Any:
        """Be the one process that delivers `run`."""
        return storage.lease(run.folder / "delivery.lease", f"the delivery of run '{run.name}'", wait_s=PATIENCE_S)

    def _delivered(self, run: runs.Run) -> dict[str, Any]:
        """How far this run was delivered to this store: its `run_id` there, and the `bytes` of its outbox."""
        path = run.folder / "delivered.json"
        if path.is_file():
            state: dict[str, Any] = storage.read_json(path)
            if state["uri"] == self.address:
                return state
        return {}

    def _note(self, run: runs.Run, run_id: str, end: int) -> None:
        storage.write_json(run.folder / "delivered.json", {"uri": self.address, "run_id": run_id, "bytes": end})

    def _pending(self, run: runs.Run) -> list[tuple[list[Event], int]]:
        return Reader(run.events, int(self._delivered(run).get("bytes", 0))).new()

    def undelivered(self, run: runs.Run) -> int:
        """How many events of the run this store lacks; answered without asking it."""
        return sum(len(events) for events, _ in self._pending(run))

    def deliver(self, run: runs.Run) -> int:
        """Bring MLflow up to date with the run's events; how many were sent.

        Raises:
            UnreachableError: the store is away. What it took until then is noted.
            LeaseHeldError: another process delivers this run.
            MlflowException: the store refused the run, as one that was deleted.
        """
        if not self._pending(run):
            return 0
        self._may_take(2 * PATIENCE_S)  # another process may be delivering it
        with self._delivering(run):
            try:
                try:
                    return self._deliver(run)
                except Exception as error:
                    if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                        raise
                    (run.folder / "delivered.json").unlink(missing_ok=True)  # the store was emptied: once more
                    return self._deliver(run)
            except Exception as error:
                if mlflow_store.is_away(error):
                    raise mlflow_store.unreachable(self.uri, error) from error
                raise

    def _deliver(self, run: runs.Run) -> int:
        run_id = self._run_id(run)
        sent = 0
        for events, end in _batches(self._pending(run)):
            self._send(run, run_id, events)
            self._note(run, run_id, end)
            sent += len(events)
        return sent

    def _send(self, run: runs.Run, run_id: str, events: list[Event]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, event["time"], event["step"])
            for event in events
            if event["kind"] == "metrics"
            for key, value in event["values"].items()
        ]
        for start in range(0, len(metrics), BATCH):
            self._may_take(PATIENCE_S)
            self.client.log_batch(run_id, metrics=metrics[start : start + BATCH])
        for event in events:
            self._may_take(PATIENCE_S)
            self._deliver_event(run, run_id, event)

    def _deliver_event(self, run: runs.Run, run_id: str, event: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        match event["kind"]:
            case "params":
                params = [Param(key, _text(value, MAX_PARAM_LENGTH)) for key, value in event["values"].items()]
                self.client.log_batch(run_id, params=params)
            case "tags":
                self.client.log_batch(
                    run_id, tags=[RunTag(k, _text(v, MAX_TAG_LENGTH)) for k, v in event["values"].items()]
                )
            case "experiment_tags":
                experiment = self.experiment_id(run.experiment)
                for key, value in event["values"].items():
                    self.client.set_experiment_tag(experiment, key, _text(value, MAX_EXPERIMENT_TAG_LENGTH))
            case "dataset":
                dataset = Dataset(event["name"], event["digest"], "local", json.dumps({"uri": event["source"]}))
                self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
            case "artifact":
                path = run.folder / event["path"]
                if not _is_within(run.folder, path):
                    log.warning("%s: '%s' leads out of the run and is not uploaded", run.folder, event["path"])
                    return
                size = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
                seconds = mlflow_store.CALL_S + size / SLOWEST_UPLOAD
                self._may_take(PATIENCE_S + seconds)
                with mlflow_store.call_limit(seconds):
                    if path.is_dir():
                        self.client.log_artifacts(run_id, str(path), event["into"])
                    elif path.is_file():
                        self.client.log_artifact(run_id, str(path), event["into"] or None)
            case "status":
                key = run.folder / "mlflow_key"
                if key.is_file():
                    for twin in self._all_with(key.read_text(), self.experiment_id(run.experiment)):
                        if twin != run_id:
                            self.client.delete_run(twin)
                self.client.set_terminated(run_id, event["value"], end_time=event["time"])


def _is_within(folder: Path, path: Path) -> bool:
    """Whether a file, or all in a folder, lies in `folder`; a run may be somebody else's, and the files here ours."""
    home = folder.resolve()
    return all(one.resolve().is_relative_to(home) for one in [path, *path.rglob("*")])


def _text(value: object, limit: int) -> str:
    """A value as every store takes it, and as everybody may read it: one that was refused would keep back all that
    comes after.

    The name of a file, in the reason of a failure, may hold what is no text.
    """
    return masked(str(value)).replace("\0", "?").encode(errors="replace").decode()[:limit]


def _batches(lines: list[tuple[list[Event], int]]) -> Iterator[tuple[list[Event], int]]:
    """Lines of an outbox in order, metrics together as far as they fit into one call, all else by itself."""
    batch: list[Event] = []
    size, last = 0, 0
    for events, end in lines:
        only_metrics = all(event["kind"] == "metrics" for event in events)
        values = sum(len(event["values"]) for event in events) if only_metrics else BATCH
        if batch and size + values > BATCH:
            yield batch, last
            batch, size = [], 0
        batch, size, last = [*batch, *events], size + values, end
    if batch:
        yield batch, last


class Courier:
    """A thread that delivers a changing set of runs every `interval` seconds, and completely when it is closed.

    A store that cannot be reached costs nothing but the delay: the events stay on disk, and the next attempt, or the
    next command that uses the same run, delivers them.
    """

    def __init__(self, tracker: Tracker, interval: float = 2.0) -> None:
        self.tracker = tracker
        self.interval = interval
        self._runs: dict[Path, tuple[runs.Run, bool]] = {}
        self._left: dict[Path, tuple[runs.Run, bool]] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._failure: Exception | None = None
        self._failing_since: float | None = None
        self._thread = threading.Thread(target=self._work, name="courier", daemon=True)
        self._thread.start()

    def add(self, run: runs.Run, ended: bool = False) -> None:
        """Deliver `run` from now on; one that has `ended` once, and what may come after that on closing.

        A sweep has ever more of those, and a look at each of them every time would take ever longer.
        """
        with self._lock:
            self._left.pop(run.folder, None)
            self._runs[run.folder] = (run, ended)

    def _work(self) -> None:
        closing = False
        while not closing:
            closing = self._closing.wait(self.interval)
            if closing:
                with self._lock:
                    self._runs |= self._left
            self._failure = self._round()
            self._tell_of_outage()

    def _round(self) -> Exception | None:
        """Deliver each run once; why one of them was not. One of a store that is away ends the round, and comes last
        in the next: it may be the only one that fails so."""
        with self._lock:
            pending = list(self._runs.values())
        failure: Exception | None = None
        for added in pending:
            run, ended = added
            try:
                self.tracker.deliver(run)
            except Exception as error:
                log.debug("delivery of %s postponed: %s", run.name, error)
                failure = error
                if isinstance(error, UnreachableError):
                    with self._lock:
                        self._runs[run.folder] = self._runs.pop(run.folder)
                    break
            else:
                with self._lock:
                    if ended and self._runs[run.folder] is added:  # else it was added anew meanwhile
                        self._left[run.folder] = self._runs.pop(run.folder)
        return failure

    def _tell_of_outage(self) -> None:
        """Warn once an outage has lasted a while: it may be a wrong address, and training goes on for days."""
        now = time.monotonic()
        if self._failure is None:
            self._failing_since = None
        elif self._failing_since is None:
            self._failing_since = now
        elif now - self._failing_since > OUTAGE_S and not self._closing.is_set():
            self._failing_since = float("inf")
            log.warning("%s; training goes on, and its record is kept on disk until it answers", _line(self._failure))

    def close(self) -> bool:
        """Deliver what is left; False, with a warning, if the store did not take it, or did not answer in time."""
        self._closing.set()
        patience = time.monotonic() + PATIENCE_S
        while self._thread.is_alive() and time.monotonic() < max(patience, self.tracker.deadline):
            self._thread.join(0.1)
        hangs = self._thread.is_alive()
        if not hangs and self._failure is None:
            return True
        reason = "it does not answer" if hangs or self._failure is None else _line(self._failure)
        command = shlex.join(["setwise", "runs", "sync", "--store", str(self.tracker.store)])
        log.warning(
            "%s did not take everything (%s). It is kept in the run folders; deliver it later: %s",
            self.tracker.address,
            reason,
            command,
        )
        return False

    def __enter__(self) -> Courier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    return line if len(line) <= 200 else f"{line[:200]}..."
