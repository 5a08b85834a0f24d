"""The square of an image that an encoder sees: in training cut out at random, in evaluation always the same.

Scaled bilinearly with antialiasing, as by torchvision's transforms, which the authors use; pixels stay uint8, for which
torch has vectorised code.

Shapes: pixels (H, W, 3) uint8 as they are decoded; a view (3, S, S) uint8 with S = `data.image_size`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from setwise.pipelines.recipe import DataConfig

Box = tuple[int, int, int, int]
"""Left, top, right, bottom: the pixels from left to right - 1, and from top to bottom - 1."""
ASPECTS = (3 / 4, 4 / 3)
TRIES = 10


def training_view(pixels: np.ndarray, data: DataConfig, random: np.random.Generator) -> Tensor:
    """A square of `data.image_size` pixels: a part of `data.crop_scale` of the area, perhaps mirrored.

    A pure function of its arguments; without `crop_scale` and `flip` it is the view of evaluation, and draws nothing.
    """
    if data.crop_scale is None:
        view = evaluation_view(pixels, data)
    else:
        height, width = pixels.shape[:2]
        view = _scaled(pixels, random_box(width, height, data.crop_scale, random), data.image_size)
    return view.flip(-1) if data.flip and random.random() < 0.5 else view


def random_box(width: int, height: int, scale: tuple[float, float], random: np.random.Generator) -> Box:
    """A rectangle inside (width, height) of a share of its area within `scale`, 3:4 to 4:3 in shape, evenly in the
    logarithm (Szegedy et al., "Going deeper with convolutions", 2015, section 6).

    Where ten draws do not fit into the image, the middle of it in the nearest shape that does.
    """
    for _ in range(TRIES):
        area = width * height * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(ASPECTS[0]), math.log(ASPECTS[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    return _middle(width, height, min(width, round(height * ASPECTS[1])), min(height, round(width / ASPECTS[0])))


def evaluation_view(pixels: np.ndarray, data: DataConfig) -> Tensor:
    """A square of `data.image_size` pixels: the middle one, or the whole image pressed into it.

    With `data.eval_shorter_side` the image is as if scaled to that first, so that the middle square leaves out a
    border.
    """
    height, width = pixels.shape[:2]
    if data.eval_view == "squash":
        return _scaled(pixels, (0, 0, width, height), data.image_size)
    side = min(width, height)
    if data.eval_shorter_side is not None:
        side = max(1, round(side * data.image_size / data.eval_shorter_side))
    return _scaled(pixels, _middle(width, height, side, side), data.image_size)


def _middle(width: int, height: int, w: int, h: int) -> Box:
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _scaled(pixels: np.ndarray, box: Box, side: int) -> Tensor:
    """The part in `box` as a square of `side` pixels; untouched where it is one already."""
    left, top, right, bottom = box
    part = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)
    if part.shape[1:] == (side, side):
        return part
    return functional.interpolate(part[None], (side, side), mode="bilinear", antialias=True)[0]
