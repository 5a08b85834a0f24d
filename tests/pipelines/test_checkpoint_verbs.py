"""`setwise ckpt VERB` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from setwise.pipelines import checkpoint_verbs, lineage, terminal
from setwise.pipelines.recipe import load
from setwise.pipelines.retrieval import Retrieval
from setwise.platform import checkpoint, config, run, storage
from setwise.platform.errors import ConfigError, UnreachableError
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run
from tiny import TINY_MODEL

WORDS = ("<pad>", "<start>", "<end>", "<unk>", "<mask>", "a")


def make(store: Path, name: str, values: list[float]) -> Run:
    """A finished run with whole checkpoints of a small model."""
    settings = load("digits_cnn_bigru", TINY_MODEL)
    made = run.create(store / "runs", name, config.to_yaml(settings), "tests")
    weights = Retrieval(settings, len(WORDS)).state_dict()
    for epoch, value in enumerate(values, start=1):
        metadata = {
            "schema": 3,
            "run": name,
            "lineage": lineage.of(made, settings),
            "epoch": epoch,
            "recipe": settings.model_dump(mode="json"),
            "vocabulary": WORDS,
            "data": {"name": "digits", "fingerprint": "f00d"},
            "history": [{lineage.METRIC: value}],
        }
        checkpoint.save(made.checkpoints / f"epoch_{epoch:04d}", weights, metadata, None)
    best = f"epoch_{values.index(max(values)) + 1:04d}"
    storage.write_json(made.folder / "best.json", {"checkpoint": best, "value": max(values)})
    Outbox(made.events).append({"kind": "status", "value": "FINISHED"})
    return made


def typed(store: Path, *words: str) -> Any:
    return CliRunner().invoke(checkpoint_verbs.app, [*words, "--store", str(store)])


def printed(store: Path, *words: str) -> str:
    """What a reader sees."""
    with terminal.results.capture() as capture:
        assert typed(store, *words).exception is None
    return capture.get()


def said(store: Path, *words: str) -> Any:
    done = typed(store, *words, "--json")
    assert done.exception is None, done.exception
    return json.loads(done.stdout)


def test_ls_marks_the_best_and_the_latest(tmp_path: Path) -> None:
    make(tmp_path, "one", [2, 3, 1])
    make(tmp_path, "two", [5])
    listed = said(tmp_path, "ls")
    assert [(row["run"], row["epoch"], row[lineage.METRIC], row["marks"]) for row in listed["checkpoints"]] == [
        ("one", 1, 2, []),
        ("one", 2, 3, ["best"]),
        ("one", 3, 1, ["latest"]),
        ("two", 1, 5, ["best", "latest"]),
    ]
    assert listed["bytes"] == sum(row["bytes"] for row in listed["checkpoints"])
    assert [row["run"] for row in said(tmp_path, "ls", "two")["checkpoints"]] == ["two"]
    assert "epoch_0003" in printed(tmp_path, "ls", "one")
    assert typed(tmp_path, "ls", "three").exception.exit_code == ConfigError.exit_code


def test_ls_says_when_it_does_not_know_what_is_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "one", [2])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    listed = said(tmp_path, "ls")
    assert (len(listed["checkpoints"]), listed["registered_known"]) == (1, False)


def test_show_prints_the_lineage(tmp_path: Path) -> None:
    made = make(tmp_path, "one", [2, 3, 1])
    shown = said(tmp_path, "show", "one")
    assert (shown["run"], shown["epoch"], shown[lineage.METRIC], shown["schema"]) == ("one", 2, 3, 3)
    assert shown["data"]["fingerprint"] == "f00d"
    assert shown["recipe"]["model"]["embed_size"] == 16
    words = printed(tmp_path, "show", str(made.checkpoints / "epoch_0003"))
    assert "val RSUM 1.0" in words
    assert "fingerprint f00d" in words
    assert f"commit {storage.read_json(made.folder / 'run.json')['commit']}" in words


def test_gc_says_what_would_go_and_removes_it_with_apply(tmp_path: Path) -> None:
    made = make(tmp_path, "one", [2, 3, 1, 0])
    make(tmp_path, "two", [2, 3, 1, 0])
    plan = said(tmp_path, "gc", "one")
    assert [row["goes"] for row in plan["checkpoints"]] == [True, False, True, False]
    assert (plan["applied"], plan["freed_bytes"], len(list(made.checkpoints.iterdir()))) == (False, 0, 4)
    words = printed(tmp_path, "gc", "one")
    assert "2 of 4 checkpoints go" in words
    assert "latest of the run" in words
    done = said(tmp_path, "gc", "one", "--apply")
    assert done["freed_bytes"] == done["bytes"] == plan["bytes"] > 0
    assert sorted(path.name for path in made.checkpoints.iterdir()) == ["epoch_0002", "epoch_0004"]
    assert f"freed {plan['bytes']:,} bytes" in printed(tmp_path, "gc", "--apply")
    assert said(tmp_path, "gc", "--latest", "0", "--best", "0", "--best-of-study", "0")["checkpoints"][1]["goes"]


def test_gc_removes_nothing_where_the_tracking_store_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path, "one", [2, 3, 1])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    done = typed(tmp_path, "gc", "--apply")
    assert isinstance(done.exception, UnreachableError)
    assert done.exception.exit_code == 6
    assert len(list(made.checkpoints.iterdir())) == 3


def test_export_prints_the_measured_difference(tmp_path: Path) -> None:
    make(tmp_path, "one", [2])
    target = tmp_path / "out"
    done = said(tmp_path, "export", "one", "--format", "safetensors", "--to", str(target))
    assert (done["folder"], done["image_difference"], done["text_difference"]) == (str(target), 0, 0)
    again = typed(tmp_path, "export", "one", "--to", str(target))
    assert isinstance(again.exception, ConfigError)
    words = printed(tmp_path, "export", "one", "--format", "safetensors", "--to", str(tmp_path / "more"))
    assert "images 0.0e+00, captions 0.0e+00 (allowed 1e-05)" in words
