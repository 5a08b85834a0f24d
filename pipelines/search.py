"""Search: a caption finds images, an image finds captions, by a model that was trained here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from setwise.pipelines import batches, index, prepare, shards, trained_model
from setwise.pipelines.images import BadImageError, encode_jpeg, read_file, read_rgb
from setwise.pipelines.references import Reference
from setwise.platform.errors import ConfigError, DataError

MAX_QUERY_CHARACTERS = 2_000
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
"""Ends of names by which a query is an image file."""


@dataclass(frozen=True)
class Hit:
    """One answer: for a caption query an image with the captions written for it, for an image query a caption."""

    score: float
    image_id: int
    captions: list[str]


@dataclass(frozen=True)
class Answer:
    """The hits, best first, and which words of the query the model does not know."""

    model: str
    dataset: str
    split: str
    hits: list[Hit]
    unknown_words: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def search(query: str, reference: Reference, store: Path, top: int = 5, split: str = "test") -> Answer:
    """Rank a split of the model's data set for `query`: a path of an image file, or a caption.

    Raises:
        ConfigError: the query is empty or too long, or an image for a model of region features, or `top` is not
            positive.
        DataError: the image cannot be read.
    """
    if top < 1:
        raise ConfigError(f"top is {top}; ask for at least one answer")
    model = trained_model.load(reference.checkpoint)
    prepared = prepare.open_prepared(model.recipe.data.name, store)
    gallery = index.open_split(model, prepared, split)
    sets = index.embeddings(model, prepared, gallery, store)
    name = prepared.manifest["name"]

    if Path(query).suffix.lower() in IMAGES:
        if prepared.kind == "regions":
            raise ConfigError(
                f"{reference.label} reads region features of images, which no image file has; search with a caption"
            )
        pixels = batches.evaluation_pixels(image_file(Path(query)), model.recipe.data)
        scores = model.scores(model.encode_images(pixels[None]), sets.text_sets)[0]
        hits: list[Hit] = []
        for place in scores.argsort(descending=True).tolist():
            text = gallery.caption(place)
            if any(text in hit.captions for hit in hits):
                continue  # the same sentence was written for several images
            hits.append(Hit(float(scores[place]), int(gallery.image_ids[sets.owners[place]]), [text]))
            if len(hits) == top:
                break
        return Answer(reference.label, name, split, hits, [])

    text = " ".join(query.split())
    if not text or len(text) > MAX_QUERY_CHARACTERS:
        raise ConfigError(f"the query has {len(text):,} characters; it takes 1 to {MAX_QUERY_CHARACTERS:,}")
    scores = model.scores(sets.image_sets, model.encode_captions([text]))[:, 0]
    best = scores.topk(min(top, len(scores)))
    found = [
        Hit(float(score), int(gallery.image_ids[place]), gallery.captions_of(place))
        for score, place in zip(best.values, best.indices.tolist(), strict=True)
    ]
    return Answer(reference.label, name, split, found, model.vocabulary.unknown(text))


def image_file(path: Path) -> bytes:
    """The bytes of an image, checked and stored again as an upright RGB JPEG of high quality."""
    try:
        return encode_jpeg(read_rgb(read_file(path)), quality=98)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except BadImageError as error:
        raise DataError(f"{path}: {error}") from error


def export_images(answer: Answer, store: Path, folder: Path) -> list[Path]:
    """Write the images of an answer to `folder`, best first, to be looked at.

    Raises:
        ConfigError: the folder cannot be written.
        DataError: the data set holds region features, and no images.
    """
    prepared = prepare.open_prepared(answer.dataset, store)
    if prepared.kind == "regions":
        raise DataError(f"'{answer.dataset}' holds region features, and no images that could be saved")
    split = prepared.manifest["splits"][answer.split]
    jpegs = shards.Jpegs(prepared.folder, split)
    image_ids = shards.read(prepared.folder, split, ("image_id",)).column("image_id").to_pylist()
    places = {image_id: place for place, image_id in enumerate(image_ids)}
    paths = [folder / f"{rank:02d}_{hit.image_id}.jpg" for rank, hit in enumerate(answer.hits, start=1)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, hit in zip(paths, answer.hits, strict=True):
            path.write_bytes(jpegs[places[hit.image_id]].tobytes())
    except OSError as error:
        raise ConfigError(
            f"{folder}: images cannot be written there ({error.strerror}). Name another folder"
        ) from error
    return paths
