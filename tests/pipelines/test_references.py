"""A reference names one run and its best checkpoint, or says why it does not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from setwise.pipelines import references, registry
from setwise.pipelines.registry import Version
from setwise.platform import checkpoint, storage
from setwise.platform.errors import ConfigError, DataError
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run


def make(store: Path, name: str, value: float | None = None, mlflow_id: str | None = None) -> Run:
    """A run as far as references look at it: a configuration, and with `value` a best checkpoint."""
    run = Run(store / "runs" / name)
    storage.write_bytes(run.config, b"a: 1\n")
    storage.write_bytes(run.events, b"")
    if value is not None:
        checkpoint.save(run.checkpoints / "epoch_0001", {"w": torch.ones(2)}, {"epoch": 1}, None)
        storage.write_json(run.folder / "best.json", {"checkpoint": "epoch_0001", "value": value})
        end(run, "FINISHED")
    if mlflow_id is not None:
        storage.write_json(run.folder / "delivered.json", {"uri": "sqlite:///x", "run_id": mlflow_id, "events": 0})
    return run


def end(run: Run, status: str) -> None:
    Outbox(run.events).append({"kind": "status", "value": status})


@pytest.fixture
def store(tmp_path: Path) -> Path:
    make(tmp_path, "digits_cnn-a1b2c3", 300.0, mlflow_id="0f3a77")
    make(tmp_path, "digits_cnn-a1ffff", 310.0, mlflow_id="0f9b11")
    make(tmp_path, "digits_cnn", 1.0)
    for number, value in enumerate((200.0, 400.0, None, 399.0)):
        make(tmp_path, f"study-{number:03d}", value)
    make(tmp_path, "study-002x", 999.0)
    make(tmp_path, "study", 999.0)
    (tmp_path / "studies" / "study").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("digits_cnn-a1b2c3", "digits_cnn-a1b2c3"),
        ("digits_cnn-a1b", "digits_cnn-a1b2c3"),
        ("digits_cnn", "digits_cnn"),  # also the beginning of others, but its whole name
        ("0f3", "digits_cnn-a1b2c3"),
        ("0f9b11", "digits_cnn-a1ffff"),
        ("best:study", "study-001"),
    ],
)
def test_a_run_by_its_name_its_beginning_its_mlflow_id_or_its_study(store: Path, text: str, name: str) -> None:
    assert references.find_run(text, store) == Run(store / "runs" / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("digits_cnn-a1", r"'digits_cnn-a1' begins several runs: digits_cnn-a1b2c3, digits_cnn-a1ffff"),
        ("0f", r"begins several runs"),
        ("digts_cnn", r"no run is called 'digts_cnn'.*Did you mean 'digits_cnn'\?"),
        ("best:studdy", r"no study is called 'studdy'.*Did you mean 'study'\?"),
        ("best:", r"no study"),
    ],
)
def test_none_and_several_are_errors_that_name_what_there_is(store: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        references.find_run(text, store)


def test_an_empty_store_says_how_to_begin(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="setwise demo"):
        references.find_run("last", tmp_path)


def test_last_is_the_run_that_changed_last(store: Path) -> None:
    for age, name in enumerate(["study-001", "digits_cnn", "study-003"]):
        os.utime(store / "runs" / name / "events.jsonl", (2e9 - age, 2e9 - age))
    assert references.find_run("last", store).name == "study-001"


def test_the_best_of_a_study_without_a_checkpoint_is_a_matter_of_data(tmp_path: Path) -> None:
    make(tmp_path, "young-000")
    with pytest.raises(DataError, match="no trial of study 'young' has a checkpoint"):
        references.find_run("best:young", tmp_path)


def test_trials_of_a_study_are_its_runs_alone_in_the_order_of_their_numbers(store: Path) -> None:
    assert [run.name for run in references.trials_of("study", store)] == [f"study-{n:03d}" for n in range(4)]
    for number in (999, 1000, 1001):
        make(store, f"study-{number}")
    numbers = [int(run.name.rpartition("-")[2]) for run in references.trials_of("study", store)]
    assert numbers == [0, 1, 2, 3, 999, 1000, 1001]


def test_a_study_stands_for_its_trials_and_a_run_for_itself(store: Path) -> None:
    assert len(references.find_runs("study", store)) == 4
    assert [run.name for run in references.find_runs("digits_cnn", store)] == ["digits_cnn"]


def resolve(text: str, store: Path) -> references.Reference:
    return references.resolve(text, store, None)  # type: ignore[arg-type]  # no tracker is asked for files


def test_a_run_resolves_to_its_best_checkpoint(store: Path) -> None:
    found = resolve("best:study", store)
    run = Run(store / "runs" / "study-001")
    assert (found.label, found.checkpoint, found.run) == ("study-001", run.checkpoints / "epoch_0001", run)


def names(runs: list[Run]) -> list[str]:
    return [run.name for run in runs]


@pytest.fixture
def seeds(store: Path) -> Path:
    """A configuration that was trained with eleven seeds, and one of the trials with two more."""
    for seed in range(11):
        make(store, f"mine-seed{seed}", 200.0 + (seed == 3) if seed != 5 else None)
    make(store, "mine-seeded", 999.0)
    make(store, "study-003-seed1", 420.0)
    make(store, "study-003-seed2", 430.0)
    return store


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mine", [f"mine-seed{seed}" for seed in range(11)]),
        ("mine-seed1", ["mine-seed1"]),  # also the beginning of mine-seed10
        ("study-003", ["study-003", "study-003-seed1", "study-003-seed2"]),
        ("study-003-", ["study-003", "study-003-seed1", "study-003-seed2"]),
        ("study-003-seed2", ["study-003-seed2"]),
        ("best:study", ["study-003", "study-003-seed1", "study-003-seed2"]),
        ("0f3", ["digits_cnn-a1b2c3"]),
    ],
)
def test_a_configuration_stands_for_all_of_its_seeds(seeds: Path, text: str, found: list[str]) -> None:
    assert names(references.find_seeds(text, seeds)) == found
    assert names(references.find_runs(text, seeds)) == found


def test_seeds_are_those_of_the_name_alone(seeds: Path) -> None:
    assert names(references.seeds_of("min", seeds)) == []
    assert names(references.seeds_of("study-001", seeds)) == ["study-001"]
    with pytest.raises(ConfigError, match="'mine-see' begins several runs"):
        references.find_seeds("mine-see", seeds)


def test_of_a_configuration_the_best_seed_is_served_and_of_a_trial_itself(seeds: Path) -> None:
    found = resolve("mine", seeds)
    assert found.label == "mine-seed3 (the best of 11 seeds)"
    assert found.run == references.find_run("mine", seeds) == Run(seeds / "runs" / "mine-seed3")
    for text in ("study-003", "best:study"):
        assert resolve(text, seeds).label == "study-003"
    assert resolve("study-003-seed2", seeds).label == "study-003-seed2"
    assert resolve("mine-seed3", seeds).label == "mine-seed3"


def test_the_best_of_a_study_is_the_best_mean_over_seeds_once_there_are_several(store: Path) -> None:
    assert references.best_of("study", store).name == "study-001", "400 is the highest single value"
    make(store, "study-003-seed1", 380.0)  # 389.5 on average
    assert references.best_of("study", store).name == "study-003"
    make(store, "study-001-seed1", 370.0)  # 385
    make(store, "study-000-seed1", 900.0)  # 550
    assert references.best_of("study", store).name == "study-000"
    make(store, "study-000-seed2", 10.0)  # 370
    assert references.best_of("study", store).name == "study-003"
    make(store, "study-003-seed2")  # not that far yet
    make(store, "study-002-seed1", 999.0)  # a trial without a checkpoint
    assert references.best_of("study", store).name == "study-003"


def test_a_trial_that_failed_is_not_the_best_of_a_study(store: Path) -> None:
    end(Run(store / "runs" / "study-001"), "FAILED")  # 400, and then its loss was not finite
    assert references.best_of("study", store).name == "study-003"
    for number in (0, 3):
        end(Run(store / "runs" / f"study-{number:03d}"), "FAILED")
    with pytest.raises(DataError, match="has a checkpoint yet, but for 3 that failed"):
        references.best_of("study", store)


def test_a_checkpoint_folder_knows_its_run_where_it_lies_in_one(store: Path, tmp_path: Path) -> None:
    inside = store / "runs" / "digits_cnn" / "checkpoints" / "epoch_0001"
    assert resolve(str(inside), store).run == Run(store / "runs" / "digits_cnn")
    alone = tmp_path / "far" / "away" / "model"
    checkpoint.copy_for_inference(inside, alone)
    found = resolve(str(alone), store)
    assert (found.checkpoint, found.run) == (alone, None)


def test_a_damaged_or_missing_checkpoint_is_a_matter_of_data(store: Path) -> None:
    with pytest.raises(DataError, match="no checkpoint yet"):
        resolve("study-002", make(store, "other").folder.parent.parent)
    weights = store / "runs" / "study-001" / "checkpoints" / "epoch_0001" / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    for text in ("best:study", str(weights.parent)):
        with pytest.raises(DataError, match="damaged"):
            resolve(text, store)


@pytest.mark.parametrize("run", ["", "..", "../..", "never made", "digits_cnn"])
def test_a_registered_version_has_a_run_only_if_it_names_one(
    store: Path, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    """Versions that others registered have no tag, or any."""
    version = Version("setwise-digits", 3, run, "", "", {})
    folder = store / "registry" / "v3"
    monkeypatch.setattr(registry, "find", lambda tracker, uri: version)
    monkeypatch.setattr(registry, "download", lambda tracker, version, store: folder)
    found = resolve("models:/setwise-digits@champion", store)
    assert (found.label, found.checkpoint) == ("setwise-digits version 3", folder)
    assert found.run == (Run(store / "runs" / run) if run == "digits_cnn" else None)


# --- the registry behind `models:/` --------------------------------------------------------------------------------


class Client:
    """Stands for an MLflow client that fails with one error code."""

    def __init__(self, code: int) -> None:
        from mlflow.exceptions import MlflowException

        self.error = MlflowException("said the server", code)

    def get_model_version_by_alias(self, *_: Any) -> Any:
        raise self.error


class Tracker:
    address = "http://tracking.example"

    def __init__(self, code: int) -> None:
        self.client = Client(code)


def test_a_registry_that_cannot_be_asked_is_not_one_without_a_champion() -> None:
    """Otherwise one failed request would let any candidate through the gate."""
    from mlflow.protos import databricks_pb2 as codes

    missing: Any = Tracker(codes.RESOURCE_DOES_NOT_EXIST)
    assert registry.champion(missing, "setwise-digits") is None
    for code in (codes.TEMPORARILY_UNAVAILABLE, codes.INTERNAL_ERROR, codes.PERMISSION_DENIED):
        failing: Any = Tracker(code)
        with pytest.raises(Exception, match="said the server"):
            registry.champion(failing, "setwise-digits")


@pytest.mark.parametrize("uri", ["models:/", "models:/name", "models:/name/latest", "models:/name/", "models:/name/-1"])
def test_a_registry_address_of_another_form_is_refused(uri: str) -> None:
    nobody: Any = Tracker(1)
    with pytest.raises(ConfigError, match="models:/NAME@ALIAS"):
        registry.find(nobody, uri)


def test_a_variant_of_a_study_is_named_with_all_of_its_seeds(store: Path) -> None:
    for number, (variant, value) in enumerate((("vse", 200.0), ("dive", 190.0), ("vse", 210.0), ("dive", 195.0))):
        trial = make(store, f"deck-{number:03d}", value)
        params = {"variant": variant, "train.seed": number // 2}
        Outbox(trial.events).append({"kind": "params", "values": params})
    assert [run.name for run in references.find_seeds("deck:vse", store)] == ["deck-000", "deck-002"]
    assert references.find_run("deck:dive", store).name == "deck-003"  # of several seeds the best by validation
    assert references.variant_of(references.trial_run("study", 0, store)) is None
    with pytest.raises(ConfigError, match=r"no variant is called 'dvie'.*Did you mean 'dive'.*in study 'deck'"):
        references.find_seeds("deck:dvie", store)
    with pytest.raises(ConfigError, match="no run is called 'nothing:vse'"):
        references.find_seeds("nothing:vse", store)


def test_the_best_of_variants_is_the_best_mean_over_seeds(store: Path) -> None:
    """One lucky seed, or an ablation of one seed alone, is not the best."""
    values = (("vse", 300.0), ("dive", 290.0), ("dive_k1", 400.0), ("vse", 200.0), ("dive", 289.0))
    for number, (variant, value) in enumerate(values):
        trial = make(store, f"deck-{number:03d}", value)
        Outbox(trial.events).append({"kind": "params", "values": {"variant": variant}})
    assert [run.name for run in references.find_seeds("best:deck", store)] == ["deck-001", "deck-004"]
    assert references.find_run("best:deck", store).name == "deck-001"


def test_a_trial_that_failed_is_no_seed_of_its_variant(store: Path) -> None:
    """However high it came before; and one that has not ended is chosen only where none has."""
    for number, (variant, value) in enumerate((("vse", 100.0), ("vse", 150.0), ("vse", 90.0), ("dive", 80.0))):
        trial = make(store, f"deck-{number:03d}", value)
        Outbox(trial.events).append({"kind": "params", "values": {"variant": variant}})
    end(references.trial_run("deck", 1, store), "FAILED")
    for text in ("best:deck", "deck:vse"):
        assert [run.name for run in references.find_seeds(text, store)] == ["deck-000", "deck-002"]
        assert references.find_run(text, store).name == "deck-000"
    nobody: Any = Tracker(1)
    assert references.resolve("deck:vse", store, nobody).label == "deck-000 (the best of 2 seeds)"
    assert references.resolve("deck:dive", store, nobody).label == "deck-003"
    running = make(store, "deck-004", 200.0)
    storage.write_bytes(running.events, b"")
    Outbox(running.events).append({"kind": "params", "values": {"variant": "vse"}})
    assert references.find_run("deck:vse", store).name == "deck-000"
    end(references.trial_run("deck", 3, store), "FAILED")
    assert [run.name for run in references.find_seeds("deck:dive", store)] == ["deck-003"], "all of them failed"
