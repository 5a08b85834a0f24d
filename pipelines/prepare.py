"""Preparation: a data set's files become Parquet shards of JPEGs, or of places of region features, with their captions.

    STORE/data/NAME/source/              the files, where setwise makes them itself (`digits`)
    STORE/data/NAME/prepared/
      manifest.json                      source, counts, hashes and what was quarantined, with reasons
      vocabulary.json                    the words of the training captions
      train-00000.parquet ...            shards, see shards.py
      extended_positives/*.json          where the data set has them
    STORE/data/NAME/.prepared-IDENTITY/  the same while it is made

Ray Data runs one task a shard: each reads, checks, decodes, resizes and writes its rows, so its memory is
bounded by the rows of a shard. No image passes through the driver, which has the rows in columns (rows.py) and hands
over those of a few shards at a time. The result depends on nothing but the source and the settings.
A preparation that was killed goes on with the shards that are not there yet.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from setwise.models.config import RegionsConfig
from setwise.pipelines import datasets, feature_files, identity, mirrored, shard_tasks, shards, vocabulary
from setwise.pipelines.datasets import Row, Source, SourceConfig
from setwise.pipelines.digits import GENERATED, DigitsConfig, generate
from setwise.pipelines.rows import Rows
from setwise.pipelines.shards import Shard
from setwise.platform import storage
from setwise.platform.config import Settings
from setwise.platform.errors import ConfigError, DataError
from setwise.platform.run import NAME

if TYPE_CHECKING:
    from setwise.pipelines.recipe import Recipe

SCHEMA = 4
Say = Callable[[str], None]
Task = tuple[str, Sequence[Row]]
"""The file of a shard, and its rows."""


class PrepareConfig(Settings):
    """How the shards are made."""

    shorter_side: int | None = Field(
        512,
        ge=16,
        le=2048,
        description="images are reduced to this shorter side, in pixels; none: kept as they are. 512 serves every "
        "recipe; 256 is faster to read, for recipes that see 224 pixels",
    )
    jpeg_quality: int = Field(90, ge=50, le=100, description="of images that are changed")
    halved_colour: bool = Field(
        True, description="store colour in half the resolution where images are changed, as photographs have it"
    )
    rows_per_shard: int = Field(500, ge=1, description="images of a shard; as many are in memory at once")
    max_bad_share: float = Field(0.01, ge=0, le=1, description="share of the images that may be quarantined")


class DigitsPrepareConfig(PrepareConfig):
    """How the shards of `digits` are made, whose images have 64 x 64 pixels."""

    shorter_side: int | None = Field(64, ge=16, le=2048, description="images are reduced to this shorter side")
    jpeg_quality: int = Field(95, ge=50, le=100, description="of images that are changed")
    halved_colour: bool = Field(False, description="store colour in half the resolution; thin strokes fade")


class DigitsPreparation(Settings):
    """`setwise data prepare digits`: how the data set is composed, and how it is stored."""

    generate: DigitsConfig = DigitsConfig()
    prepare: DigitsPrepareConfig = DigitsPrepareConfig()


class PrepareSettings(Settings):
    """`setwise data prepare NAME`: where the files of the data set are, and how it is stored."""

    source: SourceConfig = SourceConfig()
    prepare: PrepareConfig = PrepareConfig()


@dataclass(frozen=True)
class Prepared:
    """A prepared data set on disk."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def kind(self) -> str:
        """`images` or `regions`."""
        return str(self.manifest["kind"])

    def describe(self) -> str:
        counts = ", ".join(
            f"{name} {self.manifest['splits'][name]['images']:,} images with "
            f"{self.manifest['splits'][name]['captions']:,} captions"
            for name in datasets.SPLITS
            if name in self.manifest["splits"]
        )
        return f"{counts}; {len(self.manifest['quarantine'])} quarantined"


