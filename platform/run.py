"""A run: one training, as a folder that records all of it.

NAME/
  run.json           experiment, parent, commit
  config.yaml        the resolved configuration
  environment.json   versions and machine
  code.diff          what differed from that commit
  events.jsonl       parameters, metrics and tags in order, with their times: the outbox that tracking delivers
  checkpoints/       epoch_0007/ ..., and best.json, which names the best of them
  evaluation/        one JSON file a benchmark
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform  # the standard library's: this folder has no __init__.py, so it cannot be shadowed
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setwise.platform import checkpoint, storage
from setwise.platform.errors import ConfigError, DataError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
MAX_DIFF_BYTES = 1_000_000
WRITER_WAIT_S = 60
RECORDED_PACKAGES = (
    *("setwise", "ray", "torch", "torchvision", "transformers", "tokenizers"),
    *("mlflow", "optuna", "numpy", "pyarrow", "pillow"),
)


@dataclass(frozen=True)
class Run:
    """The folder of one training and the names inside it."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def events(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation"

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def experiment(self) -> str:
        """The MLflow experiment that the run belongs to."""
        return str(storage.read_json(self.folder / "run.json")["experiment"])

    @property
    def parent(self) -> Run | None:
        """The run that this one is a part of, as a trial is of a sweep."""
        path = storage.read_json(self.folder / "run.json")["parent"]
        return Run((self.folder / path).resolve()) if path else None

    @property
    def status(self) -> str | None:
        """How it ended, FINISHED or FAILED; None while it has not."""
        ends = [event["value"] for event in read_events(self.events) if event["kind"] == "status"]
        return str(ends[-1]) if ends else None

    def best_checkpoint(self) -> Path:
        """The verified checkpoint with the best validation value.

        Raises:
            DataError: the run has none, or it is damaged.
        """
        try:
            folder = self.checkpoints / str(storage.read_json(self.folder / "best.json")["checkpoint"])
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{self.folder}: this run has no checkpoint yet") from error
        checkpoint.verify(folder)
        return folder


@contextlib.contextmanager
def writing(run: Run) -> Iterator[None]:
    """Be the one process that trains `run`. What a killed driver left behind may train on for some seconds: wait."""
    with storage.lease(run.folder / "writer.lease", f"run '{run.name}'", wait_s=WRITER_WAIT_S):
        yield


def check_name(name: str) -> str:
    """A name that is safe as a folder: lower-case letters, digits, dot, dash and underscore."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"'{name}' cannot name a run: use lower-case letters, digits, '.', '_' and '-', 80 at most")
    return name


def create(folder: Path, name: str, config_yaml: str, experiment: str, parent: Run | None = None) -> Run:
    """The run called `name` in `folder`: made if new, reopened if it has this configuration.

    Raises:
        ConfigError: the name is taken by a run with another configuration.
    """
    run = Run(folder / check_name(name))
    if run.config.is_file():
        if run.config.read_text() != config_yaml:
            raise ConfigError(
                f"run '{name}' exists with another configuration ({run.config}). "
                f"Choose another name, or compare them: setwise config diff {run.config} ..."
            )
        return run
    run.folder.mkdir(parents=True, exist_ok=True)
    storage.write_json(run.folder / "environment.json", environment())
    commit, difference = code_state(Path(__file__).parent)
    if difference:
        storage.write_bytes(run.folder / "code.diff", difference)
    path = os.path.relpath(parent.folder, run.folder) if parent else None
    identity = {"experiment": experiment, "parent": path, **commit}
    storage.write_json(run.folder / "run.json", identity)
    storage.write_bytes(run.config, config_yaml.encode())  # last: its presence means that the folder is complete
    return run


def environment() -> dict[str, Any]:
    """What this process runs on."""
    packages = {}
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "packages": packages,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def code_state(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Commit of the checkout around `folder`, and the difference to it, capped; empty where there is no git."""

    def git(*arguments: str) -> bytes | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "dirty": None}, b""
    difference = git("diff", "HEAD", "--no-color", "--no-ext-diff") or b""
    unknown = (git("ls-files", "--others", "--exclude-standard", ":/") or b"").decode(errors="replace").splitlines()
    state = {
        "commit": commit.decode().strip(),
        "dirty": bool(difference or unknown),  # a run with a module that git does not know cannot be repeated either
        "diff_bytes": len(difference),
        "untracked": unknown[:100],
    }
    return state, difference[:MAX_DIFF_BYTES]


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run in order. A line is a list of events written at once; one that was cut short is left out."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return [event for line in data.split(b"\n") for event in parse_events(line) or []]


def parse_events(line: bytes) -> list[dict[str, Any]] | None:
    """The events of a line; None if it is not a whole one. No beginning of a JSON list is one itself."""
    try:
        written_at_once = json.loads(line)
    except ValueError:
        return None
    if not isinstance(written_at_once, list):
        return None
    return [event for event in written_at_once if isinstance(event, dict)]
