"""Plots of a study, as the plain values that plotly.js draws: {"data": [...], "layout": {...}}.

Nothing is said by colour alone: complete, pruned and unfinished trials differ in shape. Colours of text and lines are
the page's, which may be light or dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from setwise.pipelines.tables import plain

if TYPE_CHECKING:
    from setwise.sweeps.analysis import Row
    from setwise.sweeps.domain import Domain
    from setwise.sweeps.space import Study

Figure = dict[str, Any]
RSUM = "val RSUM"
MARKERS = {
    "complete": {"symbol": "circle", "color": "#1c7ed6", "size": 9, "opacity": 0.75},
    "pruned": {"symbol": "triangle-down-open", "color": "#e8590c", "size": 10},
    "unfinished": {"symbol": "diamond-open", "color": "#868e96", "size": 10},
}
TITLES = {"val/rsum": RSUM, "embedding_size": "numbers stored per image (K x D)", "query_ms": "ms per query"}
"""Axes of objectives."""
TICKS = 5
UNSET = "not varied"
MOST_LINES = 58
"""Settings that parallel coordinates show; plotly draws 60 axes at most."""


def labels(names: Sequence[str]) -> dict[str, str]:
    """What dotted names are called in plots: their last part, as far as that is theirs alone."""
    ends = [name.rpartition(".")[2] for name in names]
    return {name: end if ends.count(end) == 1 else name for name, end in zip(names, ends, strict=True)}


def history(rows: Sequence[Row]) -> Figure:
    """Each trial's RSUM in the order of their numbers, and the best until then."""
    best, line = -math.inf, []
    for row in rows:
        best = max(best, row.value if row.value is not None and row.ended_well else -math.inf)
        line.append(best if math.isfinite(best) else None)
    numbers = [row.number for row in rows]
    style = {"color": "#2b8a3e", "width": 2, "shape": "hv"}
    so_far = {"type": "scatter", "mode": "lines", "name": "best so far", "x": numbers, "y": line, "line": style}
    data = [{**so_far, "hoverinfo": "skip"}, *_points(rows, [float(number) for number in numbers])]
    trials = {"title": {"text": "trial"}} | ({"dtick": 1} if len(rows) <= 20 else {})
    return {"data": data, "layout": {"xaxis": trials, "yaxis": {"title": {"text": RSUM}}}}


def importance(shares: dict[str, float]) -> Figure:
    """A bar for each setting, the longest on top."""
    called = labels(list(shares))
    names = [called[name] for name in shares][::-1]
    values = [100 * share for share in shares.values()][::-1]
    bars = {
        **{"type": "bar", "orientation": "h", "x": values, "y": names, "marker": {"color": "#1c7ed6"}},
        **{"text": [f"{value:.0f} %" for value in values], "hoverinfo": "skip"},
    }
    across = {"title": {"text": "share of importance for val RSUM, % (PED-ANOVA)"}, "range": [0, 105]}
    upwards = {"title": {"text": "setting", "standoff": 12}, "automargin": True}
    return {"data": [bars], "layout": {"xaxis": across, "yaxis": upwards, "height": 130 + 32 * len(shares)}}


def slices(rows: Sequence[Row], space: dict[str, Domain]) -> dict[str, Figure]:
    """For each setting that some ended trial has: its value against RSUM."""
    figures = {}
    for name, domain in space.items():
        having = [row for row in rows if row.ended_well and name in row.settings]
        if not having:
            continue
        axis: dict[str, Any] = {"title": {"text": name}}
        places: list[float] | list[str]
        if domain.choice is not None:
            names = [html.escape(said(value)) for value in domain.choice]
            axis |= {"type": "category", "categoryarray": names, "range": [-0.5, len(names) - 0.5]}
            places = [html.escape(said(row.settings[name])) for row in having]
        else:
            places = [float(row.settings[name]) for row in having]
            if domain.loguniform is not None:
                ticks = {10**place: text for place, text in _ticks(domain).items()}
                axis |= {"type": "log", "tickvals": list(ticks), "ticktext": list(ticks.values())}
        layout = {"xaxis": axis, "yaxis": {"title": {"text": RSUM}}, "showlegend": False}
        figures[name] = {"data": _points(having, places), "layout": layout}
    return figures


def parallel(rows: Sequence[Row], spec: Study) -> Figure:
    """A line for each ended trial, over the settings to its objectives, the highest RSUM reddest and on top."""
    shown = sorted((row for row in rows if row.ended_well), key=lambda row: row.value or 0.0)
    names = [name for name in spec.space if any(name in row.settings for row in shown)][:MOST_LINES]
    called = labels(names)
    axes = [_axis(called[name], [row.settings.get(name) for row in shown], spec.space[name]) for name in names]
    costs = [name for name in spec.objectives if name in TITLES and all(name in row.costs for row in shown)]
    axes += [{"label": name, "values": [row.costs[name] for row in shown]} for name in costs]
    values = [row.value for row in shown]
    axes.append({"label": RSUM, "values": values})
    lines = {"color": values, "colorscale": [[0, "#adb5bd"], [0.5, "#5c7cfa"], [1, "#e8360c"]]}  # on black and on white
    return {"data": [{"type": "parcoords", "dimensions": axes, "line": lines}], "layout": {"height": 420}}


