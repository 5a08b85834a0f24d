"""Results as tables for a terminal: numbers aligned, settings by their last name, nothing said by colour alone."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from setwise.pipelines import protocol
from setwise.pipelines.benchmarks import Outcome
from setwise.pipelines.compare import VALIDATION, Comparison
from setwise.pipelines.metrics import KS
from setwise.pipelines.prepare import Prepared
from setwise.pipelines.search import Answer

COLUMNS = {
    **{f"R{k}": f"R@{k}" for k in KS},
    "map_at_r": "mAP@R",
    "r_precision": "R-Precision",
    "median_rank": "median rank",
    "mean_rank": "mean rank",
}
"""What may be reported of a direction, by the end of its name."""
DIRECTIONS = {"i2t": "image to text", "t2i": "text to image", "t2t": "text to text", "i2i": "image to image"}
CORRELATIONS = {"sts": "text and text", "sis": "image and image", "sits": "image and text"}
COMPARED = ("rsum", "t2i_map_at_r")


def outcome(measured: Outcome) -> RenderableType:
    """The values of one benchmark, a direction a row, with the protocol they were measured under."""
    values = measured.values
    table = Table()
    table.add_column(measured.benchmark)
    columns = [end for end in COLUMNS if any(f"{direction}_{end}" in values for direction in DIRECTIONS)]
    for end in columns:
        table.add_column(COLUMNS[end], justify="right")
    for direction, words in DIRECTIONS.items():
        numbers = [values.get(f"{direction}_{end}") for end in columns]
        if any(number is not None for number in numbers):
            table.add_row(words, *("" if number is None else f"{number:.1f}" for number in numbers))
    sums = [f"RSUM {values['rsum']:.1f}"] if "rsum" in values else []
    for task, words in CORRELATIONS.items():
        if f"{task}_spearman" in values:
            mean, deviation = values[f"{task}_spearman"], values[f"{task}_spearman_std"]
            sums.append(f"{task.upper()} ({words}), Spearman with the ratings: {mean:.1f} ± {deviation:.1f}")
    said = f"{measured.benchmark}: {protocol.in_words(measured.protocol)}; protocol {measured.fingerprint}"
    return Group(Text(said), table, *map(Text, sums))


def comparison(compared: Comparison) -> RenderableType:
    """Runs beside each other: the settings that differ, then what was measured."""
    table = Table()  # in a narrow terminal names fold: cut short, those of two runs would look alike
    table.add_column("run", overflow="fold")
    table.add_column("status", overflow="fold")
    table.add_column("epochs", justify="right", overflow="fold")
    settings = list(compared.rows[0].settings) if compared.rows else []
    measured = {name for row in compared.rows for name in row.values}
    values = [
        VALIDATION,
        *sorted(name for name in measured if name.rpartition("/")[2] in COMPARED and name != VALIDATION),
    ]
    for name in settings:
        table.add_column(name.rpartition(".")[2], justify="right", overflow="fold")
    for name in values:
        table.add_column(name, justify="right", overflow="fold")
    for row in compared.rows:
        shown = [plain(row.settings[name]) for name in settings]
        numbers = [f"{row.values[name]:.1f}" if name in row.values else "" for name in values]
        table.add_row(row.name, row.status, str(row.epochs), *shown, *numbers)
    left_out = [f"  {name}: {'; '.join(fields)}" for name, fields in compared.mixed.items()]
    own = dict.fromkeys(field for fields in compared.own_similarity.values() for field in fields)
    said = [f"each model is measured with its own similarity: {'; '.join(own)}"] if own else []
    if left_out:
        said += ["left out, since measured under protocols that differ:", *left_out]
    return Group(table, Text("\n".join(said))) if said else table


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


def prepared(data: Prepared, shown: int = 20) -> RenderableType:
    """What was prepared, of which files, and the first `shown` of what was left out."""
    manifest = data.manifest
    settings = ", ".join(f"{name} {value}" for name, value in manifest["settings"].items())
    lines = [
        f"{manifest['name']}: {data.describe()}",
        f"prepared in {data.folder}, fingerprint {data.fingerprint}",
        f"from {manifest['source']['folder']}: {', '.join(manifest['source']['files'])}",
        f"{manifest['kind']}, vocabulary of the training captions; {settings}",
        *manifest["source"]["notes"],
    ]
    for split, one in manifest["features"].items():
        lines.append(f"features of {split}: {one['file']}, {one['rows']:,} x {one['regions']} x {one['width']}")
    left_out = manifest["quarantine"]
    if not left_out:
        return Text("\n".join(lines))
    table = Table("image", "caption", "file", "left out because")
    for bad in left_out[:shown]:
        ids = ["" if bad[key] is None else str(bad[key]) for key in ("image_id", "caption_id")]
        table.add_row(*ids, Text(bad["path"]), Text(bad["reason"]))
    more = f"and {len(left_out) - shown:,} more; all with --json" if len(left_out) > shown else ""
    return Group(Text("\n".join(lines)), table, Text(more))
