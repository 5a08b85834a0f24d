"""Sixteen processes that write sixteen runs at once lose nothing, in one sqlite file or in a real PostgreSQL."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from run_writer import KEYS, STEPS, value, write_run
from servers import postgres
from setwise.platform import storage
from setwise.platform.errors import UnreachableError
from setwise.platform.run import Run
from setwise.platform.tracking import Tracker

WRITERS = 16


def write_at_once(store: Path, uri: str) -> None:
    """Each writer begins on its own: the parent's run is made by whichever of them is first."""
    storage.write_json(store / "studies" / "many" / "run.json", {"experiment": "many", "parent": None})
    assert Tracker(store, uri).client is not None, "its tables are made"
    context = multiprocessing.get_context("forkserver")  # which imports MLflow once, and opens no store
    context.set_forkserver_preload(["run_writer", "mlflow", "mlflow.store.tracking.sqlalchemy_store"])
    processes = [context.Process(target=write_run, args=(store, uri, number)) for number in range(WRITERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0] * WRITERS


def check(store: Path, uri: str) -> None:
    """Every value is in the database itself, once, and each of the runs is one."""
    tracker = Tracker(store, uri)
    engine = create_engine(uri)
    with engine.connect() as connection:
        runs = connection.execute(text("SELECT count(*) FROM runs")).scalar()
        rows = connection.execute(text("SELECT run_uuid, key, step, value FROM metrics")).fetchall()
    engine.dispose()
    assert runs == WRITERS + 1, "the study's run was made once"
    expected = []
    parent = tracker.run_id(Run(store / "studies" / "many"))
    for number in range(WRITERS):
        run_id = tracker.run_id(Run(store / "runs" / f"run-{number:02d}"))
        found = tracker.client.get_run(run_id)
        assert (found.info.status, found.data.params) == ("FINISHED", {"number": str(number)})
        assert found.data.tags["mlflow.parentRunId"] == parent
        expected += [
            (run_id, f"m/{key}", step, value(number, step, key)) for step in range(1, STEPS + 1) for key in range(KEYS)
        ]
    assert sorted(tuple(row) for row in rows) == sorted(expected)


def test_sixteen_processes_lose_nothing_in_one_sqlite_file(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    write_at_once(tmp_path, uri)
    check(tmp_path, uri)


def test_sixteen_processes_lose_nothing_in_postgresql(tmp_path: Path) -> None:
    with postgres(tmp_path / "server") as url:
        write_at_once(tmp_path, url)
        check(tmp_path, url)
        artifacts = Tracker(tmp_path, url).client.get_experiment_by_name("many").artifact_location
        assert artifacts == (tmp_path / "artifacts" / "many").as_uri(), "not beside wherever it was started"


def test_a_database_that_is_away_or_has_no_driver_is_said_to_be_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match=r"postgresql://me:\*\*\*@127.0.0.1:1/db: ") as away:
        assert Tracker(tmp_path, "postgresql://me:secret@127.0.0.1:1/db").client
    with pytest.raises(UnreachableError, match=r"pip install 'setwise\[postgres\]'") as driver:
        assert Tracker(tmp_path, "postgresql+pg8000://me:secret@127.0.0.1:1/db").client
    assert "secret" not in f"{away.value} {driver.value}"
