"""MLflow gets what a run did, once, in spite of crashes, torn lines and stores that are away."""

from __future__ import annotations

import itertools
import logging
import math
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from setwise.platform import run as runs
from setwise.platform import storage
from setwise.platform.errors import UnreachableError
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run
from setwise.platform.tracking import Courier, Tracker

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def tracker(store: Path) -> Tracker:
    logging.disable(logging.INFO)
    made = Tracker(store, f"sqlite:///{store / 'mlflow.db'}")
    assert made.client is not None
    logging.disable(logging.NOTSET)
    return made


def new_run(store: Path, parent: Run | None = None, experiment: str = "study") -> Run:
    name = f"run-{next(NUMBERS)}"
    folder = store / "runs" / name
    storage.write_json(
        folder / "run.json", {"experiment": experiment, "parent": f"../{parent.name}" if parent else None}
    )
    return Run(folder)


def rows(store: Path, run_id: str) -> Counter[tuple[str, int]]:
    """How often each (metric, step) is in the database itself."""
    with sqlite3.connect(store / "mlflow.db") as database:
        found = database.execute("SELECT key, step FROM metrics WHERE run_uuid = ?", (run_id,)).fetchall()
    return Counter((str(key), int(step)) for key, step in found)


def history(tracker: Tracker, run: Run, key: str) -> list[tuple[int, float]]:
    found = tracker.client.get_metric_history(tracker.run_id(run), key)
    return sorted((metric.step, metric.value) for metric in found)


# --- delivery ---------------------------------------------------------------------------------------------------


def fill(run: Run, steps: int = 3) -> Outbox:
    outbox = Outbox(run.events)
    outbox.append({"kind": "params", "values": {"lr": "0.1", "long": "x" * 10_000}})
    for step in range(1, steps + 1):
        outbox.metrics(step, {"loss": 1 / step, "val/rsum": float(step)})
    return outbox


def test_everything_arrives_with_its_own_time(store: Path, tracker: Tracker) -> None:
    run = new_run(store)
    storage.write_json(run.folder / "config.yaml", {"a": 1})
    storage.write_json(run.folder / "best" / "epoch_0001" / "metadata.json", {"b": 2})
    outbox = fill(run)
    outbox.append(
        {"kind": "tags", "values": {"setwise.status": "FINISHED", "é": "ü"}},
        {"kind": "dataset", "name": "digits", "digest": "abc123", "source": "/data/digits"},
        {"kind": "artifact", "path": "config.yaml", "into": ""},
        {"kind": "artifact", "path": "best/epoch_0001", "into": "checkpoints/epoch_0001"},
        {"kind": "artifact", "path": "never made", "into": ""},
        {"kind": "status", "value": "FAILED"},
    )
    tracker.deliver(run)
    got = tracker.client.get_run(tracker.run_id(run))
    assert got.info.run_name == run.name
    assert tracker.client.get_experiment(got.info.experiment_id).name == "study"
    assert got.data.params["lr"] == "0.1"
    assert got.data.params["long"] == "x" * 6000
    assert got.data.tags["setwise.status"] == "FINISHED"
    assert got.data.metrics == {"loss": pytest.approx(1 / 3), "val/rsum": 3.0}
    assert history(tracker, run, "val/rsum") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    events = runs.read_events(run.events)
    times = {event["step"]: event["time"] for event in events if event["kind"] == "metrics"}
    assert {
        metric.step: metric.timestamp for metric in tracker.client.get_metric_history(got.info.run_id, "loss")
    } == times
    assert (got.info.status, got.info.end_time) == ("FAILED", events[-1]["time"])
    (data,) = got.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("digits", "abc123")
    artifacts = {item.path for item in tracker.client.list_artifacts(got.info.run_id)}
    assert artifacts == {"config.yaml", "checkpoints"}
    (inner,) = tracker.client.list_artifacts(got.info.run_id, "checkpoints/epoch_0001")
    assert inner.path == "checkpoints/epoch_0001/metadata.json"
    assert (store / "artifacts" / "study").is_dir()


def test_repeated_delivery_and_growing_records_leave_each_value_once(store: Path, tracker: Tracker) -> None:
    run = new_run(store)
    outbox = fill(run)
    tracker.deliver(run)
    tracker.deliver(run)
    outbox.metrics(4, {"loss": 0.1})
    tracker.deliver(run)
    tracker.deliver(run)
    assert set(rows(store, tracker.run_id(run)).values()) == {1}
    assert [step for step, _ in history(tracker, run, "loss")] == [1, 2, 3, 4]


