"""The embedded data set `digits`: scenes of real handwriting with five captions each, in the file formats of COCO.

Nothing is downloaded: the handwriting is scikit-learn's `load_digits`. digit_scenes draws scenes and pixels,
digit_captions writes captions and knows of which scenes they are true; this file makes a data set of them:

    annotations/captions_{train,val}.json      COCO captions; as in COCO, val holds Karpathy's val and test images
    images/{train,val}/*.jpg
    dataset_digits.json                        the Karpathy split; a sentid is the id of a COCO annotation
    extended_positives/{image_to_caption,caption_to_image}.json    ECCV Caption's layout, test split only
    scenes.json                                the digits of every image, with their boxes
    DATA_CARD.md
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from setwise.pipelines.digit_captions import Caption, SceneTable, write_captions
from setwise.pipelines.digit_card import SCANS_URL, data_card
from setwise.pipelines.digit_scenes import SPLITS, Scene, draw_scene, handwriting, ink_coverage, render

if TYPE_CHECKING:
    import pathlib

    import numpy as np
    from numpy.typing import NDArray

# Ids depend on split and index alone, so the same scene keeps its ids in a larger set.
_FIRST_IMAGE_ID = {"train": 1_000_000, "val": 2_000_000, "test": 3_000_000}
GENERATED = "generated.json"
"""The file that says how a data set was drawn; `setwise data prepare digits` writes it beside the others."""
_COCO_PART = {"train": "train", "val": "val", "test": "val"}


class DigitsConfig(BaseModel):
    """How many scenes of each split, and how they are drawn. Equal configurations give equal bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: int = Field(6000, ge=1, le=200_000, description="training images")
    val: int = Field(500, ge=1, le=20_000, description="validation images")
    test: int = Field(5000, ge=1, le=20_000, description="test images, each compared with each test caption")
    image_size: int = Field(64, ge=64, le=512, description="side of the square images in pixels")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of scenes, captions and pixels")
    jpeg_quality: int = Field(95, ge=75, le=100, description="quality of the JPEG files")


@dataclass(frozen=True, slots=True)
class CaptionedScene:
    scene: Scene
    captions: tuple[Caption, ...]

    @property
    def image_id(self) -> int:
        return _FIRST_IMAGE_ID[self.scene.split] + self.scene.index

    @property
    def caption_ids(self) -> list[int]:
        return [10 * self.image_id + position for position in range(len(self.captions))]

    @property
    def file_name(self) -> str:
        return f"digits_{self.scene.split}_{self.scene.index:06d}.jpg"


def compose(config: DigitsConfig, split: str) -> list[CaptionedScene]:
    """The scenes of a split with their captions, without drawing a pixel. A longer split begins with a shorter one."""
    hand = handwriting()
    composed = []
    for index in range({"train": config.train, "val": config.val, "test": config.test}[split]):
        scene = draw_scene(hand, split, index, config.image_size, config.seed)
        composed.append(CaptionedScene(scene, write_captions(scene, config.seed)))
    return composed


def extended_positives(composed: list[CaptionedScene]) -> list[NDArray[np.int64]]:
    """For each caption, in order, the positions of all scenes it is true of, its own among them."""
    table = SceneTable([item.scene for item in composed])
    return [table.true_scenes(caption.statement) for item in composed for caption in item.captions]