def fronts(rows: Sequence[Row], front: Sequence[int], objectives: Sequence[str]) -> dict[str, Figure]:
    """For each of `objectives`, those beside RSUM: the trials, and which of them are on the Pareto front.

    With one objective beside RSUM the front is joined by a line.
    """
    figures = {}
    for name in objectives:
        having = sorted(
            (row for row in rows if name in row.costs and row.value is not None), key=lambda r: r.costs[name]
        )
        if not having:
            continue
        best = [row for row in having if row.number in front]
        others = [row for row in having if row.number not in front]
        data = [
            {
                **{
                    "type": "scatter",
                    "mode": "markers",
                    "name": "beaten",
                    "marker": MARKERS["complete"],
                },
                **{"x": [row.costs[name] for row in others], "y": [row.value for row in others]},
                **{"hovertext": _texts(others), "hoverinfo": "text"},
            },
            {
                **{"type": "scatter", "mode": "lines+markers" if len(objectives) == 1 else "markers"},
                **{"name": "Pareto front", "line": {"color": "#2b8a3e", "width": 1, "dash": "dot"}},
                **{"marker": {"symbol": "star", "size": 13, "color": "#2b8a3e"}},
                **{"x": [row.costs[name] for row in best], "y": [row.value for row in best]},
                **{"hovertext": _texts(best), "hoverinfo": "text"},
            },
        ]
        axes = {"xaxis": {"title": {"text": TITLES[name]}}, "yaxis": {"title": {"text": RSUM}}}
        figures[name] = {"data": data, "layout": axes}
    return figures


def said(value: Any) -> str:
    """A value as YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else plain(value)


def _points(rows: Sequence[Row], places: Sequence[float] | Sequence[str]) -> list[Figure]:
    """One trace for each state, of the trials that have a value."""
    traces = []
    for state, marker in MARKERS.items():
        mine = [(row, x) for row, x in zip(rows, places, strict=True) if row.state == state and row.value is not None]
        if mine:
            trace = {"type": "scatter", "mode": "markers", "name": state, "marker": marker, "hoverinfo": "text"}
            found = {"x": [x for _, x in mine], "y": [row.value for row, _ in mine]}
            traces.append({**trace, **found, "hovertext": _texts([row for row, _ in mine])})
    return traces


def _texts(rows: Sequence[Row]) -> list[str]:
    """What is told of a trial where one points at it."""
    texts = []
    for row in rows:
        called = labels(list(row.settings))
        lines = [f"{called[name]} {said(value)}" for name, value in row.settings.items()]
        told = [f"{row.name}, {row.state}", f"{RSUM} {row.value:.1f}", *lines]
        texts.append("<br>".join(html.escape(line) for line in told))
    return texts


def _ends(domain: Domain) -> tuple[float, float]:
    """The lowest and the highest place of a domain on its axis."""
    if domain.choice is not None:
        return 0.0, float(len(domain.choice) - 1)
    low, high = domain.uniform or domain.loguniform or domain.int or (0.0, 1.0)
    return _place(low, domain), _place(high, domain)


def _place(value: Any, domain: Domain) -> float:
    """Where a value lies on the axis of its domain: the number of a choice, a number, or its logarithm."""
    if domain.choice is not None:
        return float(domain.choice.index(value))
    return math.log10(value) if domain.loguniform is not None else float(value)


def _ticks(domain: Domain) -> dict[float, str]:
    """What stands where on an axis."""
    if domain.choice is not None:
        return {float(place): said(value) for place, value in enumerate(domain.choice)}
    low, high = _ends(domain)
    places = [low + (high - low) * step / (TICKS - 1) for step in range(TICKS)]
    if domain.int is not None:
        return {float(round(place)): str(round(place)) for place in places}
    return {place: plain(10**place if domain.loguniform is not None else place) for place in places}


def _axis(label: str, values: Sequence[Any], domain: Domain) -> dict[str, Any]:
    """An axis of the parallel coordinates; what a trial did not vary has a place of its own below the others."""
    low, high = _ends(domain)
    ticks = _ticks(domain)
    if None in values:
        low -= 0.15 * (high - low)
        ticks = {low: UNSET, **ticks}
    drawn = [low if value is None else _place(value, domain) for value in values]
    return {
        **{"label": label, "values": drawn, "range": [low, high]},
        **{"tickvals": list(ticks), "ticktext": list(ticks.values())},
    }
