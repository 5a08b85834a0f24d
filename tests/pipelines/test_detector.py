"""Each image has its regions, none twice, and each region the feature of its box, whatever images are beside it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights

from setwise.pipelines import detector as detectors
from setwise.pipelines.detector import Detector, Extractor, best_regions, enough_boxes
from setwise.pipelines.regions import DetectorConfig
from setwise.platform.errors import DataError

SMALL = DetectorConfig(
    num_regions=9, num_proposals=24, score_threshold=0.02, min_size=64, max_size=128, batch_size=3, num_classes=7
)
SHAPES = [(48, 64), (64, 48), (48, 64), (100, 60), (48, 64), (64, 64), (48, 64), (1, 1), (3, 120), (120, 3)]


def save_weights(path: Path, architecture: str = SMALL.architecture, num_classes: int = 7) -> Path:
    """Random ones, with scores that differ by enough to have one order."""
    torch.manual_seed(0)
    network = get_model(architecture, weights=None, weights_backbone=None, num_classes=num_classes)
    with torch.no_grad():
        network.rpn.head.cls_logits.weight.normal_(std=0.5)
        last = network.roi_heads.box_predictor.cls_score
        last.weight.normal_(std=0.005)
        last.weight[0] = last.weight[4]  # background is likelier than the class that most boxes are of
        last.bias[0] += 1
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("weights") / "detector.pth")


@pytest.fixture(scope="module")
def detector(weights: Path) -> Detector:
    return Detector(SMALL, weights)


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    random = np.random.default_rng(0)
    return [torch.from_numpy(random.integers(0, 256, (3, *shape), dtype=np.uint8)) for shape in SHAPES]


def iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0.0) * max(height, 0.0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def naive_best(
    boxes: list[list[float]], scores: list[list[float]], num: int, least: float, overlap: float
) -> list[tuple[int, float]]:
    best: dict[int, float] = {}
    for label in range(len(scores[0])):
        kept: list[int] = []
        for place in sorted(range(len(boxes)), key=lambda place: -scores[place][label]):
            if scores[place][label] > least and all(iou(boxes[place], boxes[other]) <= overlap for other in kept):
                kept.append(place)
        for place in kept:
            best[place] = max(best.get(place, 0.0), scores[place][label])
    others = {place: max(scores[place]) for place in range(len(boxes)) if place not in best}
    ranked = [sorted(group.items(), key=lambda item: -item[1]) for group in (best, others)]
    return (ranked[0] + ranked[1])[:num]


@pytest.mark.parametrize("least", [0.0, 0.15, 0.4, 0.99])
def test_the_best_regions_are_those_that_plain_loops_find(least: float) -> None:
    torch.manual_seed(1)
    corners = torch.rand(40, 2) * 10
    boxes = torch.cat([corners, corners + 2 + torch.rand(40, 2) * 6], 1)
    scores = (torch.randn(40, 6) * 2).softmax(1)[:, 1:]
    places, values = best_regions(boxes, scores, 25, least, 0.4)
    expected = naive_best(boxes.tolist(), scores.tolist(), 25, least, 0.4)
    assert places.tolist() == [place for place, _ in expected]
    assert values.tolist() == [score for _, score in expected]


def test_one_by_one_and_in_batches_the_regions_are_the_same(detector: Detector, images: list[Tensor]) -> None:
    together = detector.detect(images)
    for place, image in enumerate(images):
        alone = detector.detect([image])
        for both, one in zip(together, alone, strict=True):
            assert (both[place] - one[0]).abs().max() <= 1e-5 * one.abs().max()


def test_every_image_has_all_its_regions_and_none_twice(detector: Detector, images: list[Tensor]) -> None:
    features, boxes, scores = detector.detect(images)
    assert features.shape == (len(images), 9, 1024)
    assert features.std(1).mean() > 0, "the regions of an image differ"
    for (height, width), boxes_R4, scores_R in zip(SHAPES, boxes, scores, strict=True):
        assert len({tuple(box) for box in boxes_R4.tolist()}) == 9
        left, top, right, bottom = boxes_R4.unbind(1)
        assert ((left >= 0) & (left < right) & (right <= width * 1.00001)).all()
        assert ((top >= 0) & (top < bottom) & (bottom <= height * 1.00001)).all()
        assert ((scores_R > 0) & (scores_R <= 1)).all()


def test_a_feature_and_a_score_are_those_of_the_box_that_is_given(detector: Detector, images: list[Tensor]) -> None:
    network = detector.network
    features, boxes, scores = detector.detect(images[:1])
    with torch.inference_mode():
        batch, _ = network.transform([images[0].float() / 255])
        (height, width), (own_height, own_width) = batch.image_sizes[0], SHAPES[0]
        scaled = boxes[0] * torch.tensor([width / own_width, height / own_height] * 2)
        pooled = network.roi_heads.box_roi_pool(network.backbone(batch.tensors), [scaled], batch.image_sizes)
        expected = network.roi_heads.box_head(pooled)
        chances = network.roi_heads.box_predictor(expected)[0].softmax(1)[:, 1:]
    torch.testing.assert_close(features[0], expected, rtol=1e-4, atol=1e-4)
    assert torch.isclose(chances, scores[0][:, None], atol=1e-4).any(1).all()


def test_a_narrow_image_that_comes_first_changes_no_later_one(
    detector: Detector, weights: Path, images: list[Tensor]
) -> None:
    narrow, ordinary = images[8], images[0]
    fresh = Detector(SMALL, weights)
    fresh.detect([narrow])
    torch.testing.assert_close(fresh.detect([ordinary]).features, detector.detect([ordinary]).features)


def test_where_all_proposals_are_the_whole_image_a_grid_fills_up(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    state["rpn.head.bbox_pred.bias"] = torch.tensor([0.0, 0.0, 9.0, 9.0]).repeat(3)
    torch.save(state, tmp_path / "whole.pth")
    _, boxes, _ = Detector(SMALL, tmp_path / "whole.pth").detect([torch.full((3, 40, 80), 99, dtype=torch.uint8)])
    distinct = {tuple(round(value) for value in box) for box in boxes[0].tolist()}
    assert (0, 0, 80, 40) in distinct
    assert len(distinct) == 9


@pytest.mark.parametrize("num", [1, 2, 5, 36, 100])
def test_without_any_proposal_there_are_boxes_enough(num: int) -> None:
    boxes = enough_boxes(torch.zeros(0, 4), 30, 20, num)
    side = math.ceil(math.sqrt(num))
    assert len(boxes) == side * side >= num
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    assert areas.sum() == pytest.approx(600)
    assert (areas > 0).all()


def test_a_box_proposed_twice_is_there_once_and_the_order_stays() -> None:
    boxes = torch.tensor([[0.0, 0, 9, 9], [1, 1, 2, 2], [0, 0, 9, 9], [0, 0, 5, 5]])
    assert torch.equal(enough_boxes(boxes, 9, 9, 3), boxes[[0, 1, 3]])


def test_weights_of_another_number_of_classes_are_refused(weights: Path) -> None:
    with pytest.raises(DataError, match=r"box_predictor.* instead of \(91, 1024\)"):
        Detector(SMALL.model_copy(update={"num_classes": 91}), weights)


def test_torchvisions_first_weights_are_known_by_their_content_and_have_no_epsilon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = SMALL.model_copy(update={"architecture": "fasterrcnn_resnet50_fpn"})
    file = save_weights(tmp_path / "any_name.pth", first.architecture)

    def epsilons() -> set[float]:
        network = Detector(first, file).network
        return {module.eps for module in network.modules() if isinstance(module, nn.BatchNorm2d)}

    assert epsilons() == {1e-5}
    checksum = get_model_weights(first.architecture).COCO_V1.url[-12:-4]
    monkeypatch.setattr(detectors.storage, "sha256", lambda path: f"{checksum}{'0' * 56}")
    assert epsilons() == {0.0}


def test_an_extractor_sets_aside_what_it_cannot_read(detector: Detector, weights: Path, tmp_path: Path) -> None:
    good = Image.effect_noise((64, 48), 80)
    good.save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:500])
    (tmp_path / "3.png").write_bytes(b"")
    extractor = Extractor(SMALL, weights, "float16", "cpu")
    extractor.detector = detector
    chunk = extractor.extract([(number, str(tmp_path / f"{number}.png")) for number in (1, 2, 3, 4)])
    assert (chunk.ims.shape, chunk.ims.dtype) == ((1, 9, 1024), np.float16)
    assert (chunk.boxes.shape, chunk.scores.shape) == ((1, 9, 4), (1, 9))
    assert [bad["image_id"] for bad in chunk.quarantine] == [2, 3, 4]
    assert "empty" in chunk.quarantine[1]["reason"]
    assert "No such file" in chunk.quarantine[2]["reason"]
    nothing = extractor.extract([(3, str(tmp_path / "3.png"))])
    assert (nothing.ims.shape, nothing.boxes.shape, nothing.scores.shape) == ((0, 9, 1024), (0, 9, 4), (0, 9))


def test_features_that_are_no_numbers_are_refused(detector: Detector, weights: Path, tmp_path: Path) -> None:
    Image.effect_noise((64, 48), 80).save(tmp_path / "1.png")
    extractor = Extractor(SMALL, weights, "float16", "cpu")
    extractor.detector = detector
    last = [module for module in detector.network.roi_heads.box_head.modules() if isinstance(module, nn.Linear)][-1]
    before = last.bias.detach().clone()
    last.bias.data.fill_(1e5)
    try:
        with pytest.raises(DataError, match=r"not finite numbers in float16\. Set dtype=float32"):
            extractor.extract([(1, str(tmp_path / "1.png"))])
    finally:
        last.bias.data.copy_(before)
