"""What the verbs of the command line share: where results and progress go, and the options that many of them take."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from setwise.platform.errors import ConfigError

if TYPE_CHECKING:
    from setwise.platform.run import Run
    from setwise.platform.tracking import Tracker

PIPED_WIDTH = 200  # characters, where a table goes to a file or another program
progress = Console(file=sys.stderr, highlight=False, soft_wrap=True)
results = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=v]...", help="settings that differ")]
StoreOption = Annotated[
    Path | None, typer.Option("--store", help="folder of data, runs and studies; else $SETWISE_STORE, or .setwise")
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


def repeated(words: Sequence[str], options: Mapping[str, object]) -> str:
    """The command that was given, to be pasted into a shell. An option that was not given is None, one that was given
    several times a list."""
    parts = ["setwise", *words]
    for name, given in options.items():
        for value in given if isinstance(given, list) else [given]:
            parts += [name, str(value)] if value is not None else []
    return shlex.join(parts)


def check_port(port: int) -> None:
    """Raises ConfigError if nothing can listen on this port of this machine."""
    import socket

    try:
        with socket.create_server(("127.0.0.1", port)):
            pass
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "a port is a number from 1 to 65535"
        raise ConfigError(f"--port {port} cannot be used: {reason}. Choose another one") from error


def offer(tracker: Tracker, runs: Sequence[Run]) -> None:
    """Deliver what is new in the records of `runs`; where the store is away, say how to do it later."""
    from setwise.platform.tracking import Courier

    with Courier(tracker) as courier:
        for run in runs:
            courier.add(run)
