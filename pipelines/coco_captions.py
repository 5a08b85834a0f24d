"""COCO from the annotations that its publishers ship, `captions_train2014.json` and `captions_val2014.json`.

Which captions belong to which split say `coco_{train,restval,dev,test}_ids.npy` beside them, annotation ids in the
order of the split, as the authors' code and VSE++ have them. Where they are missing, the test split is the one that
ECCV Caption's package lists, in its order, on which the folds of COCO 1K depend.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from setwise.pipelines import datasets, positives
from setwise.pipelines.datasets import Caption, ImageFolder, Row, Source, as_id, listed
from setwise.platform.errors import DataError

FILES = ("captions_train2014.json", "captions_val2014.json")
ID_FILES = {"train": "coco_train_ids.npy", "restval": "coco_restval_ids.npy", "val": "coco_dev_ids.npy"}
ID_FILES |= {"test": "coco_test_ids.npy"}
PLACES = ("images", ".")


@dataclass
class Annotations:
    """The captions of both files by their ids, in order, and the images that they were written for."""

    names: dict[int, str] = field(default_factory=dict)
    """Of each image id, the file, relative to the folder of images."""
    captions: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Of each caption id, the image's id and the text."""

    def by_image(self, caption_ids: Iterable[int]) -> dict[int, list[int]]:
        """The ids of captions for each image, images in the order in which they first come."""
        grouped: dict[int, list[int]] = {}
        for caption_id in caption_ids:
            grouped.setdefault(self.captions[caption_id][0], []).append(caption_id)
        return grouped


def find(folder: Path) -> Path | None:
    """One of the files, where both are in the folder or its `annotations`; None if they are not."""
    for place in (folder, folder / "annotations"):
        if all((place / file).is_file() for file in FILES):
            return place / FILES[0]
    return None


def packaged_test_ids() -> list[int]:
    """The 25,000 caption ids of the Karpathy test split, five for each image, in the order that everybody uses."""
    ids = np.load(positives.package_data() / ID_FILES["test"], allow_pickle=False)
    return [int(caption_id) for caption_id in ids]


def read(name: str, annotations: Path, folder: Path, images: str | None) -> Source:
    """The data set of the two files in the folder `annotations`.

    Args:
        folder: the data set's, in which images, and id files that are not beside the annotations, are looked for.
        images: the folder that holds train2014 and val2014, where it is known.

    Raises:
        DataError: a file is missing or wrong, an id of a split has no caption, or no image is found.
    """
    found = Annotations()
    of_file = [_add(annotations / file, found) for file in FILES]
    ids, files, notes = _splits(found, of_file, (annotations, folder))
    root_path = datasets.find_images(folder, images, PLACES, list(found.names.values()))
    root = ImageFolder(root_path)
    rows = []
    for split, caption_ids in ids.items():
        for image_id, own in found.by_image(caption_ids).items():
            try:
                path = root.path(found.names[image_id])
            except ValueError as error:
                raise DataError(f"{annotations}: image {image_id} names {error}") from error
            captions = tuple(Caption(caption_id, found.captions[caption_id][1]) for caption_id in own)
            rows.append(Row(image_id, "train" if split == "restval" else split, path, captions))
    return Source(name, "images", rows, (*(annotations / file for file in FILES), *files), [], notes, None)


