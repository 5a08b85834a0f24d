"""Region features in the layout of SCAN, in the data set's folder or its `precomp`.

    {train,dev,test,testall}_ims.npy      (rows, regions, width) float32 or float16, memory-mapped and never read whole
    {...}_caps.txt                        a caption a line, five consecutive lines an image
    {...}_ids.txt                         ids of images, one an image or one a caption; may be missing
    {...}_capids.txt                      ids of captions; may be missing

An image's features are stored once, or once for each of its captions: their numbers tell. `dev` is read as `val`, and
`testall`, all of COCO's test images, is preferred to `test`, a thousand of them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from setwise.pipelines import coco_captions, datasets, feature_files, karpathy, positives
from setwise.pipelines.datasets import Caption, Row, Source, as_id, listed
from setwise.platform.errors import DataError

STEMS = {"train": ("train",), "val": ("dev",), "test": ("testall", "test")}
FILES = tuple(f"{stem}_ims.npy" for stems in STEMS.values() for stem in stems)
CAPTIONS = 5
COMPARED_IMAGES = 16
"""Images whose repeated features are compared; to compare all would read all."""


@dataclass
class Part:
    """The files of a split."""

    split: str
    features: Path
    step: int
    """Rows of features from one image to the next."""
    captions: list[str | None]
    """In order, None for a line that is not UTF-8."""
    image_ids: list[int] | None
    caption_ids: list[int] | None
    files: list[Path]

    @property
    def images(self) -> int:
        return len(self.captions) // CAPTIONS


def find(folder: Path) -> Path | None:
    """The folder or its `precomp`, if features are in it; else None."""
    for place in (folder, folder / "precomp"):
        if any((place / file).is_file() for file in FILES):
            return place
    return None


def read(name: str, folder: Path, annotations: Path | None) -> Source:
    """The data set of the features in `folder`.

    Args:
        annotations: a Karpathy split with the same image ids, from which captions take their ids.

    Raises:
        DataError: a file is missing or wrong, or the numbers of features, captions and ids do not fit.
    """
    notes: list[str] = []
    parts = []
    for split, stems in STEMS.items():
        there = [stem for stem in stems if (folder / f"{stem}_ims.npy").is_file()]
        if there:
            parts.append(_part(split, folder, there[0], notes))
        if len(there) > 1:
            notes.append(f"{split} is {there[0]}_ims.npy; {there[1]}_ims.npy is not used")
        notes += [
            f"{stem}_caps.txt is not used: there is no {stem}_ims.npy"
            for stem in stems
            if stem not in there and (folder / f"{stem}_caps.txt").is_file()
        ]
    _number_images(parts, notes)
    if annotations is not None:
        _take_ids(parts, annotations, notes)
    elif datasets.is_coco(name):
        _recognise_coco(parts, notes)
    _number_captions(parts, notes)
    rows, quarantine = [], []
    for part in parts:
        for image in range(part.images):
            row, bad = _row(part, image)
            quarantine += bad
            if row is not None:
                rows.append(row)
    files = [file for part in parts for file in part.files] + ([annotations] if annotations is not None else [])
    return Source(name, "regions", rows, tuple(files), quarantine, notes, None)


def _part(split: str, folder: Path, stem: str, notes: list[str]) -> Part:
    path, captions_file = folder / f"{stem}_ims.npy", folder / f"{stem}_caps.txt"
    features = _open(path)
    captions = _captions(captions_file)
    rows, number = len(features), len(captions)
    if number != CAPTIONS * rows and (number != rows or number % CAPTIONS):
        raise DataError(
            f"{path} has {rows:,} rows and {captions_file.name} {number:,} captions: expected {CAPTIONS} captions for "
            f"each row, or one row for each caption and {CAPTIONS} of both for each image"
        )
    step = CAPTIONS if number == rows else 1
    part = Part(split, path, step, captions, None, None, [captions_file])
    if step > 1:
        _check_repeats(path, features)
        notes.append(f"{path.name} has the features of an image {CAPTIONS} times; the first are used")
    if (ids_file := folder / f"{stem}_ids.txt").is_file():
        part.image_ids = _image_ids(ids_file, number)
        part.files.append(ids_file)
    if (ids_file := folder / f"{stem}_capids.txt").is_file():
        part.caption_ids = _ids(ids_file)
        part.files.append(ids_file)
        if len(part.caption_ids) != number:
            raise DataError(f"{ids_file} has {len(part.caption_ids):,} ids for {number:,} captions")
    return part


def _open(path: Path) -> np.memmap[Any, Any]:
    """The features, of which only the header is read."""
    features = feature_files.open_features(path)
    if features.dtype not in (np.float32, np.float16):
        raise DataError(f"{path}: holds {features.dtype}; features are float32 or float16")
    if (expected := features.offset + features.nbytes) != (found := path.stat().st_size):
        raise DataError(f"{path}: {found:,} bytes, and its header says {expected:,}")
    return features


def _check_repeats(path: Path, features: np.memmap[Any, Any]) -> None:
    images = len(features) // CAPTIONS
    for image in np.unique(np.linspace(0, images - 1, min(images, COMPARED_IMAGES)).round().astype(int)):
        first = int(image) * CAPTIONS
        for row in range(first + 1, first + CAPTIONS):
            if features[row].tobytes() != features[first].tobytes():
                raise DataError(
                    f"{path} has as many rows as there are captions, and rows {first} and {row} differ. Expected the "
                    f"features of each image {CAPTIONS} times in succession"
                )


def _captions(file: Path) -> list[str | None]:
    """The captions of a file, one a line, without what its lines end in."""
    lines: list[str | None] = []
    for line in _lines(file):
        try:
            lines.append(line.decode().strip())
        except UnicodeDecodeError:
            lines.append(None)
    return lines


def _ids(file: Path) -> list[int]:
    ids, wrong = [], []
    for number, line in enumerate(_lines(file), 1):
        try:
            ids.append(as_id(int(line)))
        except ValueError:
            wrong.append(number)
    if wrong:
        raise DataError(f"{file}: expected an integer of 64 bits in each line; there is none in line {listed(wrong)}")
    return ids


def _lines(file: Path) -> list[bytes]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}). It belongs to the features beside it") from error
    content = content.removeprefix(b"\xef\xbb\xbf")
    return content.removesuffix(b"\n").split(b"\n") if content else []


def _image_ids(file: Path, captions: int) -> list[int]:
    """One id an image, from a file that has one an image or one a caption."""
    ids = _ids(file)
    if len(ids) == captions // CAPTIONS:
        return ids
    if len(ids) != captions:
        raise DataError(f"{file} has {len(ids):,} ids for {captions // CAPTIONS:,} images and {captions:,} captions")
    groups = [ids[start : start + CAPTIONS] for start in range(0, captions, CAPTIONS)]
    if mixed := [CAPTIONS * number + 1 for number, group in enumerate(groups) if len(set(group)) > 1]:
        raise DataError(
            f"{file} has an id for each caption, and differing ones for the {CAPTIONS} captions of an image, from line "
            f"{listed(mixed)} on"
        )
    return [group[0] for group in groups]


def _number_images(parts: list[Part], notes: list[str]) -> None:
    """Numbers instead of ids, beyond all ids that are known."""
    following = _beyond([part.image_ids for part in parts])
    for part in parts:
        if part.image_ids is None:
            notes.append(f"images of {part.split} have no ids; they are numbered from {following} on, in order")
            part.image_ids = list(range(following, following + part.images))
            following += part.images


def _number_captions(parts: list[Part], notes: list[str]) -> None:
    following = _beyond([part.caption_ids for part in parts])
    for part in parts:
        if part.caption_ids is None:
            notes.append(f"captions of {part.split} have no ids; they are numbered from {following} on, in order")
            part.caption_ids = list(range(following, following + len(part.captions)))
            following += len(part.captions)


def _beyond(known: list[list[int] | None]) -> int:
    return max([datasets.FIRST_NUMBER - 1, *(max(ids) for ids in known if ids)]) + 1


def _recognise_coco(parts: list[Part], notes: list[str]) -> None:
    """Give test captions COCO's ids, if they are as many and each is of the image that it is of in COCO."""
    test_ids = coco_captions.packaged_test_ids()
    for part in parts:
        if part.split != "test" or part.caption_ids is not None or len(part.captions) != len(test_ids):
            continue
        image_of = json.loads((positives.package_data() / positives.TEST_CAPTIONS).read_bytes())
        images = [int(image_of[str(caption_id)][0]) for caption_id in test_ids]
        if images[::CAPTIONS] == part.image_ids:
            part.caption_ids = test_ids
            notes.append("captions of test have COCO's ids, by the order that ECCV Caption's package has them in")