def test_a_courier_that_died_before_it_noted_its_progress_delivers_nothing_twice(store: Path, tracker: Tracker) -> None:
    run = new_run(store)
    outbox = fill(run)
    outbox.append({"kind": "dataset", "name": "digits", "digest": "abc", "source": "/data"})
    tracker.deliver(run)
    noted = (run.folder / "delivered.json").read_bytes()
    outbox.metrics(4, {"loss": 0.1})
    outbox.append({"kind": "tags", "values": {"setwise.status": "FINISHED"}})
    outbox.append({"kind": "status", "value": "FINISHED"})
    tracker.deliver(run)
    run_id = tracker.run_id(run)

    (run.folder / "delivered.json").write_bytes(noted)  # it had delivered, and died before it could say so
    tracker.deliver(run)
    (run.folder / "delivered.json").unlink()  # or before it had said anything at all
    tracker.deliver(run)

    assert tracker.run_id(run) == run_id, "no second run in MLflow"
    assert set(rows(store, run_id).values()) == {1}
    assert len(rows(store, run_id)) == 7
    got = tracker.client.get_run(run_id)
    assert got.info.status == "FINISHED"
    assert len(got.inputs.dataset_inputs) == 1
    found = tracker.client.search_runs([got.info.experiment_id], f"tags.`setwise.run` = '{run.name}'")
    assert len(found) == 1


