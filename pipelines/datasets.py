"""Reading image-caption data sets from their published files into rows.

A row is one image with its captions. The readers check what they are given and name the file and entry of every
mistake; they decode no image.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from setwise.platform import config
from setwise.platform.config import Settings
from setwise.platform.errors import DataError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Caption:
    caption_id: int
    text: str


@dataclass(frozen=True, slots=True)
class Row:
    """One image and the captions that were written for it.

    `path` is the image file; or, where `place` is given, the `.npy` file of region features, of which `place` is the
    row that belongs to the image.
    """

    image_id: int
    split: str
    path: Path
    captions: tuple[Caption, ...]
    place: int | None = None


def read_karpathy(file: Path, images: Path) -> list[Row]:
    """Rows of a Karpathy-split JSON file: `dataset_coco.json` and its kin.

    Args:
        file: {"dataset", "images": [{"filename", "filepath"?, "split", "imgid", "cocoid"?, "sentences": [...]}]}.
            The split `restval` is read as `train`, as everybody does. Ids are COCO's where the file has them.
        images: folder that `filepath/filename` is relative to.

    Raises:
        DataError: the file is missing, is not of this form, or repeats an id.
    """
    try:
        entries = list(json.loads(file.read_bytes())["images"])
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}). Is the data set in this folder?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not a Karpathy-split file: expected an object with a list 'images'") from error
    rows: list[Row] = []
    seen_images: dict[int, int] = {}
    seen_captions: dict[int, int] = {}
    for index, entry in enumerate(entries):
        try:
            split = "train" if entry["split"] == "restval" else str(entry["split"])
            image_id = int(entry.get("cocoid", entry["imgid"]))
            path = images / entry.get("filepath", "") / entry["filename"]
            captions = tuple(Caption(int(s["sentid"]), s["raw"]) for s in entry["sentences"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(f"{file}: images[{index}] is not complete: {error!r}") from error
        if "\x00" in str(path) or max([image_id, *(caption.caption_id for caption in captions)]) >= 2**63:
            raise DataError(f"{file}: images[{index}] holds a NUL in its name, or an id of more than 64 bits")
        if split not in SPLITS:
            raise DataError(f"{file}: images[{index}] has split '{split}'; known are {', '.join(SPLITS)} and restval")
        if not path.resolve().is_relative_to(images.resolve()):
            raise DataError(f"{file}: images[{index}] names '{path}', which is outside {images}")
        if (first := seen_images.setdefault(image_id, index)) != index:
            raise DataError(f"{file}: images[{first}] and images[{index}] have the same id {image_id}")
        for caption in captions:
            if caption.caption_id in seen_captions:
                first = seen_captions[caption.caption_id]
                raise DataError(f"{file}: caption id {caption.caption_id} is in images[{first}] and in images[{index}]")
            seen_captions[caption.caption_id] = index
        rows.append(Row(image_id, split, path, captions))
    if not rows:
        raise DataError(f"{file}: lists no image")
    return rows


class SourceConfig(Settings):
    """Where the files of a data set are, as its publishers ship them."""

    folder: str | None = Field(None, description="folder of the data set; the files in it are found by their names")
    annotations: str | None = Field(None, description="the file of captions, where it is not found in the folder")
    images: str | None = Field(None, description="the folder that image names are relative to, where not found either")
    captions_per_image: int | None = Field(
        None, ge=1, description="of images with more captions, only the first so many; none: 5 of COCO, all of others"
    )


@dataclass(frozen=True)
class Source:
    """A data set on disk, read.

    `rows` in the order of the data set; `files` decide what they are, and by their content the data set is known again.
    `quarantine` lists what could not be made a row of: {"image_id", "caption_id", "path", "reason"}. `notes` say in one
    sentence each what was noticed and handled, such as images with more than five captions.
    """

    name: str
    kind: Literal["images", "regions"]
    rows: list[Row]
    files: tuple[Path, ...]
    quarantine: list[dict[str, Any]]
    notes: list[str]
    extended_positives: Path | None


@dataclass(frozen=True)
class Published:
    """Sizes of a data set as everybody uses it, for planning with it before it is prepared.

    Images of a split, captions that belong to each, words of the vocabulary, and regions of an image where it comes as
    features of a detector.
    """

    train: int
    val: int
    test: int
    vocabulary: int
    captions: int = 5
    regions: int | None = None


PUBLISHED = {
    "coco": Published(train=113_287, val=5_000, test=5_000, vocabulary=11_755),
    "coco_butd": Published(train=113_287, val=5_000, test=5_000, vocabulary=11_353, regions=36),
    "f30k": Published(train=29_000, val=1_014, test=1_000, vocabulary=8_590),
    "f30k_butd": Published(train=29_000, val=1_014, test=1_000, vocabulary=8_481, regions=36),
    "digits": Published(train=6_000, val=500, test=5_000, vocabulary=58),
}
"""By the names that recipes give. The Karpathy splits, with COCO's `restval` in training, and the words of the authors'
published vocabularies; `digits` is as `setwise data prepare digits` makes it."""


def known() -> tuple[str, ...]:
    """Data sets that can be prepared by name."""
    return ("digits",)


def check_known(name: str) -> None:
    """Raises ConfigError, with the nearest name, if no data set is called `name`."""
    if name not in known():
        raise config.no_such("data set", name, known())


def open_source(name: str, config: SourceConfig) -> Source:
    """The files of data set `name`, read."""
    assert config.folder is not None
    folder = Path(config.folder)
    annotations, extended = folder / f"dataset_{name}.json", folder / "extended_positives"
    rows = read_karpathy(annotations, folder / "images")
    return Source(name, "images", rows, (annotations,), [], [], extended if extended.is_dir() else None)
