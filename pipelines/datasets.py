"""Data sets as their publishers ship them: what their readers return, which names are known, and how files are found.

A row is one image with its captions. The readers (karpathy.py, coco_captions.py, region_files.py, caption_tables.py)
check what they are given and name the file and entry of every mistake; they decode no image and read no feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from setwise.platform.config import Settings
from setwise.platform.errors import ConfigError, DataError

if TYPE_CHECKING:
    from setwise.pipelines.rows import Rows

SPLITS = ("train", "val", "test")
COCO_CAPTIONS = 5
"""Captions of a COCO image that everybody uses, the first ones, where people wrote six or seven."""
LISTED = 10
"""So many of the same mistake are named in a message."""
FIRST_NUMBER = 10**9
"""Where files have no ids, images and captions are numbered from here on, so that none has an id of COCO's."""
SEEN_NAMES = 100
"""Names of images that a folder is recognised by."""


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

    `rows` in the order of the data set; `files` decide what they are, and by their content the data set is known again
    (features, too large for that, are not among them). `quarantine` lists what could not be made a row of:
    {"image_id", "caption_id", "path", "reason"}; the path of a line that is no caption is FILE:LINE, and it has no ids.
    `notes` say in one sentence each what was noticed and handled, such as images with more than five captions.
    """

    name: str
    kind: Literal["images", "regions"]
    rows: Sequence[Row]
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
    """Data sets that have a name of their own; every other name is free for files of one's own."""
    return tuple(PUBLISHED)


def is_coco(name: str) -> bool:
    return name == "coco" or name.startswith("coco_")


def is_flickr30k(name: str) -> bool:
    return name == "f30k" or name.startswith("f30k_")


def open_source(name: str, config: SourceConfig) -> Source:
    """The files of data set `name`, read; the form they have is found by what is in the folder.

    Raises:
        ConfigError: no folder is given.
        DataError: the folder holds no data set, or a file of it is wrong.
    """
    from setwise.pipelines.rows import Rows

    if config.folder is None:
        raise ConfigError(f"where are the files of '{name}'? Say so: source.folder=FOLDER")
    folder = check_folder(name, config.folder)
    source = _read(name, folder, config)
    source = replace(source, rows=Rows.of(source.rows))
    check_ids(source.rows, f"{source.files[0]}")
    limit = config.captions_per_image or (COCO_CAPTIONS if is_coco(name) else None)
    rows, counted = first_captions(source.rows, limit)
    extended = folder / "extended_positives"
    return replace(
        source,
        rows=rows,
        notes=[*source.notes, *counted],
        extended_positives=extended if extended.is_dir() else None,
    )


def check_folder(name: str, folder: str) -> Path:
    """The folder of the files of `name`. Raises DataError if it is none."""
    path = Path(folder).expanduser()
    if path.is_file():
        raise DataError(f"{path} is a file. Name the folder that it is in, and the file by source.annotations=FILE")
    if not path.is_dir():
        raise DataError(f"{path}: no such folder. Where are the files of '{name}'?")
    return path


def _read(name: str, folder: Path, config: SourceConfig) -> Source:
    """By the reader that belongs to the files of the folder."""
    from setwise.pipelines import caption_tables, coco_captions, karpathy, region_files, table_lines

    given = Path(config.annotations).expanduser() if config.annotations is not None else None
    features = region_files.find(folder)
    if features is not None and name.endswith("_butd"):
        return region_files.read(name, features, given)
    if given is None:
        annotations = karpathy.find(name, folder) or coco_captions.find(folder) or caption_tables.find(folder)
        only_features = annotations is None
    else:  # it has the ids of features beside it, unless the name is that of a data set of images
        annotations = given
        only_features = features == folder and name not in PUBLISHED
    if features is not None and only_features:
        return region_files.read(name, features, given)
    if annotations is None:
        raise DataError(
            f"{folder}: holds no data set that can be read. Looked for {', '.join(karpathy.names(name))} and "
            f"{' + '.join(coco_captions.FILES)} (in the folder and in annotations/), "
            f"{', '.join(caption_tables.FILES)}, and {', '.join(region_files.FILES)} (in the folder and in precomp/). "
            "A file of captions that lies elsewhere is named by source.annotations=FILE."
        )
    if annotations.name in coco_captions.FILES:
        source = coco_captions.read(name, annotations.parent, folder, config.images)
    elif annotations.suffix in table_lines.SUFFIXES:
        source = caption_tables.read(name, annotations, folder, config.images)
    else:
        source = karpathy.read(name, annotations, folder, config.images)
    if features is not None:
        source.notes.append(
            f"{features} holds region features too; they are prepared as {name}_butd, or with --from {features}"
        )
    return source


def check_name(name: str) -> None:
    """Raises ValueError if `name` can be no file inside a folder; the message continues "it names ..."."""
    pure = PurePosixPath(name)
    if "\x00" in name or any("\ud800" <= character <= "\udfff" for character in name) or not pure.name:
        raise ValueError(f"{name!r}, which no file can be called")
    if pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"'{name}', which is outside of the folder of images")


