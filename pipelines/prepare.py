"""Preparation: a data set's files become Parquet shards of resized JPEG bytes with their captions.

    STORE/data/NAME/source/              the files as published (for `digits`: as generated)
    STORE/data/NAME/prepared/
      manifest.json                      counts, hashes and what was quarantined, with reasons
      vocabulary.json                    the words of the training captions
      train-00000.parquet ...            image_id, image, caption_ids, captions
      extended_positives/*.json          where the data set has them

Ray Data runs one task a shard: each reads, checks, decodes, resizes and writes its rows, so memory is bounded by the
shards in flight, and no row passes through the driver. The result depends on nothing but the source and the settings.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from setwise.pipelines import datasets, shards, vocabulary
from setwise.pipelines.datasets import Row, Source, SourceConfig
from setwise.pipelines.digits import DigitsConfig, generate
from setwise.pipelines.shards import Shard
from setwise.platform import storage
from setwise.platform.config import Settings
from setwise.platform.errors import DataError

SCHEMA = 2
Say = Callable[[str], None]


class PrepareConfig(Settings):
    """How the shards are made."""

    shorter_side: int = Field(64, ge=16, le=2048, description="images are reduced to this shorter side, in pixels")
    jpeg_quality: int = Field(95, ge=50, le=100)
    rows_per_shard: int = Field(500, ge=1)
    max_bad_share: float = Field(0.01, ge=0, le=1, description="share of the images that may be quarantined")


class DigitsPreparation(Settings):
    """`setwise data prepare digits`: how the data set is composed, and how it is stored."""

    generate: DigitsConfig = DigitsConfig()
    prepare: PrepareConfig = PrepareConfig()


@dataclass(frozen=True)
class Prepared:
    """A prepared data set on disk."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    def describe(self) -> str:
        counts = ", ".join(
            f"{name} {self.manifest['splits'][name]['images']:,} images with "
            f"{self.manifest['splits'][name]['captions']:,} captions"
            for name in datasets.SPLITS
            if name in self.manifest["splits"]
        )
        return f"{counts}; {len(self.manifest['quarantine'])} quarantined"


def open_prepared(name: str, store: Path) -> Prepared:
    """A data set that was prepared before.

    Raises:
        DataError: it was not, or a shard is missing.
    """
    folder = store / "data" / name / "prepared"
    if not (folder / "manifest.json").is_file():
        raise DataError(f"data set '{name}' is not prepared in {store}. Do it with: setwise data prepare {name}")
    prepared = Prepared(folder, storage.read_json(folder / "manifest.json"))
    if prepared.manifest["identity"]["schema"] != SCHEMA:
        raise DataError(f"{folder}: another version of setwise made it. Make it again: setwise data prepare {name}")
    if path := _damaged(folder, prepared.manifest):
        raise DataError(f"{path} is missing or cut short. Make it again: setwise data prepare {name}")
    return prepared


def _damaged(folder: Path, manifest: dict[str, Any]) -> Path | None:
    """The first shard that is missing or has another length than was written."""
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            path = folder / str(shard["file"])
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                return path
    return None


def prepare_digits(store: Path, settings: DigitsPreparation, say: Say) -> Prepared:
    """Generate the embedded data set and prepare it; what is already there and unchanged is reused."""
    digits = settings.generate
    base = store / "data" / "digits"
    with storage.lease(base / "lease", "data set 'digits'"):
        source = base / "source"
        wanted = {"generator": digits.model_dump(mode="json")}
        marker = source / "generated.json"
        if not marker.is_file() or storage.read_json(marker) != wanted:
            say(f"composing {digits.train + digits.val + digits.test:,} scenes from handwritten digits")
            with storage.publish_folder(source) as building:
                generate(building, digits)
                storage.write_json(building / "generated.json", wanted)
        read = datasets.open_source("digits", SourceConfig(folder=str(source)))
        return prepare(read, base / "prepared", settings.prepare, say)


