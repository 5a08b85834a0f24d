"""Recipes: those that ship load, bounds hold, and a run's configuration is a recipe again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from setwise.pipelines import recipe
from setwise.platform import config
from setwise.platform.errors import ConfigError

NAME = "digits_cnn_bigru"


@pytest.mark.parametrize("name", recipe.names())
def test_every_shipped_recipe_loads_and_is_what_its_name_says(name: str) -> None:
    loaded = recipe.load(name)
    data, image, text = name.split("_")[:3]
    assert (loaded.data.name, loaded.model.image_encoder.kind, loaded.model.text_encoder.kind) == (data, image, text)


def test_there_is_a_recipe() -> None:
    assert NAME in recipe.names()


def test_a_written_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    loaded = recipe.load(NAME, ["optimizer.lr=1e-5", "loss.mmd_weight=0.30000000000000004", "train.seed=7"])
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(loaded))
    assert recipe.load(str(file)) == loaded
    assert recipe.Recipe.model_validate(loaded.model_dump(mode="json")) == loaded


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=10", None),
        ("train.batch_size=1", "greater than or equal to 2"),
        ("train.epochs=0", "greater than or equal to 1"),
        ("train.epochs=2.5", "valid integer"),
        ("train.seed=-1", "greater than or equal to 0"),
        ("train.seed=2147483648", "less than 2147483648"),
        ("train.workers=3", "cannot be divided evenly among 3 workers"),
        ("train.keep_checkpoints=1", "greater than or equal to 2"),
        ("optimizer.lr=0", "greater than 0"),
        ("optimizer.lr=1.5", "less than or equal to 1"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("optimizer.clip_norm=.nan", "optimizer.clip_norm"),
        ("optimizer.schedule=linear", "'cosine' or 'constant'"),
        ("data.image_size=15", "greater than or equal to 16"),
        ("similarity.alpha=0", "greater than 0"),
        ("similarity.kind=cosine", "'smooth_chamfer'"),
        ("loss.margin=-0.1", "greater than or equal to 0"),
        ("loss.mmd_weight=.inf", "finite"),
        ("model.set_prediction.num_slots=0", "greater than or equal to 1"),
        ("model.image_encoder.channels=[8, 12]", "multiple of 8"),
        ("model.image_encoder.kind=resnext", "'cnn'"),
    ],
)
def test_bounds(override: str, message: str | None) -> None:
    if message is None:
        assert recipe.load(NAME, [override]).train.batch_size == 10
        return
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        recipe.load(NAME, [override])
    assert f"override '{override}': " in str(caught.value)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("train.lr=0.1", "optimizer.lr"),
        ("optimizer.warmup=3", "optimizer.warmup_steps"),
        ("num_slots=3", "model.set_prediction.num_slots"),
        ("model.num_slots=3", "model.set_prediction.num_slots"),
        ("loss.alpha=3", "similarity.alpha"),
        ("model.text_encoder.droput=0", "model.text_encoder.dropout"),
        ("trian.epochs=3", "train"),
    ],
)
def test_a_misplaced_or_misspelt_setting_names_the_right_one(override: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"is not a setting\. Did you mean '{re.escape(meant)}'\?"):
        recipe.load(NAME, [override])


def test_a_recipe_may_extend_a_shipped_one_by_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: {NAME}\ntrain: {{epochs: 77}}\n")
    shipped = recipe.load(NAME)
    mine = recipe.load(str(file), ["train.seed=5"])
    assert (mine.train.epochs, mine.train.seed, mine.model) == (77, 5, shipped.model)


def test_an_unknown_recipe_and_file_are_named() -> None:
    with pytest.raises(ConfigError, match=rf"no recipe is called 'digits_cnn_bigrru'\. Did you mean '{NAME}'\?"):
        recipe.load("digits_cnn_bigrru")
    with pytest.raises(ConfigError, match=r"nowhere/x\.yaml: no such file"):
        recipe.load("nowhere/x.yaml")


def test_every_bound_is_in_the_schema_that_users_read() -> None:
    schema = recipe.Recipe.model_json_schema()["$defs"]
    assert schema["OptimizerConfig"]["properties"]["lr"]["exclusiveMinimum"] == 0
    assert schema["TrainConfig"]["properties"]["batch_size"]["minimum"] == 2
    assert "description" in schema["SetPredictionConfig"]["properties"]["num_slots"]
