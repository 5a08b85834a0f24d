"""`setwise runs`: what there is, how far it is, and what MLflow lacks of it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from servers import free_port
from setwise.pipelines import records, run_verbs
from setwise.platform import run, storage
from setwise.platform.errors import SetwiseError, UnreachableError
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run
from setwise.platform.tracking import Tracker


def typed(*words: str) -> Any:
    return CliRunner().invoke(run_verbs.app, list(words))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed for people."""
    text = io.StringIO()
    monkeypatch.setattr(run_verbs, "results", Console(file=text, width=200))
    monkeypatch.setattr(run_verbs, "say", lambda message: text.write(f"{message}\n"))
    return text


def listed(store: Path) -> dict[str, dict[str, Any]]:
    done = typed("ls", "--json", "--store", str(store))
    assert done.exit_code == 0, done.output
    return {row["name"]: row for row in json.loads(done.stdout)["runs"]}


def make_study(store: Path) -> tuple[Run, list[Run]]:
    """A study with three trials, of which the first is complete, the second failed and the third goes on."""
    parent = run.create(store / "studies", "digits", "trials: 3\n", "digits")
    Outbox(parent.events).append({"kind": "params", "values": {"sampler": "TPE"}})
    trials = [run.create(store / "runs", f"digits-00{n}", f"a: {n}\n", "digits", parent) for n in range(3)]
    for number, trial in enumerate(trials):
        outbox = Outbox(trial.events)
        outbox.append({"kind": "params", "values": {"train.epochs": "3"}})
        for epoch in range(1, 4 - number):
            outbox.metrics(epoch, {"val/rsum": 100.0 * epoch})
        outbox.metrics(17, {"system/cpu_utilization_percentage": 5.0}, series="system")
    storage.write_json(trials[0].folder / "best.json", {"checkpoint": "epoch_0002", "value": 312.34})
    records.end(trials[1], "FAILED", "out of memory")
    return parent, trials


def test_the_list_says_how_far_every_run_is(tmp_path: Path, said: io.StringIO) -> None:
    _, trials = make_study(tmp_path)
    Outbox(trials[0].events).append({"kind": "tags", "values": {"setwise.status": "PRUNED"}})
    Outbox(trials[0].events).append({"kind": "status", "value": "FINISHED"})
    rows = listed(tmp_path)
    assert list(rows) == ["digits", "digits-000", "digits-001", "digits-002"]
    assert rows["digits-000"] == {
        "name": "digits-000",
        "kind": "run",
        "experiment": "digits",
        "status": "pruned",
        "epochs": 3,
        "epochs_planned": 3,
        "best_val_rsum": 312.34,
        "undelivered": 7,
    }
    assert (rows["digits-001"]["status"], rows["digits-001"]["epochs"]) == ("failed", 2)
    assert (rows["digits-002"]["status"], rows["digits-002"]["best_val_rsum"]) == ("unfinished", None)
    assert [rows["digits"][key] for key in ("kind", "status", "undelivered")] == ["study", "unfinished", 1]
    assert typed("ls", "--store", str(tmp_path)).exit_code == 0
    shown = ("digits-000", "pruned", "3/3", "312.3", "setwise runs sync")
    assert [word for word in shown if word not in said.getvalue()] == []
    with run.writing(trials[2]):
        assert listed(tmp_path)["digits-002"]["status"] == "running"


def test_a_store_without_runs_has_an_empty_list(tmp_path: Path) -> None:
    assert listed(tmp_path) == {}
    assert typed("ls", "--store", str(tmp_path)).exit_code == 0


def test_sync_delivers_all_that_is_left_of_studies_and_runs(tmp_path: Path, said: io.StringIO) -> None:
    parent, trials = make_study(tmp_path)
    expected = {name: row["undelivered"] for name, row in listed(tmp_path).items()}
    assert min(expected.values()) > 0
    done = typed("sync", "--json", "--store", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["delivered"] == expected
    assert list(expected) == list(json.loads(done.stdout)["delivered"]), "studies come first"
    assert [row["undelivered"] for row in listed(tmp_path).values()] == [0] * 4

    tracker = Tracker(tmp_path)
    for trial in trials:
        tags = tracker.client.get_run(tracker.run_id(trial)).data.tags
        assert tags["mlflow.parentRunId"] == tracker.run_id(parent)
    assert typed("sync", "--store", str(tmp_path)).exit_code == 0
    assert "0 events of 0 runs delivered" in said.getvalue()

    # A run that somebody deleted in the browser stays so, and holds up no other.
    tracker.client.delete_run(tracker.run_id(trials[0]))
    for trial in trials:
        Outbox(trial.events).metrics(9, {"val/rsum": 1.0})
    done = typed("sync", "--json", "--store", str(tmp_path))
    assert isinstance(done.exception, SetwiseError)
    assert done.exception.exit_code == 1
    found = json.loads(done.stdout)
    assert found["delivered"] == {"digits-001": 1, "digits-002": 1}
    assert list(found["refused"]) == ["digits-000"]


def test_a_store_that_does_not_answer_is_exit_code_six(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_study(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    done = typed("sync", "--json", "--store", str(tmp_path))
    assert isinstance(done.exception, UnreachableError)
    assert done.exception.exit_code == 6
    assert json.loads(done.stdout)["delivered"] == {}
    assert listed(tmp_path)["digits"]["undelivered"] == 1, "the list needs no store"
