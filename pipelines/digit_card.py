"""The data card of `digits`: what the set is, what its captions mean and how ambiguous they were found to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from setwise.pipelines.digit_captions import CAPTIONS_PER_SCENE, MAX_WORDS, MIN_WORDS
from setwise.pipelines.digit_scenes import (
    APART_LIMIT,
    APART_MARGIN,
    BAND_LIMITS,
    BAND_MARGIN,
    COLOURS,
    SIZES,
    handwriting,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from setwise.pipelines.digits import CaptionedScene, DigitsConfig

SCANS_URL = "https://doi.org/10.24432/C50P49"


@dataclass(frozen=True, slots=True)
class Ambiguity:
    """How many images each of some captions is true of, its own among them."""

    images: int
    captions: int
    ambiguous: float  # share of the captions that are true of more than one of the images
    mean_positives: float
    most_positives: int


def ambiguity(positives: list[NDArray[np.int64]], images: int) -> Ambiguity:
    """How ambiguous the captions of the first `images` scenes are among those scenes."""
    captions = images * CAPTIONS_PER_SCENE
    counts = [int((scenes < images).sum()) for scenes in positives[:captions]]
    ambiguous = sum(count > 1 for count in counts) / captions
    return Ambiguity(images, captions, ambiguous, sum(counts) / captions, max(counts))


def data_card(
    config: DigitsConfig, composed: dict[str, list[CaptionedScene]], positives: list[NDArray[np.int64]]
) -> str:
    """What the data set is, what its captions mean, what was measured of it, and what it is not."""
    hand = handwriting()
    captions = [caption for items in composed.values() for item in items for caption in item.captions]
    lengths = [len(caption.tokens) for caption in captions]
    splits = "\n".join(
        f"| {split} | {len(items):,} | {CAPTIONS_PER_SCENE * len(items):,} | {sum(map(len, hand.allotted[split])):,} |"
        for split, items in composed.items()
    )
    measures = (ambiguity(positives, images) for images in sorted({min(1000, config.test), config.test}))
    measured = "\n".join(
        f"| first {found.images:,} | {found.captions:,} | {found.ambiguous:.1%} | {found.mean_positives:.2f} "
        f"| {found.most_positives:,} |"
        for found in measures
    )
    return f"""# Data card: digits

Synthetic scenes of real handwriting, each with {CAPTIONS_PER_SCENE} generated English captions, in the file formats of
COCO. One image has many captions and one caption may be true of many images; which ones is known exactly. It is for
trying and testing image-text retrieval on a small machine without a download. Results on it say nothing about
photographs.

| split | images | captions | scans it may use |
| --- | --: | --: | --: |
{splits}

Images are JPEG, {config.image_size} x {config.image_size} pixels, quality {config.jpeg_quality}, colour not subsampled.
Made with seed {config.seed}; equal configurations give equal bytes with equal versions of numpy, Pillow and
scikit-learn. A scene depends on seed, split and index only, so a larger set begins with the smaller one.

## Where the handwriting comes from

scikit-learn's `load_digits`: 1,797 scans of 8 x 8 cells, the test part of "Optical Recognition of Handwritten Digits"
by E. Alpaydin and C. Kaynak (1998), UCI Machine Learning Repository, {SCANS_URL}, licensed
CC BY 4.0. Scenes, colours and captions are synthetic.

Of each value the first 60 % of the scans are for training, the next 10 % for validation
and the last 30 % for the test: no split shows a scan that another one shows. Who wrote which scan is not known, so
one person's hand may be in several splits.

## Scenes

Two to four digits that do not touch, each enlarged from its scan and tinted in one colour. All lengths are fractions
of the image's side.

- Colours: {", ".join(COLOURS)}. White and yellow only on a dark ground.
- Heights: small {SIZES["small"][0]:.2f} to {SIZES["small"][1]:.2f}, large {SIZES["large"][0]:.2f} to \
{SIZES["large"][1]:.2f}, nothing between (rounded to pixels).

## What captions say, and when they are true

A caption is {MIN_WORDS} to {MAX_WORDS} words long (mean {sum(lengths) / len(lengths):.1f}), of a vocabulary of \
{len({word for caption in captions for word in caption.tokens})}. It names some of the scene and leaves the rest
unsaid:

    a big red five in the middle
    a green two and a red five
    a white eight, a small blue seven and a green six
    a small red three above a green seven
    a white six, and a red three left of a green seven
    two yellow digits and a red five
    three digits including a large red five at the top

- "a red three": at least one digit is a three and red. "a number", "a digit": of any value. Colour or size unsaid: any.
- Several things named with "a" are as many different digits.
- "two yellow digits", "three small numbers", "four digits": exactly so many of that kind in the whole scene.
- A digit's place is that of the centre of its box. Left: below {BAND_LIMITS[0]} of the width; right: above
  {BAND_LIMITS[1]}; top and bottom likewise, of the height. A corner: both. The centre or middle: between the limits
  both ways. "On the left" is also true of a digit in a left corner.
- Above (over), below (beneath, under), left of, right of: the two centres differ by more than {APART_LIMIT} along that
  axis; how far they are apart along the other one does not matter. The writer names the axis of the greater difference.
- A relation joins the two digits it stands between; in "a white six, and a red three left of ..." the six is anywhere.
- Synonyms mean the same: large and big, small and tiny, "three" and "number three".

Nothing is borderline: in no scene is a centre within {BAND_MARGIN} of a limit of places, nor a difference of two
centres within {APART_MARGIN} of the limit of relations. Words and truth are made from one structure, and the truth of
every test caption was computed for every test scene.

## How ambiguous it is

| test images | captions | true of more than one | mean images per caption | most |
| --- | --: | --: | --: | --: |
{measured}

A caption's own image is counted.

## Files

- `annotations/captions_train.json`, `captions_val.json`: COCO captions. As in COCO, `val` holds both the validation and
  the test images. An image's id is 1,000,000 (train), 2,000,000 (val) or 3,000,000 (test) plus its index; a caption's
  is ten times its image's plus 0 to {CAPTIONS_PER_SCENE - 1}.
- `images/train`, `images/val`: the JPEG files.
- `dataset_digits.json`: the Karpathy layout with the three splits; `filepath` is the folder under `images`, a `sentid`
  is the id of the COCO annotation.
- `extended_positives/image_to_caption.json`, `caption_to_image.json`: for each test image all test captions that are
  true of it, and the reverse; ids as in COCO, keys as strings, the original pairs included.
- `scenes.json`: for each image the digits with value, colour, size, `box` (x, y, width, height in pixels: the digit's
  height is the box's) and `scan` (its number in `load_digits`). The stroke inside a box is
  `setwise.pipelines.digit_scenes.ink_coverage(handwriting().inks[scan], width, height)`.

## Limits

Ten values, {len(COLOURS)} colours and a grammar of seven forms are a small world: a model can learn all its words.
Captions never err, never say what is missing and never mention the ground. Some scans are hard to read for people too.
Light grounds occur only with colours that stand out from them, so the ground tells a little about the digits.
"""
