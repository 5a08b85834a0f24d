"""Delivering what runs did to MLflow: exactly once, in order, and never in the way of training.

A training appends events to `events.jsonl` in its run folder (the outbox) and knows nothing of MLflow. A courier, in
one place, delivers them. Where it died in the middle it delivers again: MLflow stores a metric once per (key, step,
time, value), and every event carries the time at which it happened.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setwise.platform import run as runs
from setwise.platform import storage
from setwise.platform.errors import UnreachableError

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

RUN_TAG = "setwise.run"
MAX_PARAM_LENGTH = 6000  # MLflow's limit for a parameter's value
BATCH = 1000  # MLflow's limit for metrics in one call


class Tracker:
    """An MLflow store, and the delivery of runs into it.

    Args:
        uri: MLflow tracking URI; None means MLFLOW_TRACKING_URI or a sqlite file in `store`.
        store: folder for the default database and for artifacts.

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
        self.artifacts = store / "artifacts"
        self._client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient:
        """The MLflow client, made at first use: importing MLflow and creating its tables take seconds."""
        if self._client is None:
            for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
                logging.getLogger(noisy).setLevel(logging.WARNING)
            if self.uri.startswith("sqlite:///"):  # MLflow would try for a minute and a half
                try:
                    sqlite3.connect(self.uri.removeprefix("sqlite:///")).close()
                except sqlite3.Error as error:
                    raise UnreachableError(f"tracking store {self.uri}: {error}") from error
            from mlflow import MlflowClient

            try:
                client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
                client.search_experiments(max_results=1)
            except Exception as error:
                raise UnreachableError(f"tracking store {self.uri}: {error}") from error
            self._client = client
        return self._client

    def experiment_id(self, name: str) -> str:
        """Id of an experiment, created with its artifacts beside the store if it is new."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            local = self.uri.startswith("sqlite:")
            location = (self.artifacts / name).as_uri() if local else None
            try:
                return str(self.client.create_experiment(name, artifact_location=location))
            except MlflowException:  # another process was quicker
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def run_id(self, run: runs.Run) -> str:
        """MLflow's id of a run, which is created, after its parent, if it is not there yet."""
        state = self._delivered(run)
        if state:
            return str(state["run_id"])
        experiment = self.experiment_id(run.experiment)
        found = self.client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{run.name}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        tags = {RUN_TAG: run.name, "mlflow.runName": run.name}
        if run.parent is not None:
            tags["mlflow.parentRunId"] = self.run_id(run.parent)
        return str(self.client.create_run(experiment, tags=tags).info.run_id)

    def _delivered(self, run: runs.Run) -> dict[str, Any]:
        """How far this run was delivered to this store."""
        path = run.folder / "delivered.json"
        if path.is_file():
            state: dict[str, Any] = storage.read_json(path)
            if state["uri"] == self.uri:
                return state
        return {}

    def deliver(self, run: runs.Run) -> None:
        """Bring MLflow up to date with the run's events."""
        state = self._delivered(run)
        done = int(state.get("events", 0))
        events = runs.read_events(run.events)
        if state and done == len(events):
            return
        run_id = self.run_id(run)
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, event["time"], event["step"])
            for event in events[done:]
            if event["kind"] == "metrics"
            for key, value in event["values"].items()
        ]
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(run_id, metrics=metrics[start : start + BATCH])
        for event in events[done:]:
            self._deliver_event(run, run_id, event)
        storage.write_json(run.folder / "delivered.json", {"uri": self.uri, "run_id": run_id, "events": len(events)})

    def _deliver_event(self, run: runs.Run, run_id: str, event: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        match event["kind"]:
            case "params":
                params = [Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in event["values"].items()]
                self.client.log_batch(run_id, params=params)
            case "tags":
                self.client.log_batch(run_id, tags=[RunTag(k, str(v)) for k, v in event["values"].items()])
            case "dataset":
                dataset = Dataset(event["name"], event["digest"], "local", json.dumps({"uri": event["source"]}))
                self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
            case "artifact":
                path = run.folder / event["path"]
                if path.is_dir():
                    self.client.log_artifacts(run_id, str(path), event["into"])
                elif path.is_file():
                    self.client.log_artifact(run_id, str(path), event["into"] or None)
            case "status":
                self.client.set_terminated(run_id, event["value"], end_time=event["time"])


class Courier:
    """A thread that delivers a changing set of runs every `interval` seconds, and completely when it is closed.

    A store that cannot be reached costs nothing but the delay: the events stay on disk, and the next attempt, or the
    next command that uses the same run, delivers them.
    """

    def __init__(self, tracker: Tracker, interval: float = 2.0) -> None:
        self.tracker = tracker
        self.interval = interval
        self._runs: dict[Path, runs.Run] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="courier", daemon=True)
        self._thread.start()

    def add(self, run: runs.Run) -> None:
        with self._lock:
            self._runs[run.folder] = run

    def _work(self) -> None:
        while not self._closing.wait(self.interval):
            self._round()

    def _round(self) -> bool:
        with self._lock:
            pending = list(self._runs.values())
        delivered = True
        for run in pending:
            try:
                self.tracker.deliver(run)
            except Exception as error:
                log.debug("delivery of %s postponed: %s", run.name, error)
                delivered = False
        return delivered

    def close(self) -> bool:
        """Deliver what is left; False, with a warning, if the store did not take it."""
        self._closing.set()
        self._thread.join()
        delivered = self._round()
        if not delivered:
            log.warning(
                "%s did not take everything; it stays in the run folders and is sent next time", self.tracker.uri
            )
        return delivered

    def __enter__(self) -> Courier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
