"""Results as tables for a terminal: numbers aligned, settings by their last name, nothing said by colour alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from setwise.pipelines import protocol, statistics
from setwise.pipelines.benchmarks import Outcome
from setwise.pipelines.compare import ALPHA, RESAMPLES, VALIDATION, Cell, Comparison, SideBySide, System, Verdict
from setwise.pipelines.evaluate import OFFICIAL, TEST
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
SMALL = 5
"""Below it a mean over seeds has two decimals."""
MARKS: dict[Verdict, str] = {"better": "▲", "worse": "▼", "undecided": "≈"}
FEW_SEEDS = 5


def outcome(measured: Outcome) -> RenderableType:
    """The values of one benchmark, a direction a row, with the protocol they were measured under."""
    values = measured.values
    if measured.benchmark == TEST:
        images, captions = measured.protocol["images"], measured.protocol["captions"]
        said = f"{images:,} images and {captions:,} captions of the test split"
        return Group(Text(said), *(Text(f"{TEST}/{name}: {value:.4g}") for name, value in values.items()))
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
    said = _not_alike(compared)
    return Group(table, Text("\n".join(said))) if said else table


def side_by_side(compared: SideBySide) -> RenderableType:
    """Systems side by side, a row for each system on each metric, with what was decided beforehand above."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    for name in ("benchmark", "metric", "system"):
        table.add_column(name, overflow="fold")
    for name in ("seeds", "mean ± sd", "Δ", f"{statistics.CONFIDENCE:.0f} % interval", "p", ""):
        table.add_column(name, justify="right", no_wrap=True)
    before = ("", "")
    for line in compared.lines:
        place = (line.benchmark, metric_name(line.metric))
        if place[0] != before[0]:
            table.add_section()
        shown = [place[0] if place[0] != before[0] else "", place[1]]
        for cell in line.cells:
            table.add_row(*shown, cell.system, seeds(compared, cell), *numbers(cell))
            shown = ["", ""]
        before = place
    parts: list[RenderableType] = [Text("\n".join(heading(compared)))]
    if compared.lines:
        parts.append(table)
    return Group(*parts, Text("\n".join(notes(compared))))


def metric_name(metric: str) -> str:
    """A metric as a person would say it."""
    direction, _, end = metric.partition("_")
    return f"{direction} {COLUMNS.get(end, end)}" if end else metric.upper()


def seeds(compared: SideBySide, cell: Cell) -> str:
    """How many of a system's seeds were measured."""
    of = next(one for one in compared.systems if one.name == cell.system)
    return f"{cell.seeds}/{len(of.runs)}"


def numbers(cell: Cell) -> list[str]:
    """Mean with deviation, difference, interval, p-value and mark; the last four are empty without a difference. Where
    an interval is narrower than one point it gets a second decimal."""
    digits = 2 if abs(cell.mean) < SMALL else 1
    spread = "" if cell.deviation is None else f" ± {cell.deviation:.{digits}f}"
    value = f"{cell.mean:.{digits}f}{spread}"
    if cell.difference is None or cell.corrected is None or cell.verdict is None:
        return [value, "", "", "", ""]
    one = cell.difference
    p = "<.001" if cell.corrected < 0.001 else f"{cell.corrected:.3f}".removeprefix("0")
    places = 1 if one.high - one.low >= 1 else 2
    difference, low, high = (f"{number:+.{places}f}" for number in (one.value, one.low, one.high))
    return [value, difference, f"[{low}, {high}]", p, MARKS[cell.verdict]]


def heading(compared: SideBySide) -> list[str]:
    """Which systems there are, under which protocols they were measured, and in which settings they differ."""
    lines = [
        f"{'baseline' if place == 0 else 'compared'} {_described(system)}"
        for place, system in enumerate(compared.systems)
    ]
    for name, (words, fingerprints) in compared.protocols.items():
        lines.append(f"{name}: {words}; protocol {' | '.join(fingerprints)}")
    for name, values in compared.settings.items():
        lines.append(f"{name}: {' | '.join(map(plain, values))}")
    return lines


def notes(compared: SideBySide) -> list[str]:
    """How to read the differences, and what is not in the table and why."""
    lines = []
    if compared.tests:
        lines = [
            f"Δ: minus {compared.systems[0].name}, means over seeds; its interval from {RESAMPLES:,} paired bootstrap "
            "resamples of images, each with all its captions, and of seeds where a system has several.",
            f"p: corrected for all {compared.tests} differences (Holm). At p < {ALPHA}: {MARKS['better']} better, "
            f"{MARKS['worse']} worse, {MARKS['undecided']} nothing shown.",
        ]
        counted = {cell.seeds for line in compared.lines for cell in line.cells}
        if 1 in counted:
            lines.append("Of one seed the interval says nothing about what another seed would give.")
        if counted & set(range(2, FEW_SEEDS)):
            lines.append("Fewer than five seeds tell only roughly how much seeds differ.")
    lines += [f"the runs of {name} differ in {', '.join(found)}" for name, found in compared.uneven.items()]
    if compared.unfinished:
        lines.append(f"not finished: {', '.join(compared.unfinished)}")
    for name, lacking in compared.unmeasured.items():
        ties = " --ties official" if lacking and all(one.endswith(OFFICIAL) for one in lacking) else ""
        lines.append(f"not measured of {name}: {', '.join(lacking) or 'all'}. Do so: setwise eval {name}{ties}")
    return lines + _not_alike(compared)


def _described(system: System) -> str:
    names = ", ".join(run.name for run in system.runs)
    said = system.name if names == system.name else f"{system.name} ({names})"
    if not system.validation:
        return said
    values = np.array(system.validation)
    spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{said}, {VALIDATION} {values.mean():.1f}{spread}"


def _not_alike(compared: Comparison | SideBySide) -> list[str]:
    """What was left out since it cannot be compared, and what stayed although similarities differ."""
    own = dict.fromkeys(field for fields in compared.own_similarity.values() for field in fields)
    lines = [f"each model is measured with its own similarity: {'; '.join(own)}"] if own else []
    if compared.mixed:
        lines.append("left out, since measured under protocols that differ:")
    return lines + [f"  {name}: {'; '.join(fields)}" for name, fields in compared.mixed.items()]


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
