"""Lineage: every checkpoint says where it comes from, and those that were written before it could are still read."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from setwise.pipelines import lineage, prepare, train, trained_model
from setwise.pipelines.recipe import Recipe, load
from setwise.pipelines.workers import Worker
from setwise.platform import checkpoint, config, run, storage
from setwise.platform.errors import DataError
from setwise.platform.run import Run


def start(store: Path, name: str, settings: Recipe, study: str | None = None) -> Run:
    parent = None
    if study is not None:
        parent = run.create(store / "studies", study, "a: 1\n", experiment=study)
    return run.create(store / "runs", name, config.to_yaml(settings), study or "tests", parent)


def rewritten(folder: Path, target: Path, **changes: Any) -> Path:
    """A checkpoint as an older version wrote it; None leaves a field out."""
    metadata = {name: value for name, value in (checkpoint.metadata(folder) | changes).items() if value is not None}
    checkpoint.save(target, checkpoint.weights(folder), metadata, None)
    return target


@pytest.fixture(scope="module")
def trained(store: Path) -> Run:
    """A trial that a population-based training started from another's checkpoint."""
    settings = load("digits_cnn_bigru", ["model.embed_size=8", "model.set_prediction.head_dim=4", "train.epochs=1"])
    training = start(store, "lines-007", settings, "lines")
    parent = {"run": "lines-003", "checkpoint": "epoch_0004", "weights_sha256": "ab"}
    storage.write_json(training.folder / lineage.FILE, {"parents": [parent]})
    train.train(settings, training, store, Worker(), lambda values: None)
    return training


def test_a_checkpoint_says_where_it_comes_from(store: Path, trained: Run) -> None:
    metadata = checkpoint.metadata(trained.best_checkpoint())
    recorded = metadata["lineage"]
    created = datetime.fromisoformat(recorded.pop("created"))
    assert 0 <= (datetime.now(UTC) - created).total_seconds() < 600
    identity = storage.read_json(trained.folder / "run.json")
    assert recorded == {
        "run": "lines-007",
        "experiment": "lines",
        "parent_run": "lines",
        "study": "lines",
        "trial": 7,
        "code": {"commit": identity["commit"], "changed": identity["dirty"]},
        "parents": [{"run": "lines-003", "checkpoint": "epoch_0004", "weights_sha256": "ab"}],
    }
    assert metadata["data"]["fingerprint"] == prepare.open_prepared("digits", store).fingerprint
    known = lineage.describe(trained.best_checkpoint(), trained)
    assert known["recipe"]["model"]["embed_size"] == 8
    told = dict(lineage.lines(known))
    assert (told["study"], told["started from"]) == ("lines, trial 7", "lines-003/epoch_0004")


def test_a_checkpoint_of_the_old_schema_is_still_read(tmp_path: Path, trained: Run) -> None:
    old = rewritten(trained.best_checkpoint(), tmp_path / "old", schema=2, lineage=None)
    assert trained_model.load(old).metadata["epoch"] == 1
    from_run, alone = lineage.describe(old, trained), lineage.describe(old, None)
    assert (from_run["study"], from_run["trial"], from_run["created"]) == ("lines", 7, None)
    assert (alone["run"], alone["study"], alone["code"], alone["parents"]) == ("lines-007", None, None, None)
    assert set(from_run) == set(alone) == set(lineage.describe(trained.best_checkpoint(), trained))
    told = dict(lineage.lines(alone))
    assert (told["created"], told["code"], told["started from"]) == ("not recorded", "not known", "not known")


def test_what_is_no_checkpoint_of_ours_is_named(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "other" / checkpoint.METADATA, {"epoch": 1})
    with pytest.raises(DataError, match="other: not a checkpoint of a retrieval model"):
        lineage.describe(tmp_path / "other", None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("slots-007", ("slots", 7)),
        ("slots-007-seed2", ("slots", 7)),
        ("slots-1234", ("slots", 1234)),
        ("slots-2-000", ("slots-2", 0)),
        ("slots-seed1", (None, None)),
        ("slots-07", (None, None)),
        ("other-007", (None, None)),
        ("slots", (None, None)),
    ],
)
def test_a_run_s_study_and_trial(tmp_path: Path, name: str, expected: tuple[str | None, int | None]) -> None:
    for study in ("slots", "slots-2"):
        (tmp_path / "studies" / study).mkdir(parents=True)
    assert lineage.place(Run(tmp_path / "runs" / name)) == expected


def test_published_weights_are_parents_whatever_a_resumed_training_loads(tmp_path: Path) -> None:
    changes = ["model.image_encoder.weights=IMAGENET1K_V2", "model.text_encoder.word_vectors=glove.txt"]
    settings = load("coco_resnet152_bigru", changes)
    known = lineage.of(start(tmp_path, "grid", settings), settings)
    assert known["parents"] == [
        {"weights": "IMAGENET1K_V2", "into": "image_encoder"},
        {"weights": "glove.txt", "into": "text_encoder.word_vectors"},
    ]
    assert (known["study"], known["parent_run"]) == (None, None)


@pytest.mark.parametrize("content", ["[]", '{"parents": [{"run": "a"}]}', '{"parents": 3}', "{"])
def test_a_damaged_lineage_file_is_named(tmp_path: Path, content: str) -> None:
    storage.write_bytes(tmp_path / "runs" / "x" / lineage.FILE, content.encode())
    with pytest.raises(DataError, match=r"lineage\.json: expected"):
        lineage.parents(Run(tmp_path / "runs" / "x"))


def test_what_lies_in_a_run_is_listed_with_its_size(tmp_path: Path) -> None:
    training = Run(tmp_path / "runs" / "x")
    assert lineage.stored(training) == []
    good, broken = training.checkpoints / "epoch_0002", training.checkpoints / "epoch_0003.damaged"
    for folder in (good, broken):
        storage.write_json(folder / checkpoint.METADATA, {"epoch": 2, "history": [{"val/rsum": 4.5}]})
        storage.write_bytes(folder / checkpoint.WEIGHTS, bytes(70))
    (training.checkpoints / ".epoch_0004.building").mkdir()
    size = 70 + len((good / checkpoint.METADATA).read_bytes())
    found = [(one.name, one.epoch, one.value, one.bytes) for one in lineage.stored(training)]
    assert found == [("epoch_0002", 2, 4.5, size), ("epoch_0003.damaged", 0, None, size)]
    assert json.loads(json.dumps(lineage.stored(training)[0].to_json()))["val/rsum"] == 4.5


def test_a_damaged_best_json_is_named_and_a_missing_one_is_not(tmp_path: Path) -> None:
    training = Run(tmp_path / "runs" / "x")
    assert lineage.best_name(training) is None
    storage.write_bytes(training.folder / "best.json", b"[]")
    with pytest.raises(DataError, match=r"best\.json: does not name"):
        lineage.best_name(training)
