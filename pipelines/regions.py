"""Region features of one's own: `setwise data regions`, in the layout of the published ones.

    FOLDER/{train,dev,testall}_ims.npy      (N,R,F) features, once an image; val is called dev, test testall
    FOLDER/{train,dev,testall}_boxes.npy    (N,R,4) float32: x1 y1 x2 y2 in pixels of the image, upright
    FOLDER/{train,dev,testall}_scores.npy   (N,R) float32, from 0 to 1
    FOLDER/{train,dev,testall}_caps.txt     captions, one a line, five consecutive lines an image
    FOLDER/{train,dev,testall}_ids.txt      ids of the images, one a line, in the order of the features
    FOLDER/{train,dev,testall}_capids.txt   ids of the captions, one a line
    FOLDER/regions.json                     what made them, of which files, and what was left out with its reason

The features are those of torchvision's Faster R-CNN: ResNet-50 with a feature pyramid, trained on COCO's 80 kinds of
things, 1,024 wide. Those of the literature ("BUTD": bottom-up attention) come from a ResNet-101 trained on the 1,600
kinds and 400 attributes of Visual Genome and are 2,048 wide. Results with the features made here are therefore not
those of the papers' BUTD rows, and a recipe for them sets model.image_encoder.feature_dim=1024.

Images go through the detector in chunks, each the same whoever computes it, so files do not depend on the number of
actors; on a CPU they are equal byte by byte. Actors send back what they find, and this process alone appends it to the
files, in order: on a file system that several machines share, two that write neighbouring rows of one mapped file can
undo each other's work, and of a mapped file on a full disk nothing would be heard but SIGBUS. A finished chunk is
recorded after its rows are on disk; where an extraction was killed, the next goes on after the last recorded chunk.
"""

from __future__ import annotations

import io
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from setwise.pipelines import datasets, identity, image_weights
from setwise.pipelines.datasets import Row, Source, SourceConfig
from setwise.platform import cluster, storage
from setwise.platform.config import Settings
from setwise.platform.errors import DataError, SetwiseError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from setwise.pipelines.detector import Chunk

SCHEMA = 1
CAPTIONS = 5
"""Of each image: the layout has no place that says how many."""
FILE_NAMES = {"train": "train", "val": "dev", "test": "testall"}
ARRAYS = ("ims", "boxes", "scores")
SAY_EVERY_S = 30.0
Say = Callable[[str], None]


class DetectorConfig(Settings):
    """The detector, and which of its boxes become regions."""

    architecture: Literal["fasterrcnn_resnet50_fpn_v2", "fasterrcnn_resnet50_fpn"] = Field(
        "fasterrcnn_resnet50_fpn_v2", description="torchvision's name of the network"
    )
    weights: str = Field("COCO_V1", description="a name of torchvision's weights, a file, or an https address")
    num_classes: int = Field(91, ge=2, description="classes that the weights tell apart, the background among them")
    num_regions: int = Field(36, ge=1, le=1000, description="regions of each image")
    num_proposals: int = Field(300, ge=1, le=2000, description="boxes of each image that the box head looks at")
    score_threshold: float = Field(0.05, ge=0, lt=1, description="a class less probable than that finds nothing")
    nms_threshold: float = Field(
        0.5, gt=0, lt=1, description="of two boxes of a class that overlap by more (IoU), the better stays"
    )
    min_size: int = Field(800, ge=32, le=4096, description="shorter side that images are scaled to, in pixels")
    max_size: int = Field(1333, ge=64, le=8192, description="longer side of a scaled image at most, in pixels")
    batch_size: int = Field(8, ge=1, description="images at a time; as many as have the same size when scaled")

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.num_proposals < self.num_regions:
            raise ValueError(f"num_proposals={self.num_proposals} are fewer than num_regions={self.num_regions}")
        if self.max_size < self.min_size:
            raise ValueError(f"max_size={self.max_size} is less than min_size={self.min_size}")
        return self