def generate(folder: pathlib.Path, config: DigitsConfig) -> None:
    """Write the data set into a new or empty folder. What is there after an exception is incomplete."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: the digits are written into a new or empty folder")
    composed = {split: compose(config, split) for split in SPLITS}
    everything = [item for split in SPLITS for item in composed[split]]
    for part in ("train", "val"):
        items = [item for item in everything if _COCO_PART[item.scene.split] == part]
        _write_json(folder / "annotations" / f"captions_{part}.json", _coco(items, config))
        _write_images(folder / "images" / part, items, config)
    _write_json(folder / "dataset_digits.json", _karpathy(everything))
    _write_json(folder / "scenes.json", _scene_graphs(everything, config))
    positives = extended_positives(composed["test"])
    for name, mapping in _eccv(composed["test"], positives).items():
        _write_json(folder / "extended_positives" / f"{name}.json", mapping)
    card = data_card(config, composed, positives)
    (folder / "DATA_CARD.md").write_text(card, encoding="utf-8")


def generated(source: pathlib.Path) -> DigitsConfig | None:
    """How the data set whose files are in `source` was drawn; None where that is not written there."""
    try:
        written = json.loads((source / GENERATED).read_bytes())
        return DigitsConfig.model_validate(written["generator"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def object_mask(image_id: int, config: DigitsConfig) -> NDArray[np.int64]:
    """Which digit each pixel of an image shows, (side, side): 0 where its ground does, else 1, 2, ... in the scene's
    order. A pixel belongs to a digit if its stroke covers half of it. The scene is drawn again, so nothing is read.

    Raises ValueError for an id that no image of such a data set has.
    """
    import numpy as np

    split = next((name for name, first in _FIRST_IMAGE_ID.items() if 0 <= image_id - first < 1_000_000), None)
    if split is None or image_id - _FIRST_IMAGE_ID[split] >= getattr(config, split):
        raise ValueError(f"image id {image_id} is none of this data set")
    hand, side = handwriting(), config.image_size
    scene = draw_scene(hand, split, image_id - _FIRST_IMAGE_ID[split], side, config.seed)
    mask = np.zeros((side, side), np.int64)
    for number, digit in enumerate(scene.digits, start=1):
        x, y, width, height = digit.box
        mask[y : y + height, x : x + width][ink_coverage(hand.inks[digit.scan], width, height) >= 0.5] = number
    return mask


def _write_images(folder: pathlib.Path, items: list[CaptionedScene], config: DigitsConfig) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    hand = handwriting()
    for item in items:
        image = Image.fromarray(render(item.scene, hand, config.seed))
        # Full colour resolution (4:4:4): halved, strokes two pixels wide would lose their colour.
        image.save(folder / item.file_name, "JPEG", quality=config.jpeg_quality, subsampling=0)


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def _coco(items: list[CaptionedScene], config: DigitsConfig) -> dict[str, Any]:
    return {
        "info": {
            "description": "setwise digits: synthetic scenes of real handwritten digits",
            "url": SCANS_URL,
            "version": "1",
            "contributor": "handwriting: E. Alpaydin and C. Kaynak",
        },
        "licenses": [
            {"id": 1, "name": "CC BY 4.0 (handwriting)", "url": "https://creativecommons.org/licenses/by/4.0/"}
        ],
        "images": [
            {
                "id": item.image_id,
                "file_name": item.file_name,
                "height": config.image_size,
                "width": config.image_size,
                "license": 1,
            }
            for item in items
        ],
        "annotations": [
            {"id": caption_id, "image_id": item.image_id, "caption": caption.text}
            for item in items
            for caption_id, caption in zip(item.caption_ids, item.captions, strict=True)
        ],
    }


def _karpathy(items: list[CaptionedScene]) -> dict[str, Any]:
    images = []
    for imgid, item in enumerate(items):
        sentences = [
            {"tokens": caption.tokens, "raw": caption.text, "imgid": imgid, "sentid": sentid}
            for sentid, caption in zip(item.caption_ids, item.captions, strict=True)
        ]
        images.append(
            {
                "filename": item.file_name,
                "filepath": _COCO_PART[item.scene.split],
                "cocoid": item.image_id,
                "split": item.scene.split,
                "imgid": imgid,
                "sentids": item.caption_ids,
                "sentences": sentences,
            }
        )
    return {"dataset": "digits", "images": images}


def _scene_graphs(items: list[CaptionedScene], config: DigitsConfig) -> dict[str, Any]:
    images = []
    for item in items:
        objects = [
            {
                "digit": digit.value,
                "colour": digit.colour,
                "size": digit.size,
                "box": list(digit.box),
                "scan": digit.scan,
            }
            for digit in item.scene.digits
        ]
        images.append(
            {
                "id": item.image_id,
                "file_name": item.file_name,
                "filepath": _COCO_PART[item.scene.split],
                "split": item.scene.split,
                "objects": objects,
            }
        )
    return {"image_size": config.image_size, "images": images}


def _eccv(items: list[CaptionedScene], positives: list[NDArray[np.int64]]) -> dict[str, dict[str, list[int]]]:
    caption_ids = [caption_id for item in items for caption_id in item.caption_ids]
    image_to_caption: dict[str, list[int]] = {str(item.image_id): [] for item in items}
    caption_to_image: dict[str, list[int]] = {}
    for caption_id, scenes in zip(caption_ids, positives, strict=True):
        image_ids = [items[position].image_id for position in scenes.tolist()]
        caption_to_image[str(caption_id)] = image_ids
        for image_id in image_ids:
            image_to_caption[str(image_id)].append(caption_id)
    return {"image_to_caption": image_to_caption, "caption_to_image": caption_to_image}
