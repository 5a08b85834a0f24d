"""The plan as a user reads it, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from setwise.models.config import ModelConfig
from setwise.pipelines import cli, estimate, hardware, plan, recipe
from setwise.pipelines.estimate import GIB
from setwise.pipelines.recipe import Recipe
from setwise.platform.errors import ConfigError, DataError


def setwise(*words: str) -> subprocess.CompletedProcess[str]:
    """A verb as a user types it."""
    command = [sys.executable, "-m", "setwise.pipelines.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_a_dry_run_prints_parts_memory_and_every_preset(tmp_path: Path) -> None:
    done = setwise("train", "coco_butd_bigru", "--on", "rtx3090x1", "--dry-run", "--store", str(tmp_path))
    assert done.stderr == ""
    first = done.stdout.splitlines()[0]
    assert first.startswith("coco_butd_bigru on rtx3090x1 (1 x NVIDIA GeForce RTX 3090): 80 epochs of 567 steps of 200")
    for words in ("45,330,596", "text sets", "activations", "published sizes", "word embeddings start at random"):
        assert words in done.stdout
    assert all(f"│ {name}" in done.stdout for name in hardware.names())
    assert "image backbone" not in done.stdout, "region features have none"
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_as_json_says_what_the_table_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "digits_cnn_bigru", "--dry-run", "--json", "--store", str(tmp_path)]
    cli.app(words, standalone_mode=False)
    out = json.loads(capsys.readouterr().out)
    assert (out["recipe"], out["on"], out["preset"], out["hours"]) == ("digits_cnn_bigru", None, None, None)
    assert out["steps"] == out["steps_per_epoch"] * out["train"]["epochs"] == 2880
    assert out["memory_bytes"]["total"] == sum(v for name, v in out["memory_bytes"].items() if name != "total")
    assert list(out["presets"]) == hardware.names()
    assert all(there["fits"] and there["hours"] > 0 for there in out["presets"].values())
    assert not any("word embeddings" in note for note in out["notes"]), "its embeddings are not those of the paper"


def test_overrides_and_presets_reach_the_plan(tmp_path: Path) -> None:
    made = plan.make("digits_cnn_bigru", ["train.batch_size=40", "train.epochs=3"], "a100x8", tmp_path)
    assert made.chosen.steps == 3 * 150
    assert made.chosen is made.presets["a100x8"]
    assert made.chosen.recipe.train.workers == 8
    assert {found.recipe.train.batch_size for found in made.presets.values()} == {40}


def test_a_preset_of_ones_own_stands_beside_the_others(tmp_path: Path) -> None:
    on = tmp_path / "mine.yaml"
    on.write_text((hardware.FOLDER / "cpu.yaml").read_text().replace("memory_gib: 16", "memory_gib: 1.1"))
    made = plan.make("digits_cnn_bigru", None, str(on), tmp_path)
    assert list(made.presets) == [*hardware.names(), str(on)]
    assert made.chosen.preset is not None and made.chosen.preset.memory_gib == 1.1
    assert not made.chosen.fits and "does not fit" in made.notes()[-1]


def test_notes_tell_what_stands_still_and_what_is_cut(tmp_path: Path) -> None:
    notes = "\n".join(plan.make("coco_resnet152_bigru", ["train.micro_batch=16"], None, tmp_path).notes())
    assert "the backbone stands still for 50 epochs" in notes
    assert "train.micro_batch=16: the batch stays 128 images" in notes
    random = ["model.image_encoder.weights=null", "model.image_encoder.frozen_batch_norm=false"]
    learning = [*random, "optimizer.frozen_backbone_epochs=0"]
    notes = "\n".join(plan.make("coco_resnet152_bigru", learning, None, tmp_path).notes())
    assert "the image backbone starts at random" in notes and "stands still" not in notes


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.161, "0.16 s"),
        (13.4, "13 s"),
        (119, "119 s"),
        (120, "2.0 min"),
        (900, "15 min"),
        (4.8 * 3600, "4.8 h"),
        (47 * 3600, "47 h"),
        (2.4 * 86400, "2.4 days"),
        (1245 * 86400, "1,245 days"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert plan.duration(seconds) == words


def test_training_a_data_set_that_is_not_there_says_so_plainly(tmp_path: Path) -> None:
    for words in (["coco_butd_bigru"], ["coco_butd_bigru", "--on", "h200x1"]):
        with pytest.raises(DataError, match=r"'coco_butd' is not prepared in"):
            cli.app(["train", *words, "--store", str(tmp_path)], standalone_mode=False)


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_padding_as_in_the_authors_code_is_not_for_training(tmp_path: Path, more: list[str]) -> None:
    words = ["train", "digits_cnn_bigru", "model.padding=official", *more, "--store", str(tmp_path)]
    with pytest.raises(ConfigError, match="is for weights that the authors' code trained"):
        cli.app(words, standalone_mode=False)


def test_config_show_lays_a_preset_over_a_recipe(tmp_path: Path) -> None:
    done = setwise("config", "show", "coco_butd_bigru", "train.epochs=1", "--on", "a100x8")
    shown = tmp_path / "shown.yaml"
    shown.write_text(done.stdout)
    assert recipe.load(str(shown)) == hardware.load_recipe("coco_butd_bigru", ["train.epochs=1"], "a100x8")
    assert "setwise train coco_butd_bigru --on a100x8 --dry-run" in done.stderr


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_dry_runs_and_fits_everywhere(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", name, "--on", "a100x2", "--dry-run", "--json", "--store", str(tmp_path)]
    cli.app(words, standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert told["recipe"] == name and told["on"] == "a100x2"
    assert told["steps"] == told["steps_per_epoch"] * told["train"]["epochs"] > 0
    if not isinstance(recipe.load(name).model, ModelConfig):
        assert "not estimated" in told["notes"][-1]
        return
    assert told["fits"]
    assert min(told["hours"], told["checkpoint_bytes"], *told["flops_per_step"].values()) >= 0
    fits_every_preset_with_its_own_batch(recipe.load(name), name, told["steps"])


def fits_every_preset_with_its_own_batch(plain: Recipe, name: str, steps: int) -> None:
    """In the test above, since counting a model's operations takes seconds and is remembered."""
    of = estimate.sizes(plain, Path("/nowhere"))
    for on in hardware.names():
        preset, _ = hardware.load(on)
        there = estimate.fitted(hardware.load_recipe(name, on=on), of, preset)
        found = estimate.estimate(there, of, preset)
        assert found.fits, on
        assert 0 < found.memory.total < 0.9 * preset.memory_gib * GIB
        assert there.train.batch_size == plain.train.batch_size
        assert found.steps == steps
        assert there.train.micro_batch is None or there.train.micro_batch < estimate.share_of(there)
        assert found.seconds is not None and found.seconds > 0
        without = {"train": {*hardware.HOW, "accelerators"}}
        assert there.model_dump(exclude=without) == plain.model_dump(exclude=without)