class RegionExtraction(Settings):
    """`setwise data regions`."""

    source: SourceConfig = SourceConfig()
    detector: DetectorConfig = DetectorConfig()
    dtype: Literal["float32", "float16"] = Field("float32", description="of the features in the files")
    images_per_chunk: int = Field(32, ge=1, description="images after which a killed extraction can go on")
    max_bad_share: float = Field(0.01, ge=0, le=1, description="share of the images that may be quarantined")


class Task(NamedTuple):
    """Images of one chunk, (id, file) each."""

    split: str
    images: list[tuple[int, str]]


def extract(source: Source, target: Path, settings: RegionExtraction, weights_folder: Path, say: Say) -> Path:
    """Find the regions of all images of `source` and publish them as the folder `target`, or go on with it.

    Ray has to be connected. An image that cannot be read is left out with its captions, and listed.

    Args:
        weights_folder: where weights with an address are kept.

    Raises:
        ConfigError: a batch does not fit the GPU; a wrong address.
        DataError: `source` holds no images or not five captions of each; more than `max_bad_share` of the images cannot
            be used; weights are missing, damaged or of another network; `target` holds something else.
        UnreachableError: the address of the weights does not answer.
    """
    target = target.expanduser().absolute()
    _check_captions(source)
    detector = settings.detector
    weights = image_weights.locate(detector.weights, detector.architecture, weights_folder, "detector").absolute()
    wanted = {
        "schema": SCHEMA,
        **identity.of(source, {}),
        "weights": storage.sha256(weights),
        "detector": detector.model_dump(mode="json", exclude={"weights"}),
        "dtype": settings.dtype,
        "images_per_chunk": settings.images_per_chunk,
    }
    with storage.lease(target.parent / f".{target.name}.lease", f"the extraction to {target}"):
        if _is_there(target, wanted):
            say(f"the regions of '{source.name}' are extracted already ({target})")
            return target
        building = target.parent / f".{target.name}.extracting"
        quarantine = [bad for row in source.rows if (bad := _unusable(row)) is not None]
        quarantine = _extract_rest(source, quarantine, building, wanted, settings, weights, say)
        _describe(source, quarantine, building, wanted, settings)
        building.rename(target)
        storage.sync_folder(target.parent)
        (target / "progress.json").unlink()  # until now it would have spared a second try the work
    say(f"{len(source.rows) - len(quarantine):,} images; {len(quarantine)} quarantined")
    return target


def _check_captions(source: Source) -> None:
    if source.kind != "images":
        raise DataError(f"'{source.name}' consists of region features already; regions are extracted from images")
    others = [row for row in source.rows if len(row.captions) != CAPTIONS]
    if others:
        raise DataError(
            f"{len(others):,} of {len(source.rows):,} images of '{source.name}' have not {CAPTIONS} captions, and the "
            f"layout of region features holds {CAPTIONS} of each. The first: image {others[0].image_id} "
            f"({others[0].path}) with {len(others[0].captions)}. Where there are more, take the first {CAPTIONS} with "
            f"source.captions_per_image={CAPTIONS}; images with fewer have to be taken out of the captions' file."
        )


def _captions(row: Row) -> list[tuple[int, str]]:
    """Id and text of each, on one line; no text where a file says something else."""
    return [
        (caption.caption_id, " ".join(caption.text.split()) if isinstance(caption.text, str) else "")
        for caption in row.captions
    ]


def _unusable(row: Row) -> dict[str, Any] | None:
    """The entry of the quarantine for an image that need not be opened.

    A caption alone cannot be left out, since the fifth line after an image's first belongs to the next image.
    """
    bad: dict[str, Any] = {"image_id": row.image_id, "caption_id": None, "path": str(row.path)}
    for caption_id, text in _captions(row):
        if not text or any("\ud800" <= character <= "\udfff" for character in text):
            return bad | {"reason": f"caption {caption_id} is empty or no text, and the layout needs all {CAPTIONS}"}
    return None if row.path.exists() else bad | {"reason": "there is no such file"}


