"""Recipes: those that ship load, bounds hold, and a run's configuration is a recipe again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from setwise.pipelines import recipe
from setwise.platform import config
from setwise.platform.errors import ConfigError

NAME = "digits_cnn_bigru"
SOURCES = ("script", "code", "author", "user", "DDAN", "deck", "paper", "guess")
BUTD = {
    "model.embed_size": 1024,
    "model.image_encoder.kind": "butd",
    "model.image_encoder.region_drop": 0.2,
    "model.image_encoder.head.projection": "mlp",
    "model.image_encoder.head.global_feature": "projected",
    "model.image_encoder.head.pooling": "max",
    "model.image_encoder.head.dropout": 0.1,
    "model.text_encoder.kind": "bigru",
    "model.text_encoder.word_dim": 300,
    "model.text_encoder.dropout": 0.1,
    "model.text_encoder.local_features": "words",
    "model.text_encoder.directions": "mean",
    "model.text_encoder.pooling": "last",
    "model.set_prediction.num_slots": 4,
    "model.set_prediction.iterations": 4,
    "model.set_prediction.heads": 4,
    "model.set_prediction.head_dim": 512,
    "model.set_prediction.ff_mult": 4,
    "model.set_prediction.dropout": 0.1,
    "model.set_prediction.image_positions": "none",
    "model.set_prediction.text_positions": "sine",
    "data.word_drop": 0.2,
    "similarity.kind": "smooth_chamfer",
    "similarity.alpha": 16,
    "loss.margin": 0.2,
    "loss.mmd_weight": 0.01,
    "loss.mmd_gamma": 0.5,
    "loss.diversity_weight": 0.01,
    "loss.negatives": "hardest",
    "loss.all_negatives_epochs": 0,
    "optimizer.lr": 1e-3,
    "optimizer.weight_decay": 1e-4,
    "optimizer.schedule": "cosine",
    "optimizer.image_scale": 0.1,
    "optimizer.text_scale": 1,
    "optimizer.text_sets_scale": 0.1,
    "optimizer.clip_norm": 1,
    "train.epochs": 80,
    "train.precision": "fp16",
}
RESNET152 = {
    "model.image_encoder.architecture": "resnet152",
    "model.image_encoder.weights": "IMAGENET1K_V1",
    "data.image_size": 224,
    "data.crop_scale": [0.08, 1.0],
    "data.flip": True,
    "data.eval_view": "center",
    "data.eval_shorter_side": 256,
    "loss.margin": 0.1,
}
RESNEXT101_BERT = {
    "model.image_encoder.architecture": "resnext101_32x8d",
    "model.image_encoder.weights": "https://download.pytorch.org/models/ig_resnext101_32x8-c38310e5.pth",
    "model.image_encoder.head.global_feature": "linear",
    "model.image_encoder.head.pooling": "max",
    "model.text_encoder.kind": "bert",
    "model.text_encoder.weights": "bert-base-uncased",
    "model.set_prediction.num_slots": 4,
    "model.set_prediction.heads": 8,
    "model.set_prediction.head_dim": 256,
    "model.set_prediction.ff_mult": 4,
    "model.set_prediction.image_positions": "sine",
    "model.set_prediction.text_positions": "sine",
    "data.image_size": 512,
    "data.crop_scale": [0.36, 1.0],
    "data.flip": True,
    "data.eval_view": "squash",
    "similarity.alpha": 16,
    "loss.margin": 0.1,
    "loss.mmd_weight": 0.01,
    "loss.diversity_weight": 0.01,
    "optimizer.lr": 1e-5,
    "optimizer.schedule": "step",
    "optimizer.step_epochs": 20,
    "optimizer.step_factor": 0.1,
    "optimizer.backbone_scale": 1,
    "optimizer.image_scale": 10,
    "optimizer.text_scale": 10,
    "optimizer.text_sets_scale": 10,
    "optimizer.frozen_backbone_epochs": 1,
    "train.precision": "fp16",
}
PUBLISHED: dict[str, dict[str, object]] = {
    "coco_butd_bigru": {**BUTD, "train.batch_size": 200},
    "f30k_butd_bigru": {**BUTD, "train.batch_size": 128},
    "coco_resnet152_bigru": RESNET152,
    "f30k_resnet152_bigru": RESNET152,
    "coco_resnext101_bert": {**RESNEXT101_BERT, "train.batch_size": 128, "train.epochs": 50},
    "f30k_resnext101_bert": {**RESNEXT101_BERT, "train.batch_size": 64, "train.epochs": 60},
}
"""What was published about each row of the paper's tables, and remembered of ResNet-152."""
UNSAID = {
    "model.kind",
    "model.padding",
    "model.image_encoder.cell_drop",
    "loss.diversity",
    "pretraining",
    *(f"optimizer.{name}" for name in ("kind", "amsgrad", "momentum", "lookahead_steps", "lookahead_alpha")),
    "optimizer.plateau_patience",
    "train.seed",
    "train.keep_checkpoints",
    "train.threads",
} | {
    f"train.{name}"
    for name in (
        *("workers", "min_workers", "accelerators", "checkpoint_steps"),
        *("micro_batch", "compile", "eval_batch_size", "loader_threads"),
    )
}
"""Settings of a run, and padding, in which this implementation differs from the authors' on purpose."""
NO_PIXELS = {f"data.{name}" for name in ("image_size", "crop_scale", "flip", "eval_view", "eval_shorter_side")}
NO_STEPS = {"optimizer.step_epochs", "optimizer.step_factor"}
NO_BACKBONE = {"optimizer.backbone_scale", "optimizer.frozen_backbone_epochs"}
WITHOUT_MEANING = {"butd": NO_PIXELS | NO_STEPS | NO_BACKBONE, "grid": {"data.eval_shorter_side"}}


