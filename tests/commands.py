"""Typing commands as a user does, in processes of their own, and looking at the processes they start."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import typer.main

from setwise.pipelines import cli
from setwise.platform import run

SETWISE = Path(sys.executable).parent / "setwise"


def environment(store: Path) -> dict[str, str]:
    return {**os.environ, "SETWISE_STORE": str(store), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


def setwise(store: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [SETWISE, *arguments], env=environment(store), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == code, f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def start(store: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [SETWISE, *arguments],
        env=environment(store),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_hear_interrupts,
    )


def _hear_interrupts() -> None:
    """Whatever started the tests in the background may have had Ctrl-C ignored, which is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition: Any, what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {seconds} s"
        time.sleep(0.05)


def descendants(process: int) -> set[int]:
    """All processes below `process`, by id."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    for line in listed.splitlines()[1:]:
        pid, parent = map(int, line.split())
        children.setdefault(parent, []).append(pid)
    found, todo = set(), [process]
    while todo:
        below = children.get(todo.pop(), [])
        found.update(below)
        todo += below
    return found


def alive(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def epochs_logged(training: run.Run) -> list[int]:
    return [event["step"] for event in run.read_events(training.events) if event.get("series") == "train"]


def parses(line: str) -> None:
    """Asserts that `setwise VERB ...`, as somebody would type it, is a command with these options."""
    words = shlex.split(line)[1:]
    group: Any = typer.main.get_command(cli.app)
    while hasattr(group, "commands"):
        name, *words = words
        if name not in group.commands and "run" in group.commands:  # setwise sweep STUDY
            name, words = "run", [name, *words]
        assert name in group.commands, f"'{line}' names no verb"
        group = group.commands[name]
    assert group.make_context("setwise", words).params is not None
