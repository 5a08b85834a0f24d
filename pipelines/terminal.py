"""What the verbs of the command line share: where results and progress go, and the options that many of them take."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from setwise.platform.run import Run
    from setwise.platform.tracking import Tracker

PIPED_WIDTH = 200  # characters, where a table goes to a file or another program
progress = Console(file=sys.stderr, highlight=False, soft_wrap=True)
results = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=v]...", help="settings that differ")]
StoreOption = Annotated[
    Path | None, typer.Option("--store", help="folder of data, runs and studies [default: $SETWISE_STORE or .setwise]")
]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON object on stdout instead of a table")]
OnOption = Annotated[str | None, typer.Option("--on", metavar="PRESET", help="hardware, such as rtx3090x1 or h200x1")]
Ref = Annotated[
    str, typer.Argument(metavar="REF", help="run name, 'last', best:STUDY, models:/NAME@ALIAS, or a checkpoint folder")
]


def say(message: str) -> None:
    """A line of progress."""
    progress.print(message, markup=False)


def emit(value: dict[str, Any]) -> None:
    """One JSON object as the result."""
    print(json.dumps(value, indent=1))  # noqa: T201


def open_store(path: Path | None) -> Path:
    from setwise.platform import storage

    return storage.root(path)


def open_tracker(store: Path) -> Tracker:
    from setwise.platform.tracking import Tracker

    return Tracker(store)


def offer(tracker: Tracker, runs: Sequence[Run]) -> None:
    """Deliver what is new in the records of `runs`; where the store is away, say how to do it later."""
    from setwise.platform.tracking import Courier

    with Courier(tracker) as courier:
        for run in runs:
            courier.add(run)