def test_a_crash_at_any_call_in_the_middle_of_a_delivery_is_made_good(
    store: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stop in range(1, 5):
        run = new_run(store)
        outbox = fill(run)
        outbox.append({"kind": "tags", "values": {"a": "b"}}, {"kind": "status", "value": "FINISHED"})
        calls = itertools.count(1)
        with monkeypatch.context() as patch:
            for name in ("log_batch", "set_terminated", "create_run"):
                patch.setattr(tracker.client, name, dying(getattr(tracker.client, name), calls, stop))
            with pytest.raises(KeyboardInterrupt):
                tracker.deliver(run)
        tracker.deliver(run)
        got = tracker.client.get_run(tracker.run_id(run))
        assert set(rows(store, got.info.run_id).values()) == {1}
        assert len(rows(store, got.info.run_id)) == 6
        assert (got.data.tags["a"], got.data.params["lr"], got.info.status) == ("b", "0.1", "FINISHED")
        assert len(tracker.client.search_runs([got.info.experiment_id], f"tags.`setwise.run` = '{run.name}'")) == 1


def dying(function: Callable[..., Any], calls: itertools.count[int], stop: int) -> Callable[..., Any]:
    """`function`, which does its work and then dies if this was call `stop`."""

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        value = function(*arguments, **keywords)
        if next(calls) == stop:
            raise KeyboardInterrupt
        return value

    return wrapped


def test_a_torn_last_line_is_delivered_when_it_is_written_again(store: Path, tracker: Tracker) -> None:
    run = new_run(store)
    fill(run, steps=2)
    data = run.events.read_bytes()
    run.events.write_bytes(data[:-20])
    tracker.deliver(run)
    assert history(tracker, run, "loss") == [(1, 1.0)]
    Outbox(run.events).metrics(2, {"loss": 0.25})
    tracker.deliver(run)
    assert history(tracker, run, "loss") == [(1, 1.0), (2, 0.25)]


def test_trials_lie_under_their_sweep(store: Path, tracker: Tracker) -> None:
    sweep = new_run(store)
    trials = [new_run(store, parent=sweep) for _ in range(2)]
    for trial in trials:  # delivered before their parent is
        fill(trial, steps=1)
        tracker.deliver(trial)
    Outbox(sweep.events).append({"kind": "tags", "values": {"trials": "2"}})
    tracker.deliver(sweep)
    parent = tracker.run_id(sweep)
    assert {tracker.client.get_run(tracker.run_id(trial)).data.tags["mlflow.parentRunId"] for trial in trials} == {
        parent
    }
    assert tracker.client.get_run(parent).data.tags["trials"] == "2"
    assert "mlflow.parentRunId" not in tracker.client.get_run(parent).data.tags


def test_a_diverged_step_is_a_tag_in_mlflow(store: Path, tracker: Tracker) -> None:
    run = new_run(store)
    Outbox(run.events).metrics(1, {"loss": math.inf, "ok": 1.0})
    tracker.deliver(run)
    got = tracker.client.get_run(tracker.run_id(run))
    assert got.data.metrics == {"ok": 1.0}
    assert got.data.tags["not_finite.step_1"] == "loss"


def test_long_records_are_sent_in_batches_that_mlflow_takes(store: Path, tracker: Tracker) -> None:
    run = new_run(store)
    outbox = Outbox(run.events)
    for step in range(1, 22):
        outbox.metrics(step, {f"m{number}": float(number) for number in range(100)})
    tracker.deliver(run)
    counted = rows(store, tracker.run_id(run))
    assert len(counted) == 2100
    assert set(counted.values()) == {1}


@pytest.mark.parametrize("kind", ["params", "tags", "experiment_tags"])
@pytest.mark.parametrize(
    ("value", "there"), [("x" * 30_000, "x" * 6000), ("a name of \udcff", "a name of ?"), ("no\0text", "no?text")]
)
def test_a_value_that_no_store_takes_keeps_back_nothing_that_comes_after(
    store: Path, tracker: Tracker, kind: str, value: str, there: str
) -> None:
    run = new_run(store, experiment="values")
    outbox = Outbox(run.events)
    outbox.append({"kind": kind, "values": {"reason": value}})
    outbox.metrics(1, {"ok": 1.0})
    tracker.deliver(run)
    got = tracker.client.get_run(tracker.run_id(run))
    tags = tracker.client.get_experiment(got.info.experiment_id).tags
    assert {"params": got.data.params, "tags": got.data.tags, "experiment_tags": tags}[kind]["reason"].startswith(there)
    assert got.data.metrics == {"ok": 1.0}


@pytest.mark.parametrize("kind", ["params", "tags"])
def test_more_settings_than_mlflow_takes_at_once_all_arrive(store: Path, tracker: Tracker, kind: str) -> None:
    run = new_run(store)
    Outbox(run.events).append({"kind": kind, "values": {f"section.s{number}": str(number) for number in range(230)}})
    tracker.deliver(run)
    data = getattr(tracker.client.get_run(tracker.run_id(run)).data, kind)
    assert sum(name.startswith("section.") for name in data) == 230


def test_a_run_is_delivered_anew_to_another_store(store: Path, tracker: Tracker) -> None:
    run = new_run(store)
    fill(run)
    tracker.deliver(run)
    state = storage.read_json(run.folder / "delivered.json")
    storage.write_json(run.folder / "delivered.json", {**state, "uri": "http://elsewhere", "run_id": "of another"})
    tracker.deliver(run)
    assert len(history(tracker, run, "loss")) == 3


# --- where to -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["./mlruns", "/data/mlruns", "file:///data/mlruns", "file:mlruns", "mlruns"])
def test_a_file_store_is_refused_with_what_to_use_instead(tmp_path: Path, uri: str) -> None:
    with pytest.raises(UnreachableError, match=r"file store.*sqlite:///"):
        Tracker(tmp_path, uri)


def test_a_server_that_is_not_there_is_named_without_the_words_of_its_client(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError) as caught:
        _ = Tracker(tmp_path, "http://name:secret@127.0.0.1:9").client
    assert str(caught.value) == (
        "tracking store http://name:***@127.0.0.1:9 does not answer (Connection refused). "
        "Is the server running, and MLFLOW_TRACKING_URI its address?"
    )


def test_the_store_s_database_is_the_default_and_the_environment_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert Tracker(tmp_path).uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert Tracker(tmp_path).uri == "https://mlflow.example"
    assert Tracker(tmp_path, "sqlite:///given.db").uri == "sqlite:///given.db"


def test_a_database_that_cannot_be_opened_is_unreachable_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)  # MLflow itself would go on for 100 s
    (tmp_path / "mlflow.db").mkdir()
    tracker = Tracker(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")
    for _ in range(2):
        with pytest.raises(UnreachableError, match=r"tracking store sqlite:"):
            tracker.experiment_id("any")


# --- the courier --------------------------------------------------------------------------------------------------


class Store:
    """Stands for a tracker whose store refuses some runs, or is away for them."""

    address = "stand-in"
    store = Path("store")
    deadline = 0.0

    def __init__(self) -> None:
        self.refused: set[str] = set()
        self.away: set[str] = set()
        self.delivered: list[str] = []
        self.tried = threading.Event()

    def deliver(self, run: Any) -> None:
        self.tried.set()
        if run.name in self.refused:
            raise RuntimeError("deleted")
        if run.name in self.away:
            raise UnreachableError("away")
        self.delivered.append(run.name)


def fake_run(name: str) -> Any:
    return SimpleNamespace(name=name, folder=Path(name))


def courier_to(store: Store, interval: float = 0.01) -> Courier:
    return Courier(store, interval)  # type: ignore[arg-type]  # it asks for nothing but what this has


def test_a_courier_outlives_a_store_that_is_away(store: Path, tracker: Tracker, caplog: Any) -> None:
    run = new_run(store)
    outbox = fill(run, steps=1)
    away = Tracker(store, f"sqlite:///{store / 'nowhere' / 'deep' / 'mlflow.db'}")
    (store / "nowhere").write_text("not a folder")
    with Courier(away, interval=0.01) as courier:
        courier.add(run)
        outbox.metrics(2, {"loss": 0.5})
    assert "did not take everything" in caplog.text
    assert not (run.folder / "delivered.json").exists()
    with Courier(tracker, interval=60) as courier:  # the next command that uses the run
        courier.add(run)
        outbox.metrics(3, {"loss": 0.25})
    assert [step for step, _ in history(tracker, run, "loss")] == [1, 2, 3]


def test_a_store_that_comes_back_gets_everything_while_the_training_goes_on() -> None:
    stand_in = Store()
    stand_in.refused = {"one"}
    with courier_to(stand_in) as courier:
        courier.add(fake_run("one"))
        assert stand_in.tried.wait(10)
        stand_in.refused = set()
        deadline = time.monotonic() + 10
        while "one" not in stand_in.delivered and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "one" in stand_in.delivered


def test_close_delivers_the_rest_at_once_and_says_whether_all_was_taken() -> None:
    stand_in = Store()
    courier = courier_to(stand_in, interval=3600)
    courier.add(fake_run("one"))
    assert courier.close()
    assert stand_in.delivered == ["one"]
    refusing = Store()
    refusing.refused = {"one"}
    courier = courier_to(refusing, interval=3600)
    courier.add(fake_run("one"))
    assert not courier.close()


def test_a_run_that_the_store_refuses_does_not_hold_up_the_others() -> None:
    """As when somebody deleted its MLflow run in the browser."""
    stand_in = Store()
    stand_in.refused = {"one"}
    courier = courier_to(stand_in, interval=3600)
    for name in ("one", "two", "three"):
        courier.add(fake_run(name))
    assert not courier.close()
    assert stand_in.delivered == ["two", "three"]


def test_the_run_that_met_an_outage_comes_last_in_the_next_round() -> None:
    """It may be the only one that the store fails at: the others are not held up for ever."""
    stand_in = Store()
    stand_in.away = {"one"}
    courier = courier_to(stand_in, interval=0.01)
    for name in ("one", "two", "three"):
        courier.add(fake_run(name))
    deadline = time.monotonic() + 10
    while not {"two", "three"} <= set(stand_in.delivered) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not courier.close()
    assert {"two", "three"} <= set(stand_in.delivered)


def test_a_store_that_hangs_is_left_with_one_warning_that_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("setwise.platform.tracking.PATIENCE_S", 0.2)
    released = threading.Event()
    stand_in = Store()
    monkeypatch.setattr(stand_in, "deliver", lambda run: released.wait(30))
    courier = courier_to(stand_in)
    courier.add(fake_run("one"))
    started = time.monotonic()
    assert not courier.close()
    assert time.monotonic() - started < 5
    (warning,) = caplog.messages
    assert "setwise runs sync --store store" in warning
    released.set()


def test_a_large_file_on_its_way_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setwise.platform.tracking.PATIENCE_S", 0.0)
    stand_in = Store()

    def upload(run: Any) -> None:
        stand_in.deadline = time.monotonic() + 30
        stand_in.tried.set()
        time.sleep(0.3)

    monkeypatch.setattr(stand_in, "deliver", upload)
    courier = courier_to(stand_in)
    courier.add(fake_run("one"))
    assert stand_in.tried.wait(10)
    assert courier.close()


def test_an_outage_that_lasts_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong address would otherwise be noticed when the training ends, days later."""
    monkeypatch.setattr("setwise.platform.tracking.OUTAGE_S", 0.05)
    stand_in = Store()
    stand_in.away = {"one"}
    courier = courier_to(stand_in)
    courier.add(fake_run("one"))
    time.sleep(0.5)
    assert ["goes on" in message for message in caplog.messages] == [True]
    stand_in.away = set()
    assert courier.close()


def test_events_are_delivered_in_order_and_progress_is_noted_on_the_way(
    store: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(store)
    outbox = Outbox(run.events)
    sent: list[str] = []
    for number in range(4):
        outbox.append({"kind": "tags", "values": {"phase": str(number)}})
        outbox.metrics(number + 1, {"loss": 0.5})

    def note(run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        if len(sent) == 5:
            raise ConnectionError("away")
        sent.append(tags[0].value if tags else f"step {metrics[0].step}")

    tracker.run_id(run)
    with monkeypatch.context() as patch:
        patch.setattr(tracker.client, "log_batch", note)
        with pytest.raises(UnreachableError):
            tracker.deliver(run)
    assert sent == ["0", "step 1", "1", "step 2", "2"]
    assert tracker.undelivered(run) == 3
    assert tracker.deliver(run) == 3


def test_a_store_whose_making_was_cut_short_is_no_broken_store(tmp_path: Path) -> None:
    """MLflow makes its tables one by one: a process is killed among them, and the next one makes them all."""
    code = f"""
import os, signal, sqlalchemy, sqlalchemy.event
from pathlib import Path
from setwise.platform.tracking import Tracker
made = []
@sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "before_cursor_execute")
def dies(connection, cursor, statement, *_):
    made.append("CREATE INDEX" in statement)
    if sum(made) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
Tracker(Path({str(tmp_path)!r})).client
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert Tracker(tmp_path).client.search_experiments()
