"""The settings refuse what cannot be built, and cost no import of torch."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from setwise.models.config import ModelConfig
from setwise.models.loss_config import SimilarityConfig, TripletConfig

MODEL: dict[str, Any] = {
    "embed_size": 16,
    "image_encoder": {"kind": "cnn"},
    "text_encoder": {"kind": "bigru", "word_dim": 8},
}


def test_published_values_are_the_defaults() -> None:
    model = ModelConfig.model_validate(MODEL)
    prediction = model.set_prediction
    assert (prediction.num_slots, prediction.iterations, prediction.heads, prediction.head_dim) == (4, 4, 4, 512)
    assert SimilarityConfig() == SimilarityConfig(kind="smooth_chamfer", alpha=16)
    assert TripletConfig() == TripletConfig(margin=0.2, mmd_weight=0.01, mmd_gamma=0.5, diversity_weight=0.01)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("embed_size", 0),
        ("image_encoder", {"kind": "resnet"}),
        ("image_encoder", {"kind": "cnn", "channels": [20, 64]}),
        ("image_encoder", {"kind": "cnn", "channels": []}),
        ("image_encoder", {}),
        ("image_encoder", {"kind": "butd", "channels": [8, 8]}),
        ("image_encoder", {"kind": "butd", "region_drop": 1}),
        ("image_encoder", {"kind": "butd", "head": {"projection": "none"}}),
        ("image_encoder", {"kind": "grid", "architecture": "resnet34x"}),
        ("text_encoder", {"kind": "bert", "width": 770}),
        ("text_encoder", {"kind": "bert", "max_tokens": 63}),
        ("text_encoder", {"kind": "bigru", "word_dim": 7}),
        ("text_encoder", {"kind": "bigru", "word_dim": 8, "dropout": 1.0}),
        ("set_prediction", {"num_slots": 0}),
        ("set_prediction", {"iterations": 0}),
        ("set_prediction", {"text_positions": "rotary"}),
        ("set_prediction", {"num_slot": 4}),
    ],
)
def test_model_config_rejects(where: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(MODEL | {where: value})
    assert caught.value.errors()[0]["loc"][0] == where


def test_position_code_needs_pairs_of_channels() -> None:
    states = {"kind": "bigru", "word_dim": 8, "local_features": "states"}
    with pytest.raises(ValidationError, match="even width, got 15"):
        ModelConfig.model_validate(MODEL | {"text_encoder": states, "embed_size": 15})
    ModelConfig.model_validate(
        MODEL | {"text_encoder": states, "embed_size": 15, "set_prediction": {"text_positions": "none"}}
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"image_encoder": {"kind": "butd"}, "set_prediction": {"image_positions": "sine"}},
            "regions come in no order",
        ),
        ({"embed_size": 18, "set_prediction": {"image_positions": "sine"}}, "a width that four divides, got 18"),
        ({"embed_size": 15, "text_encoder": {"kind": "bigru", "directions": "concatenated"}}, "an even embed_size"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(MODEL | changed)


@pytest.mark.parametrize(
    ("encoder", "width"),
    [
        ({"kind": "cnn"}, 16),
        ({"kind": "butd"}, 16),
        ({"kind": "butd", "feature_dim": 9, "head": {"projection": "none", "global_feature": "linear"}}, 9),
        ({"kind": "grid", "head": {"projection": "none", "global_feature": "linear"}}, 2048),
        ({"kind": "grid", "architecture": "resnet18", "head": {"projection": "none", "global_feature": "linear"}}, 512),
    ],
)
def test_slots_know_the_width_of_what_they_read(encoder: dict[str, Any], width: int) -> None:
    assert ModelConfig.model_validate(MODEL | {"image_encoder": encoder}).image_local_dim == width


@pytest.mark.parametrize("bad", [{"alpha": 0}, {"alpha": float("nan")}, {"kind": "euclidean"}, {"temperature": 16}])
def test_similarity_config_rejects(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SimilarityConfig.model_validate(bad)


@pytest.mark.parametrize("bad", [{"margin": -0.1}, {"mmd_weight": -1}, {"mmd_gamma": 0}, {"mmd_wieght": 0.1}])
def test_loss_config_rejects(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TripletConfig.model_validate(bad)


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TripletConfig().margin = 0.3  # type: ignore[misc]


def test_chosen_negatives_begin_when_the_warm_up_ends() -> None:
    config = TripletConfig(all_negatives_epochs=1.5, negatives="violating")
    assert [config.negatives_at(epoch) for epoch in (0, 1.49, 1.5, 2)] == ["all", "all", "violating", "violating"]
    assert TripletConfig().negatives_at(0) == "hardest"


def test_importing_the_settings_does_not_import_torch() -> None:
    code = "import sys, setwise.models.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_probabilistic_pooling_by_sorted_features_takes_what_the_operator_takes() -> None:
    """Refused here, and not by workers that wait for a gradient that nobody makes."""
    encoders = {"image_encoder": {"kind": "cnn"}, "set_prediction": {"kind": "gaussian", "pooling": "gpo"}}
    words = {"kind": "bigru", "local_features": "words"}
    with pytest.raises(ValidationError, match="takes states"):
        ModelConfig.model_validate({**encoders, "text_encoder": words})
    assert ModelConfig.model_validate({**encoders, "text_encoder": {**words, "local_features": "states"}})
