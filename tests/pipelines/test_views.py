"""Views of images: parts of the right sizes and shapes in training, the whole or the middle in evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from setwise.pipelines import views
from setwise.pipelines.recipe import DataConfig


def gradient(width: int, height: int) -> np.ndarray:
    """Red says the column and green the row, in 0..255."""
    red = np.tile(np.linspace(0, 255, width), (height, 1))
    green = np.tile(np.linspace(0, 255, height)[:, None], (1, width))
    return np.stack([red, green, 0 * red], axis=-1).astype(np.uint8)


def corners(view: Tensor) -> list[tuple[int, int]]:
    """Red and green of the first and the last pixel."""
    first, last = view[:2, 0, 0].tolist(), view[:2, -1, -1].tolist()
    return [(first[0], first[1]), (last[0], last[1])]


@pytest.mark.parametrize("size", [(640, 480), (100, 300), (1000, 20), (17, 17), (1, 1)])
def test_boxes_lie_inside_and_have_the_area_and_shape_asked_for(size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        left, top, right, bottom = views.random_box(*size, (0.2, 0.7), random)
        width, height = right - left, bottom - top
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        if size[0] < 10 * size[1] and size[0] > 50:  # where such boxes exist and rounding is small
            assert 0.19 < width * height / (size[0] * size[1]) < 0.71
            assert 0.73 < width / height < 1.37


def test_areas_are_even_over_the_range_and_both_shapes_occur() -> None:
    random = np.random.default_rng(1)
    boxes = [views.random_box(1000, 1000, (0.1, 0.5), random) for _ in range(2000)]
    areas = np.array([(right - left) * (bottom - top) / 1e6 for left, top, right, bottom in boxes])
    assert np.mean(areas) == pytest.approx(0.3, abs=0.01) and areas.min() < 0.11 and areas.max() > 0.49
    wide = np.mean([right - left > bottom - top for left, top, right, bottom in boxes])
    assert wide == pytest.approx(0.5, abs=0.05)


def test_half_of_the_views_are_mirrored() -> None:
    data = DataConfig(image_size=32, flip=True)
    lefts = [corners(views.training_view(gradient(32, 32), data, np.random.default_rng(n)))[0][0] for n in range(400)]
    assert set(lefts) == {0, 255}
    assert np.mean(np.array(lefts) == 255) == pytest.approx(0.5, abs=0.08)


def test_a_training_view_is_a_function_of_its_random_numbers() -> None:
    data = DataConfig(image_size=48, crop_scale=(0.08, 1), flip=True)
    one, again, other = (
        views.training_view(gradient(200, 150), data, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert one.shape == (3, 48, 48) and one.dtype == torch.uint8
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("seed", range(8))
def test_parts_are_scaled_as_pillow_scales_them(seed: int) -> None:
    """To a step of the 8 bits, for parts larger and smaller than the view."""
    noise = np.random.default_rng(seed).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    data = DataConfig(image_size=96, crop_scale=(0.1, 1))
    box = views.random_box(200, 150, (0.1, 1), np.random.default_rng(seed))
    expected = Image.fromarray(noise).crop(box).resize((96, 96), Image.Resampling.BILINEAR)
    found = views.training_view(noise, data, np.random.default_rng(seed)).permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_an_image_of_the_size_wanted_is_not_touched() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for data in (DataConfig(image_size=64), DataConfig(image_size=64, eval_view="squash")):
        assert np.array_equal(views.evaluation_view(noise, data).permute(1, 2, 0).numpy(), noise)


def test_evaluation_takes_the_middle_leaves_a_border_or_takes_all() -> None:
    image = gradient(512, 256)  # columns 128..383 are the middle
    (left, top), (right, bottom) = corners(views.evaluation_view(image, DataConfig(image_size=64)))
    assert (left, top) == pytest.approx((64, 0), abs=3) and (right, bottom) == pytest.approx((191, 255), abs=3)
    bordered = DataConfig(image_size=224, eval_shorter_side=256)  # 7/8 of the shorter side: rows 16..239
    (left, top), (right, bottom) = corners(views.evaluation_view(image, bordered))
    assert (left, top) == pytest.approx((72, 16), abs=3) and (right, bottom) == pytest.approx((183, 239), abs=3)
    squashed = views.evaluation_view(image, DataConfig(image_size=64, eval_view="squash"))
    assert corners(squashed)[0] == pytest.approx((0, 0), abs=4)
    assert corners(squashed)[1] == pytest.approx((255, 255), abs=4)


def test_an_image_that_has_the_size_already_is_cut_like_any_other() -> None:
    bordered = DataConfig(image_size=224, eval_shorter_side=256)
    for side in (224, 225, 448):
        (left, top), (right, bottom) = corners(views.evaluation_view(gradient(side, side), bordered))
        assert (left, top) == pytest.approx((16, 16), abs=2) and (right, bottom) == pytest.approx((239, 239), abs=2)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (50, 1), (3, 2)])
def test_the_smallest_images_have_views_too(size: tuple[int, int]) -> None:
    data = DataConfig(image_size=64, crop_scale=(0.08, 1), flip=True)
    assert views.evaluation_view(gradient(*size), data).shape == (3, 64, 64)
    assert views.training_view(gradient(*size), data, np.random.default_rng(0)).shape == (3, 64, 64)