def _take_ids(parts: list[Part], annotations: Path, notes: list[str]) -> None:
    """Give captions the ids that a Karpathy split has for the same image, in the same order."""
    captions = {entry.image_id: entry.captions for entry in karpathy.read_entries(annotations)}
    for part in parts:
        if part.caption_ids is not None:
            continue
        assert part.image_ids is not None
        ids: list[int] = []
        alike = 0
        for image, image_id in enumerate(part.image_ids):
            own = captions.get(image_id, ())[:CAPTIONS]
            if len(own) < CAPTIONS:
                raise DataError(
                    f"{annotations}: has {len(own)} captions of image {image_id}, which is number {image} of "
                    f"{part.features}; expected {CAPTIONS}. Do both have the same ids of images?"
                )
            ids += [caption.caption_id for caption in own]
            texts = part.captions[image * CAPTIONS : (image + 1) * CAPTIONS]
            alike += sum(
                text is not None and _letters(text) == _letters(caption.text)
                for text, caption in zip(texts, own, strict=True)
            )
        if 2 * alike < len(ids):
            raise DataError(
                f"{annotations}: only {alike:,} of {len(ids):,} captions read as in {part.files[0]}. Is it of another "
                "data set, or in another order?"
            )
        part.caption_ids = ids
        notes.append(
            f"captions of {part.split} have the ids of {annotations.name}; {alike:,} of {len(ids):,} read alike"
        )


def _letters(text: str) -> str:
    """What is left of a caption however it was tokenised."""
    return re.sub(r"[\W_]", "", text.lower())


def _row(part: Part, image: int) -> tuple[Row | None, list[dict[str, Any]]]:
    """The row of an image, and what is set aside of it."""
    assert part.image_ids is not None and part.caption_ids is not None
    image_id, quarantine, captions = part.image_ids[image], [], []
    for line in range(image * CAPTIONS, (image + 1) * CAPTIONS):
        text = part.captions[line]
        if text is None:
            quarantine.append(
                {
                    "image_id": image_id,
                    "caption_id": part.caption_ids[line],
                    "path": f"{part.files[0]}:{line + 1}",
                    "reason": "the line is not UTF-8",
                }
            )
        else:
            captions.append(Caption(part.caption_ids[line], text))
    if not captions:
        bad = {"image_id": image_id, "caption_id": None, "path": str(part.features), "reason": "no usable caption"}
        return None, [*quarantine, bad]
    return Row(image_id, part.split, part.features, tuple(captions), image * part.step), quarantine
