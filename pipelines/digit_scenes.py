"""Scenes of the data set `digits`: which handwriting stands where, and the pixels that show it.

A scene is drawn in two steps that use separate random streams: the scene graph (values, colours, sizes, boxes), from
which captions and their truth follow, and the pixels. Lengths of the graph are fractions of the image's side, so that
one definition of "small", "left" or "above" serves every image size.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SPLITS = ("train", "val", "test")
MAX_DIGITS = 4

# Hues far enough apart to be named at a glance on a stroke two pixels wide.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (226, 30, 38),
    "yellow": (255, 232, 40),
    "green": (34, 176, 60),
    "blue": (52, 110, 255),
    "purple": (170, 74, 238),
    "white": (250, 250, 250),
}
# Height of a digit as a fraction of the side. No digit is taller than the one range and lower than the other.
SIZES: dict[str, tuple[float, float]] = {"small": (0.26, 0.31), "large": (0.40, 0.48)}

# A centre is in the first, middle or last band of an axis, and two centres differ along it or do not. No centre and no
# difference of any scene comes nearer to its limit than the margin: nothing that a caption can say is ever borderline.
BAND_LIMITS = (0.35, 0.65)
BAND_MARGIN = 0.03
APART_LIMIT = 0.18
APART_MARGIN = 0.04

_DARK_GROUNDS = ((16, 16, 18), (50, 52, 58), (18, 26, 62), (16, 50, 44), (66, 44, 30), (74, 78, 86))
_LIGHT_GROUNDS = ((206, 208, 212), (242, 234, 212), (250, 250, 250))
_DEEP_COLOURS = frozenset({"red", "green", "blue", "purple"})  # these are told from a light ground too


@dataclass(frozen=True, slots=True)
class Digit:
    """One handwritten digit in a scene. `box` is x, y, width, height in pixels; `scan` counts in load_digits' order."""

    value: int
    colour: str
    size: str
    scan: int
    box: tuple[int, int, int, int]

    def centre(self, side: int) -> tuple[float, float]:
        x, y, width, height = self.box
        return (x + width / 2) / side, (y + height / 2) / side


@dataclass(frozen=True, slots=True)
class Scene:
    split: str
    index: int
    side: int
    digits: tuple[Digit, ...]


@dataclass(frozen=True)
class Handwriting:
    """The scans, cut to their ink, and for each split and value the numbers of the scans that only it may use."""

    inks: tuple[NDArray[np.uint8], ...]
    allotted: dict[str, tuple[tuple[int, ...], ...]]


