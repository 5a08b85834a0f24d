"""Views of images: parts of the right sizes and shapes in training, the whole or the middle in evaluation."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from setwise.pipelines import views
from setwise.pipelines.recipe import DataConfig


def gradient(width: int, height: int) -> Image.Image:
    """Red says the column and green the row, in 0..255."""
    red = np.tile(np.linspace(0, 255, width), (height, 1))
    green = np.tile(np.linspace(0, 255, height)[:, None], (1, width))
    return Image.fromarray(np.stack([red, green, 0 * red], axis=-1).astype(np.uint8))


def corners(image: Image.Image) -> list[tuple[int, int]]:
    """Red and green of the first and the last pixel."""
    pixels = np.asarray(image)
    return [tuple(int(value) for value in pixel[:2]) for pixel in (pixels[0, 0], pixels[-1, -1])]


@pytest.mark.parametrize("size", [(640, 480), (100, 300), (1000, 20), (17, 17)])
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
        np.asarray(views.training_view(gradient(200, 150), data, np.random.default_rng(seed))) for seed in (1, 1, 2)
    )
    assert one.shape == (48, 48, 3) and np.array_equal(one, again) and not np.array_equal(one, other)


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
