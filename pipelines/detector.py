"""Regions of an image and a feature of each, by torchvision's Faster R-CNN.

What is done with the proposals follows "bottom-up attention" (Anderson et al., "Bottom-Up and Top-Down Attention for
Image Captioning and Visual Question Answering", CVPR 2018): a region is a proposal, and its feature is what the box
head makes of just that box, so a box that is drawn is what its feature was computed from. Its score is that of the
best class in which non-maximum suppression left it.

An image's regions do not depend on the images beside it. torchvision pads a batch to its largest image, and padding is
seen: it makes anchors, and biases turn it into something else than the zeros at a border. So only images that alone
would be padded to the same size share a batch; what is left is the order of float sums.

Shape suffixes: B images, P proposals, R regions, C classes, F width of a feature, H height, W width, N anything.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms
from torchvision.transforms.functional import pil_to_tensor

from setwise.pipelines import image_weights
from setwise.pipelines.images import BadImageError, read_file, read_rgb
from setwise.platform import storage
from setwise.platform.errors import ConfigError, DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from setwise.pipelines.regions import DetectorConfig

LEVELS = 4
"""Feature maps that boxes are cut from, each half as wide as the one before; the first is a quarter of the image."""


class Regions(NamedTuple):
    """What was found, on the CPU in float32, best region first.

    features (B,R,F), boxes (B,R,4) as x1 y1 x2 y2 in pixels of the image as it was given, scores (B,R) from 0 to 1.
    """

    features: Tensor
    boxes: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Chunk:
    """The regions of some images as arrays, as in `Regions`; and why other images among them have none."""

    ims: NDArray[Any]
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    quarantine: list[dict[str, Any]]


class _Waiting(NamedTuple):
    """An image on its way: its place among those given, its height and width as given, and itself, resized."""

    place: int
    height: int
    width: int
    resized: ImageList


class Detector:
    """A network with its weights, on a device.

    Args:
        weights: file of a state dict, .safetensors or what torch.save wrote.

    Raises:
        DataError: no such file; a damaged one; one that holds more than tensors; weights of another network.
    """

    def __init__(self, config: DetectorConfig, weights: Path, device: str = "cpu") -> None:
        network = get_model(
            config.architecture,
            weights=None,
            weights_backbone=None,
            num_classes=config.num_classes,
            min_size=config.min_size,
            max_size=config.max_size,
            rpn_post_nms_top_n_test=config.num_proposals,
        )
        image_weights.load(network, str(weights), config.architecture, weights.parent, "detector")
        if _is_from_before_eps(weights, config.architecture):
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eps = 0.0
        _fix_scales(network.roi_heads.box_roi_pool, network.backbone.out_channels)
        self.config = config
        self.device = device
        self.network = network.eval().to(device)
        self.width: int = network.roi_heads.box_predictor.cls_score.in_features

    @torch.no_grad()
    def detect(self, images: Iterable[Tensor]) -> Regions:
        """Regions of `images`, each (3,H,W) uint8, in their order; an image is let go of as soon as it is resized."""
        waiting: defaultdict[tuple[int, ...], list[_Waiting]] = defaultdict(list)
        found: dict[int, Regions] = {}
        for place, image in enumerate(images):
            resized, _ = self.network.transform([image.to(self.device).float() / 255])
            alike = waiting[tuple(resized.tensors.shape)]
            alike.append(_Waiting(place, image.shape[-2], image.shape[-1], resized))
            if len(alike) == self.config.batch_size:
                found.update(self._detect_alike(alike))
                alike.clear()
        for alike in waiting.values():
            if alike:
                found.update(self._detect_alike(alike))
        if not found:
            num = self.config.num_regions
            return Regions(torch.zeros(0, num, self.width), torch.zeros(0, num, 4), torch.zeros(0, num))
        in_order = [found[place] for place in range(len(found))]
        return Regions(*(torch.stack(parts) for parts in zip(*in_order, strict=True)))

    def _detect_alike(self, images: list[_Waiting]) -> dict[int, Regions]:
        """Regions of images that are padded to one size, by their places; without the first dimension B."""
        sizes = [image.resized.image_sizes[0] for image in images]
        batch = ImageList(torch.cat([image.resized.tensors for image in images]), sizes)
        maps = self.network.backbone(batch.tensors)
        proposals, _ = self.network.rpn(batch, maps)
        boxes = [
            enough_boxes(boxes_P4, height, width, self.config.num_regions)
            for boxes_P4, (height, width) in zip(proposals, sizes, strict=True)
        ]
        heads = self.network.roi_heads
        features_NF = heads.box_head(heads.box_roi_pool(maps, boxes, sizes))
        logits_NC, _ = heads.box_predictor(features_NF)
        counts = [len(boxes_P4) for boxes_P4 in boxes]
        parts = zip(images, sizes, boxes, features_NF.split(counts), logits_NC.softmax(1).split(counts), strict=True)
        found = {}
        for image, (height, width), boxes_P4, features_PF, scores_PC in parts:
            places_R, scores_R = best_regions(
                boxes_P4,
                scores_PC[:, 1:],  # the first class is the background
                self.config.num_regions,
                self.config.score_threshold,
                self.config.nms_threshold,
            )
            scale_4 = boxes_P4.new_tensor([image.width / width, image.height / height] * 2)
            found[image.place] = Regions(
                features_PF[places_R].float().cpu(), (boxes_P4[places_R] * scale_4).cpu(), scores_R.cpu()
            )
        return found


def best_regions(
    boxes_P4: Tensor, scores_PC: Tensor, num: int, score_threshold: float, nms_threshold: float
) -> tuple[Tensor, Tensor]:
    """Which `num` of at least so many proposals are kept, and their scores, (R,) each.

    Non-maximum suppression is done in each class by itself, among scores above the threshold. First come the boxes that
    survive it in a class, by the best score of such a class; then, where these are too few, the others by their best
    score. Of equal scores, the earlier box is first.
    """
    places, classes = torch.nonzero(scores_PC > score_threshold, as_tuple=True)
    candidates = scores_PC[places, classes]
    kept = batched_nms(boxes_P4[places], candidates, classes, nms_threshold)
    best_P = scores_PC.new_zeros(len(boxes_P4)).scatter_reduce(0, places[kept], candidates[kept], "amax")
    has_survived_P = best_P > 0
    scores_P = torch.where(has_survived_P, best_P, scores_PC.amax(1))
    order_P = scores_P.argsort(descending=True, stable=True)
    chosen_R = torch.cat([order_P[has_survived_P[order_P]], order_P[~has_survived_P[order_P]]])[:num]
    return chosen_R, scores_P[chosen_R]


def enough_boxes(boxes_P4: Tensor, height: int, width: int, num: int) -> Tensor:
    """Proposals without those that repeat an earlier one, and at least `num` of them.

    One box can be proposed at two levels of the pyramid. If there are too few, as in an image of a few pixels, of which
    nearly every box is the whole, the cells of a grid over the image come after them.
    """
    boxes_P4 = _distinct(boxes_P4)
    if len(boxes_P4) >= num:
        return boxes_P4
    side = math.isqrt(num - 1) + 1
    xs, ys = (torch.linspace(0, length, side + 1, device=boxes_P4.device) for length in (width, height))
    low_N2, high_N2 = torch.cartesian_prod(xs[:-1], ys[:-1]), torch.cartesian_prod(xs[1:], ys[1:])
    return _distinct(torch.cat([boxes_P4, torch.cat([low_N2, high_N2], 1)]))


def _distinct(boxes_P4: Tensor) -> Tensor:
    is_same_PP = (boxes_P4[:, None] == boxes_P4[None]).all(2)
    return boxes_P4[~is_same_PP.tril(-1).any(1)]


def _fix_scales(pool: nn.Module, width: int) -> None:
    """Let the pooling learn how much smaller than the image its maps are.

    It infers that from the first image it sees, wrongly if that is much narrower than its padding, and never again: all
    later features would depend on it.
    """
    side = 32 << LEVELS
    maps = {str(level): torch.zeros(1, width, side >> level + 2, side >> level + 2) for level in range(LEVELS)}
    pool(maps, [torch.tensor([[0.0, 0.0, side, side]])], [(side, side)])


def _is_from_before_eps(weights: Path, architecture: str) -> bool:
    """Whether these are torchvision's own first weights, for which it sets epsilon of batch normalisation to zero.

    They are known by their content, since the file may have been brought by hand.
    """
    if architecture != "fasterrcnn_resnet50_fpn":
        return False
    checksum = image_weights.CHECKSUM.search(get_model_weights(architecture).COCO_V1.url)
    return checksum is not None and storage.sha256(weights).startswith(checksum[1])


class Extractor:
    """Reads images for a detector of its own, in a process of its own."""

    def __init__(self, config: DetectorConfig, weights: Path, dtype: str, device: str) -> None:
        self.config, self.weights, self.dtype, self.device = config, weights, dtype, device

    @cached_property
    def detector(self) -> Detector:
        """Made when it is first needed: what is wrong with the weights is then the answer to a task, which reaches who
        asked. On a CPU it works in one thread, so that sums have the same order however many actors there are."""
        if self.device == "cpu":
            torch.set_num_threads(1)
        return Detector(self.config, self.weights, self.device)

    def extract(self, images: list[tuple[int, str]]) -> Chunk:
        """Regions of the images, (id, file) each, that can be read, in their order.

        Raises:
            ConfigError: a batch does not fit the GPU.
            DataError: the weights cannot be used, or what they make cannot be written as numbers of the wanted type.
        """
        quarantine: list[dict[str, Any]] = []
        try:
            regions = self.detector.detect(_read(images, quarantine))
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{self.config.batch_size} images at a time do not fit the GPU's memory: set detector.batch_size lower"
            ) from error
        with np.errstate(over="ignore"):
            ims = regions.features.numpy().astype(self.dtype)
        if not np.isfinite(ims).all():
            raise DataError(
                f"{self.weights}: its features are not finite numbers in {self.dtype}. Set dtype=float32; if they are "
                "not finite then either, the weights are damaged."
            )
        return Chunk(ims, regions.boxes.numpy(), regions.scores.numpy(), quarantine)


def _read(images: list[tuple[int, str]], quarantine: list[dict[str, Any]]) -> Iterator[Tensor]:
    """The images that can be read, (3,H,W) uint8; the others are added to `quarantine`."""
    for image_id, path in images:
        try:
            image = read_rgb(read_file(Path(path)))
        except (OSError, BadImageError) as error:
            reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
            quarantine.append({"image_id": image_id, "caption_id": None, "path": path, "reason": reason})
        else:
            yield pil_to_tensor(image)
