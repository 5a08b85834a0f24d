"""`setwise compare`: a study's trials in one overview, or systems side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from setwise.pipelines.terminal import JsonOption, StoreOption, emit, open_store, results, say
from setwise.platform.errors import ConfigError


def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="REF...",
            help="a study, for all of its trials; or systems, of which the first is the baseline: NAME stands for its "
            "seeds NAME-seed0, ..., and a study for its best trial",
        ),
    ],
    metrics: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="such as rsum, t2i_R1 or R5, or 'all'; else rsum, R1, map_at_r"),
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
    as_markdown: Annotated[bool, typer.Option("--md", help="Markdown on stdout")] = False,
    as_latex: Annotated[bool, typer.Option("--latex", help="a LaTeX tabular on stdout")] = False,
    page: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="write a page that opens offline")] = None,
) -> None:
    """Systems side by side: means over seeds, differences with their intervals, settings that differ."""
    if sum((as_json, as_markdown, as_latex)) > 1:
        raise ConfigError("of --json, --md and --latex, give one")
    from setwise.pipelines import compare as comparison
    from setwise.pipelines import comparison_page, references, tables

    folder = open_store(store)
    if len(names) == 1 and (trials := references.trials_of(names[0], folder)):
        if as_markdown or as_latex or page is not None or metrics is not None:
            raise ConfigError(
                "of a study alone there is an overview of its trials, as a table or with --json. To compare its best "
                f"trial with another system: setwise compare REF best:{names[0]}"
            )
        overview = comparison.compare(trials)
        if as_json:
            emit(overview.to_json())
        else:
            results.print(tables.comparison(overview))
        return

    wanted = comparison.MAIN if metrics is None else [name.strip() for name in metrics.split(",")]
    systems = [comparison.System.of(name, folder) for name in names]
    compared = comparison.side_by_side(systems, None if metrics == "all" else wanted)
    if as_json:
        emit(compared.to_json())
    elif as_markdown:
        results.out(comparison_page.markdown(compared), end="", highlight=False)
    elif as_latex:
        results.out(comparison_page.latex(compared), end="", highlight=False)
    else:
        results.print(tables.side_by_side(compared))
    if page is not None:
        from setwise.platform import storage

        storage.write_bytes(page, comparison_page.html(compared).encode())
        say(f"wrote {page}")
