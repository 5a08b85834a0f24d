"""The square of an image that an encoder sees: in training cut out at random, in evaluation always the same.

Scaled bilinearly, as by torchvision's transforms, which the authors use.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    from setwise.pipelines.recipe import DataConfig

Box = tuple[float, float, float, float]
ASPECTS = (3 / 4, 4 / 3)
TRIES = 10


def training_view(image: Image.Image, data: DataConfig, random: np.random.Generator) -> Image.Image:
    """A square of `data.image_size` pixels: a part of `data.crop_scale` of the area, perhaps mirrored.

    A pure function of its arguments; without `crop_scale` and `flip` it is the view of evaluation, and draws nothing.
    """
    from PIL import Image, ImageOps

    if data.crop_scale is None:
        view = evaluation_view(image, data)
    else:
        box = random_box(*image.size, data.crop_scale, random)
        view = image.resize((data.image_size, data.image_size), Image.Resampling.BILINEAR, box=box)
    return ImageOps.mirror(view) if data.flip and random.random() < 0.5 else view


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
    w = min(width, round(height * ASPECTS[1]))
    h = min(height, round(width / ASPECTS[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def evaluation_view(image: Image.Image, data: DataConfig) -> Image.Image:
    """A square of `data.image_size` pixels: the middle one, or the whole image pressed into it.

    With `data.eval_shorter_side` the image is first scaled to that, so that the middle square leaves out a border.
    """
    from PIL import Image, ImageOps

    size = (data.image_size, data.image_size)
    leaves_border = data.eval_view == "center" and data.eval_shorter_side not in (None, data.image_size)
    if image.size == size and not leaves_border:
        return image
    if data.eval_view == "squash":
        return image.resize(size, Image.Resampling.BILINEAR)
    side = min(image.size)
    if data.eval_shorter_side is not None:
        side = max(1, round(side * data.image_size / data.eval_shorter_side))
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return ImageOps.fit(image, size, Image.Resampling.BILINEAR)
