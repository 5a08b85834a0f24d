"""A comparison written out: Markdown for a README or an issue, LaTeX for a paper, and a page that opens offline."""

from __future__ import annotations

import re
from typing import Any

from setwise.pipelines import page, statistics, tables
from setwise.pipelines.compare import Cell, SideBySide

COLUMNS = ("benchmark", "metric", "system", "seeds", "mean ± sd", "Δ", f"{statistics.CONFIDENCE:.0f} % interval", "p")
TEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "Δ": r"$\Delta$", "▲": r"$\blacktriangle$", "▼": r"$\blacktriangledown$", "≈": r"$\approx$"},
    **{"<": "$<$", ">": "$>$", "|": "$|$"},
}
"""What LaTeX reads otherwise than it is written; the triangles take the package amssymb."""
MINUS = re.compile(r"(?<!\w)-(?=\d)")


def markdown(compared: SideBySide) -> str:
    """Tables with the notes below."""
    rows = [[*COLUMNS, ""], ["---"] * 3 + ["---:"] * (len(COLUMNS) - 2), *_rows(compared)]
    lines = ["| " + " | ".join(one.replace("|", "\\|") for one in row) + " |" for row in rows]
    table = [*lines, ""] if compared.lines else []
    said = [f"- {_marked(line)}" for line in tables.heading(compared) + tables.notes(compared)]
    return "\n".join(table + said) + "\n"


def latex(compared: SideBySide) -> str:
    """A tabular of the package booktabs, one group of lines a benchmark, with the notes as comments."""
    said = [f"% {line}" for line in tables.heading(compared) + tables.notes(compared)]
    body = []
    for place, row in enumerate(_rows(compared)):
        if place and row[0]:
            body.append(r"\midrule")
        body.append(" & ".join(_tex(one) for one in row) + r" \\")
    head = " & ".join(map(_tex, [*COLUMNS, ""])) + r" \\"
    columns = "lll" + "r" * (len(COLUMNS) - 2)
    table = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join([*said, *table]) + "\n"


def html(compared: SideBySide) -> str:
    """A page with each difference and its interval drawn as well."""
    return page.render(
        "comparison.html",
        names=[system.name for system in compared.systems],
        heading=tables.heading(compared),
        notes=tables.notes(compared),
        columns=COLUMNS,
        groups=_groups(compared),
    )


def _rows(compared: SideBySide) -> list[list[str]]:
    """The cells of the table as text; what repeats the row above is empty."""
    rows, before = [], ""
    for line in compared.lines:
        metric = tables.metric_name(line.metric)
        for cell in line.cells:
            benchmark = "" if line.benchmark == before else line.benchmark
            rows.append([benchmark, metric, cell.system, tables.seeds(compared, cell), *tables.numbers(cell)])
            before, metric = line.benchmark, ""
    return rows


def _groups(compared: SideBySide) -> list[dict[str, Any]]:
    """By benchmark the rows of the table, with the place of each interval in percent of the widest of its metric."""
    rows = iter(_rows(compared))
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in compared.lines:
        ends = [max(abs(d.low), abs(d.high)) for cell in line.cells if (d := cell.difference) is not None]
        for cell in line.cells:
            texts = next(rows)[1:]
            group = groups.setdefault(line.benchmark, [])
            group.append({"texts": texts, "verdict": cell.verdict, "drawn": _drawn(cell, max(ends, default=0))})
    return [{"benchmark": benchmark, "rows": found} for benchmark, found in groups.items()]


def _drawn(cell: Cell, widest: float) -> dict[str, float] | None:
    """Low end, value and high end between 0 and 100, where 50 is no difference."""
    if cell.difference is None:
        return None
    one, scale = cell.difference, 48 / max(widest, 1e-9)
    return {"low": 50 + one.low * scale, "value": 50 + one.value * scale, "high": 50 + one.high * scale}


def _tex(text: str) -> str:
    return MINUS.sub("$-$", "".join(TEX.get(sign, sign) for sign in text))


def _marked(text: str) -> str:
    """Plain text in Markdown."""
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]<>#|" else sign for sign in text)
