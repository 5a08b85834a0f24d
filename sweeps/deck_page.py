"""The deck as one page that opens offline and alone: tables, plots that plotly.js draws, and pictures of attention.

Nothing is said by colour alone: lines differ in their marks, verdicts are words.
"""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from setwise.models.config import SetPredictionConfig
from setwise.pipelines import attention, index, page, prepare, trained_model
from setwise.pipelines.cards import data_uri
from setwise.pipelines.tables import metric_name
from setwise.sweeps import deck_measure
from setwise.sweeps.deck import RECALLS, Found, Standing, in_words, values_of, varied
from setwise.sweeps.plots import Figure, said
from setwise.sweeps.report import short
from setwise.sweeps.variants import SYSTEMS

PAGES = Path(__file__).parent / "pages"
SHOWN = 6
"""Images whose attention is drawn."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "pentagon", "hexagon", "bowtie")
COLOURS = ("#1c7ed6", "#e8590c", "#2b8a3e", "#ae3ec9", "#868e96", "#e03131", "#0b7285", "#f08c00", "#5c940d", "#c2255c")


@dataclass(frozen=True)
class Seen:
    """A slot's attention over an image as a picture, and the caption whose element is nearest to the slot's own."""

    picture: str
    caption: str
    cosine: float
    own: bool


@dataclass(frozen=True)
class Read:
    """An image of the test split as the slots read it."""

    label: str
    picture: str
    captions: list[str]
    slots: list[Seen]


def render(found: Found, store: Path) -> str:
    """The page."""
    from plotly.offline import get_plotlyjs

    figures = _figures(found)
    try:
        reads, whose, why_not = _attention(found, store)
    except Exception as error:  # no picture is worth the page
        reads, whose, why_not = [], "", f"it cannot be drawn: {in_words(error)}"
    return page.render(
        "deck.html",
        folder=PAGES,
        found=found,
        systems=found.group(SYSTEMS),
        recalls={name: metric_name(name) for name in RECALLS},
        budget=deck_measure.BUDGET,
        unequal=[name for name in deck_measure.BUDGET if len({one.budget(name) for one in found.standings}) > 1],
        ablations={name: _ablation(found, rows) for name, rows in found.ablations.items()},
        spread_of=[one for one in found.group(SYSTEMS) if one.health(deck_measure.SPREAD) is not None],
        similarity=lambda one: found.spec.variants[one.name].trained.similarity.kind,
        slots=lambda one: found.spec.variants[one.name].trained.retriever.set_prediction.num_slots,
        epochs=next(iter(found.spec.variants.values())).trained.train.epochs,
        growth=[found.speed.growth(name) for name in found.speed.search] if found.speed is not None else [],
        reads=reads,
        whose=whose,
        why_not=why_not,
        said=said,
        figures=figures,
        drawn=json.dumps(figures, allow_nan=False).replace("<", "\\u003c"),
        plotly=get_plotlyjs() if figures else "",
    )


def _figures(found: Found) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    if systems := found.group(SYSTEMS):
        figures["systems"] = _bars(systems)
    if found.speed is not None:
        figures["speed"] = _speed(found)
    if any(run.spread for one in systems for run in one.runs):
        figures["spread"] = _spread(systems)
    for group, rows in found.ablations.items():
        figures[f"ablation-{group}"] = _points(found, rows)
    return figures


def _bars(systems: list[Standing]) -> Figure:
    """RSUM of each system with its interval, the first on top."""
    rows = systems[::-1]
    values = [one.values["rsum"] for one in rows]
    bars = {
        **{"type": "bar", "orientation": "h", "y": [html.escape(one.name) for one in rows]},
        **{"x": [one.value for one in values], "marker": {"color": "#1c7ed6"}, "hoverinfo": "x+y"},
        "error_x": {
            **{"type": "data", "symmetric": False, "color": "#868e96"},
            **{
                "array": [one.high - one.value for one in values],
                "arrayminus": [one.value - one.low for one in values],
            },
        },
    }
    across = {"title": {"text": "test RSUM, with its 95 % interval"}}
    layout = {"xaxis": across, "yaxis": {"automargin": True}, "height": 130 + 32 * len(rows)}
    return {"data": [bars], "layout": layout}


def _speed(found: Found) -> Figure:
    assert found.speed is not None, "asked of a deck with times"
    speed = found.speed
    lines = [
        {
            **{"type": "scatter", "mode": "lines+markers", "name": html.escape(name), **_look(place)},
            **{"x": speed.sizes, "y": [speed.median(name, size) for size in speed.sizes]},
        }
        for place, name in enumerate(speed.search)
    ]
    axes = {
        "xaxis": {"title": {"text": "images in the gallery"}, "type": "log", "tickvals": speed.sizes},
        "yaxis": {"title": {"text": "ms for one search, median"}, "type": "log"},
    }
    return {"data": lines, "layout": axes}


def _spread(systems: list[Standing]) -> Figure:
    """Log circular variance over a training: the mean over seeds."""
    lines: list[Figure] = []
    for one in systems:
        curves = [run.spread for run in one.runs if run.spread]
        if not curves:
            continue
        epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = [sum(curve[epoch] for curve in curves) / len(curves) for epoch in epochs]
        style = {"type": "scatter", "mode": "lines+markers", "name": html.escape(one.name), **_look(len(lines))}
        lines.append({**style, "x": epochs, "y": means})
    axes = {
        "xaxis": {"title": {"text": "epoch"}},
        "yaxis": {"title": {"text": "log circular variance of image sets"}},
    }
    return {"data": lines, "layout": {**axes, "showlegend": True}}


def _points(found: Found, rows: list[Standing]) -> Figure:
    """RSUM of an ablation by the value of what varies; of several settings, by variant."""
    names = varied(found.spec, [one.name for one in rows])
    one_setting = len(names) == 1
    places = [said(values_of(found.spec, one.name, names)[0]) if one_setting else one.name for one in rows]
    values = [one.values["rsum"] for one in rows]
    points = {
        **{"type": "scatter", "mode": "lines+markers" if one_setting else "markers", **_look(0)},
        **{"x": [html.escape(place) for place in places], "y": [one.value for one in values]},
        "error_y": {
            **{"type": "data", "symmetric": False, "color": "#868e96"},
            **{
                "array": [one.high - one.value for one in values],
                "arrayminus": [one.value - one.low for one in values],
            },
        },
    }
    title = short(names[0]) if one_setting else "variant"
    axes = {"xaxis": {"title": {"text": title}, "type": "category"}, "yaxis": {"title": {"text": "test RSUM"}}}
    return {"data": [points], "layout": {**axes, "showlegend": False}}


def _look(place: int) -> dict[str, Any]:
    colour = COLOURS[place % len(COLOURS)]
    marker = {"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 9, "color": colour}
    return {"marker": marker, "line": {"color": colour, "width": 2}}


def _ablation(found: Found, rows: list[Standing]) -> dict[str, Any]:
    """What the table of an ablation shows."""
    names = varied(found.spec, [one.name for one in rows])
    each = [(one, [said(value) for value in values_of(found.spec, one.name, names)]) for one in rows]
    return {"names": names, "rows": each}


def _attention(found: Found, store: Path) -> tuple[list[Read], str, str]:
    """What the slots of the reference see on images spread evenly over the test split, whose model it is, and else why
    there is none."""
    reference = found.standing(found.settings.reference)
    if reference is None:
        return (
            [],
            "",
            "no training of a reference was measured" if found.settings.reference else "no reference is named",
        )
    best = max(reference.runs, key=lambda one: one.validation)
    model = trained_model.load(best.run.best_checkpoint())
    sets_of = model.recipe.retriever.set_prediction
    if not isinstance(sets_of, SetPredictionConfig) or sets_of.num_slots == 1:
        return [], best.run.name, f"{reference.name} has no slots that compete for what they read"
    prepared = prepare.open_prepared(model.recipe.data.name, store)
    split = index.open_split(model, prepared, deck_measure.SPLIT)
    if prepared.kind != "images":
        return [], best.run.name, "the data set holds features of regions, and no pixels that could be shown"
    images = found.settings.images
    count = min(images or len(split), len(split))
    sets = (
        index.embeddings(model, prepared, split, store) if images is None else deck_measure.first(model, split, count)
    )
    reads = []
    for number in range(min(SHOWN, count)):
        place = (2 * number + 1) * count // (2 * min(SHOWN, count))
        reads.append(_read(model, split, place, sets.text_sets))
    return reads, best.run.name, ""


def _read(model: trained_model.TrainedModel, split: Any, place: int, texts: torch.Tensor) -> Read:
    image = split.batch([place]).images[0]
    seen = attention.of_image(model, image)
    assert seen.grid is not None, "an image has cells"
    slots = [
        Seen(data_uri(attention.overlay(image, weights, seen.grid)), split.caption(text), cosine, text in own)
        for weights, (text, cosine) in zip(seen.weights, attention.nearest(seen.sets, texts), strict=True)
        for own in [range(int(split.first_caption[place]), int(split.first_caption[place + 1]))]
    ]
    return Read(f"image {split.image_ids[place]}", data_uri(image), split.captions_of(place), slots)
