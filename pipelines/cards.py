"""Cards of the gallery: a query, the answers to it with what is right and wrong, and what each slot sees.

Shape suffixes: K elements of a query's set, D width of an embedding.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from torch import Tensor

from setwise.pipelines import attention, positives, ranking
from setwise.pipelines.batches import Split, evaluation_pixels
from setwise.pipelines.benchmarks import Outcome
from setwise.pipelines.embeddings import Embeddings
from setwise.pipelines.images import encode_jpeg, resize_shorter_side
from setwise.pipelines.positives import Integers, Truth
from setwise.pipelines.ranking import Member
from setwise.pipelines.search import IMAGES, MAX_QUERY_CHARACTERS, image_file
from setwise.pipelines.trained_model import TrainedModel
from setwise.platform.errors import ConfigError

Direction = Literal["i2t", "t2i"]
RIGHT, ALSO, WRONG, UNKNOWN = "right", "also true", "wrong", ""
TOP = 5
"""What the name of an image's file ends in; a query that ends otherwise is a caption."""
THUMBNAIL, QUALITY = 128, 85
"""Pixels along the side of a picture on the page, at most, and the quality of its JPEG."""
MARGIN = 1e-4
"""Scores that are this close in float32 may change places when they are computed exactly."""


@dataclass(frozen=True)
class Item:
    """An image with its captions, or a caption: as a query, as an answer to one, or as the nearest to an element.

    picture: a data URI; None for a caption, and where only features of the image's regions are there. mark: whether it
    is true of the query; of a query from outside nobody knows. rank: among the answers.
    """

    label: str
    texts: list[str]
    picture: str | None = None
    score: float = 0.0
    mark: str = UNKNOWN
    rank: int | None = None


@dataclass(frozen=True)
class Slot:
    """What one slot attends to, as a picture or as (name, weight), and what the element that it makes is nearest to."""

    picture: str | None
    inputs: list[tuple[str, float]]
    strongest: float
    nearest: Item


@dataclass(frozen=True)
class Card:
    """One query and the first answers to it; if none of them is right, the best that is stands behind them.

    ranks: by benchmark and model, 0 where the benchmark does not ask this query; empty for a query from outside. other:
    the answers of the other model, if there is one.
    """

    direction: Direction
    asked: Item
    ranks: dict[str, list[int]]
    answers: list[Item]
    other: list[Item]
    slots: list[Slot]
    unknown_words: list[str]


@dataclass(frozen=True)
class Measured:
    """A model, the sets that it made of a split, and what was measured of it there, by benchmark."""

    label: str
    model: TrainedModel
    sets: Embeddings
    outcomes: dict[str, Outcome]

    def side(self, direction: Direction) -> tuple[Tensor, Tensor]:
        """The sets of the queries and of the gallery."""
        images, texts = self.sets.image_sets, self.sets.text_sets
        return (images, texts) if direction == "i2t" else (texts, images)

    def ranks(self, benchmark: str, direction: Direction) -> Integers:
        """For every query of the split the recorded rank of the best that is true of it; 0 where it is not asked."""
        ids = (self.sets.image_ids if direction == "i2t" else self.sets.caption_ids).numpy()
        recorded = self.outcomes[benchmark].ranks[direction]
        ranks = np.zeros(len(ids), np.int64)
        ranks[positives.find(ids, recorded.ids)] = recorded.ranks
        return ranks

    def answers(self, direction: Direction, query_KD: Tensor, right: Integers) -> list[tuple[int, float]]:
        """Indices and exact scores of the first items of the gallery, and behind them, if none of the `right` ones is
        among them, of the best that is. Of equal scores a right one comes last, as in pessimistic ranks."""
        gallery = self.side(direction)[1]
        pair = (query_KD[None], gallery) if direction == "i2t" else (gallery, query_KD[None])
        rough = self.model.scores(*pair).flatten()
        enough = float(rough.topk(min(TOP, len(rough))).values[-1]) - MARGIN
        items = np.union1d(np.flatnonzero(rough.numpy() >= enough), right)
        zeros = np.zeros_like(items)
        row, column = (zeros, items) if direction == "i2t" else (items, zeros)
        scores = ranking.pair_scores((self._member(pair),), row, column, self.model.device)
        is_right = np.isin(items, right)
        order = np.lexsort((items, is_right, -scores))
        behind = order[TOP:][is_right[order[TOP:]]]
        shown = [*order[:TOP], *([] if is_right[order[:TOP]].any() else behind[:1])]
        return [(int(items[place]), float(scores[place])) for place in shown]

    def _member(self, pair: tuple[Tensor, Tensor]) -> Member:
        return ranking.member(*pair, self.model.retrieval.similarity, self.model.device)