def _check_share(quarantine: list[dict[str, Any]], source: Source, settings: RegionExtraction) -> None:
    if len(quarantine) > settings.max_bad_share * len(source.rows):
        first = "; ".join(f"{bad['path']}: {bad['reason']}" for bad in quarantine[:3])
        raise DataError(
            f"{len(quarantine)} of {len(source.rows)} images cannot be used, more than the "
            f"{settings.max_bad_share:.1%} that max_bad_share allows. The first: {first}"
        )


def _is_there(target: Path, wanted: dict[str, Any]) -> bool:
    """Whether `target` holds just these regions; False if there is nothing, or an empty folder."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if not (target / "regions.json").is_file():
        raise DataError(f"{target} is there already and holds no extracted regions. Name another folder.")
    made = storage.read_json(target / "regions.json")
    if made["identity"] != wanted:
        raise DataError(
            f"{target} holds regions made with other settings or from other files ({_differences(made, wanted)}). "
            "Name another folder, or remove this one."
        )
    for split in made["splits"].values():
        for name, size in split["bytes"].items():
            if not (target / name).is_file() or (target / name).stat().st_size != size:
                raise DataError(f"{target / name} is missing or cut short. Remove {target} and extract again.")
    return True


def _differences(made: dict[str, Any], wanted: dict[str, Any]) -> str:
    return ", ".join(name for name in wanted if made["identity"].get(name) != wanted[name])


def _extract_rest(
    source: Source,
    quarantine: list[dict[str, Any]],
    building: Path,
    wanted: dict[str, Any],
    settings: RegionExtraction,
    weights: Path,
    say: Say,
) -> list[dict[str, Any]]:
    """Append to the arrays what they lack of the images outside `quarantine`; the quarantine afterwards."""
    record = building / "progress.json"
    done: dict[str, Any] = {"identity": wanted, "chunks": 0, "images": {}, "quarantine": quarantine}
    if record.is_file():
        begun = storage.read_json(record)
        if begun["identity"] == wanted:
            done = begun
        elif begun["chunks"]:
            raise DataError(
                f"{building} holds an extraction that was begun with other settings or files "
                f"({_differences(begun, wanted)}). Remove it to begin anew."
            )
    _check_share(done["quarantine"], source, settings)  # before hours are spent on the others
    storage.write_json(record, done)
    unusable = {bad["image_id"] for bad in quarantine}
    tasks = _tasks([row for row in source.rows if row.image_id not in unusable], settings.images_per_chunk)
    rest = tasks[done["chunks"] :]
    todo = sum(len(task.images) for task in rest)
    say(f"{settings.detector.num_regions} regions of each of {todo:,} images")
    seen, start, said = 0, time.monotonic(), time.monotonic()
    for task, chunk in zip(rest, _chunks(rest, settings, weights), strict=True):
        before = done["images"].setdefault(task.split, 0)
        for array in ARRAYS:
            append_rows(building / f"{FILE_NAMES[task.split]}_{array}.npy", before, getattr(chunk, array))
        done["chunks"] += 1
        done["images"][task.split] += len(chunk.ims)
        done["quarantine"] += chunk.quarantine
        storage.write_json(record, done)
        _check_share(done["quarantine"], source, settings)
        seen += len(task.images)
        if (now := time.monotonic()) - said > SAY_EVERY_S:
            said, rate = now, seen / (now - start)
            say(f"{seen:,} of {todo:,} images, {rate:.1f} a second, {(todo - seen) / rate / 3600:.1f} h to go")
    return list(done["quarantine"])


def _tasks(rows: list[Row], images_per_chunk: int) -> list[Task]:
    tasks = []
    for split in datasets.SPLITS:
        members = [(row.image_id, str(row.path.absolute())) for row in rows if row.split == split]
        parts = (members[start : start + images_per_chunk] for start in range(0, len(members), images_per_chunk))
        tasks += [Task(split, part) for part in parts]
    return tasks


def append_rows(path: Path, num: int, rows: NDArray[Any]) -> None:
    """Put `rows` behind the first `num` rows of a .npy file, and say so in its header; both are on disk afterwards.

    What lies behind those rows, as a killed process leaves it, is overwritten. The header is always of one length:
    numpy leaves room in it for the number of rows to grow.

    Raises:
        DataError: the file has fewer than `num` rows.
    """
    header = io.BytesIO()
    shape = (num + len(rows), *rows.shape[1:])
    description = {"descr": np.lib.format.dtype_to_descr(rows.dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    end = header.tell() + num * rows.dtype.itemsize * math.prod(rows.shape[1:])
    path.touch()
    with path.open("r+b") as stream:
        if num and stream.seek(0, os.SEEK_END) < end:
            raise DataError(f"{path} is cut short: fewer rows than were recorded. Remove {path.parent} to begin anew.")
        stream.truncate(end)
        stream.seek(end)
        stream.write(rows.tobytes())
        stream.seek(0)
        stream.write(header.getvalue())
        stream.flush()
        os.fsync(stream.fileno())


def _describe(
    source: Source,
    quarantine: list[dict[str, Any]],
    building: Path,
    wanted: dict[str, Any],
    settings: RegionExtraction,
) -> None:
    """Write what belongs to the arrays: captions, ids, and regions.json."""
    for left in building.glob(".*"):  # files that a killed process had not finished
        left.unlink()
    unusable = {bad["image_id"] for bad in quarantine}
    splits: dict[str, Any] = {}
    for split in datasets.SPLITS:
        rows = [row for row in source.rows if row.split == split and row.image_id not in unusable]
        if not rows:
            continue
        name = FILE_NAMES[split]
        captions = [caption for row in rows for caption in _captions(row)]
        lines: dict[str, list[Any]] = {
            "caps": [text for _, text in captions],
            "ids": [row.image_id for row in rows],
            "capids": [caption_id for caption_id, _ in captions],
        }
        for kind, values in lines.items():
            storage.write_bytes(building / f"{name}_{kind}.txt", "".join(f"{value}\n" for value in values).encode())
        files = [*(f"{name}_{array}.npy" for array in ARRAYS), *(f"{name}_{kind}.txt" for kind in lines)]
        splits[name] = {
            "images": len(rows),
            "captions": len(captions),
            "bytes": {file: (building / file).stat().st_size for file in files},
        }
    made = {
        "name": source.name,
        "identity": wanted,
        "settings": settings.model_dump(mode="json"),
        "splits": splits,
        "quarantine": [*source.quarantine, *quarantine],
        "versions": {package: version(package) for package in ("torch", "torchvision", "pillow", "numpy")},
    }
    storage.write_json(building / "regions.json", made)


def _chunks(tasks: list[Task], settings: RegionExtraction, weights: Path) -> Iterator[Chunk]:
    """What detectors on Ray find, one on each GPU or else on all CPUs but one, in the order of the tasks.

    Each actor has a task waiting while it works at another, and nothing is begun that is far ahead of what was taken.
    """
    import ray

    from setwise.pipelines.detector import Extractor

    gpus = cluster.gpus()
    count = min(gpus or max(1, cluster.cpus() - 1), len(tasks))
    options = {"num_cpus": 1, "num_gpus": 1 if gpus else 0, "max_restarts": 2, "max_task_retries": 2}
    remote = ray.remote(Extractor).options(**options)
    actors = [
        remote.remote(settings.detector, weights, settings.dtype, "cuda" if gpus else "cpu") for _ in range(count)
    ]
    free, running, finished, begun = deque(actors * 2), {}, {}, 0
    for number in range(len(tasks)):
        while number not in finished:
            while free and begun < min(number + 4 * count, len(tasks)):
                actor = free.popleft()
                running[actor.extract.remote(tasks[begun].images)] = (begun, actor)
                begun += 1
            (answer,), _ = ray.wait(list(running), num_returns=1)
            place, actor = running.pop(answer)
            finished[place] = answer
            free.append(actor)
        try:
            chunk: Chunk = ray.get(finished.pop(number))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, SetwiseError):
                raise error.cause from None
            raise
        yield chunk