class ImageFolder:
    """A folder of images, out of which no name may lead."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._real = folder.resolve()
        self._folders: dict[str, Path] = {}  # inside `folder`, and found to stay there

    def path(self, name: str) -> Path:
        """The file called `name`, relative to the folder, whether it is there or not.

        Raises:
            ValueError: the name leads outside or can name no file; the message continues "it names ...".
        """
        check_name(name)
        pure = PurePosixPath(name)
        parent = str(pure.parent)
        if parent not in self._folders:
            self._check_inside(self.folder / parent)
            self._folders[parent] = self.folder / parent
        path = self._folders[parent] / pure.name
        try:
            is_link = path.is_symlink()
        except OSError:  # such as a name that is too long: whoever reads the file will say so
            is_link = False
        if is_link:
            self._check_inside(path)
        return path

    def _check_inside(self, path: Path) -> None:
        try:
            real = path.resolve()
        except (OSError, RuntimeError) as error:
            raise ValueError(f"'{path}', which leads nowhere ({error})") from error
        if not real.is_relative_to(self._real):
            raise ValueError(
                f"'{path}', which leads outside of {self.folder}, to {real}. If that is meant, name the folder that it "
                "leads to: source.images=FOLDER"
            )


def find_images(folder: Path, given: str | None, places: Sequence[str], names: Sequence[str]) -> Path:
    """The folder that `names` are relative to: `given`, or the first of `places` in `folder` that has one of them.

    Raises:
        DataError: there is none.
    """
    if given is not None:
        if not Path(given).expanduser().is_dir():
            raise DataError(f"{given}: no such folder (source.images)")
        return Path(given).expanduser()
    some = names[:: max(1, len(names) // SEEN_NAMES)]
    candidates = [folder / place for place in places]
    for candidate in candidates:
        if any(_is_there(candidate, name) for name in some):
            return candidate
    raise DataError(
        f"{folder}: none of {len(some)} image files was found, the first of them '{names[0]}'. Looked in "
        f"{', '.join(str(candidate) for candidate in candidates)}. Name the folder: source.images=FOLDER"
    )


def _is_there(folder: Path, name: str) -> bool:
    try:
        return (folder / name).exists()
    except OSError:  # a name that is too long
        return False


def as_id(value: Any) -> int:
    """An id as shards hold it. Raises TypeError or ValueError if `value` is no integer of 64 bits."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no id, which is an integer")
    if not -(2**63) <= value < 2**63:
        raise ValueError("an id has more than 64 bits")
    return value


def listed(values: Iterable[Any], separator: str = ", ") -> str:
    """The first ten of `values`, and how many there are besides."""
    texts = [str(value) for value in values]
    more = f"{separator}and {len(texts) - LISTED:,} more" if len(texts) > LISTED else ""
    return separator.join(texts[:LISTED]) + more


def check_ids(rows: Sequence[Row], where: str) -> None:
    """Raises DataError if there is no row, or if two images or two captions of `rows` have the same id."""
    from setwise.pipelines.rows import Rows

    if not rows:
        raise DataError(f"{where}: lists no image that can be used")
    rows = Rows.of(rows)
    images: dict[int, Row] = {}
    same_image = []
    for row in rows.with_repeated_id():
        if (first := images.setdefault(row.image_id, row)) is not row:
            both = [f"'{one.path.name if one.place is None else one.place}' of {one.split}" for one in (first, row)]
            same_image.append(f"{' and '.join(both)} have the same id {row.image_id}")
    if same_image:
        raise DataError(f"{where}: {listed(same_image, '; ')}")
    owners: dict[int, Row] = {}
    same_caption = []
    for row in rows.with_repeated_caption_id():
        for caption in row.captions:
            if (other := owners.get(caption.caption_id)) is not None:
                same_caption.append(
                    f"caption id {caption.caption_id} is in images {other.image_id} ({other.split}) and "
                    f"{row.image_id} ({row.split})"
                )
            owners[caption.caption_id] = row
    if same_caption:
        raise DataError(f"{where}: {listed(same_caption, '; ')}")


def first_captions(rows: Sequence[Row], limit: int | None) -> tuple[Rows, list[str]]:
    """`rows` with the first `limit` captions of each, and what there is to say about their numbers."""
    from setwise.pipelines.rows import Rows

    rows = Rows.of(rows)
    numbers = rows.caption_numbers
    fewest, most = int(numbers.min()), int(numbers.max())
    notes = []
    if limit is None:
        if fewest < most:
            notes.append(f"images have from {fewest} to {most} captions; all are used")
        return rows, notes
    more, fewer = int((numbers > limit).sum()), int((numbers < limit).sum())
    if more:
        notes.append(f"{more:,} images have more than {limit} captions, up to {most}; the first {limit} are used")
        rows = rows.with_captions(limit)
    if fewer:
        notes.append(f"{fewer:,} images have fewer than {limit} captions, down to {fewest}")
    return rows, notes