def check_name(name: str) -> None:
    """Raises ConfigError if a data set cannot be called `name`."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"'{name}' cannot name a data set: use lower-case letters, digits, '.', '_' and '-'")


def is_there(name: str, store: Path) -> bool:
    """Whether data set `name` was prepared in `store`, whatever became of it since."""
    return (store / "data" / name / "prepared" / "manifest.json").is_file()


def open_prepared(name: str, store: Path) -> Prepared:
    """A data set that was prepared before; one that only the store's mirror has is fetched from there.

    Raises:
        ConfigError: `name` cannot be one.
        DataError: it was not, a file of it is missing or damaged, or region features have changed since.
    """
    check_name(name)
    folder = store / "data" / name / "prepared"
    if not is_there(name, store) and not mirrored.fetch(name, store):
        raise DataError(f"data set '{name}' is not prepared in {store}. Do it with: {command(name)}")
    manifest = _manifest(folder)
    if manifest is None:
        raise DataError(f"{folder / 'manifest.json'} is damaged. Make it again: {command(name)}")
    if manifest["identity"]["schema"] != SCHEMA:
        raise DataError(f"{folder}: another version of setwise made it. Make it again: {command(name)}")
    again = command(name, manifest["source"]["folder"])
    if path := _damaged(folder, manifest):
        raise DataError(f"{path} is missing or not as long as it was. Make it again: {again}")
    for described in manifest["features"].values():
        if change := feature_files.change(described):
            raise DataError(f"{change}. Prepare the data set again: {again}")
    return Prepared(folder, manifest)


def command(name: str, folder: str | None = None, *overrides: str) -> str:
    """What to type to prepare data set `name`, of the files in `folder`."""
    origin = [] if name == "digits" else ["--from", shlex.quote(folder) if folder else "FOLDER"]
    return " ".join(["setwise data prepare", name, *origin, *overrides])


def check_fits(prepared: Prepared, recipe: Recipe) -> None:
    """Whether a recipe can read a prepared data set.

    Raises:
        ConfigError: features of another width, or settings of the recipe that the images are too small for.
        DataError: region features for an encoder of pixels, or the other way round.
    """
    name, encoder = str(prepared.manifest["name"]), getattr(recipe.model, "image_encoder", None)
    folder = prepared.manifest["source"]["folder"]
    if isinstance(encoder, RegionsConfig):
        if prepared.kind == "images":
            raise DataError(
                f"'{name}' holds images, and an image encoder of kind 'butd' reads region features. Prepare a data set "
                f"of features: {command(f'{name}_butd')}"
            )
        for split, described in prepared.manifest["features"].items():
            if described["width"] != encoder.feature_dim:
                raise ConfigError(
                    f"model.image_encoder.feature_dim is {encoder.feature_dim}, and the features of '{name}' are "
                    f"{described['width']} wide ({split}: {described['file']}). Set "
                    f"model.image_encoder.feature_dim={described['width']}, or prepare others: {command(name)}"
                )
    elif prepared.kind == "regions":
        raise DataError(
            f"'{name}' holds region features, and this model reads images. Prepare a "
            f"data set of images: {command(name.removesuffix('_butd'))}"
        )
    else:
        stored, wanted = prepared.manifest["settings"]["shorter_side"], recipe.data.image_size
        if stored is not None and wanted > stored:
            raise ConfigError(
                f"data.image_size is {wanted}, and the images of '{name}' were reduced to a shorter side of {stored}. "
                f"Set data.image_size={stored} or less, or prepare them again: "
                f"{command(name, folder, f'prepare.shorter_side={wanted}')}"
            )


def _manifest(folder: Path) -> dict[str, Any] | None:
    """What the manifest of a prepared data set says, None if that is nothing."""
    manifest = _read(folder / "manifest.json")
    is_one = isinstance(manifest, dict) and isinstance(manifest.get("identity"), dict)
    return manifest if is_one and "schema" in manifest["identity"] else None


def _read(file: Path) -> Any:
    """The content of a JSON file, None if it is missing or damaged."""
    try:
        return storage.read_json(file)
    except (OSError, ValueError):
        return None


def _damaged(folder: Path, manifest: dict[str, Any]) -> Path | None:
    """The first file that is missing, or the first shard that has another length than was written."""
    if not (folder / "vocabulary.json").is_file():
        return folder / "vocabulary.json"
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            if not shards.is_whole(folder, shard):
                return folder / str(shard["file"])
    return None


def prepare_digits(store: Path, settings: DigitsPreparation, say: Say) -> Prepared:
    """Generate the embedded data set and prepare it; what is already there and unchanged is reused."""
    digits = settings.generate
    base = store / "data" / "digits"
    with storage.lease(base / "lease", "data set 'digits'"):
        source = base / "source"
        wanted = {"generator": digits.model_dump(mode="json")}
        marker = source / GENERATED
        if _read(marker) != wanted:
            say(f"composing {digits.train + digits.val + digits.test:,} scenes from handwritten digits")
            with storage.publish_folder(source) as building:
                generate(building, digits)
                storage.write_json(building / GENERATED, wanted)
        files = datasets.open_source("digits", SourceConfig(folder=str(source)))
        return mirrored.keep(prepare(files, base / "prepared", settings.prepare, say, str(source)), store, say)


def prepare_source(name: str, store: Path, settings: PrepareSettings, say: Say) -> Prepared:
    """Prepare data set `name` from its files; what is already there and unchanged is reused.

    Raises:
        ConfigError: `name` cannot be one, or the settings say nowhere where the files are.
        DataError: the files are wrong, or too many of the images are.
    """
    check_name(name)
    base = store / "data" / name
    with storage.lease(base / "lease", f"data set '{name}'"):
        source = datasets.open_source(name, settings.source)
        for note in source.notes:
            say(note)
        made = prepare(source, base / "prepared", settings.prepare, say, settings.source.folder)
        return mirrored.keep(made, store, say)


def prepare(source: Source, target: Path, settings: PrepareConfig, say: Say, folder: str | None = None) -> Prepared:
    """Write the shards of `source` to `target`, unless they are there already, made from the same files.

    Args:
        folder: where the source's files are, to be named in the manifest.

    Raises:
        DataError: there is no image, a file of features cannot be used, or more than `max_bad_share` of the images
            cannot.
    """
    if not source.rows:
        raise DataError(f"'{source.name}' has no image that could be prepared")
    rows = Rows.of(source.rows)
    source = replace(source, rows=rows)
    features = identity.features(source)
    # Not of it is how much may be quarantined: to allow more, nothing has to be made anew.
    known_by = {
        "schema": SCHEMA,
        "settings": settings.model_dump(mode="json", exclude={"max_bad_share"}),
        **identity.of(source, features),
    }
    manifest = _manifest(target)
    if manifest is not None and manifest["identity"] == known_by and not _damaged(target, manifest):
        say(f"'{source.name}' is prepared already ({target})")
        return Prepared(target, manifest)

    working = target.with_name(f".{target.name}-{storage.fingerprint(known_by)}")
    _remove_leftovers(target, working)
    working.mkdir(parents=True, exist_ok=True)
    tasks = list(_tasks(rows, settings.rows_per_shard))
    missing = [(file, rows) for file, rows in tasks if shards.written(working / file) is None]
    there = f"; {len(tasks) - len(missing)} of {len(tasks)} shards are there" if len(missing) < len(tasks) else ""
    say(f"preparing {len(source.rows):,} {_things(source)} of '{source.name}' with Ray Data{there}")
    if missing:
        _write_shards(missing, working, settings)
    written = [_written(working / file) for file, _ in tasks]

    quarantine = [*source.quarantine, *(bad for shard in written for bad in shard.quarantine)]
    splits = _splits(written)
    for lost in shards.check_losses(source, splits, quarantine, settings.max_bad_share):
        say(lost)
    training = shards.captions(working, splits["train"]) if "train" in splits else []
    vocabulary.write(working / "vocabulary.json", vocabulary.collect(training))
    if source.extended_positives is not None:
        shutil.copytree(source.extended_positives, working / "extended_positives", dirs_exist_ok=True)
    manifest = {
        "name": source.name,
        "kind": source.kind,
        "fingerprint": identity.of_prepared(working, splits, features),
        "identity": known_by,
        "settings": settings.model_dump(mode="json"),
        "source": {"folder": folder, "files": [str(file) for file in source.files], "notes": source.notes},
        "features": features,
        "splits": splits,
        "quarantine": quarantine,
    }
    storage.write_json(working / "manifest.json", manifest)
    _publish(working, target)
    prepared = Prepared(target, manifest)
    say(prepared.describe())
    return prepared


def _things(source: Source) -> str:
    return "images" if source.kind == "images" else "images' region features"


def _tasks(rows: Rows, rows_per_shard: int) -> Iterator[Task]:
    """One task a shard, split by split."""
    for split in datasets.SPLITS:
        members = rows.of_split(split)
        for number, start in enumerate(range(0, len(members), rows_per_shard)):
            yield f"{split}-{number:05d}.parquet", members[start : start + rows_per_shard]


def _write_shards(tasks: Sequence[Task], folder: Path, settings: PrepareConfig) -> None:
    shard_tasks.run(tasks, folder, settings.shorter_side, settings.jpeg_quality, settings.halved_colour)


def _written(path: Path) -> Shard:
    shard = shards.written(path)
    if shard is None:
        raise DataError(f"{path} was written and is not there. Is the store in a folder that all machines share?")
    return shard


def _splits(written: list[Shard]) -> dict[str, Any]:
    """The manifest's view of the shards, by split."""
    splits: dict[str, Any] = {}
    for shard in written:
        split = splits.setdefault(shard.file.rpartition("-")[0], {"images": 0, "captions": 0, "shards": []})
        split["images"] += shard.images
        split["captions"] += shard.captions
        split["shards"].append(
            {
                "file": shard.file,
                "images": shard.images,
                "bytes": shard.bytes,
                "sha256": shard.sha256,
                "offsets_sha256": shard.offsets_sha256,
            }
        )
    return splits


def _remove_leftovers(target: Path, working: Path) -> None:
    """Of other attempts everything, and of this one the files that were being written when it was killed.

    Workers of a killed preparation may live a moment longer than it, and write.
    """
    for left in target.parent.glob(f".{target.name}-*"):
        if left != working:
            shutil.rmtree(left, ignore_errors=True)
    for part in working.glob(".*"):
        part.unlink(missing_ok=True)


def _publish(working: Path, target: Path) -> None:
    """Let `working` become `target`. Killed between the two renames, the next start finds all shards in `working`."""
    for path in working.rglob("*"):
        storage.sync_folder(path)
    storage.sync_folder(working)
    if target.exists():
        target.rename(target.with_name(f".{target.name}-replaced"))
    working.rename(target)
    storage.sync_folder(target.parent)
    shutil.rmtree(target.with_name(f".{target.name}-replaced"), ignore_errors=True)