@pytest.mark.parametrize("name", recipe.names())
def test_every_shipped_recipe_loads_and_is_what_its_name_says(name: str) -> None:
    loaded = recipe.load(name)
    encoder = getattr(loaded.model, "image_encoder", None)
    features = "_butd" if encoder is not None and encoder.kind == "butd" else ""
    assert name == loaded.title or name.startswith(f"{loaded.title}_")
    assert loaded.data.name == name.partition("_")[0] + features


def test_the_embedded_data_and_every_row_of_the_paper_have_a_recipe() -> None:
    assert set(recipe.names()) >= {NAME, *PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_has_the_published_settings(name: str) -> None:
    settings = config.flatten(recipe.load(name))
    assert {setting: settings[setting] for setting in PUBLISHED[name]} == PUBLISHED[name]


def test_the_tags_of_published_values_are_explained() -> None:
    explained = re.findall(r"^#   \[(\w+)\]", recipe.find("coco_butd_bigru").read_text(), flags=re.MULTILINE)
    assert explained == list(SOURCES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_a_published_recipe_does_not_say_is_a_default_that_it_does_not_need(name: str) -> None:
    """Nothing that decides a result is left to defaults, which may change."""
    said = set(config.flatten(config.load_layers(recipe.find(name), recipe.find).values))
    left = {setting for setting in config.flatten(recipe.load(name)) if setting not in said}
    assert left - UNSAID <= WITHOUT_MEANING[recipe.load(name).retriever.image_encoder.kind]


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
        ("train.workers=51", "leaves some of 51 workers without an image"),
        ("train.keep_checkpoints=1", "greater than or equal to 2"),
        ("optimizer.lr=0", "greater than 0"),
        ("optimizer.lr=1.5", "less than or equal to 1"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("optimizer.clip_norm=.nan", "optimizer.clip_norm"),
        ("optimizer.schedule=linear", "'cosine', 'constant', 'step' or 'plateau'"),
        ("optimizer.kind=lion", "'adamw', 'adam', 'adamp' or 'sgd'"),
        ("optimizer.momentum=1", "less than 1"),
        ("optimizer.lookahead_steps=0", "greater than or equal to 1"),
        ("optimizer.plateau_patience=-1", "greater than or equal to 0"),
        ("data.image_size=15", "greater than or equal to 16"),
        ("similarity.alpha=0", "greater than 0"),
        ("similarity.kind=euclidean", "'smooth_chamfer'"),
        ("loss.margin=-0.1", "greater than or equal to 0"),
        ("loss.mmd_weight=.inf", "finite"),
        ("model.set_prediction.num_slots=0", "greater than or equal to 1"),
        ("model.image_encoder.channels=[8, 12]", "multiple of 8"),
        ("model.image_encoder.kind=resnext", "kind: no kind is called 'resnext'. There are: cnn, butd, grid."),
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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.image_encoder.frozen_batch_norm=false", "train.micro_batch=8"],
            "train.micro_batch would change the result: the backbone's batch normalisation takes its statistics",
        ),
        (["model.image_encoder.weights=null"], "frozen_batch_norm keeps the statistics that came with the weights"),
        (["data.crop_scale=[0.5, 0.2]"], "crop_scale goes from a smaller to a larger share"),
        (["data.crop_scale=[0, 1]"], "crop_scale goes from a smaller to a larger share"),
        (["data.eval_shorter_side=200"], "eval_shorter_side 200 is less than image_size 224"),
        (["train.batch_size=4", "train.workers=5"], "batch_size 4 leaves some of 5 workers without an image"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_the_reason(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        recipe.load("coco_resnet152_bigru", overrides)


def test_only_a_backbone_can_stand_still() -> None:
    with pytest.raises(ConfigError, match="an image encoder of kind 'cnn' has no backbone that could stand still"):
        recipe.load("digits_cnn_bigru", ["optimizer.frozen_backbone_epochs=1"])


def test_an_encoder_of_another_kind_replaces_the_one_of_the_recipe() -> None:
    changed = recipe.load(
        "coco_butd_bigru", ["model.image_encoder.architecture=resnet18", "model.image_encoder.kind=grid",
                            "model.image_encoder.weights=IMAGENET1K_V1"]
    )  # fmt: skip
    assert changed.title == "coco_resnet18_bigru"
    assert changed.model.image_encoder.frozen_batch_norm