@functools.cache
def handwriting() -> Handwriting:
    """scikit-learn's 1,797 scans; of each value 60 % are for training, 10 % for validation, 30 % for the test.

    The division goes by the order of the file and not by a seed: sets of different seeds can be mixed, and still no
    test scene shows handwriting that a training scene shows.
    """
    import numpy as np
    from sklearn.datasets import load_digits

    data = load_digits()
    inks = []
    for scan in data.images:
        rows, columns = np.flatnonzero(scan.any(axis=1)), np.flatnonzero(scan.any(axis=0))
        ink = scan[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        inks.append(np.rint(ink * (255 / 16)).astype(np.uint8))
    parts: dict[str, list[tuple[int, ...]]] = {split: [] for split in SPLITS}
    for value in range(10):
        scans = [int(scan) for scan in np.flatnonzero(data.target == value)]
        first, second = round(0.6 * len(scans)), round(0.7 * len(scans))
        for split, part in zip(SPLITS, (scans[:first], scans[first:second], scans[second:]), strict=True):
            parts[split].append(tuple(part))
    return Handwriting(tuple(inks), {split: tuple(part) for split, part in parts.items()})


def stream(seed: int, split: str, index: int, purpose: str) -> random.Random:
    """The random numbers of one scene for one purpose: the same in every process and whatever the set's size."""
    return random.Random(f"digits/{seed}/{split}/{index}/{purpose}")


def draw_scene(hand: Handwriting, split: str, index: int, side: int, seed: int) -> Scene:
    """Two to four digits that do not touch, none of them at a borderline place or in a borderline relation."""
    rng = stream(seed, split, index, "scene")
    number = rng.randint(2, MAX_DIGITS)
    while True:
        digits: list[Digit] = []
        while len(digits) < number:
            placed = _draw_digit(hand, split, side, digits, rng)
            if placed is None:  # no room left: start the scene anew
                break
            digits.append(placed)
        else:
            return Scene(split, index, side, tuple(digits))


def _draw_digit(hand: Handwriting, split: str, side: int, others: list[Digit], rng: random.Random) -> Digit | None:
    value, colour, size = rng.randrange(10), rng.choice(list(COLOURS)), rng.choice(list(SIZES))
    scan = rng.choice(hand.allotted[split][value])
    height = round(rng.uniform(*SIZES[size]) * side)
    rows, columns = hand.inks[scan].shape
    width = max(1, round(height * columns / rows))
    for _ in range(60):
        box = (rng.randint(1, side - width - 1), rng.randint(1, side - height - 1), width, height)
        digit = Digit(value, colour, size, scan, box)
        if _is_clear(digit, others, side):
            return digit
    return None


def _is_clear(digit: Digit, others: list[Digit], side: int) -> bool:
    centre = digit.centre(side)
    if any(abs(at - limit) < BAND_MARGIN for at in centre for limit in BAND_LIMITS):
        return False
    x, y, width, height = digit.box
    gap = max(1, side // 64)
    for other in others:
        for here, there in zip(centre, other.centre(side), strict=True):
            if abs(abs(here - there) - APART_LIMIT) < APART_MARGIN:
                return False
        other_x, other_y, other_width, other_height = other.box
        beside = x >= other_x + other_width + gap or other_x >= x + width + gap
        if not beside and y < other_y + other_height + gap and other_y < y + height + gap:
            return False
    return True


def ink_coverage(ink: NDArray[np.uint8], width: int, height: int) -> NDArray[np.float32]:
    """How much of each pixel of a digit's box its stroke covers (0-1): what masks of the scenes are made from."""
    import numpy as np
    from PIL import Image

    grey = Image.fromarray(ink).resize((width, height), Image.Resampling.BICUBIC)
    level = np.asarray(grey, dtype=np.float32) / 255
    # The scans count ink in cells of 4 x 4, so an enlarged stroke is a blur: this slope gives it an edge again.
    coverage: NDArray[np.float32] = np.clip((level - 0.36) / 0.30, 0.0, 1.0)
    return coverage


def render(scene: Scene, hand: Handwriting, seed: int) -> NDArray[np.uint8]:
    """The scene's pixels (side, side, 3): coloured strokes on a plain, shaded or grainy ground."""
    import numpy as np

    rng = stream(seed, scene.split, scene.index, "pixels")
    pixels = _ground(scene, rng)
    for digit in scene.digits:
        x, y, width, height = digit.box
        brightness = rng.uniform(0.93, 1.0)
        colour = np.array(COLOURS[digit.colour], dtype=np.float32) * brightness
        coverage = ink_coverage(hand.inks[digit.scan], width, height)[:, :, None]
        patch = pixels[y : y + height, x : x + width]
        patch += coverage * (colour - patch)
    result: NDArray[np.uint8] = np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)
    return result


def _ground(scene: Scene, rng: random.Random) -> NDArray[np.float32]:
    import numpy as np

    side = scene.side
    deep = all(digit.colour in _DEEP_COLOURS for digit in scene.digits)
    pixels = np.empty((side, side, 3), dtype=np.float32)
    pixels[:] = rng.choice(_LIGHT_GROUNDS if deep and rng.random() < 0.6 else _DARK_GROUNDS)
    kind = rng.choice(("plain", "shaded", "grainy"))
    if kind == "shaded":
        slope = np.linspace(-16.0, 16.0, side, dtype=np.float32) * rng.choice((-1.0, 1.0))
        pixels += slope[:, None, None] if rng.random() < 0.5 else slope[None, :, None]
    elif kind == "grainy":
        noise = np.random.default_rng(rng.getrandbits(64))
        pixels += noise.normal(0.0, 9.0, (side, side, 1)).astype(np.float32)
    return pixels
