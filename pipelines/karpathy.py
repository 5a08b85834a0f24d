"""Karpathy splits: `dataset_coco.json`, `dataset_flickr30k.json` and others of that form.

    {"dataset", "images": [{"filename", "filepath"?, "split", "imgid", "cocoid"?,
                            "sentences": [{"raw", "sentid", "tokens"?}]}]}

COCO's images lie in `images/{train2014,val2014}` or `{train2014,val2014}` of the data set's folder, Flickr30K's in
`images`, `flickr30k-images` or the folder itself.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from setwise.pipelines import datasets
from setwise.pipelines.datasets import SPLITS, Caption, ImageFolder, Row, Source, as_id
from setwise.platform.errors import DataError

PLACES = ("images", "flickr30k-images", ".")


class Entry(NamedTuple):
    """An image as the file lists it: `split` may be restval, and `name` is relative to the folder of images."""

    image_id: int
    split: str
    name: str
    captions: tuple[Caption, ...]


def names(name: str) -> tuple[str, ...]:
    """What the file of data set `name` may be called."""
    usual = "coco" if datasets.is_coco(name) else "flickr30k" if datasets.is_flickr30k(name) else name
    return tuple(dict.fromkeys((f"dataset_{name}.json", f"dataset_{usual}.json", "dataset_*.json")))


def find(name: str, folder: Path) -> Path | None:
    """The file of data set `name` in the folder or its `annotations`; None if there is none.

    Raises:
        DataError: there are several, none of them of that name.
    """
    for place in (folder, folder / "annotations"):
        for pattern in names(name):
            found = sorted(path for path in place.glob(pattern) if path.is_file())
            if len(found) > 1:
                raise DataError(
                    f"{place}: holds {', '.join(path.name for path in found)}; none is called after '{name}'. Say "
                    "which it is: source.annotations=FILE"
                )
            if found:
                return found[0]
    return None


def read(name: str, file: Path, folder: Path, images: str | None) -> Source:
    """The data set of a Karpathy split.

    Args:
        folder: the data set's, in which the images are looked for.
        images: the folder of images, where it is known.

    Raises:
        DataError: the file is missing or wrong, or no image is found.
    """
    entries = read_entries(file)
    root = datasets.find_images(folder, images, PLACES, [entry.name for entry in entries])
    counts = Counter(entry.split for entry in entries)
    notes = [f"{counts['restval']:,} images of restval are used in training"] if counts["restval"] else []
    return Source(name, "images", _rows(file, entries, root), (file,), [], notes, None)


def read_karpathy(file: Path, images: Path) -> list[Row]:
    """Rows of a Karpathy-split file.

    The split `restval` is read as `train`, as everybody does. Ids are COCO's where the file has them.

    Args:
        images: folder that `filepath/filename` is relative to.

    Raises:
        DataError: the file is missing, is not of this form, or repeats an id.
    """
    rows = _rows(file, read_entries(file), images)
    datasets.check_ids(rows, str(file))
    return rows


def read_entries(file: Path) -> list[Entry]:
    """What the file lists, in its order, with all captions of each image.

    Raises:
        DataError: the file is missing or not of this form.
    """
    try:
        images = list(json.loads(file.read_bytes(), object_hook=_as_caption)["images"])
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}). Is the data set in this folder?") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{file}: not a Karpathy-split file: expected an object with a list 'images'") from error
    if not images:
        raise DataError(f"{file}: lists no image")
    entries = []
    for index, image in enumerate(images):
        try:
            entry = _entry(image)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{file}: images[{index}] is not complete: {error!r}") from error
        if entry.split not in (*SPLITS, "restval"):
            known = f"known are {', '.join(SPLITS)} and restval"
            raise DataError(f"{file}: images[{index}] has split '{entry.split}'; {known}")
        entries.append(entry)
    return entries


def _as_caption(content: dict[str, Any]) -> Any:
    """A sentence as a caption, as soon as it is parsed: the tokens of each take most of the memory."""
    if "raw" in content and "sentid" in content:
        return Caption(content["sentid"], content["raw"])
    return content


def _entry(image: dict[str, Any]) -> Entry:
    image_id = as_id(image["cocoid"] if "cocoid" in image else image["imgid"])
    part, name = image.get("filepath", ""), image["filename"]
    if not isinstance(part, str) or not isinstance(name, str):
        raise TypeError("'filename' and 'filepath' are texts")
    captions = []
    for sentence in image["sentences"]:
        if not isinstance(sentence, Caption):
            raise TypeError("a sentence has 'raw' and 'sentid'")
        as_id(sentence.caption_id)
        # What is no text is no caption, and preparation sets it aside like an empty one.
        captions.append(sentence if isinstance(sentence.text, str) else Caption(sentence.caption_id, ""))
    return Entry(image_id, str(image["split"]), f"{part}/{name}" if part else name, tuple(captions))


def _rows(file: Path, entries: list[Entry], images: Path) -> list[Row]:
    root = ImageFolder(images)
    rows = []
    for index, entry in enumerate(entries):
        try:
            path = root.path(entry.name)
        except ValueError as error:
            raise DataError(f"{file}: images[{index}] names {error}") from error
        rows.append(Row(entry.image_id, "train" if entry.split == "restval" else entry.split, path, entry.captions))
    return rows
