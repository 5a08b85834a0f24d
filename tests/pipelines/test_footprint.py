"""What is counted without computing is what computing takes: on small models, beside the real thing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode

from setwise.models.config import ModelConfig
from setwise.models.retriever import SetRetriever
from setwise.pipelines import footprint, recipe
from setwise.pipelines.footprint import Inputs

IMAGES, REGIONS, CAPTIONS, VOCABULARY, MEAN, LONGEST = 40, 9, 5, 100, 6, 8
SMALL = Inputs(64, REGIONS, CAPTIONS, VOCABULARY, MEAN, LONGEST)
IMAGE_ENCODERS = {
    "cnn": {"kind": "cnn", "channels": [16, 32]},
    "butd": {"kind": "butd", "feature_dim": 64},
    "grid": {
        "kind": "grid",
        "architecture": "resnet18",
        "head": {"projection": "linear", "global_feature": "linear"},
    },
}
TEXT_ENCODERS = {
    "words": {"kind": "bigru", "word_dim": 32},
    "states": {"kind": "bigru", "word_dim": 32, "local_features": "states", "pooling": "max"},
    "bert": {"kind": "bert", "layers": 2, "width": 64, "heads": 4, "ff_width": 128},
}
SIDES = [("cnn", "words"), ("butd", "states"), ("grid", "bert")]


def small(image: str, text: str) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "embed_size": 64,
            "image_encoder": IMAGE_ENCODERS[image],
            "text_encoder": TEXT_ENCODERS[text],
            "set_prediction": {"heads": 2, "head_dim": 32},
        }
    )


def batch(image: str) -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.full((IMAGES * CAPTIONS,), MEAN)
    lengths[0] = LONGEST
    tokens = (torch.arange(LONGEST) < lengths[:, None]).long()
    if image == "butd":
        return torch.rand(IMAGES, REGIONS, 64), tokens, lengths
    return torch.zeros(IMAGES, 3, 64, 64, dtype=torch.uint8), tokens, lengths


@pytest.mark.parametrize(("image", "text"), SIDES)
def test_bytes_and_operations_are_those_of_a_real_forward_pass(image: str, text: str) -> None:
    """Saved tensors are counted as autograd names them, which the estimate never asks."""
    model = SetRetriever(small(image, text), VOCABULARY).train()
    images, tokens, lengths = batch(image)
    given = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers(), images, tokens, lengths)}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), FlopCounterMode(display=False) as counter:
        model(images, tokens, lengths, None, torch.arange(IMAGES), torch.arange(IMAGES * CAPTIONS))
    real = sum(x.untyped_storage().nbytes() for place, x in saved.items() if place not in given)

    counted = footprint.count(small(image, text), SMALL, half=False)
    assert sum(part.kept.of(IMAGES) for part in counted.parts) == pytest.approx(real, rel=0.1)
    assert IMAGES * sum(part.flops for part in counted.parts) == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert counted.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert counted.buffer_bytes == sum(buffer.nbytes for buffer in model.buffers())


@pytest.mark.parametrize(("image", "text"), SIDES)
def test_half_precision_halves_what_is_not_kept_in_fp32(image: str, text: str) -> None:
    whole, half = (footprint.count(small(image, text), SMALL, half) for half in (False, True))
    for full, less in zip(whole.parts, half.parts, strict=True):
        if full.name == "text encoder" and text != "bert":
            assert less.kept == full.kept, "a GRU over packed captions is counted in fp32"
        elif full.kept.each:
            assert 0.4 * full.kept.each < less.kept.each < full.kept.each, full.name
    assert [part.flops for part in whole.parts] == [part.flops for part in half.parts]


def test_embedding_keeps_little_of_what_training_keeps() -> None:
    config = small("grid", "bert")
    kept = sum(part.kept.each for part in footprint.count(config, SMALL, half=False).parts)
    largest = max(part.largest.each for part in footprint.count(config, SMALL, half=False).parts)
    assert largest < footprint.embedding(config, SMALL).each < kept / 4


def test_no_weight_is_allocated() -> None:
    _, model = footprint._model(recipe.load("coco_resnet152_bigru").model, 11_755)
    assert all(isinstance(parameter, FakeTensor) for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "in_pieces"),
    [
        ("coco_butd_bigru", {"text encoder", "text sets"}),
        ("coco_resnet152_bigru", set(footprint.PARTS)),
        ("digits_cnn_bigru", set(footprint.PARTS)),
    ],
)
def test_what_normalises_by_the_batch_is_not_cut_into_pieces(name: str, in_pieces: set[str]) -> None:
    config = recipe.load(name).model
    counted = footprint.count(config, Inputs(64, 36, 5, 1000, 15, 32), half=False)
    assert {part.name for part in counted.parts if part.in_pieces} == in_pieces


def test_a_backbone_is_cut_where_its_head_cannot_be() -> None:
    grid = IMAGE_ENCODERS["grid"] | {"head": {"projection": "mlp"}}
    config = ModelConfig.model_validate({"image_encoder": grid, "text_encoder": TEXT_ENCODERS["words"]})
    counted = footprint.count(config, SMALL, half=False)
    assert {part.name for part in counted.parts if part.in_pieces} == {"image backbone", "text encoder", "text sets"}
    feature_map = 4 * 512 * 2 * 2
    sets_and_slots = 2 * 4 * CAPTIONS * 4 * config.embed_size
    assert counted.joined.of(1) == feature_map + sets_and_slots


@pytest.mark.parametrize(
    ("name", "part", "gflop"),
    [
        ("coco_resnet152_bigru", "image backbone", 23.0),  # torchvision's own documentation: 11.5 multiply-adds
        ("coco_butd_bigru", "text encoder", 5 * 15 * 2 * 2 * 3 * (300 + 1024) * 1024 / 1e9),  # the GRU, by formula
    ],
)
def test_known_operations(name: str, part: str, gflop: float) -> None:
    settings = recipe.load(name)
    counted = footprint.count(settings.model, Inputs(224, 36, 5, 1000, 15, 15), half=True)
    (found,) = [each.flops for each in counted.parts if each.name == part]
    assert found / 1e9 == pytest.approx(gflop, rel=0.01)
