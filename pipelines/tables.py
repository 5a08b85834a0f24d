"""Results as tables for a terminal: numbers aligned, settings by their last name, nothing said by colour alone."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from setwise.pipelines.benchmarks import Outcome
from setwise.pipelines.compare import VALIDATION, Comparison
from setwise.pipelines.search import Answer

RECALLS = tuple(f"{direction}_R{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10))
COMPARED = ("rsum", "t2i_map_at_r")


def outcome(measured: Outcome) -> RenderableType:
    """The values of one benchmark, with the protocol they were measured under."""
    protocol = measured.protocol
    folds = f"{protocol['folds']} x {protocol['images_per_fold']:,} images" if "images_per_fold" in protocol else ""
    gallery = folds or f"{protocol['images']:,} images, {protocol['captions']:,} captions"
    title = f"{measured.benchmark}: {gallery}, {protocol['grouping']}, protocol {measured.fingerprint}"
    table = Table()
    ranked = [name for name in measured.values if "rank" not in name]
    names = ranked if "rsum" not in measured.values else [*RECALLS, "rsum"]
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_row(*(f"{measured.values[name]:.1f}" for name in names))
    return Group(Text(title), table)


def comparison(compared: Comparison) -> Table:
    """Runs beside each other: the settings that differ, then what was measured."""
    table = Table(caption_justify="left")
    table.add_column("run")
    table.add_column("status")
    table.add_column("epochs", justify="right")
    settings = list(compared.rows[0].settings) if compared.rows else []
    measured = {name for row in compared.rows for name in row.values}
    values = [
        VALIDATION,
        *sorted(name for name in measured if name.rpartition("/")[2] in COMPARED and name != VALIDATION),
    ]
    for name in settings:
        table.add_column(name.rpartition(".")[2], justify="right")
    for name in values:
        table.add_column(name, justify="right")
    for row in compared.rows:
        shown = [plain(row.settings[name]) for name in settings]
        numbers = [f"{row.values[name]:.1f}" if name in row.values else "" for name in values]
        table.add_row(row.name, row.status, str(row.epochs), *shown, *numbers)
    if compared.mixed:
        table.caption = (
            f"left out, since protocols differ: {', '.join(compared.mixed)}; measure them again: setwise eval"
        )
    return table


def answer(query: str, found: Answer) -> RenderableType:
    """What a search found."""
    table = Table(show_lines=True)
    table.add_column("score", justify="right")
    table.add_column("image", justify="right")
    table.add_column("captions")
    for hit in found.hits:
        table.add_row(f"{hit.score:.3f}", str(hit.image_id), "\n".join(hit.captions))
    return Group(Text(f"'{query}' in {found.dataset} {found.split}, by {found.model}"), table)


def plain(value: Any) -> str:
    """A setting's value, short."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