def _add(file: Path, found: Annotations) -> list[int]:
    """Read a file of captions into `found`; its caption ids, ascending. Raises DataError if it is wrong."""
    from pycocotools.coco import COCO

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # on which results are printed, and it says what it does
            coco = COCO(str(file))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, AssertionError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: not a file of COCO captions ({error!r})") from error
    part = file.stem.removeprefix("captions_")
    images, entries = coco.dataset.get("images"), coco.dataset.get("annotations")
    if not isinstance(images, list) or not isinstance(entries, list):
        raise DataError(f"{file}: not a file of COCO captions: expected lists 'images' and 'annotations'")
    repeated: list[int] = []
    for index, image in enumerate(images):
        try:
            image_id, name = as_id(image["id"]), image["file_name"]
            if not isinstance(name, str):
                raise TypeError("'file_name' is a text")  # noqa: TRY301 - one place says which entry it is
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file}: images[{index}] is not complete: {error!r}") from error
        if image_id in found.names:
            repeated.append(image_id)
        found.names[image_id] = f"{part}/{name}"
    if repeated:
        raise DataError(f"{file}: image ids are listed before, here or in the other file: {listed(repeated)}")
    own = []
    for index, entry in enumerate(entries):
        try:
            caption_id, image_id, text = as_id(entry["id"]), as_id(entry["image_id"]), entry["caption"]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file}: annotations[{index}] is not complete: {error!r}") from error
        if image_id not in found.names:
            raise DataError(f"{file}: annotations[{index}] is for image {image_id}, which the file does not list")
        if caption_id in found.captions:
            repeated.append(caption_id)
        found.captions[caption_id] = image_id, text if isinstance(text, str) else ""
        own.append(caption_id)
    if repeated:
        raise DataError(f"{file}: annotation ids are used before, here or in the other file: {listed(repeated)}")
    return sorted(own)  # as the captions of each image are in Karpathy's file, of which everybody uses the first five


def _splits(
    found: Annotations, of_file: list[list[int]], places: tuple[Path, ...]
) -> tuple[dict[str, list[int]], list[Path], list[str]]:
    """The caption ids of each split, the files that say so, and what there is to say about it.

    Training is all of train2014; what is left of val2014 is `restval` where `val` is known, else `val`.
    """
    files = {split: file for split, name in ID_FILES.items() if (file := _first(places, name)) is not None}
    ids = {split: _read_ids(file, found) for split, file in files.items()}
    train2014, val2014 = of_file
    notes = [f"splits are those of {', '.join(file.name for file in files.values())}"] if files else []
    if "test" not in ids:
        of_val2014 = set(val2014)
        ids["test"] = [caption_id for caption_id in packaged_test_ids() if caption_id in of_val2014]
        notes.append(f"test is what ECCV Caption's package lists: {len(ids['test']):,} captions of the Karpathy split")
    ids.setdefault("train", train2014)
    taken = {found.captions[caption_id][0] for own in ids.values() for caption_id in own}
    rest = [caption_id for caption_id in val2014 if found.captions[caption_id][0] not in taken]
    if "val" not in ids:
        ids["val"] = rest
        notes.append(
            f"{ID_FILES['val']} is missing: val is all that is left of val2014. This is not the Karpathy split: "
            "numbers on val, and of models trained on train, are not comparable with the papers'"
        )
    elif "restval" not in ids:
        ids["restval"] = rest
    elif rest:
        notes.append(f"{len(rest):,} captions of val2014 are in no split")
    return {split: ids[split] for split in ID_FILES if split in ids}, list(files.values()), notes


def _first(places: tuple[Path, ...], name: str) -> Path | None:
    return next((place / name for place in places if (place / name).is_file()), None)


def _read_ids(file: Path, found: Annotations) -> list[int]:
    """The caption ids of a split, in order."""
    try:
        ids = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, KeyError, OverflowError) as error:
        raise DataError(f"{file}: not a whole .npy file of numbers ({error})") from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        kind = f"{ids.dtype} {ids.shape}" if isinstance(ids, np.ndarray) else "an archive"
        raise DataError(f"{file}: expected annotation ids, one dimension of integers; found {kind}")
    caption_ids = [int(caption_id) for caption_id in ids]
    if unknown := [caption_id for caption_id in caption_ids if caption_id not in found.captions]:
        raise DataError(f"{file}: {len(unknown):,} ids have no caption in {' and '.join(FILES)}: {listed(unknown)}")
    if repeated := [caption_id for caption_id, times in Counter(caption_ids).items() if times > 1]:
        raise DataError(f"{file}: repeats the ids {listed(repeated)}")
    return caption_ids