def prepare(source: Source, target: Path, settings: PrepareConfig, say: Say) -> Prepared:
    """Write the shards of `source` to `target`, unless they are there already, made from the same files.

    Raises:
        DataError: the annotations are wrong, or more than `max_bad_share` of the images are.
    """
    rows = source.rows
    identity = {
        "schema": SCHEMA,
        "files": [storage.sha256(file) for file in source.files],
        "settings": settings.model_dump(mode="json"),
        "sizes": storage.fingerprint([_size(row.path) for row in rows]),
    }
    manifest_file = target / "manifest.json"
    if manifest_file.is_file():
        manifest = storage.read_json(manifest_file)
        if manifest["identity"] == identity and not _damaged(target, manifest):
            say(f"'{source.name}' is prepared already ({target})")
            return Prepared(target, manifest)

    with storage.publish_folder(target) as building:
        say(f"preparing {len(rows):,} images of '{source.name}' with Ray Data")
        written = _write_shards(_tasks(rows, settings.rows_per_shard), building, settings)
        quarantine = [bad for shard in written for bad in shard.quarantine]
        bad_images = len(rows) - sum(shard.images for shard in written)
        if bad_images > settings.max_bad_share * len(rows):
            first = "; ".join(f"{bad['path']}: {bad['reason']}" for bad in quarantine[:3])
            raise DataError(
                f"{bad_images} of {len(rows)} images cannot be used, more than the {settings.max_bad_share:.1%} that "
                f"max_bad_share allows. The first: {first}"
            )
        splits = _splits(written)
        vocabulary.write(building / "vocabulary.json", vocabulary.collect(shards.captions(building, splits["train"])))
        if source.extended_positives is not None:
            shutil.copytree(source.extended_positives, building / "extended_positives")
        manifest = {
            "name": source.name,
            "fingerprint": storage.fingerprint([splits, storage.sha256(building / "vocabulary.json")]),
            "identity": identity,
            "settings": settings.model_dump(mode="json"),
            "splits": splits,
            "quarantine": quarantine,
        }
        storage.write_json(building / "manifest.json", manifest)
    prepared = Prepared(target, manifest)
    say(prepared.describe())
    return prepared


def _size(path: Path) -> int:
    """Size of an image file: enough to notice that it was replaced, at no cost. A missing file counts as -1."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _tasks(rows: list[Row], rows_per_shard: int) -> list[dict[str, str]]:
    """One task a shard: the file to write, and its rows as JSON, since Ray Data would store nested lists as pickles."""
    tasks = []
    for split in datasets.SPLITS:
        members = [row for row in rows if row.split == split]
        for number, start in enumerate(range(0, len(members), rows_per_shard)):
            part = members[start : start + rows_per_shard]
            tasks.append({"file": f"{split}-{number:05d}.parquet", "rows": shards.dump_rows(part)})
    return tasks


def _write_shards(tasks: list[dict[str, str]], folder: Path, settings: PrepareConfig) -> list[Shard]:
    """Write all shards, one Ray Data task each; the answers come back in the order of the tasks."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it reports each execution, and that bars are off
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    side, quality = settings.shorter_side, settings.jpeg_quality

    def write(task: dict[str, str]) -> dict[str, str]:
        return shards.write(folder / task["file"], shards.load_rows(task["rows"]), side, quality).to_columns()

    written = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(write, num_cpus=0.9).take_all()
    return [Shard.from_columns(columns) for columns in written]


def _splits(written: list[Shard]) -> dict[str, Any]:
    """The manifest's view of the shards, by split."""
    splits: dict[str, Any] = {}
    for shard in written:
        split = splits.setdefault(shard.file.rpartition("-")[0], {"images": 0, "captions": 0, "shards": []})
        split["images"] += shard.images
        split["captions"] += shard.captions
        split["shards"].append(
            {"file": shard.file, "images": shard.images, "bytes": shard.bytes, "sha256": shard.sha256}
        )
    return splits
