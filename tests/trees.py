"""Small data sets in the real formats: COCO, Flickr30K, SCAN's region features, any folder.

Pictures show one coloured shape in a corner, are noisy JPEGs of 40 to 90 pixels, and their captions say what is in
them, so that a training can learn something. COCO's test images have ids and caption ids of the real test split, in
its order.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image, ImageDraw

from setwise.pipelines import coco_captions, positives

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
WORDINGS = (
    "A {colour} {shape} in the {corner}.",
    "There is a {shape} that is {colour}.",
    "In the {corner} corner one sees a {colour} {shape}",
    "{colour} {shape} at the {corner}",
    "The picture shows a {shape}, {colour}, in the {corner}.",
    "One {colour} thing: a {shape}.",
    "Somebody put a {colour} {shape} at the {corner}.",
)


@dataclass(frozen=True)
class Picture:
    """What an image shows, and how it is listed. `part` is train2014 or val2014."""

    split: str
    colour: str
    shape: str
    corner: str
    image_id: int
    caption_ids: tuple[int, ...]
    file_name: str
    part: str

    @property
    def captions(self) -> list[str]:
        words = {"colour": self.colour, "shape": self.shape, "corner": self.corner}
        return [wording.format(**words) for wording in WORDINGS[: len(self.caption_ids)]]

    def draw(self) -> Image.Image:
        generator = np.random.default_rng(self.image_id)
        width, height = (int(side) for side in generator.integers(40, 91, 2))
        image = Image.new("RGB", (width, height), (128, 120, 110))
        left = 0.1 if "left" in self.corner else 0.5
        top = 0.1 if "top" in self.corner else 0.5
        box = [left * width, top * height, (left + 0.4) * width, (top + 0.4) * height]
        pen, fill = ImageDraw.Draw(image), COLOURS[self.colour]
        if self.shape == "circle":
            pen.ellipse(box, fill)
        elif self.shape == "square":
            pen.rectangle(box, fill)
        else:
            pen.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) / 2, box[1])], fill)
        noisy = np.asarray(image) + generator.normal(0, 6, (height, width, 3))
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))

    def regions(self, regions: int, width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Features (regions, width) as a detector might find them: half of the regions show the shape."""
        generator = np.random.default_rng(self.image_id)
        features = generator.normal(0, 0.1, (regions, width)).astype(np.float32)
        shown = [list(COLOURS).index(self.colour), len(COLOURS) + SHAPES.index(self.shape)]
        shown.append(len(COLOURS) + len(SHAPES) + CORNERS.index(self.corner))
        features[: (regions + 1) // 2, [place % width for place in shown]] += 1
        return generator.permutation(features)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.draw().save(folder / self.file_name, quality=92)


def coco_pictures(
    train: int = 12, restval: int = 4, val: int = 5, test: int = 10, many_captions: int = 2, seed: int = 0
) -> list[Picture]:
    """Images as in COCO: the splits of val2014 mixed, then those of train2014.

    Test images are the first of the real test split. So many of the training images have six or seven captions.
    """
    ids = coco_captions.packaged_test_ids()[: 5 * test]
    image_of = json.loads((positives.package_data() / positives.TEST_CAPTIONS).read_bytes())
    generator = np.random.default_rng(seed)
    splits = ["test"] * test + ["val"] * val + ["restval"] * restval
    splits = [splits[place] for place in generator.permutation(len(splits))] + ["train"] * train
    pictures = []
    tested = 0
    for number, split in enumerate(splits):
        part = "train2014" if split == "train" else "val2014"
        captions = 5
        if split == "test":
            caption_ids = tuple(ids[5 * tested : 5 * tested + 5])
            image_id = int(image_of[str(caption_ids[0])][0])
            tested += 1
        else:
            trained = number - (len(splits) - train)
            captions += 1 + trained % 2 if 0 <= trained < many_captions else 0
            image_id = 1_000_000 + number
            caption_ids = tuple(10 * image_id + place for place in range(captions))
        name = f"COCO_{part}_{image_id:012d}.jpg"
        pictures.append(Picture(split, *_choice(generator), image_id, caption_ids, name, part))
    return pictures


def flickr30k_pictures(train: int = 12, val: int = 5, test: int = 10, seed: int = 0) -> list[Picture]:
    """Images as in Flickr30K: ids count from zero."""
    generator = np.random.default_rng(seed)
    splits = ["train"] * train + ["val"] * val + ["test"] * test
    splits = [splits[place] for place in generator.permutation(len(splits))]
    return [
        Picture(
            split,
            *_choice(generator),
            number,
            tuple(range(5 * number, 5 * number + 5)),
            f"{1_000_092_795 + 37 * number}.jpg",
            "",
        )
        for number, split in enumerate(splits)
    ]


def _choice(generator: np.random.Generator) -> tuple[str, str, str]:
    colour, shape, corner = (generator.choice(names) for names in (list(COLOURS), SHAPES, CORNERS))
    return str(colour), str(shape), str(corner)


def karpathy_json(name: str, pictures: Sequence[Picture]) -> dict[str, Any]:
    images = []
    for imgid, picture in enumerate(pictures):
        entry: dict[str, Any] = {
            "sentids": list(picture.caption_ids),
            "imgid": imgid,
            "sentences": [
                {"tokens": text.lower().replace(".", "").split(), "raw": text, "imgid": imgid, "sentid": sentid}
                for text, sentid in zip(picture.captions, picture.caption_ids, strict=True)
            ],
            "split": picture.split,
            "filename": picture.file_name,
        }
        if picture.part:
            entry |= {"filepath": picture.part, "cocoid": picture.image_id}
        images.append(entry)
    return {"images": images, "dataset": name}


def coco_karpathy(folder: Path, pictures: Sequence[Picture] | None = None, images: str = "images") -> list[Picture]:
    """COCO with `dataset_coco.json`; the images in `images/{train2014,val2014}`."""
    pictures = list(pictures or coco_pictures())
    for picture in pictures:
        picture.save(folder / images / picture.part)
    _write_json(folder / "dataset_coco.json", karpathy_json("coco", pictures))
    return pictures


def coco_annotations(
    folder: Path, pictures: Sequence[Picture] | None = None, ids: Iterable[str] = ("train", "restval", "dev", "test")
) -> list[Picture]:
    """COCO with its publishers' annotations, and the id files `ids` of the authors beside them."""
    pictures = list(pictures or coco_pictures(many_captions=0))
    for part in ("train2014", "val2014"):
        own = [picture for picture in pictures if picture.part == part]
        for picture in own:
            picture.save(folder / "images" / part)
        annotations = [
            {"image_id": picture.image_id, "id": caption_id, "caption": text}
            for picture in own
            for caption_id, text in zip(picture.caption_ids, picture.captions, strict=True)
        ]
        content = {
            "info": {"description": "COCO 2014 Dataset", "year": 2014},
            "images": [
                {"license": 1, "file_name": picture.file_name, "id": picture.image_id, "height": 64, "width": 64}
                for picture in own
            ],
            "licenses": [{"id": 1, "name": "made for a test"}],
            # As published, an image's captions do not stand together.
            "annotations": sorted(annotations, key=lambda entry: int(str(entry["id"])[::-1])),
        }
        _write_json(folder / "annotations" / f"captions_{part}.json", content)
    for split in ids:
        own = [picture for picture in pictures if picture.split == ("val" if split == "dev" else split)]
        values = [caption_id for picture in own for caption_id in picture.caption_ids]
        np.save(folder / "annotations" / f"coco_{split}_ids.npy", np.array(values, np.int64))
    return pictures


def flickr30k(
    folder: Path, pictures: Sequence[Picture] | None = None, images: str = "flickr30k-images"
) -> list[Picture]:
    """Flickr30K with `dataset_flickr30k.json`."""
    pictures = list(pictures or flickr30k_pictures())
    for picture in pictures:
        picture.save(folder / images)
    _write_json(folder / "dataset_flickr30k.json", karpathy_json("flickr30k", pictures))
    return pictures


def scan_features(
    folder: Path,
    pictures: Sequence[Picture] | None = None,
    regions: int = 6,
    width: int = 16,
    ids: bool = True,
    caption_ids: bool = False,
) -> list[Picture]:
    """Region features as SCAN's authors ship them: once an image in train, five times in dev, test and testall.

    `test` has the first fifth of `testall`. `ids` and `caption_ids`: whether `_ids.txt` and `_capids.txt` are written.
    """
    pictures = list(pictures or coco_pictures(many_captions=0))
    folder.mkdir(parents=True, exist_ok=True)
    groups = {"train": [picture for picture in pictures if picture.split in ("train", "restval")]}
    groups |= {"dev": [picture for picture in pictures if picture.split == "val"]}
    groups |= {"testall": [picture for picture in pictures if picture.split == "test"]}
    groups |= {"test": groups["testall"][: max(1, len(groups["testall"]) // 5)]}
    for stem, own in groups.items():
        times = 1 if stem == "train" else 5
        features = np.stack([picture.regions(regions, width) for picture in own for _ in range(times)])
        np.save(folder / f"{stem}_ims.npy", features)
        lines = [" ".join(text.replace(".", " .").split()) for picture in own for text in picture.captions[:5]]
        (folder / f"{stem}_caps.txt").write_text("".join(f"{line}\n" for line in lines))
        if ids:
            values = [picture.image_id for picture in own for _ in range(times)]
            (folder / f"{stem}_ids.txt").write_text("".join(f"{value}\n" for value in values))
        if caption_ids:
            values = [caption_id for picture in own for caption_id in picture.caption_ids[:5]]
            (folder / f"{stem}_capids.txt").write_text("".join(f"{value}\n" for value in values))
    return pictures


def any_folder(
    folder: Path, pictures: Sequence[Picture] | None = None, form: str = "csv", splits: bool = True
) -> list[Picture]:
    """A folder of images with captions.csv, .jsonl or .parquet; images have one to seven captions."""
    if pictures is None:
        pictures = [
            Picture(p.split, p.colour, p.shape, p.corner, p.image_id, tuple(range(1 + n % 7)), f"photo {n}.jpg", "")
            for n, p in enumerate(flickr30k_pictures())
        ]
    for picture in pictures:
        picture.save(folder)
    rows = [
        {"image": picture.file_name, "caption": text} | ({"split": picture.split} if splits else {})
        for picture in pictures
        for text in picture.captions
    ]
    file = folder / f"captions.{form}"
    if form == "csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif form == "jsonl":
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return list(pictures)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
