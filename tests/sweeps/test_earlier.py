"""What a new study tries first of earlier ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from setwise.platform import config, run, storage
from setwise.platform.errors import ConfigError
from setwise.platform.outbox import Outbox
from setwise.sweeps import earlier, space


def make(store: Path, name: str, value: float | None, *overrides: str) -> None:
    from setwise.pipelines import recipe

    made = run.create(store / "runs", name, config.to_yaml(recipe.load("digits_cnn_bigru", list(overrides))), "tests")
    if value is not None:
        storage.write_json(made.folder / "best.json", {"checkpoint": "epoch_0001", "value": value})


def test_the_best_trials_of_a_study_and_the_settings_of_a_run(tmp_path: Path) -> None:
    for number, value in enumerate((10.0, 40.0, None, 30.0, 20.0)):
        make(tmp_path, f"old-{number:03d}", value, f"similarity.alpha={5 + number}")
    make(tmp_path, "mine", None, "similarity.alpha=33", "model.set_prediction.num_slots=1")
    spec, base = space.load("paper")
    said: list[str] = []
    found = earlier.settings(["old", "mine"], spec, base, tmp_path, said.append)
    assert [(name, values["similarity.alpha"]) for values, name in found] == [
        ("old-001", 6.0),
        ("old-003", 8.0),
        ("old-004", 9.0),
        ("mine", 33.0),
    ]
    assert "loss.diversity_weight" in found[0][0] and "loss.diversity_weight" not in found[3][0]
    assert not said


def test_settings_that_several_sources_share_are_tried_once(tmp_path: Path) -> None:
    for seed in (0, 1):
        make(tmp_path, f"same-seed{seed}", None, f"train.seed={seed}")
    make(tmp_path, "other", None, "similarity.alpha=33")
    spec, base = space.load("paper")
    default = space.default_values(spec, base)
    found = earlier.settings(["same-seed0", "same-seed1", "other"], spec, base, tmp_path, print)
    assert len(found) == 3
    assert [source for _, source in earlier.distinct([(default, "recipe"), *found])] == ["recipe", "other"]


def test_a_trial_that_failed_is_no_start(tmp_path: Path) -> None:
    for number, value in enumerate((10.0, 40.0)):
        make(tmp_path, f"old-{number:03d}", value, f"similarity.alpha={5 + number}")
    Outbox(tmp_path / "runs" / "old-001" / "events.jsonl").append({"kind": "status", "value": "FAILED"})
    spec, base = space.load("paper")
    assert [name for _, name in earlier.settings(["old"], spec, base, tmp_path, print)] == ["old-000"]


def test_what_lies_outside_is_left_out_with_a_word(tmp_path: Path) -> None:
    make(tmp_path, "far", None, "similarity.alpha=900")
    spec, base = space.load("paper")
    said: list[str] = []
    assert earlier.settings(["far"], spec, base, tmp_path, said.append) == []
    assert "far is no start for this study: its similarity.alpha is 900" in said[0]


def test_a_source_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    make(tmp_path, "far", None)
    with pytest.raises(ConfigError, match="no run is called 'nothing'"):
        earlier.settings(["nothing"], *space.load("paper"), tmp_path, print)