@dataclass(frozen=True)
class Dealer:
    """Makes cards of a split.

    truths: by benchmark; the first counts captions written for an image alone, the last all that is true. measured: the
    model that is shown, and perhaps another one.
    """

    split: Split
    has_pixels: bool
    truths: dict[str, Truth]
    measured: Sequence[Measured]

    def card(self, direction: Direction, query: int) -> Card:
        """A query of the split, by its index."""
        image = self.split.batch([query]).images[0] if direction == "i2t" else None
        sets = [one.side(direction)[0][query] for one in self.measured]
        return self._card(direction, query, self._item(direction == "i2t", query), image, sets)

    def card_from_outside(self, query: str) -> Card:
        """A caption, or an image by the path of its file.

        Raises:
            ConfigError: a caption that is empty or too long; an image, for a model of region features.
            DataError: it cannot be read.
        """
        models = [one.model for one in self.measured]
        if Path(query).suffix.lower() not in IMAGES:
            text = " ".join(query.split())
            if not text or len(text) > MAX_QUERY_CHARACTERS:
                raise ConfigError(f"a query has {len(text):,} characters; it takes 1 to {MAX_QUERY_CHARACTERS:,}")
            sets = [model.encode_captions([text])[0] for model in models]
            return self._card("t2i", None, Item("your caption", [text]), None, sets)
        if not self.has_pixels:
            raise ConfigError(f"{query}: {self.measured[0].label} reads region features, which no image file has")
        jpeg = image_file(Path(query))
        views = [evaluation_pixels(jpeg, model.recipe.data) for model in models]
        sets = [model.encode_images(view[None])[0] for model, view in zip(models, views, strict=True)]
        return self._card("i2t", None, Item("your image", [Path(query).name], data_uri(views[0])), views[0], sets)

    def _card(
        self, direction: Direction, query: int | None, asked: Item, image: Tensor | None, sets: list[Tensor]
    ) -> Card:
        """sets: (K,D) of the query, by each of the models."""
        own, every = self._true(direction, query)

        def shown(item: int, score: float, rank: int | None = None) -> Item:
            mark = RIGHT if item in own else ALSO if item in every else WRONG if query is not None else UNKNOWN
            return self._item(direction == "t2i", item, score, mark, rank)

        answers = []
        for measured, query_KD in zip(self.measured, sets, strict=True):
            found = measured.answers(direction, query_KD, own)
            items = [shown(item, score, rank) for rank, (item, score) in enumerate(found[:TOP], start=1)]
            if found[TOP:] and query is not None:
                items.append(shown(*found[TOP], int(measured.ranks(next(iter(self.truths)), direction)[query])))
            answers.append(items)
        ranks = {
            benchmark: [int(measured.ranks(benchmark, direction)[query]) for measured in self.measured]
            for benchmark in self.truths
            if query is not None
        }
        first = self.measured[0]
        slots = []
        if attention.has_slots(first.model):
            seen = (
                attention.of_caption(first.model, asked.texts[0])
                if image is None
                else attention.of_image(first.model, image)
            )
            nearest = attention.nearest(sets[0], first.side(direction)[1])
            for weights, (item, cosine) in zip(seen.weights, nearest, strict=True):
                picture = None
                if image is not None and seen.grid is not None:
                    picture = data_uri(attention.overlay(image, weights, seen.grid))
                inputs = [] if picture else list(zip(seen.names, weights.tolist(), strict=True))
                slots.append(Slot(picture, inputs, float(weights.max()), shown(item, cosine)))
        unknown = first.model.vocabulary.unknown(asked.texts[0]) if direction == "t2i" else []
        return Card(
            direction, asked, ranks, answers[0], [one for other in answers[1:] for one in other], slots, unknown
        )

    def _item(
        self, is_image: bool, index: int, score: float = 0.0, mark: str = UNKNOWN, rank: int | None = None
    ) -> Item:
        if not is_image:
            label, texts = f"caption {self.split.caption_ids[index]}", [self.split.caption(index)]
            return Item(label, texts, None, score, mark, rank)
        picture = data_uri(self.split.batch([index]).images[0]) if self.has_pixels else None
        label = f"image {self.split.image_ids[index]}"
        return Item(label, self.split.captions_of(index), picture, score, mark, rank)

    def _true(self, direction: Direction, query: int | None) -> tuple[Integers, Integers]:
        """Items that were written for a query, and all that is true of it; nothing is known of one from outside."""
        if query is None:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        sides = [truth.i2t if direction == "i2t" else truth.t2i for truth in self.truths.values()]
        found = [side.item[slice(*np.searchsorted(side.query, [query, query + 1]))] for side in sides]
        return found[0], found[-1]


def data_uri(pixels: Tensor) -> str:
    """A picture (3,S,S) uint8 as an address that holds all of it."""
    image = resize_shorter_side(Image.fromarray(pixels.permute(1, 2, 0).numpy()), THUMBNAIL)
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(image, QUALITY)).decode("ascii")
