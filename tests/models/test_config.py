"""The settings refuse what cannot be built, and cost no import of torch."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from setwise.models.config import LossConfig, ModelConfig, SimilarityConfig

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
    assert LossConfig() == LossConfig(margin=0.2, mmd_weight=0.01, mmd_gamma=0.5, diversity_weight=0.01)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("embed_size", 0),
        ("image_encoder", {"kind": "resnet"}),
        ("image_encoder", {"kind": "cnn", "channels": [20, 64]}),
        ("image_encoder", {"kind": "cnn", "channels": []}),
        ("image_encoder", {}),
        ("text_encoder", {"kind": "bigru", "word_dim": 7}),
        ("text_encoder", {"kind": "bigru", "word_dim": 8, "dropout": 1.0}),
        ("set_prediction", {"num_slots": 0}),
        ("set_prediction", {"iterations": 0}),
        ("set_prediction", {"text_positions": "learned"}),
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


@pytest.mark.parametrize("bad", [{"alpha": 0}, {"alpha": float("nan")}, {"kind": "cosine"}, {"temperature": 16}])
def test_similarity_config_rejects(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SimilarityConfig.model_validate(bad)


@pytest.mark.parametrize("bad", [{"margin": -0.1}, {"mmd_weight": -1}, {"mmd_gamma": 0}, {"mmd_wieght": 0.1}])
def test_loss_config_rejects(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LossConfig.model_validate(bad)


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        LossConfig().margin = 0.3  # type: ignore[misc]


def test_chosen_negatives_begin_when_the_warm_up_ends() -> None:
    config = LossConfig(all_negatives_epochs=1.5, negatives="violating")
    assert [config.negatives_at(epoch) for epoch in (0, 1.49, 1.5, 2)] == ["all", "all", "violating", "violating"]
    assert LossConfig().negatives_at(0) == "hardest"


def test_importing_the_settings_does_not_import_torch() -> None:
    code = "import sys, setwise.models.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
