"""A real MLflow server that is killed, slow, broken or not there holds nothing up, and gets everything in the end."""

from __future__ import annotations

import itertools
import os
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from servers import Faults, MlflowServer, faults, free_port, mlflow_server
from setwise.platform import storage
from setwise.platform.errors import UnreachableError
from setwise.platform.mlflow_store import TIMEOUT
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run, read_events
from setwise.platform.tracking import KEY_TAG, RUN_TAG, Courier, Tracker

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def between(server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    monkeypatch.setenv(TIMEOUT, "1")
    with faults(server.uri, delay=2.0) as proxy:
        yield proxy


def new_run(store: Path, parent: Run | None = None) -> Run:
    name = f"run-{next(NUMBERS)}"
    identity = {"experiment": "outages", "parent": f"../{parent.name}" if parent else None}
    storage.write_json(store / "runs" / name / "run.json", identity)
    return Run(store / "runs" / name)


def begin(run: Run) -> Outbox:
    outbox = Outbox(run.events)
    outbox.append({"kind": "params", "values": {"lr": "0.1"}}, {"kind": "tags", "values": {"recipe": "digits"}})
    return outbox


def end(run: Run) -> None:
    storage.write_json(run.folder / "best" / "weights.json", {"weights": [0.5] * 1000})
    Outbox(run.events).append(
        {"kind": "artifact", "path": "best", "into": "checkpoints"},
        {"kind": "status", "value": "FINISHED"},
    )


def check(server: MlflowServer, run: Run) -> None:
    """MLflow has one such run, and of it every event once, with its own time."""
    client = Tracker(run.folder, server.uri).client
    experiment = client.get_experiment_by_name("outages").experiment_id
    (found,) = client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{run.name}'")
    events = [event for event in read_events(run.events) if event["kind"] == "metrics"]
    for key in {key for event in events for key in event["values"]}:
        got = Counter((one.step, one.timestamp, one.value) for one in client.get_metric_history(found.info.run_id, key))
        assert got == {(event["step"], event["time"], event["values"][key]): 1 for event in events}, key
    assert (found.data.params["lr"], found.data.tags["recipe"]) == ("0.1", "digits")
    assert found.info.status == "FINISHED"
    assert found.info.start_time == read_events(run.events)[0]["time"]
    (file,) = client.list_artifacts(found.info.run_id, "checkpoints")
    assert file.path == "checkpoints/weights.json"


def test_a_server_killed_in_the_middle_of_a_training_loses_nothing(
    server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    run = new_run(tmp_path)
    outbox = begin(run)
    with Courier(Tracker(tmp_path, server.uri), interval=0.1) as courier:
        courier.add(run)
        for step in range(1, 201):
            if step == 60:
                wait_for(lambda: courier.tracker.undelivered(run) < 30)
                server.kill()  # in the middle of a delivery, as it may be
            outbox.metrics(step, {"loss": 1 / step, "val/rsum": float(step)})
            time.sleep(0.005)
        assert courier.tracker.undelivered(run) >= 141
        server.start()
        outbox.metrics(201, {"loss": 1 / 201, "val/rsum": 201.0})
        end(run)
    assert caplog.records == []
    assert capfd.readouterr().out == "", "MLflow wrote where a verb's result belongs"
    check(server, run)


def wait_for(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


@pytest.mark.parametrize("fault", ["500", "slow", "late", "reset", "half"])
def test_what_a_broken_server_was_told_is_there_once_when_it_is_well_again(
    server: MlflowServer, between: Faults, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    tracker = Tracker(tmp_path, between.uri)
    assert tracker.client is not None
    run = new_run(tmp_path)
    outbox = begin(run)
    between.fault = fault
    started = time.monotonic()
    courier = Courier(tracker, interval=0.1)
    courier.add(run)
    appends = []
    for step in range(1, 21):
        before = time.perf_counter()
        outbox.metrics(step, {"loss": 1 / step})
        appends.append(time.perf_counter() - before)
        time.sleep(0.03)
    end(run)
    assert not courier.close()
    assert time.monotonic() - started < 10
    assert statistics.quantiles(appends, n=10)[-1] < 0.3, "the training waited for calls that take a second"
    (record,) = caplog.records
    assert f"setwise runs sync --store {tmp_path}" in record.getMessage()

    between.fault = "none"
    assert tracker.deliver(run) >= 1
    assert tracker.deliver(run) == 0
    check(server, run)


@pytest.mark.parametrize("fault", ["slow", "late"])
def test_a_run_whose_making_timed_out_and_was_done_all_the_same_is_one_run(
    server: MlflowServer, between: Faults, tmp_path: Path, fault: str
) -> None:
    """`late`: it is made after the courier has looked whether it was, and has made another."""
    tracker = Tracker(tmp_path, between.uri)
    tracker.experiment_id("outages")
    parent = new_run(tmp_path)
    run = new_run(tmp_path, parent)
    begin(parent)
    begin(run).metrics(1, {"loss": 0.5})
    between.fault, between.only = fault, "/runs/create"
    with pytest.raises(UnreachableError):
        tracker.deliver(run)
    between.fault = "none"
    if fault == "late":
        tracker.deliver(run)
        wait_for(lambda: between.late == 1)
    for one in (parent, run):
        end(one)
        tracker.deliver(one)
        check(server, one)
    key = (parent.folder / "mlflow_key").read_text()
    everything = tracker.client.search_runs([tracker.experiment_id("outages")], f"tags.`{KEY_TAG}` = '{key}'")
    assert [one.info.run_id for one in everything] == [tracker.run_id(parent)]
    assert tracker.client.get_run(tracker.run_id(run)).data.tags["mlflow.parentRunId"] == tracker.run_id(parent)


def test_a_large_file_may_take_longer_than_a_call(server: MlflowServer, between: Faults, tmp_path: Path) -> None:
    """A server hands it on, as to an object store, before it answers."""
    run = new_run(tmp_path)
    begin(run)
    end(run)
    between.fault, between.only = "slow", "/weights.json"
    Tracker(tmp_path, between.uri).deliver(run)
    check(server, run)
    assert os.environ[TIMEOUT] == "1"


def test_a_store_that_was_emptied_is_filled_again(server: MlflowServer, tmp_path: Path) -> None:
    run = new_run(tmp_path)
    begin(run).metrics(1, {"loss": 0.5})
    tracker = Tracker(tmp_path, server.uri)
    tracker.deliver(run)
    state = storage.read_json(run.folder / "delivered.json")
    storage.write_json(run.folder / "delivered.json", {**state, "run_id": "0" * 32})
    tracker.client.delete_run(state["run_id"])
    end(run)
    tracker.deliver(run)
    check(server, run)


def test_calls_to_a_server_fail_within_ten_seconds_unless_somebody_wants_it_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    monkeypatch.delenv(TIMEOUT, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    Tracker(tmp_path, "http://127.0.0.1:1")
    assert (MLFLOW_HTTP_REQUEST_TIMEOUT.get(), MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()) == (10, 3)


@pytest.mark.parametrize("silent", [True, False])
def test_a_store_that_is_absent_from_the_start_costs_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, silent: bool
) -> None:
    """`silent`: the connection is taken, and nobody ever answers."""
    monkeypatch.setenv(TIMEOUT, "1")
    run = new_run(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1] if silent else free_port()
        tracker = Tracker(tmp_path, f"http://127.0.0.1:{port}")
        started = time.monotonic()
        with pytest.raises(UnreachableError, match=f"127.0.0.1:{port}"):
            tracker.run_id(run)
        assert time.monotonic() - started < 5
        with Courier(tracker, interval=0.01) as courier:
            courier.add(run)
            begin(run)
            threading.Event().wait(0.1)
        assert time.monotonic() - started < 10
    assert "setwise runs sync" in caplog.text
    assert tracker.undelivered(run) == 2
