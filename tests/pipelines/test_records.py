"""What a run's record says of it: to what it belongs, from what it was made, how it ended; each once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from setwise.pipelines import prepare, records
from setwise.pipelines.recipe import Recipe
from setwise.platform import checkpoint, config, run, storage
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run


def begin(store: Path, folder: Path, recipe: Recipe, name: str, study: str | None = None) -> Run:
    parent = run.create(folder / "studies", study, "a: 1\n", study) if study else None
    training = run.create(folder / "runs", name, config.to_yaml(recipe), "digits", parent)
    records.begin(
        Outbox(training.events), training, recipe, prepare.open_prepared("digits", store), {"from": "nothing"}
    )
    return training


def of_kind(training: Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.read_events(training.events) if event["kind"] == kind]


def tags(training: Run) -> dict[str, str]:
    return {name: value for event in of_kind(training, "tags") for name, value in event["values"].items()}


def test_the_beginning_says_from_what_a_run_was_made(store: Path, tmp_path: Path, tiny_recipe: Recipe) -> None:
    training = begin(store, tmp_path, tiny_recipe, "mine")
    (params,) = of_kind(training, "params")
    assert params["values"] == {name: str(value) for name, value in config.flatten(tiny_recipe).items()}
    fingerprint = prepare.open_prepared("digits", store).fingerprint
    (dataset,) = of_kind(training, "dataset")
    assert (dataset["name"], dataset["digest"]) == ("digits", fingerprint)
    commit = storage.read_json(training.folder / "run.json")["commit"]
    assert tags(training)["mlflow.source.git.commit"] == str(commit)
    assert (tags(training)["setwise.data"], tags(training)["from"]) == (fingerprint, "nothing")
    files = {event["path"] for event in of_kind(training, "artifact")}
    assert files >= {"config.yaml", "environment.json", "run.json"}
    assert ("code.diff" in files) == (training.folder / "code.diff").is_file()


def test_the_beginning_is_written_once_and_after_whatever_was_written_before(
    store: Path, tmp_path: Path, tiny_recipe: Recipe
) -> None:
    """The machine may have been sampled before the training got so far."""
    Outbox(tmp_path / "runs" / "mine" / "events.jsonl").metrics(1, {"system/x": 1.0}, series="system")
    training = begin(store, tmp_path, tiny_recipe, "mine")
    begin(store, tmp_path, tiny_recipe, "mine")
    assert len(of_kind(training, "params")) == len(of_kind(training, "dataset")) == 1


@pytest.mark.parametrize(
    ("name", "study", "expected"),
    [
        ("mine", None, {"setwise.configuration": "mine"}),
        ("mine-seed2", None, {"setwise.configuration": "mine"}),
        ("deep-007", None, {"setwise.configuration": "deep-007"}),
        ("deep-007", "deep", {"setwise.configuration": "deep-007", "setwise.study": "deep", "setwise.trial": "7"}),
        ("deep-007-seed1", "deep", {"setwise.configuration": "deep-007", "setwise.study": "deep"}),
        ("a.b-1234", "a.b", {"setwise.configuration": "a.b-1234", "setwise.study": "a.b", "setwise.trial": "1234"}),
        ("axb-123", "a.b", {"setwise.configuration": "axb-123", "setwise.study": "a.b"}),
    ],
)
def test_a_run_says_to_which_study_and_configuration_it_belongs(
    store: Path, tmp_path: Path, tiny_recipe: Recipe, name: str, study: str | None, expected: dict[str, str]
) -> None:
    said = tags(begin(store, tmp_path, tiny_recipe, name, study))
    places = ("setwise.configuration", "setwise.study", "setwise.trial")
    assert {place: said[place] for place in places if place in said} == expected


def test_the_end_names_the_best_checkpoint_once(store: Path, tmp_path: Path, tiny_recipe: Recipe) -> None:
    training = begin(store, tmp_path, tiny_recipe, "mine")
    state = {"w": torch.zeros(2)}
    checkpoint.save(training.checkpoints / "epoch_0003", state, {"epoch": 3}, {"optimizer": {}, "scaler": {}})
    best = {"checkpoint": "epoch_0003", "metric": "val/rsum", "value": 1.0}
    storage.write_json(training.folder / "best.json", best)
    assert not records.ended(training)
    records.end(training, "PRUNED")
    records.end(training, "FAILED", "a second end")
    assert records.ended(training)
    assert (tags(training)["setwise.status"], of_kind(training, "status")[-1]["value"]) == ("PRUNED", "FINISHED")
    assert "setwise.reason" not in tags(training)
    files = of_kind(training, "artifact")[-1]
    assert tags(training)["setwise.best_checkpoint"] == files["into"] == "checkpoints/epoch_0003"
    checkpoint.verify(training.folder / files["path"])
    (measured,) = of_kind(training, "metrics")
    assert (measured["step"], measured["values"]) == (3, {"best/val/rsum": 1.0})


def test_a_run_that_failed_before_its_first_epoch_says_why(store: Path, tmp_path: Path, tiny_recipe: Recipe) -> None:
    training = begin(store, tmp_path, tiny_recipe, "mine")
    records.end(training, "FAILED", "out of memory")
    assert records.reason(training) == "out of memory"
    assert "setwise.best_checkpoint" not in tags(training)
    assert [event["value"] for event in of_kind(training, "status")] == ["FAILED"]
